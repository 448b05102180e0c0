"""Experts on a disk: the same results to the bit as in memory, whatever lies where; needs libaio."""

import os
import subprocess
import sys

import pytest
import torch

from experts.nvme_store import ALIGNMENT, DIRECTORY, record_places
from experts.store import RowLayout, accumulator, quantities
from tests.experts.test_streamed import LAYERS, Streamed, batch, forward, train


@pytest.mark.libaio
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("disk_layers", [1, LAYERS])
def test_equal_to_the_store_in_memory_to_the_bit(tmp_path, disk_layers, state, accumulation):
    settings = {"state": state, "accumulate": accumulation > 1}
    memory = Streamed(dtype=torch.bfloat16, **settings)
    disk = Streamed(dtype=torch.bfloat16, disk_layers=disk_layers, nvme_path=str(tmp_path), **settings)
    found = train(disk, accumulation=accumulation, dtype=torch.bfloat16)
    expected = train(memory, accumulation=accumulation, dtype=torch.bfloat16)
    assert all(torch.equal(mine, oracle) for mine, oracle in zip(found, expected, strict=True))
    weights = memory.weights()
    assert all(torch.equal(value, weights[name]) for name, value in disk.weights().items())


@pytest.mark.libaio
def test_forwards_without_backward_lose_no_buffer(tmp_path):
    """Each leaves pages that were announced, some of them read already."""
    disk = Streamed(disk_layers=LAYERS, nvme_path=str(tmp_path))
    for step in range(20):
        forward(disk, *batch(step, "cpu", torch.float32))
    train(disk)


@pytest.mark.libaio
def test_save_and_load_across_stores(tmp_path):
    disk = Streamed(disk_layers=2, nvme_path=str(tmp_path), state="int8")
    train(disk, steps=2)
    (tmp_path / "saved").mkdir()
    disk.experts.save(tmp_path / "saved")
    memory = Streamed(state="int8")
    again = Streamed(disk_layers=3, nvme_path=str(tmp_path), state="int8")
    for other in (memory, again):
        other.experts.load(tmp_path / "saved")
    outputs = [train(model, steps=3) for model in (disk, memory, again)]
    for other in outputs[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_places_of_a_record_are_aligned_and_apart(state):
    size = RowLayout(40, 24, 1, 3).slice_size
    kept = quantities(state, torch.bfloat16, size) | accumulator(state, size)
    places, record = record_places(kept)
    assert next(iter(places)) == "weight"
    ends = [0]
    for name, place in places.items():
        dtype, count = kept[name]
        assert place.start == ends[-1] and place.stop - place.start == count * dtype.itemsize
        ends.append(-(-place.stop // ALIGNMENT) * ALIGNMENT)
    assert record == ends[-1]


LEAVE = """
import sys
from tests.experts.test_streamed import Streamed, train
disk = Streamed(disk_layers=2, nvme_path=sys.argv[1])
train(disk, steps=1)
print(disk.experts.disk.directory.name, flush=True)
if sys.argv[2] == "killed":
    import os
    os.kill(os.getpid(), 9)
"""


@pytest.mark.libaio
def test_files_go_with_the_process(tmp_path):
    """At its end, also with pages still announced; after a kill when the next process starts."""
    command = [sys.executable, "-c", LEAVE, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    killed = subprocess.run([*command, "killed"], **run)
    assert killed.returncode == -9 and os.listdir(killed.stdout.strip().splitlines()[-1])
    ended = subprocess.run([*command, "ended"], **run)
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.glob(f"{DIRECTORY}*"))
