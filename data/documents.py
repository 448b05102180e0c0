"""Tokenized documents, and their cache on disk.

A cache entry is a directory named by a hash of everything its content depends on: the rows, the tokenizer,
the settings and the code of this package. It is written under another name and renamed, so an entry is whole
or absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.example import Example
from data.prompts import IGNORED, encode_all
from data.sources import Source, split_examples
from training.config import DataArguments, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000
"""Examples tokenized at once."""
ARRAYS = ("tokens", "targets", "offsets", "values")
"""The arrays of `Documents`; the last may be absent."""


@dataclass
class Documents:
    """Documents one after another, each at most `max_length` tokens with at least one target or value.

    Attributes:
        tokens: uint32, all documents joined.
        targets: bool, which tokens are targets.
        offsets: int64, where each document starts, and the end.
        examples: examples they come from; a long plain text gives several documents.
        dropped: examples without a target, left out.
        truncated: examples cut to `max_length`.
        target_bytes: UTF-8 bytes of the targets' text.
        values: int8, 1 or 0 at the end of a right or a wrong step, else -100; None where nobody asked for them
            (see `data/steps.py`).
    """

    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    examples: int = 0
    dropped: int = 0
    truncated: int = 0
    target_bytes: int = 0
    values: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self.offsets)


def tokenize(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on_prompt: bool = False,
) -> Documents:
    """The examples' documents in their order. Texts are split at `max_length`, all else is cut off there."""
    made = Documents()
    tokens, targets, lengths = [], [], []
    examples = iter(examples)
    while chunk := list(itertools.islice(examples, CHUNK)):
        target_ids: list[list[int]] = []
        for example, (input_ids, labels) in zip(
            chunk, encode_all(chunk, tokenizer, train_on_prompt), strict=True
        ):
            is_text = example.prompt_format == "text"
            made.truncated += len(input_ids) > max_length and not is_text
            kept = False
            for start in range(0, len(input_ids) if is_text else 1, max_length):
                ids, mask = input_ids[start : start + max_length], labels[start : start + max_length]
                is_target = np.array([label != IGNORED for label in mask], bool)
                is_target[:1] = False
                if is_target.any():
                    kept = True
                    tokens.append(np.array(ids, np.uint32))
                    targets.append(is_target)
                    lengths.append(len(ids))
                    target_ids.append(tokens[-1][is_target].tolist())
            made.examples += kept
            made.dropped += not kept
        texts = tokenizer.batch_decode(
            target_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        made.target_bytes += sum(len(text.encode("utf-8", "replace")) for text in texts)
    if tokens:
        made.tokens, made.targets = np.concatenate(tokens), np.concatenate(targets)
        made.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return made


@dataclass
class Entry:
    """A dataset ready to pack: its documents, its validation examples as text, and its line in the report.

    steps, problems: for a model with a value head, training examples with labelled steps, and some of those whose
    answers can be checked; else None and none.
    """

    train: Documents
    validation: Documents
    validation_examples: list[Example]
    report: dict[str, Any]
    steps: Documents | None = None
    problems: list[Example] = field(default_factory=list)


def make_entry(
    name: str,
    train: list[Example],
    validation: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    steps: bool = False,
    **report: Any,
) -> Entry:
    """Tokenizes both sides of a dataset, and the training side once more with labelled `steps`.

    Raises:
        UserError: every row was dropped.
    """
    documents = [
        tokenize(examples, tokenizer, args.max_length, args.train_on_prompt)
        for examples in (train, validation)
    ]
    dropped = sum(side.dropped for side in documents)
    if not (documents[0] if train else documents[1]).examples and (train or validation):
        raise UserError(
            f"dataset {name}: none of its {dropped} rows has a target token within {args.max_length} tokens; "
            "check the answers, or raise --max-length"
        )
    families = sorted({example.family for example in train + validation})
    labelled, problems = None, []
    if steps:
        from data.steps import checkable_problems, step_documents  # it builds on this module

        labelled, problems = step_documents(train, tokenizer, args.max_length), checkable_problems(train)
        report["steps"] = int((labelled.values != IGNORED).sum())
    return Entry(
        *documents,
        steps=labelled,
        problems=problems,
        validation_examples=validation,
        report={
            "dataset": name,
            "family": ",".join(families),
            **report,
            "rows": documents[0].examples,
            "validation_rows": documents[1].examples,
            "dropped": dropped,
            "truncated": sum(side.truncated for side in documents),
            "tokens": int(documents[0].offsets[-1]),
            "targets": int(documents[0].targets.sum()),
        },
    )


def cache_dir(args: DataArguments) -> Path:
    """Where entries are kept: `--cache-dir`, else `pragnosia` in the user's cache directory."""
    if args.cache_dir:
        return Path(args.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pragnosia"


def entry_key(
    source: Source, tokenizer: PreTrainedTokenizerBase, args: DataArguments, evaluation: bool, steps: bool
) -> str:
    """The hash that names a source's entry."""
    backend = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else repr(sorted(tokenizer.get_vocab().items()))
    )
    described = dataclasses.asdict(source) | {"weight": None, "note": None}
    settings = (args.max_length, args.max_samples, args.train_on_prompt, args.validation_fraction, evaluation)
    settings += (steps,)
    parts = [source.fingerprint(), backend, tokenizer.chat_template, tokenizer.eos_token, described, settings]
    parts += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cached_entry(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    evaluation: bool = False,
    steps: bool = False,
) -> Path:
    """The cache directory of a source's entry, which is made if it is not there.

    Raises:
        UserError: the data is faulty, or the cache cannot be written.
    """
    directory = cache_dir(args) / entry_key(source, tokenizer, args, evaluation, steps)
    if directory.is_dir():
        return directory
    train, validation = split_examples(source, args, evaluation)
    entry = make_entry(
        source.name, train, validation, tokenizer, args, steps, source=source.origin, licence=source.licence
    )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".unfinished-") as unfinished:
            write_entry(entry, Path(unfinished) / "entry")
            try:
                os.rename(Path(unfinished) / "entry", directory)
            except OSError:
                if not directory.is_dir():  # another process finished the same entry first
                    raise
    except OSError as error:
        raise UserError(
            f"cannot write the token cache {directory.parent} ({error.strerror}); set --cache-dir"
        ) from error
    return directory


