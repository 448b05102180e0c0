"""What a run will be, decided before anything is built: device, precision, placement, JSON, memory."""

from __future__ import annotations

import copy
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experts import default_page_size
from experts.budget import automatic_budget, bytes_per_value, choose_pages, device_bytes
from training import deepspeed_config
from training.checkpoint import read_state
from training.config import DataArguments, TrainingArguments, UserError, parse_size
from training.estimate import CPU_PROCESS, PROCESS, MemoryEstimate, StreamPlan, estimate

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

STREAM_NEEDS_STEPS = "--streaming needs --max-steps: the length of a stream is not known beforehand"
FIT = 0.9  # share of a GPU's memory that the estimate may fill before experts move to the host


@dataclass(frozen=True)
class Plan:
    """A resolved run. `page_size` is None where experts are not paged."""

    config: PragnosiaConfig
    device: str
    precision: str
    placement: str
    page_size: int | None
    stream: StreamPlan | None
    json_path: Path
    ds_config: dict
    memory: MemoryEstimate
    world_size: int
    idle_flags: tuple[str, ...] = ()
    """What was set for experts in host memory, when it turned out that they fit on the GPU."""
    expert_parallel: int = 1
    """Ranks that share the experts of a layer; 1 where each has all of them."""

    def lines(self, args: TrainingArguments, max_length: int) -> list[str]:
        """The plan for a person."""
        micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        pages = f", pages of {self.page_size} experts" if self.page_size else ""
        if self.stream:
            pages += f" in {self.stream.num_slots} slots, {self.stream.state} optimizer state"
        if self.stream and self.stream.disk_layers:
            pages += f", {self.stream.disk_layers} layers ({self.stream.disk / 1e9:,.2f} GB) on the disk"
        shared = f", shared by groups of {self.expert_parallel} ranks" * (self.expert_parallel > 1)
        shared += f", capacity factor {args.capacity_factor}" if args.capacity_factor and shared else ""
        return [
            f"model       {self.config.num_params() / 1e6:,.1f}M parameters, "
            + f"{self.config.active_params() / 1e6:,.1f}M active; "
            + f"{self.config.num_experts} experts, {self.config.num_experts_per_tok} active"
            + (f" of a pool of {self.config.expert_pool}" if self.config.routing == "step" else ""),
            f"placement   {self.placement}{pages}{shared}; {self.json_path.name} "
            f"(ZeRO stage {self.ds_config['zero_optimization']['stage']}); "
            f"{self.precision} on {self.world_size} x {self.device}",
            f"batch       {micro} rows x {accumulation} microbatches x {self.world_size} ranks = "
            f"{micro * accumulation * self.world_size} rows of {max_length} tokens a step"
            + (f", each in {args.segments} segments" if args.segments > 1 else ""),
            f"memory      about {self.memory}",
            *(f"note        {flag} has no effect: experts fit in GPU memory" for flag in self.idle_flags),
        ]

    def layout(self, args: TrainingArguments) -> dict:
        """What a checkpoint is bound to: its run goes on in no other."""
        from training.components import components_of

        return {
            "placement": self.placement,
            "zero_stage": self.ds_config["zero_optimization"]["stage"],
            "precision": self.precision,
            "expert_state": self.stream.state if self.stream else None,
            "router_bias": self.config.router_bias,
            "components": components_of(self.config),
            "stage": args.stage,
            "cache_joint": args.cache_joint,
        }


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


