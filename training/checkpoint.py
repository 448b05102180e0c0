"""Runs and checkpoints on disk: names, atomic writes, what to resume, what to load. Imports no torch by itself.

    outputs/pragnosia_<size>_<n>experts_<timestamp>/
        run.json  metrics.jsonl  loss.png  tensorboard/
        checkpoint-<step>/        also interrupted_checkpoint/ and emergency_checkpoint/
            model/                exported weights, config, tokenizer: evaluate, chat, --init-from
            state/                DeepSpeed's shards: weights, optimizer
            rank-<r>.pt           random-number state
            trainer_state.json    counters, and the size of every file above
        final_model/              as model/; unverified_model/ if its logits differ when read back
        abandoned/                what came after a checkpoint that the run went back to

A checkpoint is written under a temporary name, flushed to disk and renamed; a directory with the final name is
complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from training.config import UserError

if TYPE_CHECKING:
    import torch

STATE = "trainer_state.json"
NAMED = ("interrupted_checkpoint", "emergency_checkpoint")
_OWN_NAME = re.compile(
    r"(?P<prefix>\.tmp-|\.old-)"
    r"(?P<name>checkpoint-\d+|interrupted_checkpoint|emergency_checkpoint|final_model|universal|probe|run\.json)"
)


def write_json(path: Path, value: object) -> None:
    """Write and flush, then rename into place: a reader sees the old file or the new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def commit(temporary: Path, final: Path, trainer_state: dict) -> None:
    """Turn a fully written directory into checkpoint `final`; on rank 0, after all ranks have written."""
    files = {
        str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()
    }
    write_json(temporary / STATE, {**trainer_state, "files": files})
    publish(temporary, final)


