"""`kernels.reference.route` as Triton kernels, forward and backward.

Tokens are cut in P consecutive chunks, a program each. The histograms of the chunks before one tell where its rows
begin in each expert's slice, so rows are placed without atomics and in the order of a stable sort; sums are added
in an order that the shapes alone decide. Hence the same bits in every run.

    forward_kernel    choices, weights, logsumexp; per chunk histograms and sums of probabilities and of losses
    finalize_kernel   adds the chunks up; a chunk's histogram becomes where its rows begin within their expert
    place_kernel      the permutation and its inverse; one more program adds up the losses
    backward_kernel   the gradient of the logits; probabilities are computed again

Nothing waits for the device, so all of it can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import RouterStatistics, Routing

PROGRAMS = 512  # at most so many chunks: some for each multiprocessor, and few enough to add up
TILE = 1024  # tokens · experts that a program holds in registers
PLACE_TILE, PLACE_ROWS = 4096, 64  # rows · experts, and at most so many rows, that are placed at once
FINALIZE = {"BLOCK_P": 512, "BLOCK_E": 4}
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}
LAUNCH_BACKWARD = LAUNCH | {"num_warps": 1}
LOWEST = tl.constexpr(-(2**31))  # below all values
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


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
    """`kernels.reference.route`; fp64 logits are compared as fp32."""
    results = route_op(
        logits_TE, num_active, renormalise, scores == "sigmoid", scale, valid_T, allowed, bias_E
    )
    return Routing(*results[:5]), RouterStatistics(*results[5:9])


@torch.library.custom_op("pragnosia::route", mutates_args=())
def route_op(
    logits_TE: Tensor,
    num_active: int,
    renormalise: bool,
    sigmoid: bool,
    scale: float,
    valid_T: Tensor | None,
    allowed: Tensor | None,
    bias_E: Tensor | None,
) -> tuple[(Tensor,) * 11]:
    """The fields of `Routing`, those of `RouterStatistics`, lse_T and the number of valid tokens."""
    logits_TE, bias_E = logits_TE.contiguous(), None if bias_E is None else bias_E.contiguous()
    valid_T, allowed = as_bytes(valid_T), as_bytes(allowed)
    results = empty_results(logits_TE, num_active)
    ids_TK, weights_TK, counts_E, order_N, places_TK, balance, z, entropy, load_E, lse_T, tokens = results
    (T, E), K = logits_TE.shape, num_active
    tokens_a_tile, block_E = tile(E)
    block_K = triton.next_power_of_2(K)
    chunk = tokens_a_tile * max(1, triton.cdiv(T, tokens_a_tile * PROGRAMS))
    P = max(1, triton.cdiv(T, chunk))
    first_PE = ids_TK.new_empty(P, E, dtype=torch.int32)
    load_PE = None if valid_T is None else torch.empty_like(first_PE)
    probs_PE, probs_E, sums_3P = lse_T.new_empty(P, E), lse_T.new_empty(E), lse_T.new_empty(3, P)
    forward_kernel[(P,)](
        logits_TE, valid_T, allowed, bias_E, ids_TK, weights_TK, lse_T, first_PE, load_PE, probs_PE, sums_3P,
        T, E, chunk, scale, 0 if allowed is None or allowed.dim() == 1 else E,
        K, renormalise, sigmoid, TYPES[lse_T.dtype], tokens_a_tile, block_E, block_K, **LAUNCH,
    )  # fmt: skip
    finalize_kernel[(triton.cdiv(E, FINALIZE["BLOCK_E"]),)](
        first_PE, load_PE, probs_PE, counts_E, load_E, probs_E, P, E, **FINALIZE, **LAUNCH
    )
    rows, _ = tile(E, PLACE_TILE)
    place_kernel[(P + 1,)](
        ids_TK, first_PE, counts_E, load_E, probs_E, sums_3P, order_N, places_TK, balance, z, entropy, tokens,
        T, E, P, chunk, K, min(rows, PLACE_ROWS), block_E, triton.next_power_of_2(PROGRAMS), **LAUNCH,
    )  # fmt: skip
    return results


@route_op.register_fake
def _(logits_TE, num_active, *_):
    return empty_results(logits_TE, num_active)


@torch.library.custom_op("pragnosia::route_backward", mutates_args=())
def route_backward_op(
    logits_TE: Tensor,
    renormalise: bool,
    sigmoid: bool,
    scale: float,
    valid_T: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    load_E: Tensor,
    lse_T: Tensor,
    tokens: Tensor,
    grad_weights_TK: Tensor | None,
    grad_balance: Tensor | None,
    grad_z: Tensor | None,
) -> Tensor:
    """The gradient of the logits; no gradient of a result is as good as zeros."""
    grad_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    logits_TE = logits_TE.contiguous()
    (T, E), K = logits_TE.shape, ids_TK.shape[1]
    if grad_weights_TK is not None:
        grad_weights_TK = grad_weights_TK.contiguous()
    tokens_a_tile, block_E = tile(E, TILE // 4)
    if T:
        backward_kernel[(triton.cdiv(T, tokens_a_tile),)](
            logits_TE, as_bytes(valid_T), ids_TK, weights_TK, load_E, lse_T, tokens,
            grad_weights_TK, grad_balance, grad_z, grad_TE,
            T, E, scale, K, renormalise, sigmoid, TYPES[lse_T.dtype], tokens_a_tile, block_E, **LAUNCH_BACKWARD,
        )  # fmt: skip
    return grad_TE


@route_backward_op.register_fake
def _(logits_TE, *_):
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def setup_context(ctx, inputs, output) -> None:
    logits_TE, _, *ctx.options, valid_T, _, _ = inputs
    ids_TK, weights_TK, counts_E, order_N, places_TK, _, _, entropy, load_E, lse_T, tokens = output
    ctx.save_for_backward(logits_TE, valid_T, ids_TK, weights_TK, load_E, lse_T, tokens)
    ctx.mark_non_differentiable(ids_TK, counts_E, order_N, places_TK, entropy, load_E, lse_T, tokens)
    ctx.set_materialize_grads(False)


def backward(ctx, *grads):
    logits_TE, *saved = ctx.saved_tensors
    grad_TE = route_backward_op(logits_TE, *ctx.options, *saved, grads[1], grads[5], grads[6])
    return grad_TE, *[None] * 7


route_op.register_autograd(backward, setup_context=setup_context)


def empty_results(logits_TE: Tensor, num_active: int) -> tuple[Tensor, ...]:
    """Room for what `route_op` returns: int64, and fp32 or as wide as the logits."""
    tokens, experts = logits_TE.shape
    real = torch.promote_types(logits_TE.dtype, torch.float32)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits_TE.new_empty(shape, dtype=dtype)

    choices, integer = (tokens, num_active), torch.int64
    routing = (
        empty(integer, *choices), empty(real, *choices), empty(integer, experts),
        empty(integer, tokens * num_active), empty(integer, *choices),
    )  # fmt: skip
    statistics = empty(real), empty(real), empty(real), empty(real, experts)
    return *routing, *statistics, empty(real, tokens), empty(real)


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """bool as uint8."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def tile(num_experts: int, size: int = TILE) -> tuple[int, int]:
    """How many tokens, and experts with padding, a program holds at once."""
    block_E = max(2, triton.next_power_of_2(num_experts))
    return max(1, size // block_E), block_E


@triton.jit
def forward_kernel(
    logits, valid, allowed, bias, ids, weights, lse_T, hist_PE, load_PE, probs_PE, sums_3P,
    T, E, chunk, scale, allowed_stride,
    K: tl.constexpr, RENORMALISE: tl.constexpr, SIGMOID: tl.constexpr, REAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program routes the tokens of one chunk."""
    program = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    exists = e < E
    hist = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    load = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    probs = tl.zeros([BLOCK_T, BLOCK_E], REAL)
    z = tl.zeros([BLOCK_T], REAL)
    entropy = tl.zeros([BLOCK_T], REAL)
    tokens = tl.zeros([BLOCK_T], REAL)
    end = tl.minimum((program + 1) * chunk, T)
    for start in range(program * chunk, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < end
        raw = tl.load(logits + t[:, None] * E + e, inside[:, None] & exists, 0.0)
        x = raw.to(REAL)
        largest = tl.max(tl.where(exists, x, float("-inf")), 1)
        power = tl.where(exists, tl.exp(x - largest[:, None]), 0.0)
        total = tl.sum(power, 1)
        p = power / total[:, None]
        lse = largest + tl.log(total)
        tl.store(lse_T + t, lse, inside)

        wish = raw
        if bias is not None:
            wish = (sigmoid(x) if SIGMOID else p) + tl.load(bias + e, exists, 0.0)
        if allowed is not None:
            mask = tl.load(allowed + t[:, None] * allowed_stride + e, inside[:, None] & exists, 0)
            wish = tl.where(mask != 0, wish, float("-inf"))
        narrow: tl.constexpr = wish.dtype.primitive_bitwidth == 16
        key = ordered(wish)
        if narrow:  # room for the expert behind the value: one maximum tells both
            key = (key << 16) | (BLOCK_E - 1 - e)
        key = tl.where(exists, key, LOWEST)
        i_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
        for choice in tl.static_range(K):
            best = tl.max(key, 1)
            if narrow:  # noqa: SIM108 (Triton would compile both)
                i = BLOCK_E - 1 - (best & 0xFFFF)
            else:
                i = tl.min(tl.where(key == best[:, None], e, BLOCK_E), 1)
            i_TK = tl.where(k == choice, i[:, None], i_TK)
            key = tl.where(e == i[:, None], LOWEST, key)
        chosen = exists & (key == LOWEST)
        place, present = t[:, None] * K + k, inside[:, None] & (k < K)
        tl.store(ids + place, i_TK, present)
        # Logarithms of the chosen scores; what they have in common cancels where they are renormalised.
        log = tl.load(logits + t[:, None] * E + i_TK, present, 0.0).to(REAL)
        if SIGMOID:
            log = tl.minimum(log, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(log)))
        elif not RENORMALISE:
            log -= lse[:, None]
        if RENORMALISE:
            log -= tl.max(tl.where(k < K, log, float("-inf")), 1)[:, None]
            weight = tl.where(k < K, tl.exp(log), 0.0)
            weight /= tl.sum(weight, 1)[:, None]
        else:
            weight = tl.exp(log)
        tl.store(weights + place, scale * weight, present)

        chosen = chosen & inside[:, None]
        hist += chosen.to(tl.int32)
        is_real = inside
        if valid is not None:
            is_real = tl.load(valid + t, inside, 0) != 0
            load += (chosen & is_real[:, None]).to(tl.int32)
        v = is_real.to(REAL)
        probs += p * v[:, None]
        z += v * lse * lse
        entropy += v * (lse - tl.sum(tl.where(exists, p * x, 0.0), 1))
        tokens += v

    e = tl.arange(0, BLOCK_E)
    place = program * E + e
    tl.store(hist_PE + place, tl.sum(hist, 0), e < E)
    if valid is not None:
        tl.store(load_PE + place, tl.sum(load, 0), e < E)
    tl.store(probs_PE + place, tl.sum(probs, 0), e < E)
    P = tl.num_programs(0)
    tl.store(sums_3P + program, tl.sum(z, 0))
    tl.store(sums_3P + P + program, tl.sum(entropy, 0))
    tl.store(sums_3P + 2 * P + program, tl.sum(tokens, 0))


@triton.jit
def ordered(wish):
    """int32 in the order of the values, of 16 bits or fp32. As in torch.sort 0 equals -0 and NaN is above all."""
    if wish.dtype.primitive_bitwidth == 16:
        bits, most = wish.to(tl.int16, bitcast=True).to(tl.int32), 0x7FFF
    else:
        wish = wish.to(tl.float32)
        bits, most = wish.to(tl.int32, bitcast=True), 0x7FFFFFFF
    bits = tl.where(bits < 0, bits ^ most, bits)
    bits = tl.where(wish == 0, 0, bits)
    return tl.where(wish != wish, most, bits)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def finalize_kernel(
    first_PE, load_PE, probs_PE, counts_E, load_E, probs_E, P, E,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program adds up BLOCK_E experts over all chunks; histograms become sums over the chunks before."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    load = tl.zeros([BLOCK_E], tl.int32)
    probs = tl.zeros([BLOCK_E], probs_E.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        place, inside = p * E + e[None, :], (p < P) & (e < E)[None, :]
        hist = tl.load(first_PE + place, inside, 0)
        tl.store(first_PE + place, count[None, :] + tl.cumsum(hist, 0) - hist, inside)
        count += tl.sum(hist, 0)
        if load_PE is not None:
            load += tl.sum(tl.load(load_PE + place, inside, 0), 0)
        probs += tl.sum(tl.load(probs_PE + place, inside, 0.0), 0)
    tl.store(counts_E + e, count, e < E)
    tl.store(load_E + e, (count if load_PE is None else load).to(load_E.dtype.element_ty), e < E)
    tl.store(probs_E + e, probs, e < E)


@triton.jit
def place_kernel(
    ids, first_PE, counts_E, load_E, probs_E, sums_3P, order_N, places_TK, balance, z, entropy, tokens,
    T, E, P, chunk, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program places the rows of one chunk; the last one adds up the losses."""
    program = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    if program == P:
        p = tl.arange(0, BLOCK_P)
        count = tl.sum(tl.load(sums_3P + 2 * P + p, p < P, 0.0), 0)
        load = tl.load(load_E + e, e < E, 0.0)
        share = load / tl.maximum(count, 1.0)
        tl.store(balance, E * tl.sum(share * tl.load(probs_E + e, e < E, 0.0), 0))
        tl.store(z, tl.sum(tl.load(sums_3P + p, p < P, 0.0), 0))
        tl.store(entropy, tl.sum(tl.load(sums_3P + P + p, p < P, 0.0), 0))
        tl.store(tokens, count)
        return
    counts = tl.load(counts_E + e, e < E, 0)
    first = tl.cumsum(counts, 0) - counts + tl.load(first_PE + program * E + e, e < E, 0)
    row = tl.arange(0, BLOCK_N)
    end = tl.minimum((program + 1) * chunk, T) * K
    for start in range(program * chunk * K, end, BLOCK_N):
        n = start + row
        i = tl.load(ids + n, n < end, -1).to(tl.int32)
        before = (row[None, :] < row[:, None]) & (i[None, :] == i[:, None])
        place = tl.gather(first, tl.maximum(i, 0), 0) + tl.sum(before.to(tl.int32), 1)
        tl.store(places_TK + n, place, n < end)
        tl.store(order_N + place, n, n < end)
        first += tl.sum((i[:, None] == e[None, :]).to(tl.int32), 0)


@triton.jit
def backward_kernel(
    logits, valid, ids, weights, load_E, lse_T, tokens, grad_weights, grad_balance, grad_z, grad_logits,
    T, E, scale,
    K: tl.constexpr, RENORMALISE: tl.constexpr, SIGMOID: tl.constexpr, REAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens.

    With p the softmax, v 1 or 0 for a valid token or not, and G_e = E · share_e · grad_balance:
    dx = v p (G − Σ p G + 2 lse grad_z) + what comes through the weights. With w = scale · s, the logarithms of the
    chosen scores s have the gradients w dw; with w = scale · s / Σ s, w (dw − Σ w dw / scale).
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = t < T
    both = inside[:, None] & (e < E)
    x = tl.load(logits + t[:, None] * E + e, both, float("-inf")).to(REAL)
    lse = tl.load(lse_T + t, inside, 0.0)
    p = tl.exp(x - lse[:, None])
    factor = tl.zeros([BLOCK_T, BLOCK_E], REAL)
    if grad_balance is not None:
        share = tl.load(load_E + e, e < E, 0.0) / tl.maximum(tl.load(tokens), 1.0)
        gain = share * (E * tl.load(grad_balance))
        factor += gain - tl.sum(p * gain, 1)[:, None]
    if grad_z is not None:
        factor += (2.0 * tl.load(grad_z) * lse)[:, None]
    if valid is not None:
        factor *= (tl.load(valid + t, inside, 0) != 0).to(REAL)[:, None]
    grad = p * factor

    if grad_weights is not None:
        mean = tl.zeros([BLOCK_T], REAL)
        if RENORMALISE:
            for k in tl.static_range(K):
                w = tl.load(weights + t * K + k, inside, 0.0)
                mean += w / scale * tl.load(grad_weights + t * K + k, inside, 0.0)
        through = tl.zeros([BLOCK_T, BLOCK_E], REAL)
        total = tl.zeros([BLOCK_T], REAL)
        for k in tl.static_range(K):
            w = tl.load(weights + t * K + k, inside, 0.0)
            d = w * (tl.load(grad_weights + t * K + k, inside, 0.0) - mean)
            through = tl.where(tl.load(ids + t * K + k, inside, -1)[:, None] == e, d[:, None], through)
            total += d
        if SIGMOID:
            through *= 1.0 - sigmoid(x)
        elif not RENORMALISE:
            through -= p * total[:, None]
        grad += through
    tl.store(grad_logits + t[:, None] * E + e, grad.to(grad_logits.dtype.element_ty), both)
