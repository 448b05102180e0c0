"""One cell of a benchmark: an engine in processes of its own, steps that are timed, memory that is measured.

A cell runs in fresh processes, one a GPU, on random tokens and through the trainer's own engine and step, so that
peaks of memory do not mix. Cells that differ in rows of a microbatch, recomputation and kernels alone may share an
engine, which is built once and runs one after the other. A cell that fails is a row with its error.

What a row holds: median, 20th and 80th percentile and range of the step time in seconds, real tokens of all ranks
a second, model TFLOP/s (6 · active parameters · tokens, without attention scores), cross entropy a token in the
first step and in the last (all learn one batch, so that it falls where the update works); in GB (1e9 bytes) of the
rank that has most, peaks of allocated and reserved GPU memory while building and in the steps, and the resident
size of the process at its largest until then; for streamed experts what they take on the host and what a step
moves over the bus of a rank.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.results import REPOSITORY, report, write

WARMUP = 3
PATIENCE_S = 600  # without a new row: a cell that hangs is ended
DEEPSPEED = ("autoep", "deepspeed.moe")  # placements that are DeepSpeed's own expert-parallel layers
# Kernels of NCCL, which makes an all-to-all of sends and receives, and records of gloo.
ALL_TO_ALL = re.compile(r"nccl\w*Kernel_(SendRecv|AllToAll)|gloo:all_to_all")


@dataclass(frozen=True)
class Cell:
    """What is measured. Fields without a line of their own are flags of `train_ds.py`; None: its default."""

    model_size: str
    placement: str
    """resident, streamed, zero3, fsdp2 (torch's CPU offload; pages, if a page size is given), or a layer of
    DeepSpeed's: autoep, deepspeed.moe (see `benchmarks/deepspeed_moe.py`)."""
    batch_size: int
    max_length: int = 512
    steps: int = 10
    device: str | None = None
    num_gpus: int = 1
    """Ranks; each computes `batch_size` rows."""
    name: str | None = None
    """What the cell is called in a benchmark that compares settings."""
    num_experts: int | None = None
    routing: str = "token"
    deepspeed_config: str | None = None
    expert_page_size: int | None = None
    expert_state: str | None = None
    """With fsdp2: fp32 or bf16, of weights and optimizer state alike."""
    expert_vram: str | None = None
    gradient_checkpointing: bool = False
    kernels: str | None = None
    """What routes tokens, for `kernels.dispatch.use`; its row says what did."""
    expert_parallel_size: int | None = None
    learning_rate: float | None = None
    """Of dense parameters and experts alike."""
    router_losses: bool = True
    """False: they weigh nothing, as for layers that have none."""
    record: bool = False
    """Record one more step for the seconds it spends in all-to-all."""
    trace: str | None = None
    """With `record`, a file for the Chrome trace of that step on rank 0."""

    def engine(self) -> Cell:
        """The cell without what may change from step to step: equal for cells that can share an engine."""
        return replace(self, batch_size=1, gradient_checkpointing=False, kernels=None)

    def named(self) -> dict:
        """The columns that tell cells apart."""
        names = ("name", "kernels", "expert_parallel_size")
        names = {key: value for key in names if (value := getattr(self, key))}
        columns = ("model_size", "placement", "batch_size", "max_length", "num_gpus")
        return names | {column: getattr(self, column) for column in columns}


# -- in the processes of a cell ------------------------------------------------------------------------------


def measure(cells: Sequence[Cell]) -> Iterator[dict]:
    """Build the engine that the cells share, run the steps of each, yield its row; collective."""
    import torch

    from kernels import dispatch

    engine, config, ranks, plan_of = build(cells[0])
    build_peaks = device_peaks()
    for number, cell in enumerate(cells):
        if number and build_peaks:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dispatch.use(cell.kernels or "auto")
        engine.module.model.gradient_checkpointing = cell.gradient_checkpointing
        row = {"experts": config.num_experts, "routing": config.routing}
        if cell.kernels:
            sizes = config.num_experts, config.num_experts_per_tok, config.hidden_size
            row["kernels"] = dispatch.describe(ranks.device, *sizes)
        batch = random_batch(config, cell, ranks)
        row |= timed_steps(engine, config, cell, ranks, batch)
        if cell.record:
            row |= recorded_step(engine, cell, ranks, batch)
        peaks = {key: max(peak, build_peaks[key]) for key, peak in device_peaks().items()}
        peaks["host_rss_gb"] = host_peak() / 1e9
        most = torch.tensor(list(peaks.values()), dtype=torch.float64, device=ranks.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
        row |= dict(zip(peaks, most.tolist(), strict=True))
        yield row | described(plan_of(cell)) | {"checkpointing": "yes" if cell.gradient_checkpointing else ""}


def build(cell: Cell) -> tuple:
    """(engine, model configuration, ranks, plan of a cell or None for a baseline), on the rank this process is."""
    from model.presets import preset_config
    from training.config import TrainingArguments
    from training.engine import DTYPES, build_engine, build_model, build_placement, start_ranks
    from training.plan import check_host_memory, make_plan, resolve_device
    from training.weights import initial_weights

    device = resolve_device(cell.device)
    experts = {} if cell.num_experts is None else {"num_experts": cell.num_experts}
    if not cell.router_losses:
        experts |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    config = preset_config(cell.model_size, routing=cell.routing, **experts)
    weights = initial_weights(0, config.initializer_range)
    if cell.placement == "fsdp2":
        from benchmarks import fsdp2

        ranks = fsdp2.start_ranks(device)
        state = DTYPES[cell.expert_state or "fp32"]
        engine = fsdp2.build_engine(config, weights, ranks.device, cell.expert_page_size, state)
        return engine, config, ranks, lambda _: None
    ranks = start_ranks(device)

    rate = cell.learning_rate
    rates = {} if rate is None else {"learning_rate": rate, "local_learning_rate": rate}

    def arguments(load: Cell) -> TrainingArguments:
        return TrainingArguments(
            **rates,
            per_device_train_batch_size=load.batch_size,
            placement="resident" if load.placement in DEEPSPEED else load.placement,
            deepspeed_config=load.deepspeed_config,
            expert_page_size=load.expert_page_size,
            expert_state=load.expert_state,
            expert_vram=load.expert_vram,
            expert_parallel_size=load.expert_parallel_size,
            gradient_checkpointing=load.gradient_checkpointing,
        )

    def plan_of(load: Cell):
        return make_plan(
            config, arguments(load), size=load.model_size, max_length=load.max_length, device=device,
            world_size=ranks.world_size,
        )  # fmt: skip

    args, plan = arguments(cell), plan_of(cell)
    if cell.placement in DEEPSPEED:
        from benchmarks import deepspeed_moe

        engine = deepspeed_moe.build_engine(cell.placement, weights, plan, args, ranks)
        return engine, config, ranks, lambda _: None
    check_host_memory(plan, ranks.world_size)
    model = build_model(
        config,
        weights,
        plan.ds_config,
        placement=build_placement(plan, args, ranks),
        device=ranks.device,
        dtype=DTYPES[plan.precision],
    )
    return build_engine(model, args, plan.ds_config), config, ranks, plan_of


def random_batch(config, cell: Cell, ranks) -> dict:
    """The rows of this rank: uniform tokens, each a target and all of one document."""
    import torch

    shape = (cell.batch_size, cell.max_length)
    ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(ranks.rank))
    return {
        "input_ids": ids,
        "labels": ids,
        "document_ids": torch.ones_like(ids),
        "position_ids": torch.arange(shape[1]).expand(shape),
    }


def timed_steps(engine, config, cell: Cell, ranks, batch: dict) -> dict:
    """Times of the cell's steps after the warm-up, first and last loss, and the bytes that a step moves."""
    import torch

    from training.step import reduce_results, train_step

    seconds = []
    for step in range(WARMUP + cell.steps):
        start = time.perf_counter()
        result = train_step(engine, [batch])
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        if step == 0:
            first = result
        if step >= WARMUP:
            seconds.append(time.perf_counter() - start)
    (first, _), (sums, load_LE) = reduce_results([first]), reduce_results([result])
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(shares).tolist()
    tokens = ranks.world_size * cell.batch_size * cell.max_length
    return {
        "tokens": tokens,
        "step_s": median,
        "p20_s": p20,
        "p80_s": p80,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "tokens_per_s": tokens / median,
        "model_tflops": 6 * config.active_params() * tokens / median / 1e12,
        "first_loss": first["loss_sum"] / first["targets"],
        "loss": sums["loss_sum"] / sums["targets"],
        **streamed_bytes(engine.module.placement, load_LE),
    }


def recorded_step(engine, cell: Cell, ranks, batch: dict) -> dict:
    """Seconds that a step spends in all-to-all on rank 0, by the names of what torch.profiler recorded there.

    They are those of the collectives, waiting for slower ranks included, whether or not something else ran beside
    them. Nothing, where no such name was seen. A step before warms the profiler up; all ranks record, so that none
    runs slower than the others.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    from training.step import train_step

    on_gpu = ranks.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    if cell.trace or not on_gpu:
        activities.append(ProfilerActivity.CPU)
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile(activities=activities, schedule=once) as recorder:
        for _ in range(2):
            train_step(engine, [batch])
            if on_gpu:
                torch.cuda.synchronize()
            recorder.step()
    if cell.trace and ranks.rank == 0:
        recorder.export_chrome_trace(cell.trace)
    seconds = [e.time_range.elapsed_us() / 1e6 for e in recorder.events() if ALL_TO_ALL.match(e.name)]
    row = {"all_to_all_s": sum(seconds)} if seconds else {}
    if cell.placement == "deepspeed.moe":
        from benchmarks.deepspeed_moe import dropped_rows

        row["dropped_rows"] = dropped_rows(engine, batch)
    return row


def streamed_bytes(placement, load_LE) -> dict:
    """GB of streamed experts on the host, and what a step (load_LE: rows of each expert) moves up and down.

    Forward fetches the weights of all experts, or of those in use where the router has chosen before. Backward
    fetches those in use once more with their state, and brings both back. Of the bus of one rank.
    """
    from experts.streamed import StreamedExperts

    if not isinstance(placement, StreamedExperts):
        return {}
    arrays = placement.stores[0].arrays
    row = {name: array[0].nbytes for name, array in arrays.items()}
    used = int((load_LE > 0).sum())
    fetched = load_LE.numel() if placement.settings.fetch_all else used
    down = used * sum(row[name] for name in placement.kept)
    return {
        "experts_gb": placement.layout.ranks * load_LE.numel() * sum(row.values()) / 1e9,
        "up_gb": (fetched * row["weight"] + down) / 1e9,
        "down_gb": down / 1e9,
    }


def described(plan) -> dict:
    """What the trainer decided and estimated; nothing where it did not."""
    if plan is None:
        return {}
    return {
        "estimate_device_gb": plan.memory.device / 1e9,
        "estimate_host_gb": plan.memory.host / 1e9,
        "json": plan.json_path.name,
        "precision": plan.precision,
        "page": plan.page_size or "",
        "slots": plan.stream.num_slots if plan.stream else "",
        "state": plan.stream.state if plan.stream else "",
    }


def host_peak() -> int:
    """Bytes of the process at its largest. (`ru_maxrss` would count what its parent was before it as well.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def device_peaks() -> dict[str, float]:
    """Peaks of GPU memory in GB since the last reset; empty where no GPU is in use."""
    import torch

    if not torch.cuda.is_initialized():
        return {}
    return {
        "gpu_allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "gpu_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def main() -> None:
    """`python -m benchmarks.cell CELLS DIRECTORY`: rows, or why there are none, go to files in the directory."""
    cells, directory = [Cell(**cell) for cell in json.loads(sys.argv[1])], Path(sys.argv[2])
    code = 0
    try:
        for row in measure(cells):
            if os.environ["RANK"] == "0":
                with open(directory / "rows", "a") as file:
                    file.write(json.dumps(row) + "\n")
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        (directory / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {text[0]}"[:300])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo can abort a process in its last moment; and there is no need to unlock a large host memory.
    os._exit(code)


# -- in the benchmark ----------------------------------------------------------------------------------------


def run_cells(cells: Sequence[Cell]) -> Iterator[dict]:
    """A row for each of the cells, which share an engine, as soon as it is measured."""
    first = cells[0]
    assert all(cell.engine() == first.engine() for cell in cells), "cells need an engine each"
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        words = ["-m", "benchmarks.cell", json.dumps([asdict(cell) for cell in cells]), name]
        ranks = [
            start(words, environment(first, rank, port), directory / f"output-{rank}")
            for rank in range(first.num_gpus)
        ]
        try:
            done, since = 0, time.monotonic()
            while True:
                codes = [rank.poll() for rank in ranks]  # before the rows: who has ended has written them
                for row in rows_in(directory)[done:]:
                    yield cells[done].named() | row
                    done, since = done + 1, time.monotonic()
                late = time.monotonic() - since > PATIENCE_S
                if late or any(codes) or None not in codes:
                    break
                time.sleep(0.1)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if done < len(cells):
            error = f"no row in {PATIENCE_S} s" if late else error_in(directory, codes)
            for cell in cells[done:]:
                yield cell.named() | {"error": error}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(cell: Cell, rank: int, port: int) -> dict[str, str]:
    """The variables of one rank of a cell."""
    world_size = str(cell.num_gpus)
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size,
        "NCCL_NVLS_ENABLE": "0",  # NVLink multicast: not for hosts whose GPUs others share
    }  # fmt: skip
    variables.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // cell.num_gpus)))
    if cell.device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def start(words: list[str], variables: dict[str, str], output: Path) -> subprocess.Popen:
    """`python words…`, whose output goes to a file."""
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, *words], env=variables, stdout=file, stderr=subprocess.STDOUT
        )


def rows_in(directory: Path) -> list[dict]:
    """The whole rows that rank 0 has written so far."""
    file = directory / "rows"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def error_in(directory: Path, codes: Sequence[int | None]) -> str:
    """What the first rank that failed said; its output goes to stderr."""
    errors = sorted(directory.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    rank = int(errors[0].name.removeprefix("error-")) if errors else next(r for r, c in enumerate(codes) if c)
    lines = (directory / f"output-{rank}").read_text(errors="replace").splitlines()[-20:]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    if errors:
        return errors[0].read_text()
    return f"rank {rank} ended with code {codes[rank]}: {lines[-1][:200] if lines else 'no output'}"


Judge = Callable[[list[dict]], tuple[list[dict], list[dict]]]


def run_all(
    groups: Iterable[Sequence[Cell]], path: Path, judge: Judge, device: str | None, rows: Sequence[dict] = ()
) -> list[dict]:
    """Measure the groups in turn; after each row the file at `path` holds all there are. Returns them.

    Args:
        groups: cells that share an engine.
        judge: from the rows to the rows with what follows from their comparison, and the goals.
        rows: what has been measured before.
    """
    rows = list(rows)
    for group in groups:
        for row in run_cells(group):
            rows.append(row)
            write(path, *judge(rows), device)
            print(json.dumps(row), flush=True)
    report(path, *judge(rows), device)
    return rows


if __name__ == "__main__":
    main()
