"""Streamed experts against everything else that trains the same model with its experts off the GPU, or on it.

    python benchmarks/offload.py --model-size 3B 1B --tokens 2048 8192 32768
    python benchmarks/offload.py --only "streamed bf16" resident "tight bf16" --model-size 3B
    python benchmarks/offload.py --keep

Same model, tokens and precision of compute in every cell: `streamed`, also `lean`, with 8-bit moments and smaller
slots, so that 3B trains on 32,768 tokens in 5 GB; `resident`, all in GPU memory; `zero3`,
DeepSpeed's ZeRO-3 with weights and optimizer on the CPU, in pages of 8 experts or the whole bank, with windows of
two pages or DeepSpeed's own, with fp32 or bf16 optimizer state; `fsdp2`, torch's CPU offload. Cells come in the
order of their importance and the result is written after each, so a run that is ended keeps what it measured,
and `--keep` goes on with the rest. From `--recompute-from` tokens on, every cell recomputes activations.

Beside the columns of `benchmarks/cell.py`, a streamed row has: its speed over the best zero3 and fsdp2 cell and
as a share of resident's; the seconds that its bytes take on the bus measured in the same run, each way as if alone
(`bus_s`) and with both ways shared (`bus_shared_s`); its physical limit, the larger of `bus_s` and the resident
step (of the same routing); and its share of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cell import WARMUP, Cell, run_all
from benchmarks.results import DIRECTORY, goal, measured_before
from experts import default_page_size
from model.presets import PRESETS
from training import deepspeed_config

ROW = 512  # tokens in a row of the batch
STREAMED, INT8, LEAN = "streamed bf16", "streamed int8", "streamed lean int8"
OVER_ZERO3 = {2048: 3.5, 32768: 3.0}  # tokens a step -> times as fast as the best zero3 cell
OF_BUS, OF_RESIDENT, GPU_GB = 0.85, 0.7, 5.0
WINDOWS = (
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "reduce_bucket_size",
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", nargs="+", default=["3B", "1B"])
    options.add_argument(
        "--tokens", nargs="+", type=int, default=[2048, 8192, 32768], help=f"of a step, in rows of {ROW}"
    )
    options.add_argument("--recompute-from", type=int, default=32768, metavar="TOKENS")
    options.add_argument("--only", nargs="+", metavar="TEXT", help="cells whose name contains one of these")
    options.add_argument("--keep", action="store_true", help="measure only what the result does not hold yet")
    options.add_argument("--steps", type=int, default=5, help=f"timed steps after {WARMUP} of warm-up")
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def variants(size: str, jsons: Path, device: str | None) -> Iterator[dict]:
    """What is compared, the most important first, as fields of a cell; zero3's JSONs are written to `jsons`."""
    experts = PRESETS[size].num_experts
    pages = {f"page {default_page_size(experts)}": default_page_size(experts), "bank": experts}
    yield {"name": STREAMED, "placement": "streamed", "expert_state": "bf16"}
    yield {"name": "resident", "placement": "resident"}
    for state, windows, (unit, page) in itertools.product(
        ("bf16", "fp32"), ("tight", "loose"), pages.items()
    ):
        name = f"zero3 {unit} {windows} {state}"
        yield {
            "name": name,
            "placement": "zero3",
            "expert_page_size": page,
            "deepspeed_config": str(
                zero3_json(jsons / f"{size} {name}.json", size, page, windows, state, device)
            ),
        }
    yield {
        "name": LEAN,
        "placement": "streamed",
        "expert_state": "int8",
        "expert_vram": "400MB",
    }
    yield {"name": INT8, "placement": "streamed", "expert_state": "int8"}
    for state in ("bf16", "fp32"):
        yield {"name": f"fsdp2 bank {state}", "placement": "fsdp2", "expert_state": state}
    unit, page = next(iter(pages.items()))
    yield {
        "name": f"fsdp2 {unit} bf16",
        "placement": "fsdp2",
        "expert_state": "bf16",
        "expert_page_size": page,
    }
    yield {
        "name": "streamed bf16 step routing", "placement": "streamed", "expert_state": "bf16", "routing": "step"
    }  # fmt: skip


