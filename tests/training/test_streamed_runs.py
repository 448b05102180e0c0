"""Whole runs with streamed experts: resume to the bit, other placements and numbers of ranks, faults."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import (
    command,
    finish,
    losses,
    run,
    start,
    weights,
    without_shape,
    write_rows,
)

STREAMED = ("--placement", "streamed", "--expert-page-size", "3")
STEPS = ("--max-steps", "8", "--save-steps", "3", "--eval-steps", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("whole") / "out", *STEPS, *STREAMED)


def validation(directory) -> dict[int, float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["validation/overall/loss"] for row in rows if "validation/overall/loss" in row}


def tensors(directory) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors files, as file and name -> values."""
    paths = directory.glob("*.safetensors")
    return {f"{path.name} {name}": value for path in paths for name, value in load_file(path).items()}


def form(model_directory) -> dict[str, tuple]:
    """name -> (shape, dtype)"""
    return {name: (value.shape, value.dtype) for name, value in tensors(model_directory).items()}


def test_a_run_trains_validates_and_exports(uninterrupted):
    """`final_model` was reloaded and verified by the run."""
    directory, text = uninterrupted
    assert "streamed, pages of 3 experts in 3 slots, fp32 optimizer state" in text
    assert losses(directory)[8] < losses(directory)[1]
    assert validation(directory)[8] < validation(directory)[4]
    assert (directory / "final_model").exists()
    assert len(list((directory / "checkpoint-6" / "state").glob("experts-*-rank-0.safetensors"))) == 2


def after_checkpoint_3(whole, tmp_path):
    """A copy of the run as it was at step 3."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("final_model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(copy / name)
    return copy


def resumed(data, copy, *flags, world_size=1):
    """The copy gone on with to its end, with no word of placement and shape."""
    given = command(data, copy.parent, "--max-steps", "8", *flags, "--resume", str(copy))
    given = without_shape(given)
    code, text = finish(start(given, world_size))
    assert code == 0, text
    return copy


def assert_equal_runs(copy, whole):
    for name in ("final_model", "checkpoint-6/model"):
        assert weights(copy / name) == weights(whole / name)
    found, expected = (tensors(run / "checkpoint-8" / "state") for run in (copy, whole))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert losses(copy) == losses(whole) and validation(copy) == validation(whole)


def test_resumed_equals_uninterrupted_bit_for_bit(data, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    assert_equal_runs(resumed(data, after_checkpoint_3(whole, tmp_path)), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--expert-state", "bf16", "--precision", "bf16"),
        (
            "--expert-state",
            "int8",
            "--routing",
            "step",
            "--expert-pool",
            "2",
            "--gradient-checkpointing",
            "--gradient-accumulation-steps",
            "2",
        ),
    ],
)
def test_rounding_at_random_is_resumed_bit_for_bit(data, tmp_path, flags):
    whole, _ = run(data, tmp_path / "out", *STEPS, *STREAMED, *flags)
    assert_equal_runs(resumed(data, after_checkpoint_3(whole, tmp_path)), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stage", "flags"),
    [(1, 2, 0, ()), (2, 1, 2, ("--gradient-accumulation-steps", "2"))],
)
def test_resume_on_another_number_of_ranks(data, tmp_path, before, after, stage, flags):
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    flags = (*STEPS, *STREAMED, *flags, "--deepspeed-config", str(path))
    whole, _ = run(data, tmp_path / "whole", *flags, "--batch-size", str(4 // before), world_size=before)
    copy = after_checkpoint_3(whole, tmp_path)
    resumed(data, copy, "--batch-size", str(4 // after), world_size=after)
    assert losses(copy).keys() == losses(whole).keys()
    for step, loss in losses(whole).items():
        assert losses(copy)[step] == pytest.approx(loss, rel=1e-5), step


@pytest.mark.slow
def test_weights_go_from_placement_to_placement(data, uninterrupted, tmp_path):
    """Each starts from the one before and learns nothing; all of them find the same validation loss."""
    origin, _ = uninterrupted
    expected, expected_form = validation(origin)[8], form(origin / "final_model")
    still = ("--learning-rate", "1e-30", "--local-learning-rate", "1e-30", "--max-steps", "1")
    for number, placement in enumerate(("resident", "zero3", "streamed")):
        flags = (*still, "--placement", placement, "--init-from", str(origin))
        given = command(data, tmp_path / f"{number}", *flags)
        given = without_shape(given)
        code, text = finish(start(given))
        assert code == 0, text
        (origin,) = (tmp_path / f"{number}").glob("pragnosia_*")
        assert validation(origin)[1] == pytest.approx(expected, rel=1e-6), placement
        assert form(origin / "final_model") == expected_form, placement


def refused(given) -> str:
    code, text = finish(start(given))
    assert code == 2 and "Traceback" not in text, text
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    return line


def test_experts_that_do_not_fit_in_host_memory_are_refused_before_they_are_built(data, tmp_path):
    given = command(data, tmp_path / "out", "--placement", "streamed", "--hidden-size", "16384")
    given[given.index("--num-experts") + 1] = "100000"
    line = refused(given)
    assert "GB of host memory" in line and "--expert-state bf16" in line
    assert not list((tmp_path / "out").glob("*"))


def test_a_checkpoint_of_another_state_is_refused(data, uninterrupted):
    whole, _ = uninterrupted
    line = refused(command(data, whole.parent, "--resume", str(whole), "--expert-state", "int8"))
    assert "expert state fp32" in line and "int8" in line and "--init-from" in line


FAULTS = """
import sys
from experts.streamed import StreamedExperts
from model.presets import preset_config
from training import DataArguments, Pretrainer, TrainingArguments
from training.command_line import run_script
import training.pretrainer as pretrainer

