"""`kernels.cache_attention.attend` as Triton kernels, forward and backward (FlashAttention-2, arXiv 2307.08691).

    forward_kernel   a tile of queries of a head: local keys before it, those up to each query, then the bank
    query_kernel     the same tiles again: the gradient of the queries, and Σ out · grad of each
    local_kernel     a tile of local keys of a group: their gradients, over the heads of the group
    memory_kernel    a block of entries: their gradients and that of the gate, over the heads of the group, the
                     rows that share the bank and a part of the queries; the parts are added up afterwards

Scores are in units of log 2. Nothing is atomic: the same bits in every run. Nothing waits for the device, so all
of it can be captured in a CUDA graph. A dot is never fed a transposed accumulator, which Triton 3.4 to 3.7.0
gets wrong on Hopper: keys against queries are computed as such, not as the transpose of queries against keys.

Retrieval, and entries that are not valid, come as lists: the blocks that a tile of queries reads, and the tiles
that read a block.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache_attention import BLOCK, TILE, merge

LOG2E = tl.constexpr(math.log2(math.e))
PROGRAMS = 256  # so many keep a GPU busy
TILES = {  # queries of a program, warps, stages: on 9.x and 10.x, which have more shared memory; elsewhere
    ("forward", 64): ((128, 4, 3), (128, 8, 2)),
    ("forward", 128): ((128, 8, 2), (64, 4, 2)),
    ("query", 64): ((128, 8, 2), (64, 4, 2)),
    ("query", 128): ((128, 8, 2), (64, 4, 2)),
    ("keys", 64): ((64, 4, 3), (64, 4, 2)),
    ("keys", 128): ((64, 8, 2), (32, 4, 2)),
}


def attend(
    q_BHSC: Tensor,
    k_BGLC: Tensor,
    v_BGLC: Tensor,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor | None,
    valid_BGM: Tensor | None,
    chosen: Tensor | None,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """`kernels.cache_attention.attend_reference`.

    Few queries that see the bank alone would keep few programs busy, so then the heads of a group are one head
    with more queries, and the bank is cut in parts, which are as good as groups, and merged.
    """
    (B, H, S, C), (_, G, M, _) = q_BHSC.shape, memory_k_BGMC.shape
    if k_BGLC.shape[2] or chosen is not None or not q_BHSC.numel():
        lists = schedule(chosen, valid_BGM, S)
        return attend_op(
            q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC, gate_BGM, valid_BGM, *lists, scale, window
        )
    queries = H // G * S
    wanted, parts = PROGRAMS // (triton.cdiv(queries, TILE) * B * G), 1
    while 2 * parts <= wanted and M and M % (2 * parts * BLOCK) == 0:
        parts *= 2

    def cut(x: Tensor | None) -> Tensor | None:
        """[B or 1, G or 1, M, ...] as [B or 1, G · parts, M / parts, ...]."""
        return None if x is None else x.expand(-1, G, *x.shape[2:]).unflatten(2, (parts, -1)).flatten(1, 2)

    tiles = q_BHSC.reshape(B, G, 1, queries, C).expand(-1, -1, parts, -1, -1).flatten(1, 2)
    valid_BGM = cut(valid_BGM)
    out, lse = attend_op(
        tiles, *(tiles.new_empty(B, G * parts, 0, C) for _ in range(2)), cut(memory_k_BGMC),
        cut(memory_v_BGMC), cut(gate_BGM), valid_BGM, *schedule(None, valid_BGM, queries), scale, 0,
    )  # fmt: skip
    if parts > 1:
        out, lse = merge(out.unflatten(1, (G, parts)), lse.unflatten(1, (G, parts)), 2)
    return out.reshape(B, H, S, C), lse.reshape(B, H, S)


def schedule(chosen: Tensor | None, valid_BGM: Tensor | None, queries: int) -> tuple[(Tensor | None,) * 4]:
    """What reads what, int32 with 1 where B, groups or tiles share: blocks [B, G, tiles, blocks] that a tile reads
    and their number; tiles [B, G, blocks, tiles] that read a block, None for all of them, and their number.
    """
    if chosen is None:
        if valid_BGM is None:
            return None, None, None, None
        padded = torch.nn.functional.pad(valid_BGM, (0, -valid_BGM.shape[2] % BLOCK))
        there = padded.unflatten(2, (-1, BLOCK)).any(3)
        return *listed(there[:, :, None]), None, there.int() * triton.cdiv(queries, TILE)
    return *listed(chosen), *listed(chosen.transpose(2, 3))


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where the last dimension is true, in order and first, and how often."""
    order = chosen.logical_not().byte().argsort(dim=-1, stable=True)
    return order.int().contiguous(), chosen.sum(-1, dtype=torch.int32)


