"""The ring of slots: GPU buffers through which pages of experts pass, in an order announced beforehand.

Uploads run on a stream of their own, ahead of the computation as far as free slots allow; what a page has become
is downloaded on a third stream, and its slot is free again when that is done. On a CPU the same calls copy at
once, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from experts.store import BankStore, Page


@dataclass(eq=False)
class Slot:
    """Device buffers for one page: `buffers[quantity]` is [R, entries of a row on this rank].

    `weight_RP` are whole rows: this rank's part of them, or all ranks' parts gathered. `parts` are slots for light
    pages in the same memory, of which forward, in need of no state, fills several; `whole` is the slot that a part
    belongs to. The upload of `page` ends with the event `uploaded`; the next one waits for all of `free`.
    """

    buffers: dict[str, Tensor]
    weight_RP: Tensor
    whole: Slot | None = None
    parts: list[Slot] = field(default_factory=list)
    page: Page | None = None
    uploaded: torch.cuda.Event | None = None
    free: tuple[torch.cuda.Event | None, ...] = ()


def make_slot(size: int, store: BankStore, device: torch.device) -> Slot:
    """A slot for R = `size` experts, in one piece of memory; the longest rows first: all are aligned."""
    kept = sorted(store.kept.items(), key=lambda quantity: -quantity[1][1])
    room = [size * count * dtype.itemsize for _, (dtype, count) in kept]
    memory = torch.empty(sum(room), dtype=torch.uint8, device=device)
    places = zip(kept, memory.split(room), strict=True)
    buffers = {name: place.view(dtype).view(size, count) for (name, (dtype, count)), place in places}
    weight_RP = buffers["weight"]
    if store.layout.ranks > 1:  # its parts would each need room to gather into
        return Slot(buffers, weight_RP.new_empty(size, store.layout.row_size))
    slot = Slot(buffers, weight_RP)
    for place in memory.unfold(0, weight_RP.nbytes, weight_RP.nbytes):
        rows_RP = place.view(weight_RP.dtype).view_as(weight_RP)
        slot.parts.append(Slot({"weight": rows_RP}, rows_RP, slot))
    return slot


def gather_rows(part_RP: Tensor, whole_RP: Tensor, group: dist.ProcessGroup) -> None:
    """All ranks' slices [R, P / W] of the rows, side by side in `whole_RP` [R, P]."""
    gathered_WRP = part_RP.new_empty(whole_RP.shape[1] // part_RP.shape[1], *part_RP.shape)
    dist.all_gather_into_tensor(gathered_WRP.flatten(0, 1), part_RP, group=group)
    whole_RP.unflatten(1, (len(gathered_WRP), -1)).copy_(gathered_WRP.transpose(0, 1))


class SlotRing:
    """Pages are taken in the order in which they were announced, and released in the order they were taken."""

    def __init__(self, stores: list[BankStore], slots: list[Slot], group: dist.ProcessGroup | None):
        """`group`: the ranks that each have a part of every page (None: this one has all)."""
        assert len(slots) >= 2
        self.stores, self.idle, self.group = stores, deque(slots), group
        self.device = slots[0].weight_RP.device
        self.on_gpu = self.device.type == "cuda"
        streams = [torch.cuda.Stream(self.device) for _ in range(2)] if self.on_gpu else [None, None]
        self.upload, self.download, self.compute = *streams, None
        self.idle_parts: deque[Slot] = deque()
        self.announced: deque[Page] = deque()
        self.travelling: deque[Slot] = deque()  # on their way or there, and not taken
        self.written: dict[tuple[int, int], torch.cuda.Event] = {}  # when an expert last reached its store

    def announce(self, pages: Sequence[Page]) -> None:
        """Take these pages next, on this stream. What was announced before is forgotten, unless it begins so."""
        self.compute = torch.cuda.current_stream(self.device) if self.on_gpu else None
        if pages and not self.is_next(pages[0]):
            self.cancel()
            for page in pages:
                self.stores[page.layer].expect(page)
            self.announced.extend(pages)
            self._advance()

    def is_next(self, page: Page) -> bool:
        """Whether this page is the one to be taken next."""
        return page == (self.travelling[0].page if self.travelling else next(iter(self.announced), None))

    def take(self, page: Page) -> Slot:
        """The slot that holds the page; computation waits for its upload."""
        self._advance()
        assert self.is_next(page), "pages are taken in the announced order"
        found_room = bool(self.travelling) or self._upload()  # not ready, but needed now
        assert found_room, "fewer pages are held than there are slots"
        slot = self.travelling.popleft()
        self._wait(self.compute, slot.uploaded)
        return slot

    def release(self, slot: Slot, changed: Iterable[str] = ()) -> None:
        """The computation that reads the slot has been launched; `changed` quantities go back to the store."""
        slot.free = (self._mark(self.compute),)
        if changed:
            page, store = slot.page, self.stores[slot.page.layer]
            self._wait(self.download, *slot.free)
            with self._on(self.download):
                for here, name, host in store.receive(page, changed):
                    host.copy_(slot.buffers[name][here], non_blocking=True)
            done = self._mark(self.download)
            store.received(page, done)
            self.written |= dict.fromkeys(((page.layer, expert) for expert in page.experts), done)
            slot.free = (done,)
        (self.idle if slot.whole is None else self.idle_parts).append(slot)
        self._advance()

    def cancel(self) -> None:
        """Forget every page that was announced and not taken."""
        for page in self.announced:
            self.stores[page.layer].forget(page)
        self.announced.clear()
        while self.travelling:
            slot = self.travelling.popleft()
            slot.free = (slot.uploaded,)
            (self.idle if slot.whole is None else self.idle_parts).append(slot)

    def synchronize(self) -> None:
        """Wait until the stores hold what was released."""
        if self.on_gpu:
            self.download.synchronize()
        for store in self.stores:
            store.synchronize()

    def _advance(self) -> None:
        """Start uploads as far as there are idle slots and pages at hand. Several ranks wait for a page that is
        not: an upload ends in a collective, to which all must come at the same place."""
        while self.announced:
            page = self.announced[0]
            if (self.group is None and not self.stores[page.layer].is_ready(page)) or not self._upload():
                return

    def _room(self, page: Page) -> Slot | None:
        """An idle slot, or a part of one for a light page; None where there is none.

        Parts are handed out and come back in the order of the pages, so those of one slot come back together.
        """
        if page.is_light and not self.idle_parts and self.idle and self.idle[0].parts:
            slot = self.idle.popleft()
            for part in slot.parts:
                part.free = slot.free
            self.idle_parts.extend(slot.parts)
        if page.is_light and self.idle_parts:
            return self.idle_parts.popleft()
        if self.idle:
            return self.idle.popleft()
        for slot in dict.fromkeys(part.whole for part in self.idle_parts):
            if all(part in self.idle_parts for part in slot.parts):
                self.idle_parts = deque(part for part in self.idle_parts if part.whole is not slot)
                slot.free = tuple(event for part in slot.parts for event in part.free)
                return slot
        return None

    def _upload(self) -> bool:
        """Bring the next page to a slot, which may still be read or downloaded; False where none is idle."""
        slot = self._room(self.announced[0])
        if slot is None:
            return False
        slot.page = page = self.announced.popleft()
        store = self.stores[page.layer]
        written = {self.written.get((page.layer, expert)) for expert in page.experts}
        self._wait(self.upload, *slot.free, *written)
        with self._on(self.upload):
            for here, name, host in store.fetch(page):
                slot.buffers[name][here].copy_(host, non_blocking=True)
            store.fetched(page, self._mark(self.upload))
            if self.group is not None:
                rows = slice(len(page.experts))
                gather_rows(slot.buffers["weight"][rows], slot.weight_RP[rows], self.group)
        slot.uploaded = self._mark(self.upload)
        self.travelling.append(slot)
        return True

    @contextmanager
    def _on(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """What is launched goes to this stream (None: a CPU); `torch.cuda.stream` would look up the one before."""
        try:
            torch.cuda.set_stream(stream)
            yield
        finally:
            torch.cuda.set_stream(self.compute)

    def _mark(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """The end of a stream's work so far; on a CPU streams and events are None."""
        return stream.record_event() if self.on_gpu else None

    def _wait(self, stream: torch.cuda.Stream | None, *events: torch.cuda.Event | None) -> None:
        for event in filter(None, events):
            stream.wait_event(event)
