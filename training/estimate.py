"""Memory of a run before it starts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

LOSS_CHUNK = 1024  # that of model/head.py
WORKSPACE = 33.6e6  # bytes that PyTorch allocates for cuBLAS on Hopper, and at most elsewhere


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


def estimate(
    config: PragnosiaConfig,
    ds_config: dict,
    *,
    placement: str,
    page_size: int | None,
    precision: str,
    micro_batch_size: int,
    max_length: int,
    checkpointing: bool,
    world_size: int,
    stream: StreamPlan | None = None,
    expert_parallel: int = 1,
) -> MemoryEstimate:
    """Weights, gradients, AdamW state and activations under a placement and a ZeRO stage.

    A weight in training takes 2 bytes, its gradient 2, master copy and moments 12 (fp32 throughout: 4, 4, 8).
    ZeRO divides state from stage 1, gradients from 2, weights from 3 by the ranks. Of the experts a rank of an
    expert-parallel group has one part in `expert_parallel`, which ZeRO divides by the world_size /
    expert_parallel ranks that have the same part. Activations are those of an even load.
    """
    weight, state = (4, 8) if precision == "fp32" else (2, 12)
    zero = ds_config["zero_optimization"]
    experts = config.num_hidden_layers * config.num_experts * config.expert_params()
    stage, parameters = zero["stage"], config.num_params()
    if stream is not None:
        parameters -= experts
    local = parameters - experts * (1 - 1 / expert_parallel)
    # A part of the experts over the ranks that have the same part is a part over all ranks.
    on_rank = [parameters / world_size if stage >= needed else local for needed in (3, 2, 1)]
    weights, gradients, states = (
        count * size for count, size in zip(on_rank, (weight, weight, state), strict=True)
    )
    tokens = micro_batch_size * max_length
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    heads += config.num_key_value_heads * config.head_dim
    # A page is recomputed in backward from its rows; a resident bank keeps what is inside its experts as well.
    inside = 4 * config.moe_intermediate_size if placement == "resident" else 0
    routed = config.num_experts_per_tok * (inside + 3 * width) if stream is None else 0
    # The residual stream and its norms; queries, keys and values as projected, normed and turned, and the output.
    layer = tokens * weight * (4 * width + 4 * heads + routed)
    kept = tokens * weight * 2 * width if checkpointing else layer
    activations = kept * config.num_hidden_layers + (layer if checkpointing else 0)
    if config.memory:
        kept_layers = 1 if checkpointing else len(config.memory_layers())
        activations += tokens * memory_bytes(config, weight) * kept_layers
    # A chunk of logits in fp32 and rounded; the gradient of the head, in fp32 where chunks add up.
    activations += config.vocab_size * (
        min(tokens, LOSS_CHUNK) * (4 + weight) + width * (weight + 4 * (tokens > LOSS_CHUNK))
    )
    # In the update DeepSpeed holds the gradients flat and once more in fp32, when activations are gone.
    peak = max(activations, 0 if precision == "fp32" else 6 * on_rank[2])
    working = 0.0
    if stage == 3:
        # On the device: what is fetched at once, and one gradient bucket. A resident bank is fetched whole.
        bank = experts / config.num_hidden_layers / expert_parallel if placement == "resident" else 0
        live = zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)
        live = max(live, config.vocab_size * width, bank)
        page = page_size * config.expert_params() if placement == "zero3" else 0
        working = weight * (min(live, local) + page + min(zero.get("reduce_bucket_size", 5e8), local))
    if placement == "zero3":
        return MemoryEstimate(WORKSPACE + activations + working, weights + gradients + states)
    stream_device, stream_host = (stream.device, stream.host) if stream else (0.0, 0.0)
    if stream is not None:
        # Rows of a layer on their way through its experts, and what a page holds inside of them.
        rows = tokens * config.num_experts_per_tok * weight
        inside = 6 * config.moe_intermediate_size * stream.page_size / config.num_experts
        activations += rows * (2 * width + inside)
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        # Gradients leave through two buckets as they come.
        host = 1.5e9 + stream_host + states + gradients
        in_host = stream is not None and stage == 3  # then the weights too
        working += 0 if in_host else weights + 2 * weight * zero.get("reduce_bucket_size", 5e8)
        return MemoryEstimate(WORKSPACE + working + activations + stream_device, host + in_host * weights)
    working = working if stream is None else 0.0
    peak = max(activations, peak) + working
    device = WORKSPACE + weights + gradients + states + peak + stream_device
    return MemoryEstimate(device, 1.5e9 + stream_host)
