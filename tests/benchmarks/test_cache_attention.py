"""The benchmark of cache attention: its rivals compute the same, and ratios and goals are as they should be."""

import sys

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import cache_attention as benchmark
from kernels.cache_attention import cache_attention

SMALL = {"queries": 32, "entries": 40, "local": True, "head_dim": 16}


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_all_implementations_agree(local):
    torch.manual_seed(0)
    cell = {**SMALL, "local": local}
    leaves = [x.detach().float().requires_grad_() for x in benchmark.tensors(cell, "cpu")]
    bank = leaves[3:]
    expected = cache_attention(leaves[0], *(leaves[1:3] if local else (None, None)), *bank)
    flex = benchmark.flex(40, 32, 32 * local, "cpu", flex_attention)
    found = flex(*(x.detach() for x in leaves))  # it has no backward on a CPU
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted = [x for x in leaves if x.numel()]
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, wanted, grad)
    for function in (benchmark.sdpa, benchmark.flash()):
        found = function(*leaves)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for new, old in zip(torch.autograd.grad(found, wanted, grad), gradients, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_counts_the_scores_that_are_seen():
    assert benchmark.flops(SMALL, "forward") == 4 * 16 * 16 * (32 * 40 + 32 * 33 // 2)
    assert benchmark.flops({**SMALL, "local": False}, "backward, gate frozen") == 10 * 16 * 16 * 32 * 40


def test_no_ratio_where_outputs_disagree(monkeypatch):
    def made(value):
        return lambda: lambda: {"out": torch.tensor([value, 1.0])}

    def full():
        raise torch.OutOfMemoryError

    makers = {"ours": made(1.0), "same": made(1.001), "other": made(1.1), "large": full}
    monkeypatch.setattr(benchmark, "operations", lambda cell, device: iter([("forward", makers)]))
    times = iter([10.0, 25.0, 5.0])
    ours, same, other, large = benchmark.measure(SMALL, "cpu", lambda function: {"p50_us": next(times)})
    assert ours["tflop_s"] == pytest.approx(benchmark.flops(SMALL, "forward") / 10 / 1e6)
    assert same["times"] == 2.5 and "times" not in ours
    assert other["note"] == "outputs disagree" and "times" not in other
    assert large["error"] == "out of memory"


def test_goals_come_from_rows():
    def row(operation, name, queries=8192, local=True, **measured):
        cell = {"queries": queries, "entries": 65536, "local": local, "head_dim": 128}
        return {"operation": operation, "implementation": name, **cell, **measured}

    rows = [
        row("forward", "ours", queries=2048, tflop_s=500.0),
        row("forward", "ours", tflop_s=379.0),
        row("backward", "flex", times=2.5),
        row("backward", "flex", queries=2048, times=1.9),
        row("backward", "flex", queries=64, local=False, times=0.1),
        row("backward", "sdpa", error="out of memory"),
    ]
    speed, gain = benchmark.goals(rows)
    assert speed["measured"] == 379.0 and not speed["met"] and "C 128, S 8192, M 65536" in speed["name"]
    assert gain["measured"] == 1.9 and not gain["met"] and "flex" in gain["name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run")
def test_one_clear_line_without_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cache_attention.py"])
    with pytest.raises(SystemExit, match="the kernels need an NVIDIA GPU"):
        benchmark.main()