def plan_run(
    model: PragnosiaConfig,
    args: TrainingArguments,
    data_args: DataArguments,
    *,
    is_trained: bool,
    resume_from: Path | None,
    size: str,
    device: str,
    world_size: int,
    **components,
) -> Plan:
    """The plan of a run, after every check that needs no data, no weights and no other rank.

    Args:
        model: what the run starts from; `config` of the plan is a copy with what `args` and `components` (see
            `add_components`) make of it.
        is_trained: whether that has weights.
        resume_from: the checkpoint that the run goes on from.

    Raises:
        UserError: settings that contradict each other, the model or the checkpoint.
    """
    from training.cache_stage import check_stage
    from training.components import add_components

    if data_args.streaming and args.max_steps is None:
        raise UserError(STREAM_NEEDS_STEPS)
    if data_args.max_length % args.segments or data_args.max_length == args.segments > 1:
        raise UserError(
            f"--segments {args.segments} must divide --max-length {data_args.max_length}, with two tokens each"
        )
    config = copy.deepcopy(model)
    add_components(config, args, **components)
    plan = make_plan(
        config, args, size=size, max_length=data_args.max_length, device=device, world_size=world_size
    )
    config.router_bias |= args.load_balance == "bias"  # a model that has one keeps it
    check_stage(config, args, plan.placement, given=model, is_trained=is_trained)
    if resume_from is not None:
        check_layout(resume_from, plan, args)
    return plan


def check_layout(checkpoint: Path, plan: Plan, args: TrainingArguments) -> None:
    """DeepSpeed's state can be read on other ranks, not under another placement, stage or precision, and without
    ZeRO not where another number of ranks shares the experts. Raises UserError."""
    state, layout = read_state(checkpoint), plan.layout(args)
    for name, value in layout.items():
        if state.get(name, value) != value:
            raise UserError(
                f"{checkpoint} was trained with {name.replace('_', ' ')} {state.get(name)}, this run has {value}: "
                f"resume as it was, or start a new run from its weights with --init-from"
            )
    was_shared_by = state.get("expert_parallel", 1)
    if layout["zero_stage"] == 0 and was_shared_by != plan.expert_parallel:
        can = plan.world_size % was_shared_by == 0
        again = "that size" if can else f"a multiple of {was_shared_by} ranks"
        raise UserError(
            f"{checkpoint} was trained with --expert-parallel-size {was_shared_by}, this run has "
            f"{plan.expert_parallel}, and without ZeRO that cannot change: use {again}, or --init-from"
        )


