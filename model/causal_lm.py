"""The decoder and its causal language-model head, as `transformers` models."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import ModelOutput

from experts.page import ExpertPage
from model.answers import AnswerMethods
from model.attention import Attention, RMSNorm, rotary
from model.cache_augmentation import Coprocessor, cache_of_traces, trace_losses
from model.capacity import drops
from model.config import PragnosiaConfig
from model.extended_cache import Extended
from model.generation_cache import detach, hold_states
from model.head import LanguageModelHead
from model.memory import NeuralMemory, ShortConvolution, memory_sums
from model.moe import BuildBank, MoEBlock, ResidentBank
from model.router import Router
from model.step_routing import PoolChoice
from model.value_head import ValueHead, value_loss


@dataclass
class CausalLMOutput(ModelOutput):
    """What `PragnosiaForCausalLM` returns.

    loss: the objective, see `forward`. loss_sum: fp32 sum of cross entropy over this batch's targets.
    balance_loss, z_loss: this batch's auxiliary losses, a mean over real tokens and layers, without coefficients.
    router_entropy: mean over real tokens and layers, nats. load_LE: rows of real tokens, a layer and expert.
    logits: [B, S or logits_to_keep, V], only when no labels are given. step_values: fp32 [B, the same], those of
    the value head, only when they are asked for. component_sums: what a component or a capacity reports, name ->
    fp32 [2] without gradient: a sum, and the count that makes it a mean.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    logits: Tensor | None = None
    step_values: Tensor | None = None
    past_key_values: DynamicCache | None = None
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    router_entropy: Tensor | None = None
    load_LE: Tensor | None = None
    component_sums: dict[str, Tensor] | None = None


class LayerStatistics(NamedTuple):
    """`RouterStatistics` of a layer, and where it has a memory the statistics of that."""

    balance_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor
    load_E: Tensor
    memory_32: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm attention, beside it a memory in some layers, then pre-norm Mixture of Experts, each added to the
    residual stream."""

    def __init__(self, config: PragnosiaConfig, layer_idx: int, build_bank: BuildBank):
        super().__init__()
        has_memory = layer_idx in config.memory_layers()
        self.self_attn = Attention(config, layer_idx, config.memory["window"] if has_memory else None)
        self.memory = NeuralMemory(config, layer_idx) if has_memory else None
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
        documents_BM: Tensor | None,
        checkpointing: bool = False,
    ) -> tuple[Tensor, LayerStatistics]:
        """The layer's output and its statistics.

        With `checkpointing` it keeps its input alone (D values a token) and is recomputed in backward: reentrant,
        because ZeRO-3 releases a weight after the recomputed forward and fetches it again only for a backward
        through a graph that the recompute has built. A bank that recomputes by itself leaves its first pass for
        the second, lest its weights travel once more: in an object, for DeepSpeed's hooks hand on copies of lists.
        """
        choice = PoolChoice(hidden_BSD.shape[0], mask, cache, self.self_attn.layer_idx)
        inputs = hidden_BSD, rotary_BSC, mask, valid_T, cache, documents_BM, choice
        if not checkpointing:
            hidden_BSD, *statistics = self.compute(*inputs)
            return hidden_BSD, LayerStatistics(*statistics)
        first = (SimpleNamespace(visit=None),) if getattr(self.mlp.experts, "recomputes", False) else ()
        draws = self.memory is not None  # random numbers: the same ones again
        hidden_BSD, *statistics = checkpoint(
            self.compute, *inputs, *first, use_reentrant=True, preserve_rng_state=draws
        )
        return hidden_BSD, LayerStatistics(*statistics)

    def compute(
        self, hidden_BSD: Tensor, rotary_BSC, mask, valid_T, cache, documents_BM, choice: PoolChoice, *first
    ) -> tuple[Tensor, ...]:
        """The layer's output and, flat, its statistics.

        Those are outputs, not side effects: a recompute does not count them again. Nothing but a sum follows the
        bank, so backward does not need what it returns.
        """
        input_BSD, memory_statistics = self.input_layernorm(hidden_BSD), []
        added_BSD = self.self_attn(input_BSD, rotary_BSC, mask, cache)
        if self.memory is not None:
            read_BSD, *memory_statistics = self.memory(input_BSD, hidden_BSD, documents_BM, cache)
            added_BSD = added_BSD + read_BSD
        hidden_BSD = hidden_BSD + added_BSD
        hidden_TD = self.post_attention_layernorm(hidden_BSD).flatten(0, 1)
        expert_TD, statistics = self.mlp(hidden_TD, valid_T, choice, *first)
        return hidden_BSD + expert_TD.view_as(hidden_BSD), *statistics, *memory_statistics


class PragnosiaPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what `transformers` asks of a model class."""

    config_class = PragnosiaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ("DecoderLayer",)

    def post_init(self) -> None:
        # By name: a component without parameters of its own never meets `_init_weights`.
        self.silent = {module for name, module in self.named_modules() if name.endswith("out_proj")}
        memories = [module for module in self.modules() if isinstance(module, NeuralMemory)]
        self.begins_as = {memory.k_proj: memory.q_proj for memory in memories}
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Norms 1; matrices normal with `initializer_range`; counts, biases and what components end in 0. Keys and
        convolutions of memories as in `model/memory.py`."""
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding | Router | ExpertPage):
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" or module in self.silent:
                    nn.init.zeros_(parameter)
                elif module in self.begins_as:
                    initialization.copy_(parameter, self.begins_as[module].weight)
                else:
                    nn.init.normal_(parameter, std=self.config.initializer_range)
            for count in module.buffers(recurse=False):
                nn.init.zeros_(count)
        elif isinstance(module, ShortConvolution) and module.weight.dim() > 1:  # not partitioned
            initialization.copy_(module.weight, module.first_weight(module.weight.shape))


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
        self,
        input_ids: Tensor | None,
        mask: Tensor | None,
        position_ids: Tensor,
        valid_T: Tensor | None,
        cache,
        documents_BM: Tensor | None = None,
        embeds_BSD: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerStatistics]]:
        """Final hidden states [B, S, D] of tokens, or of what stands in their place; each layer's statistics."""
        has_states = self.config.routing == "step" or self.config.memory or self.config.cache
        is_view = isinstance(cache, Extended)
        if cache is not None and has_states and not is_view:
            hold_states(cache, len(self.layers))
        hidden_BSD = self.embed_tokens(input_ids) if embeds_BSD is None else embeds_BSD
        rotary_BSC = rotary(position_ids, self.config.head_dim, self.config.rope_theta, hidden_BSD.dtype)
        statistics = []
        # A recompute would find the cache further on than its forward did.
        checkpointing = self.gradient_checkpointing and self.training and (cache is None or is_view)
        checkpointing = checkpointing and hidden_BSD.requires_grad
        for layer in self.layers:
            hidden_BSD, layer_statistics = layer(
                hidden_BSD, rotary_BSC, mask, valid_T, cache, documents_BM, checkpointing
            )
            statistics.append(layer_statistics)
        return self.norm(hidden_BSD), statistics


