"""What a model would need on GPUs that are not here, and how fast it would train there; imports no torch.

Pure arithmetic: every number is an estimate, none is measured. Each function's docstring is its formula, in these
letters: W ranks, ep ranks that share the experts of a layer, A microbatches a step, T tokens of a microbatch and
rank, K experts a token uses, D model width, L layers. Bytes are those of bf16 and of one step, one way.

A step: the all-to-all of the experts stands in the way of the computation, since nothing can be computed before
the rows are there; so does what ZeRO gathers after the update. What overlaps with the computation (gradients of
ZeRO 1 and 2 with backward, everything of ZeRO-3, pages of streamed experts) costs what is left of it when OVERLAP
of the computation it can hide behind is over. Not counted: the update itself, the data, uneven experts, kernels
too small to fill the GPU.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experts.budget import bytes_per_value
from training import deepspeed_config
from training.cluster import LATENCY, MACHINE, NETWORK_SHARE, NVLINK_SHARE, PEER_SHARE, Cluster
from training.command_line import FIELDS, words_of
from training.config import TrainingArguments, UserError, flag_of
from training.deepspeed_config import resolve_expert_parallel
from training.estimate import MemoryEstimate, estimate
from training.plan import (
    FIT,
    check_model,
    has_frozen_experts,
    idle_expert_flags,
    plan_stream,
    refuse_idle_expert_flags,
    usable_memory,
)

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

# Both fitted to the four rows of benchmarks/results/train_step_resident.json, one H200.
PEAK_SHARE = 0.35  # of a GPU's peak
LAYER_SECONDS = 8e-3  # of a layer and microbatch, whatever its tokens: kernels to start, hooks, the update
OVERLAP = 0.5  # assumed: of a computation that could hide communication, the part that does
FETCH_SECONDS = 5e-4  # of Python for each module that ZeRO-3 fetches; measured with one H200
FETCHED = 6  # such modules of a layer: four projections of attention, the router, the bank
ALIKE = 1.02  # steps that differ by less are equally fast: the estimate is no finer
ZERO_3 = "13B_a100_cluster.json"  # whose window of ZeRO-3 every preset takes
CHOSEN = ("--placement", "--offload-to-cpu", "--expert-parallel-size")
STREAMED = ("streamed.json", "streamed_offload.json", "streamed_zero3.json")


@dataclass(frozen=True)
class Combination:
    """One way to run: the JSON's `zero_optimization`, the file that has it (None: none does), and `ep`."""

    placement: str
    zero: dict
    json: str | None
    expert_parallel: int = 1

    @property
    def stage(self) -> int:
        """Of ZeRO; for streamed experts that of the dense parameters."""
        return self.zero["stage"]


@dataclass(frozen=True)
class Load:
    """Bytes of a step, each way: `local` of a GPU to others of its machine, `network` of a machine to others."""

    local: float = 0.0
    network: float = 0.0
    calls: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.local + other.local, self.network + other.network, self.calls + other.calls)

    def __mul__(self, times: int) -> Load:
        return Load(self.local * times, self.network * times, self.calls * times)

    def seconds(self, cluster: Cluster) -> float:
        """max(local ÷ rate of NVLink, network ÷ its rate) + calls × LATENCY: both links work at once."""
        network = self.network / cluster.network_rate if self.network else 0.0
        return max(self.local / cluster.peer_rate, network) + self.calls * LATENCY


@dataclass(frozen=True)
class Traffic:
    """What a step moves: three kinds of collectives, a GPU's bytes from the host (`up`) and to it (`down`), and
    how many modules ZeRO-3 fetches for it."""

    all_to_all: Load = Load()
    gather: Load = Load()
    reduce: Load = Load()
    up: float = 0.0
    down: float = 0.0
    fetches: int = 0


