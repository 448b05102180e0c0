"""Differentiable cache augmentation (arXiv 2412.17747): a coprocessor reads the key-value cache and adds to it.

A coprocessor looks at what the model has cached of a prompt, x_1 … x_p, and writes a few latents: vectors that
the model then reads like tokens at position p. The token x_p is computed once more, this time with the latents in
view, and generation goes on from there. log(retrieval_factor) is added to the logits of attention to a latent; at
0 there is no latent, and the model is its base.

There are three kinds. `light`: learnt queries, which start from the last entry, cross-attend to the entries of
all layers. `copy`: a copy of the model runs the learnt queries, reading the model's own cache. `lora`: the model
itself does, with a low-rank update. Two more are there to compare with: `soft`, the model as it is with learnt
queries, and `pause`, latents that are learnt and read nothing. They learn from the tokens after random places p of
a row (traces): all traces of a row, each with its latents and its ahead tokens, are one forward pass under a block
mask.

Here N counts the traces of a row, M the latents of one, A its ahead tokens, and Q what is computed for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from kernels.cache_attention import cache_attention
from model.attention import RMSNorm, rotary, rotate
from model.components import LORA_RANK, CacheConfig
from model.extended_cache import Extended
from model.generation_cache import hold_states

READOUT_WEIGHT = 0.5
REPORTED = (1, 2, 4, 8, 16, 32)  # places after the latents whose loss an evaluation reports


@dataclass
class Places:
    """N places in each of B rows: what latents made there may read, and where they stand.

    last_BN: the last cache entry they read. position_BN: its rotary position. reads_BNS (bool): all they read.
    """

    last_BN: Tensor
    position_BN: Tensor
    reads_BNS: Tensor


class LightLayer(nn.Module):
    """Cross-attention of latents over cache entries, then a feed-forward; both pre-norm and residual."""

    def __init__(self, width: int, settings: CacheConfig, eps: float, theta: float):
        super().__init__()
        self.head_dim, self.theta, self.dropout = width // settings.num_heads, theta, settings.dropout
        self.attn_norm, self.ffn_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, latents_BND: Tensor, entries_BSD: Tensor, position_BN: Tensor, position_BS: Tensor, reads_BNS
    ) -> Tensor:
        """The latents once more, N of a row. reads_BNS: what each reads; one row if all read the same."""
        q_BHNC, k_BHSC, v_BHSC = (
            project(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for project, x in (
                (self.q_proj, self.attn_norm(latents_BND)),
                (self.k_proj, entries_BSD),
                (self.v_proj, entries_BSD),
            )
        )
        turns = (self.head_dim, self.theta, q_BHNC.dtype)
        q_BHNC = rotate(q_BHNC, *rotary(position_BN, *turns))
        k_BHSC = rotate(k_BHSC, *rotary(position_BS, *turns))
        if reads_BNS.shape[1] == 1:  # all read the same
            read_BHNC = cache_attention(q_BHNC, None, None, k_BHSC, v_BHSC, valid_BM=reads_BNS[:, 0])
        else:
            read_BHNC = F.scaled_dot_product_attention(q_BHNC, k_BHSC, v_BHSC, attn_mask=reads_BNS[:, None])
        read_BND = self.o_proj(read_BHNC.transpose(1, 2).flatten(2))
        latents_BND = latents_BND + F.dropout(read_BND, self.dropout, self.training)
        inside = F.gelu(self.up_proj(self.ffn_norm(latents_BND)))
        return latents_BND + F.dropout(self.down_proj(inside), self.dropout, self.training)


class LightReader(nn.Module):
    """Cross-attention over the entries of all layers; an entry is their keys, turned back, and their values."""

    def __init__(self, config, settings: CacheConfig):
        super().__init__()
        width, pairs = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        self.entry_proj = nn.Linear(2 * config.num_hidden_layers * pairs, width, bias=False)
        self.entry_norm = RMSNorm(width, config.rms_norm_eps)
        self.start_proj = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(
            LightLayer(width, settings, config.rms_norm_eps, config.rope_theta)
            for _ in range(settings.coprocessor_layers)
        )

    def forward(self, queries_MD: Tensor, cache, places: Places, position_BS: Tensor) -> Tensor:
        """What M queries read at each place: [B, N, M, D]."""
        cos_BSC, sin_BSC = rotary(position_BS, self.head_dim, self.theta, queries_MD.dtype)
        parts = [
            F.rms_norm(flat, flat.shape[2:])
            for layer in cache.layers
            for flat in (
                rotate(layer.keys, cos_BSC, -sin_BSC).transpose(1, 2).flatten(2),
                layer.values.transpose(1, 2).flatten(2),
            )
        ]
        entries_BSD = self.entry_norm(self.entry_proj(torch.cat(parts, dim=2)))
        last_BND = entries_BSD.take_along_dim(places.last_BN[..., None], 1)
        latents_BNMD = self.start_proj(last_BND)[:, :, None] + queries_MD
        num_places, num_latents = latents_BNMD.shape[1:3]
        position_BN = places.position_BN.repeat_interleave(num_latents, 1)
        reads_BNS = places.reads_BNS
        if num_places > 1:
            reads_BNS = reads_BNS.repeat_interleave(num_latents, 1)
        latents_BND = latents_BNMD.flatten(1, 2)
        for layer in self.layers:
            latents_BND = layer(latents_BND, entries_BSD, position_BN, position_BS, reads_BNS)
        return latents_BND.unflatten(1, (num_places, num_latents))


class LowRank(nn.Module):
    """x → out_proj · in_proj · x, of rank `LORA_RANK`; 0 until it is trained."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.in_proj = nn.Linear(width_in, LORA_RANK, bias=False)
        self.out_proj = nn.Linear(LORA_RANK, width_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.in_proj(x))


