"""The decoder and its causal language-model head, as `transformers` models."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput

from experts.page import ExpertPage
from kernels.reference import RouterStatistics, Routing
from model.attention import Attention, RMSNorm, rotary
from model.config import PragnosiaConfig
from model.head import LanguageModelHead
from model.moe import BuildBank, MoEBlock, ResidentBank
from model.router import Router
from model.step_routing import PoolChoice, hold_sums


@dataclass
class CausalLMOutput(ModelOutput):
    """What `PragnosiaForCausalLM` returns.

    loss: the objective, see `forward`. loss_sum: fp32 sum of cross entropy over this batch's targets.
    balance_loss, z_loss: this batch's auxiliary losses, a mean over real tokens and layers, without coefficients.
    router_entropy: mean over real tokens and layers, nats. load_LE: rows of real tokens, a layer and expert.
    logits: [B, S or logits_to_keep, V], only when no labels are given. component_sums: what a component reports,
    name -> fp32 [2] without gradient: a sum, and the count that makes it a mean.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: DynamicCache | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_entropy: Tensor | None = None
    load_LE: Tensor | None = None
    component_sums: dict[str, Tensor] | None = None


class DecoderLayer(nn.Module):
    """Pre-norm attention, then pre-norm Mixture of Experts, each added to the residual stream."""

    def __init__(self, config: PragnosiaConfig, layer_idx: int, build_bank: BuildBank):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MoEBlock(config, build_bank)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        rotary_BSC: tuple[Tensor, Tensor],
        mask: Tensor | None,
        valid_T: Tensor | None,
        cache,
        checkpointing: bool = False,
    ) -> tuple[Tensor, RouterStatistics]:
        """The layer's output and its router's statistics.

        With `checkpointing` each half keeps its input alone (2 D values a token in all) and is recomputed in
        backward. A bank that recomputes by itself is left alone: its weights would travel once more.
        """
        run = recomputed if checkpointing else call
        choice = PoolChoice(hidden_BSD.shape[0], mask, cache, self.self_attn.layer_idx)
        hidden_BSD, hidden_TD, *rest = run(
            self.attend_and_route, hidden_BSD, rotary_BSC, mask, valid_T, cache, choice
        )
        routing, statistics = rest[: len(Routing._fields)], rest[len(Routing._fields) :]
        run = call if getattr(self.mlp.experts, "recomputes", False) else run
        expert_TD = run(self.mlp, hidden_TD, *routing)
        return hidden_BSD + expert_TD.view_as(hidden_BSD), RouterStatistics(*statistics)

    def attend_and_route(
        self, hidden_BSD: Tensor, rotary_BSC: tuple[Tensor, Tensor], mask, valid_T, cache, choice: PoolChoice
    ) -> tuple[Tensor, ...]:
        """The residual stream after attention, the bank's input [T, D], routing and statistics, all flat.

        Statistics are outputs, not side effects: a recompute does not count them again.
        """
        hidden_BSD = hidden_BSD + self.self_attn(self.input_layernorm(hidden_BSD), rotary_BSC, mask, cache)
        hidden_TD = self.post_attention_layernorm(hidden_BSD).flatten(0, 1)
        routing, statistics = self.mlp.gate(hidden_TD, valid_T, choice)
        return hidden_BSD, hidden_TD, *routing, *statistics


def call(function, *inputs):
    """function(*inputs)."""
    return function(*inputs)


def recomputed(function, *inputs):
    """function(*inputs), keeping only its inputs for backward.

    Reentrant, because ZeRO-3 releases a weight after the recomputed forward and fetches it again only for a
    backward through a graph that the recompute has built.
    """
    return checkpoint(function, *inputs, use_reentrant=True, preserve_rng_state=False)


class PragnosiaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what `transformers` asks of a model class."""

    config_class = PragnosiaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DecoderLayer",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Norms 1; every matrix normal with `initializer_range`; counts 0."""
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding | Router | ExpertPage):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)
            for count in module.buffers(recurse=False):
                nn.init.zeros_(count)


