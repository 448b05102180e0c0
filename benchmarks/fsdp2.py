"""The baseline of torch itself: FSDP2 with `CPUOffloadPolicy` under the trainer's own model and step.

Weights, gradients and AdamW live on the CPU; FSDP2 fetches a unit (each bank, or each page of one, each layer,
and what is left) before it runs and drops it after. Two precisions, both computing in bf16 on a GPU: fp32 keeps
weights and state in fp32, bf16 keeps both in bf16.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from experts.page import ExpertPage
from experts.placement import ordinary_placement
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.causal_lm import DecoderLayer
from training import engine as trainer
from training.config import TrainingArguments
from training.weights import Source, fill


class Fsdp2Engine:
    """What `train_step` asks of a DeepSpeed engine."""

    def __init__(
        self, model: PragnosiaForCausalLM, optimizer: torch.optim.Optimizer, device, max_norm: float
    ):
        self.module, self.optimizer, self.device, self.max_norm = model, optimizer, device, max_norm
        self.norm: Tensor | None = None

    def __call__(self, **batch):
        return self.module(**batch)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        assert is_boundary, "the baseline takes one microbatch a step"

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def zero_optimization(self) -> bool:
        return True  # its gradients are sharded, as under ZeRO

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float | None:
        return None if self.norm is None else float(self.norm.full_tensor())


def start_ranks(device: str) -> trainer.Ranks:
    """As the trainer's, with collectives for what lies on the CPU too; the environment names the rank."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return trainer.start_ranks(device)


def build_engine(
    config: PragnosiaConfig, source: Source, device: torch.device, page_size: int | None, state: torch.dtype
) -> Fsdp2Engine:
    """The sharded model with weights from `source`. page_size: experts of a unit; None: the bank is one."""
    placement = ordinary_placement("zero3" if page_size else "resident", page_size)
    with torch.device("meta"):
        model = PragnosiaForCausalLM(config, placement.build_bank)
    model = model.to(state).to_empty(device="cpu")
    model.tie_weights()
    model.placement = placement
    fill(model, source)
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None, cast_forward_inputs=False
    )
    settings = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": mixed,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    }
    for kind in (ExpertPage, DecoderLayer):
        for module in model.modules():
            if isinstance(module, kind):
                fully_shard(module, **settings)
    fully_shard(model, **settings)
    args = TrainingArguments()
    optimizer = torch.optim.AdamW(trainer.parameter_groups(model, args), betas=trainer.ADAM_BETAS, fused=True)
    return Fsdp2Engine(model, optimizer, device, args.gradient_clip)
