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
    counts_E (int64): rows of each expert; rows behind these are dropped (see `model.capacity.within_capacity`).
    order_N (int64): row n is choice `order_N[n]` of the flattened ids_TK. places_TK (int64): the row of each
    choice, the inverse of order_N.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    order_N: Tensor
    places_TK: Tensor


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
    bias_E: Tensor | None = None,
    scores: str = "softmax",
    scale: float = 1.0,
) -> tuple[Routing, RouterStatistics]:
    """Scores in fp32, the K best experts, their weights; the losses' sums over `valid_T` (bool, None = all).

    scores: softmax, or sigmoid of each logit by itself. `allowed` ([E] or [T, E] bool, at least K a token; None =
    all) limits the choice. bias_E is added to the scores for the choice alone, as in DeepSeek-V3's loss-free
    balancing (arXiv 2408.15664). Of equals the lowest ids are chosen, and NaN before all. The weights are the
    chosen scores, renormalised to a sum of 1 if asked, times `scale`. The statistics stay those of the softmax
    over all E.

    Renormalised weights are the softmax of the logarithms of the scores: the same, and right even where all the
    chosen scores are 0 in fp32. fp64 logits are routed in fp64.
    """
    num_experts = logits_TE.shape[1]
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    lse_T = logits_TE.logsumexp(-1)
    probs_TE = (logits_TE - lse_T[:, None]).exp()
    wish_TE = logits_TE.detach()
    if bias_E is not None:
        wish_TE = (logits_TE.sigmoid() if scores == "sigmoid" else probs_TE).detach() + bias_E
    if allowed is not None:
        wish_TE = wish_TE.masked_fill(~allowed, -math.inf)
    ids_TK = wish_TE.argsort(dim=-1, descending=True, stable=True)[:, :num_active].contiguous()
    logs_TK = logits_TE.gather(1, ids_TK)
    if scores == "sigmoid":
        logs_TK = F.logsigmoid(logs_TK)
    elif not renormalise:
        logs_TK = logs_TK - lse_T[:, None]
    weights_TK = scale * (logs_TK.softmax(-1) if renormalise else logs_TK.exp())

    flat_N = ids_TK.reshape(-1)
    order_N = flat_N.argsort(stable=True)
    routing = Routing(
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        counts_E=flat_N.new_zeros(num_experts).index_add_(0, flat_N, torch.ones_like(flat_N)),
        order_N=order_N,
        places_TK=inverse(order_N).view_as(ids_TK),
    )

    valid_T = torch.ones_like(lse_T) if valid_T is None else valid_T.to(lse_T.dtype)
    load_E = lse_T.new_zeros(num_experts).index_add_(0, flat_N, valid_T.repeat_interleave(num_active))
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
    def forward(ctx, hidden_TD: Tensor, order_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK)
        return hidden_TD[order_N // places_TK.shape[1]]

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        (places_TK,) = ctx.saved_tensors
        return unpermute(grad_ND, places_TK), None, None


class Unpermute(torch.autograd.Function):
    """Each token's rows [T, K, D]: the inverse gather, with a gather as its backward."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, order_N: Tensor, places_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_N)
        return rows_ND[places_TK]

    @staticmethod
    def backward(ctx, grad_TKD: Tensor):
        (order_N,) = ctx.saved_tensors
        return grad_TKD.flatten(0, 1)[order_N], None, None


def inverse(order_N: Tensor) -> Tensor:
    """The inverse permutation."""
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def permute(hidden_TD: Tensor, routing: Routing) -> Tensor:
    """hidden_TD to routed rows [N, D], sorted by expert."""
    return Permute.apply(hidden_TD, routing.order_N, routing.places_TK)


def unpermute(rows_ND: Tensor, places_TK: Tensor) -> Tensor:
    """Routed rows [N, D] to tokens [T, D]: the sum over each token's K rows, the transpose of `permute`."""
    return rows_ND[places_TK].sum(1)


def combine(rows_ND: Tensor, routing: Routing) -> Tensor:
    """Expert outputs [N, D] to tokens [T, D]: the weighted sum over each token's K rows."""
    rows_TKD = Unpermute.apply(rows_ND, routing.order_N, routing.places_TK)
    return torch.einsum("tk,tkd->td", routing.weights_TK.to(rows_ND.dtype), rows_TKD)


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate_NF) * up_NF
