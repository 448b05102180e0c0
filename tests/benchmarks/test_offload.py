"""Streamed against the rest: which cells there are, what follows from their rows, and the command."""

import json
import sys

import pytest

from benchmarks import offload
from benchmarks.offload import (
    INT8,
    LEAN,
    STREAMED,
    WINDOWS,
    compared,
    goals,
    groups,
    judge,
    main,
    parser,
    zero3_json,
)
from model.presets import PRESETS
from training import deepspeed_config
from training.config import TrainingArguments

BUS = {"name": "bus", "bus_up_gb_s": 50.0, "bus_down_gb_s": 50.0, "bus_both_gb_s": 40.0}


def row(name, placement, step_s, tokens=2048, model_size="3B", **more):
    return {
        "name": name, "placement": placement, "model_size": model_size, "tokens": tokens, "step_s": step_s,
        "tokens_per_s": tokens / step_s, "checkpointing": "", "routing": "token", **more,
    }  # fmt: skip


def streamed(step_s, **more):
    return row(STREAMED, "streamed", step_s, **{"up_gb": 20.0, "down_gb": 10.0, **more})


@pytest.mark.parametrize("size", [size for size in PRESETS if size != "tiny"])
@pytest.mark.parametrize("state", ["bf16", "fp32"])
def test_zero3_settings(tmp_path, size, state):
    shipped = json.loads((deepspeed_config.DIRECTORY / f"{size}_consumer.json").read_text())
    for windows in ("tight", "loose"):
        path = zero3_json(tmp_path / "x.json", size, 8, windows, state, None)
        config = deepspeed_config.load(
            path, TrainingArguments(), placement="zero3", precision="bf16", world_size=1
        )
        assert config["bf16"].get("bf16_optimizer_states", False) == (state == "bf16")
        zero = config["zero_optimization"]
        assert zero["offload_optimizer"]["device"] == "cpu"
        if windows == "loose":
            assert not set(WINDOWS) & set(zero)
        else:  # a page of 8 experts: what the preset ships
            for key in WINDOWS:
                assert zero[key] == pytest.approx(shipped["zero_optimization"][key], rel=0.05), key


def test_the_most_important_cells_come_first_and_token_counts_share_an_engine(tmp_path):
    args = parser().parse_args(["--only", "streamed bf16", "resident", "bank loose"])
    wanted = groups(args, tmp_path, [])
    named = [(cells[0].name, cells[0].model_size) for cells in wanted]
    assert named[:4] == [(name, size) for name in (STREAMED, "resident") for size in ("3B", "1B")]
    assert {name for name, _ in named} == {
        STREAMED, "resident", "zero3 bank loose bf16", "zero3 bank loose fp32", "streamed bf16 step routing"
    }  # fmt: skip
    for cells in wanted:
        assert [(cell.batch_size, cell.gradient_checkpointing) for cell in cells] == [
            (4, False), (16, False), (64, True)
        ]  # fmt: skip
    rows = [BUS, streamed(1.0), streamed(1.0, tokens=8192), row("resident", "resident", 1.0, model_size="1B")]
    rest = {(cells[0].name, cells[0].model_size): len(cells) for cells in groups(args, tmp_path, rows)}
    assert (rest[STREAMED, "3B"], rest[STREAMED, "1B"], rest["resident", "1B"]) == (1, 3, 2)


