"""The step benchmark as a command, and what its results are made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import goal, table
from benchmarks.train_step import goals

ROOT = Path(__file__).resolve().parents[2]
HEADER = ["command", "gpu", "versions", "commit", "date", "rows", "goals"]


def bench(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--output", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "train_step.json").read_text()), done.stdout


@pytest.mark.slow
def test_measures_every_cell_and_writes_the_result(tmp_path):
    flags = ("--device", "cpu", "--steps", "1", "--batch-size", "1", "--max-length", "32")
    result, text = bench(tmp_path, *flags, "--placement", "resident", "zero3")
    assert list(result) == HEADER
    assert "--placement resident zero3" in result["command"] and "no GPU" in result["gpu"]
    assert result["versions"]["torch"] and result["versions"]["deepspeed"]
    assert [row["placement"] for row in result["rows"]] == ["resident", "zero3"]
    assert [row["json"] for row in result["rows"]] == ["cpu.json", "cpu_zero3.json"]
    for row in result["rows"]:
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_s"])
        assert row["host_rss_gb"] > 0.1 and "gpu_allocated_gb" not in row
    assert result["goals"] == []  # they are about GPU memory
    # The same seeds: placement changes where the weights live, not what is computed.
    losses = [row["loss"] for row in result["rows"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert result["gpu"] in text and table(result["rows"]) in text


def test_a_cell_that_fails_is_a_row_with_its_error(tmp_path):
    result, _ = bench(tmp_path, "--device", "cpu", "--steps", "1", "--deepspeed-config", "nowhere.json")
    (row,) = result["rows"]
    assert "nowhere.json" in row["error"] and "step_s" not in row


def test_goals_come_from_rows():
    row = {"model_size": "350M", "placement": "zero3", "batch_size": 1, "max_length": 512, "experts": 8}
    others = [
        {**row, "gpu_allocated_gb": 0.2, **change}
        for change in ({"placement": "resident"}, {"batch_size": 4}, {"max_length": 64}, {"experts": 4})
    ]
    assert goals([*others, {**row, "error": "out of memory"}]) == []
    (judged,) = goals([*others, {**row, "gpu_allocated_gb": 0.6}, {**row, "gpu_allocated_gb": 0.41}])
    assert (judged["target"], judged["measured"], judged["met"]) == (0.4, 0.41, False)
    assert goals([{**row, "gpu_allocated_gb": 0.4}])[0]["met"]


@pytest.mark.parametrize(
    ("measured", "at_least", "met"), [(2, True, False), (3, True, True), (4, False, False)]
)
def test_goal(measured, at_least, met):
    judged = goal("speed", 3, measured, at_least=at_least)
    assert judged == {"name": "speed", "target": 3, "measured": measured, "met": met}


def test_table_leaves_missing_cells_empty():
    assert table([{"a": 1, "b": 0.12345}, {"b": 12345.6, "c": "x"}]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 0.1235 |  |",
        "|  | 1.235e+04 | x |",
    ]
