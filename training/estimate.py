"""Memory of a run before it starts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

LOSS_CHUNK = 1024  # that of model/head.py
WORKSPACE = 33.6e6  # bytes that PyTorch allocates for cuBLAS on Hopper, and at most elsewhere
# Bytes on the host of Python, PyTorch and DeepSpeed, with CUDA and without, as measured.
PROCESS, CPU_PROCESS = 2.4e9, 1.1e9


@dataclass(frozen=True)
class StreamPlan:
    """How experts are streamed: sizes, and the bytes that they take on device, host and disk, a rank."""

    page_size: int
    num_slots: int
    state: str
    device: float
    host: float
    disk: float = 0.0
    disk_layers: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each GPU (or, without one, of the process) and on the host, a rank."""

    device: float
    host: float

    def __str__(self) -> str:
        return f"{self.device / 1e9:.2f} GB device, {self.host / 1e9:.2f} GB host a rank"


def memory_bytes(config: PragnosiaConfig, weight: int) -> float:
    """What a token leaves for backward in a neural memory: values in the model's dtype and in fp32, and a chunk's
    matrices; measured in plain PyTorch, the kernels on a GPU keep less."""
    memory = config.memory
    return memory["memory_size"] * (22 * weight + 76 + 20 * memory["chunk_size"] / memory["head_dim"])


@dataclass(frozen=True)
class Pass:
    """A pass through the layers that backward goes through too, a row: the tokens that it computes, the entries of
    a cache that it sees besides, and whether the layers learn; readers: tokens more that memories go over."""

    tokens: int
    entries: int = 0
    learns: bool = True
    readers: int = 0


