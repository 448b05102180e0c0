"""Cells: fresh processes, shared engines, failures that are rows, and what the columns say."""

import os
import signal
from dataclasses import replace

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cell as cell_module
from benchmarks.cell import Cell, error_in, run_cells, streamed_bytes
from experts.streamed import StreamedExperts, StreamSettings
from kernels.adamw import AdamW
from model import PragnosiaForCausalLM
from model.presets import preset_config
from training.weights import fill, initial_weights

TINY = {"model_size": "tiny", "batch_size": 1, "max_length": 32, "steps": 1, "device": "cpu"}


def children() -> list:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_torchs_offload_trains_as_the_trainer_does(forked_cells):
    num_gpus = 2

    def losses(placement, **more):
        cell = Cell(placement=placement, num_gpus=num_gpus, **TINY, **more)
        recomputed = replace(cell, batch_size=2, gradient_checkpointing=True)
        rows = list(run_cells([cell, recomputed]))
        assert [row.get("error") for row in rows] == [None, None]
        assert [row["tokens"] for row in rows] == [32 * num_gpus, 64 * num_gpus]
        assert [row["checkpointing"] for row in rows] == ["", "yes"]
        return [row["loss"] for row in rows]

    expected = losses("resident")
    assert losses("fsdp2") == pytest.approx(expected, rel=1e-6)
    assert losses("fsdp2", expert_page_size=4) == pytest.approx(expected, rel=1e-6)


def test_a_cell_that_fails_is_a_row_with_its_error_and_leaves_no_process():
    before = children()
    cell = Cell(placement="resident", **{**TINY, "max_length": 0})
    row, other = run_cells([cell, replace(cell, batch_size=2)])
    assert row["error"] and row["error"] == other["error"] and "step_s" not in row
    assert (row["placement"], row["batch_size"], other["batch_size"]) == ("resident", 1, 2)
    assert children() == before


def test_a_rank_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(cell_module, "PATIENCE_S", 0.3)
    before = children()
    (row,) = run_cells([Cell(placement="resident", num_gpus=2, **TINY)])
    assert row["error"] == "no row in 0.3 s" and children() == before


def test_the_first_rank_that_failed_says_why(tmp_path):
    for rank in range(2):
        (tmp_path / f"output-{rank}").write_text(f"rank {rank} starts\nlast words of rank {rank}\n")
    assert error_in(tmp_path, [None, -signal.SIGKILL]) == "rank 1 ended with code -9: last words of rank 1"
    for rank, second in ((0, 2), (1, 1)):
        (tmp_path / f"error-{rank}").write_text(f"error of rank {rank}")
        os.utime(tmp_path / f"error-{rank}", (second, second))
    assert error_in(tmp_path, [1, 1]) == "error of rank 1"


def test_all_to_all_is_known_by_its_names():
    kernels = (
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_AllToAll",
        "gloo:all_to_all",
    )
    others = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "nccl:all_to_all"
    assert all(cell_module.ALL_TO_ALL.match(name) for name in kernels)
    assert not any(
        cell_module.ALL_TO_ALL.match(name) for name in (*others, "AllToAll", "c10d::alltoall_base_")
    )


def test_cells_that_differ_in_more_than_a_step_share_no_engine():
    cell = Cell(placement="resident", **TINY)
    with pytest.raises(AssertionError, match="need an engine each"):
        next(run_cells([cell, replace(cell, expert_page_size=2)]))


class Copies(TorchDispatchMode):
    """Adds up the bytes of copies out of some tensors (up) and into them (down)."""

    def __init__(self, tensors):
        super().__init__()
        self.places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.up = self.down = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            to, source = args[:2]
            self.up += source.nbytes * (source.untyped_storage().data_ptr() in self.places)
            self.down += to.nbytes * (to.untyped_storage().data_ptr() in self.places)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("routing", ["token", "step"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_bytes_of_a_step_are_those_that_are_copied(routing, state):
    config = preset_config("tiny", routing=routing)
    settings = StreamSettings(
        page_size=2, num_slots=2, state=state, accumulate=False, fetch_all=routing == "token", max_norm=1.0,
        adamw=AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1), seed=0,
    )  # fmt: skip
    placement = StreamedExperts(config, settings, torch.device("cpu"), torch.bfloat16)
    model = PragnosiaForCausalLM(config, placement.build_bank).bfloat16()
    model.placement = placement
    fill(model, initial_weights(0, 0.02))
    ids = torch.randint(config.vocab_size, (1, 8))  # so few tokens that some experts have none

    def step():
        output = model(input_ids=ids, labels=ids, document_ids=torch.ones_like(ids))
        output.loss.backward()
        return output.load_LE

    step()
    with Copies([array for store in placement.stores for array in store.arrays.values()]) as copies:
        load_LE = step()
    assert 0 < (load_LE > 0).sum() < load_LE.numel()
    moved = streamed_bytes(placement, load_LE)
    assert moved["down_gb"] * 1e9 == pytest.approx(copies.down)
    assert moved["up_gb"] * 1e9 == pytest.approx(copies.up)
    total = sum(array.nbytes for store in placement.stores for array in store.arrays.values())
    assert moved["experts_gb"] * 1e9 == pytest.approx(total)
