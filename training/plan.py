"""What a run will be, decided before anything is built: device, precision, placement, JSON, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experts import default_page_size
from training import deepspeed_config
from training.config import TrainingArguments, UserError
from training.estimate import MemoryEstimate, estimate

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

FIT = 0.9  # share of a GPU's memory that the estimate may fill before experts move to the host


@dataclass(frozen=True)
class Plan:
    """A resolved run. `page_size` is None where experts are not paged."""

    config: PragnosiaConfig
    device: str
    precision: str
    placement: str
    page_size: int | None
    json_path: Path
    ds_config: dict
    memory: MemoryEstimate
    world_size: int

    def lines(self, args: TrainingArguments, max_length: int) -> list[str]:
        """The plan for a person."""
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        pages = f", pages of {self.page_size} experts" if self.page_size else ""
        return [
            f"model       {self.config.num_params() / 1e6:,.1f}M parameters, "
            + f"{self.config.active_params() / 1e6:,.1f}M active; "
            + f"{self.config.num_experts} experts, {self.config.num_experts_per_tok} active",
            f"placement   {self.placement}{pages}; {self.json_path.name} "
            f"(ZeRO stage {self.ds_config['zero_optimization']['stage']}); "
            f"{self.precision} on {self.world_size} x {self.device}",
            f"batch       {micro} rows x {accumulation} microbatches x {self.world_size} ranks = "
            f"{micro * accumulation * self.world_size} rows of {max_length} tokens a step",
            f"memory      about {self.memory}",
        ]


def resolve_device(requested: str | None) -> str:
    """cuda or cpu.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA GPU here; use --device cpu or install a CUDA build"
        )
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def make_plan(
    config: PragnosiaConfig,
    args: TrainingArguments,
    *,
    size: str,
    max_length: int,
    device: str,
    world_size: int,
) -> Plan:
    """Resolve a run; `size` names the preset whose JSON is the default.

    Raises:
        UserError: settings that contradict each other.
    """
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    page_size = args.expert_page_size or default_page_size(config.num_experts)
    if config.num_experts % page_size:
        raise UserError(f"--expert-page-size {page_size} does not divide {config.num_experts} experts")
    nodes = int(os.environ.get("CROSS_SIZE", "1"))  # set by the launcher
    preset = size if size in deepspeed_config.NOMINAL_PARAMETERS else deepspeed_config.nearest_preset(
        config.num_params()
    )  # fmt: skip

    def attempt(placement: str) -> Plan:
        path = args.deepspeed_config or deepspeed_config.default_path(
            preset, placement, device, world_size, nodes
        )
        ds_config = deepspeed_config.load(
            path, args, placement=placement, precision=precision, world_size=world_size
        )
        deepspeed_config.check_nvme(ds_config)
        memory = estimate(
            config,
            ds_config,
            placement=placement,
            page_size=page_size,
            precision=deepspeed_config.precision_of(ds_config),
            micro_batch_size=args.per_device_train_batch_size,
            max_length=max_length,
            checkpointing=args.gradient_checkpointing,
            world_size=world_size,
        )
        return Plan(
            config, device, deepspeed_config.precision_of(ds_config), placement,
            page_size if placement == "zero3" else None, Path(path), ds_config, memory, world_size,
        )  # fmt: skip

    if args.requested_placement != "auto":
        return attempt(args.requested_placement)
    if args.deepspeed_config:
        return attempt(deepspeed_config.placement_of(args.deepspeed_config))
    plan = attempt("resident")
    return plan if plan.memory.device <= FIT * _device_memory(device) else attempt("zero3")


def _device_memory(device: str) -> float:
    """Bytes of the first GPU; without a GPU, experts have nowhere to be moved to."""
    if device == "cpu":
        return float("inf")
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory)
