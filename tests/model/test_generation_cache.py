"""States beside keys and values: rows are selected and repeated together, nothing is cropped."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from model.generation_cache import StatefulLayer, detach, hold_states


def filled(batch: int = 3) -> DynamicCache:
    """Two layers whose keys, values and states say which row they are of."""
    cache = DynamicCache()
    hold_states(cache, 2)
    rows = torch.arange(batch, dtype=torch.float32)
    for index, layer in enumerate(cache.layers):
        keys = rows.view(-1, 1, 1, 1).expand(batch, 2, 5, 4)
        cache.update(keys, keys, index)
        layer.states.update(
            first=rows[:, None].clone(), second=rows.view(-1, 1, 1).expand(batch, 3, 2).clone()
        )
    return cache


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
)
def test_states_go_with_their_rows(change, rows):
    cache = filled()
    change(cache)
    for layer in cache.layers:
        found = [layer.keys[:, 0, 0, 0], layer.states["first"][:, 0], layer.states["second"][:, 2, 1]]
        assert [x.tolist() for x in found] == [rows] * 3


def test_a_cache_starts_anew_and_never_forgets_a_token():
    cache = filled()
    with pytest.raises(ValueError, match="without an assistant"):
        cache.crop(-1)
    hold_states(cache, 2)
    assert cache.layers[0].states and cache.get_seq_length() == 5
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.layers[0].states


def test_another_kind_of_cache_is_refused(build):
    with pytest.raises(ValueError, match="not with a StaticCache"):
        hold_states(StaticCache(config=build().config, max_cache_len=8), 2)


def test_detached_caches_hold_the_same_without_a_graph():
    cache = filled()
    hold_states(fresh := DynamicCache(), 2)
    detach(fresh)
    for layer in cache.layers:
        layer.keys = layer.keys.clone().requires_grad_()
        layer.states["first"].requires_grad_()
    detach(cache)
    for layer in cache.layers:
        assert isinstance(layer, StatefulLayer) and layer.states["first"].tolist() == [[0], [1], [2]]
        assert not layer.keys.requires_grad and not layer.states["first"].requires_grad
