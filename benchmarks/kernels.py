"""Routing kernels against plain PyTorch, `torch.compile` and DeepSpeed, in microseconds on one GPU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --tokens 16384 --experts 128x8 --width 2048

Operations: route, with statistics and permutation, and its backward, on bf16 logits without ties; permute, combine
and their backwards on bf16 rows. All implementations of a cell get the same tensors; routing is
compiled for each shape, moving rows for any. A time is that of a replayed
CUDA graph with a cold L2 cache: 20th, 50th and 80th percentile. GB/s counts once each tensor that must be read or
written, and is compared with a copy of 1 GB in the same run. `times` is a median over ours; there is none where
outputs differ by more than bf16 rounds. DeepSpeed's router computes no losses, torch's argsort sorts its rows, and
its combine inverts the permutation by itself, which ours has from route. Liger has none of these operations alone:
its MoE is one function of tokens, choices and weights to outputs. What a whole step gains:

    python benchmarks/train_step.py --model-size 1B 3B --kernels reference auto --name train_step_kernels
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, goal, report, write

SHAPES = ("128x8", "8x2", "32x2", "96x2", "256x8")
HEADLINE = {"tokens": 16384, "experts": 128, "active": 8}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tokens", nargs="+", type=int, default=[16384, 1024, 4096, 65536])
    options.add_argument("--experts", nargs="+", default=SHAPES, help="experts x choices of a token")
    options.add_argument("--width", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def eager_route(logits_TE, num_active: int):
    """What a model without kernels does: `kernels.reference.route` with torch's own top-k."""
    import torch

    from kernels.reference import inverse

    num_experts = logits_TE.shape[1]
    logits_TE = logits_TE.float()
    lse_T = logits_TE.logsumexp(-1)
    probs_TE = (logits_TE - lse_T[:, None]).exp()
    chosen_TK, ids_TK = logits_TE.topk(num_active, dim=-1)
    flat_N = ids_TK.flatten()
    order_N = flat_N.argsort(stable=True)
    counts_E = flat_N.new_zeros(num_experts).index_add_(0, flat_N, torch.ones_like(flat_N))
    balance = num_experts * (counts_E / len(logits_TE) * probs_TE.sum(0)).sum()
    entropy = (lse_T - (probs_TE * logits_TE).sum(-1)).sum().detach()
    return {
        "ids_TK": ids_TK,
        "weights_TK": chosen_TK.softmax(-1),
        "counts_E": counts_E,
        "order_N": order_N,
        "places_TK": inverse(order_N).view_as(ids_TK),
        "balance_sum": balance,
        "z_sum": lse_T.square().sum(),
        "entropy_sum": entropy,
    }


def deepspeed_route(num_experts: int, num_active: int) -> Callable:
    """Its router without the linear layer, then the permutation."""
    import torch
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    router = TokenChoiceTopKRouter(
        1, num_experts, None, None, num_active, "softmax", route_norm=True, route_scale=1.0, gate_bias=False
    )
    router.gate = torch.nn.Identity()

    def route(logits_TE):
        weights_TK, ids_TK, counts_E = router(logits_TE)
        rows = weights_TK, ids_TK.flatten().argsort(stable=True)  # a token's choices come in no order
        return {"counts_E": counts_E, "deepspeed": rows}

    return route


