"""Whole runs as processes: resume to the bit, kills, signals, other numbers of ranks, bad input."""

import json
import os
import random
import shutil
import signal
import time

import pytest

from tests.training.runs import (
    REPOSITORY,
    command,
    finish,
    losses,
    run,
    start,
    weights,
    without_shape,
    write_rows,
)
from train_ds import dry_run
from training.command_line import parse
from training.config import UserError

STEPS = ("--max-steps", "8", "--save-steps", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    directory, text = run(data, tmp_path_factory.mktemp("whole") / "out", *STEPS)
    return directory, text


def test_a_run_leaves_what_it_says(uninterrupted):
    directory, text = uninterrupted
    names = {path.name for path in directory.iterdir()}
    assert {"run.json", "metrics.jsonl", "loss.png", "final_model", "checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert f"chat --checkpoint {directory}" in text
    assert losses(directory)[8] < losses(directory)[1]
    logged = json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "loss", "perplexity", "learning_rate", "local_learning_rate", "grad_norm", "tokens_per_second",
        "samples_per_second", "eta_seconds", "memory/host_gb", "data_wait_seconds", "router/load_min",
        "router/load_max", "router/load_cv", "router/entropy", "router/balance_loss", "router/z_loss",
    } <= set(logged)  # fmt: skip


def test_resumed_equals_uninterrupted_bit_for_bit(data, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("final_model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(copy / name)
    code, text = finish(start(command(data, tmp_path, *STEPS, "--resume", str(copy))))
    assert code == 0, text
    assert weights(copy / "final_model") == weights(whole / "final_model")
    assert weights(copy / "checkpoint-6" / "model") == weights(whole / "checkpoint-6" / "model")
    assert losses(copy) == losses(whole)


@pytest.mark.slow
def test_killed_ten_times_during_saves_still_reaches_the_same_weights(data, tmp_path):
    flags = ("--max-steps", "20", "--save-steps", "1", "--keep-checkpoints", "2")
    whole, _ = run(data, tmp_path / "whole", *flags)
    output = tmp_path / "out"
    generator = random.Random(0)
    resume, kills = (), 0
    for _ in range(40):
        leftovers = list(output.glob("pragnosia_*/.tmp-checkpoint-*"))
        (process,) = start(command(data, output, *flags, *resume))
        if kills < 10:
            _wait_for_save(process, output, leftovers)
            time.sleep(generator.uniform(0, 0.06))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        code, text = finish([process])
        if code == 0:
            break
        assert code == -signal.SIGKILL, text
        (directory,) = output.glob("pragnosia_*")
        if list(directory.glob("checkpoint-*")):
            resume = ("--resume", str(directory))
        else:
            shutil.rmtree(directory)
    assert code == 0
    (directory,) = output.glob("pragnosia_*")
    assert kills == 10
    assert weights(directory / "final_model") == weights(whole / "final_model")


def _wait_for_save(process, output, leftovers):
    """Until this process, and not the killed one before it, writes a checkpoint."""
    for condition in (
        lambda: not any(path.exists() for path in leftovers),
        lambda: list(output.glob("pragnosia_*/.tmp-checkpoint-*")),
    ):
        while process.poll() is None and not condition():
            time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_can_go_on(data, uninterrupted, tmp_path, number):
    whole, _ = uninterrupted
    (process,) = start(command(data, tmp_path / "out", *STEPS))
    while not any(path.stat().st_size for path in (tmp_path / "out").glob("*/metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the same request, of a launcher that heard it too
    code, text = finish([process])
    assert code == 128 + number, text
    (directory,) = (tmp_path / "out").glob("pragnosia_*")
    assert (directory / "interrupted_checkpoint").is_dir() and "resume with" in text
    run(data, tmp_path / "out", *STEPS, "--resume", str(directory))
    assert weights(directory / "final_model") == weights(whole / "final_model")


@pytest.mark.slow
@pytest.mark.parametrize("json_name", ["stage2", "cpu_zero3"])
def test_resume_on_another_number_of_ranks(data, tmp_path, json_name):
    """From 1 rank to 2 at step 3, and from these back to 1 at step 6."""
    name = json_name
    if json_name == "stage2":
        name = str(tmp_path / "stage2.json")
        (tmp_path / "stage2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    flags = (*STEPS, "--deepspeed-config", name)
    whole, _ = run(data, tmp_path / "whole", *flags, "--batch-size", "4")
    part = shutil.copytree(whole, tmp_path / "part" / whole.name)
    for ranks, later in ((2, ("checkpoint-6", "checkpoint-8")), (1, ("checkpoint-8",))):
        for done in ("final_model", *later):
            shutil.rmtree(part / done)
        batch = ("--batch-size", str(4 // ranks))
        run(data, tmp_path / "part", *flags, *batch, "--resume", str(part), world_size=ranks)
        assert losses(part).keys() == losses(whole).keys()
        for step, loss in losses(whole).items():
            assert losses(part)[step] == pytest.approx(loss, rel=1e-5), (ranks, step)


def bad(data, tmp_path, *flags, expect=2):
    _, text = run(data, tmp_path / "out", "--max-steps", "2", *flags, expect=expect)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--num-experts", "2", "--num-active-experts", "3"), ("--num-active-experts 3", "--num-experts 2")),
        (("--hidden-size", "40"), ("--hidden-size 40", "multiple of")),
        (("--dataset", "nowhere.jsonl"), ("nowhere.jsonl",)),
        (("--resume", "nowhere"), ("--resume nowhere",)),
        (("--init-from", "nowhere"), ("--init-from nowhere",)),
        (("--learning-rat", "1"), ("--learning-rate",)),
        (("--expert-page-size", "3", "--placement", "zero3"), ("--expert-page-size 3", "4 experts")),
        (("--device", "cuda"), ("--device cuda", "--device cpu")),
    ],
)
def test_bad_input_is_one_clear_line(data, tmp_path, flags, words):
    if flags == ("--device", "cuda"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("has a GPU")
    line = bad(data, tmp_path, *flags)
    for word in words:
        assert word in line


def test_truncated_and_missing_checkpoint_files(data, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    shard = next((copy / "checkpoint-6" / "state").glob("*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "truncated" in bad(data, tmp_path, "--resume", str(copy / "checkpoint-6"))
    shard.unlink()
    assert "missing" in bad(data, tmp_path, "--resume", str(copy / "checkpoint-6"))


def test_another_architecture_and_another_tokenizer(data, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    copy = tmp_path / "model"
    shutil.copytree(whole / "final_model", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "llama" in bad(data, tmp_path, "--init-from", str(copy))
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    assert "vocabulary" in bad(data, tmp_path, "--init-from", str(copy))


def test_output_that_cannot_be_written(data, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "--output-dir" in bad(data, tmp_path, "--output-dir", str(blocker / "out"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_full_disk(data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=12m tmpfs {small}"):
        pytest.skip("tmpfs cannot be mounted here")
    try:
        _, text = run(data, tmp_path / "none", *STEPS, "--output-dir", str(small), expect=2)
        assert "No space left" in text and "Traceback" not in text
        (directory,) = small.glob("pragnosia_*")
        assert not list(directory.glob("checkpoint-*/trainer_state.json"))
    finally:
        os.system(f"umount {small}")


def test_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    flags = (
        "--max-steps",
        "30",
        "--save-steps",
        "1",
        "--learning-rate",
        "1e30",
        "--local-learning-rate",
        "1e30",
    )
    flags = (*flags, "--gradient-clip", "1e9", "--max-nan-steps", "3", "--keep-checkpoints", "50")
    directory, text = run(data, tmp_path / "out", *flags, expect=2)
    line = next(line for line in text.splitlines() if line.startswith("error:"))
    assert "3 steps" in line and "checkpoint" in line and "Traceback" not in text
    assert list(directory.glob("checkpoint-*")) and not (directory / "final_model").exists()


def test_a_dead_rank_does_not_leave_the_other_waiting(data, tmp_path):
    processes = start(command(data, tmp_path / "out", "--max-steps", "500"), world_size=2)
    while not list((tmp_path / "out").glob("*/metrics.jsonl")):
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    code, _ = finish(processes, timeout=60)
    assert code != 0


def test_reporters_streaming_export_and_a_run_that_starts_from_it(data, tmp_path):
    """One run with every reporter on a stream, exported for plain transformers; another starts from it."""
    flags = (
        "--max-steps",
        "4",
        "--streaming",
        "--report-to",
        "tensorboard,wandb",
        "--export-format",
        "qwen3_moe",
    )
    (process,) = start(command(data, tmp_path / "out", *flags), WANDB_MODE="offline")
    code, text = finish([process])
    assert code == 0, text
    (directory,) = (tmp_path / "out").glob("pragnosia_*")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        list(losses(directory).values())
    )
    assert list((directory / "wandb").glob("offline-run-*/run-*.wandb"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory / "final_model")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    ids = torch.tensor([AutoTokenizer.from_pretrained(directory / "final_model")("What is 1 + 1?").input_ids])
    assert model(ids).logits.isfinite().all()

    # Nothing is learnt at this rate, so the second validation is no better and patience ends the run.
    flags = ("--init-from", str(directory), "--learning-rate", "1e-30", "--local-learning-rate", "1e-30")
    flags = (*flags, "--eval-steps", "1", "--early-stopping-patience", "1", "--max-steps", "50")
    given = command(data, tmp_path / "second", *flags)
    code, text = finish(start(without_shape(given)))
    assert code == 0 and "stopping early" in text, text
    (second,) = (tmp_path / "second").glob("pragnosia_*")
    assert max(losses(second)) == 2


def test_going_back_keeps_the_new_branch(data, uninterrupted, tmp_path):
    """Resuming an older checkpoint sets later ones aside: pruning and --resume follow the new branch."""
    whole, _ = uninterrupted
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    flags = ("--max-steps", "5", "--save-steps", "1", "--keep-checkpoints", "2")
    code, text = finish(start(command(data, tmp_path, *flags, "--resume", str(copy / "checkpoint-3"))))
    assert code == 0, text
    assert {path.name for path in copy.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    assert {"checkpoint-6", "checkpoint-8", "final_model"} <= {p.name for p in (copy / "abandoned").iterdir()}
    assert max(losses(copy)) == 5 and (copy / "final_model").exists()


def test_epochs_are_finished_with_another_batch_size(data, tmp_path):
    """Half an epoch at 2 rows a step, the rest at 4: every row is seen once, and the run ends with its epoch."""
    whole, _ = run(data, tmp_path / "out", "--epochs", "1", "--save-steps", "4", "--keep-checkpoints", "50")
    steps = max(losses(whole))
    shutil.rmtree(whole / f"checkpoint-{steps}")
    resume = ("--resume", str(whole / "checkpoint-4"))
    run(data, tmp_path / "out", "--epochs", "1", *resume, "--batch-size", "4")
    assert max(losses(whole)) == 4 + -(-(steps - 4) // 2)
    tokens = [json.loads(line).get("tokens") for line in (whole / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((whole / "run.json").read_text())["data"]
    assert max(filter(None, tokens)) == sum(line["tokens"] for line in report)


def test_another_layout_is_refused(data, uninterrupted, tmp_path):
    whole, _ = uninterrupted
    where = ("--resume", str(whole), "--output-dir", str(whole.parent))
    assert f"a resumed run goes on in {whole}" in bad(data, tmp_path, *where[:2])
    line = bad(data, tmp_path, *where, "--placement", "zero3")
    assert "placement resident" in line and "zero3" in line and "--init-from" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--use-cache-augmentation",), ("--use-cache-augmentation", "--stage cache --init-from")),
        (("--init-from", "RUN", "--value-refresh", "3"), ("--value-refresh", "head")),
        (("--resume", "RUN", "--load-balance", "bias"), ("router bias False, this run has True",)),
        (("--streaming", "--max-steps", "none"), ("--streaming needs --max-steps",)),
        (("--segments", "7"), ("--segments 7 must divide --max-length 64",)),
        (("--segments", "64"), ("--segments 64", "two tokens")),
        (("--segments", "2", "--gradient-checkpointing"), ("--gradient-checkpointing", "--segments")),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(data, uninterrupted, tmp_path, flags, words):
    whole, _ = uninterrupted
    flags = [str(whole) if flag == "RUN" else flag for flag in flags]
    output = whole.parent if "--resume" in flags else tmp_path / "out"
    given = command(data, output, *flags)
    given = without_shape(given) if str(whole) in flags else given
    with pytest.raises(UserError) as refused:
        dry_run(parse(given[1:]))
    code, text = finish(start(given))
    assert code == 2 and text.splitlines()[-1] == f"error: {refused.value}", text
    assert all(word in text for word in words) and "Traceback" not in text


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ('RuntimeError("a broken machine")', "RuntimeError: a broken machine"),
        (
            'OSError(5, "Input/output error", "disk")',
            "UserError: [Errno 5] Input/output error: 'disk', stopped at step 3; complete checkpoints are "
            "untouched: mend it and --resume",
        ),
    ],
    ids=["machine", "disk"],
)
def test_a_gradient_that_is_not_finite_is_refused_and_an_exception_saves(data, tmp_path, failure, said):
    """In the trainer itself: a NaN gradient at step 2 changes nothing, an exception at step 4 leaves step 3."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, torch
sys.path.insert(0, {str(REPOSITORY)!r})
from model.presets import preset_config
from training import DataArguments, Pretrainer, TrainingArguments
import training.pretrainer as pretrainer

rows = [{{"question": f"{{n}} + 1?", "answer": str(n + 1)}} for n in range(40)]
args = TrainingArguments(output_dir={str(tmp_path / "out")!r}, max_steps=6, per_device_train_batch_size=1,
                         device="cpu", report_to="none", logging_steps=1)
config = preset_config("tiny", hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1)
trainer = Pretrainer(config, args, rows, data_args=DataArguments(max_length=32, num_workers=0))
real = pretrainer.train_step

def step(engine, batches):
    if trainer.step == 3:
        raise {failure}
    before = engine.module.model.norm.weight.detach().clone()
    handle = None
    if trainer.step == 1:
        handle = engine.module.model.norm.weight.register_hook(lambda grad: grad * float("nan"))
    result = real(engine, batches)
    if handle:
        handle.remove()
        assert not result.applied and torch.equal(before, engine.module.model.norm.weight)
    else:
        assert result.applied and not torch.equal(before, engine.module.model.norm.weight)
    return result

pretrainer.train_step = step
trainer.train()
""")
    code, text = finish(start([str(script)]))
    assert said in text and code == 1, text
    (directory,) = (tmp_path / "out").glob("pragnosia_*")
    state = json.loads((directory / "emergency_checkpoint" / "trainer_state.json").read_text())
    assert state["step"] == 3
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row["steps_refused"] for row in logged if "loss" in row} == {1: 0, 2: 1, 3: 0}
