"""Plain PyTorch specification of the routing operations; every faster version must equal it.

A token's K choices are K *routed rows*. Rows are sorted by expert, and by token within an expert, so that each
expert sees one contiguous slice.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token goes to, and the permutation that groups rows by expert.

    ids_TK (int64): chosen experts, best first. weights_TK: their weights, with gradient.
    counts_E (int64): rows of each expert. order_N (int64): row n is choice `order_N[n]` of the flattened ids_TK.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    order_N: Tensor


class RouterStatistics(NamedTuple):
    """Sums over the real (not padding) tokens of one layer; scalars and losses are fp32 and differentiable.

    balance_sum: E · Σ_e (share of tokens sent to e) · (Σ_tokens p_e), Switch Transformer eq. 4 (arXiv 2101.03961)
    times the token count. z_sum: Σ_tokens logsumexp², ST-MoE eq. 5 (arXiv 2202.08906). entropy_sum: Σ_tokens
    entropy of the softmax, no gradient. load_E: rows of real tokens per expert, no gradient.
    """

    balance_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    load_E: Tensor


def route(
    logits_TE: Tensor,
    num_active: int,
    renormalise: bool = True,
    valid_T: Tensor | None = None,
    allowed: Tensor | None = None,
) -> tuple[Routing, RouterStatistics]:
    """Softmax in fp32, top-k, renormalise; the losses' sums over `valid_T` (bool, None = all tokens).

    `allowed` ([E] or [T, E] bool, at least K a token; None = all) limits the top-k; the statistics stay those
    of the softmax over all E. Renormalised weights are the softmax of the chosen logits: the same, and right
    even where the probabilities of all allowed experts are 0 in fp32.
    """
    num_experts = logits_TE.shape[1]
    logits_TE = logits_TE.float()
    lse_T = logits_TE.logsumexp(-1)
    probs_TE = (logits_TE - lse_T[:, None]).exp()
    candidates_TE = logits_TE if allowed is None else logits_TE.masked_fill(~allowed, -math.inf)
    chosen_TK, ids_TK = candidates_TE.topk(num_active, dim=-1)
    weights_TK = chosen_TK.softmax(-1) if renormalise else (chosen_TK - lse_T[:, None]).exp()

    flat_N = ids_TK.reshape(-1)
    routing = Routing(
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        counts_E=torch.bincount(flat_N, minlength=num_experts),
        order_N=flat_N.argsort(stable=True),
    )

    valid_T = torch.ones_like(lse_T) if valid_T is None else valid_T.float()
    load_E = torch.zeros_like(probs_TE[0]).index_add_(0, flat_N, valid_T.repeat_interleave(num_active))
    share_E = load_E / valid_T.sum().clamp(min=1)
    statistics = RouterStatistics(
        balance_sum=num_experts * (share_E * (valid_T[:, None] * probs_TE).sum(0)).sum(),
        z_sum=(valid_T * lse_T.square()).sum(),
        entropy_sum=(valid_T * (lse_T - (probs_TE * logits_TE).sum(-1))).sum().detach(),
        load_E=load_E,
    )
    return routing, statistics


class Permute(torch.autograd.Function):
    """Routed rows of the tokens; its backward is a gather and a sum over K, so no atomics and a fixed order."""

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, order_N: Tensor, num_active: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.num_active = num_active
        return hidden_TD[order_N // num_active]

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (order_N,) = ctx.saved_tensors
        grad_TKD = grad_ND[inverse(order_N)].view(-1, ctx.num_active, grad_ND.shape[-1])
        return grad_TKD.sum(1), None, None


class Unpermute(torch.autograd.Function):
    """Rows back in the order of the flattened choices: the inverse gather, with a gather as its backward."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return rows_ND[inverse(order_N)]

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (order_N,) = ctx.saved_tensors
        return grad_ND[order_N], None


def inverse(order_N: Tensor) -> Tensor:
    """The inverse permutation."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def permute(hidden_TD: Tensor, routing: Routing) -> Tensor:
    """hidden_TD to routed rows [N, D], sorted by expert."""
    return Permute.apply(hidden_TD, routing.order_N, routing.ids_TK.shape[1])


def combine(rows_ND: Tensor, routing: Routing) -> Tensor:
    """Expert outputs [N, D] to tokens [T, D]: the weighted sum over each token's K rows."""
    num_tokens, num_active = routing.ids_TK.shape
    rows_TKD = Unpermute.apply(rows_ND, routing.order_N).view(num_tokens, num_active, -1)
    return torch.einsum("tk,tkd->td", routing.weights_TK.to(rows_ND.dtype), rows_TKD)


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate_NF) * up_NF
