import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import Documents
from data.packing import EMPTY, PackedDataset, pack
from data.prompts import IGNORED

PAD = 0


def documents_of(lengths: list[int], seed: int = 0) -> Documents:
    """Documents of random tokens (never PAD) and random targets, at least one each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 1000, sum(lengths)).astype(np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    targets = rng.random(len(tokens)) < 0.5
    targets[offsets[1:] - 1] = True
    targets[offsets[:-1]] = False
    return Documents(tokens, targets, offsets, examples=len(lengths), target_bytes=7)


lengths_and_row = st.integers(2, 40).flatmap(
    lambda row: st.tuples(st.lists(st.integers(2, row), max_size=60), st.just(row))
)


@settings(deadline=None)
@given(lengths_and_row)
def test_every_document_is_in_one_row_that_holds_it(drawn):
    lengths, row = drawn
    rows = pack(lengths, row)
    assert sorted(document for members in rows for document in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[document] for document in members) <= row for members in rows)


@settings(deadline=None)
@given(lengths_and_row)
def test_no_two_rows_would_fit_into_one(drawn):
    lengths, row = drawn
    filled = sorted(sum(lengths[document] for document in members) for members in pack(lengths, row))
    assert len(filled) < 2 or filled[0] + filled[1] > row


@settings(deadline=None, max_examples=60)
@given(lengths_and_row, st.integers(0, 3))
def test_rows_give_back_the_documents(drawn, seed):
    lengths, row_length = drawn
    documents = documents_of(lengths, seed)
    dataset = PackedDataset([(documents, 1.0)], row_length, PAD, seed)
    found = []
    for i in range(len(dataset)):
        row = dataset[i]
        assert all(tensor.shape == (row_length,) and tensor.dtype == torch.int64 for tensor in row.values())
        ids = row["document_ids"]
        assert ids[0] == 1 and set(ids.tolist()) <= set(range(int(ids.max()) + 1))
        for number in range(1, int(ids.max()) + 1):
            places = (ids == number).nonzero().flatten()
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
            assert row["position_ids"][places].tolist() == list(range(len(places)))
            assert row["labels"][places[0]] == IGNORED
            found.append((row["input_ids"][places].tolist(), row["labels"][places].tolist()))
        padding = ids == 0
        assert (row["input_ids"][padding] == PAD).all()
        assert (row["labels"][padding] == IGNORED).all()
        assert (row["position_ids"][padding] == 0).all()
    expected = []
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        tokens = documents.tokens[start:end].astype(np.int64)
        expected.append((tokens.tolist(), np.where(documents.targets[start:end], tokens, IGNORED).tolist()))
    assert sorted(found) == sorted(expected)
    assert dataset.num_targets == sum(label != IGNORED for _, labels in found for label in labels)


def test_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(10, 200, 2000).tolist()
    assert sum(lengths) / (512 * len(pack(lengths, 512))) > 0.99


def test_the_empty_row_has_neither_documents_nor_targets():
    row = PackedDataset([(documents_of([3]), 1.0)], 8, PAD)[EMPTY]
    assert (
        row["labels"].eq(IGNORED).all() and row["document_ids"].eq(0).all() and row["input_ids"].eq(PAD).all()
    )


def test_the_seed_decides_which_documents_share_a_row():
    lengths = [5] * 40
    assert pack(lengths, 20, seed=1) == pack(lengths, 20, seed=1) != pack(lengths, 20, seed=2)


def test_weights_repeat_rows_of_their_own_part():
    parts = [
        (documents_of([8] * 10, 1), 2.3),
        (documents_of([8] * 4, 2), 1.0),
        (documents_of([8] * 10, 3), 0.5),
    ]
    dataset = PackedDataset(parts, 8, PAD)
    first, second = dataset.epoch_rows(0, 0), dataset.epoch_rows(0, 1)
    for order in (first, second):
        counts = np.bincount(order, minlength=24)
        assert sorted(counts[:10]) == [2] * 7 + [3] * 3
        assert counts[10:14].tolist() == [1] * 4
        assert sorted(counts[14:]) == [0] * 5 + [1] * 5
    assert len(first) == len(second) and sorted(first) != sorted(second)
    assert first.tolist() == dataset.epoch_rows(0, 0).tolist() != dataset.epoch_rows(1, 0).tolist()
    assert dataset.num_examples == 24 and dataset.target_bytes == 21
