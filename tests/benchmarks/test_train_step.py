"""The step benchmark as a command."""

import json

import pytest

from benchmarks.results import table


@pytest.mark.slow
def test_measures_every_cell_and_writes_the_result(tmp_path, bench, capsys):
    flags = ("--device", "cpu", "--steps", "1", "--batch-size", "1", "--max-length", "32")
    flags += ("--kernels", "auto")
    bench("train_step", *flags, "--placement", "resident", "zero3", "nowhere", "--output", ".")
    result, text = json.loads((tmp_path / "train_step.json").read_text()), capsys.readouterr().out
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


@pytest.mark.slow
def test_kernels_take_turns_on_one_engine(tmp_path, bench):
    flags = ("--device", "cpu", "--steps", "1", "--batch-size", "1", "--max-length", "32")
    bench("train_step", *flags, "--kernels", "reference", "auto", "--output", ".")
    rows = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    assert ["not asked for" in row["kernels"] for row in rows] == [True, False, True, False]
    losses = [row["first_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)  # the model goes on learning its batch