@torch.library.custom_op("pragnosia::cache_attention", mutates_args=())
def attend_op(
    q_BHSC: Tensor,
    k_BGLC: Tensor,
    v_BGLC: Tensor,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor | None,
    valid_BGM: Tensor | None,
    blocks: Tensor | None,
    num_blocks: Tensor | None,
    tiles: Tensor | None,
    num_tiles: Tensor | None,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """out_BHSC and lse_BHS; the lists are those of `schedule`."""
    q, k, v, memory_k, memory_v = contiguous(q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC)
    out_BHSC, lse_BHS = empty_results(q)
    (B, H, S, C), (_, G, M, _) = q.shape, memory_k.shape
    block_S, launch = tile("forward", C, capability(q))
    if out_BHSC.numel():
        forward_kernel[(triton.cdiv(S, block_S), B * H)](
            q, k, v, memory_k, memory_v, *bank(memory_k, gate_BGM, valid_BGM, B),
            blocks, num_blocks, *steps(num_blocks, B, G, triton.cdiv(S, TILE)), out_BHSC, lse_BHS,
            S, k.shape[2], M, H, G, C, scale * LOG2E.value, window, real(q), block_S, BLOCK, TILE, **launch,
        )  # fmt: skip
    return out_BHSC, lse_BHS


@attend_op.register_fake
def _(q_BHSC, *_):
    return empty_results(q_BHSC)


@torch.library.custom_op("pragnosia::cache_attention_backward", mutates_args=())
def attend_backward_op(
    q_BHSC: Tensor,
    k_BGLC: Tensor,
    v_BGLC: Tensor,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor | None,
    valid_BGM: Tensor | None,
    blocks: Tensor | None,
    num_blocks: Tensor | None,
    tiles: Tensor | None,
    num_tiles: Tensor | None,
    out_BHSC: Tensor,
    lse_BHS: Tensor,
    grad_BHSC: Tensor,
    grad_lse_BHS: Tensor,
    scale: float,
    window: int,
    of_local: bool,
    of_memory: bool,
    of_gate: bool,
) -> tuple[(Tensor,) * 6]:
    """The gradients of q, k, v, memory_k, memory_v and the gate; empty where they are not asked for."""
    q, k, v, memory_k, memory_v, grad, grad_lse = contiguous(
        q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC, grad_BHSC, grad_lse_BHS
    )
    (B, H, S, C), L, (shared, G, M, _) = q.shape, k.shape[2], memory_k.shape
    results = empty_gradients(q, k, memory_k, gate_BGM, of_local, of_memory, of_gate)
    grad_q, grad_k, grad_v, grad_memory_k, grad_memory_v, grad_gate = results
    entries = bank(memory_k, gate_BGM, valid_BGM, B)
    delta_BHS = torch.empty_like(lse_BHS)
    constants = (H, G, C, scale * LOG2E.value, window, real(q))
    block_S, launch = tile("query", C, capability(q))
    if q.numel():
        query_kernel[(triton.cdiv(S, block_S), B * H)](
            q, k, v, memory_k, memory_v, *entries,
            blocks, num_blocks, *steps(num_blocks, B, G, triton.cdiv(S, TILE)),
            out_BHSC, lse_BHS, grad, grad_lse, delta_BHS, grad_q,
            S, L, M, *constants, scale, block_S, BLOCK, TILE, **launch,
        )  # fmt: skip
    block_S, launch = tile("keys", C, capability(q))
    if grad_k.numel():
        local_kernel[(triton.cdiv(L, BLOCK), B * G)](
            q, k, v, lse_BHS, grad, delta_BHS, grad_k, grad_v,
            S, L, *constants, scale, block_S, BLOCK, **launch,
        )  # fmt: skip
    if of_memory and M:
        number = triton.cdiv(M, BLOCK)
        parts = max(1, min(triton.cdiv(S, TILE), PROGRAMS // (number * shared * G)))
        part_k, part_v = grad_memory_k, grad_memory_v
        if parts > 1:
            part_k, part_v = (lse_BHS.new_empty(parts, *memory_k.shape) for _ in range(2))
        part_gate = lse_BHS.new_empty(parts, B, G, M) if of_gate else None
        memory_kernel[(number, parts, shared * G)](
            q, memory_k, memory_v, *entries, tiles, num_tiles, *steps(num_tiles, B, G, number),
            lse_BHS, grad, delta_BHS, part_k, part_v, part_gate,
            S, M, B, B // shared, *constants, scale, block_S, BLOCK, TILE, **launch,
        )  # fmt: skip
        if parts > 1:
            grad_memory_k.copy_(part_k.sum(0))
            grad_memory_v.copy_(part_v.sum(0))
        if of_gate:
            grad_gate.copy_(part_gate.sum(0).sum_to_size(grad_gate.shape))
    return results


@attend_backward_op.register_fake
def _(q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC, gate_BGM, *rest):
    return empty_gradients(q_BHSC, k_BGLC, memory_k_BGMC, gate_BGM, *rest[-3:])


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, *grads):
    needs = ctx.needs_input_grad
    asked = any(needs[1:3]), any(needs[3:6]), needs[5]
    *found, grad_gate = attend_backward_op(*ctx.saved_tensors, *grads, ctx.scale, ctx.window, *asked)
    return *found, grad_gate if needs[5] else None, *[None] * 7


attend_op.register_autograd(backward, setup_context=setup_context)


def empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Room for what `attend_op` returns."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


def empty_gradients(q, k, memory_k, gate, of_local, of_memory, of_gate) -> tuple[Tensor, ...]:
    """Room for what `attend_backward_op` returns."""
    local, memory = (x.shape if asked else (0,) for x, asked in ((k, of_local), (memory_k, of_memory)))
    grads = (q.new_empty(shape) for shape in (q.shape, local, local, memory, memory))
    return *grads, gate.new_empty(gate.shape) if of_gate else q.new_empty(0)


def contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def bank(memory_k: Tensor, gate: Tensor | None, valid: Tensor | None, rows: int) -> tuple:
    """Gate, mask as bytes, and how far apart rows of the bank, and rows and groups of gate and mask are."""
    _, G, M, C = memory_k.shape
    gate = None if gate is None else gate.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    apart = steps(gate, rows, G) + steps(valid, rows, G)
    return gate, valid, 0 if memory_k.shape[0] == 1 else G * M * C, *apart


def steps(tensor: Tensor | None, *shape: int) -> tuple[int, ...]:
    """The strides of a tensor that is stretched to `shape` in its first dimensions."""
    if tensor is None:
        return (0,) * len(shape)
    return tensor.expand(*shape, *tensor.shape[len(shape) :]).stride()[: len(shape)]


def tile(kernel: str, head_dim: int, capability: int) -> tuple[int, dict]:
    """Queries of a program, and what the compiler is told, for a compute capability such as 90."""
    large, small = TILES[kernel, max(64, head_dim)]
    block_S, warps, stages = large if capability // 10 in (9, 10) else small
    return block_S, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def capability(tensor: Tensor) -> int:
    """10 · major + minor; of the interpreter, the least."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def real(tensor: Tensor) -> tl.dtype:
    """What is computed in."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def forward_kernel(
    q, k, v, memory_k, memory_v, gate, valid, memory_b, gate_b, gate_g, valid_b, valid_g,
    blocks, num_blocks, list_b, list_g, list_t, out, lse, S, L, M,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, WINDOW: tl.constexpr,
    REAL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S queries of one head; those with the most keys begin first."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, g = head // H, head % H // (H // G)
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, C)[None, :]
    place = s[:, None] * C + c
    query = tl.load(q + head * S * C + place, s[:, None] < S, 0.0)
    acc = tl.zeros([BLOCK_S, C], REAL)
    top = tl.full([BLOCK_S], float("-inf"), REAL)
    total = tl.zeros([BLOCK_S], REAL)

    k += (b * G + g) * L * C
    v += (b * G + g) * L * C
    low, full, high = local_range(tile * BLOCK_S + L - S, L, BLOCK_S, BLOCK_M, WINDOW)
    for start in range(low, full, BLOCK_M):
        key, value = two_tiles(k, v, start, L, C, BLOCK_M)
        score = products(query, key, REAL) * FACTOR
        acc, top, total = softmax_step(acc, top, total, score, value)
    for start in range(full, high, BLOCK_M):
        key, value = two_tiles(k, v, start, L, C, BLOCK_M)
        score = products(query, key, REAL) * FACTOR
        n = start + tl.arange(0, BLOCK_M)
        score = tl.where(sees((s + L - S)[:, None], n[None, :], WINDOW), score, float("-inf"))
        acc, top, total = softmax_step(acc, top, total, score, value)

    memory_k += b * memory_b + g * M * C
    memory_v += b * memory_b + g * M * C
    number = tl.cdiv(M, BLOCK_M)
    listed = b * list_b + g * list_g + tile * BLOCK_S // TILE * list_t
    if blocks is not None:
        number = tl.load(num_blocks + listed)
    gate_row, valid_row = b * gate_b + g * gate_g, b * valid_b + g * valid_g
    for i in range(0, number):
        block = i
        if blocks is not None:
            block = tl.load(blocks + listed * tl.cdiv(M, BLOCK_M) + i)
        key, value = two_tiles(memory_k, memory_v, block * BLOCK_M, M, C, BLOCK_M)
        bias = importance(gate, valid, gate_row, valid_row, block, M, BLOCK_M, REAL)
        score = products(query, key, REAL) * FACTOR + bias[None, :]
        acc, top, total = softmax_step(acc, top, total, score, value)

    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    tl.store(out + head * S * C + place, acc.to(out.dtype.element_ty), s[:, None] < S)
    logs = tl.where(nothing, float("-inf"), (top + tl.log2(tl.where(nothing, 1.0, total))) / LOG2E)
    tl.store(lse + head * S + s, logs, s < S)


@triton.jit
def query_kernel(
    q, k, v, memory_k, memory_v, gate, valid, memory_b, gate_b, gate_g, valid_b, valid_g,
    blocks, num_blocks, list_b, list_g, list_t, out, lse, grad, grad_lse, delta_BHS, grad_q, S, L, M,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, WINDOW: tl.constexpr,
    REAL: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S queries of one head. With p the probabilities, delta = Σ out · grad − grad_lse and
    ds = p (grad · v − delta), the gradient of the scores, that of a query is scale · Σ ds k.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, g = head // H, head % H // (H // G)
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, C)[None, :]
    place, inside = s[:, None] * C + c, s[:, None] < S
    query = tl.load(q + head * S * C + place, inside, 0.0)
    up = tl.load(grad + head * S * C + place, inside, 0.0)
    delta = tl.sum(tl.load(out + head * S * C + place, inside, 0.0).to(REAL) * up.to(REAL), 1)
    delta -= tl.load(grad_lse + head * S + s, s < S, 0.0)
    tl.store(delta_BHS + head * S + s, delta, s < S)
    top = finite_top(lse + head * S, s, S)
    acc = tl.zeros([BLOCK_S, C], REAL)

    k += (b * G + g) * L * C
    v += (b * G + g) * L * C
    low, _, high = local_range(tile * BLOCK_S + L - S, L, BLOCK_S, BLOCK_M, WINDOW)
    for start in range(low, high, BLOCK_M):
        key, value = two_tiles(k, v, start, L, C, BLOCK_M)
        score = products(query, key, REAL) * FACTOR
        n = start + tl.arange(0, BLOCK_M)
        score = tl.where(sees((s + L - S)[:, None], n[None, :], WINDOW), score, float("-inf"))
        acc = query_step(acc, score, key, value, up, top, delta, REAL)

    memory_k += b * memory_b + g * M * C
    memory_v += b * memory_b + g * M * C
    number = tl.cdiv(M, BLOCK_M)
    listed = b * list_b + g * list_g + tile * BLOCK_S // TILE * list_t
    if blocks is not None:
        number = tl.load(num_blocks + listed)
    gate_row, valid_row = b * gate_b + g * gate_g, b * valid_b + g * valid_g
    for i in range(0, number):
        block = i
        if blocks is not None:
            block = tl.load(blocks + listed * tl.cdiv(M, BLOCK_M) + i)
        key, value = two_tiles(memory_k, memory_v, block * BLOCK_M, M, C, BLOCK_M)
        bias = importance(gate, valid, gate_row, valid_row, block, M, BLOCK_M, REAL)
        score = products(query, key, REAL) * FACTOR + bias[None, :]
        acc = query_step(acc, score, key, value, up, top, delta, REAL)
    tl.store(grad_q + head * S * C + place, (acc * SCALE).to(grad_q.dtype.element_ty), inside)


@triton.jit
def local_kernel(
    q, k, v, lse, grad, delta_BHS, grad_k, grad_v, S, L,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, WINDOW: tl.constexpr,
    REAL: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M local keys of one group. Their gradients are scale · Σ ds q and Σ p grad."""
    first = tl.program_id(0) * BLOCK_M
    group = tl.program_id(1).to(tl.int64)
    n = first + tl.arange(0, BLOCK_M)
    key, value = two_tiles(k + group * L * C, v + group * L * C, first, L, C, BLOCK_M)
    acc_k = tl.zeros([BLOCK_M, C], REAL)
    acc_v = tl.zeros([BLOCK_M, C], REAL)
    low = tl.maximum(first - (L - S), 0) // BLOCK_S * BLOCK_S
    high = S
    if WINDOW:
        high = tl.minimum(S, first + BLOCK_M - 1 + WINDOW - (L - S))
    for head in range(group * (H // G), (group + 1) * (H // G)):
        for start in range(low, high, BLOCK_S):
            query, up, top, delta = query_tile(q, grad, lse, delta_BHS, head, start, S, C, BLOCK_S)
            score = products(key, query, REAL) * FACTOR
            position = start + L - S + tl.arange(0, BLOCK_S)
            score = tl.where(sees(position[None, :], n[:, None], WINDOW), score, float("-inf"))
            acc_k, acc_v, _ = key_step(acc_k, acc_v, score, query, value, up, top, delta, REAL)
    place = n[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(grad_k + group * L * C + place, (acc_k * SCALE).to(grad_k.dtype.element_ty), n[:, None] < L)
    tl.store(grad_v + group * L * C + place, acc_v.to(grad_v.dtype.element_ty), n[:, None] < L)


@triton.jit
def memory_kernel(
    q, memory_k, memory_v, gate, valid, memory_b, gate_b, gate_g, valid_b, valid_g,
    tiles, num_tiles, list_b, list_g, list_t, lse, grad, delta_BHS, part_k, part_v, part_gate, S, M, B, rows,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FACTOR: tl.constexpr, WINDOW: tl.constexpr,
    REAL: tl.constexpr, SCALE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M entries of one group, for a part of the queries of all rows that share them.

    Their gradients are those of local keys; that of the gate is Σ ds.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    b0, g = tl.program_id(2).to(tl.int64) // G * rows, tl.program_id(2).to(tl.int64) % G
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = b0 * memory_b + g * M * C
    key, value = two_tiles(memory_k + mine, memory_v + mine, block * BLOCK_M, M, C, BLOCK_M)
    acc_k = tl.zeros([BLOCK_M, C], REAL)
    acc_v = tl.zeros([BLOCK_M, C], REAL)
    for b in range(b0, b0 + rows):
        gate_row, valid_row = b * gate_b + g * gate_g, b * valid_b + g * valid_g
        bias = importance(gate, valid, gate_row, valid_row, block, M, BLOCK_M, REAL)
        sum_gate = tl.zeros([BLOCK_M], REAL)
        listed = b * list_b + g * list_g + block * list_t
        number = tl.cdiv(S, BLOCK_S)
        if num_tiles is not None:
            number = tl.load(num_tiles + listed) * (TILE // BLOCK_S)
        share = tl.cdiv(number, tl.num_programs(1))
        for head in range(b * H + g * (H // G), b * H + (g + 1) * (H // G)):
            for i in range(part * share, tl.minimum((part + 1) * share, number)):
                start = i * BLOCK_S
                if tiles is not None:
                    tile = tl.load(tiles + listed * tl.cdiv(S, TILE) + i // (TILE // BLOCK_S))
                    start = tile * TILE + i % (TILE // BLOCK_S) * BLOCK_S
                query, up, top, delta = query_tile(q, grad, lse, delta_BHS, head, start, S, C, BLOCK_S)
                score = products(key, query, REAL) * FACTOR + bias[:, None]
                acc_k, acc_v, ds = key_step(acc_k, acc_v, score, query, value, up, top, delta, REAL)
                if part_gate is not None:
                    sum_gate += tl.sum(ds, 1)
        if part_gate is not None:
            tl.store(part_gate + ((part * B + b) * G + g) * M + m, sum_gate, m < M)
    shared = tl.num_programs(2)
    mine = (part * shared + tl.program_id(2).to(tl.int64)) * M * C
    place = m[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(part_k + mine + place, (acc_k * SCALE).to(part_k.dtype.element_ty), m[:, None] < M)
    tl.store(part_v + mine + place, acc_v.to(part_v.dtype.element_ty), m[:, None] < M)


@triton.jit
def local_range(first, L, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, WINDOW: tl.constexpr):
    """The local keys that queries at `first` and after see: all of them [low, full), some of them [full, high)."""
    low = 0
    full = tl.maximum(first + 1, 0) // BLOCK_M * BLOCK_M
    high = tl.minimum(first + BLOCK_S, L)
    if WINDOW:
        low = tl.maximum(first - WINDOW + 1, 0) // BLOCK_M * BLOCK_M
        full = low
    return low, full, high


@triton.jit
def sees(position, n, WINDOW: tl.constexpr):
    """Whether the query at `position` sees local key n; those after the last query are not looked at."""
    seen = n <= position
    if WINDOW:
        seen = seen & (n > position - WINDOW)
    return seen


@triton.jit
def two_tiles(k, v, start, end, C: tl.constexpr, BLOCK: tl.constexpr):
    """Keys and values from `start` on, 0 from `end` on."""
    n = tl.arange(0, BLOCK)[:, None]
    place, inside = n * C + tl.arange(0, C)[None, :], n < end - start
    return tl.load(k + start * C + place, inside, 0.0), tl.load(v + start * C + place, inside, 0.0)


@triton.jit
def query_tile(q, grad, lse, delta, head, start, S, C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Queries from `start` on, and what backward knows of each."""
    row = head * S + start
    query, up = two_tiles(q + row * C, grad + row * C, 0, S - start, C, BLOCK_S)
    s = tl.arange(0, BLOCK_S)
    return query, up, finite_top(lse + row, s, S - start), tl.load(delta + row + s, s < S - start, 0.0)


@triton.jit
def finite_top(lse, s, S):
    """logsumexp in units of log 2; ∞, which makes all probabilities 0, of queries that see nothing or are none."""
    top = tl.load(lse + s, s < S, float("-inf"))
    return tl.where(top == float("-inf"), float("inf"), top * LOG2E)


@triton.jit
def importance(gate, valid, gate_row, valid_row, block, M, BLOCK_M: tl.constexpr, REAL: tl.constexpr):
    """What is added to the scores of a block of entries, in units of log 2."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    bias = tl.where(m < M, 0.0, float("-inf")).to(REAL)
    if gate is not None:
        bias = tl.load(gate + gate_row + m, m < M, float("-inf")).to(REAL) * LOG2E
    if valid is not None:
        bias = tl.where(tl.load(valid + valid_row + m, m < M, 0) != 0, bias, float("-inf"))
    return bias


@triton.jit
def products(x, y, REAL: tl.constexpr):
    """Each row of x with each of y, which must come from memory."""
    return tl.dot(x, tl.trans(y), input_precision="ieee", out_dtype=REAL)


@triton.jit
def softmax_step(acc, top, total, score, value):
    """One step of the online softmax: the sums relative to the largest score so far."""
    new = tl.maximum(top, tl.max(score, 1))
    pivot = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(score - pivot[:, None])
    decay = tl.exp2(top - pivot)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision="ieee", out_dtype=acc.dtype)
    return acc, new, total


@triton.jit
def query_step(acc, score, key, value, up, top, delta, REAL: tl.constexpr):
    p = tl.exp2(score - top[:, None])
    ds = p * (products(up, value, REAL) - delta[:, None])
    return tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee", out_dtype=REAL)


@triton.jit
def key_step(acc_k, acc_v, score, query, value, up, top, delta, REAL: tl.constexpr):
    """Scores of keys against queries; also returns their gradients."""
    p = tl.exp2(score - top[None, :])
    acc_v = tl.dot(p.to(up.dtype), up, acc_v, input_precision="ieee", out_dtype=REAL)
    ds = p * (products(value, up, REAL) - delta[None, :])
    acc_k = tl.dot(ds.to(query.dtype), query, acc_k, input_precision="ieee", out_dtype=REAL)
    return acc_k, acc_v, ds
