"""Prepared data, and the microbatches of each optimizer step.

Step `s` of an epoch takes the rows `order[s * G : (s + 1) * G]`, `G` being microbatch rows x accumulation x
ranks. How these G rows fall on ranks and microbatches depends on the split, which rows they are does not.
"""

from __future__ import annotations

import collections
import copy
import datetime
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from data.documents import Entry, cached_entry, make_entry, read_entry
from data.example import Example
from data.packing import EMPTY, PackedDataset, stack
from data.schema import to_example
from data.sources import Source, resolve, validation_threshold
from data.steps import checkable_problems
from data.streaming import StreamedDataset
from training.config import DataArguments, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Data", "PackedDataset", "TrainLoader", "eval_batches", "prepare", "prepare_rows"]

SCANNED = 4096
"""Rows at the start of a streamed dataset that its validation side is taken from."""
PATIENCE = datetime.timedelta(hours=12)
"""How long other ranks wait for rank 0 to tokenize."""

Batch = dict[str, torch.Tensor]
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass
class Data:
    """What a run trains and validates on.

    Attributes:
        train: rows, or a stream.
        validation: rows of each family; families without a validation side are absent.
        validation_examples: the same as text.
        report: for each dataset its family, source, licence, weight, and the numbers of rows (`rows`,
            `validation_rows`, `dropped`, `truncated`) and training `tokens` and `targets`; for JSON. With labelled
            steps also their number, `steps`.
        problems: for a model with a value head, training examples whose answers can be checked.
    """

    train: PackedDataset | StreamedDataset
    validation: dict[str, PackedDataset]
    validation_examples: dict[str, list[Example]]
    report: list[dict[str, Any]]
    problems: list[Example] = field(default_factory=list)


def prepare(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    evaluation: bool = False,
    steps: bool = False,
) -> Data:
    """Find, split, tokenize and pack the datasets `args` names, and print where each came from.

    Rank 0 tokenizes into the cache while the others wait. `seed` decides which documents share a row. With
    `evaluation` a file is taken whole as validation data, and named datasets give their validation side as
    always. `steps` adds documents with labelled steps of reasoning, for a model with a value head.

    Raises:
        UserError: on every rank, if the data cannot be had; see `sources.resolve` and
            `documents.cached_entry`.
    """
    if args.streaming and not evaluation:
        sources = _from_rank_0(lambda: resolve(args), rank, world_size)
        data = _prepare_stream(args, tokenizer, sources, seed, steps)
    else:

        def entries() -> list[tuple[Path, dict[str, Any]]]:
            return [
                (
                    cached_entry(source, tokenizer, args, evaluation, steps),
                    {"weight": source.weight, "note": source.note},
                )
                for source in resolve(args)
            ]

        found = _from_rank_0(entries, rank, world_size)
        if world_size > 1:
            # A machine that does not share rank 0's cache makes its own, by its first rank.
            absent = not all(path.is_dir() for path, _ in found)
            if absent and os.environ.get("LOCAL_RANK") == "0":
                entries()
            _from_rank_0(lambda: None, rank, world_size)
            if not all(path.is_dir() for path, _ in found):
                raise UserError(
                    "this machine found other data than rank 0's; share --cache-dir or use the same files"
                )
        loaded = []
        for path, more in found:
            entry = read_entry(path)
            loaded.append(replace(entry, report=entry.report | more))
        data = _collect(loaded, tokenizer, args, seed)
    if rank == 0:
        for line in data.report:
            print(_describe(line), flush=True)
    return data


def prepare_rows(
    rows: Iterable[Example | Mapping[str, Any]],
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    steps: bool = False,
) -> Data:
    """Data from rows given directly: `Example`s, or mappings with the columns of a known schema; `steps` as
    in `prepare`.

    Raises:
        UserError: a row that fits no schema, no rows, or none with a target.
    """
    examples = [to_example(row, dataset="rows", where=f"row {i}") for i, row in enumerate(rows, 1)]
    if not examples:
        raise UserError("the dataset has no rows")
    threshold = validation_threshold(examples, args.validation_fraction)
    train = [example for example in examples if example.split_hash() > threshold]
    validation = [example for example in examples if example.split_hash() <= threshold]
    entry = make_entry(
        "rows",
        train[: args.max_samples],
        validation[: args.max_samples],
        tokenizer,
        args,
        steps,
        source="given rows",
        licence="not stated",
        weight=1.0,
        note="",
    )
    return _collect([entry], tokenizer, args, seed)


