"""Attention over a bank of memory entries with a trainable importance, and causal local keys, in one softmax.

Query s of a head sees every entry m of the bank that is on, with the score scale · q·k_m + gate_m, and the local
keys up to its own position with the score scale · q·k. The gate is a logarithm: −inf takes an entry off, and
with all entries off the result is that of attention without a bank, to the bit. It is what a differentiable
cache needs (arXiv 2412.17747): latents that read a cache of up to 65,536 entries, and a model that reads the
latents.

`attend_reference` is the specification in plain PyTorch, and what runs on a CPU and on GPUs without Triton;
`kernels/cache_attention_triton.py` is the same without the scores in memory. Beside the letters of `model`, L is
the number of local keys, the last S of which are at the positions of the queries.
"""

import functools
import importlib
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

TILE, BLOCK = 128, 64  # retrieval chooses blocks of so many entries for tiles of so many queries
HEAD_DIMS = (16, 32, 64, 128)
_wanted = "auto"


def cache_attention(
    q_BHSC: Tensor,
    k_BGLC: Tensor | None,
    v_BGLC: Tensor | None,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor | None = None,
    valid_BM: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    top_k: int | None = None,
) -> Tensor:
    """out_BHSC in the dtype of the queries; 0 where a query sees nothing.

    k_BGLC, v_BGLC: local keys, L at least S; query s is at position L − S + s, and with `window` sees the last
    so many alone. None: the queries see the bank alone, and all see the same. memory_k_BGMC, memory_v_BGMC: B
    may be 1, shared by all rows; M may be 0. Entries that are off must be finite too. gate_BGM (fp32, B and G
    may be 1): logarithm of the importance; None is 0. valid_BM (bool, B may be 1): entries there are; None is
    all. scale: C^-½ if None. top_k: read only the best ⌈top_k / 64⌉ blocks of 64 entries, chosen for each tile
    of 128 queries of a group of heads as in `retrieve`; None reads all.

    Gradients: q, k, v, memory_k, memory_v, gate. The choice of `retrieve` has none.
    """
    return attend(
        q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC, gate_BGM, valid_BM,
        scale=scale, window=window, top_k=top_k,
    )[0]  # fmt: skip


def usage(
    q_BHSC: Tensor,
    k_BGLC: Tensor | None,
    v_BGLC: Tensor | None,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor,
    valid_BM: Tensor | None = None,
    **options,
) -> Tensor:
    """The probability that each entry gets, summed over all that share its gate; fp32, in the gate's shape.

    That is the gradient of Σ logsumexp by the gate, so it costs a forward and a backward.
    """
    tensors = (q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC)
    with torch.enable_grad():
        gate_BGM = gate_BGM.detach().requires_grad_()
        fixed = (None if tensor is None else tensor.detach() for tensor in tensors)
        _, lse_BHS = attend(*fixed, gate_BGM, valid_BM, **options)
        return torch.autograd.grad(lse_BHS.sum(), gate_BGM)[0]


