"""Whole runs with step routing: resume to the bit, other numbers of ranks, evaluation, chat, bad input."""

import json
import shutil
import subprocess

import pytest

from tests.preloaded import python
from tests.training.runs import (
    REPOSITORY,
    command,
    environment,
    finish,
    losses,
    run,
    start,
    weights,
    without_shape,
    write_rows,
)

ROUTING = ("--routing", "step", "--expert-pool", "4", "--num-experts", "6")
STEPS = ("--max-steps", "8", "--save-steps", "3", "--eval-steps", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("whole") / "out", *STEPS, *ROUTING)


def uses(checkpoint) -> list[list[int]]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["pool_uses"]


def resumed(data, whole, tmp_path, *flags):
    """A copy of the run, gone on with after its first checkpoint, with no word of the routing."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("final_model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(copy / name)
    given = command(data, tmp_path, *STEPS, *flags, "--resume", str(copy))
    given = without_shape(given)
    code, text = finish(start(given))
    assert code == 0, text
    return copy


def test_validation_measures_the_choice(uninterrupted):
    directory, text = uninterrupted
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if "validation/overall/loss" in row]
    assert [row["step"] for row in validated] == [4, 8]
    for row in validated:
        for family in ("overall", "reasoning"):
            loss, chosen, gap = (
                row[f"validation/{family}/{key}"] for key in ("loss", "training_choice_loss", "choice_gap")
            )
            assert gap == pytest.approx(loss - chosen) and 0 < abs(gap) < 1
    assert f"choice gap {validated[-1]['validation/overall/choice_gap']:+.3f}" in text
    assert "6 experts, 2 active of a pool of 4" in text
    assert losses(directory)[8] < losses(directory)[1]
    config = json.loads((directory / "final_model" / "config.json").read_text())
    assert (config["routing"], config["expert_pool"]) == ("step", 4)


def test_every_microbatch_is_counted_once(uninterrupted):
    directory, _ = uninterrupted
    assert [sum(layer) for layer in uses(directory / "checkpoint-6")] == [6 * 4] * 2


@pytest.mark.parametrize(
    "zero",
    [
        None,
        pytest.param("0", marks=pytest.mark.slow),
        pytest.param("cpu_zero3", marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(data, uninterrupted, tmp_path, zero):
    whole, flags = uninterrupted[0], ()
    if zero is not None:
        name = zero
        if zero.isdigit():
            name = str(tmp_path / "stage.json")
            (tmp_path / "stage.json").write_text(json.dumps({"zero_optimization": {"stage": int(zero)}}))
        flags = ("--deepspeed-config", name, "--gradient-checkpointing")
        whole, _ = run(data, tmp_path / "out", *STEPS, *ROUTING, *flags)
    copy = resumed(data, whole, tmp_path, *flags)
    for name in ("checkpoint-6", "checkpoint-8"):
        assert uses(copy / name) == uses(whole / name)
        assert weights(copy / name / "model") == weights(whole / name / "model")
    assert weights(copy / "final_model") == weights(whole / "final_model")
    assert losses(copy) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("name, before, after", [("cpu", 2, 1), ("cpu_zero3", 1, 2)])
def test_counts_follow_to_another_number_of_ranks(data, tmp_path, before, after, name):
    flags = (*STEPS, *ROUTING, "--deepspeed-config", name)

    def batch(ranks):
        return ("--batch-size", str(4 // ranks))

    whole, _ = run(data, tmp_path / "whole", *flags, *batch(before), world_size=before)
    part = shutil.copytree(whole, tmp_path / "part" / whole.name)
    for done in ("final_model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(part / done)
    run(data, tmp_path / "part", *flags, *batch(after), "--resume", str(part), world_size=after)
    assert uses(part / "checkpoint-8") == uses(whole / "checkpoint-8")
    assert losses(part) == pytest.approx(losses(whole), rel=1e-5)


def test_another_run_starts_from_it(data, uninterrupted, tmp_path):
    given = command(data, tmp_path / "out", "--max-steps", "2", "--init-from", str(uninterrupted[0]))
    given = without_shape(given)
    code, text = finish(start(given))
    assert code == 0 and "2 active of a pool of 4" in text, text
    (directory,) = (tmp_path / "out").glob("pragnosia_*")
    assert [sum(layer) for layer in uses(directory / "checkpoint-2")] == [2 * 4] * 2


def test_another_run_may_change_the_routing(data, uninterrupted, tmp_path):
    """Away from pools, back to them, to larger ones: of the same weights."""
    origin = uninterrupted[0]
    still = ("--max-steps", "1", "--learning-rate", "0", "--local-learning-rate", "0")
    for place, (flags, said) in enumerate(
        (
            (("--routing", "token"), "2 active\n"),
            (("--routing", "step"), "2 active of a pool of 2\n"),
            (("--routing", "step", "--expert-pool", "3"), "2 active of a pool of 3\n"),
        )
    ):
        output = tmp_path / str(place)
        words = without_shape(command(data, output, *still, "--init-from", str(origin), *flags))
        code, text = finish(start(words))
        assert code == 0 and said in text, text
        (directory,) = output.glob("pragnosia_*")
        assert weights(directory / "final_model") == weights(origin / "final_model")
        assert json.loads((directory / "final_model" / "config.json").read_text())["routing"] == flags[1]
        origin = directory


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--init-from", "RUN", "--expert-pool", "7", "--routing", "step"), ("pool of 7", "--expert-pool")),
        (
            ("--init-from", "RUN", "--num-active-experts", "1", "--num-experts", "6"),
            ("--num-active-experts 1", "has 2"),
        ),
        (("--resume", "RUN", "--routing", "token", "--num-experts", "6"), ("--routing token", "has step")),
        (("--expert-pool", "3"), ("--expert-pool 3", "--routing step")),
        (("--routing", "step", "--expert-pool", "5"), ("pool of 5", "4", "--expert-pool")),
        (("--routing", "step", "--expert-pool", "1"), ("pool of 1", "2", "--expert-pool")),
        (("--routing", "step", "--export-format", "qwen3_moe"), ("--export-format", "--routing token")),
        (("--resume", "RUN", "--expert-pool", "3", "--num-experts", "6"), ("--expert-pool 3", "has 4")),
    ],
)
def test_bad_input_is_one_clear_line(data, uninterrupted, tmp_path, flags, words):
    whole, _ = uninterrupted
    output = whole.parent if "RUN" in flags else tmp_path / "out"
    flags = [str(whole) if flag == "RUN" else flag for flag in flags]
    _, text = run(data, output, "--max-steps", "2", *flags, expect=2)
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert "Traceback" not in text and "step 1/" not in text
    for word in words:
        assert word in line


def printed_by(tmp_path, *words: str, **options) -> str:
    """What a script printed."""
    done = subprocess.run(
        [python(), *words],
        env=environment(), capture_output=True, text=True, cwd=tmp_path, timeout=300, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def evaluate(directory, data, tmp_path, batch_size: str, *launcher: str) -> dict[str, float]:
    """The overall row of eval_ds.py."""
    output = tmp_path / "results.json"
    words = ["--dataset", str(data), "--output-file", str(output), "--max-samples", "12", "--device", "cpu"]
    words += ["--batch-size", batch_size, "--cache-dir", str(tmp_path / "cache"), "--max-length", "64"]
    printed = printed_by(
        tmp_path, *launcher, str(REPOSITORY / "eval_ds.py"), "--checkpoint", str(directory), *words
    )
    assert printed.count("training_choice_loss") == printed.count("choice_gap") == 1
    return json.loads(output.read_text())["results"]["overall"]


def test_evaluation(data, uninterrupted, tmp_path):
    results = {size: evaluate(uninterrupted[0], data, tmp_path, size) for size in ("1", "4")}
    # The causal loss is the same however rows come together; the training choice is not.
    assert results["1"]["loss"] == pytest.approx(results["4"]["loss"], rel=1e-6)
    assert results["1"]["training_choice_loss"] != pytest.approx(
        results["4"]["training_choice_loss"], rel=1e-6
    )
    row = results["4"]
    assert row["choice_gap"] == pytest.approx(row["loss"] - row["training_choice_loss"])


@pytest.mark.slow
def test_evaluation_on_two_ranks_chooses_together(data, uninterrupted, tmp_path):
    """2 ranks of 2 rows see what 1 rank of 4 rows sees, in both choices."""
    one = evaluate(uninterrupted[0], data, tmp_path, "4")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = evaluate(uninterrupted[0], data, tmp_path, "2", *launcher)
    assert two == pytest.approx(one, rel=1e-6, abs=2e-6)


def test_chat(uninterrupted, tmp_path):
    words = [str(REPOSITORY / "chat_ds.py"), "--checkpoint", str(uninterrupted[0]), "--device", "cpu"]
    printed = printed_by(tmp_path, *words, "--max-length", "8", input="What is 1 + 1?\nWhat is 2 + 2?\n")
    assert len(printed.splitlines()) == 2