def _collect(
    entries: list[Entry], tokenizer: PreTrainedTokenizerBase, args: DataArguments, seed: int
) -> Data:
    """Datasets joined: one training set, and one validation set for each family."""
    pad_id = tokenizer.pad_token_id
    parts = [(entry.train, entry.report["weight"]) for entry in entries if len(entry.train)]
    parts += [(entry.steps, entry.report["weight"]) for entry in entries if entry.steps is not None]
    by_family: dict[str, list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        if len(entry.validation):
            by_family[entry.validation_examples[0].family].append(entry)
    return Data(
        train=PackedDataset(parts, args.max_length, pad_id, seed),
        validation={
            family: PackedDataset(
                [(entry.validation, 1.0) for entry in members], args.max_length, pad_id, seed
            )
            for family, members in by_family.items()
        },
        validation_examples={
            family: [example for entry in members for example in entry.validation_examples]
            for family, members in by_family.items()
        },
        report=[entry.report for entry in entries],
        problems=[example for entry in entries for example in entry.problems],
    )


def _prepare_stream(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, sources: list[Source], seed: int, steps: bool
) -> Data:
    """A stream for training; validation examples are taken from the start of each source."""
    entries, streams = [], []
    for source in sources:
        start = list(itertools.islice(source.examples(streaming=True), SCANNED))
        if not start:
            raise UserError(f"dataset {source.name} has no rows")
        threshold = validation_threshold(start, args.validation_fraction)
        validation = [example for example in start if example.split_hash() <= threshold]
        entry = make_entry(
            source.name,
            [],
            validation[: args.max_samples],
            tokenizer,
            args,
            source=source.origin,
            licence=source.licence,
            weight=source.weight,
            note=source.note,
        )
        entry.report |= {"rows": None, "tokens": None, "targets": None}
        if steps:
            entry.report["steps"] = None
            entry.problems = checkable_problems([e for e in start if e.split_hash() > threshold])
        entries.append(entry)
        streams.append((source, threshold))
    # A copy, because threads tokenize the stream while others generate with the tokenizer.
    own = copy.deepcopy(tokenizer)
    stream = StreamedDataset(
        streams, own, args.max_length, args.train_on_prompt, args.max_samples, steps=steps
    )
    return replace(_collect(entries, tokenizer, args, seed), train=stream)


def _from_rank_0(make: Callable[[], Any], rank: int, world_size: int) -> Any:
    """`make()` of rank 0, on every rank; its UserError is raised on every rank. Also a barrier."""
    if world_size == 1 or not torch.distributed.is_initialized():
        return make()
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    result: list[Any] = [None]
    if rank == 0:
        try:
            result = [make()]
        except UserError as error:
            result = [error]
    torch.distributed.broadcast_object_list(result, src=0, group=group)
    torch.distributed.destroy_process_group(group)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _describe(line: dict[str, Any]) -> str:
    """One line of the report for a person."""
    size = "streamed" if line["rows"] is None else f"{line['rows']:,} rows, {line['tokens']:,} tokens"
    parts = [f"{line['source']} ({line['licence']})", size, f"{line['validation_rows']:,} validation rows"]
    parts += [f"{line['steps']:,} labelled steps"] if line.get("steps") else []
    parts += [f"{line[key]:,} {key}" for key in ("dropped", "truncated") if line[key]]
    parts += [f"weight {line['weight']:g}"] if line["weight"] != 1 else []
    parts += [line["note"]] if line["note"] else []
    return f"data: {line['family']} {line['dataset']}: {', '.join(parts)}"


class TrainLoader:
    """The microbatches of one rank, step by step.

    Args:
        dataset: rows or a stream.
        micro_batch_size: rows in a microbatch.
        accumulation: microbatches in a step.
        num_workers: threads that prepare steps ahead (0: none).

    Attributes:
        steps_per_epoch: None for a stream.

    Raises:
        UserError: there are no rows.
    """

    def __init__(
        self,
        dataset: PackedDataset | StreamedDataset,
        *,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int,
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.num_workers = num_workers
        self.rows_per_step = micro_batch_size * accumulation * world_size
        # This rank's rows of a step, one array for each microbatch.
        self.slices = np.arange(self.rows_per_step).reshape(accumulation, world_size, micro_batch_size)[
            :, rank
        ]
        self.steps_per_epoch: int | None = None
        if isinstance(dataset, PackedDataset):
            self.steps_per_epoch = math.ceil(len(dataset.epoch_rows(seed, 0)) / self.rows_per_step)
            if self.steps_per_epoch == 0:
                raise UserError("an epoch has no rows to train on; name more data or raise its weight")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The steps of an epoch from `start_step` on; each is a list of `accumulation` microbatches.

        A microbatch is a dict of int64 tensors `[micro_batch_size, max_length]` (see `PackedDataset`). The
        last step is filled with empty rows. The order depends on seed and epoch alone. A stream reads and
        tokenizes what comes before `start_step` again.
        """
        steps = self._streamed if isinstance(self.dataset, StreamedDataset) else self._mapped
        return steps(epoch, start_step)

    def _mapped(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        order = self.dataset.epoch_rows(self.seed, epoch)
        order = np.concatenate([order, np.full(-len(order) % self.rows_per_step, EMPTY)])
        steps = order.reshape(-1, self.rows_per_step)[start_step:]
        return ahead(lambda step: self._microbatches(self.dataset, step), steps, self.num_workers)

    def _streamed(self, epoch: int, start_step: int) -> Iterator[list[Batch]]:
        packed = ahead(self.dataset.packed, self.dataset.chunks(self.seed, epoch), self.num_workers)
        rows = (
            (chunk, index)
            for number, chunk in enumerate(packed)
            for index in np.random.default_rng([self.seed, epoch, number]).permutation(len(chunk))
        )
        for step in itertools.count():
            members = list(itertools.islice(rows, self.rows_per_step))
            if not members and step == 0:
                raise UserError("no row of the streamed datasets has a target token; check the answers")
            if not members:
                return
            if step >= start_step:
                members += [(members[0][0], EMPTY)] * (self.rows_per_step - len(members))
                yield [
                    stack([members[i][0][members[i][1]] for i in microbatch]) for microbatch in self.slices
                ]

    def _microbatches(self, dataset: PackedDataset, step: np.ndarray) -> list[Batch]:
        return [stack([dataset[row] for row in step[microbatch]]) for microbatch in self.slices]


def ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map(function, items)` in order, up to `threads` results computed ahead by as many threads."""
    if threads == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    pending: collections.deque = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def eval_batches(
    dataset: PackedDataset, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's batches of all rows in order, as many on every rank; empty rows fill the last ones."""
    rows = np.arange(len(dataset))
    rows = np.concatenate([rows, np.full(-len(rows) % (batch_size * world_size), EMPTY)])
    for batch in rows.reshape(-1, world_size, batch_size)[:, rank]:
        yield stack([dataset[row] for row in batch])
