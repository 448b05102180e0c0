"""Step time, throughput and memory of a training step, for preset x placement x DeepSpeed JSON.

    python benchmarks/train_step.py --model-size 350M 1B --placement resident zero3
    python benchmarks/train_step.py --model-size 3B --placement zero3 --batch-size 4 16 --max-length 512
    python benchmarks/train_step.py --model-size tiny --deepspeed-config my.json --placement resident

Every cell runs in a process of its own on random tokens, through the trainer's own engine and step, so that
peaks of memory do not mix. A cell that fails is a row with its error. Rows: median and range of the step time
in seconds, real tokens a second, model TFLOP/s (6 · active parameters · tokens, without attention scores),
peak allocated and reserved GPU memory and the peak resident size of the process in GB (1e9 bytes). Goals:
allocated GPU memory of the presets with their experts off the GPU, on one row of 512 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, goal, report
from model.presets import PRESETS

WARMUP = 3
GPU_GOALS_GB = {"350M": 0.4, "1B": 0.5, "3B": 0.7, "7B": 1.0, "13B": 1.5}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", nargs="+", default=["tiny"])
    options.add_argument("--placement", nargs="+", default=["resident"])
    options.add_argument("--deepspeed-config", nargs="+", default=[None], help="default: the preset's own")
    options.add_argument("--batch-size", nargs="+", type=int, default=[4], help="rows of a microbatch")
    options.add_argument("--max-length", nargs="+", type=int, default=[512])
    options.add_argument("--expert-page-size", nargs="+", type=int, default=[None])
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--num-experts", type=int, default=None)
    options.add_argument("--steps", type=int, default=10, help=f"timed steps after {WARMUP} of warm-up")
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--name", default="train_step", help="the result is written to <output>/<name>.json")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--cell", help=argparse.SUPPRESS)
    return options


def measure(cell: dict) -> dict:
    """Build the cell's engine, run its steps, return its row."""
    if cell["device"] == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from model.presets import preset_config
    from training.config import TrainingArguments
    from training.engine import DTYPES, build_engine, build_model, start_ranks
    from training.plan import make_plan, resolve_device
    from training.step import train_step
    from training.weights import initial_weights

    args = TrainingArguments(
        per_device_train_batch_size=cell["batch_size"],
        placement=cell["placement"],
        deepspeed_config=cell["deepspeed_config"],
        expert_page_size=cell["expert_page_size"],
        gradient_checkpointing=cell["gradient_checkpointing"],
    )
    device = resolve_device(cell["device"])
    ranks = start_ranks(device)
    experts = {} if cell["num_experts"] is None else {"num_experts": cell["num_experts"]}
    config = preset_config(cell["model_size"], **experts)
    plan = make_plan(
        config, args, size=cell["model_size"], max_length=cell["max_length"], device=device, world_size=1
    )
    model = build_model(
        config,
        initial_weights(0, config.initializer_range),
        plan.ds_config,
        placement=plan.placement,
        page_size=plan.page_size,
        device=ranks.device,
        dtype=DTYPES[plan.precision],
    )
    engine = build_engine(model, args, plan.ds_config)
    shape = (cell["batch_size"], cell["max_length"])
    generator = torch.Generator().manual_seed(0)
    seconds, loss = [], float("nan")
    for step in range(WARMUP + cell["steps"]):
        ids = torch.randint(config.vocab_size, shape, generator=generator)
        batch = {
            "input_ids": ids,
            "labels": ids,
            "document_ids": torch.ones_like(ids),
            "position_ids": torch.arange(shape[1]).expand(shape),
        }
        start = time.perf_counter()
        result = train_step(engine, [batch])
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= WARMUP:
            seconds.append(time.perf_counter() - start)
        loss = float(result.sums["loss_sum"] / result.sums["targets"])
    tokens, median = shape[0] * shape[1], statistics.median(seconds)
    row = {
        "experts": config.num_experts,
        "step_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "tokens_per_s": tokens / median,
        "model_tflops": 6 * config.active_params() * tokens / median / 1e12,
        "host_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "estimate_device_gb": plan.memory.device / 1e9,
        "estimate_host_gb": plan.memory.host / 1e9,
        "json": plan.json_path.name,
        "page": plan.page_size or "",
        "loss": loss,
    }
    if device == "cuda":
        row["gpu_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return row


def run_cell(cell: dict) -> dict:
    """The cell's row, measured in a fresh process."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True)
    named = {key: cell[key] for key in ("model_size", "placement", "batch_size", "max_length")}
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if not rows:
        return {**named, "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return {**named, **json.loads(rows[-1].removeprefix("ROW "))}


def goals(rows: list[dict]) -> list[dict]:
    """For each preset with its own number of experts, its best offloaded row of the goal's shape."""
    judged = []
    for preset, target in GPU_GOALS_GB.items():
        wanted = {
            "model_size": preset,
            "batch_size": 1,
            "max_length": 512,
            "experts": PRESETS[preset].num_experts,
        }
        peaks = [
            row["gpu_allocated_gb"]
            for row in rows
            if row["placement"] != "resident" and "gpu_allocated_gb" in row and wanted.items() <= row.items()
        ]
        if peaks:
            name = f"GB of GPU memory, {preset} offloaded, 1 x 512 tokens"
            judged.append(goal(name, target, min(peaks), at_least=False))
    return judged


def main() -> None:
    args = parser().parse_args()
    if args.cell:
        print("ROW " + json.dumps(measure(json.loads(args.cell))), flush=True)
        return
    axes = ("model_size", "placement", "deepspeed_config", "batch_size", "max_length", "expert_page_size")
    fixed = {key: getattr(args, key) for key in ("gradient_checkpointing", "num_experts", "steps", "device")}
    rows = []
    for values in itertools.product(*(getattr(args, axis) for axis in axes)):
        rows.append(run_cell({**dict(zip(axes, values, strict=True)), **fixed}))
        print(json.dumps(rows[-1]), flush=True)
    report(args.output / f"{args.name}.json", rows, goals(rows), args.device)


if __name__ == "__main__":
    main()
