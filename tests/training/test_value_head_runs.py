"""Runs that train a value head: what they log, the same after a resume, on any ranks, and what they refuse."""

import json
import shutil

import pytest

from .runs import run, weights, write_rows

SPLIT = ("--batch-size", "2", "--gradient-accumulation-steps", "2")
HEAD = ("--use-tree-of-thoughts", "--value-refresh", "3")


def rows_of(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 24)  # few, so few answers are drawn


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Six steps, saved after the fourth: own answers come at the third and would come at the sixth."""
    flags = ("--max-steps", "6", "--save-steps", "4", "--eval-steps", "100", *SPLIT, *HEAD)
    return run(data, tmp_path_factory.mktemp("whole"), *flags)


@pytest.mark.slow
def test_the_head_is_trained_logged_and_exported(whole):
    from training.checkpoint import load_config
    from training.weights import directory_weights

    directory, printed = whole
    assert "labelled steps" in printed
    logged = [row for row in rows_of(directory) if "loss" in row]
    assert logged[0]["tree/value_loss"] == pytest.approx(0.693, abs=1e-3)  # every value is a half
    assert all(0 <= row["tree/value_accuracy"] <= 1 for row in logged)
    assert load_config(directory / "final_model").tree["beam_width"] == 4
    weight = directory_weights(directory / "final_model")("value_head.out_proj.weight", (1, 32), None)
    assert weight.abs().max() > 1e-4
    assert (directory / "checkpoint-4" / "own_answers.npz").exists()


@pytest.mark.slow
def test_a_resumed_run_sees_the_same_answers(whole, data, tmp_path):
    directory, _ = whole
    copied = tmp_path / directory.name
    shutil.copytree(
        directory, copied, ignore=shutil.ignore_patterns("final_model", "checkpoint-6", "loss.png")
    )
    run(data, tmp_path, "--max-steps", "6", "--resume", str(copied), *SPLIT, *HEAD)
    assert weights(copied / "final_model") == weights(directory / "final_model")


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["resident", "zero3"])
def test_two_ranks_learn_the_same(whole, data, tmp_path, placement):
    """Their own answers are drawn together, in the middle of training, and fall on the same places."""
    flags = ("--max-steps", "5", "--save-strategy", "no", "--placement", placement, *HEAD)
    directory, _ = run(data, tmp_path, *flags, world_size=2)
    pairs = zip(rows_of(whole[0]), rows_of(directory), strict=False)
    for one, two in [(one, two) for one, two in pairs if "loss" in one][:4]:
        for name in ("loss", "tree/value_loss", "tree/value_accuracy", "tokens"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)


@pytest.mark.slow
def test_one_line_for_data_without_steps_and_for_answers_without_a_head(data, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"prompt": f"Say {n}", "answer": str(n)}) + "\n" for n in range(20)))
    _, printed = run(chats, tmp_path, "--use-tree-of-thoughts", expect=2)
    assert printed.splitlines()[-1].startswith(
        "error: --use-tree-of-thoughts: the data has no labelled steps"
    )
    _, printed = run(data, tmp_path, "--value-refresh", "5", expect=2)
    assert printed.splitlines()[-1].startswith("error: --value-refresh needs a value head")
