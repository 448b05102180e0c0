"""The bank of one layer in a file, read and written with DeepSpeed's asynchronous I/O.

A file has a record for each expert: its quantities one after the other, weights first, so that forward reads
them alone. Records pass through a few page-locked buffers that all layers share. One thread reads the pages that
were announced, another writes those that were changed, and no expert is read before its last write is done.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor

from experts.host_memory import host_array
from experts.store import BankStore, Page, Quantities, RowLayout, Transfer
from kernels import deepspeed_ops  # noqa: F401

DIRECTORY = "pragnosia-experts-"
ALIGNMENT = 4096  # of offsets and lengths, for direct I/O
BLOCK_BYTES, QUEUE_DEPTH = 1 << 20, 32


def record_places(kept: Quantities) -> tuple[dict[str, slice], int]:
    """Where each quantity lies in a record, and the length of a record, in bytes; all start at an ALIGNMENT."""
    places, end = {}, 0
    for name, (dtype, count) in kept.items():
        places[name] = slice(end, end + count * dtype.itemsize)
        end = -(-places[name].stop // ALIGNMENT) * ALIGNMENT
    return places, end


def leftovers(path: str) -> list[Path]:
    """Directories of processes that were killed."""
    return [
        old
        for old in Path(path).glob(f"{DIRECTORY}*")
        if not Path("/proc", old.name.removeprefix(DIRECTORY).split("-")[0]).exists()
    ]


def removable_bytes(path: str) -> int:
    """What the disk gains when the next `Disk` removes the leftovers that are this user's."""
    found = 0
    for old in leftovers(path):
        with contextlib.suppress(OSError):  # another's, or removed meanwhile
            if old.stat().st_uid == os.getuid():
                found += sum(512 * file.stat().st_blocks for file in old.iterdir())
    return found


class Worker(threading.Thread):
    """Runs what it is given, in order, until it is told to stop."""

    def __init__(self):
        super().__init__(daemon=True)
        self.work, self.stopping = queue.SimpleQueue(), False
        self.start()

    def submit(self, function: Callable, *inputs: object) -> Future:
        """A future of function(*inputs)."""
        future = Future()
        self.work.put((future, function, inputs))
        return future

    def run(self) -> None:
        while not self.stopping:
            future, function, inputs = self.work.get()
            if not self.stopping and future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*inputs))
                except Exception as error:
                    future.set_exception(error)


class Disk:
    """For the files of all layers: a directory in `path`, threads, and twice `num_buffers` buffers of a page.

    The directory goes when the process ends; one that a killed process left is removed by the next.
    """

    def __init__(self, path: str, kept: Quantities, page_size: int, num_buffers: int, lock: bool):
        from deepspeed.ops.op_builder import AsyncIOBuilder

        for old in leftovers(path):
            shutil.rmtree(old, ignore_errors=True)
        self.directory = tempfile.TemporaryDirectory(prefix=f"{DIRECTORY}{os.getpid()}-", dir=path)
        _, record = record_places(kept)
        library = AsyncIOBuilder().load(verbose=False)
        read, write = (library.aio_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, 1) for _ in range(2))
        self.read_file, self.write_file = read.sync_pread, write.sync_pwrite
        self.reader, self.writer, self.waiter = Worker(), Worker(), Worker()
        # Two sets of buffers: pages that were read and wait for a slot must not keep a write from its buffer.
        self.read_buffers, self.write_buffers = queue.SimpleQueue(), queue.SimpleQueue()
        for buffers in (self.read_buffers, self.write_buffers):
            for _ in range(num_buffers):
                buffers.put(host_array((page_size, record), torch.uint8, lock))
        atexit.register(self.close)

    def close(self) -> None:
        """End the threads, with whatever they still wait for, and remove the files."""
        for worker in (self.reader, self.writer, self.waiter):
            worker.stopping = True
            worker.submit(lambda: None)
        self.read_buffers.put(torch.empty(0))  # the reader may wait for one
        for worker in (self.reader, self.writer, self.waiter):
            worker.join(timeout=30)
        self.directory.cleanup()