class LowRankUpdate(nn.ModuleList):
    """A `LowRank` beside each projection of the attention of every layer."""

    def __init__(self, config):
        width, head = config.hidden_size, config.head_dim
        queries, pairs = config.num_attention_heads * head, config.num_key_value_heads * head
        sizes = {"q_proj": (width, queries), "k_proj": (width, pairs), "v_proj": (width, pairs)}
        sizes["o_proj"] = (queries, width)
        super().__init__(
            nn.ModuleDict({name: LowRank(*size) for name, size in sizes.items()})
            for _ in range(config.num_hidden_layers)
        )


class Coprocessor(nn.Module):
    """From a cache to latents in embedding space.

    twin: for `copy`, a `PragnosiaModel` of its own.
    """

    def __init__(self, config, twin: nn.Module | None = None):
        super().__init__()
        self.settings = CacheConfig(**config.cache)
        self.queries = nn.Embedding(self.settings.num_latents, config.hidden_size)
        if self.settings.coprocessor == "pause":
            return
        if self.settings.coprocessor == "light":
            self.light = LightReader(config, self.settings)
        elif self.settings.coprocessor == "lora":
            self.lora = LowRankUpdate(config)
        elif self.settings.coprocessor == "copy":
            self.copy = twin
            del self.copy.embed_tokens
        self.latent_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.latent_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, model: nn.Module, cache, places: Places, position_BS: Tensor) -> Tensor:
        """The latents of each place, [B, N, M, D].

        model: the `PragnosiaModel` whose cache it is; `lora` and `soft` run it. position_BS: rotary positions of
        the cache's entries.
        """
        queries_MD = self.queries(torch.arange(self.settings.num_latents, device=position_BS.device))
        if self.settings.coprocessor == "pause":
            return queries_MD.expand(*places.last_BN.shape, -1, -1)
        if self.settings.coprocessor == "light":
            hidden_BNMD = self.light(queries_MD, cache, places, position_BS)
        else:
            hidden_BNMD = self._through_layers(model, queries_MD, cache, places)
        hidden_BNMD = F.dropout(self.latent_norm(hidden_BNMD), self.settings.dropout, self.training)
        return self.latent_proj(hidden_BNMD)

    def _through_layers(self, model: nn.Module, queries_MD: Tensor, cache, places: Places) -> Tensor:
        (batch, num_places, _), num_latents = places.reads_BNS.shape, len(queries_MD)
        position_BN = places.position_BN.repeat_interleave(num_latents, 1)
        adapters = self.lora if self.settings.coprocessor == "lora" else None
        hidden_BQD, _ = (self.copy if self.settings.coprocessor == "copy" else model)(
            None,
            block_mask(places.reads_BNS[:, :, None].expand(-1, -1, num_latents, -1)),
            position_BN,
            None,
            Extended(cache, back=position_BN.new_zeros(1, 1, 1, 1), adapters=adapters),
            embeds_BSD=queries_MD.repeat(batch, num_places, 1),
        )
        return hidden_BQD.unflatten(1, (num_places, num_latents))

    def augment(
        self, model: nn.Module, cache, input_B1: Tensor, mask: Tensor | None, position_B1: Tensor, seen_BS
    ) -> None:
        """Give a cache the latents for what it holds and one token more, which is left for the caller to compute.

        model: the `PragnosiaModel`. mask: attention's, for that token. seen_BS: [B, S], that token included, 0
        where one is padding; None: all are real. Latents that the cache has are replaced.
        """
        hold_states(cache, len(model.layers))
        whole = Extended(cache, grows=True)
        model(input_B1, mask, position_B1, None, whole)
        keys_BGSC = whole.layers[0].keys
        if seen_BS is None:
            seen_BS = keys_BGSC.new_ones(keys_BGSC.shape[0], keys_BGSC.shape[2], dtype=torch.int64)
        position_BS = (seen_BS.cumsum(1) - seen_BS.sum(1, keepdim=True) + position_B1).clamp(min=0)
        reads_B1S, newest = seen_BS[:, None] > 0, slice(-self.settings.max_cache_length, None)
        read = Extended(whole)
        for layer in read.layers:
            layer.keys, layer.values = layer.keys[:, :, newest], layer.values[:, :, newest]
        last_B1 = torch.full_like(position_B1, read.layers[0].keys.shape[2] - 1)
        places = Places(last_B1, position_B1, reads_B1S[..., newest])
        latents_BMD = self(model, read, places, position_BS[:, newest])[:, 0]

        num_latents, length = latents_BMD.shape[1], keys_BGSC.shape[2]
        back_S = torch.arange(length - 1, -1, -1, device=seen_BS.device)
        places_M = back_S.new_zeros(num_latents)
        back = torch.cat((back_S, places_M)).expand(num_latents, -1)[None, None]
        computed = Extended(whole, grows=True, back=back)
        model(
            None, block_mask(reads_B1S[:, :, None].expand(-1, -1, num_latents, -1)),
            position_B1.expand(-1, num_latents), None, computed, embeds_BSD=latents_BMD,
        )  # fmt: skip
        for layer, by_now in zip(cache.layers, computed.layers, strict=True):
            layer.states["latent_keys"] = by_now.keys[:, :, length:]
            layer.states["latent_values"] = by_now.values[:, :, length:]


