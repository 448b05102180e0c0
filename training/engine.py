"""From a configuration to a DeepSpeed engine: process group, placed model, parameter groups, optimizer."""

from __future__ import annotations

import os
import re
import signal
import socket
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from experts.host_memory import locked_copy
from experts.placement import Placement, ordinary_placement
from experts.streamed import StreamedExperts, StreamSettings
from kernels import deepspeed_ops  # noqa: F401
from kernels.adamw import AdamW
from model import PragnosiaConfig, PragnosiaForCausalLM
from training.config import TrainingArguments, UserError
from training.gradients import offload_in_parts, take_norms_at_once
from training.plan import Plan
from training.ranks import interface_towards, rank_variables
from training.weights import Source, fill

# DeepSpeed 0.19 calls names that torch 2.13 deprecates, once a collective.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

ADAM_BETAS = (0.9, 0.95)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def start_ranks(device_type: str, local_rank: int = 0) -> Ranks:
    """Join the process group that the launcher describes; without a launcher, be the only rank.

    Raises:
        UserError: more ranks than GPUs on this machine, a port in use, a first machine that does not answer.
    """
    os.environ.update(rank_variables(os.environ))
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    if "MASTER_ADDR" not in os.environ:  # started by mpirun alone, which tells DeepSpeed through mpi4py
        deepspeed.comm.comm.mpi_discovery(int(os.environ.get("MASTER_PORT", 29500)), verbose=False)
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        signal.signal(signal.SIGUSR1, lambda *_args: signal.raise_signal(signal.SIGTERM))  # see MpiWatch
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank))
    if device_type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"rank {local_rank} of this machine finds {gpus} GPUs: start as many ranks as GPUs"
            )
        torch.cuda.set_device(local_rank)
        # DeepSpeed's offloaded weights and state, whose page-locked arrays torch would round up.
        get_accelerator()._torch_pin_memory = locked_copy
    say_what_is_compiled()
    if not torch.distributed.is_initialized():
        init_process_group("nccl" if device_type == "cuda" else "gloo")
        torch.distributed.barrier()
        unlink_shared_buffers()
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    return Ranks(torch.distributed.get_rank(), local_rank, torch.distributed.get_world_size(), device)


