"""A run gives a base model a memory, goes on where it was stopped, and another run takes the memory away."""

import json
import shutil

import pytest

from training.checkpoint import load_config, read_state

from .runs import command as command_of
from .runs import finish, run, start, weights, without_shape, write_rows

MEMORY = ("--use-neural-memory", "--memory-size", "32", "--memory-head-dim", "16", "--memory-layers", "1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def started_from(origin, data, output, *flags: str) -> tuple:
    """A run whose shape is that of the run it starts from."""
    words = without_shape(command_of(data, output, "--init-from", str(origin), *flags))
    code, text = finish(start(words))
    assert code == 0, text
    return next(output.glob("pragnosia_*")), text


@pytest.mark.slow
def test_added_to_a_base_model_resumed_and_taken_away(data, tmp_path):
    base, _ = run(data, tmp_path / "base", "--max-steps", "1")
    more = ("--max-steps", "4", "--save-steps", "2", *MEMORY, "--memory-window", "8")
    remembering, _ = started_from(base, data, tmp_path / "memory", *more)
    assert load_config(remembering / "final_model").memory["window"] == 8
    logged = [json.loads(line) for line in (remembering / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in logged if "loss" in row]
    assert first["neural_memory/read_ratio"] == 0 < last["neural_memory/read_ratio"]  # the second step learns
    assert 0 < last["neural_memory/beta"] < 1 < last["neural_memory/half_life"]

    stopped = tmp_path / "stopped" / remembering.name
    shutil.copytree(
        remembering, stopped, ignore=shutil.ignore_patterns("final_model", "checkpoint-4", "loss.png")
    )
    words = without_shape(command_of(data, tmp_path / "stopped", "--resume", str(stopped), *more))
    code, text = finish(start(words))
    assert code == 0, text
    assert weights(stopped / "final_model") == weights(remembering / "final_model")

    words = command_of(
        data, tmp_path / "base", "--resume", str(base), "--max-steps", "2", "--use-tree-of-thoughts"
    )
    code, text = finish(start(without_shape(words)))
    assert code == 2 and "components []" in text and "--init-from" in text and "Traceback" not in text, text

    flags = ("--no-use-neural-memory", "--max-steps", "1")
    without, _ = started_from(remembering, data, tmp_path / "without", *flags)
    assert load_config(without / "final_model").memory is None
    assert b".memory." not in weights(without / "final_model")


@pytest.mark.slow
def test_rows_in_segments_count_as_rows_and_go_on_where_they_stopped(data, tmp_path):
    flags = ("--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", *MEMORY, "--memory-window", "8")
    rows = []
    for name, more in (("plain", ()), ("whole", ("--segments", "2"))):
        whole, _ = run(data, tmp_path / name, *flags, *more)
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        rows.append([row for row in lines if "loss" in row])
    for plain, segmented in zip(*rows, strict=True):
        assert plain["tokens"] == segmented["tokens"] and plain["loss"] != segmented["loss"]
        assert segmented["samples_per_second"] * segmented["step_seconds"] == pytest.approx(2)  # --batch-size
    stopped = tmp_path / "stopped" / whole.name
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("final_model", "checkpoint-4", "loss.png"))
    code, text = finish(start(without_shape(command_of(data, stopped.parent, "--resume", str(stopped)))))
    assert code == 0, text
    assert weights(stopped / "final_model") == weights(whole / "final_model")
    again = ("--resume", str(stopped), "--segments", "1", "--max-steps", "5")  # goes on at the same row
    code, text = finish(start(without_shape(command_of(data, stopped.parent, *again))))
    assert code == 0, text
    before, after = (read_state(stopped / f"checkpoint-{step}") for step in (4, 5))
    assert after["step_in_epoch"] == before["step_in_epoch"] + 1 and after["epoch"] == before["epoch"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--memory-layers", "3"), ("3 memory layers in a model of 2", "--memory-layers")),
        (("--memory-layers", "2", "--memory-window", "8"), ("2 of 2 layers", "--memory-layers 1")),
        (("--memory-size", "100"), ("100 slots", "--memory-size a multiple")),
        (
            ("--memory-layers", "1", "--export-format", "qwen3_moe"),
            ("--export-format", "--no-use-neural-memory"),
        ),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, flags, words):
    code, text = finish(start(command_of(data, tmp_path, "--max-steps", "1", *MEMORY[:1], *flags)))
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 2 and all(word in line for word in words), text