fault, output = sys.argv[1:]
rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(40)]
args = TrainingArguments(output_dir=output, max_steps=6, per_device_train_batch_size=1, device="cpu",
                         report_to="none", logging_steps=1, placement="streamed", max_nan_steps=3)
config = preset_config("tiny", hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2)
trainer = Pretrainer(config, args, rows, data_args=DataArguments(max_length=32, num_workers=0))
use_gradients, train_step = StreamedExperts.use_gradients, pretrainer.train_step

def faulty_gradients(self, visit, page, gradients):
    if fault == "half a step" and trainer.step == 3 and visit.layer == 0:
        raise RuntimeError("a broken machine")
    if visit.layer == 1 and gradients and (fault == "nan" and trainer.step == 1 or fault == "always nan"):
        assert page.slot.page.experts[0] == 0
        gradients[1][2] = float("nan")
    use_gradients(self, visit, page, gradients)

def faulty_step(engine, batches):
    if fault == "nan" and trainer.step == 3:
        raise RuntimeError("a broken machine")
    return train_step(engine, batches)

StreamedExperts.use_gradients, pretrainer.train_step = faulty_gradients, faulty_step
run_script(lambda: trainer.train() and 0)
"""


def run_with(fault, tmp_path):
    """(exit code, what it printed, the run's directory)."""
    script = tmp_path / "script.py"
    script.write_text(FAULTS)
    code, text = finish(start([str(script), fault, str(tmp_path)]))
    (directory,) = tmp_path.glob("pragnosia_*")
    return code, text, directory


def test_an_expert_with_a_gradient_of_nan_is_left_out_and_an_exception_saves(tmp_path):
    code, text, directory = run_with("nan", tmp_path)
    assert code == 1 and "a broken machine" in text, text
    said = [line for line in text.splitlines() if "not updated" in line]
    assert len(said) == 1 and said[0].endswith("step 2: 1 experts not updated, gradient not finite")
    state = json.loads((directory / "emergency_checkpoint" / "trainer_state.json").read_text())
    assert state["step"] == 3
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["experts_refused"] for row in logged if "loss" in row} == {1: 0, 2: 1, 3: 0}


def test_an_exception_within_a_step_saves_nothing(tmp_path):
    """Some experts are those of the next step already."""
    code, text, directory = run_with("half a step", tmp_path)
    assert code == 1 and "a broken machine" in text, text
    assert not list(directory.glob("*checkpoint*"))


def test_experts_that_are_never_finite_stop_the_run(tmp_path):
    code, text, directory = run_with("always nan", tmp_path)
    assert code == 2 and "Traceback" not in text, text
    assert "3 steps in a row" in text and "--local-learning-rate" in text
    assert not list(directory.glob("*checkpoint*")) and not (directory / "final_model").exists()
