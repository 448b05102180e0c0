"""Cache attention against what PyTorch offers for it, on one GPU: TFLOP/s and times, forward and backward.

    python benchmarks/cache_attention.py
    python benchmarks/cache_attention.py --sizes 8192x65536 --head-dim 128

A bank of M entries with an importance each, and S causal local keys; 16 heads in 4 groups, bf16. `sdpa` is
torch's attention under a mask in memory; `flex` is FlexAttention, compiled, with the gate captured; `flash` is
two passes of FlashAttention, one over the bank with the gate folded in the head dimension, merged by their
logsumexps. All get the same tensors, and put keys together within the time where they need to. `--latents`
queries read the largest bank alone. A time is that of a replayed CUDA graph with a cold L2 cache: 20th, 50th and
80th percentile. Counted are the multiplications of scores that are seen: 4 C a score forward, 10 C backward.
`times` is a median over ours; there is none where outputs differ by more than bf16 rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kernels import agree, microseconds
from benchmarks.results import DIRECTORY, goal, report

HEADS, GROUPS, RETRIEVED = 16, 4, 4096
FOLD = 8  # values more a head, as FlashAttention takes multiples of 8
NAMES = ("q", "k", "v", "memory_k", "memory_v", "gate")
TFLOPS = {("forward", 128): 380, ("forward", 64): 320, ("backward", 128): 230, ("backward", 64): 190}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--sizes", nargs="+", default=["2048x1024", "8192x8192", "8192x65536"], help="SxM")
    options.add_argument("--latents", nargs="*", type=int, default=[64], help="queries of the bank alone")
    options.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def tensors(cell: dict, device: str) -> list:
    """q, k, v, memory_k, memory_v and the gate of a cell, which bf16 holds exactly."""
    import torch

    S, M, C = (cell[key] for key in ("queries", "entries", "head_dim"))
    L = S if cell["local"] else 0
    shapes = (HEADS, S, C), (GROUPS, L, C), (GROUPS, L, C), (GROUPS, M, C), (GROUPS, M, C), (GROUPS, M)
    q, k, v, memory_k, memory_v, gate = (torch.randn(1, *shape).bfloat16() for shape in shapes)
    return [x.to(device).requires_grad_() for x in (q, k, v, memory_k, memory_v, gate.float())]


def flops(cell: dict, operation: str) -> int:
    S, M = cell["queries"], cell["entries"]
    seen = S * M + cell["local"] * S * (S + 1) // 2
    return (4 if operation.startswith("forward") else 10) * cell["head_dim"] * HEADS * seen


def whole(memory, local):
    """Entries and local keys one after the other."""
    import torch

    return torch.cat([memory, local], 2)


def sdpa(q, k, v, memory_k, memory_v, gate):
    import torch
    import torch.nn.functional as F

    S, M, L = q.shape[2], memory_k.shape[2], k.shape[2]
    future = torch.ones(S, L, dtype=torch.bool, device=q.device).triu(1)
    local = q.new_zeros(S, L).masked_fill(future, -torch.inf)
    bias = gate.to(q.dtype).repeat_interleave(HEADS // GROUPS, 1)[:, :, None].expand(-1, -1, S, M)
    mask = torch.cat([bias, local.expand(1, HEADS, S, L)], 3)
    keys, values = (
        whole(*pair).repeat_interleave(HEADS // GROUPS, 1) for pair in ((memory_k, k), (memory_v, v))
    )
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def flex(entries: int, queries: int, local: int, device: str, attention: Callable) -> Callable:
    """FlexAttention over the bank and `local` keys; `attention` is it, compiled or not."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, h, s, key):
        return (key < entries) | (key - entries <= s)

    blocks = create_block_mask(seen, None, None, queries, entries + local, device=device)

    def run(q, k, v, memory_k, memory_v, gate):
        def gated(score, b, h, s, key):
            bias = gate[b, h // (HEADS // GROUPS), key.clamp(max=entries - 1)]
            return score + bias * (key < entries)

        keys, values = whole(memory_k, k), whole(memory_v, v)
        return attention(q, keys, values, score_mod=gated, block_mask=blocks, enable_gqa=True)

    return run


def flash_forward(q, k, v, causal: bool, scale: float) -> tuple:
    """Output, logsumexp, and what backward wants besides."""
    import torch

    if q.is_cuda:
        operation = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *state, _ = operation(q, k, v, 0.0, causal, False, scale=scale)
        return out, lse, state
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return *operation(q, k, v, 0.0, causal, scale=scale), []


def flash_backward(grad, q, k, v, out, lse, state: list, causal: bool, scale: float) -> tuple:
    import torch

    if q.is_cuda:
        operation = torch.ops.aten._scaled_dot_product_flash_attention_backward
        *lengths, seed, offset = state
        return operation(grad, q, k, v, out, lse, *lengths, 0.0, causal, seed, offset, scale=scale)
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operation(grad, q, k, v, out, lse, 0.0, causal, scale=scale)


def flash() -> Callable:
    """Two passes. Backward gives each of them the merged output and logsumexp, which makes its gradients exact."""
    import torch
    import torch.nn.functional as F

    from kernels.cache_attention import merge

    def repeat(x):
        return x.repeat_interleave(HEADS // GROUPS, 1)

    def wide(x):
        return F.pad(x, (0, FOLD))

    class Merged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, memory_k, memory_v, gate):
            scale, C = q.shape[3] ** -0.5, q.shape[3]
            bias = gate / scale
            high = bias.to(q.dtype)
            folded_q, folded_k = wide(q.reshape(1, GROUPS, -1, C)), wide(memory_k)
            folded_q[..., C : C + 2] = 1
            folded_k[..., C], folded_k[..., C + 1] = high, (bias - high.float()).to(q.dtype)
            folded_v = wide(memory_v)
            out, lse, state = flash_forward(folded_q, folded_k, folded_v, False, scale)
            out, lse, local_state = out[..., :C].reshape(q.shape), lse.reshape(q.shape[:3]), []
            if k.shape[2]:
                own, own_lse, local_state = flash_forward(q, repeat(k), repeat(v), True, scale)
                out, lse = merge(torch.stack([out, own]), torch.stack([lse, own_lse]), 0)
            ctx.save_for_backward(q, k, v, folded_q, folded_k, folded_v, out, lse)
            ctx.states = state, local_state
            return out

        @staticmethod
        def backward(ctx, grad):
            q, k, v, folded_q, folded_k, folded_v, out, lse = ctx.saved_tensors
            scale, C, rows = q.shape[3] ** -0.5, q.shape[3], folded_q.shape[:3]
            grads = flash_backward(
                wide(grad.reshape(*rows, C)), folded_q, folded_k, folded_v, wide(out.reshape(*rows, C)),
                lse.reshape(rows), ctx.states[0], False, scale,
            )  # fmt: skip
            grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            if k.shape[2]:
                own = flash_backward(grad, q, repeat(k), repeat(v), out, lse, ctx.states[1], True, scale)
                grad_q, *pair = own
                grad_k, grad_v = (x.unflatten(1, (GROUPS, -1)).sum(2) for x in pair)
            grad_q = grad_q + grads[0][..., :C].reshape(q.shape)
            grad_gate = grads[1][..., C].float() / scale
            return grad_q, grad_k, grad_v, grads[1][..., :C], grads[2][..., :C], grad_gate

    return Merged.apply


def operations(cell: dict, device: str) -> Iterator[tuple[str, dict[str, Callable]]]:
    """(operation, makers of implementations) of a cell; the first implementation is ours."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from kernels import cache_attention as dispatch

    dispatch.use("triton")
    leaves = tensors(cell, device)
    frozen = [*leaves[:5], leaves[5].detach()]
    S, M = cell["queries"], cell["entries"]
    grad = torch.randn_like(leaves[0])

    def ours(q, k, v, *bank, top_k=None):
        local = (k, v) if cell["local"] else (None, None)
        return dispatch.cache_attention(q, *local, *bank, top_k=top_k)

    def retrieve(*arguments):
        return ours(*arguments, top_k=RETRIEVED)

    compiled = flex(M, S, S * cell["local"], device, torch.compile(flex_attention, dynamic=False))

    def outputs(function: Callable, arguments: list) -> Callable:
        def make():
            return lambda: {"out": function(*arguments)}

        return make

    def gradients(function: Callable, arguments: list) -> Callable:
        def make():
            out = function(*arguments)
            wanted = {n: x for n, x in zip(NAMES, arguments, strict=True) if x.requires_grad and x.numel()}

            def backward():
                found = torch.autograd.grad(out, wanted.values(), grad, retain_graph=True)
                return dict(zip(wanted, found, strict=True))

            return backward

        return make

    rivals = {"ours": ours, "sdpa": sdpa, "flex": compiled, "flash": flash()}
    yield "forward", {name: outputs(function, frozen) for name, function in rivals.items()}
    yield "backward", {name: gradients(function, leaves) for name, function in rivals.items()}
    still = {name: rivals[name] for name in ("ours", "flex")}
    yield "backward, gate frozen", {name: gradients(function, frozen) for name, function in still.items()}
    if RETRIEVED < M:
        yield f"forward, {RETRIEVED:,} retrieved", {"ours": outputs(retrieve, frozen)}


def measure(cell: dict, device: str = "cuda", timed: Callable = microseconds) -> Iterator[dict]:
    """A row for each implementation of each operation."""
    import torch

    for operation, makers in operations(cell, device):
        ours = None
        for name, make in makers.items():
            row = {"operation": operation, **cell, "implementation": name}
            try:
                function = make()
                output = function()
                row |= timed(function)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
            except RuntimeError as error:  # compilers fail in many ways
                lines = str(error).strip().splitlines() or ["no message"]
                row["error"] = f"{type(error).__name__}: {lines[0][:150]}"
            else:
                if "retrieved" not in operation:
                    row["tflop_s"] = flops(cell, operation) / row["p50_us"] / 1e6
                if ours is None:
                    ours = output, row["p50_us"]
                elif agree(ours[0], output):
                    row["times"] = row["p50_us"] / ours[1]
                else:
                    row["note"] = "outputs disagree"
            function = output = None
            if device == "cuda":
                torch.cuda.empty_cache()
            yield row


def goals(rows: list[dict]) -> list[dict]:
    """TFLOP/s of the largest cell a head size, and the least gains over all cells with local keys."""
    rows = [row for row in rows if row["local"]]
    judged = []
    for (operation, head_dim), target in TFLOPS.items():
        own = [row for row in rows if (row["operation"], row["head_dim"]) == (operation, head_dim)]
        own = [row for row in own if row["implementation"] == "ours" and "tflop_s" in row]
        if own:
            largest = max(own, key=lambda row: row["queries"] * row["entries"])
            name = f"{operation}, C {head_dim}, S {largest['queries']}, M {largest['entries']}: TFLOP/s"
            judged.append(goal(name, target, largest["tflop_s"], at_least=True))
    for operation, rival, target in (
        ("forward", "sdpa", 2.5),
        ("backward", "sdpa", 2.5),
        ("forward", "flex", 1.0),
        ("backward, gate frozen", "flex", 1.0),
        ("backward", "flex", 2.0),
        ("forward", "flash", 1.0),
        ("backward", "flash", 1.0),
    ):
        own = [row for row in rows if (row["operation"], row["implementation"]) == (operation, rival)]
        if times := [row["times"] for row in own if "times" in row]:
            judged.append(goal(f"{operation}: least gain over {rival}", target, min(times), at_least=True))
    return judged


def main() -> None:
    args = parser().parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("the kernels need an NVIDIA GPU, and none is here; their tests run without one")
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    cells = [{"queries": S, "entries": M, "local": True} for S, M in sizes]
    most = max(M for _, M in sizes)
    cells += [{"queries": S, "entries": most, "local": False} for S in args.latents]
    rows = []
    for head_dim in args.head_dim:
        for cell in cells:
            rows += measure({**cell, "head_dim": head_dim})
            print(f"{rows[-1]['queries']} queries, {cell['entries']} entries, C {head_dim}: done", flush=True)
            torch.compiler.reset()
    report(args.output / "cache_attention.json", rows, goals(rows), "cuda")


if __name__ == "__main__":
    main()
