"""Pages and slots within a budget, counted against what the slots really take."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.budget import DEFAULT_BUDGET, automatic_budget, choose_pages, device_bytes
from experts.streamed import StreamedExperts, StreamSettings
from kernels.adamw import BLOCK, AdamW
from model.presets import preset_config

CONFIG = preset_config("1B")
SIZES = {"state": "bf16", "precision": "bf16", "accumulate": False, "ranks": 1}

sizes = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["fp32", "bf16", "int8"]),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "accumulate": st.booleans(),
        "ranks": st.integers(1, 8),
    }
)


@given(st.floats(1e6, 3e9), sizes)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_the_choice_fits_and_no_larger_one_does(budget, sizes):
    def fits(page, slots):
        return device_bytes(CONFIG, page, slots, **sizes) <= budget

    chosen = choose_pages(CONFIG, budget, None, **sizes)
    if chosen is None:
        assert not fits(1, 2)
        return
    page, slots = chosen
    assert fits(page, slots) and 1 <= page <= CONFIG.num_experts
    pages = -(-CONFIG.num_experts // page)
    if slots == 3:
        assert page == -(-CONFIG.num_experts // pages), (
            "the last page is as full as the number of pages allows"
        )
        assert pages == 1 or not fits(-(-CONFIG.num_experts // (pages - 1)), 3)
    else:
        assert (page, slots) == (1, 2) and not fits(1, 3)


@given(st.floats(1e6, 3e9), st.integers(1, CONFIG.num_experts), sizes)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_given_page_is_kept(budget, page, sizes):
    chosen = choose_pages(CONFIG, budget, page, **sizes)
    least = device_bytes(CONFIG, page, 2, **sizes)
    assert (chosen is None) == (least > budget)
    assert chosen is None or chosen[0] == page


def test_the_automatic_budget_follows_the_gpu():
    budgets = [automatic_budget(gpu) for gpu in (4e9, 24e9, 80e9, float("inf"))]
    assert budgets == [256e6, 480e6, 1e9, 1e9]


def test_without_a_budget_there_is_always_a_choice():
    assert device_bytes(CONFIG, 1, 3, **SIZES) < DEFAULT_BUDGET
    page, slots = choose_pages(CONFIG, None, None, **SIZES)
    assert slots == 3 and device_bytes(CONFIG, page, 3, **SIZES) <= DEFAULT_BUDGET
    vast = preset_config("1B", moe_intermediate_size=100_000)
    assert device_bytes(vast, 1, 2, **SIZES) > DEFAULT_BUDGET
    assert choose_pages(vast, None, None, **SIZES) == (1, 3)
    assert choose_pages(vast, None, 4, **SIZES) == (4, 3)


def test_memory_does_not_grow_with_the_experts():
    taken = {device_bytes(preset_config("1B", num_experts=n), 8, 3, **SIZES) for n in (8, 16, 32, 64, 128)}
    assert len(taken) == 1


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slots_take_what_was_counted(precision, state, accumulate):
    """On one rank: the slots, the page's gradients and their gathered copy."""
    config = preset_config("tiny", hidden_size=64, moe_intermediate_size=4 * BLOCK // 64, num_hidden_layers=1)
    chosen = StreamSettings(
        page_size=3, num_slots=4, state=state, accumulate=accumulate, fetch_all=True, max_norm=1.0,
        adamw=AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1), seed=0,
    )  # fmt: skip
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    experts = StreamedExperts(config, chosen, torch.device("cpu"), dtype)
    updates = 4 * 3 * 4  # one int32 an expert, which the count leaves out
    slots = sum(buffer.nbytes for slot in experts.ring.idle for buffer in slot.buffers.values()) - updates
    counted = device_bytes(config, 3, 4, state=state, precision=precision, accumulate=accumulate, ranks=1)
    assert counted == slots + 2 * experts.gradient_RP.nbytes


def test_it_imports_no_torch():
    code = "import sys, experts.budget; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