def test_a_streamed_row_is_compared_with_the_same_load():
    rows = [
        BUS,
        streamed(0.5),
        row("zero3 page", "zero3", 2.0),
        row("zero3 bank", "zero3", 1.8),
        row("zero3 failed", "zero3", 0.1, error="out of memory"),
        row("zero3 page", "zero3", 0.1, tokens=8192),
        row("zero3 page", "zero3", 0.1, model_size="1B"),
        row("zero3 page", "zero3", 0.1, checkpointing="yes"),
        row("fsdp2", "fsdp2", 3.0),
        row("resident", "resident", 0.3),
    ]
    assert compared(rows[1], rows) == pytest.approx(
        {
            "over_zero3": 3.6, "over_fsdp2": 6.0, "of_resident": 0.6, "bus_s": 0.4, "of_bus": 0.8,
            "bus_shared_s": 10 / 40 + 10 / 50, "of_bus_shared": 0.9, "limit_s": 0.4, "of_limit": 0.8,
        }
    )  # fmt: skip
    assert all(compared(other, rows) == {} for other in rows if other is not rows[1])
    assert compared(streamed(0.5, tokens=8192), rows[:2]).keys() == {
        "bus_s", "of_bus", "bus_shared_s", "of_bus_shared"
    }  # fmt: skip
    assert "limit_s" not in compared(streamed(0.5, routing="step"), rows)  # its experts are fewer
    slow = [BUS, streamed(1.0), row("resident", "resident", 0.8)]
    assert compared(slow[1], slow)["limit_s"] == 0.8
    assert judge(rows)[0][1]["over_zero3"] == pytest.approx(3.6) and "over_zero3" not in rows[1]


def test_goals():
    def judged(rows):
        return {goal["name"].split(",")[0]: (goal["measured"], goal["met"]) for goal in goals(rows)}

    small = [BUS, streamed(0.5), row("zero3", "zero3", 1.8), row("resident", "resident", 0.3)]
    assert judged(small) == {
        "times the tokens/s of the best zero3": (pytest.approx(3.6), True),
        "share of the bus": (pytest.approx(0.8), False),
    }
    large = {"tokens": 32768, "checkpointing": "yes"}
    rows = [
        BUS,
        streamed(1.0, gpu_allocated_gb=5.5, **large),
        row("zero3", "zero3", 2.9, **large),
        row("resident", "resident", 0.75, **large),
    ]
    assert judged(rows) == {  # computation binds: the bus is no goal
        "times the tokens/s of the best zero3": (pytest.approx(2.9), False),
        "share of resident tokens/s": (pytest.approx(0.75), True),
        "GB of GPU memory": (5.5, False),
    }
    assert judged([{**streamed(0.5), "error": "out of memory"}, *small[2:], BUS]) == {}
    arms = [INT8, LEAN, "streamed bf16 step routing"]
    named = [goal["name"] for goal in goals([BUS, *small[2:], *({**small[1], "name": arm} for arm in arms)])]
    assert [name.split(", ")[1] for name in named] == [INT8, INT8, LEAN, LEAN]


@pytest.mark.slow
def test_command_goes_on_where_it_was_ended(tmp_path, monkeypatch, forked_cells):
    monkeypatch.setattr(offload, "ROW", 16)

    def rows_with(*flags):
        shared = ["--device", "cpu", "--steps", "1", "--model-size", "tiny", "--recompute-from", "32"]
        monkeypatch.setattr(sys, "argv", ["offload.py", *shared, "--output", str(tmp_path), *flags])
        main()
        return json.loads((tmp_path / "offload.json").read_text())["rows"]

    first = rows_with("--tokens", "16", "--only", "step routing")
    assert [row["name"] for row in first] == ["bus", "streamed bf16 step routing"] and "error" not in first[1]
    rows = rows_with("--tokens", "16", "32", "--only", "step routing", "zero3 page 8 tight bf16", "--keep")
    assert [(row["name"], row.get("tokens"), row.get("checkpointing")) for row in rows] == [
        ("bus", None, None),
        ("streamed bf16 step routing", 16, ""),
        ("zero3 page 8 tight bf16", 16, ""),
        ("zero3 page 8 tight bf16", 32, "yes"),
        ("streamed bf16 step routing", 32, "yes"),
    ]
    assert {**rows[1], **first[1]} == rows[1]  # not measured again
    assert "over_zero3" in rows[1] and "over_zero3" in rows[4] and "of_resident" not in rows[1]


def test_tokens_are_whole_rows(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["offload.py", "--tokens", "700"])
    with pytest.raises(SystemExit, match="--tokens 700 is not a multiple of 512"):
        main()