def zero3_json(path: Path, size: str, page: int, windows: str, state: str, device: str | None) -> Path:
    """The preset's JSON for zero3 with other settings.

    Args:
        page: experts of a page. windows: tight (two pages live, one fetched ahead, one a gradient bucket) or
            loose (DeepSpeed's defaults). state: bf16 or fp32, of the optimizer.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    config = json.loads(deepspeed_config.default_path(size, "zero3", kind, 1, 1).read_text())
    zero, preset = config["zero_optimization"], PRESETS[size]
    values = page * 3 * preset.hidden_size * preset.expert_width
    tight = dict(zip(WINDOWS, (values, 2 * values, 0, 10_000, values), strict=True))
    config["zero_optimization"] = {key: zero[key] for key in zero if key not in WINDOWS} | (
        tight if windows == "tight" else {}
    )
    if state == "bf16":
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    path.write_text(json.dumps(config))
    return path


def groups(args: argparse.Namespace, jsons: Path, rows: list[dict]) -> list[list[Cell]]:
    """The cells to measure, without those that `rows` hold; the token counts of a variant share an engine."""
    per_size = [
        [(size, variant) for variant in variants(size, jsons, args.device)] for size in args.model_size
    ]
    wanted = []
    for size, variant in itertools.chain(*zip(*per_size, strict=True)):
        if args.only and not any(text in variant["name"] for text in args.only):
            continue
        done = {
            row["tokens"] for row in rows if (row["name"], row.get("model_size")) == (variant["name"], size)
        }
        wanted.append(
            [
                Cell(
                    size,
                    batch_size=tokens // ROW,
                    max_length=ROW,
                    steps=args.steps,
                    device=args.device,
                    gradient_checkpointing=tokens >= args.recompute_from,
                    **variant,
                )
                for tokens in sorted(args.tokens)
                if tokens not in done
            ]
        )
    return [cells for cells in wanted if cells]


def judge(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """The streamed rows with their comparisons, and the goals."""
    return [row | compared(row, rows) for row in rows], goals(rows)


def compared(row: dict, rows: list[dict]) -> dict:
    """The further columns of a streamed row, as far as there is something to compare with."""
    if row.get("placement") != "streamed" or "error" in row:
        return {}
    from benchmarks.bus import bus_seconds

    columns = {}
    for placement in ("zero3", "fsdp2"):
        best = fastest(rows, placement, row)
        if best:
            columns[f"over_{placement}"] = row["tokens_per_s"] / best["tokens_per_s"]
    resident, bus = fastest(rows, "resident", row), next((r for r in rows if "bus_up_gb_s" in r), None)
    if resident:
        columns["of_resident"] = row["tokens_per_s"] / resident["tokens_per_s"]
    if bus:
        alone, shared = bus_seconds(row["up_gb"], row["down_gb"], bus)
        columns |= {"bus_s": alone, "of_bus": alone / row["step_s"]}
        columns |= {"bus_shared_s": shared, "of_bus_shared": shared / row["step_s"]}
    if bus and resident and row["routing"] == resident["routing"]:
        columns["limit_s"] = max(alone, resident["step_s"])
        columns["of_limit"] = columns["limit_s"] / row["step_s"]
    return columns


def fastest(rows: list[dict], placement: str, like: dict) -> dict | None:
    """The fastest row of a placement with the model and the tokens of `like`."""
    found = [
        row
        for row in rows
        if row.get("placement") == placement
        and "error" not in row
        and all(row[key] == like[key] for key in ("model_size", "tokens", "checkpointing"))
    ]
    return max(found, key=lambda row: row["tokens_per_s"], default=None)


def goals(rows: list[dict]) -> list[dict]:
    """Of the streamed rows with token routing, each where its counterpart was measured."""
    judged = []
    for row in rows:
        if row["name"] not in (STREAMED, INT8, LEAN) or "error" in row:
            continue
        columns, tokens = compared(row, rows), row["tokens"]
        where = f"{row['name']}, {row['model_size']}, {tokens} tokens a step"
        if "over_zero3" in columns and tokens in OVER_ZERO3:
            name = f"times the tokens/s of the best zero3, {where}"
            judged.append(goal(name, OVER_ZERO3[tokens], columns["over_zero3"], at_least=True))
        if "limit_s" in columns and columns["limit_s"] == columns["bus_s"]:
            judged.append(goal(f"share of the bus, {where}", OF_BUS, columns["of_bus"], at_least=True))
        if "of_resident" in columns and tokens == 32768:
            name = f"share of resident tokens/s, {where}"
            judged.append(goal(name, OF_RESIDENT, columns["of_resident"], at_least=True))
        if "gpu_allocated_gb" in row and (row["model_size"], tokens) == ("3B", 32768):
            name = f"GB of GPU memory, {where}"
            judged.append(goal(name, GPU_GB, row["gpu_allocated_gb"], at_least=False))
    return judged


def bus_row(device: str | None) -> dict:
    """What the bus carries, measured in a process that leaves the GPU to the cells again."""
    import torch

    from benchmarks.bus import measure_bus

    on_gpu = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return {"name": "bus", **pool.submit(measure_bus, place, copies=10 if on_gpu else 1).result()}


def main() -> None:
    args = parser().parse_args()
    wrong = [tokens for tokens in args.tokens if tokens % ROW]
    if wrong:
        raise SystemExit(f"--tokens {wrong[0]} is not a multiple of {ROW}, the tokens of a row")
    path = args.output / "offload.json"
    rows = measured_before(path, args.device) if args.keep else []
    with tempfile.TemporaryDirectory() as jsons:
        cells = groups(args, Path(jsons), rows)
        if not any(row["name"] == "bus" for row in rows):
            rows.insert(0, bus_row(args.device))
        run_all(cells, path, judge, args.device, rows)


if __name__ == "__main__":
    main()
