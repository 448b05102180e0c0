"""The memory estimate that is printed before a run: its parts, and that it needs no torch."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import training.estimate
from model import PragnosiaForCausalLM
from model.components import CacheConfig, MemoryConfig
from model.presets import preset_config
from training.cache_stage import with_traces
from training.config import TrainingArguments
from training.deepspeed_config import DIRECTORY
from training.engine import freeze
from training.estimate import (
    PROCESS,
    MemoryEstimate,
    StreamPlan,
    activation_bytes,
    coprocessor_bytes,
    estimate,
    passes_of,
)

TIGHT = {
    "stage": 3,
    "stage3_max_live_parameters": 1e6,
    "stage3_prefetch_bucket_size": 1e6,
    "reduce_bucket_size": 1e6,
}


def of(config=None, zero=None, **overrides) -> MemoryEstimate:
    settings = {
        "placement": "resident", "page_size": None, "precision": "bf16", "micro_batch_size": 1,
        "max_length": 512, "checkpointing": False, "world_size": 1,
    }  # fmt: skip
    ds_config = {"zero_optimization": zero or {"stage": 0}}
    return estimate(config or preset_config("1B"), ds_config, **{**settings, **overrides})


def state_bytes(
    stage: int, world_size: int, precision: str = "bf16", rows: int = 1, expert_parallel: int = 1
) -> float:
    """Bytes a parameter on each device: what two experts more cost, without what grows with tokens.

    With few rows the peak is in the update, with many in backward.
    """
    few, many = preset_config("1B", num_experts=16), preset_config("1B", num_experts=18)
    zero = {**TIGHT, "stage": stage, "stage3_max_live_parameters": 2e8}
    settings = {"world_size": world_size, "precision": precision, "expert_parallel": expert_parallel}
    sizes = [of(config, zero, micro_batch_size=rows, **settings).device for config in (few, many)]
    return (sizes[1] - sizes[0]) / (many.num_params() - few.num_params())


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_parameter_costs_sixteen_bytes_in_training(precision):
    assert state_bytes(0, 1, precision, rows=1000) == pytest.approx(16)
    assert state_bytes(0, 8, precision, rows=1000) == pytest.approx(16)


def test_the_update_holds_gradients_flat_and_in_fp32():
    assert state_bytes(0, 1) == pytest.approx(22)
    assert state_bytes(1, 4) == pytest.approx(4 + 18 / 4)
    assert state_bytes(0, 1, "fp32") == pytest.approx(16)


@pytest.mark.parametrize(("stage", "expected"), [(1, 4 + 12 / 4), (2, 2 + 14 / 4), (3, 16 / 4)])
def test_zero_divides_by_the_ranks(stage, expected):
    assert state_bytes(stage, 1, rows=1000) == pytest.approx(16)
    assert state_bytes(stage, 4, rows=1000) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, 16 / 2), (1, 4 / 2 + 12 / 8), (2, 2 / 2 + 14 / 8), (3, 16 / 8)],
)
def test_expert_parallelism_divides_what_zero_does_not(stage, expected):
    """Two more experts, one a rank: of 8 ranks, 4 have the same."""
    assert state_bytes(stage, 8, rows=1000, expert_parallel=2) == pytest.approx(expected, rel=1e-3)


def test_zero3_of_resident_experts_holds_what_is_fetched():
    """The window, but the bank of a layer at least, of which expert parallelism leaves a part."""
    config = preset_config("3B")
    wide = {**TIGHT, "stage3_max_live_parameters": 5e8}
    tight, open_window, shared = (
        of(config, zero, world_size=8, expert_parallel=ep).device
        for zero, ep in ((TIGHT, 1), (wide, 1), (TIGHT, 8))
    )
    bank = config.num_experts * config.expert_params()
    assert open_window - tight == pytest.approx(2 * (5e8 + 1e6 - bank))
    assert tight - shared == pytest.approx(2 * (bank - config.vocab_size * config.hidden_size))


def test_offloaded_pages_cost_host_memory_and_no_device_memory():
    few, many = (
        of(preset_config("1B", num_experts=n), TIGHT, placement="zero3", page_size=8) for n in (8, 128)
    )
    assert many.device == pytest.approx(few.device, rel=0.02)
    assert many.host > 8 * few.host
    resident = of()
    assert few.device < resident.device / 3 and resident.host < few.host


def test_larger_pages_and_a_wider_window_cost_device_memory():
    sizes = [of(zero=TIGHT, placement="zero3", page_size=size).device for size in (1, 4, 16)]
    assert sizes[0] < sizes[1] < sizes[2]
    wide = {**TIGHT, "stage3_max_live_parameters": 5e8}
    assert of(zero=wide, placement="zero3", page_size=1).device > sizes[0] + 9e8


def test_activations_grow_with_tokens_and_shrink_with_recompute():
    few, many = of(micro_batch_size=40).device, of(micro_batch_size=80).device
    assert many > few
    assert of(micro_batch_size=20, max_length=2048).device == pytest.approx(many)
    assert of(micro_batch_size=80, checkpointing=True).device < many
    # Half of the tokens, and the keys of the others.
    assert few < of(micro_batch_size=80, segments=2).device < many
    assert of(micro_batch_size=80, precision="fp32").device > many


# Allocated peaks on an H200, bf16, 4 rows of 512 tokens, and 32 where said; a JSON of the preset, one rank.
@pytest.mark.parametrize(
    ("preset", "rows", "stage", "measured"),
    [("350M", 4, 1, 7.63), ("350M", 32, 1, 15.1), ("1B", 4, 1, 21.95), ("1B", 32, 1, 26.6)],
)
def test_within_a_tenth_of_what_was_measured(preset, rows, stage, measured):
    found = of(preset_config(preset), {"stage": stage}, micro_batch_size=rows).device / 1e9
    assert found == pytest.approx(measured, rel=0.1)


def model_of_traces(kind, joint, has_memory, traces, length):
    """A small model in fp32 with a coprocessor, as stage cache freezes it, and a batch of 2 rows."""
    config = preset_config("tiny", vocab_size=64)
    config.cache = asdict(CacheConfig(128, coprocessor=kind, num_traces=traces))
    if has_memory:
        config.memory = asdict(MemoryConfig(128, memory_size=128, num_memory_layers=2))
    model = PragnosiaForCausalLM(config).train()
    freeze(model, TrainingArguments(use_cache_augmentation=True, stage="cache", cache_joint=joint))
    ids = torch.randint(64, (2, length))
    places = torch.arange(length).expand(2, -1)
    batch = {"input_ids": ids, "labels": ids, "document_ids": torch.ones_like(ids), "position_ids": places}
    return model, with_traces(batch, model.cache.settings, "key")


@pytest.mark.parametrize(
    ("kind", "joint", "has_memory", "traces", "length"),
    [
        ("pause", False, False, 8, 128),
        ("pause", False, False, 32, 64),
        ("pause", False, True, 8, 128),
        ("pause", True, True, 8, 128),
        ("light", False, False, 4, 512),
        ("light", True, False, 8, 128),
        ("light", False, True, 16, 64),
        ("soft", False, False, 8, 128),
        ("lora", False, True, 8, 128),
        ("copy", False, False, 8, 128),
    ],
)
def test_what_traces_keep_for_backward(kind, joint, has_memory, traces, length):
    """On a CPU, within a quarter. Without the vocabulary's part, which is small here."""
    model, batch = model_of_traces(kind, joint, has_memory, traces, length)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    config = model.config
    passes = passes_of(config, length, "cache", joint)
    found = activation_bytes(config, passes, 4, "resident", False) + coprocessor_bytes(config, 4, length)
    assert 2 * found == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.25)


