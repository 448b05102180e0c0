"""Loss curves of several runs: what is read off them, the goals, the plot, the command."""

import json
import subprocess
import sys

import pytest

from benchmarks import curves
from benchmarks.installed_python import examples
from tests.preloaded import python
from training.command_line import parse


def row(arm: str, loss: float) -> dict:
    curve = {"step": [1, 2], "tokens": [8, 16], "seconds": [1.0, 2.0], "validation_loss": [9.0, loss]}
    return {"arm": arm, "tokens": 16, "loss": loss, "curve": curve}


def test_a_curve_counts_the_seconds_of_steps_alone():
    lines = [
        {"step": 2, "step_seconds": 0.5, "memory/host_gb": 1.0},
        {"step": 2, "validation/overall/loss": 5.0},
        {"step": 4, "step_seconds": 0.25, "memory/host_gb": 2.0},
        {"step": 4, "validation/overall/loss": 5.5},
    ]
    found = curves.curve(lines, 8)
    assert found.pop("curve") == {
        "step": [2, 4], "tokens": [16, 32], "seconds": [1.0, 1.5], "validation_loss": [5.0, 5.5]
    }  # fmt: skip
    assert found == {
        "tokens": 32, "seconds": 1.5, "tokens_per_s": 32 / 1.5, "loss": 5.5, "best_loss": 5.0, "host_gb": 2.0
    }  # fmt: skip


def test_goals_compare_token_routing_with_resident():
    rows = [row("resident", 2.0), row("streamed int8", 2.03), row("streamed bf16, pools of 2", 3.0)]
    (judged,) = curves.goals(rows)
    assert judged["measured"] == pytest.approx(0.015) and not judged["met"]
    assert curves.goals([row("streamed bf16", 2.0), {"arm": "resident", "error": "out of memory"}]) == []


def test_plot_has_both_axes(tmp_path):
    figure = curves.draw([row("resident", 2.0), row("streamed int8", 2.1)], "350M", tmp_path / "plot.png")
    assert [axes.get_xlabel() for axes in figure.axes] == ["million tokens", "seconds in steps"]
    assert [list(axes.lines[1].get_xdata()) for axes in figure.axes] == [[8e-6, 16e-6], [1.0, 2.0]]
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize("arm", curves.ARMS)
def test_every_arm_is_a_run_of_as_many_tokens(arm, tmp_path):
    args = curves.parser().parse_args(["--tokens", "3e6", "--batch-size", "4", "--max-length", "256"])
    words = curves.command(args, arm, str(tmp_path))
    assert words[:2] == [sys.executable, str(curves.REPOSITORY / "train_ds.py")]
    training = parse(words[2:]).training
    assert training.max_steps == round(3e6 / 1024) and training.warmup_steps == training.max_steps // 20


def test_installed_packages_are_rows_of_text():
    rows = examples()
    first = [next(rows) for _ in range(3)]
    assert all(row["text"].strip() and row["template"].endswith(".py") for row in first)
    assert first == [row for row, _ in zip(examples(), range(3), strict=False)]


@pytest.mark.slow
def test_command(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {n} of a text\n" * 9}) + "\n" for n in range(300)))
    flags = ["--model-size", "tiny", "--dataset", str(data), "--tokens", "600", "--batch-size", "2"]
    flags += ["--max-length", "64", "--evaluations", "2", "--device", "cpu", "--output", "."]
    command = [python(), str(curves.REPOSITORY / "benchmarks" / "curves.py"), *flags]
    subprocess.run(
        [*command, "--plot", "plot.png", "--only", "streamed int8"], cwd=tmp_path, check=True, timeout=300
    )
    (found,) = json.loads((tmp_path / "curves.json").read_text())["rows"]
    assert found["tokens"] == 640 and found["curve"]["tokens"] == [256, 512, 640], found
    assert found["loss"] < found["curve"]["validation_loss"][0] and (tmp_path / "plot.png").exists()