def publish(temporary: Path, final: Path) -> None:
    """Flush a directory to disk and give it its final name, replacing what had that name."""
    for path in [temporary, *temporary.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = _aside(final)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    temporary.rename(final)
    handle = os.open(final.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    shutil.rmtree(old, ignore_errors=True)


def _aside(final: Path) -> Path:
    return final.with_name(f".old-{final.name}")


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk is full; every library says so in its own way."""
    words = ("No space left", "Disk quota", "inline_container")  # the last: torch.save
    while error is not None:
        if any(word in str(error) for word in words):
            return True
        error = error.__context__
    return False


def lock(run: Path) -> int:
    """Hold a run for this process; returns the descriptor that holds it until the process ends.

    Raises:
        UserError: another process trains in this run.
    """
    handle = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is training in {run}: stop it first, or start a new run") from None
    return handle


def tidy(run: Path) -> None:
    """Remove what a killed run left half-written, and put back what it was about to replace.

    For the process that holds the run; touches only names that this module writes.
    """
    for leftover in run.iterdir():
        half_written = _OWN_NAME.fullmatch(leftover.name)
        if half_written is None:
            continue
        final = run / half_written["name"]
        if half_written["prefix"] == ".old-" and not final.exists():
            leftover.rename(final)
        else:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def set_aside(run: Path, step: int) -> None:
    """Move what a run wrote after `step` to `abandoned/`: it goes back, and must not take up that branch again."""
    later = [path for path in checkpoints(run) if read_state(path)["step"] > step]
    if (run / "final_model").exists():
        later.append(run / "final_model")
    for path in later:
        number = 0
        while (target := run / "abandoned" / f"{path.name}{f'.{number}' if number else ''}").exists():
            number += 1
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest step first; one being replaced counts, damaged ones do not."""
    found = []
    for path in run.glob(f"*/{STATE}"):
        directory, name = path.parent, path.parent.name
        replaced = name.startswith(".old-") and not (run / name.removeprefix(".old-")).exists()
        if name.startswith(".") and not replaced:
            continue
        with contextlib.suppress(UserError):
            found.append((read_state(directory)["step"], path.stat().st_mtime, directory))
    return [directory for _, _, directory in sorted(found)]


def claim_run(new: Path, resume_from: Path | None, is_main: bool):
    """(run directory, checkpoint to go on from, lock): a new directory, or that of the resumed run; collective.

    Raises:
        UserError: it cannot be written, or belongs to another process.
    """
    import torch.distributed as dist

    box, held = [None, None], None
    dist.barrier()  # all ranks have read `resume_from`, whose name `tidy` may change
    if is_main:
        try:
            run = _new_directory(new) if resume_from is None else resume_from.absolute().parent
            held = lock(run)
            (run / ".tmp-probe").write_bytes(b"\0" * 4096)
            tidy(run)
            box[0] = str(run)
        except OSError as error:
            box[1] = f"--output-dir {new.parent}: {error.strerror}: choose one that can be written"
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1]:
        raise UserError(box[1])
    run = Path(box[0])
    if not run.is_dir():
        raise UserError(
            f"{run}, made by rank 0, is not on this machine: --output-dir must be on a shared disk"
        )
    if resume_from is not None and not resume_from.exists():  # `tidy` gave it its name back
        resume_from = run / resume_from.name.removeprefix(".old-")
    return run, resume_from, held


def _new_directory(path: Path) -> Path:
    """This one, or where another run of the same second has it, a numbered one."""
    number, name = 1, path.name
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    path.mkdir(parents=True)
    return path


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` of the `checkpoint-<step>` directories."""
    numbered = [path for path in checkpoints(run) if path.name not in NAMED]
    for path in numbered[:-keep]:
        # Renamed first: an interrupted deletion must not leave a directory that looks complete.
        doomed = path.with_name(f".tmp-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _existing(text: str, flag: str) -> Path:
    """The path, or the newest match of a glob."""
    if Path(text).exists():
        return Path(text)
    matches = sorted(map(Path, glob.glob(text)), key=lambda path: (path.stat().st_mtime, path.name))
    if not matches:
        raise UserError(f"{flag} {text}: no such run, checkpoint or match")
    return matches[-1]


def resolve_checkpoint(text: str) -> Path:
    """The checkpoint that `--resume` names: a checkpoint, the newest of a run, or the newest match of a glob.

    Raises:
        UserError: nothing there, an incomplete directory, or a file that is missing or has another size.
    """
    path = _existing(text, "--resume")
    if (path / STATE).exists():
        verify_files(path)
        return path
    found = checkpoints(path)
    for candidate in reversed(found):
        try:
            verify_files(candidate)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
        else:
            return candidate
    what = (
        "is not a directory"
        if not path.is_dir()
        else f"holds no {'whole' if found else 'complete'} checkpoint"
    )
    raise UserError(f"--resume {path} {what}: give a run, a checkpoint-<step> directory or a glob")


def read_state(checkpoint: Path) -> dict:
    """The trainer_state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        assert isinstance(state["step"], int)
        return state
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{checkpoint / STATE} cannot be read ({error}): use an earlier checkpoint") from None


def verify_files(checkpoint: Path) -> None:
    """Compare the size of every file with the one recorded when it was written."""
    for name, size in read_state(checkpoint)["files"].items():
        path = checkpoint / name
        if not path.exists():
            raise UserError(f"{path} is missing: the checkpoint is incomplete, use an earlier one")
        if path.stat().st_size != size:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes instead of {size}: it is truncated, use an earlier one"
            )


def resolve_model(text: str, flag: str = "--checkpoint") -> Path:
    """The model directory that a path, run, checkpoint or glob names.

    A run gives its final_model, else the model of its newest checkpoint; a checkpoint gives its model/.

    Raises:
        UserError: nothing there, or no model in it.
    """
    path = _existing(text, flag)
    candidates = [path, path / "final_model", path / "model"]
    if path.is_dir() and not (path / "config.json").exists():
        candidates += [checkpoint / "model" for checkpoint in reversed(checkpoints(path))]
    for candidate in candidates:
        if (candidate / "config.json").exists():
            if (candidate.parent / STATE).exists():
                verify_files(candidate.parent)
            return candidate
    raise UserError(
        f"{flag} {path} holds no model: expected config.json, a run with final_model/, or a checkpoint"
    )


def load_config(directory: Path):
    """The `PragnosiaConfig` of a model directory, ours or a Qwen3-MoE's.

    Raises:
        UserError: unreadable, or of another architecture.
    """
    from model import PragnosiaConfig

    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'config.json'} cannot be read: {error}") from None
    kind = raw.get("model_type")
    if kind == "pragnosia":
        return PragnosiaConfig.from_pretrained(directory)
    if kind != "qwen3_moe":
        raise UserError(f"{directory} is a {kind or 'nameless'} model, not a Pragnosia or Qwen3-MoE one")
    from training.export import from_qwen3_moe

    return from_qwen3_moe(directory)


def load_tokenizer_for(directory: Path, config):
    """The tokenizer saved beside a model.

    Raises:
        UserError: none there, or it has more entries than the model's vocabulary.
    """
    from data.tokenizer_asset import load_tokenizer

    tokenizer = load_tokenizer(str(directory))
    check_vocabulary(tokenizer, config, directory)
    return tokenizer


def check_vocabulary(tokenizer, config, source) -> None:
    """Refuse a tokenizer that names entries the model does not have."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {len(tokenizer)} entries, the model's vocabulary {config.vocab_size}: "
            f"use the tokenizer the model was trained with"
        )


def load_model(path: str | Path, device: str | torch.device, dtype: torch.dtype):
    """(model in eval mode, tokenizer) of a directory from `resolve_model`.

    Raises:
        UserError: another architecture, missing or truncated weights, a tokenizer that does not fit.
    """
    import torch

    from model import PragnosiaForCausalLM
    from training.weights import directory_weights, fill

    directory = Path(path)
    config = load_config(directory)
    tokenizer = load_tokenizer_for(directory, config)
    with torch.device("meta"):
        model = PragnosiaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    fill(model, directory_weights(directory))
    return model.eval(), tokenizer
