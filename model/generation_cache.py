"""A key-value cache whose layers also hold states: what a layer keeps of all tokens so far, in a fixed size."""

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class StatefulLayer(DynamicLayer):
    """Keys, values and states by name, each [B, ...]: rows of a batch are selected and repeated together."""

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.states: dict[str, Tensor] = {}

    def reset(self) -> None:
        super().reset()
        self.states.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.states = {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.states.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.states = {name: x.repeat_interleave(repeats, dim=0) for name, x in self.states.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.states = {name: x[indices] for name, x in self.states.items()}

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "this model's cache holds states, which cannot forget a token: generate without an assistant"
        )


def hold_states(cache: DynamicCache, num_layers: int) -> None:
    """Make a fresh or reset cache one that holds states too.

    Raises:
        ValueError: a cache of another kind.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"this model generates with a DynamicCache, not with a {type(cache).__name__}")
    if cache.get_seq_length() == 0 and not any(getattr(layer, "states", None) for layer in cache.layers):
        cache.layers[:] = [StatefulLayer() for _ in range(num_layers)]


def detach(cache: DynamicCache) -> None:
    """Cut a cache off from the graph that filled it: the next segment's gradients end at its beginning."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        if isinstance(layer, StatefulLayer):
            layer.states = {name: x.detach() for name, x in layer.states.items()}
