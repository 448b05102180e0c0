"""Scaling: which cells there are, what follows from their rows, and the command with both baselines."""

import json
import sys

import pytest

from benchmarks.results import table
from benchmarks.scale_out import (
    PEAKS,
    cells,
    derived,
    goals,
    identity,
    judge,
    main,
    parser,
    peak_tflops,
    refusal,
    step_flops,
)
from model.presets import PRESETS
from training import deepspeed_config
from training.config import TrainingArguments


def row(name="resident", num_gpus=1, step_s=1.0, batch_size=32, share=1, stage=1, **more):
    tokens = num_gpus * batch_size * 512
    placement, name = name, name if name == "streamed" else f"{name} ZeRO-{stage}"
    shared = {} if placement == "streamed" else {"expert_parallel_size": share}
    losses = {"first_loss": 10.4, "loss": 8.0}
    return {
        "name": name, "placement": placement, "model_size": "1B", "num_gpus": num_gpus, "batch_size": batch_size,
        "max_length": 512, "tokens": tokens, "step_s": step_s, "tokens_per_s": tokens / step_s,
        "precision": "bf16", **shared, **losses, **more,
    }  # fmt: skip


def found(wanted, rows, gpu="NVIDIA H200"):
    return derived(wanted, rows, gpu)


# -- cells ---------------------------------------------------------------------------------------------------


def wanted(tmp_path, *flags, gpus=(1, 2, 4)):
    return list(cells(parser().parse_args(flags), tmp_path, list(gpus)))


def test_every_divisor_shares_experts_and_baselines_stand_beside(tmp_path):
    flags = ("--placement", "resident", "--model-size", "1B", "--zero-stage", "2", "--scaling", "weak")
    named = [(c.num_gpus, c.expert_parallel_size, c.placement) for c in wanted(tmp_path, *flags)]
    shares = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert named == [(*s, p) for s in shares for p in ("resident", "autoep", "deepspeed.moe")]
    few = wanted(tmp_path, *flags, "--expert-parallel", "2", "--baseline", "autoep")
    assert [(c.num_gpus, c.placement) for c in few] == [
        (n, p) for n in (2, 4) for p in ("resident", "autoep")
    ]
    odd = wanted(tmp_path, *flags, "--baseline", gpus=[3, 6])  # 16 experts
    assert [(c.num_gpus, c.expert_parallel_size) for c in odd] == [(3, 1), (6, 1), (6, 2)]
    assert all(not c.router_losses and c.record for c in few + odd)
    with pytest.raises(SystemExit, match=r"^--expert-parallel 3 .* use 1, 2, 4, or other --num-gpus$"):
        wanted(tmp_path, *flags, "--expert-parallel", "2", "3")


def test_without_options_every_table_is_made(tmp_path):
    """ZeRO-3, the slowest here, is for who asks."""
    rows = wanted(tmp_path, gpus=(1, 2))
    shared = {(c.model_size, c.name) for c in rows if c.num_gpus == c.expert_parallel_size == 2}
    names = [f"{name} ZeRO-{stage}" for name in ("resident", "autoep", "deepspeed.moe") for stage in (1, 2)]
    assert shared == {(size, name) for size in ("1B", "3B", "7B") for name in names}
    streamed = {(c.model_size, c.num_gpus, c.batch_size) for c in rows if c.name == "streamed"}
    assert streamed == {(size, *load) for size in ("7B", "13B") for load in ((1, 32), (2, 32), (2, 16))}
    assert all(c.record for c in rows)  # for the time in all-to-all


def test_rows_of_weak_and_strong_scaling(tmp_path):
    flags = ("--placement", "streamed", "--model-size", "7B", "--batch-size", "8")
    loads = [(c.num_gpus, c.batch_size) for c in wanted(tmp_path, *flags)]
    assert loads == [(1, 8), (2, 8), (2, 4), (4, 8), (4, 2)]  # one GPU serves both
    loads = [(c.num_gpus, c.batch_size) for c in wanted(tmp_path, *flags, "--step-rows", "16")]
    assert loads == [(1, 8), (1, 16), (2, 8), (4, 8), (4, 4)]
    with pytest.raises(SystemExit, match="--step-rows 6 do not divide among 4 GPUs"):
        wanted(tmp_path, *flags, "--step-rows", "6")
    assert {c.model_size for c in wanted(tmp_path, "--placement", "streamed")} == {"7B", "13B"}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", PRESETS)
