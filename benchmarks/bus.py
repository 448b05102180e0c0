"""What the bus between host and GPU can carry, and how long a step's bytes take at best."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from torch import Tensor

from experts.host_memory import host_array, near


def measure_bus(device: torch.device, nbytes: int = 256_000_000, copies: int = 10) -> dict[str, float]:
    """GB/s of page-locked copies of `nbytes`: up and down alone, and each way when both run at once.

    On a CPU, of copies in memory.
    """
    on_gpu = device.type == "cuda"
    with near(device):
        host = [host_array((nbytes,), torch.uint8, lock=on_gpu).fill_(1) for _ in range(2)]
    here = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    up, down = (here[0], host[0]), (host[1], here[1])

    def rate(*ways: tuple[Tensor, Tensor]) -> float:
        streams = [torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext() for _ in ways]
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            for _ in range(copies):
                for (to, source), stream in zip(ways, streams, strict=True):
                    with stream:
                        to.copy_(source, non_blocking=True)
            if on_gpu:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
        return copies * nbytes / seconds / 1e9

    return {"bus_up_gb_s": rate(up), "bus_down_gb_s": rate(down), "bus_both_gb_s": rate(up, down)}


def bus_seconds(up_gb: float, down_gb: float, bus: dict[str, float]) -> tuple[float, float]:
    """The least time to carry both, as if each way had the bus for itself, and at the rates of a shared bus.

    In the second the smaller load goes at the rate of both ways at once, and what is left of the larger alone.
    """
    alone = max(up_gb / bus["bus_up_gb_s"], down_gb / bus["bus_down_gb_s"])
    rest, rate = up_gb - down_gb, bus["bus_up_gb_s"]
    if rest < 0:
        rest, rate = -rest, bus["bus_down_gb_s"]
    return alone, min(up_gb, down_gb) / bus["bus_both_gb_s"] + rest / rate
