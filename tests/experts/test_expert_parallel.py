"""The order of exchanged rows; what ranks do with them is tested in tests/training/test_expert_parallel.py."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("deepspeed")

from experts.expert_parallel import Exchange, ExpertParallelBank


@given(st.integers(1, 5).flatmap(lambda w: st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3),
                                                    min_size=w, max_size=w)))  # fmt: skip
def test_received_rows_are_sorted_by_expert_and_then_by_source(counts):
    """Rows that know their source, expert and number within both; in the order in which they arrive."""
    received_WR = torch.tensor(counts)
    rows = [(s, e, n) for s, row in enumerate(counts) for e, count in enumerate(row) for n in range(count)]
    places = Exchange.places_by_expert(received_WR, len(rows)).tolist()
    ordered = [row for _, row in sorted(zip(places, rows, strict=True))]
    assert sorted(places) == list(range(len(rows)))
    assert ordered == sorted(rows, key=lambda row: (row[1], row[0], row[2]))


@pytest.mark.parametrize(
    ("factor", "tokens", "num_choices", "capacity"),
    [(1.0, 48, 8, 12), (1.0, 4608, 96, 96), (1.25, 41, 8, 13), (0.01, 8, 8, 1), (1.0, 9, 3, 6)],
)
def test_a_capacity_is_a_multiple_of_the_even_share(factor, tokens, num_choices, capacity):
    bank = SimpleNamespace(capacity_factor=factor, num_active=2, num_choices=num_choices)
    assert ExpertParallelBank.capacity(bank, tokens) == capacity