def routes(tokens: int, experts: int, active: int) -> Iterator[tuple[str, int, dict[str, Callable]]]:
    """(operation, bytes, implementations) of routing; the first implementation is ours."""
    import torch

    from kernels.routing import route

    generator = torch.Generator("cuda").manual_seed(0)
    steps_TE = torch.rand(tokens, experts, device="cuda", generator=generator).argsort(1) - experts // 2
    logits_TE = (steps_TE / 64).bfloat16().requires_grad_()  # all different, and exact in bf16
    grad_TK = torch.randn(tokens, active, device="cuda", generator=generator)
    compiled, deepspeed = torch.compile(eager_route, dynamic=False), deepspeed_route(experts, active)
    forwards = {
        "ours": lambda: flat(route(logits_TE, active)),
        "eager": lambda: eager_route(logits_TE, active),
        "compile": lambda: compiled(logits_TE, active),
        "deepspeed": lambda: deepspeed(logits_TE),
    }
    choices = tokens * active
    yield "route", 2 * logits_TE.numel() + (8 + 4 + 8 + 8) * choices, forwards

    def backward(forward: Callable) -> Callable:
        result = forward()
        outputs = [result[name] for name in ("weights_TK", "balance_sum", "z_sum")]
        grads = [grad_TK, *(torch.full_like(loss, 1e-2) for loss in outputs[1:])]
        return lambda: {"grad": torch.autograd.grad(outputs, logits_TE, grads, retain_graph=True)[0]}

    backwards = {name: backward(forward) for name, forward in forwards.items() if name != "deepspeed"}
    yield "route backward", 4 * logits_TE.numel() + (8 + 4 + 4) * choices, backwards


def flat(result) -> dict:
    """Routing and statistics by name."""
    return {name: value for part in result for name, value in part._asdict().items()}


def moves(
    tokens: int, experts: int, active: int, width: int
) -> Iterator[tuple[str, int, dict[str, Callable]]]:
    """(operation, bytes, implementations) of what moves rows."""
    import torch
    from deepspeed.moe.ep_kernels import gather_rows, permute_rows
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore

    from kernels import permute, reference
    from kernels.routing import route

    # Not the default generator, which a capture that failed leaves behind as if it were still going on.
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=dtype, generator=generator)

    routing, _ = route(random(tokens, experts, dtype=torch.float32), active)
    routing = routing._replace(weights_TK=routing.weights_TK.detach().requires_grad_())
    hidden_TD = random(tokens, width).requires_grad_()
    rows_ND = random(tokens * active, width).requires_grad_()
    grad_TD, grad_ND = random(tokens, width), random(tokens * active, width)
    token_N = routing.order_N // active
    small, large = 2 * hidden_TD.numel(), 2 * rows_ND.numel()
    compiled = [torch.compile(twin, dynamic=True) for twin in (reference.permute, reference.combine)]

    forwards = {
        "ours": lambda: permute.permute(hidden_TD, routing),
        "eager": lambda: reference.permute(hidden_TD, routing),
        "compile": lambda: compiled[0](hidden_TD, routing),
        "deepspeed": lambda: gather_rows(hidden_TD.detach(), token_N),
    }
    yield "permute", small + large, forwards
    # DeepSpeed's has a backward for a permutation only: of the tokens written out K times.
    forwards["deepspeed"] = lambda: permute_rows(
        hidden_TD[:, None].expand(-1, active, -1).flatten(0, 1), routing.order_N
    )
    yield "permute backward", small + large, gradients(forwards, [hidden_TD], grad_ND)

    shape = (1, tokens, width)
    forwards = {
        "ours": lambda: permute.combine(rows_ND, routing),
        "eager": lambda: reference.combine(rows_ND, routing),
        "compile": lambda: compiled[1](rows_ND, routing),
        "deepspeed": lambda: fused_weighted_restore(
            rows_ND, routing.weights_TK, routing.order_N, active, shape
        )[0],
    }
    yield "combine", small + large, forwards
    yield "combine backward", small + 2 * large, gradients(forwards, [rows_ND, routing.weights_TK], grad_TD)


def gradients(forwards: dict[str, Callable], inputs: list, grad) -> dict[str, Callable]:
    import torch

    def backward(forward: Callable) -> Callable:
        output = forward()
        return lambda: dict(enumerate(torch.autograd.grad(output, inputs, grad, retain_graph=True)))

    return {name: backward(forward) for name, forward in forwards.items()}


def agree(ours, other) -> bool:
    """Equal integers, and floats within the rounding of bf16, of all that both compute."""
    import torch

    if isinstance(ours, torch.Tensor):
        ours, other = {"output": ours}, {"output": other}
    for name in ours.keys() & other.keys():
        mine, its = ours[name].float(), other[name].float()
        slack = 2e-2 * mine.abs().max().item() if ours[name].is_floating_point() else 0
        if not torch.allclose(mine, its, rtol=0, atol=slack):
            return False
    return True


