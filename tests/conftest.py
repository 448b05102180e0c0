"""Skips tests whose hardware is missing, and says at the end what was skipped and why."""

import functools
import os
from collections import Counter

import hypothesis
import pytest

# Files run side by side, a worker a core: further threads of PyTorch would spin, waiting for cores that are taken.
os.environ.setdefault("OMP_NUM_THREADS", "1")
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")

GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}


@functools.cache
def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


@functools.cache
def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)


# A file runs in one worker: those that take minutes come first, so that no worker ends alone with one. While the
# first waits for DeepSpeed's ops to be compiled, the other has files that need none.
LONGEST = (
    "test_nvme_layout.py",
    "test_countdown.py",
    "test_layouts.py",
    "test_recall.py",
    "test_far_lookup.py",
    "test_expert_parallel.py",
    "test_runs.py",
    "test_streamed_runs.py",
    "test_step_routing.py",
    "test_readme.py",
    "test_value_head_runs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    for item in items:
        needed = max(
            (count for marker, count in GPUS_NEEDED.items() if item.get_closest_marker(marker)), default=0
        )
        if needed and gpu_count() < needed:
            reason = "needs a CUDA GPU" if needed == 1 else f"needs {needed} CUDA GPUs"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("libaio") and not has_libaio():
            item.add_marker(pytest.mark.skip(reason="offload to NVMe needs libaio"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason, before pytest's closing line."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped")
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
