"""`kernels.reference.permute` and `combine` as Triton kernels: two, each with and without weights.

    spread_kernel   a token to each of its K rows: permute, and the backward of combine
    gather_kernel   a token's K rows added up, in the order of its choices: combine, and the backward of permute

Either way a token is read or written once, whatever K is. A program spreads whole tokens; it gathers one token
piece by piece, or several short ones at once.
Sums are fp32 (fp64 for fp64), rounded once, and nothing is atomic: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import Routing

PIECE = 1024  # values of a token that are added up at a time


def permute(hidden_TD: Tensor, routing: Routing) -> Tensor:
    """`kernels.reference.permute`."""
    return permute_op(hidden_TD, routing.places_TK)


def combine(rows_ND: Tensor, routing: Routing) -> Tensor:
    """`kernels.reference.combine`, with the weights in fp32."""
    return gather_op(rows_ND, routing.places_TK, routing.weights_TK)


def unpermute(rows_ND: Tensor, places_TK: Tensor) -> Tensor:
    """`kernels.reference.unpermute`."""
    return gather_op(rows_ND, places_TK, None)


@torch.library.custom_op("pragnosia::permute", mutates_args=())
def permute_op(hidden_TD: Tensor, places_TK: Tensor) -> Tensor:
    """rows_ND with hidden_TD[t] at each of places_TK[t]."""
    rows_ND = hidden_TD.new_empty(places_TK.numel(), hidden_TD.shape[1])
    spread(hidden_TD.contiguous(), places_TK, rows_ND)
    return rows_ND


@permute_op.register_fake
def _(hidden_TD, places_TK):
    return hidden_TD.new_empty(places_TK.numel(), hidden_TD.shape[1])


@torch.library.custom_op("pragnosia::gather", mutates_args=())
def gather_op(rows_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Σ_k weights_TK[t, k] · rows_ND[places_TK[t, k]], in the dtype of the rows."""
    rows_ND = rows_ND.contiguous()
    (T, K), D = places_TK.shape, rows_ND.shape[1]
    output_TD = rows_ND.new_empty(T, D)
    if weights_TK is not None:
        weights_TK = weights_TK.contiguous()
    launch, shape = gather_tile(D, K)
    if output_TD.numel():
        gather_kernel[(triton.cdiv(T, shape["BLOCK_T"]),)](
            rows_ND, places_TK, weights_TK, output_TD, T, D, K, real(rows_ND), **shape, **launch
        )
    return output_TD


@gather_op.register_fake
def _(rows_ND, places_TK, weights_TK):
    return rows_ND.new_empty(places_TK.shape[0], rows_ND.shape[1])


@torch.library.custom_op("pragnosia::combine_backward", mutates_args=())
def combine_backward_op(
    grad_TD: Tensor, rows_ND: Tensor, places_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weights."""
    grad_rows_ND, grad_weights_TK = like(rows_ND), like(weights_TK)
    rows_ND, weights_TK = rows_ND.contiguous(), weights_TK.contiguous()
    spread(grad_TD.contiguous(), places_TK, grad_rows_ND, rows_ND, weights_TK, grad_weights_TK)
    return grad_rows_ND, grad_weights_TK


@combine_backward_op.register_fake
def _(grad_TD, rows_ND, places_TK, weights_TK):
    return like(rows_ND), like(weights_TK)


def keep_permute(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def permute_backward(ctx, grad_ND):
    return gather_op(grad_ND, *ctx.saved_tensors, None), None


def keep_gather(ctx, inputs, output) -> None:
    rows_ND, places_TK, weights_TK = inputs
    ctx.save_for_backward(None if weights_TK is None else rows_ND, places_TK, weights_TK)


def gather_backward(ctx, grad_TD):
    rows_ND, places_TK, weights_TK = ctx.saved_tensors
    if weights_TK is None:
        return permute_op(grad_TD, places_TK), None, None
    grad_rows_ND, grad_weights_TK = combine_backward_op(grad_TD, rows_ND, places_TK, weights_TK)
    return grad_rows_ND, None, grad_weights_TK


permute_op.register_autograd(permute_backward, setup_context=keep_permute)
gather_op.register_autograd(gather_backward, setup_context=keep_gather)


def spread(x_TD, places_TK, out_ND, rows_ND=None, weights_TK=None, grad_weights_TK=None) -> None:
    """Run `spread_kernel`."""
    (T, K), D = places_TK.shape, x_TD.shape[1]
    launch, shape = spread_tile(D)
    if T:
        spread_kernel[(triton.cdiv(T, shape["BLOCK_T"]),)](
            x_TD, places_TK, out_ND, rows_ND, weights_TK, grad_weights_TK,
            T, D, K, real(x_TD), **shape, **launch,
        )  # fmt: skip


def spread_tile(width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Warps of a program, and its tile: 16 values a thread, of one token or of several short ones."""
    block_D = max(16, triton.next_power_of_2(width))
    block_T, warps = max(1, 2048 // block_D), min(16, max(4, block_D // 512))
    return {"num_warps": warps, "enable_fp_fusion": True}, {"BLOCK_T": block_T, "BLOCK_D": block_D}


def gather_tile(width: int, active: int) -> tuple[dict[str, int], dict[str, int]]:
    """Warps of a program that gathers, and its tile: pieces of one token, or several short tokens of few rows."""
    block_D = min(PIECE, max(16, triton.next_power_of_2(width)))
    block_T = max(1, 2 * PIECE // (triton.next_power_of_2(active) * block_D))
    return {"num_warps": 4, "enable_fp_fusion": True}, {"BLOCK_T": block_T, "BLOCK_D": block_D}


def real(tensor: Tensor) -> tl.dtype:
    """What is computed in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


@triton.jit
def spread_kernel(
    x, places, out, rows, weights, grad_weights, T, D,
    K: tl.constexpr, REAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[places[t, k]] = x[t], or weights[t, k] · x[t] and grad_weights[t, k] = ⟨rows[places[t, k]], x[t]⟩."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = t < T
    both = inside[:, None] & (d < D)
    value = tl.load(x + t[:, None] * D + d, both, 0.0)
    for k in tl.static_range(K):
        place = tl.load(places + t * K + k, inside, 0)[:, None] * D + d
        if weights is None:
            tl.store(out + place, value, both)
        else:
            row = tl.load(rows + place, both, 0.0).to(REAL)
            weight = tl.load(weights + t * K + k, inside, 0.0).to(REAL)
            tl.store(out + place, (weight[:, None] * value.to(REAL)).to(out.dtype.element_ty), both)
            dot = tl.sum(row * value.to(REAL), 1)
            tl.store(grad_weights + t * K + k, dot.to(grad_weights.dtype.element_ty), inside)


@triton.jit
def gather_kernel(
    rows, places, weights, out, T, D,
    K: tl.constexpr, REAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = Σ_k rows[places[t, k]], each times weights[t, k] if there are any."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        both = inside[:, None] & (d < D)
        total = tl.zeros([BLOCK_T, BLOCK_D], REAL)
        for k in tl.static_range(K):
            place = tl.load(places + t * K + k, inside, 0)[:, None]
            row = tl.load(rows + place * D + d, both, 0.0).to(REAL)
            if weights is not None:
                row *= tl.load(weights + t * K + k, inside, 0.0).to(REAL)[:, None]
            total += row
        tl.store(out + t[:, None] * D + d, total.to(out.dtype.element_ty), both)
