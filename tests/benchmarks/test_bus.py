"""The bus and its bound."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.bus import bus_seconds, measure_bus

BUS = {"bus_up_gb_s": 50.0, "bus_down_gb_s": 40.0, "bus_both_gb_s": 25.0}


def test_least_time_to_carry_both_ways():
    alone, shared = bus_seconds(100, 50, BUS)
    assert alone == pytest.approx(2) and shared == pytest.approx(50 / 25 + 50 / 50)
    alone, shared = bus_seconds(10, 90, BUS)
    assert alone == pytest.approx(90 / 40) and shared == pytest.approx(10 / 25 + 80 / 40)


@given(st.floats(0, 100), st.floats(0, 100))
def test_sharing_the_bus_never_helps(up, down):
    alone, shared = bus_seconds(up, down, BUS)
    assert shared >= alone * (1 - 1e-9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_measures_copies(device):
    rates = measure_bus(torch.device(device, 0) if device == "cuda" else torch.device(device), 1_000_000, 2)
    assert list(rates) == list(BUS) and all(rate > 0 for rate in rates.values())