def passes_of(config: PragnosiaConfig, length: int, stage: str, joint: bool, segments: int = 1) -> list[Pass]:
    """In stage base the last segment of rows of that length, which sees those before. In stage cache the traces of
    a row, each with its latents and the tokens after them; the queries of a coprocessor that is a model; and,
    jointly, the rows too."""
    if stage == "base":
        return [Pass(length // segments, length - length // segments)]
    traces, latents, kind = (config.cache[name] for name in ("num_traces", "num_latents", "coprocessor"))
    passes = [Pass(traces * (latents + config.cache["num_ahead_tokens"]), length, joint)]
    if kind in ("copy", "lora", "soft"):
        passes.append(Pass(traces * latents, length, joint or kind == "copy"))
    if joint:
        passes.append(Pass(length, readers=traces * config.memory["head_dim"] if config.memory else 0))
    return passes


def activation_bytes(
    config: PragnosiaConfig, passes: list[Pass], weight: int, placement: str, checkpointing: bool
) -> float:
    """What the passes of a row leave for backward in the layers; frozen ones keep no inputs of products."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    heads = queries + config.num_key_value_heads * config.head_dim
    layers = []
    for each in passes:
        # The residual stream and its norms; queries, keys and values as projected, normed and turned, and the
        # output. A page is recomputed from its rows; a resident bank keeps what is inside its experts as well.
        a_token = (3 + each.learns) * (width + heads)
        inside = (3 + each.learns) * config.moe_intermediate_size if placement == "resident" else 0
        if placement != "streamed":
            a_token += config.num_experts_per_tok * (inside + (3 if each.learns else 1) * width)
        layers.append(each.tokens * a_token)
        if each.entries:  # keys and values of a cache for every query head, and the mask
            layers[-1] += 2 * queries * each.entries + each.tokens * (each.entries + each.tokens)
    seen = [each.tokens + each.readers for each in passes]
    memory = memory_bytes(config, weight) if config.memory else 0.0
    if not checkpointing:
        memory *= len(config.memory_layers())
        return weight * config.num_hidden_layers * sum(layers) + memory * sum(seen)
    # The input of every layer, and of the one at work its output and the gradient of that.
    kept = width * (config.num_hidden_layers + 2) * sum(each.tokens for each in passes)
    return weight * (kept + max(layers)) + memory * max(seen)


def coprocessor_bytes(config: PragnosiaConfig, weight: int, length: int) -> float:
    """What a row leaves in stage cache besides its passes: its cache; two states of each memory at each trace, as
    read and as gone on from; and what a light coprocessor read."""
    cache, width = config.cache, config.hidden_size
    entries = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kept = weight * length * entries
    if config.memory:
        state = 4 * config.memory["memory_size"] * config.memory["head_dim"]
        kept += 4 * state * cache["num_traces"] * len(config.memory_layers())
    if cache["coprocessor"] == "light":
        latents, depth = cache["num_traces"] * cache["num_latents"], cache["coprocessor_layers"]
        # Entries joined and projected, then keys and values; latents through attention and a feed-forward.
        kept += weight * length * (entries + 3 * width + depth * (4 * width + latents))
        kept += weight * latents * depth * 15 * width
    return kept


def estimate(
    config: PragnosiaConfig,
    ds_config: dict,
    *,
    placement: str,
    page_size: int | None,
    precision: str,
    micro_batch_size: int,
    max_length: int,
    segments: int = 1,
    checkpointing: bool,
    world_size: int,
    stream: StreamPlan | None = None,
    expert_parallel: int = 1,
    stage: str = "base",
    joint: bool = False,
    process: float = PROCESS,
) -> MemoryEstimate:
    """Weights, gradients, AdamW state and activations under a placement and a ZeRO stage.

    A weight in training takes 2 bytes, its gradient 2, master copy and moments 12 (fp32 throughout: 4, 4, 8).
    ZeRO divides state from stage 1, gradients from 2, weights from 3 by the ranks. Of the experts a rank of an
    expert-parallel group has one part in `expert_parallel`, which ZeRO divides by the world_size /
    expert_parallel ranks that have the same part. What is frozen has no gradient and no state: a coprocessor in
    stage base, and all else in stage cache unless `joint`. Activations are those of an even load.
    """
    weight, state = (4, 8) if precision == "fp32" else (2, 12)
    bf16 = ds_config.get("bf16", {})
    is_rounded = bf16.get("bf16_master_weights_and_grads") or bf16.get("bf16_optimizer_states")
    if is_rounded:
        state = 6 if bf16.get("bf16_optimizer_states") else 10
    zero = ds_config["zero_optimization"]
    experts = config.num_hidden_layers * config.num_experts * config.expert_params()
    zero_stage, parameters, coprocessor = zero["stage"], config.num_params(), config.coprocessor_params()
    if stream is not None:
        parameters -= experts
    local = parameters - experts * (1 - 1 / expert_parallel)
    frozen = coprocessor if stage == "base" else 0 if joint else parameters - coprocessor
    # A part of the experts over the ranks that have the same part is a part over all ranks.
    weights, gradients, states = (
        ((parameters - without) / world_size if zero_stage >= needed else local - without) * size
        for needed, without, size in ((3, 0, weight), (2, frozen, weight), (1, frozen, state))
    )
    width, cache = config.hidden_size, config.cache
    passes = passes_of(config, max_length, stage, joint, segments)
    activations = micro_batch_size * activation_bytes(config, passes, weight, placement, checkpointing)
    tokens = targets = micro_batch_size * max(each.tokens for each in passes)
    if stage == "cache":
        activations += micro_batch_size * coprocessor_bytes(config, weight, max_length)
        targets = micro_batch_size * cache["num_traces"] * cache["num_ahead_tokens"]
    # A chunk of logits in fp32 and rounded; later, inside a fetched page, what its rows' experts compute again.
    logits, inside = config.vocab_size * min(targets, LOSS_CHUNK) * (4 + weight), 0.0
    if placement == "zero3":
        rows = tokens * config.num_experts_per_tok * page_size / config.num_experts
        inside = 4 * weight * rows * config.moe_intermediate_size
    # The gradient of the head, in fp32 where chunks add up.
    activations += max(logits, inside) + config.vocab_size * width * (weight + 4 * (targets > LOSS_CHUNK))
    # In the update DeepSpeed holds the gradients flat and once more in fp32, when activations are gone.
    peak = max(activations, 0 if precision == "fp32" else 6 * states / state)
    working = 0.0
    if zero_stage == 3:
        # On the device: what is fetched at once, and one gradient bucket. A resident bank is fetched whole.
        bank = experts / config.num_hidden_layers / expert_parallel if placement == "resident" else 0
        live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
        live = max(live, config.vocab_size * width, bank)
        page = page_size * config.expert_params() if placement == "zero3" else 0
        working = weight * (min(live, local) + page + min(zero.get("reduce_bucket_size", 5e8), local))
    # DeepSpeed has offloaded gradients once more, in the precision of the master weights.
    offloaded = states + gradients * (1 if is_rounded else 4 / weight)
    in_host = weights + (gradients if weight == 2 else 0)  # with ZeRO-3 and its offload_param
    if placement == "zero3":
        return MemoryEstimate(WORKSPACE + activations + working, process + offloaded + in_host)
    stream_device, stream_host = (stream.device, stream.host) if stream else (0.0, 0.0)
    if stream is not None:
        # Gradients of a layer's rows; of a page's share of them input, gradients and what is inside its experts.
        rows = tokens * config.num_experts_per_tok * weight
        share = min(1.0, stream.page_size / (config.expert_pool or config.num_experts))
        activations += rows * (width + share * (3 * width + 8 * config.moe_intermediate_size))
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host = process + stream_host + offloaded
        if stream is not None and zero_stage == 3:
            host += in_host
        else:  # gradients leave through two buckets as they come
            working += weights + 2 * weight * zero.get("reduce_bucket_size", 5e8)
        return MemoryEstimate(WORKSPACE + working + activations + stream_device, host)
    working = working if stream is None else 0.0
    peak = max(activations, peak) + working
    device = WORKSPACE + weights + gradients + states + peak + stream_device
    return MemoryEstimate(device, process + stream_host)
