"""What a step counts. The step itself, against plain PyTorch and over ranks, is in test_layouts.py."""

import pytest
import torch

from model import PragnosiaConfig, PragnosiaForCausalLM
from training.config import UserError
from training.segments import in_segments
from training.step import count_targets, count_tokens, empty_like


def batch():
    """Two rows: a document of 3 and one of 2 with a padded place; then a row of padding alone."""
    return {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0], [0, 0, 0, 0, 0, 0]]),
        "labels": torch.tensor([[-100, 6, 7, -100, 9, -100], [-100] * 6]),
        "document_ids": torch.tensor([[1, 1, 1, 2, 2, 0], [0] * 6]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0], [0] * 6]),
    }


def test_targets_and_tokens_are_counted():
    assert count_targets(batch()) == 3
    assert count_tokens(batch()) == 5


def test_segments_go_over_a_row_in_order():
    whole = batch()
    parts = in_segments([whole], 3)
    assert [part["input_ids"][0].tolist() for part in parts] == [[5, 6], [7, 8], [9, 0]]
    assert [part["document_ids"][0].tolist() for part in parts] == [[1, 1], [1, 1, 1, 2], [1, 1, 1, 2, 2, 0]]
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[key] for part in parts], dim=1), whole[key])
    assert [count_tokens(part) for part in parts] == [2, 2, 1]
    assert [count_targets(part) for part in parts] == [1, 0, 0]  # first tokens, 7 and 9, are none
    assert empty_like(parts[1])["document_ids"].tolist() == [[0, 0], [0, 0]]
    assert in_segments([whole], 1) == [whole]
    with pytest.raises(UserError, match="--segments 4 must divide the rows, which have 6 tokens"):
        in_segments([whole], 4)


def test_a_label_in_the_first_place_is_no_target():
    with_first = batch()
    with_first["labels"][0, 0] = 5
    assert count_targets(with_first) == 3


def test_the_counts_are_the_denominators_of_the_model():
    """The mean that the model takes by itself is the sum over `count_targets` and `count_tokens`."""
    torch.manual_seed(0)
    model = PragnosiaForCausalLM(
        PragnosiaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, head_dim=8)
    )
    alone = model(**batch()).loss
    counts = {"num_targets": count_targets(batch()), "num_tokens": count_tokens(batch())}
    assert torch.equal(alone, model(**batch(), **counts).loss)
    halved = model(**batch(), **{name: 2 * count for name, count in counts.items()}).loss
    torch.testing.assert_close(halved, alone / 2)


def test_an_empty_batch_has_the_shape_and_nothing_else():
    empty = empty_like(batch())
    assert {name: value.shape for name, value in empty.items()} == dict.fromkeys(batch(), (2, 6))
    assert count_targets(empty) == count_tokens(empty) == 0
    assert not empty["input_ids"].any()