class NvmeStore(BankStore):
    """One layer's experts in a file."""

    def __init__(self, num_experts: int, layout: RowLayout, kept: Quantities, disk: Disk, layer: int):
        """Raises OSError where the disk has no room for the file."""
        self.num_experts, self.layout, self.kept = num_experts, layout, kept
        self.places, self.record = record_places(kept)
        self.disk, self.path = disk, os.path.join(disk.directory.name, f"layer-{layer:03}")
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(handle, 0, num_experts * self.record)  # zeros; a full disk is found here
        finally:
            os.close(handle)
        self.reads: dict[Page, Future[Tensor]] = {}
        self.received_into: dict[Page, tuple[Tensor, tuple[str, ...]]] = {}
        self.writes: dict[int, Future[None]] = {}  # the last of each expert

    def expect(self, page: Page) -> None:
        assert page not in self.reads
        self.reads[page] = self.disk.reader.submit(self._read, page)

    def is_ready(self, page: Page) -> bool:
        return self.reads[page].done()

    def fetch(self, page: Page) -> Iterator[Transfer]:
        return self._views(self.reads[page].result(), page, page.quantities)

    def fetched(self, page: Page, event: torch.cuda.Event | None) -> None:
        buffer = self.reads.pop(page).result()
        self.disk.waiter.submit(recycle, buffer, event, self.disk.read_buffers)

    def forget(self, page: Page) -> None:
        read = self.reads.pop(page)
        if not read.cancel():
            read.add_done_callback(lambda read: self.disk.read_buffers.put(read.result()))

    def receive(self, page: Page, changed: Iterable[str]) -> Iterator[Transfer]:
        buffer, changed = self.disk.write_buffers.get(), tuple(changed)
        self.received_into[page] = buffer, changed
        return self._views(buffer, page, changed)

    def received(self, page: Page, event: torch.cuda.Event | None) -> None:
        buffer, changed = self.received_into.pop(page)
        write = self.disk.writer.submit(self._write, buffer, page, changed, event)
        self.writes |= dict.fromkeys(page.experts, write)

    def synchronize(self) -> None:
        for write in set(self.writes.values()):
            write.result()
        self.writes.clear()

    def write(self, first: int, projections: dict[str, Tensor]) -> None:
        own = self.layout.own(projections)
        buffer = torch.zeros(len(own), self.record, dtype=torch.uint8)
        for name in {"weight", "master"} & self.kept.keys():
            self._view(buffer, name)[:, : own.shape[1]] = own
        self._store(buffer, range(first, first + len(own)), tuple(self.places))

    def rows(self) -> dict[str, Tensor]:
        names = [name for name in self.places if name != "accumulator"]
        buffer = torch.empty(self.num_experts, self.record, dtype=torch.uint8)
        self._transfer(self.disk.read_file, buffer, range(self.num_experts), names)
        return {name: self._view(buffer, name).contiguous() for name in names}

    def set_rows(self, rows: dict[str, Tensor]) -> None:
        buffer = torch.zeros(self.num_experts, self.record, dtype=torch.uint8)
        for name, array in rows.items():
            self._view(buffer, name)[:] = array
        self._store(buffer, range(self.num_experts), tuple(rows))

    def _store(self, buffer: Tensor, experts: range, names: tuple[str, ...]) -> None:
        """Write records now. On the writer's thread, for DeepSpeed's first write may hang beside another."""
        self.disk.writer.submit(self._transfer, self.disk.write_file, buffer, experts, names).result()

    def _view(self, buffer: Tensor, name: str) -> Tensor:
        """[rows of the buffer, entries] of a quantity."""
        return buffer[:, self.places[name]].view(self.kept[name][0])

    def _views(self, buffer: Tensor, page: Page, names: Iterable[str]) -> Iterator[Transfer]:
        """Row by row, for a copy from or to rows that are apart would go through a buffer of its own."""
        for name in names:
            view = self._view(buffer, name)
            for row in range(len(page.experts)):
                yield slice(row, row + 1), name, view[row : row + 1]

    def _read(self, page: Page) -> Tensor:
        """On the reader's thread."""
        buffer = self.disk.read_buffers.get()
        for expert in page.experts:
            if expert in self.writes:
                self.writes[expert].result()
        try:
            self._transfer(self.disk.read_file, buffer, page.experts, page.quantities)
        except OSError:
            self.disk.read_buffers.put(buffer)
            raise
        return buffer

    def _write(self, buffer: Tensor, page: Page, changed: tuple[str, ...], event) -> None:
        """On the writer's thread."""
        if event is not None:
            event.synchronize()
        try:
            self._transfer(self.disk.write_file, buffer, page.experts, changed)
        finally:
            self.disk.write_buffers.put(buffer)

    def _transfer(self, operation, buffer: Tensor, experts: Iterable[int], names: Iterable[str]) -> None:
        """Read or write the named quantities of some experts' records, those next to each other at once.

        Raises OSError where the disk fails.
        """
        ranges: list[list[int]] = []
        for place in sorted((self.places[name] for name in names), key=lambda place: place.start):
            stop = -(-place.stop // ALIGNMENT) * ALIGNMENT
            if ranges and ranges[-1][1] == place.start:
                ranges[-1][1] = stop
            else:
                ranges.append([place.start, stop])
        for row, expert in enumerate(experts):
            for start, stop in ranges:
                if operation(buffer[row, start:stop], self.path, expert * self.record + start) < 0:
                    raise OSError(f"{self.path}: expert {expert} could not be read or written")


def recycle(buffer: Tensor, event: torch.cuda.Event | None, buffers: queue.SimpleQueue) -> None:
    """Give a buffer back when the copies from it are done."""
    if event is not None:
        event.synchronize()
    buffers.put(buffer)
