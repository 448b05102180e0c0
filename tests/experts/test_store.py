"""Rows of a bank: cut into ranks without gap or overlap, and read back on any number of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.store import PROJECTIONS, BankStore, RowLayout, accumulator, quantities
from kernels.adamw import BLOCK

EXPERTS, WIDTH, SIZE = 5, 24, 20
STATES = [
    ("fp32", torch.float32), ("fp32", torch.bfloat16), ("bf16", torch.float32), ("bf16", torch.bfloat16),
    ("int8", torch.bfloat16),
]  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_ranks_tile_every_projection(expert_width, hidden_size, ranks):
    layouts = [RowLayout(expert_width, hidden_size, rank, ranks) for rank in range(ranks)]
    whole = layouts[0]
    assert whole.values == 3 * expert_width * hidden_size
    assert whole.slice_size % BLOCK == 0 and whole.row_size == ranks * whole.slice_size
    assert whole.values <= whole.row_size < whole.values + ranks * BLOCK
    values = (torch.arange(whole.values) + 1).view(1, 3, -1)
    projections = {name: values[:, number] for number, name in enumerate(PROJECTIONS)}
    row = torch.zeros(whole.row_size, dtype=torch.int64)
    for layout in layouts:
        own = layout.own(projections)
        row[layout.rank * layout.slice_size :][: own.shape[1]] = own[0]
    assert torch.equal(row[: whole.values], values.flatten())
    gate_up, down = whole.weights(row[None])
    assert gate_up.shape == (1, 2 * expert_width, hidden_size) and down.shape == (
        1,
        hidden_size,
        expert_width,
    )
    assert torch.equal(torch.cat([gate_up.flatten(), down.flatten()]), row[: whole.values])
    assert not row[whole.values :].any(), "padding lies at the end"


def stores(ranks: int, state="fp32", dtype=torch.float32, accumulate=False) -> list[BankStore]:
    size = RowLayout(WIDTH, SIZE, 0, ranks).slice_size
    kept = quantities(state, dtype, size) | (accumulator(state, size) if accumulate else {})
    return [BankStore(EXPERTS, RowLayout(WIDTH, SIZE, r, ranks), kept, lock=False) for r in range(ranks)]


def rows(parts: list[BankStore], name: str) -> torch.Tensor:
    """All ranks' entries of the rows, side by side; of the values alone, without the padding."""
    entries = torch.cat([store.arrays[name] for store in parts], dim=1)
    if name == "updates":
        return parts[0].arrays[name]
    values = parts[0].layout.values
    return entries[:, : values if "scale" not in name else -(-values // BLOCK)]


def weights(name: str) -> torch.Tensor:
    shape = (EXPERTS, SIZE, WIDTH) if name == "down_proj" else (EXPERTS, WIDTH, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize(("state", "dtype"), STATES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_written_weights_are_the_rows(ranks, state, dtype):
    """In pieces that end inside the bank; the master copy, where there is one, is exact."""
    parts = stores(ranks, state, dtype)
    expected = torch.cat([weights(name).flatten(1) for name in PROJECTIONS], dim=1)
    for first in (0, 2, 4):
        for store in parts:
            store.write(first, {name: weights(name)[first : first + 2] for name in PROJECTIONS})
    assert torch.equal(rows(parts, "weight"), expected.to(dtype))
    has_master = state == "fp32" and dtype == torch.bfloat16
    assert ("master" in parts[0].arrays) == has_master
    if has_master:
        assert torch.equal(rows(parts, "master"), expected)
    assert not any(parts[-1].arrays["weight"][:, parts[0].layout.values - parts[0].layout.row_size :].any(1))


@pytest.mark.parametrize(("state", "dtype"), STATES)
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 3), (3, 1), (5, 2), (2, 6), (6, 1)])
def test_saved_rows_are_read_on_another_number_of_ranks(tmp_path, before, after, state, dtype):
    saved, loaded = (
        stores(before, state, dtype, accumulate=True),
        stores(after, state, dtype, accumulate=True),
    )
    generator = torch.Generator().manual_seed(0)
    paths = []
    for store in saved:
        last = store.layout.rank == before - 1
        for name, array in store.arrays.items():
            array.copy_(torch.randint(0, 100, array.shape, generator=generator))
            padding = store.layout.row_size - store.layout.values
            if last and name in ("weight", "exp_avg", "exp_avg_sq", "master") and padding:
                array[:, -padding:] = 0  # padding stays 0: it has no gradient
        store.arrays["updates"].copy_(saved[0].arrays["updates"])
        paths.append(tmp_path / f"rank-{store.layout.rank}")
        store.save(paths[-1], {"passes": "7"})
    for store in loaded:
        for array in store.arrays.values():
            array.zero_()
        assert store.load(paths) == {"passes": "7"}
        assert not store.arrays["accumulator"].any(), "gradients are not part of a checkpoint"
    for name in saved[0].arrays.keys() - {"accumulator"}:
        assert rows(saved, name).any() and torch.equal(rows(saved, name), rows(loaded, name)), name


def test_bytes_of_a_value():
    """As many as `experts.budget` counts on."""
    from experts.budget import bytes_per_value

    for state, dtype in STATES:
        for accumulate in (False, True):
            (store,) = stores(1, state, dtype, accumulate)
            taken = sum(array.nbytes for array in store.arrays.values()) - store.arrays["updates"].nbytes
            precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
            found = taken / (EXPERTS * store.layout.row_size)
            assert found == bytes_per_value(state, precision, accumulate), (state, dtype, accumulate)