def attend(
    q_BHSC: Tensor,
    k_BGLC: Tensor | None,
    v_BGLC: Tensor | None,
    memory_k_BGMC: Tensor,
    memory_v_BGMC: Tensor,
    gate_BGM: Tensor | None = None,
    valid_BM: Tensor | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`cache_attention`, and the logsumexp of the scores [B, H, S] in fp32, differentiable; −inf over nothing."""
    (B, H, S, C), (_, G, M, _) = q_BHSC.shape, memory_k_BGMC.shape
    if k_BGLC is None or v_BGLC is None:
        assert k_BGLC is v_BGLC is None and window is None
        k_BGLC = v_BGLC = q_BHSC.new_empty(B, G, 0, C)
    L = k_BGLC.shape[2]
    assert H % G == 0 and (L >= S or L == 0), (H, G, S, L)
    assert k_BGLC.shape == v_BGLC.shape == (B, G, L, C), (k_BGLC.shape, v_BGLC.shape, q_BHSC.shape)
    assert memory_k_BGMC.shape == memory_v_BGMC.shape and memory_k_BGMC.shape[0] in (1, B)
    assert len({x.dtype for x in (q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC)}) == 1
    assert window is None or window > 0
    assert top_k is None or top_k > 0
    scale = C**-0.5 if scale is None else scale
    if gate_BGM is not None:
        torch.broadcast_to(gate_BGM, (B, G, M))
        assert gate_BGM.shape[2] == M and gate_BGM.dtype == torch.promote_types(q_BHSC.dtype, torch.float32)
    valid_BGM = None
    if valid_BM is not None:
        torch.broadcast_to(valid_BM, (B, M))
        assert valid_BM.shape[1] == M and valid_BM.dtype == torch.bool
        valid_BGM = valid_BM[:, None]
    chosen = None
    if top_k is not None and top_k < M:
        chosen = retrieve(q_BHSC, memory_k_BGMC, gate_BGM, valid_BGM, scale, math.ceil(top_k / BLOCK), L > 0)
    run = attend_reference
    if selected(q_BHSC.device, q_BHSC.dtype, C) == "triton":
        run = importlib.import_module("kernels.cache_attention_triton").attend
    return run(
        q_BHSC, k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC, gate_BGM, valid_BGM, chosen, scale, window or 0
    )


def attend_reference(
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
    """out_BHSC and lse_BHS, with all scores in memory, in fp32 or as wide as the inputs.

    L may be 0. chosen: what `retrieve` returns, None for all. window 0: none.
    """
    (B, H, S, C), (_, G, M, _), L = q_BHSC.shape, memory_k_BGMC.shape, k_BGLC.shape[2]
    real = torch.promote_types(q_BHSC.dtype, torch.float32)
    tensors = (q_BHSC.reshape(B, G, -1, C), k_BGLC, v_BGLC, memory_k_BGMC, memory_v_BGMC)
    queries, local_k, local_v, memory_k, memory_v = (tensor.to(real) for tensor in tensors)

    position = torch.arange(L - S, L, device=q_BHSC.device)[:, None]
    key = torch.arange(L, device=q_BHSC.device)
    seen = key <= position
    if window:
        seen &= key > position - window
    local = scale * (queries @ local_k.transpose(2, 3))  # [B, G, heads of a group · S, L]
    local = local.masked_fill(~seen.repeat(H // G, 1), -torch.inf)

    memory = scale * (queries @ memory_k.transpose(2, 3))
    if gate_BGM is not None:
        memory = memory + gate_BGM[:, :, None]
    if valid_BGM is not None:
        memory = memory.masked_fill(~valid_BGM[:, :, None], -torch.inf)
    if chosen is not None:
        fine = chosen.repeat_interleave(TILE, 2)[:, :, :S].repeat_interleave(BLOCK, 3)[..., :M]
        memory = memory.masked_fill(~fine.repeat(1, 1, H // G, 1), -torch.inf)

    # Entries that are off add exact zeros.
    parts = [part.detach().amax(3, keepdim=True) for part in (local, memory) if part.shape[3]]
    pivot = functools.reduce(torch.maximum, parts) if parts else queries.new_zeros(*queries.shape[:3], 1)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    local, memory = (local - pivot).exp(), (memory - pivot).exp()
    total = local.sum(3, keepdim=True) + memory.sum(3, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    out = (local @ local_v + memory @ memory_v) / total
    lse = (pivot + total.log()).masked_fill(nothing, -torch.inf)
    return out.to(q_BHSC.dtype).reshape(B, H, S, C), lse.reshape(B, H, S)


@torch.no_grad()
def retrieve(
    q_BHSC: Tensor,
    memory_k_BGMC: Tensor,
    gate_BGM: Tensor | None,
    valid_BGM: Tensor | None,
    scale: float,
    num_blocks: int,
    causal: bool,
) -> Tensor:
    """Which blocks of entries each tile of queries reads, at most `num_blocks`: bool [B, G, tiles, blocks].

    A block counts by a lower bound of its logsumexp (Jensen): with weights w = softmax(gate) over the entries
    that are on, logsumexp(gate) + scale · q·Σ w k. A tile's query q is its mean, or its first where later ones
    would tell earlier ones of the future; of the heads of a group the largest bound counts. Blocks of entries
    that are all off are never read; of equals the first are.
    """
    (_, H, S, _), (_, G, M, _) = q_BHSC.shape, memory_k_BGMC.shape
    bias = memory_k_BGMC.new_zeros(1, 1, M, dtype=torch.float32) if gate_BGM is None else gate_BGM
    if valid_BGM is not None:
        bias = bias.masked_fill(~valid_BGM, -torch.inf)
    rest = -M % BLOCK
    bias = F.pad(bias, (0, rest), value=-torch.inf).unflatten(2, (-1, BLOCK))
    mass = bias.logsumexp(3)  # [B or 1, G or 1, blocks]
    weights = (bias - mass[..., None]).exp().nan_to_num(0.0)
    entries = F.pad(memory_k_BGMC, (0, 0, 0, rest)).unflatten(2, (-1, BLOCK))
    keys = (weights[..., None, :].to(entries.dtype) @ entries).squeeze(3)  # [B or 1, G, blocks, C]

    if causal:
        queries = q_BHSC[:, :, ::TILE]
    else:
        tiles = F.pad(q_BHSC, (0, 0, 0, -S % TILE)).unflatten(2, (-1, TILE)).sum(3)
        sizes = torch.arange(S, S - TILE * tiles.shape[2], -TILE, device=q_BHSC.device).clamp(max=TILE)
        queries = tiles / sizes[:, None]
    queries = queries.to(keys.dtype).unflatten(1, (G, H // G))
    bound = scale * (queries @ keys[:, :, None].transpose(3, 4)).amax(2) + mass[:, :, None]
    order = bound.argsort(stable=True, dim=3, descending=True)[..., :num_blocks]
    return torch.zeros_like(bound, dtype=torch.bool).scatter_(3, order, True) & (bound > -torch.inf)


def merge(out: Tensor, lse: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One attention from those over parts of its keys, whose outputs and logsumexps are stacked at `dim`."""
    pivot = lse.detach().amax(dim, keepdim=True)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    weights = (lse - pivot).exp()
    total = weights.sum(dim, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    merged = ((weights / total)[..., None] * out).sum(dim).to(out.dtype)
    return merged, (pivot + total.log()).masked_fill(nothing, -torch.inf).squeeze(dim)


def use(kernels: str) -> None:
    """Run `triton` or `reference` from now on, in models not yet compiled; auto: the kernels where they run."""
    global _wanted
    assert kernels in ("auto", "triton", "reference"), kernels
    _wanted = kernels
    obstacle.cache_clear()


def describe(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What runs `cache_attention`, and why."""
    reason = obstacle(device, dtype, head_dim)
    return f"plain PyTorch ({reason})" if reason else "Triton kernels"


@functools.cache
def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the reference runs and not the Triton kernels; empty where they do."""
    if _wanted == "reference":
        return "kernels are not asked for"
    if head_dim not in HEAD_DIMS:
        return f"kernels take heads of {', '.join(map(str, HEAD_DIMS))} values"
    if not (_wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        on_gpu = device.type == "cuda" and torch.version.cuda
        if not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
            return "kernels need an NVIDIA GPU of compute capability 8.0 or later"
        if dtype not in (torch.bfloat16, torch.float16):
            return "kernels compute in bf16 and fp16"
    try:  # by name, because an export copies what is imported, and Triton is not everywhere
        importlib.import_module("kernels.cache_attention_triton")
    except ImportError as error:
        return f"{error.name} is not installed"
    return ""


@torch.compiler.assume_constant_result
def selected(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of what runs; a constant of compiled graphs.

    Raises:
        ValueError: `use("triton")` where that cannot be.
    """
    reason = obstacle(device, dtype, head_dim)
    if reason and _wanted == "triton":
        raise ValueError(f"no Triton kernels: {reason}; leave the choice to auto")
    return "reference" if reason else "triton"
