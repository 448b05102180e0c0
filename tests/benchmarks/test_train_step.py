"""The step benchmark as a command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import table

ROOT = Path(__file__).resolve().parents[2]


def bench(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--output", str(tmp_path), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "train_step.json").read_text()), done.stdout


@pytest.mark.slow
def test_measures_every_cell_and_writes_the_result(tmp_path):
    flags = ("--device", "cpu", "--steps", "1", "--batch-size", "1", "--max-length", "32")
    flags += ("--kernels", "auto")
    result, text = bench(tmp_path, *flags, "--placement", "resident", "zero3", "nowhere")
    assert "--placement resident zero3" in result["command"] and "no GPU" in result["gpu"]
    assert result["versions"]["torch"] and result["versions"]["deepspeed"]
    *rows, failed = result["rows"]
    assert "--placement must be one of" in failed["error"] and "step_s" not in failed
    assert [row["placement"] for row in rows] == ["resident", "zero3"]
    assert [row["json"] for row in rows] == ["cpu.json", "cpu_zero3.json"]
    assert failed["kernels"] == "auto"
    for row in rows:
        assert row["kernels"].startswith(
            "plain PyTorch (kernels need an NVIDIA GPU"
        )  # what ran, not what was asked
        assert row["tokens_per_s"] == pytest.approx(32 / row["step_s"])
        assert 0.1 < row["host_rss_gb"] < 4 and "gpu_allocated_gb" not in row
    assert result["goals"] == []  # they are about GPU memory
    # The same seeds: placement changes where the weights live, not what is computed.
    losses = [row["loss"] for row in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert result["gpu"] in text and table(result["rows"]) in text
