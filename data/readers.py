"""Rows of a file, a folder or the hub, each with the place it stands in."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from training.config import UserError

Rows = Iterator[tuple[str, Any]]
"""Pairs of a place (`file:line`) and a row."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".py")


def read_path(path: Path, split: str = "train") -> Rows:
    """Rows of a local dataset, read as it is iterated.

    Args:
        path: a `.jsonl`, `.json` (a list), `.parquet` or `.py` file, or a folder saved by `datasets`.
        split: which split of a folder that holds several; other paths have only `train`.

    Raises:
        UserError: the path is missing, empty, truncated or of another kind.
    """
    if not path.exists():
        raise UserError(f"dataset {path} does not exist")
    if path.is_dir():
        return _saved(path, split)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _json_lines,
        ".json": _json_list,
        ".parquet": _parquet,
        ".py": _python,
    }
    if path.suffix not in readers:
        raise UserError(
            f"dataset {path}: cannot read {path.suffix or 'this'} files, only {', '.join(SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise UserError(f"dataset {path} is empty")
    return readers[path.suffix](path) if split == "train" else iter(())


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                cut = "the file is cut off here" if not line.endswith(b"\n") else f"not JSON ({error.msg})"
                raise UserError(f"{where}: {cut}; every line must be one JSON object") from error


def _json_list(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON or cut off ({error}); one object a line belongs in a .jsonl file"
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of objects, not {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error).splitlines()[0]})") from error


def _saved(path: Path, split: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # arrow, json and datasets each have errors of their own here
        raise UserError(
            f"{path}: damaged, or no folder written by save_to_disk ({str(error).splitlines()[0]})"
        ) from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            if split == "train":
                raise UserError(
                    f"{path}: no split 'train', only {', '.join(dataset)}; give the split's own folder"
                )
            return iter(())
        dataset = dataset[split]
    elif split != "train":
        return iter(())
    return ((f"{path}: row {number}", row) for number, row in enumerate(dataset, 1))


def _python(path: Path) -> Rows:
    scope: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
        if "examples" not in scope:
            raise UserError(f"{path}: must define a function examples() that yields rows")
        for number, row in enumerate(scope["examples"](), 1):
            yield f"{path}: example {number}", row
    except UserError:
        raise
    except Exception as error:  # the file is the user's own code
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise UserError(f"{place}: {type(error).__name__}: {error}") from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: Path) -> Iterable[Path]:
    """The file itself, or the files of a folder in a fixed order."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