def test_every_stage_of_every_preset_is_a_json_that_trains(tmp_path, size, stage):
    cell = wanted(tmp_path, "--placement", "resident", "--model-size", size, "--zero-stage", str(stage))[0]
    config = deepspeed_config.load(
        cell.deepspeed_config, TrainingArguments(), placement="resident", precision="bf16", world_size=2
    )
    assert config["zero_optimization"]["stage"] == stage


def test_what_cannot_run_is_known_before(tmp_path):
    flags = (
        "--placement",
        "resident",
        "--model-size",
        "1B",
        "--scaling",
        "weak",
        "--zero-stage",
        "1",
        "2",
        "3",
    )
    refused = {c.name for c in wanted(tmp_path, *flags) if refusal(c)}
    assert refused == {"deepspeed.moe ZeRO-3"}


def test_traces_have_names_of_their_own(tmp_path):
    flags = ("--placement", "resident", "streamed", "--trace", str(tmp_path))
    traced = wanted(tmp_path, *flags)
    ours = [c for c in traced if c.placement in ("resident", "streamed")]
    assert len({c.trace for c in ours}) == len(ours) == len({identity(c.named()) for c in ours})
    assert not any(c.trace for c in traced if c not in ours)


# -- arithmetic ----------------------------------------------------------------------------------------------


def test_operations_of_a_step():
    # tiny: 32,768 · 128 of the head; a layer has 2 · 128² + 2 · 128 · 64 of attention, 2 · 32 + 2 · 128 of norms,
    # 8 · 128 of the router and 2 · 3 · 128 · 256 of experts; the last norm has 128.
    weights = 32768 * 128 + 128 + 4 * (3 * 128**2 + 320 + 1024 + 6 * 128 * 256)
    scores = (
        4 * 4 * 32 * 512 / 2 * 2 * 2 * 3
    )  # layers · heads · size · positions · scores, values · 2 · passes
    assert step_flops("tiny", 100, 512) == 100 * (6 * weights + scores)


def test_share_of_the_peak():
    names = {
        "NVIDIA H200": 989.5, "NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5,
        "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA H200 NVL": 835.5, "NVIDIA GeForce RTX 4090": 165.2,
    }  # fmt: skip
    assert {name: peak_tflops(name) for name in names} == names
    assert {peak_tflops(name) for name in PEAKS} == set(PEAKS.values())
    one = row(num_gpus=2, step_s=0.5)
    columns = found(one, [one])
    flops = step_flops("1B", 32768, 512)
    assert columns["tflops_a_gpu"] == pytest.approx(flops / 0.5 / 2 / 1e12)
    assert columns["of_peak"] == pytest.approx(columns["tflops_a_gpu"] / 989.5)
    assert "of_peak" not in found(one, [one], gpu="no GPU; x86 x 2")


def test_scaling_is_against_the_fewest_gpus():
    rows = [
        row(step_s=1.0),
        row(num_gpus=2, step_s=1.25),  # weak: 32 rows each, as on one
        row(num_gpus=2, step_s=1.0, share=2),
        row(num_gpus=4, step_s=0.4, batch_size=8, share=4),  # strong: 32 rows in all
        row(num_gpus=4, step_s=2.0, share=4),
        row(num_gpus=4, step_s=2.0, stage=2),  # nothing to be measured against
        row(step_s=0.1, stage=2) | {"error": "out of memory"},
        row("streamed", step_s=0.1),
    ]
    scaling = [{k: v for k, v in found(r, rows).items() if k.endswith("scaling")} for r in rows]
    assert scaling == [
        {},
        {"weak_scaling": pytest.approx(0.8)},
        {"weak_scaling": pytest.approx(1.0)},
        {"strong_scaling": pytest.approx(1 / 0.4 / 4)},
        {"weak_scaling": pytest.approx(0.5)},
        {},
        {},
        {},
    ]
    assert found(rows[4], rows[1:])["weak_scaling"] == pytest.approx(0.5)  # of the faster of two


