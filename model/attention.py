"""Grouped-query attention with rotary positions and per-head RMSNorm of queries and keys (Qwen3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PragnosiaConfig
from model.extended_cache import adapters_of, attend_with, latents_of, windowed


def rotary(position_ids_BS: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, C] of rotary embeddings (arXiv 2104.09864), computed in fp32."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids_BS.device).float() / head_dim
    angles = position_ids_BS[..., None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHSC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Turn each pair (c, c + C/2) of a head by its position's angle."""
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHSC * cos_BSC[:, None] + turned * sin_BSC[:, None]


class RMSNorm(nn.Module):
    """x / rms(x) · weight; the kernel accumulates in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention of one layer; `mask` None means plain causal. window: how many tokens it sees."""

    def __init__(self, config: PragnosiaConfig, layer_idx: int, window: int | None = None):
        super().__init__()
        self.layer_idx, self.window = layer_idx, window
        self.head_dim = config.head_dim
        self.cache_settings = config.cache
        queries = config.num_attention_heads * config.head_dim
        pairs = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, pairs, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, pairs, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self, hidden_BSD: Tensor, rotary_BSC: tuple[Tensor, Tensor], mask: Tensor | None, cache=None
    ) -> Tensor:
        batch, length, _ = hidden_BSD.shape
        heads = (batch, length, -1, self.head_dim)
        adapters = None if cache is None else adapters_of(cache, self.layer_idx)

        def project(name: str, x: Tensor) -> Tensor:
            projected = getattr(self, name)(x)
            return projected if adapters is None else projected + adapters[name](x)

        q_BHSC = rotate(self.q_norm(project("q_proj", hidden_BSD).view(heads)).transpose(1, 2), *rotary_BSC)
        k_BGSC = rotate(self.k_norm(project("k_proj", hidden_BSD).view(heads)).transpose(1, 2), *rotary_BSC)
        v_BGSC = project("v_proj", hidden_BSD).view(heads).transpose(1, 2)
        if cache is not None:
            k_BGSC, v_BGSC = cache.update(k_BGSC, v_BGSC, self.layer_idx)
        if self.window is not None:
            mask = windowed(mask, self.window, length, k_BGSC.shape[2], k_BGSC.device, cache)
        latents = None if cache is None else latents_of(cache, self.layer_idx)
        if latents is not None:
            factor = self.cache_settings["retrieval_factor"]
            output_BHSC = attend_with(*latents, factor, q_BHSC, k_BGSC, v_BGSC, mask)
            return project("o_proj", output_BHSC.transpose(1, 2).reshape(batch, length, -1))
        if mask is not None:
            # With a mask, grouped key-value heads would send CUDA to the kernel that materialises the scores.
            group = q_BHSC.shape[1] // k_BGSC.shape[1]
            k_BGSC, v_BGSC = (x.repeat_interleave(group, dim=1) for x in (k_BGSC, v_BGSC))
        output_BHSC = F.scaled_dot_product_attention(
            q_BHSC,
            k_BGSC,
            v_BGSC,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=mask is None,
        )
        return project("o_proj", output_BHSC.transpose(1, 2).reshape(batch, length, -1))