def check_fp16() -> None:
    """Raises UserError on a processor without fp16."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        raise UserError("this processor has no fp16: use --precision bf16 or fp32")


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
    check_model(config, args)
    precision = args.precision or ("bf16" if device == "cuda" else "fp32")
    nodes = math.ceil(world_size / int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    preset = size if size in deepspeed_config.NOMINAL_PARAMETERS else deepspeed_config.nearest_preset(
        config.num_params()
    )  # fmt: skip

    def attempt(placement: str, json: str | None = None) -> Plan:
        path = (
            args.deepspeed_config
            or json
            or deepspeed_config.default_path(preset, placement, device, world_size, nodes)
        )
        ds_config = deepspeed_config.load(
            path, args, placement=placement, precision=precision, world_size=world_size
        )
        deepspeed_config.check_nvme(ds_config)
        page_size, stream = None, None
        if placement == "zero3":
            page_size = args.expert_page_size or default_page_size(config.num_experts)
            if config.num_experts % page_size:
                raise UserError(
                    f"--expert-page-size {page_size} does not divide {config.num_experts} experts"
                )
        elif placement == "streamed":
            stream = plan_stream(
                config,
                args,
                deepspeed_config.precision_of(ds_config),
                world_size,
                _device_memory(device, args),
            )
            page_size = stream.page_size
        if device == "cpu" and deepspeed_config.precision_of(ds_config) == "fp16":
            check_fp16()
        expert_parallel = 1
        if placement == "resident" and has_frozen_experts(config, args):
            if (args.expert_parallel_size or 1) > 1:
                raise UserError(
                    f"--expert-parallel-size {args.expert_parallel_size}: DeepSpeed shares only experts that "
                    f"learn, and here some are frozen: leave it out"
                )
        elif placement == "resident":
            expert_parallel = deepspeed_config.resolve_expert_parallel(
                config.num_experts,
                world_size,
                args.expert_parallel_size,
                deepspeed_config.autoep_size(path),
                json_is_default=not args.deepspeed_config,
            )
        if args.capacity_factor and expert_parallel == 1 and placement == "resident":
            most = 1 if args.deepspeed_config else most_that_share(config, args, world_size)
            raise UserError(
                f"--capacity-factor {args.capacity_factor} is for GPUs that share experts, and here none do: use "
                "--capacity-factor none" + f", or --expert-parallel-size {most}" * (most > 1)
            )
        memory = estimate(
            config,
            ds_config,
            placement=placement,
            page_size=page_size,
            precision=deepspeed_config.precision_of(ds_config),
            micro_batch_size=args.per_device_train_batch_size,
            max_length=max_length,
            segments=args.segments,
            checkpointing=args.gradient_checkpointing,
            world_size=world_size,
            stream=stream,
            expert_parallel=expert_parallel,
            stage=args.stage,
            joint=args.cache_joint,
            process=PROCESS if device == "cuda" else CPU_PROCESS,
        )
        return Plan(
            config, device, deepspeed_config.precision_of(ds_config), placement, page_size, stream,
            Path(path), ds_config, memory, world_size, expert_parallel=expert_parallel,
        )  # fmt: skip

    if args.gpu_memory and device == "cpu":
        raise UserError("--gpu-memory has no effect on a CPU: use --gpu-memory none")
    placement, room = args.requested_placement, FIT * _device_memory(device, args)
    if placement == "auto" and args.deepspeed_config:
        placement = deepspeed_config.placement_of(args.deepspeed_config)
    if placement == "auto":
        plan = attempt("resident")
        if plan.memory.device <= room:  # and so within --gpu-memory
            return replace(plan, idle_flags=tuple(idle_expert_flags(args, "resident")))
        placement = "streamed"
    refuse_idle_expert_flags(config, args, placement, world_size)
    plan = attempt(placement)
    for smaller in ("streamed_offload", "streamed_zero3"):
        if placement == "streamed" and plan.memory.device > room and not args.deepspeed_config:
            plan = attempt(placement, smaller)
    if args.gpu_memory and plan.memory.device > _device_memory(device, args):
        raise UserError(
            f"--gpu-memory {args.gpu_memory}: the run needs about {plan.memory.device / 1e9:.2f} GB: raise it, or "
            f"use --gradient-checkpointing, a smaller --batch-size or --expert-vram"
        )
    return plan


def check_model(config: PragnosiaConfig, args: TrainingArguments) -> None:
    """Raises UserError where a component does not fit the model, the balance of load its routing, or either the
    exported format."""
    from training.components import COMPONENTS

    if config.routing == "step" and args.export_format == "qwen3_moe":
        raise UserError(
            "--export-format qwen3_moe: Qwen3-MoE has no expert pools; leave it out, or use --routing token"
        )
    if args.load_balance == "bias" and config.routing == "step":
        raise UserError(
            "--load-balance bias is for --routing token: --routing step balances its pools by itself; leave it out"
        )
    if (args.load_balance == "bias" or config.router_bias) and args.export_format == "qwen3_moe":
        raise UserError(
            "--export-format qwen3_moe: a Qwen3-MoE router has no bias; leave it out"
            + ("" if config.router_bias else ", or use --load-balance aux")
        )
    if args.stage == "cache" and not config.cache:
        raise UserError("--stage cache trains a coprocessor: add --use-cache-augmentation")
    try:
        config.check_components()
    except ValueError as error:
        raise UserError(str(error)) from None
    for name, (flag, _) in COMPONENTS.items():
        if getattr(config, name) and args.export_format == "qwen3_moe":
            raise UserError(
                f"--export-format qwen3_moe: Qwen3-MoE has no {name} component; leave it out, or use "
                f"--no-{flag.replace('_', '-')}"
            )


def has_frozen_experts(config: PragnosiaConfig, args: TrainingArguments) -> bool:
    """Whether some experts do not learn (see `training.engine.freeze`): the model's beside a coprocessor, or those
    of a coprocessor that began as a copy."""
    if args.stage == "cache":
        return not args.cache_joint
    return bool(config.cache) and config.cache["coprocessor"] == "copy"


def idle_expert_flags(args: TrainingArguments, placement: str) -> dict[str, str]:
    """Settings of streamed or paged experts that would have no effect, and the placements on which they have."""
    flags = (
        ("--expert-vram", args.expert_vram, "streamed"),
        ("--expert-state", args.expert_state, "streamed"),
        ("--nvme-path", args.nvme_path, "streamed"),
        ("--expert-page-size", args.expert_page_size, "streamed or zero3"),
        ("--expert-parallel-size", args.expert_parallel_size, "resident"),
        ("--capacity-factor", args.capacity_factor, "resident"),
    )
    return {
        f"{flag} {value}": placements
        for flag, value, placements in flags
        if value is not None and placement not in placements
    }


def refuse_idle_expert_flags(
    config: PragnosiaConfig, args: TrainingArguments, placement: str, world_size: int
) -> None:
    """Raises UserError for a setting of `idle_expert_flags`, with ways out that work on so many ranks."""
    # A JSON that was named may offload parameters, which experts that are shared cannot.
    most = 1 if args.deepspeed_config else most_that_share(config, args, world_size)
    for setting, placements in idle_expert_flags(args, placement).items():
        flag, others = setting.split()[0], f", or --placement {placements}"
        if placements == "resident":  # a setting of experts that are shared
            others = f"{others} --expert-parallel-size {most}" * (most > 1)
        if flag == "--nvme-path":
            flag = "--expert-store host" + " --expert-ram none" * bool(args.expert_ram) + " --nvme-path"
        raise UserError(f"{setting} has no effect on {placement} experts: use {flag} none{others}")


def most_that_share(config: PragnosiaConfig, args: TrainingArguments, world_size: int) -> int:
    """How many ranks can share the experts of a layer, at most; 1: none can."""
    return 1 if has_frozen_experts(config, args) else math.gcd(config.num_experts, world_size)


def plan_stream(
    config: PragnosiaConfig, args: TrainingArguments, precision: str, world_size: int, device_memory: float
) -> StreamPlan:
    """Page size and slots within the budget, and what they take, on GPUs of that many bytes.

    Raises:
        UserError: fp16, a page larger than the bank, or a budget that one page exceeds.
    """
    if precision == "fp16":
        raise UserError(
            "--placement streamed updates experts within backward, without a loss scale: use bf16"
        )
    state = args.expert_state or ("fp32" if precision == "fp32" else "bf16")
    sizes = {
        "state": state,
        "precision": precision,
        "accumulate": args.backward_passes > 1,
        "ranks": world_size,
    }
    if (args.expert_page_size or 0) > config.num_experts:
        raise UserError(
            f"--expert-page-size {args.expert_page_size}: a layer has {config.num_experts} experts, use fewer"
        )
    limit = parse_size("--expert-vram", args.expert_vram) if args.expert_vram else None
    chosen = choose_pages(config, limit, args.expert_page_size, **sizes)
    if limit is None:
        ample = automatic_budget(device_memory)
        chosen = choose_pages(config, ample, args.expert_page_size, **sizes) or chosen
    if chosen is None:
        page = args.expert_page_size or 1
        least = math.ceil(device_bytes(config, page, 2, **sizes) / 1e6)
        raise UserError(
            f"--expert-vram {args.expert_vram}: two pages of {page} expert{'s' * (page > 1)} take {least} MB: "
            f"use --expert-vram {least}MB" + (" or a smaller --expert-page-size" if page > 1 else "")
        )
    values = config.num_hidden_layers * config.num_experts * config.expert_params()
    frozen = args.stage == "cache"
    value = bytes_per_value(state, precision, sizes["accumulate"])
    host = values / world_size * ((4 if precision == "fp32" else 2) if frozen else value)
    plan = StreamPlan(*chosen, state, device_bytes(config, *chosen, **sizes), host)
    return plan_disk(plan, config, args, world_size) if args.expert_store == "nvme" else plan


def plan_disk(
    plan: StreamPlan, config: PragnosiaConfig, args: TrainingArguments, world_size: int
) -> StreamPlan:
    """The same with as many layers on the disk as --expert-ram has no room for.

    What a killed run left on it counts as free, since `Disk` removes it.

    Raises:
        UserError: a directory that cannot be used, no room on its disk, or none for the buffers.
    """
    from experts.host_memory import available_bytes
    from experts.nvme_store import removable_bytes

    deepspeed_config.check_nvme_path(args.nvme_path, "use another --nvme-path")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    room = available_bytes() / 2 / ranks_here
    if world_size > 1 and not args.expert_ram:
        raise UserError(
            "--expert-store nvme on several ranks needs --expert-ram: all must put the same layers on the disk"
        )
    if args.expert_ram:
        room = parse_size("--expert-ram", args.expert_ram) / ranks_here
    layer = plan.host / config.num_hidden_layers
    buffers = 2 * (plan.num_slots + 1) * plan.page_size * layer / config.num_experts
    if room < buffers:
        raise UserError(
            f"--expert-ram: buffers for pages on the disk take {math.ceil(buffers * ranks_here / 1e6)} MB: "
            f"raise it, or use a smaller --expert-page-size"
        )
    in_memory = config.num_hidden_layers
    if plan.host > room:
        in_memory = int((room - buffers) // layer)
    on_disk = config.num_hidden_layers - in_memory
    free = shutil.disk_usage(args.nvme_path).free + removable_bytes(args.nvme_path)
    if on_disk * layer * ranks_here > free:
        raise UserError(
            f"--nvme-path {args.nvme_path}: {on_disk * layer * ranks_here / 1e9:,.1f} GB of experts do not fit in "
            f"the {free / 1e9:,.1f} GB that are free: use another disk or more --expert-ram"
        )
    host = in_memory * layer + (buffers if on_disk else 0)
    return replace(plan, host=host, disk=on_disk * layer, disk_layers=on_disk)


def check_host_memory(plan: Plan, ranks_here: int) -> None:
    """Refuse a run whose streamed experts would not fit in host memory. Raises UserError."""
    from experts.host_memory import available_bytes, resident_bytes

    if plan.stream is None:
        return
    to_come = max(plan.memory.host - resident_bytes(), plan.stream.host)
    needed, free = to_come * ranks_here, available_bytes()
    if needed > free:
        cheaper = {"fp32": "--expert-state bf16", "bf16": "--expert-state int8"}.get(plan.stream.state)
        disk = "less --expert-ram" if plan.stream.disk_layers else "--expert-store nvme"
        cheaper = f"{cheaper or 'fewer --num-experts'} or {disk}"
        raise UserError(
            f"streamed experts, their optimizer state and the rest need {needed / 1e9:,.1f} GB of host memory "
            f"more, {free / 1e9:,.1f} GB are free: use {cheaper}"
        )


def _device_memory(device: str, args: TrainingArguments) -> float:
    """Bytes of the first GPU that the run may use; without a GPU, experts have nowhere to be moved to."""
    if device == "cpu":
        return float("inf")
    import torch

    return usable_memory(torch.cuda.get_device_properties(0).total_memory, args)


def usable_memory(total: float, args: TrainingArguments) -> float:
    """Bytes of a GPU's `total` that the run may use."""
    return min(total, parse_size("--gpu-memory", args.gpu_memory)) if args.gpu_memory else float(total)
