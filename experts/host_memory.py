"""Host memory of exactly the size asked for, page-locked where possible: expert banks, offloaded state.

`torch`'s page-locked allocations are rounded up to a power of two, which would take 121 GB for 72, and kept when
they are no longer needed. Here the pages are mapped by hand and registered with CUDA, so that copies run at the
speed of the bus and beside computation.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Mapping(mmap.mmap):
    """Zeroed private pages, registered with CUDA until the last tensor over them is gone."""

    address: int = 0

    def lock(self) -> bool:
        """Page-lock the mapping; False where the system refuses (a memlock limit, a container)."""
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        if int(torch.cuda.cudart().cudaHostRegister(self.address, len(self), 0)) != 0:
            self.address = 0
            with contextlib.suppress(RuntimeError):  # the refusal waits to be raised by the next kernel
                torch.ones(1, device="cuda").add_(1)
        return self.address != 0

    def __del__(self):
        if self.address:
            with contextlib.suppress(Exception):  # the interpreter may be half gone
                torch.cuda.synchronize()  # copies from and to it may still be under way
                torch.cuda.cudart().cudaHostUnregister(self.address)


def return_free_memory() -> None:
    """Give the system back what the C library keeps of freed memory, in an arena for each thread."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


_warned = False


def host_array(shape: tuple[int, ...], dtype: torch.dtype, lock: bool) -> Tensor:
    """A zeroed host tensor of exactly its size, page-locked if `lock` and possible (said once if not)."""
    global _warned
    size = math.prod(shape) * dtype.itemsize
    mapping = Mapping(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child process that is forked must not make the parent's locked pages copy-on-write.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):  # hints that a kernel may lack
            mapping.madvise(getattr(mmap, advice))
    if lock and not mapping.lock() and not _warned and os.environ.get("RANK", "0") == "0":
        _warned = True
        print(
            "host memory cannot be page-locked, so copies will be slower: raise `ulimit -l` (memlock)",
            file=sys.stderr,
            flush=True,
        )
    return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape)).view(shape)


def locked_copy(tensor: Tensor) -> Tensor:
    """A copy of a host tensor in page-locked memory of exactly its size, which goes back to the system with it."""
    if not tensor.numel():
        return tensor.clone()
    # No view: one would keep the memory when DeepSpeed gives it other `data`.
    return host_array(tuple(tensor.shape), tensor.dtype, lock=True).copy_(tensor.detach()).data


def available_bytes() -> int:
    """Host memory that can still be taken: what the system has, or what the control group leaves."""
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]))  # cached files give way
    return free


def resident_bytes() -> int:
    """Host memory that this process has now."""
    import psutil

    return psutil.Process().memory_info().rss


@contextlib.contextmanager
def near(device: torch.device) -> Iterator[None]:
    """Memory touched first in here lies on the GPU's NUMA node, where the system says which that is."""
    before = None
    if device.type == "cuda":
        with contextlib.suppress(OSError, ValueError, AttributeError):
            gpu = torch.cuda.get_device_properties(device)
            address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
            node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
            cpus = parse_cpus(Path(f"/sys/devices/system/node/node{node}/cpulist").read_text())
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cpus & before or before)
    try:
        yield
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


def parse_cpus(text: str) -> set[int]:
    """`0-3,8` to {0, 1, 2, 3, 8}. Raises ValueError."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
