"""A key-value cache as one pass of layers sees it, with keys and values of the pass's own behind it."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cache_attention import cache_attention, obstacle


class Extended:
    """A cache that passes read and leave as it is.

    grows: whether this view, not the cache, keeps what a pass computes; else every pass begins at the cache's end.
    back: [B, 1, Q, M + Q], how many tokens back each key lies, where that is not to be told from their order.
    adapters: an update of the layers' projections for the pass, a `ModuleDict` a layer.
    """

    def __init__(self, cache, *, grows: bool = False, back: Tensor | None = None, adapters=None):
        self.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in self.layers:
            layer.states = dict(layer.states)
        self.grows, self.back, self.adapters = grows, back, adapters

    def update(self, k_BGQC: Tensor, v_BGQC: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, M + Q, C] that the queries of the pass may see."""
        layer = self.layers[layer_idx] if self.grows else copy.copy(self.layers[layer_idx])
        return layer.update(k_BGQC, v_BGQC)

    def near(self, mask: Tensor, window: int) -> Tensor:
        """The mask without what is `window` tokens back or more."""
        far = self.back >= window
        return mask & ~far if mask.dtype == torch.bool else mask.masked_fill(far, -torch.inf)


def adapters_of(cache, layer_idx: int) -> nn.ModuleDict | None:
    """The update of a layer's projections in a pass over `cache`."""
    adapters = cache.adapters if isinstance(cache, Extended) else None
    return None if adapters is None else adapters[layer_idx]


def latents_of(cache, layer_idx: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values [B, G, M, C] of the latents that a layer's queries see besides the tokens of `cache`."""
    if isinstance(cache, Extended):
        return None
    states = getattr(cache.layers[layer_idx], "states", {})
    return (states["latent_keys"], states["latent_values"]) if "latent_keys" in states else None


def windowed(
    mask: Tensor | None, window: int, length: int, total: int, device: torch.device, cache=None
) -> Tensor:
    """A causal mask [B or 1, 1, S, past + S] that also hides what is `window` tokens back or more."""
    if isinstance(cache, Extended) and cache.back is not None:
        return cache.near(mask, window)
    nearest_SM = torch.ones(length, total, dtype=torch.bool, device=device)
    nearest_SM = nearest_SM.tril(total - length).triu(total - length - window + 1)
    if mask is None:
        return nearest_SM[None, None]
    return nearest_SM & (mask if mask.dtype == torch.bool else mask == 0)


def attend_with(
    latent_k_BGMC: Tensor,
    latent_v_BGMC: Tensor,
    factor: float,
    q_BHSC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Attention to the keys, and to latents with log(factor) on their logits."""
    latents = latent_k_BGMC.shape[2]
    if mask is None and not obstacle(q_BHSC.device, q_BHSC.dtype, q_BHSC.shape[-1]):
        wide = torch.promote_types(q_BHSC.dtype, torch.float32)
        gate_BGM = q_BHSC.new_full((1, 1, latents), math.log(factor), dtype=wide)
        return cache_attention(q_BHSC, k_BGSC, v_BGSC, latent_k_BGMC, latent_v_BGMC, gate_BGM)
    if mask is None:
        mask = windowed(None, k_BGSC.shape[2] + 1, q_BHSC.shape[2], k_BGSC.shape[2], q_BHSC.device)
    if mask.dtype == torch.bool:
        mask = q_BHSC.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    group = q_BHSC.shape[1] // k_BGSC.shape[1]
    k_BHSC, v_BHSC = (
        torch.cat(parts, dim=2).repeat_interleave(group, dim=1)
        for parts in ((latent_k_BGMC, k_BGSC), (latent_v_BGMC, v_BGSC))
    )
    mask = F.pad(mask, (latents, 0), value=math.log(factor))
    return F.scaled_dot_product_attention(q_BHSC, k_BHSC, v_BHSC, attn_mask=mask)