def write_entry(entry: Entry, directory: Path) -> None:
    """Write an entry to a directory that is not there yet."""
    for name in ("train", "validation", *(["steps"] if entry.steps is not None else [])):
        side = getattr(entry, name)
        (directory / name).mkdir(parents=True)
        for array in ARRAYS if side.values is not None else ARRAYS[:-1]:
            np.save(directory / name / f"{array}.npy", getattr(side, array))
        counts = {key: getattr(side, key) for key in ("examples", "dropped", "truncated", "target_bytes")}
        (directory / name / "counts.json").write_text(json.dumps(counts))
    for name, examples in (("validation", entry.validation_examples), ("problems", entry.problems)):
        rows = [json.dumps(dataclasses.asdict(example)) + "\n" for example in examples]
        (directory / f"{name}.jsonl").write_text("".join(rows))
    (directory / "report.json").write_text(json.dumps(entry.report))


def read_entry(directory: Path) -> Entry:
    """An entry with its arrays mapped from disk, not read into memory."""
    sides = {}
    for name in ("train", "validation", "steps"):
        if (directory / name).is_dir():
            files = {array: directory / name / f"{array}.npy" for array in ARRAYS}
            arrays = {array: np.load(file, mmap_mode="r") for array, file in files.items() if file.exists()}
            sides[name] = Documents(**arrays, **json.loads((directory / name / "counts.json").read_text()))
    examples = {
        name: [Example(**json.loads(row)) for row in (directory / f"{name}.jsonl").read_text().splitlines()]
        for name in ("validation", "problems")
    }
    return Entry(
        **sides,
        validation_examples=examples["validation"],
        problems=examples["problems"],
        report=json.loads((directory / "report.json").read_text()),
    )
