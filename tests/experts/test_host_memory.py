"""Host memory of exactly the size asked for, released with its tensor, and the CPUs near a GPU."""

import gc
import os
import subprocess
import sys

import psutil
import pytest
import torch
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.host_memory import Mapping, available_bytes, host_array, locked_copy, near, parse_cpus

MEGABYTE = 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32])
def test_zeros_of_any_shape(dtype):
    array = host_array((3, 7, 5), dtype, lock=False)
    assert array.shape == (3, 7, 5) and array.dtype == dtype and not array.any()
    assert array.untyped_storage().nbytes() == 105 * dtype.itemsize
    array.fill_(3)
    assert array.float().sum() == 315


SIZES = """
import gc, psutil, torch
from experts.host_memory import host_array

def say():  # bytes of the mapping around `middle`: reserved, and in memory
    found = (0, 0)
    for area in psutil.Process().memory_maps(grouped=False):
        first, last = (int(end, 16) for end in area.addr.split("-"))
        if first <= middle < last:
            found = (last - first, area.rss)
    print(*found)

array = host_array((65, 1 << 20), torch.uint8, lock=False)
middle = array[32].data_ptr()
say()
array.fill_(1)
say()
view = array[1:]
del array
gc.collect()
say()
assert view[0, 0] == 1
del view
gc.collect()
say()
"""


def test_takes_its_size_and_gives_it_back():
    """65 MB, which a power of two would make 128; in a process of its own, where nothing lies beside it."""
    done = subprocess.run([sys.executable, "-c", SIZES], capture_output=True, text=True, check=True)
    empty, written, viewed, gone = (
        tuple(int(size) / MEGABYTE for size in line.split()) for line in done.stdout.splitlines()
    )
    assert 65 <= empty[0] < 70 and empty[1] < 5, "pages are taken when they are first written"
    assert 65 <= written[1] < 70
    assert viewed == written, "a view keeps the memory"
    assert gone == (0, 0)


@given(st.sets(st.integers(0, 300), min_size=1), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_lists_of_cpus(cpus, random):
    """As the kernel writes them: ranges and single numbers with commas between, and a new line."""
    ordered, parts, start = sorted(cpus), [], 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i] != ordered[i - 1] + 1 or random.random() < 0.2:
            first, last = ordered[start], ordered[i - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = i
    assert parse_cpus(",".join(parts) + "\n") == cpus


@pytest.mark.parametrize("text", ["", "\n", "a", "-", "1,,2"])
def test_what_is_no_list_of_cpus(text):
    with pytest.raises(ValueError):
        parse_cpus(text)


DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_process_keeps_its_cpus(device):
    before = os.sched_getaffinity(0)
    with near(device):
        assert os.sched_getaffinity(0) <= before
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), near(device):
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before


def test_available_memory():
    assert 0 < available_bytes() <= psutil.virtual_memory().total


@pytest.mark.gpu
def test_page_locked_until_the_tensor_is_gone():
    array = host_array((3, MEGABYTE), torch.float32, lock=True)
    address, size = array.data_ptr(), array.nbytes
    assert array.is_pinned() and array[1].is_pinned()
    device = torch.empty_like(array, device="cuda")
    device.copy_(array, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(device.cpu(), array)
    del array
    gc.collect()
    # The same place can be mapped and registered anew: a registration left behind would refuse it.
    again = [host_array((3, MEGABYTE), torch.float32, lock=True) for _ in range(4)]
    assert all(other.is_pinned() and other.nbytes == size for other in again), address


@pytest.mark.gpu
def test_a_copy_is_exactly_as_large():
    """3 MB and 4 bytes, without the history of what was copied."""
    tensor = torch.randn(3 * MEGABYTE // 4 + 1, requires_grad=True)
    copy = locked_copy(tensor)
    assert torch.equal(copy, tensor) and copy.is_leaf and not copy.requires_grad
    assert copy.is_pinned() and copy.untyped_storage().nbytes() == 3 * MEGABYTE + 4


def test_deepspeed_pins_through_the_hook(monkeypatch):
    """That `start_ranks` sets; torch's own would be taken without a word if DeepSpeed named it otherwise."""
    accelerator = CUDA_Accelerator()
    monkeypatch.setattr(Mapping, "lock", lambda mapping: True)  # there may be no GPU
    monkeypatch.setattr(accelerator, "_torch_pin_memory", locked_copy, raising=True)
    for size in (0, 5):
        assert torch.equal(accelerator.pin_memory(torch.ones(size)), torch.ones(size))
    gc.collect()
    before = sum(len(mapping) for mapping in live_mappings())
    kept = accelerator.pin_memory(torch.ones(MEGABYTE))
    assert sum(len(mapping) for mapping in live_mappings()) - before == kept.nbytes


@pytest.mark.gpu
def test_ranks_on_a_gpu_set_it():
    code = (
        "import gc, torch\nfrom training.engine import start_ranks\nfrom experts.host_memory import Mapping\n"
        "from deepspeed.accelerator import get_accelerator\nstart_ranks('cuda')\n"
        "kept = get_accelerator().pin_memory(torch.ones(1 << 20))\n"
        "assert kept.is_pinned() and sum(isinstance(thing, Mapping) for thing in gc.get_objects()) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_copy_does_not_outlive_its_data(monkeypatch):
    """DeepSpeed moves what it has pinned to one flat array, by giving the tensor other data."""
    monkeypatch.setattr(Mapping, "lock", lambda mapping: True)  # there may be no GPU
    copy, mappings = locked_copy(torch.ones(MEGABYTE)), lambda: sum(len(m) for m in live_mappings())
    before = mappings()
    copy.data = torch.ones(1)
    gc.collect()
    assert before - mappings() == 4 * MEGABYTE


def live_mappings() -> list[Mapping]:
    return [thing for thing in gc.get_objects() if isinstance(thing, Mapping)]


@pytest.mark.gpu
def test_memory_that_cannot_be_locked_is_said_once():
    """A limit of 0 bytes; root may ignore it, and then memory is locked."""
    code = (
        "import resource, torch\nfrom experts.host_memory import host_array\n"
        "torch.cuda.init()\nresource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "arrays = [host_array((1 << 20,), torch.float32, lock=True) for _ in range(3)]\n"
        "assert torch.ones(3, device='cuda').sum() == 3  # a refusal must not be raised by what comes after it\n"
        "print(sum(array.is_pinned() for array in arrays), all((array == 0).all() for array in arrays))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pinned, zero = done.stdout.split()
    assert zero == "True" and pinned in ("0", "3")
    assert done.stderr.count("cannot be page-locked") == (pinned == "0")
