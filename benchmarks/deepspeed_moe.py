"""The baselines of DeepSpeed itself: its two expert-parallel layers, trained by the trainer's own engine and step.

autoep         `transformers`' Qwen3-MoE, whose banks and routers DeepSpeed replaces as its JSON section
               `expert_parallel` asks (preset qwen3_moe).
deepspeed.moe  the classic layer, `deepspeed.moe.layer.MoE`, in our model in place of bank and router. Its capacity
               is the largest number of rows that an expert has, so that no row is dropped.

Both have the trainer's weights, optimizer and head, and no losses of the router. Attention and norms of autoep are
those of `transformers`, causal without a mask of documents, which is its fastest way.
"""

from __future__ import annotations

import re

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

from experts.placement import ordinary_placement
from kernels.reference import RouterStatistics, swiglu
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.attention import rotary
from model.causal_lm import CausalLMOutput
from model.head import LanguageModelHead
from training import engine as trainer
from training.config import TrainingArguments
from training.export import to_qwen3_moe
from training.plan import Plan
from training.weights import Source

_EXPERT = re.compile(r"(.*\.mlp)\.moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(\w+_proj)\.weight$")


def build_engine(name: str, source: Source, plan: Plan, args: TrainingArguments, ranks: trainer.Ranks):
    """The engine of a baseline with weights from `source`, under the JSON and the precision of `plan`."""
    size, ds_config = plan.expert_parallel, plan.ds_config
    group_name = f"ep_size_{size}"
    with torch.device("meta"):
        model = Qwen3Moe(plan.config) if name == "autoep" else with_classic_layers(plan.config, size)
    model = model.to(trainer.DTYPES[plan.precision]).to_empty(device=ranks.device)
    model.tie_weights()
    if name == "autoep":
        section = {"enabled": True, "autoep_size": size, "preset_model": "qwen3_moe"}
        ds_config = ds_config | {"expert_parallel": section}
        # Nobody asks for router logits. DeepSpeed 0.19.8 cannot move what captures them in transformers 5.23, and
        # has nothing to move where none are captured.
        model._can_record_outputs = model.model._can_record_outputs = {}
    for module in model.modules():  # what `Experts` set is lost with the meta device
        if isinstance(module, Experts):
            for parameter in module.parameters():
                parameter.allreduce, parameter.group_name = False, group_name
    for parameter_name, parameter in model.named_parameters():
        if ".experts." in parameter_name:  # as `parameter_groups` knows experts that ranks share
            parameter.group_name, parameter.owners = group_name, None
    fill(model, source, plan.config.num_experts // size, ranks.rank % size)
    model.placement = ordinary_placement("resident", None)
    return trainer.build_engine(model, args, ds_config)


class Qwen3Moe(Qwen3MoeForCausalLM):
    """`transformers`' model with what `train_step` asks of ours."""

    def __init__(self, config: PragnosiaConfig):
        super().__init__(to_qwen3_moe(config))
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.model.rotary_emb = Rotary(config)
        self.tie_weights()

    def forward(self, input_ids: Tensor, labels: Tensor, num_targets: int, **_) -> CausalLMOutput:
        """As ours, without statistics of the router."""
        hidden_BSD = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        loss_sum = self.lm_head(hidden_BSD[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        nothing = loss_sum.new_zeros(())
        return CausalLMOutput(
            loss=loss_sum / num_targets,
            loss_sum=loss_sum,
            balance_loss=nothing,
            z_loss=nothing,
            router_entropy=nothing,
            load_LE=loss_sum.new_zeros(self.config.num_hidden_layers, self.config.num_experts),
        )


class Rotary(nn.Module):
    """Rotary embeddings without a buffer, which DeepSpeed would round to bf16."""

    def __init__(self, config: PragnosiaConfig):
        super().__init__()
        self.head_dim, self.theta = config.head_dim, config.rope_theta

    def forward(self, hidden_BSD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(position_ids, self.head_dim, self.theta, hidden_BSD.dtype)


def with_classic_layers(config: PragnosiaConfig, size: int) -> PragnosiaForCausalLM:
    """Our model with the classic layer for every bank and its router."""
    model = PragnosiaForCausalLM(config, lambda _: nn.Identity())
    for layer in model.model.layers:
        layer.mlp = ClassicBlock(config, size)
    return model


class ClassicBlock(nn.Module):
    """The classic layer, which routes by itself, in the place of a `MoEBlock`."""

    experts = None  # no bank of ours, which has a capacity or recomputes by itself

    def __init__(self, config: PragnosiaConfig, size: int):
        super().__init__()
        self.num_experts = config.num_experts
        self.moe = MoE(
            config.hidden_size,
            Expert(config),
            config.num_experts,
            ep_size=size,
            k=config.num_experts_per_tok,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, hidden_TD: Tensor, *_) -> tuple[Tensor, RouterStatistics]:
        """Its output, and zeros for a router's statistics."""
        output_TD, _, _ = self.moe(hidden_TD)
        zero = torch.zeros((), device=hidden_TD.device)
        return output_TD, RouterStatistics(zero, zero, zero, zero.expand(self.num_experts))


class Expert(nn.Module):
    """A SwiGLU expert."""

    def __init__(self, config: PragnosiaConfig):
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


@torch.no_grad()
def fill(model: nn.Module, source: Source, num_local: int, place: int) -> None:
    """Give every parameter its value; of experts those alone that this rank will own, `num_local` from
    `place` · `num_local` on: DeepSpeed drops the others."""
    first = place * num_local
    for name, parameter in model.named_parameters():
        if match := _EXPERT.match(name):
            bank, number, projection = match.groups()
            shape = torch.Size((1, *parameter.shape))
            parameter.copy_(source(f"{bank}.experts.{projection}", shape, first + int(number))[0])
        elif name.endswith("experts.gate_up_proj"):
            bank, half = name.removesuffix("gate_up_proj"), parameter.shape[1] // 2
            shape = torch.Size((num_local, half, parameter.shape[2]))
            for side, rows in (("gate_proj", slice(None, half)), ("up_proj", slice(half, None))):
                parameter[first : first + num_local, rows] = source(bank + side, shape, first)
        elif name.endswith("experts.down_proj"):
            shape = torch.Size((num_local, *parameter.shape[1:]))
            parameter[first : first + num_local] = source(name, shape, first)
        else:
            name = name.replace("moe.deepspeed_moe.gate.wg.", "gate.")
            parameter.copy_(source(name, parameter.shape, None))


@torch.no_grad()
def dropped_rows(engine, batch: dict[str, Tensor]) -> int:
    """Routed rows of this rank's batch that the classic layers leave out in a forward; collective."""
    dropped = []

    def count(_gate, _inputs, output) -> None:
        experts_KT = output[3]  # negative where there was no room
        dropped.append(int((experts_KT < 0).sum()))

    gates = [module for module in engine.module.modules() if isinstance(module, TopKGate)]
    hooks = [gate.register_forward_hook(count) for gate in gates]
    engine.module(**{name: value.to(engine.device) for name, value in batch.items()})
    for hook in hooks:
        hook.remove()
    assert len(dropped) == len(gates)
    return sum(dropped)