def test_a_plan_counts_traces_and_no_state_of_a_frozen_model():
    config = preset_config("1B")
    config.cache = asdict(CacheConfig(config.hidden_size))
    coprocessor = config.coprocessor_params()
    frozen, joint = (of(config, stage="cache", joint=joint).device for joint in (False, True))
    assert frozen - 2 * (config.num_params() - coprocessor) < 3e9 < joint - 16 * config._dense_params()
    config.cache["num_traces"] *= 16
    more = of(config, stage="cache").device
    rows = 16 * 8 * 32  # what the latents and tokens of all traces are; a row in stage base has 512
    assert more - frozen > 2 * rows * 4 * config.hidden_size * config.num_hidden_layers
    assert of(config, stage="cache", checkpointing=True).device < more
    resting = of(config).device - of(preset_config("1B")).device
    assert resting == pytest.approx(2 * coprocessor)


def test_dense_parameters_leave_the_gpu_step_by_step():
    """Streamed: their state, then state and gradients, then weights too but for two layers and the embedding."""
    config, stream = preset_config("13B"), StreamPlan(1, 2, "int8", 1e8, 60e9)
    kept, state, all_of_it = (
        of(config, json.loads((DIRECTORY / name).read_text())["zero_optimization"], placement="streamed",
           page_size=1, stream=stream, checkpointing=True)
        for name in ("streamed.json", "streamed_offload.json", "streamed_zero3.json")
    )  # fmt: skip
    dense = config._dense_params()
    assert kept.device - state.device > 14 * dense
    assert state.device - all_of_it.device == pytest.approx(2 * (dense - config.vocab_size * 2048), rel=0.1)
    assert kept.host < state.host < all_of_it.host


def test_the_chunk_of_the_loss_is_that_of_the_head():
    from model.head import LOSS_CHUNK

    assert training.estimate.LOSS_CHUNK == LOSS_CHUNK


def test_the_line_that_is_printed():
    assert str(MemoryEstimate(1.234e9, 56.7e9)) == "1.23 GB device, 56.70 GB host a rank"


def test_it_imports_no_torch():
    code = "import sys, training.estimate; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optimizer_state_in_bf16_is_counted_as_measured():
    """3B, `zero3` in page-locked memory, one NVIDIA H200 (docs/results.md): 44.0 GB, and 67.7 with fp32
    state, of which 5.9 were a copy of the weights that is not held any more."""
    zero = TIGHT | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    settings = {
        "placement": "zero3", "page_size": 8, "precision": "bf16", "micro_batch_size": 4, "max_length": 512,
        "checkpointing": False, "world_size": 1,
    }  # fmt: skip
    for in_bf16, measured in ((True, 44.0 - 5.9), (False, 67.7 - 5.9)):
        ds_config = {"zero_optimization": zero, "bf16": {"bf16_optimizer_states": in_bf16}}
        host = estimate(preset_config("3B"), ds_config, **settings).host
        assert host / 1e9 == pytest.approx(measured, rel=0.1)
    ds_config["bf16"] = {"bf16_master_weights_and_grads": True}  # and fp32 moments: 16 bytes a parameter
    host = estimate(preset_config("3B"), ds_config, **settings).host
    assert host == pytest.approx(PROCESS + 16 * preset_config("3B").num_params())
