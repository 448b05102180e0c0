"""The bank of one layer in host memory: weights and optimizer state, one contiguous array a quantity.

An expert is one row: its gate, up and down projections laid end to end, padded so that every rank holds an equal
number of whole blocks of it. Rank r keeps slice r of every row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from experts.host_memory import host_array
from kernels.adamw import BLOCK

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class RowLayout:
    """Where the `values` of an expert lie in a padded row of `row_size`, of which a rank has `slice_size`."""

    def __init__(self, expert_width: int, hidden_size: int, rank: int = 0, ranks: int = 1):
        self.expert_width, self.hidden_size, self.rank, self.ranks = expert_width, hidden_size, rank, ranks
        self.values = 3 * expert_width * hidden_size
        self.slice_size = -(-self.values // (BLOCK * ranks)) * BLOCK
        self.row_size = self.slice_size * ranks

    def weights(self, rows_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Views of whole rows: gate above up [R, 2 F, D], and down [R, D, F]."""
        width, size = self.expert_width, self.hidden_size
        gate_up, down = rows_RP[:, : 2 * width * size], rows_RP[:, 2 * width * size : self.values]
        return gate_up.view(-1, 2 * width, size), down.view(-1, size, width)

    def own(self, projections: dict[str, Tensor]) -> Tensor:
        """What this rank's slice begins with, of the weights [R, F, D] or [R, D, F] of each projection."""
        rows_RP = torch.cat([projections[name].flatten(1) for name in PROJECTIONS], dim=1)
        return rows_RP[:, self.rank * self.slice_size :][:, : self.slice_size]


Quantities = dict[str, tuple[torch.dtype, int]]
"""What is kept of an expert on one rank: name -> (dtype, entries of a row)."""


def quantities(state: str, dtype: torch.dtype, size: int) -> Quantities:
    """`size` weights of `dtype` and their optimizer state, which is fp32, bf16 or int8."""
    kept = {"weight": (dtype, size), "updates": (torch.int32, 1)}
    if state == "int8":
        kept |= {"exp_avg": (torch.int8, size), "exp_avg_sq": (torch.uint8, size)}
        return kept | dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), (torch.float32, size // BLOCK))
    moment = {"fp32": torch.float32, "bf16": torch.bfloat16}[state]
    kept |= {"exp_avg": (moment, size), "exp_avg_sq": (moment, size)}
    return kept | ({"master": (torch.float32, size)} if state == "fp32" and dtype != torch.float32 else {})


def accumulator(state: str, size: int) -> Quantities:
    """Where gradients of several microbatches are added up; not part of a checkpoint."""
    return {"accumulator": (torch.float32 if state == "fp32" else torch.bfloat16, size)}


@dataclass(frozen=True)
class Page:
    """Experts of one layer that travel together, ascending, and which quantities of them do."""

    layer: int
    experts: tuple[int, ...]
    quantities: tuple[str, ...]
    is_light: bool = False
    """Only read, and of nothing but its weights: it needs a part of a slot."""


Transfer = tuple[slice, str, Tensor]
"""Rows of a slot, a quantity, and where in host memory it comes from or goes to: one copy."""


@lru_cache(4096)
def runs(experts: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Consecutive experts as (rows of the slot, rows of the store): each is one copy."""
    found = groupby(enumerate(experts), lambda place: place[1] - place[0])
    rows_of = ((ahead, [row for row, _ in run]) for ahead, run in found)
    return [(slice(r[0], r[-1] + 1), slice(r[0] + ahead, r[-1] + ahead + 1)) for ahead, r in rows_of]


class BankStore:
    """One layer's experts: `arrays[quantity]` is [E, entries of a row on this rank]."""

    def __init__(self, num_experts: int, layout: RowLayout, kept: Quantities, lock: bool):
        self.num_experts, self.layout, self.kept = num_experts, layout, kept
        self.arrays = {n: host_array((num_experts, size), dtype, lock) for n, (dtype, size) in kept.items()}

    # What the ring asks of a store. These rows are always at hand; a store on a disk has to fetch them.

    def expect(self, page: Page) -> None:
        """The page will be fetched, after those expected before."""

    def is_ready(self, page: Page) -> bool:
        """Whether `fetch` will not have to wait."""
        return True

    def fetch(self, page: Page) -> Iterator[Transfer]:
        """Copies that bring an expected page to its slot."""
        return self.receive(page, page.quantities)  # between the same places

    def fetched(self, page: Page, event: torch.cuda.Event | None) -> None:
        """Those copies are done when `event` is (None: now)."""

    def forget(self, page: Page) -> None:
        """An expected page will not be fetched."""

    def receive(self, page: Page, changed: Iterable[str]) -> Iterator[Transfer]:
        """Copies that bring the changed quantities of a page back."""
        return ((to, name, self.arrays[name][at]) for name in changed for to, at in runs(page.experts))

    def received(self, page: Page, event: torch.cuda.Event | None) -> None:
        """Those copies are done when `event` is (None: now)."""

    def synchronize(self) -> None:
        """Wait until what was received is stored."""

    # Weights and state as a whole.

    def write(self, first: int, projections: dict[str, Tensor]) -> None:
        """Set the weights of some experts, values [R, F, D] or [R, D, F], from expert `first` on."""
        own = self.layout.own(projections)
        for name in {"weight", "master"} & self.kept.keys():
            self.arrays[name][first : first + len(own), : own.shape[1]] = own

    def rows(self) -> dict[str, Tensor]:
        """Every quantity [E, entries] that a checkpoint has; to be changed in place and given to `set_rows`."""
        return {name: array for name, array in self.arrays.items() if name != "accumulator"}

    def set_rows(self, rows: dict[str, Tensor]) -> None:
        """Keep what `rows` gave and the caller changed."""

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write every quantity to one safetensors file, straight from where it lies."""
        save_file(self.rows(), path, metadata=metadata)

    def load(self, paths: list[Path]) -> dict[str, str]:
        """Read what the ranks of an earlier run saved, this rank's slice of it; returns the metadata."""
        rows = self.rows()
        for part, path in enumerate(paths):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    saved, width = file.get_slice(name), rows[name].shape[1]
                    saved_width = saved.get_shape()[1]
                    # Each rank has all of the updates, and its slice of the rest.
                    place = 0 if name == "updates" else part * saved_width - self.layout.rank * width
                    start, stop = max(place, 0), min(place + saved_width, width)
                    if start < stop:
                        rows[name][:, start:stop] = saved[:, start - place : stop - place]
                metadata = file.metadata()
        self.set_rows(rows)
        return metadata
