"""Datasets larger than memory: read, shuffled in a buffer, tokenized and packed as they are needed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.documents import tokenize
from data.example import Example
from data.packing import PackedDataset
from data.readers import size_of
from data.sources import Source
from data.steps import step_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUFFER = 4096
"""Examples in the shuffle buffer: what an epoch's order is random over, and all that is held in memory."""
CHUNK = 512
"""Examples tokenized and packed together."""


@dataclass
class StreamedDataset:
    """The training side of sources that are read as a stream.

    The order is a pure function of seed and epoch: a run resumes by reading the epoch again up to its place.

    Attributes:
        sources: sources with the highest `split_hash` of their validation side.
        steps: whether rows with labelled steps of reasoning follow those of a chunk.
    """

    sources: list[tuple[Source, int]]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    train_on_prompt: bool
    max_samples: int | None
    steps: bool = False

    @property
    def pad_id(self) -> int:
        """The padding token."""
        return self.tokenizer.pad_token_id

    def chunks(self, seed: int, epoch: int) -> Iterator[list[Example]]:
        """The epoch's examples in their order, `CHUNK` at a time."""
        rng = random.Random(f"{seed}/{epoch}")
        examples = shuffled(self._mixed(rng), BUFFER, rng)
        while chunk := list(itertools.islice(examples, CHUNK)):
            yield chunk

    def packed(self, chunk: list[Example]) -> PackedDataset:
        """A chunk as rows."""
        documents = tokenize(chunk, self.tokenizer, self.max_length, self.train_on_prompt)
        parts = [(documents, 1.0)]
        if self.steps:
            parts.append((step_documents(chunk, self.tokenizer, self.max_length), 1.0))
        return PackedDataset(parts, self.max_length, self.pad_id)

    def _mixed(self, rng: random.Random) -> Iterator[Example]:
        """All sources, each drawn in proportion to its size times its weight so that they end together."""
        streams = [self._train(source, threshold, rng) for source, threshold in self.sources]
        shares = [_size(source) * source.weight for source, _ in self.sources]
        while streams:
            chosen = rng.choices(range(len(streams)), shares)[0]
            example = next(streams[chosen], None)
            if example is None:
                del streams[chosen], shares[chosen]
            else:
                yield example

    def _train(self, source: Source, threshold: int, rng: random.Random) -> Iterator[Example]:
        """A source's training examples as often as its weight says."""
        for turn in range(int(source.weight) + 1):
            share = min(1.0, source.weight - turn)
            if share > 0:
                examples = (e for e in source.examples(streaming=True) if e.split_hash() > threshold)
                for example in itertools.islice(examples, self.max_samples):
                    if share == 1 or rng.random() < share:
                        yield example


def shuffled(examples: Iterator[Example], size: int, rng: random.Random) -> Iterator[Example]:
    """The same examples in another order, with at most `size` of them held at a time."""
    buffer = list(itertools.islice(examples, size))
    rng.shuffle(buffer)
    for example in examples:
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = example
    yield from buffer


def _size(source: Source) -> float:
    """What a source's share of the stream is measured by: bytes where they are known."""
    if source.kind != "path" or source.location.endswith(".py"):
        return 1e6
    return float(size_of(Path(source.location)))