def microseconds(function: Callable) -> dict[str, float]:
    """p20, p50, p80 of replays of a CUDA graph, or of plain calls where it cannot be captured."""
    import torch
    from triton.testing import do_bench

    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph, captured = torch.cuda.CUDAGraph(), True
    try:
        # Backward runs in the stream of its forward: the one of all that is measured.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            function()
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
        captured = False
    times = do_bench(graph.replay if captured else function, warmup=10, rep=40, quantiles=[0.2, 0.5, 0.8])
    return {**{f"p{p}_us": 1e3 * ms for p, ms in zip((20, 50, 80), times, strict=True)}, "graph": captured}


def copy_gb_s() -> float:
    """GB/s of a copy within the GPU, counted as read and written."""
    import torch

    source = torch.empty(10**9, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e9 / microseconds(lambda: target.copy_(source))["p50_us"] / 1e3


def measure(cell: dict, operations, copy: float) -> Iterator[dict]:
    """A row for each implementation of each operation."""
    for operation, nbytes, implementations in operations:
        ours = None
        for name, function in implementations.items():
            row = {"operation": operation, **cell, "implementation": name}
            output = function()
            row |= microseconds(function)
            if ours is None:
                ours = output, row["p50_us"]
                row["gb_s"] = nbytes / row["p50_us"] / 1e3
                row["share_of_copy"] = row["gb_s"] / copy
            elif agree(ours[0], output):
                row["times"] = row["p50_us"] / ours[1]
            else:
                row["note"] = "outputs disagree"
            yield row


def goals(rows: list[dict]) -> list[dict]:
    """The headline cell of routing, and the median rate of moving rows of at least 16k tokens."""

    def found(operation: str, name: str, key: str, **wanted) -> list[float]:
        wanted |= {"operation": operation, "implementation": name}
        return [row[key] for row in rows if key in row and wanted.items() <= row.items()]

    judged = []
    for operation, name, key, target, at_least in (
        ("route", "ours", "p50_us", 40, False),
        ("route", "eager", "times", 6, True),
        ("route", "compile", "times", 3, True),
        ("route backward", "eager", "times", 5, True),
    ):
        for measured in found(operation, name, key, **HEADLINE):
            judged.append(
                goal(f"{operation}, 16k tokens, 8 of 128: {name} {key}", target, measured, at_least=at_least)
            )
    for operation, target in (("permute", 2300), ("combine", 2800)):
        if rates := found(operation, "ours", "gb_s", tokens=HEADLINE["tokens"]):
            judged.append(
                goal(
                    f"{operation}, GB/s, median of 16k tokens",
                    target,
                    statistics.median(rates),
                    at_least=True,
                )
            )
        if slower := found(operation, "deepspeed", "times"):
            judged.append(goal(f"{operation}, least gain over DeepSpeed", 1, min(slower), at_least=True))
    return judged


def main() -> None:
    args = parser().parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("the kernels need an NVIDIA GPU, and none is here; their tests run without one")
    torch._functorch.config.donated_buffer = False  # one forward, many times its backward
    torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    path, copy = args.output / "kernels.json", copy_gb_s()
    rows = [{"operation": "copy of 1 GB", "gb_s": copy}]
    for shape in args.experts:
        experts, active = map(int, shape.split("x"))
        for tokens in args.tokens:
            cell = {"tokens": tokens, "experts": experts, "active": active}
            rows += measure(cell, routes(tokens, experts, active), copy)
            for width in args.width:
                rows += measure({**cell, "width": width}, moves(tokens, experts, active, width), copy)
            write(path, rows, goals(rows), "cuda")
            print(f"{shape} experts, {tokens} tokens: done", flush=True)
        torch.compiler.reset()
    report(path, rows, goals(rows), "cuda")


if __name__ == "__main__":
    main()