def cache_of_traces(config, last_BN: Tensor) -> DynamicCache:
    """For the pass over rows before `trace_losses`: memories keep what they are around each trace's last token."""
    cache = DynamicCache()
    hold_states(cache, config.num_hidden_layers)
    for layer_idx in config.memory_layers():
        cache.layers[layer_idx].states["traces"] = last_BN
    return cache


def block_mask(sees_BNQS: Tensor, bias_QQ: Tensor | None = None) -> Tensor:
    """[B, 1, N·Q, S + N·Q]: query q of block n sees entries of the cache, and what comes before it in its block.

    Bool, or with bias_QQ, added to the logits within a block, in its dtype.
    """
    _, blocks, length, entries = sees_BNQS.shape
    sees_own = torch.block_diag(*sees_BNQS.new_ones(blocks, length, length).tril())
    mask = torch.cat((sees_BNQS.flatten(1, 2), sees_own.expand(len(sees_BNQS), -1, -1)), dim=2)[:, None]
    if bias_QQ is None:
        return mask
    logits = torch.zeros_like(mask, dtype=bias_QQ.dtype)
    logits[..., entries:] += bias_QQ.repeat(blocks, blocks)
    return logits.masked_fill(~mask, -torch.inf)


def trace_losses(
    model: nn.Module, cache, context_BSD: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the coprocessor learns from: the summed loss of ahead tokens, the readout's, and sums to report.

    The readout asks the model's own norm and head for the next token from a trace's last latent: a gradient that
    need not find its way through the model first.

    Args:
        model: a `PragnosiaForCausalLM` with a coprocessor.
        cache: that of `cache_of_traces`, filled with the rows. context_BSD: their final hidden states.
        batch: input_ids, document_ids and position_ids [B, S]; traces [B, N], the last token that the latents of
            a trace have read; ahead_labels [B, N, A], the targets after it, −100 where there is none.
    """
    settings: CacheConfig = model.cache.settings
    last_BN, labels_BNA, documents_BS = batch["traces"], batch["ahead_labels"], batch["document_ids"]
    (_, num_traces, ahead), (_, length) = labels_BNA.shape, documents_BS.shape
    back_BNS = last_BN[..., None] - torch.arange(length, device=last_BN.device)
    same_BNS = documents_BS.take_along_dim(last_BN, 1)[..., None] == documents_BS[:, None]
    places = Places(
        last_BN,
        batch["position_ids"].take_along_dim(last_BN, 1),
        same_BNS & (back_BNS >= 0) & (back_BNS < settings.max_cache_length),
    )
    latents_BNMD = model.cache(model.model, cache, places, batch["position_ids"])
    num_latents = latents_BNMD.shape[2]

    # A block: the latents, then the trace's last token, now with latents in view, and the tokens after it.
    steps_A = torch.arange(ahead, device=last_BN.device)
    index_BA = (last_BN[..., None] + steps_A).clamp(max=length - 1).flatten(1)
    tokens_BAD = model.model.embed_tokens(batch["input_ids"].take_along_dim(index_BA, 1))
    block_BNQD = torch.cat((latents_BNMD, tokens_BAD.unflatten(1, (num_traces, ahead))), dim=2)
    is_token_Q = torch.arange(num_latents + ahead, device=last_BN.device) >= num_latents
    steps_Q = torch.cat((steps_A.new_zeros(num_latents), steps_A))
    back_BNQS = back_BNS[:, :, None] + steps_Q[:, None]
    sees_BNQS = same_BNS[:, :, None] & (back_BNQS >= (steps_Q + is_token_Q)[:, None])
    bias_QQ, back = None, None
    if settings.retrieval_factor != 1:
        bias_QQ = block_BNQD.new_zeros(len(steps_Q), len(steps_Q))
        bias_QQ[num_latents:, :num_latents] = math.log(settings.retrieval_factor)
    if any(layer.self_attn.window is not None for layer in model.model.layers):
        own_QQ = (steps_Q[:, None] - steps_Q).where(is_token_Q, 0)  # latents are near for all
        own = own_QQ.repeat(num_traces, num_traces).expand(len(last_BN), -1, -1)
        back = torch.cat((back_BNQS.flatten(1, 2), own), dim=2)[:, None]
    hidden_BQD, _ = model.model(
        None,
        block_mask(sees_BNQS, bias_QQ),
        (places.position_BN[..., None] + steps_Q).flatten(1),
        None,
        Extended(cache, back=back),
        embeds_BSD=block_BNQD.flatten(1, 2),
    )
    ahead_BNAD = hidden_BQD.unflatten(1, (num_traces, -1))[:, :, num_latents:]

    def loss_sum(hidden: Tensor, labels: Tensor) -> Tensor:
        return model.lm_head(hidden[labels != -100], labels[labels != -100])

    ahead_sum = loss_sum(ahead_BNAD, labels_BNA)
    readout_sum = loss_sum(model.model.norm(latents_BNMD[:, :, -1]), labels_BNA[..., 0])
    report = {"ahead_loss": (ahead_sum, labels_BNA), "readout_loss": (readout_sum, labels_BNA[..., 0])}
    if not model.training:
        base_BNAD = context_BSD.take_along_dim(index_BA[..., None], 1).unflatten(1, (num_traces, ahead))
        report["base_loss"] = loss_sum(base_BNAD, labels_BNA), labels_BNA
        for place in (place for place in REPORTED if place <= ahead):
            at = labels_BNA[..., place - 1]
            report[f"loss_at_{place}"] = loss_sum(ahead_BNAD[:, :, place - 1], at), at
            report[f"base_loss_at_{place}"] = loss_sum(base_BNAD[:, :, place - 1], at), at
    sums = {
        f"cache/{name}": torch.stack((total.detach(), (labels != -100).sum().float()))
        for name, (total, labels) in report.items()
    }
    return ahead_sum, READOUT_WEIGHT * ahead * readout_sum, sums
