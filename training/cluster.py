"""GPUs, machines and networks that a run can be planned for. Imports no torch.

Rates are bytes/s each way. Data sheets count both ways of NVLink and PCIe; here stands half of that. A program
sees a share of such a rate: of NVLink and PCIe as it was measured on NVIDIA H200 machines, of the rest as assumed.
"""

import re
from dataclasses import dataclass

from training.config import Checked, UserError, option

MACHINE = 8  # GPUs

NVLINK_SHARE = 0.55  # measured on two H200: all-gather 211-252 GiB/s, all-to-all 235-305, of 450 GB/s
PCIE_SHARE = {
    1: 0.78,
    2: 0.61,
}  # measured, both ways at once: 50 GB/s on one H200, 39 on each of two, of 64 GB/s
PEER_SHARE = 0.5  # assumed: of PCIe, between GPUs of a machine without NVLink
NETWORK_SHARE = 0.8  # assumed
LATENCY = 35e-6  # seconds a collective; from the same all-to-all at 8 MiB, 123 GiB/s


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. flops: dense bf16 FLOP/s, fp32 sums. nvlink (0: none) and pcie: bytes/s each way."""

    memory: float
    flops: float
    nvlink: float
    pcie: float
    source: str


A100 = "NVIDIA A100 data sheet (1758950): 312 TFLOP/s, NVLink 600 GB/s, PCIe 4 64 GB/s, both ways"
HOPPER = "1,979 TFLOP/s with sparsity, which is twice the dense, NVLink 900 GB/s, PCIe 5 128 GB/s, both ways"
GPUS = {
    "a100-40": Gpu(40e9, 312e12, 300e9, 32e9, f"{A100}; SXM, 40 GB"),
    "a100-80": Gpu(80e9, 312e12, 300e9, 32e9, f"{A100}; SXM, 80 GB"),
    "h100": Gpu(80e9, 989e12, 450e9, 64e9, f"NVIDIA H100 data sheet: SXM, 80 GB, {HOPPER}"),
    "h200": Gpu(141e9, 989e12, 450e9, 64e9, f"NVIDIA H200 data sheet: SXM, 141 GB, {HOPPER}"),
    "l4": Gpu(24e9, 121e12, 0, 32e9, "NVIDIA L4 data sheet: 24 GB, 242 TFLOP/s with sparsity, PCIe 4 64 GB/s"),
    "l40s": Gpu(48e9, 362e12, 0, 32e9, "NVIDIA L40S data sheet: 48 GB, 362 TFLOP/s, PCIe 4 64 GB/s"),
    "rtx-3090": Gpu(
        24e9, 71e12, 0, 32e9,
        "NVIDIA Ampere GA102 white paper: 24 GB, 71 TFLOP/s with fp32 sums, PCIe 4; a bridge joins two cards only",
    ),
    "rtx-4090": Gpu(
        24e9, 165.2e12, 0, 32e9, "NVIDIA Ada white paper: 24 GB, 165.2 TFLOP/s with fp32 sums, PCIe 4"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """`gpus` in machines of MACHINE (fewer: one machine); network: bytes/s each way of a machine, 0 for none."""

    gpu: Gpu
    gpus: int
    network: float = 0.0

    @property
    def machines(self) -> int:
        """How many."""
        return -(-self.gpus // MACHINE)

    @property
    def gpus_here(self) -> int:
        """GPUs of a machine."""
        return min(self.gpus, MACHINE)

    @property
    def peer_rate(self) -> float:
        """bytes/s each way between the GPUs of a machine."""
        return NVLINK_SHARE * self.gpu.nvlink or PEER_SHARE * self.gpu.pcie

    @property
    def network_rate(self) -> float:
        """bytes/s each way between machines, of a machine."""
        return NETWORK_SHARE * self.network

    @property
    def pcie_rate(self) -> float:
        """bytes/s each way between a GPU and the host, both ways and all GPUs at once."""
        return PCIE_SHARE[min(self.gpus_here, 2)] * self.gpu.pcie


def parse_interconnect(text: str) -> float:
    """bytes/s of `200Gb` (bit/s), or of `8x200Gb` for eight adapters. Raises UserError."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+(?:\.\d+)?)Gb", text)
    if match and float(match[2]):
        return int(match[1] or 1) * float(match[2]) * 1e9 / 8
    number = re.search(r"(?:[1-9]\d*x)?[1-9]\d*(?:\.\d+)?", text)
    raise UserError(
        f"--interconnect {text}: expected gigabits a second of a machine, as 200Gb or 8x200Gb: "
        f"did you mean {number[0] if number else 200}Gb?"
    )


@dataclass
class ClusterArguments(Checked):
    """What --plan plans for."""

    gpus: int = option(8, "GPUs to plan for, in machines of 8", minimum=1)
    gpu: str = option("a100-80", "kind of GPU to plan for", choices=tuple(GPUS))
    interconnect: str | None = option(
        None, "network of a machine to plan for, each way, e.g. 200Gb (bit/s) or 8x200Gb (eight adapters)"
    )

    def check(self) -> None:
        if self.gpus > MACHINE and self.gpus % MACHINE:
            down = self.gpus // MACHINE * MACHINE
            raise UserError(f"--gpus {self.gpus}: machines have {MACHINE}, so use {down} or {down + MACHINE}")
        if self.gpus > MACHINE and self.interconnect is None:
            raise UserError(
                f"--gpus {self.gpus} are {self.gpus // MACHINE} machines: --interconnect says what joins them, "
                "e.g. 200Gb"
            )
        if self.interconnect is not None:
            parse_interconnect(self.interconnect)
            if self.gpus <= MACHINE:
                raise UserError(
                    f"--interconnect {self.interconnect}: {self.gpus} GPUs are one machine: leave it out, or give "
                    "more --gpus"
                )

    @property
    def cluster(self) -> Cluster:
        """The same with its figures."""
        network = parse_interconnect(self.interconnect) if self.interconnect else 0.0
        return Cluster(GPUS[self.gpu], self.gpus, network)
