"""The ring of slots: GPU buffers through which pages of experts pass, in an order announced beforehand.

Uploads run on a stream of their own, ahead of the computation as far as free slots allow; what a page has become
is downloaded on a third stream, and its slot is free again when that is done. On a CPU the same calls copy at
once, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from experts.store import BankStore, Page


class Slot:
    """Device buffers for one page: `buffers[quantity]` is [R, entries of a row on this rank].

    `weight_RP` are whole rows: this rank's part of them, or all ranks' parts gathered. `parts` are slots for light
    pages in the same memory, which forward, in need of no state, fills with several pages at once; `whole` is the
    slot that a part belongs to. An upload ends with the event `uploaded`; the next one waits for all of `free`.
    """

    def __init__(self, buffers: dict[str, Tensor], weight_RP: Tensor, whole: Slot | None = None):
        self.buffers, self.weight_RP, self.whole = buffers, weight_RP, whole
        self.parts: list[Slot] = []
        self.uploaded: torch.cuda.Event | None = None
        self.free: tuple[torch.cuda.Event | None, ...] = ()


def make_slot(size: int, store: BankStore, device: torch.device) -> Slot:
    """A slot for R = `size` experts."""
    buffers = {
        name: torch.empty(size, count, dtype=dtype, device=device)
        for name, (dtype, count) in store.entries.items()
    }
    weight_RP = buffers["weight"]
    if store.layout.ranks > 1:  # its parts would each need room to gather into
        return Slot(buffers, weight_RP.new_empty(size, store.layout.row_size))
    slot = Slot(buffers, weight_RP)
    needed = weight_RP.nbytes
    for buffer in buffers.values():
        count = buffer.nbytes // needed if needed % 16 == 0 else int(buffer is weight_RP)  # products want 16
        memory = buffer.view(-1).view(torch.uint8)
        for first in range(0, count * needed, needed):
            rows_RP = memory[first : first + needed].view(weight_RP.dtype).view_as(weight_RP)
            slot.parts.append(Slot({"weight": rows_RP}, rows_RP, slot))
    return slot


def gather_rows(part_RP: Tensor, whole_RP: Tensor, rows: int, group: dist.ProcessGroup) -> None:
    """All ranks' slices [rows, P / W] of the first rows, side by side in `whole_RP` [rows, P]."""
    ranks = whole_RP.shape[1] // part_RP.shape[1]
    gathered_WRP = part_RP.new_empty(ranks, rows, part_RP.shape[1])
    dist.all_gather_into_tensor(gathered_WRP.flatten(0, 1), part_RP[:rows], group=group)
    whole_RP[:rows].unflatten(1, (ranks, -1)).copy_(gathered_WRP.transpose(0, 1))


