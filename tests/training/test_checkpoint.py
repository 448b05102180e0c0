"""What is on disk: atomic replacement, leftovers of killed runs, choice of a checkpoint."""

import json
import os

import pytest

from training import checkpoint as disk
from training.config import UserError


def make(run, name, step, content=b"weights"):
    """A complete checkpoint, written as a run writes it."""
    temporary = run / f".tmp-{name}"
    (temporary / "model").mkdir(parents=True)
    (temporary / "model" / "config.json").write_bytes(b"{}")
    (temporary / "weights").write_bytes(content)
    disk.commit(temporary, run / name, {"step": step})
    return run / name


def test_a_checkpoint_replaces_one_of_the_same_name(tmp_path):
    make(tmp_path, "interrupted_checkpoint", 1)
    make(tmp_path, "interrupted_checkpoint", 2, b"newer")
    assert (tmp_path / "interrupted_checkpoint" / "weights").read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["interrupted_checkpoint"]


def test_killed_between_the_two_renames_nothing_is_lost(tmp_path):
    make(tmp_path, "checkpoint-1", 1)
    make(tmp_path, "interrupted_checkpoint", 2).rename(tmp_path / ".old-interrupted_checkpoint")
    (tmp_path / ".tmp-interrupted_checkpoint").mkdir()
    assert disk.resolve_checkpoint(str(tmp_path)) == tmp_path / ".old-interrupted_checkpoint"
    disk.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "interrupted_checkpoint"}


def test_looking_for_a_checkpoint_touches_nothing(tmp_path):
    names = {".old-proj", ".old-keep", ".tmp-work", "proj", ".tmp-checkpoint-7"}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    with pytest.raises(UserError, match="no complete checkpoint"):
        disk.resolve_checkpoint(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == names


def test_tidy_touches_only_names_of_runs(tmp_path):
    for name in (".old-proj", ".tmp-work", ".tmp-checkpoint-x", ".tmp-checkpoint-7", ".tmp-final_model"):
        (tmp_path / name).mkdir()
    disk.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".old-proj", ".tmp-work", ".tmp-checkpoint-x"}


def test_a_run_is_held_by_one_process(tmp_path):
    handle = disk.lock(tmp_path)
    with pytest.raises(UserError, match="another process"):
        disk.lock(tmp_path)
    os.close(handle)
    os.close(disk.lock(tmp_path))


def test_the_newest_whole_checkpoint_of_a_run_is_taken(tmp_path, capsys):
    make(tmp_path, "checkpoint-9", 9)
    make(tmp_path, "checkpoint-10", 10)
    assert disk.resolve_checkpoint(str(tmp_path)).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"w")
    assert disk.resolve_checkpoint(str(tmp_path)).name == "checkpoint-9"
    assert "truncated" in capsys.readouterr().err
    (tmp_path / "checkpoint-9" / disk.STATE).write_text('{"step": 9, "fi')
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        disk.resolve_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        disk.resolve_checkpoint(str(tmp_path / "checkpoint-9"))


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in (2, 10, 9):
        make(tmp_path, f"checkpoint-{step}", step)
    make(tmp_path, "emergency_checkpoint", 1)
    disk.prune(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-9",
        "checkpoint-10",
        "emergency_checkpoint",
    }


def test_a_model_is_found_in_a_run_a_checkpoint_and_a_glob(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    make(run, "checkpoint-1", 1)
    assert disk.resolve_model(str(run)) == run / "checkpoint-1" / "model"
    assert disk.resolve_model(str(tmp_path / "r*")) == run / "checkpoint-1" / "model"
    (run / "final_model").mkdir()
    (run / "final_model" / "config.json").write_text("{}")
    assert disk.resolve_model(str(run)) == run / "final_model"
    assert disk.resolve_model(str(run / "checkpoint-1")) == run / "checkpoint-1" / "model"
    with pytest.raises(UserError, match="no such run"):
        disk.resolve_model(str(tmp_path / "nothing*"))


def test_json_is_replaced_whole(tmp_path):
    disk.write_json(tmp_path / "a.json", {"a": 1})
    disk.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
