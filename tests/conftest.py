"""Skips tests whose hardware is missing, and says at the end what was skipped and why."""

import functools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest

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
# first waits for DeepSpeed's ops to be compiled, the other has files that need none. What reads and writes a disk
# comes last, because that op compiles for minutes, on what the tests leave of the processor.
LAST = ("test_nvme_store.py", "test_nvme_layout.py")
LONGEST = (
    "test_layouts.py",
    "test_countdown.py",
    "test_recall.py",
    "test_far_lookup.py",
    "test_expert_parallel.py",
    "test_runs.py",
    "test_streamed_runs.py",
    "test_step_routing.py",
    "test_readme.py",
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A run of all tests, without a GPU, begins to compile what the last of them need."""
    config = session.config
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    is_whole = config.args_source is config.ArgsSource.TESTPATHS and not config.option.collectonly
    if not is_controller or not is_whole or config.option.keyword or config.option.markexpr:
        return
    if gpu_count() == 0 and has_libaio():
        load = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
        subprocess.Popen(
            [sys.executable, "-c", load],
            env={**os.environ, "DS_ACCELERATOR": "cpu", "MAX_JOBS": "2"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # one that is killed leaves a lock behind, on which all later ones wait
            preexec_fn=yield_the_processor,
        )


def yield_the_processor() -> None:
    """Run on what others leave: Linux weighs sessions before the processes in them."""
    os.nice(19)
    if (session := Path("/proc/self/autogroup")).exists():
        session.write_text("19")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    places |= dict.fromkeys(LAST, len(LONGEST) + 1)
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