class PragnosiaModel(PragnosiaPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: PragnosiaConfig, build_bank: BuildBank = ResidentBank):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, build_bank) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor, valid_T: Tensor | None, cache
    ) -> tuple[Tensor, list[RouterStatistics]]:
        if cache is not None and self.config.routing == "step":
            hold_sums(cache, len(self.layers))
        hidden_BSD = self.embed_tokens(input_ids)
        rotary_BSC = rotary(position_ids, self.config.head_dim, self.config.rope_theta, hidden_BSD.dtype)
        statistics = []
        checkpointing = self.gradient_checkpointing and self.training
        for layer in self.layers:
            hidden_BSD, layer_statistics = layer(hidden_BSD, rotary_BSC, mask, valid_T, cache, checkpointing)
            statistics.append(layer_statistics)
        return self.norm(hidden_BSD), statistics


class PragnosiaForCausalLM(PragnosiaPreTrainedModel, GenerationMixin):
    """Weight for weight a `Qwen3MoeForCausalLM`, with experts placed by `build_bank`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PragnosiaConfig, build_bank: BuildBank = ResidentBank):
        super().__init__(config)
        self.model = PragnosiaModel(config, build_bank)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        use_cache: bool | None = None,
        num_targets: Tensor | int | None = None,
        num_tokens: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **_generation_kwargs,
    ) -> CausalLMOutput:
        """One forward pass.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, past + S], 0 where a token is padding; for generation.
            position_ids: [B, S]; default counts on from the cache.
            labels: [B, S] int64, -100 = no target; `labels[:, t]` is predicted from position t - 1.
            document_ids: [B, S] int64, 0 = padding. Tokens see only their own document.
            num_targets, num_tokens: how many targets and real tokens the optimizer step has over all its
                microbatches and ranks; default this batch's own. The objective is
                    Σ cross entropy / num_targets + Σ_tokens (aux · balance + z · z_loss) / num_tokens / layers,
                a plain sum over the step's tokens, so its gradient does not depend on how they were split, but
                for the balance loss, whose shares are those of a microbatch on its rank.
            logits_to_keep: compute only this many last positions' logits; 0 = all.
        """
        # `generate` and callers that hold a cache want it extended; training never does.
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        position_ids = position_ids.expand_as(input_ids)

        if document_ids is not None:
            mask, valid_T = document_mask(document_ids), document_ids.reshape(-1) > 0
        else:
            mask, valid_T = self._causal_mask(input_ids, attention_mask, past_key_values, position_ids), None
        hidden_BSD, statistics = self.model(input_ids, mask, position_ids, valid_T, past_key_values)
        if labels is None:
            logits_BSV = self.lm_head(hidden_BSD[:, -logits_to_keep:])
            return CausalLMOutput(logits=logits_BSV, past_key_values=past_key_values)

        is_target_BS = labels[:, 1:] != -100
        loss_sum = self.lm_head(hidden_BSD[:, :-1][is_target_BS], labels[:, 1:][is_target_BS])
        own_tokens = input_ids.numel() if valid_T is None else valid_T.sum()
        layers = self.config.num_hidden_layers
        balance_sum = sum(layer.balance_sum for layer in statistics) / layers
        z_sum = sum(layer.z_sum for layer in statistics) / layers
        auxiliary = self.config.router_aux_loss_coef * balance_sum + self.config.router_z_loss_coef * z_sum
        loss = loss_sum / at_least_one(is_target_BS.sum() if num_targets is None else num_targets)
        loss = loss + auxiliary / at_least_one(own_tokens if num_tokens is None else num_tokens)
        own_tokens = at_least_one(own_tokens)
        return CausalLMOutput(
            loss=loss,
            loss_sum=loss_sum,
            balance_loss=balance_sum.detach() / own_tokens,
            z_loss=z_sum.detach() / own_tokens,
            router_entropy=sum(layer.entropy_sum for layer in statistics) / layers / own_tokens,
            load_LE=torch.stack([layer.load_E for layer in statistics]),
        )

    def _causal_mask(self, input_ids, attention_mask, cache, position_ids) -> Tensor | None:
        inputs_embeds = self.model.embed_tokens.weight.new_empty((*input_ids.shape, 0))
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )


def document_mask(document_ids: Tensor) -> Tensor:
    """[B, 1, S, S] bool: position t sees position s ≤ t of the same document."""
    length = document_ids.shape[1]
    causal_SS = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ((document_ids[:, :, None] == document_ids[:, None, :]) & causal_SS)[:, None]


def at_least_one(count: Tensor | int) -> Tensor | int:
    """A denominator that is safe for a batch without targets."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