class PragnosiaForCausalLM(PragnosiaPreTrainedModel, GenerationMixin, AnswerMethods):
    """Weight for weight a `Qwen3MoeForCausalLM`, with experts placed by `build_bank`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    uses_balance_loss = True

    def __init__(self, config: PragnosiaConfig, build_bank: BuildBank = ResidentBank):
        super().__init__(config)
        self.model = PragnosiaModel(config, build_bank)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.value_head = ValueHead(config.hidden_size) if config.tree else None
        self.cache = None
        if config.cache:
            is_copy = config.cache["coprocessor"] == "copy"
            self.cache = Coprocessor(config, PragnosiaModel(config, build_bank) if is_copy else None)
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
        value_labels: Tensor | None = None,
        num_value_labels: Tensor | int | None = None,
        output_values: bool = False,
        traces: Tensor | None = None,
        ahead_labels: Tensor | None = None,
        augment: bool = False,
        **_generation_kwargs,
    ) -> CausalLMOutput:
        """One forward pass.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, past + S], 0 where a token is padding; for generation.
            position_ids: [B, S]; default counts on from the cache.
            past_key_values: with labels, the cache of the segments before this one, whose gradients end here.
            labels: [B, S] int64, -100 = no target; `labels[:, t]` is predicted from position t - 1.
            document_ids: [B, past + S] int64, 0 = padding. Tokens see only their own document.
            num_targets, num_tokens: how many targets and real tokens the optimizer step has over all its
                microbatches and ranks; default this batch's own. The objective is
                    Σ cross entropy / num_targets + Σ_tokens (aux · balance + z · z_loss) / num_tokens / layers,
                a plain sum over the step's tokens, so its gradient does not depend on how they were split, but
                for the balance loss, whose shares are those of a microbatch on its rank.
            logits_to_keep: compute only this many last positions' logits; 0 = all.
            value_labels: [B, S] int64, 1 or 0 at the last token of a step that is right or wrong, else -100. A
                value head adds value_loss_weight · Σ binary cross entropy / num_value_labels to the objective.
            num_value_labels: how many of them the optimizer step has; default this batch's own.
            output_values: return `step_values` too.
            traces, ahead_labels: places where the coprocessor is trained, [B, N], and the targets after each,
                [B, N, A]. They take the place of `labels` as targets (see `model/cache_augmentation.py`).
            augment: let the coprocessor read the cache and the tokens given, and compute the last of them with its
                latents in view; only its logits are returned.
        """
        # `generate` and callers that hold a cache want it extended; training never does.
        if use_cache is None:
            use_cache = self.config.use_cache and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        augment = augment and self.config.cache["retrieval_factor"] > 0
        if augment and input_ids.shape[1] > 1:
            before = {"attention_mask": attention_mask, "position_ids": position_ids}
            before = {name: None if x is None else x[:, :-1] for name, x in before.items()}
            self.forward(input_ids[:, :-1], past_key_values=past_key_values, logits_to_keep=1, **before)
            input_ids = input_ids[:, -1:]
            position_ids = None if position_ids is None else position_ids[:, -1:]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)[None]
        position_ids = position_ids.expand_as(input_ids)
        if labels is not None and past_key_values is not None:
            detach(past_key_values)
        if traces is not None:
            past_key_values = cache_of_traces(self.config, traces)

        documents_BM, length = attention_mask if document_ids is None else document_ids, input_ids.shape[1]
        if document_ids is not None:
            mask = document_mask(document_ids, length)
            valid_T = document_ids[:, -length:].reshape(-1) > 0
        else:
            mask, valid_T = self._causal_mask(input_ids, attention_mask, past_key_values, position_ids), None
        if augment:
            self.cache.augment(self.model, past_key_values, input_ids, mask, position_ids, attention_mask)
        hidden_BSD, statistics = self.model(
            input_ids, mask, position_ids, valid_T, past_key_values, documents_BM
        )
        if labels is None:
            logits_BSV = self.lm_head(hidden_BSD[:, -logits_to_keep:])
            values_BS = self.value_head(hidden_BSD[:, -logits_to_keep:]).sigmoid() if output_values else None
            return CausalLMOutput(logits=logits_BSV, step_values=values_BS, past_key_values=past_key_values)

        component_sums = memory_sums(statistics) if self.config.memory else {}
        if traces is None:
            is_target = labels[:, 1:] != -100
            loss_sum = self.lm_head(hidden_BSD[:, :-1][is_target], labels[:, 1:][is_target])
            objective_sum = loss_sum
        else:
            is_target = ahead_labels != -100
            batch = {"input_ids": input_ids, "document_ids": document_ids, "position_ids": position_ids}
            batch |= {"traces": traces, "ahead_labels": ahead_labels}
            loss_sum, readout_sum, sums = trace_losses(self, past_key_values, hidden_BSD, batch)
            objective_sum = loss_sum + readout_sum
            component_sums |= sums
        own_tokens = input_ids.numel() if valid_T is None else valid_T.sum()
        layers = self.config.num_hidden_layers
        balance_sum = sum(layer.balance_sum for layer in statistics) / layers
        z_sum = sum(layer.z_sum for layer in statistics) / layers
        auxiliary = self.config.router_z_loss_coef * z_sum
        if self.uses_balance_loss:
            auxiliary = auxiliary + self.config.router_aux_loss_coef * balance_sum
        loss = objective_sum / at_least_one(is_target.sum() if num_targets is None else num_targets)
        loss = loss + auxiliary / at_least_one(own_tokens if num_tokens is None else num_tokens)
        if self.value_head is not None:
            value_loss_sum, sums = value_loss(self.value_head, hidden_BSD, value_labels)
            component_sums |= sums
            labelled = sums["tree/value_loss"][1] if num_value_labels is None else num_value_labels
            loss = loss + self.config.tree["value_loss_weight"] * value_loss_sum / at_least_one(labelled)
        load_LE = torch.stack([layer.load_E for layer in statistics])
        if self.training and getattr(bank := self.model.layers[0].mlp.experts, "capacity_factor", None):
            component_sums |= drops(load_LE, bank.capacity(input_ids.numel()))
        own_tokens = at_least_one(own_tokens)
        return CausalLMOutput(
            loss=loss,
            loss_sum=loss_sum,
            balance_loss=balance_sum.detach() / own_tokens,
            z_loss=z_sum.detach() / own_tokens,
            router_entropy=sum(layer.entropy_sum for layer in statistics) / layers / own_tokens,
            load_LE=load_LE,
            component_sums=component_sums or None,
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


def document_mask(document_ids: Tensor, length: int) -> Tensor:
    """[B, 1, length, S] bool, of the last `length` of S positions: t sees s ≤ t of the same document."""
    seen = document_ids.shape[1]
    causal = torch.ones(length, seen, dtype=torch.bool, device=document_ids.device).tril(seen - length)
    return ((document_ids[:, -length:, None] == document_ids[:, None, :]) & causal)[:, None]


def at_least_one(count: Tensor | int) -> Tensor | int:
    """A denominator that is safe for a batch without targets."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)