@dataclass(frozen=True)
class Forecast:
    """A combination on a cluster; seconds of a step. `waiting` is communication that computation does not hide."""

    combination: Combination
    memory: MemoryEstimate
    fits: bool
    traffic: Traffic
    compute: float
    communication: float
    waiting: float
    tokens: int
    ranks: int

    @property
    def step(self) -> float:
        """compute + waiting."""
        return self.compute + self.waiting

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs: W A T ÷ step."""
        return self.tokens / self.step


def step_flops(config: PragnosiaConfig, max_length: int, *, streamed: bool, recomputed: bool) -> float:
    """FLOPs of a token in a step.

    A weight that it meets costs 2 in forward and 4 in backward, causal attention over rows of S tokens 2 S H C in
    forward (H heads of size C) and twice that in backward. Recomputed activations cost the forward once more,
    except that of the head; those inside streamed experts two thirds of it, always.
    """
    head = config.vocab_size * config.hidden_size
    experts = config.num_hidden_layers * config.num_experts_per_tok * config.expert_params()
    layers = config.active_params() - experts - head * (1 if config.tie_word_embeddings else 2)
    heads = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * max_length * heads
    passes = 4 if recomputed else 3
    return (
        3 * 2 * head + passes * (2 * layers + attention) + (3 + 2 / 3 if streamed else passes) * 2 * experts
    )


def compute_time(
    config: PragnosiaConfig,
    args: TrainingArguments,
    cluster: Cluster,
    max_length: int,
    streamed: bool = False,
) -> float:
    """Seconds of a step: A T × FLOPs of a token ÷ (PEAK_SHARE × peak) + A L × LAYER_SECONDS, the second a third
    more where activations are recomputed."""
    recomputed, microbatches = args.gradient_checkpointing, args.gradient_accumulation_steps
    flops = step_flops(config, max_length, streamed=streamed, recomputed=recomputed)
    tokens = args.per_device_train_batch_size * max_length
    layer = LAYER_SECONDS * (4 / 3 if recomputed else 1)
    return microbatches * (
        tokens * flops / (PEAK_SHARE * cluster.gpu.flops) + config.num_hidden_layers * layer
    )


def neighbours(cluster: Cluster, group: int) -> tuple[int, int]:
    """For groups of `group` consecutive ranks, at their worst: peers of a rank on its machine, and pairs of a
    machine's rank and a peer elsewhere."""
    together = Counter((rank // group, rank // cluster.gpus_here) for rank in range(cluster.gpus))
    crossing: Counter = Counter()
    for (_, machine), ranks in together.items():
        crossing[machine] += ranks * (group - ranks)
    return max(together.values()) - 1, max(crossing.values())


def all_to_all(
    config: PragnosiaConfig,
    tokens: int,
    exchanges: int,
    ep: int,
    cluster: Cluster,
    capacity: float | None = None,
) -> Load:
    """Rows on their way to their experts or back, `exchanges` times.

    T K D 2 bytes a rank, of which at an even load every rank of the group gets 1/ep: (ep - 1)/ep of it travels.
    A capacity factor below 1 drops the rest of it.
    """
    inside, crossing = neighbours(cluster, ep)
    share = 2 * tokens * config.num_experts_per_tok * config.hidden_size / ep * min(1.0, capacity or 1.0)
    return Load(share * inside, share * crossing, int(ep > 1)) * exchanges


def ring(nbytes: float, groups: int, cluster: Cluster, calls: int = 1) -> Load:
    """An all-gather or a reduce-scatter of `nbytes` in each of `groups` groups, in so many calls; an all-reduce is
    one of either.

    Group i has the ranks i, i + groups, i + 2 groups … In a ring of g = W / groups ranks each passes on
    nbytes (g - 1) / g, which leaves a machine once for every group that has ranks there.
    """
    ranks = cluster.gpus // groups
    passed = nbytes * (ranks - 1) / ranks
    groups_here = min(groups, cluster.gpus_here)
    return Load(
        passed if groups < cluster.gpus_here and ranks > 1 else 0.0,
        passed * groups_here if cluster.machines > 1 else 0.0,
        calls if ranks > 1 else 0,
    )


def zero_traffic(whole: Load, stage: int, microbatches: int, recomputed: bool) -> tuple[Load, Load]:
    """(gathers, reductions) of parameters, one of which is `whole`: 2 bytes each.

    ZeRO 0: gradients are all-reduced once a step, twice `whole`. 1: reduced once, weights gathered once after the
    update. 2: reduced in every microbatch. 3: reduced and gathered in every microbatch, for forward and for
    backward, and once more where activations are recomputed.
    """
    gathers = (0, 1, 1, (2 + recomputed) * microbatches)[stage]
    reductions = (2, 1, microbatches, microbatches)[stage]
    return whole * gathers, whole * reductions


def traffic_of(
    config: PragnosiaConfig,
    args: TrainingArguments,
    combination: Combination,
    cluster: Cluster,
    tokens: int,
    state: str,
) -> Traffic:
    """What a step moves.

    resident: dense parameters among all ranks, experts ÷ ep among the W / ep ranks that have the same ones, and in
    each layer and microbatch four exchanges of rows (five where activations are recomputed).
    streamed: the dense parameters likewise; experts are gathered twice and their gradients reduced once in each
    microbatch, among all ranks; each holds 1/W of every expert in host memory. Of that, up: weights for forward
    and for backward, and once a step the moments; down: weights and moments once a step. Between microbatches the
    accumulator goes down and up. With --routing step this holds for the share of experts that is in the pool.
    Dense parameters whose optimizer is on the host send gradients down and weights up, 2 bytes of a rank's share.
    """
    layers, microbatches = config.num_hidden_layers, args.gradient_accumulation_steps
    recomputed, ep, stage = args.gradient_checkpointing, combination.expert_parallel, combination.stage
    experts = layers * config.num_experts * config.expert_params()
    dense, calls = config.num_params() - experts, layers if stage == 3 else 1
    fetches = FETCHED * layers * (2 + recomputed) * microbatches if stage == 3 else 0
    gather, reduce = zero_traffic(ring(2 * dense, 1, cluster, calls), stage, microbatches, recomputed)
    if combination.placement == "resident":
        banks = ring(2 * experts / ep, ep, cluster, calls)
        bank_gather, bank_reduce = zero_traffic(banks, stage, microbatches, recomputed)
        exchanges = layers * microbatches * (4 + recomputed)
        rows = all_to_all(config, tokens, exchanges, ep, cluster, args.capacity_factor)
        return Traffic(rows, gather + bank_gather, reduce + bank_reduce, fetches=fetches)
    if config.routing == "step":
        experts *= config.expert_pool / config.num_experts
    whole = ring(2 * experts, 1, cluster, layers)
    kept, sums = (bytes_per_value(state, "bf16", accumulate) for accumulate in (False, True))
    between = (microbatches - 1) * (sums - kept)
    up, down = (
        size * experts / cluster.gpus
        for size in (2 * (2 * microbatches - 1) + kept + between, kept + between)
    )
    zero = combination.zero
    if "offload_optimizer" in zero:
        times = (2 + recomputed) * microbatches if "offload_param" in zero else 1
        up += 2 * times * dense / cluster.gpus
        down += 2 * microbatches * dense / cluster.gpus
    return Traffic(
        Load(), gather + whole * 2 * microbatches, reduce + whole * microbatches, up, down, fetches
    )


def waiting_time(
    traffic: Traffic, combination: Combination, cluster: Cluster, compute: float, args: TrainingArguments
) -> tuple[float, float]:
    """(communication, the part of it that computation does not hide), seconds of a step.

    resident: all-to-all + what cannot overlap + max(0, what can - OVERLAP × the computation that it can hide
    behind): ZeRO 0 nothing overlaps; 1, the reduction with the last microbatch's backward; 2, with every backward;
    3, gathers too, with everything. Backward is 2/3 of the computation, 3/4 where activations are recomputed.
    streamed: the reduction + max(0, max(PCIe, gathers) - OVERLAP × computation); without NVLink gathers go over
    PCIe too, so both are added. ZeRO-3 costs FETCH_SECONDS a fetch besides.
    """
    gather, reduce = traffic.gather.seconds(cluster), traffic.reduce.seconds(cluster)
    fixed = traffic.all_to_all.seconds(cluster) + traffic.fetches * FETCH_SECONDS
    if combination.placement == "streamed":
        pcie = max(traffic.up, traffic.down) / cluster.pcie_rate
        hidden = max(pcie, gather) if cluster.gpu.nvlink else pcie + gather
        return fixed + pcie + gather + reduce, fixed + reduce + max(0.0, hidden - OVERLAP * compute)
    backward = compute * (3 / 4 if args.gradient_checkpointing else 2 / 3)
    open_, hidden, room = (
        (gather + reduce, 0.0, 0.0),
        (gather, reduce, backward / args.gradient_accumulation_steps),
        (gather, reduce, backward),
        (0.0, gather + reduce, compute),
    )[combination.stage]
    return fixed + gather + reduce, fixed + open_ + max(0.0, hidden - OVERLAP * room)


def forecast(
    config: PragnosiaConfig,
    args: TrainingArguments,
    combination: Combination,
    cluster: Cluster,
    max_length: int,
) -> Forecast:
    """All of it for one combination."""
    stream, room = None, usable_memory(cluster.gpu.memory, args)
    if combination.placement == "streamed":
        stream = plan_stream(config, args, "bf16", cluster.gpus, room)
    memory = estimate(
        config,
        {"zero_optimization": combination.zero},
        placement=combination.placement,
        page_size=stream.page_size if stream else None,
        precision="bf16",
        micro_batch_size=args.per_device_train_batch_size,
        max_length=max_length,
        checkpointing=args.gradient_checkpointing,
        world_size=cluster.gpus,
        stream=stream,
        expert_parallel=combination.expert_parallel,
        stage=args.stage,
        joint=args.cache_joint,
    )
    tokens = args.per_device_train_batch_size * max_length
    compute = compute_time(config, args, cluster, max_length, streamed=stream is not None)
    traffic = traffic_of(config, args, combination, cluster, tokens, stream.state if stream else "bf16")
    communication, waiting = waiting_time(traffic, combination, cluster, compute, args)
    fits = memory.device <= FIT * room
    tokens *= args.gradient_accumulation_steps * cluster.gpus
    return Forecast(combination, memory, fits, traffic, compute, communication, waiting, tokens, cluster.gpus)


def combinations(
    config: PragnosiaConfig, args: TrainingArguments, cluster: Cluster, preset: str
) -> list[Combination]:
    """What is worth comparing: groups of ranks that divide a machine or are whole machines, and ZeRO 0 to 3, for
    resident experts; the three JSONs for streamed ones. `preset` names the JSONs.

    Raises:
        UserError: settings that cannot be, or that are not planned for.
    """
    placement = args.requested_placement
    if placement == "zero3":
        raise UserError("--plan compares resident and streamed experts: leave --placement zero3 out")
    if args.resume:
        raise UserError("--plan compares placements and ZeRO stages, which --resume keeps: use --init-from")
    if args.deepspeed_config:
        raise UserError(
            "--plan compares ZeRO stages and says which JSON to use: leave --deepspeed-config out"
        )
    if args.device == "cpu":
        raise UserError("--plan is for GPUs: leave --device cpu out")
    if args.precision not in (None, "bf16"):
        raise UserError(f"--plan is for bf16: leave --precision {args.precision} out")
    if args.expert_store == "nvme":
        raise UserError("--plan knows no disks: leave --expert-store nvme out")
    if args.segments > 1:
        raise UserError(f"--plan knows whole rows alone: leave --segments {args.segments} out")
    if has_frozen_experts(config, args):
        raise UserError(
            "--plan is for experts that learn: leave --stage cache, or --coprocessor copy, out of it"
        )
    if placement != "auto":
        refuse_idle_expert_flags(config, args, placement, cluster.gpus)
    found = []
    if placement != "streamed":
        here = cluster.gpus_here
        common = math.gcd(config.num_experts, cluster.gpus)
        sizes = [n for n in range(1, common + 1) if common % n == 0 and (here % n == 0 or n % here == 0)]
        if args.expert_parallel_size is not None:
            sizes = [
                resolve_expert_parallel(
                    config.num_experts, cluster.gpus, args.expert_parallel_size, "auto", True
                )
            ]
        if args.capacity_factor:
            sizes = [size for size in sizes if size > 1]
            if not sizes:
                raise UserError(
                    f"--capacity-factor {args.capacity_factor} is for GPUs that share experts: use "
                    "--capacity-factor none, more --gpus or another --expert-parallel-size"
                )
        default = deepspeed_config.default_path(preset, "resident", "cuda", cluster.gpus, cluster.machines)
        sections = [_zero(default.name, stage) for stage in range(4)]
        if cluster.gpus == 1:  # nothing to divide
            sections = [section for section in sections if section[1]]
        found = [Combination("resident", *section, size) for size in sizes for section in sections]
    if placement != "resident" and args.expert_parallel_size is None and args.capacity_factor is None:
        found += [Combination("streamed", _shipped(name)["zero_optimization"], name) for name in STREAMED]
    return found


def _shipped(name: str) -> dict:
    return json.loads((deepspeed_config.DIRECTORY / name).read_text(encoding="utf-8"))


def _zero(name: str, stage: int) -> tuple[dict, str | None]:
    """(`zero_optimization` of a JSON with this stage for its own, the JSON's name where that is its own)."""
    zero = _shipped(name)["zero_optimization"]
    if zero["stage"] == stage:
        return zero, name
    if stage == 3:
        return _shipped(ZERO_3)["zero_optimization"], None
    return {k: v for k, v in zero.items() if not k.startswith("stage3")} | {"stage": stage}, None


def best(forecasts: Iterable[Forecast]) -> Forecast | None:
    """The fastest that fits; None where nothing does.

    Of those that are as fast (ALIKE), the plainest: resident experts, what a shipped JSON has, an optimizer that
    stays on the GPU; then the least GPU memory.
    """
    fitting = [found for found in forecasts if found.fits]
    limit = ALIKE * min((found.step for found in fitting), default=0.0)
    alike = (found for found in fitting if found.step <= limit)

    def order(found: Forecast) -> tuple:
        chosen = found.combination
        plain = (chosen.placement == "resident", chosen.json is not None, chosen.json not in STREAMED[1:])
        return *(not merit for merit in plain), found.memory.device

    return min(alike, key=order, default=None)


COLUMNS = (
    "experts", "ZeRO", "ep", "GPU", "host", "all-to-all", "gather", "reduce", "PCIe", "compute",
    "communication", "step", "tokens/s", "fits",
)  # fmt: skip


def cells(found: Forecast) -> tuple[str, ...]:
    """A line of the table: GB of a GPU and of a machine's host memory, GB a step (NVLink of a GPU + network of a
    machine; PCIe: up, down), milliseconds."""
    chosen, traffic = found.combination, found.traffic
    ranks = min(found.ranks, MACHINE)
    loads = (traffic.all_to_all, traffic.gather, traffic.reduce)
    return (
        chosen.placement if chosen.placement == "resident" else chosen.json.removesuffix(".json"),
        str(chosen.stage),
        str(chosen.expert_parallel),
        f"{found.memory.device / 1e9:.1f}",
        f"{ranks * found.memory.host / 1e9:.0f}",
        *(f"{load.local / 1e9:.1f} + {load.network / 1e9:.1f}" for load in loads),
        f"{traffic.up / 1e9:.1f}, {traffic.down / 1e9:.1f}",
        *(f"{1000 * seconds:,.0f}" for seconds in (found.compute, found.communication, found.step)),
        f"{found.tokens_per_second:,.0f}",
        "yes" if found.fits else "no",
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def launch_words(
    found: Forecast, cluster: Cluster, given: Mapping[str, Any], file: str, idle: Sequence[str] = ()
) -> list[str]:
    """The command that runs a combination: the fields that were given, but for flags that would be `idle`, and
    what was chosen; `file` is where its JSON will be."""
    chosen = found.combination
    kept = (name for name in given if flag_of(FIELDS[name]) not in (*CHOSEN, *idle) and given[name] != "none")
    words = [word for name in kept for word in words_of(name, given[name])]
    words += ["--placement", chosen.placement]
    if chosen.json is None:
        words += ["--deepspeed-config", file]
    elif chosen.placement == "resident":
        words += ["--expert-parallel-size", str(chosen.expert_parallel)]
    elif chosen.json != STREAMED[0]:
        words += ["--deepspeed-config", chosen.json]
    where = ["--hostfile", "HOSTFILE"] if cluster.machines > 1 else ["--num-gpus", str(cluster.gpus)]
    return ["./launch.sh", "train", *where, *words]


def json_of(combination: Combination, preset: str, cluster: Cluster) -> dict:
    """The DeepSpeed JSON of resident experts that no shipped file has."""
    default = deepspeed_config.default_path(preset, "resident", "cuda", cluster.gpus, cluster.machines)
    return {
        **_shipped(default.name),
        "zero_optimization": combination.zero,
        deepspeed_config.EXPERT_PARALLEL: {"autoep_size": combination.expert_parallel},
    }


def plan_lines(
    config: PragnosiaConfig,
    args: TrainingArguments,
    cluster: Cluster,
    *,
    size: str,
    max_length: int,
    given: Mapping[str, Any],
) -> list[str]:
    """What `--plan` prints. `size` is a preset or custom, `given` what the user set."""
    check_model(config, args)
    parameters = config.num_params()
    preset = (
        size if size in deepspeed_config.NOMINAL_PARAMETERS else deepspeed_config.nearest_preset(parameters)
    )
    found = [
        forecast(config, args, combination, cluster, max_length)
        for combination in combinations(config, args, cluster, preset)
    ]
    gpu, micro, accumulation = cluster.gpu, args.per_device_train_batch_size, args.gradient_accumulation_steps
    peers = f"NVLink {gpu.nvlink / 1e9:.0f} GB/s" if gpu.nvlink else "no NVLink"
    shares = f"{NVLINK_SHARE:.0%} of NVLink, " if gpu.nvlink else f"{PEER_SHARE:.0%} of PCIe between GPUs, "
    shares = shares * (cluster.gpus > 1) + f"{NETWORK_SHARE:.0%} of the network, " * (cluster.machines > 1)
    room = usable_memory(gpu.memory, args)
    network = f", network {cluster.network / 1e9:.1f} GB/s a machine" if cluster.network else ""
    lines = [
        f"model       {parameters / 1e6:,.1f}M parameters, {config.active_params() / 1e6:,.1f}M active; "
        f"{config.num_experts} experts, {config.num_experts_per_tok} active",
        f"cluster     machines x GPUs: {cluster.machines} x {cluster.gpus_here}; "
        f"{gpu.memory / 1e9:.0f} GB, {gpu.flops / 1e12:.0f} TFLOP/s, {peers}, PCIe {gpu.pcie / 1e9:.0f} GB/s"
        f"{network}, each way ({gpu.source})",
        f"assumed     {PEAK_SHARE:.0%} of the TFLOP/s, {1000 * LAYER_SECONDS:.0f} ms more a layer and microbatch, "
        f"{shares}{OVERLAP:.0%} of overlap, {cluster.pcie_rate / gpu.pcie:.0%} of PCIe; all experts equally busy",
        f"batch       {micro} rows x {accumulation} microbatches x {cluster.gpus} ranks = "
        f"{micro * accumulation * cluster.gpus} rows of {max_length} tokens a step",
        "estimates   none of it measured: GB of GPU memory; of a machine's host memory; a step's bytes in GB each "
        "way (NVLink of a GPU + network of a machine; PCIe up, down); ms of a step; tokens/s",
        "",
        *table([COLUMNS, *map(cells, found)]),
        "",
    ]
    chosen = best(found)
    if chosen is None:
        return [
            *lines,
            f"nothing fits in {FIT:.0%} of {room / 1e9:.0f} GB: use --gradient-checkpointing, a smaller "
            "--batch-size with more --gradient-accumulation-steps, or more GPUs"
            + "; streamed experts need less"
            * all(f.combination.placement == "resident" for f in found),
        ]
    name = f"{size}_plan.json"
    idle = [flag.split()[0] for flag in idle_expert_flags(args, chosen.combination.placement)]
    words = launch_words(chosen, cluster, given, name, idle)
    lines += [
        f"fastest     {', '.join(' '.join(pair) for pair in zip(COLUMNS[:3], cells(chosen)[:3], strict=True))}: "
        f"{chosen.memory.device / 1e9:.1f} GB of a GPU, {chosen.tokens_per_second:,.0f} tokens/s"
    ]
    lines += [f"run         {shlex.join(words)}"]
    if chosen.combination.json is None:
        lines += [
            f"with        this as {name}:",
            json.dumps(json_of(chosen.combination, preset, cluster), indent=2),
        ]
    return lines