def test_a_ratio_needs_the_same_start():
    ours = row(num_gpus=2, share=2)
    others = [
        row("autoep", 2, 2.0, share=1),
        row("autoep", 2, 3.0, share=2, stage=2),
        row("autoep", 4, share=2),
    ]

    def ratio(**changes):
        theirs = row("autoep", 2, 1.5, share=2, **changes)
        return found(ours, [ours, *others, theirs]).get("over_autoep")

    assert ratio() == pytest.approx(1.5)
    assert ratio(first_loss=10.4008) == pytest.approx(1.5)
    assert ratio(first_loss=10.41) == "it starts elsewhere: loss 10.410000, ours 10.400000"
    assert ratio(first_loss=float("nan")).startswith("it starts elsewhere")
    assert ratio(dropped_rows=7) == "it drops 7 rows" and ratio(dropped_rows=0) == pytest.approx(1.5)
    assert ratio(error="TypeError") == "it failed"
    assert "over_autoep" not in found(ours, [ours, *others])
    assert "over_autoep" not in found(others[0], [ours, *others])
    ours["precision"] = "fp32"
    assert ratio(first_loss=10.4008).startswith("it starts elsewhere")


def test_goals_take_the_fastest_of_each_and_the_worst_loss():
    rows = [
        row(num_gpus=2, step_s=1.0, share=1, loss=8.0),
        row(num_gpus=2, step_s=0.8, share=2, loss=8.0),
        row("autoep", 2, 1.2, share=1, loss=8.04),
        row("autoep", 2, 0.9, share=2, loss=8.16),
        row("deepspeed.moe", 2, 0.5, share=1, first_loss=9.0),
        row("deepspeed.moe", 2, 0.7, share=2),
        row(num_gpus=1, step_s=0.5),
        row("autoep", 1, 0.1),
        row(num_gpus=2, step_s=0.1, batch_size=16),
    ]
    judged, result = judge(rows, "NVIDIA H200")
    assert result == goals(rows) and judged[0]["over_autoep"] == pytest.approx(1.2)
    where = "1B on 2 GPUs, 32 x 512 tokens each"
    assert {g["name"]: (g["measured"], g["met"]) for g in result} == {
        f"times the tokens/s of autoep, {where}": (pytest.approx(0.9 / 0.8), True),
        f"last loss beside autoep, {where}": (pytest.approx(0.16 / 2.4), False),
        f"times the tokens/s of deepspeed.moe, {where}": (pytest.approx(0.7 / 0.8), False),
        f"last loss beside deepspeed.moe, {where}": (0.0, True),
    }


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ours_and_both_baselines_train_alike_on_two_ranks(tmp_path, monkeypatch, forked_cells, capsys):
    flags = "--placement resident --model-size tiny --num-gpus 2 --expert-parallel 2 --zero-stage 2 --scaling weak"
    flags += " --batch-size 1 --max-length 32 --steps 1 --device cpu --output . --trace traces"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scale_out.py", *flags.split()])
    main()
    result = json.loads((tmp_path / "scale_out.json").read_text())
    ours, *theirs = result["rows"]
    assert [r["name"] for r in theirs] == ["autoep ZeRO-2", "deepspeed.moe ZeRO-2"]
    assert [r.get("error") for r in result["rows"]] == [None] * 3
    assert ours["json"] == "tiny_zero2.json" and ours["tokens"] == 64
    for other in theirs:
        assert other["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-6)
        assert other["loss"] == pytest.approx(ours["loss"], rel=1e-5)
        assert ours[f"over_{other['placement']}"] == ours["tokens_per_s"] / other["tokens_per_s"]
    assert ours["loss"] < ours["first_loss"] - 0.03  # the steps have taught something
    assert theirs[1]["dropped_rows"] == 0
    for measured in result["rows"]:
        assert measured["p20_s"] <= measured["step_s"] <= measured["p80_s"]
        assert 0 < measured["all_to_all_s"] < measured["max_s"] * 10
    trace = json.loads((tmp_path / "traces" / "tiny_resident_ZeRO-2_2gpus_share2_1rows.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert names.count("gloo:all_to_all") == 4 * (
        1 + 2 + 2
    )  # layers; counts, rows to owners and back, gradients
    assert len(result["goals"]) == 4 and table(result["rows"]) in capsys.readouterr().out