class SlotRing:
    """Pages are taken in the order in which they were announced, and released in the order they were taken."""

    def __init__(
        self,
        stores: list[BankStore],
        num_slots: int,
        page_size: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ):
        assert num_slots >= 2
        self.stores, self.device, self.group = stores, device, group
        self.on_gpu = device.type == "cuda"
        self.upload = torch.cuda.Stream(device) if self.on_gpu else None
        self.download = torch.cuda.Stream(device) if self.on_gpu else None
        self.idle = deque(make_slot(page_size, stores[0], device) for _ in range(num_slots))
        self.idle_parts: deque[Slot] = deque()
        self.announced: deque[Page] = deque()
        self.travelling: deque[tuple[Page, Slot]] = deque()
        self.written: dict[tuple[int, int], torch.cuda.Event] = {}  # when an expert last reached its store

    def announce(self, pages: Iterable[Page]) -> None:
        """Pages that will be taken after those announced before."""
        for page in pages:
            self.stores[page.layer].expect(page)
            self.announced.append(page)
        self._advance()

    def is_next(self, page: Page) -> bool:
        """Whether this page is the one to be taken next."""
        if self.travelling:
            return self.travelling[0][0] == page
        return bool(self.announced) and self.announced[0] == page

    def take(self, page: Page) -> Slot:
        """The slot that holds the page; computation waits for its upload."""
        self._advance()
        assert self.is_next(page), "pages are taken in the announced order"
        if not self.travelling:  # not ready, but needed now
            slot = self._room(page)
            assert slot is not None, "fewer pages are held than there are slots"
            self._upload(slot)
        _, slot = self.travelling.popleft()
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(slot.uploaded)
        return slot

    def release(self, page: Page, slot: Slot, changed: Iterable[str] = ()) -> None:
        """The computation that reads the slot has been launched; `changed` quantities go back to the store."""
        slot.free = (self._mark(None),)
        if changed:
            self._wait(self.download, *slot.free)
            store = self.stores[page.layer]
            with self._on(self.download):
                for here, name, host in store.receive(page, changed):
                    host.copy_(slot.buffers[name][here], non_blocking=True)
            done = self._mark(self.download)
            store.received(page, done)
            self.written |= dict.fromkeys(((page.layer, expert) for expert in page.experts), done)
            slot.free = (done,)
        self._return(slot)
        self._advance()

    def cancel(self) -> None:
        """Forget every page that was announced and not taken."""
        for page in self.announced:
            self.stores[page.layer].forget(page)
        self.announced.clear()
        while self.travelling:
            _, slot = self.travelling.popleft()
            slot.free = (slot.uploaded,)
            self._return(slot)

    def synchronize(self) -> None:
        """Wait until the stores hold what was released."""
        if self.on_gpu:
            self.download.synchronize()
        for store in self.stores:
            store.synchronize()

    def _advance(self) -> None:
        """Start uploads, as far as there are idle slots and pages at hand.

        With several ranks a page that is not at hand is waited for: an upload ends in a collective, and all ranks
        must come to it at the same place.
        """
        while self.announced:
            page = self.announced[0]
            if self.group is None and not self.stores[page.layer].is_ready(page):
                return
            slot = self._room(page)
            if slot is None:
                return
            self._upload(slot)

    def _room(self, page: Page) -> Slot | None:
        """An idle slot, or a part of one for a light page; None where there is none.

        Parts are handed out and come back in the order of the pages, so those of one slot come back together.
        """
        if page.is_light and (self.idle_parts or (self.idle and self.idle[0].parts)):
            if not self.idle_parts:
                slot = self.idle.popleft()
                for part in slot.parts:
                    part.free = slot.free
                    self.idle_parts.append(part)
            return self.idle_parts.popleft()
        if self.idle:
            return self.idle.popleft()
        for slot in dict.fromkeys(part.whole for part in self.idle_parts):
            if all(part in self.idle_parts for part in slot.parts):
                self.idle_parts = deque(part for part in self.idle_parts if part.whole is not slot)
                slot.free = tuple(event for part in slot.parts for event in part.free)
                return slot
        return None

    def _return(self, slot: Slot) -> None:
        (self.idle if slot.whole is None else self.idle_parts).append(slot)

    def _upload(self, slot: Slot) -> None:
        """Bring the next page to a slot, which may still be read or downloaded when we ask."""
        page = self.announced.popleft()
        store = self.stores[page.layer]
        self._wait(self.upload, *slot.free)
        for event in {self.written.get((page.layer, expert)) for expert in page.experts}:
            self._wait(self.upload, event)
        with self._on(self.upload):
            for here, name, host in store.fetch(page):
                slot.buffers[name][here].copy_(host, non_blocking=True)
            store.fetched(page, self._mark(self.upload))
            if self.group is not None:
                gather_rows(slot.buffers["weight"], slot.weight_RP, len(page.experts), self.group)
        slot.uploaded = self._mark(self.upload)
        self.travelling.append((page, slot))

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager:
        return torch.cuda.stream(stream) if self.on_gpu else nullcontext()

    def _mark(self, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """An event at the end of a stream's work so far (None: the current stream)."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def _wait(self, stream: torch.cuda.Stream | None, *events: torch.cuda.Event | None) -> None:
        for event in events:
            if event is not None:
                stream.wait_event(event)