def say_what_is_compiled() -> None:
    """PyTorch waits for ever, and says nothing, for a process that compiles an op, also for a killed one."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root and os.environ["RANK"] == "0":
        for lock in Path(root).glob("*/lock"):
            print(
                f"{lock.parent.name} is being compiled by another process; if there is none, delete {lock}",
                flush=True,
            )


def leave_ranks() -> None:
    """At the end of a script: NCCL warns of a group that is left open. (gloo does not, and closes by itself.)"""
    if torch.distributed.get_backend() == "nccl":
        torch.distributed.destroy_process_group()


def init_process_group(backend: str, **options) -> None:
    """DeepSpeed's initialisation, given what its CPU all-reduce asks for: the number of ranks on this machine.

    On several machines gloo is told the interface that leads to the first; by itself it takes the one that has
    the host name's address, which is often the loopback.
    """
    if "LOCAL_SIZE" in os.environ:  # DeepSpeed's word for it
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])
    on_this_machine = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.environ.setdefault("LOCAL_SIZE", on_this_machine)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    is_cluster = int(on_this_machine) < int(os.environ["WORLD_SIZE"])
    if is_cluster and (interface := interface_towards(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        deepspeed.init_distributed(backend, verbose=False, **options)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {port} of {address} is in use: choose another (MASTER_PORT)") from error
        raise UserError(
            f"no answer from rank 0 at {address} port {port}: {str(error).splitlines()[0]}"
        ) from error


def unlink_shared_buffers() -> None:
    """Take away the name of this rank's CPU all-reduce buffer, 69 MB that would stay in memory after the process.

    To be called when every rank has opened it: after a barrier.
    """
    name = "deepspeed_allreduce_buffer_*_{MASTER_ADDR}_{MASTER_PORT}_{RANK}".format(**os.environ)
    for buffer in Path("/dev/shm").glob(name):
        buffer.unlink()


def build_placement(plan: Plan, args: TrainingArguments, ranks: Ranks) -> Placement:
    """Where the experts of a planned run live."""
    if plan.stream is None:
        capacity = {"capacity_factor": args.capacity_factor}
        return ordinary_placement(plan.placement, plan.page_size, plan.expert_parallel, **capacity)
    try:
        return _streamed_experts(plan, args, ranks)
    except OSError as error:
        raise UserError(f"--nvme-path {args.nvme_path}: {error.strerror}: use another disk") from error


def _streamed_experts(plan: Plan, args: TrainingArguments, ranks: Ranks) -> StreamedExperts:
    return StreamedExperts(
        plan.config,
        StreamSettings(
            page_size=plan.page_size,
            num_slots=plan.stream.num_slots,
            state=plan.stream.state,
            accumulate=args.backward_passes > 1,
            fetch_all=plan.config.routing == "token",
            max_norm=args.gradient_clip,
            adamw=AdamW(args.local_learning_rate, *ADAM_BETAS, 1e-8, args.weight_decay),
            seed=args.seed,
            disk_layers=plan.stream.disk_layers,
            nvme_path=args.nvme_path,
            frozen=args.stage == "cache",
        ),
        ranks.device,
        DTYPES[plan.precision],
        tuple(torch.distributed.new_group() for _ in range(2)) if ranks.world_size > 1 else None,
    )


def build_model(
    config: PragnosiaConfig,
    source: Source,
    ds_config: dict,
    *,
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype,
) -> PragnosiaForCausalLM:
    """The placed model with weights from `source`; it keeps the placement as `model.placement`.

    Under ZeRO-3 each module is partitioned as soon as it exists, so the whole model never stands in one place, and
    in the precision of `ds_config`: DeepSpeed 0.19 takes a dtype only where the device has fp16, else bf16.
    """
    zero3 = ds_config["zero_optimization"]["stage"] == 3
    context = deepspeed.zero.Init(config_dict_or_path=ds_config) if zero3 else nullcontext()
    with context, nullcontext() if zero3 else torch.device("meta"):
        model = PragnosiaForCausalLM(config, placement.build_bank)
    model.placement = placement
    if not zero3:
        model = model.to(dtype).to_empty(device=device)
        model.tie_weights()
    fill(model, source)
    return model


def freeze(model: nn.Module, args: TrainingArguments) -> None:
    """In stage cache the coprocessor alone learns, with --cache-joint the model too; in stage base all else."""
    for name, parameter in model.named_parameters():
        is_own = name.startswith("cache.")
        if args.stage == "cache":
            parameter.requires_grad_(is_own or (args.cache_joint and not name.startswith("value_head.")))
        elif is_own:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, args: TrainingArguments) -> list[dict]:
    """Experts that are parameters with their own learning rate; weight decay for matrices alone.

    DeepSpeed finds the ranks that own the same experts by the name of the experts' group.
    """
    groups = {
        name: {"params": [], "lr": rate, "weight_decay": decay, "name": name}
        for name, rate, decay in (
            ("dense", args.learning_rate, args.weight_decay),
            ("norms", args.learning_rate, 0.0),
            ("experts", args.local_learning_rate, args.weight_decay),
        )
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = (
            "experts"
            if ".experts." in name
            else "norms"
            if re.search(r"norm\.weight$|bias$", name)
            else "dense"
        )
        groups[kind]["params"].append(parameter)
        if hasattr(parameter, "owners"):
            groups["experts"] |= {"moe": True, "name": parameter.group_name}
    return [group for group in groups.values() if group["params"]]


def build_optimizer(groups: list[dict], ds_config: dict) -> torch.optim.Optimizer:
    """AdamW where its state lives: DeepSpeed's CPU Adam for offloaded state, torch's fused AdamW otherwise."""
    if ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        lean = ds_config["bf16"].get("bf16_optimizer_states", False)
        return DeepSpeedCPUAdam(groups, betas=ADAM_BETAS, adamw_mode=True, fp32_optimizer_states=not lean)
    return torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)


def build_engine(
    model: PragnosiaForCausalLM, args: TrainingArguments, ds_config: dict
) -> deepspeed.DeepSpeedEngine:
    """The engine that owns the model, its optimizer and its gradients from here on."""
    model.model.gradient_checkpointing = args.gradient_checkpointing
    freeze(model, args)
    optimizer = build_optimizer(parameter_groups(model, args), ds_config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if not engine.zero_optimization():
        # DeepSpeed's optimizer for bf16 and fp16 without ZeRO creates its state by a step on zero gradients, which
        # would count in Adam's bias correction. (Its weight decay, one step's, stays.)
        optimizer.state.clear()
    offload_in_parts(engine.optimizer)
    take_norms_at_once(engine.optimizer)
    model.placement.attach(engine)
    return engine


def limit_gpu_memory(limit: float, device: torch.device) -> None:
    """Let PyTorch allocate at most so many bytes on a GPU; what CUDA itself takes comes on top."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def device_with_room(device: torch.device, needed: float) -> torch.device:
    """The GPU, if so many bytes take less than 80% of what PyTorch may still ask it for, else the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = torch.cuda.get_per_process_memory_fraction(device) * total
        if needed < 0.8 * min(free, allowed - torch.cuda.memory_reserved(device)):
            return device
    return torch.device("cpu")


def set_learning_rates(engine: deepspeed.DeepSpeedEngine, args: TrainingArguments, factor: float) -> None:
    """Scale both base rates; groups keep their order through every DeepSpeed optimizer."""
    for group in (*engine.optimizer.param_groups, *engine.module.placement.groups):
        rate = args.learning_rate if group["name"] in ("dense", "norms") else args.local_learning_rate
        group["lr"] = rate * factor
