"""How training scales over the GPUs of one host, beside DeepSpeed's own expert-parallel layers.

    python benchmarks/scale_out.py                                       # all tables
    python benchmarks/scale_out.py --model-size 3B --num-gpus 1 2 --zero-stage 1 --scaling weak
    python benchmarks/scale_out.py --placement streamed --keep

`resident`: each preset on each number of GPUs, for the numbers of ranks that share the experts of a layer and the
ZeRO stages asked for; beside each row its baselines, `autoep` and `deepspeed.moe` (`benchmarks/deepspeed_moe.py`),
of the same shape, tokens, precision, ranks, optimizer and data. `streamed`: under its own JSON. The losses of the
router weigh nothing anywhere, since autoep has none. Weak scaling keeps the rows of a GPU, strong scaling those of
a step. Every cell runs in processes of its own, and one that fails is a row with its error. The result is written
after each, so a run that is ended keeps what it measured, and `--keep` goes on with the rest.

Beside the columns of `benchmarks/cell.py`, a row has
- `tflops_a_gpu`, what the model needs (`step_flops`) a second and GPU, and `of_peak`, its share of the GPU's dense
  bf16 peak (`PEAKS`);
- `weak_scaling` and `strong_scaling`, tokens/s a GPU over those of the row with the fewest GPUs that has the same
  preset, placement and ZeRO stage, and the same rows a GPU or a step; of several such rows, the fastest;
- `all_to_all_s`, the seconds of one more step in all-to-all on rank 0, waiting for slower ranks included: what
  torch.profiler recorded under NCCL's kernels of send and receive, which nothing else here uses, or under gloo's
  all_to_all;
- `over_autoep` and `over_deepspeed.moe`, tokens/s over the baseline's. The losses of the first step, from equal
  weights on equal data, have to agree within `SAME_START`; else the row says why there is no ratio.

Goals, for each preset, number of GPUs and tokens a step: the fastest resident row over the fastest row of each
baseline, at least 1, and the last losses apart by at most `SAME_LOSS` of how far ours has fallen, wherever
there is a ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cell import DEEPSPEED, WARMUP, Cell, run_all
from benchmarks.results import DIRECTORY, goal, machine, measured_before
from model.presets import PRESETS, preset_config
from training import deepspeed_config

MODEL_SIZES = {"resident": ["1B", "3B", "7B"], "streamed": ["7B", "13B"]}
SAME_START = {"fp32": 1e-5, "bf16": 1e-4}  # relative difference of the first losses, by precision
# Small: where a batch is learnt by heart in a few steps, rounding alone parts the losses.
LEARNING_RATE = 1e-5
SAME_LOSS = 0.01  # difference of the last losses, of what was learnt
# Dense bf16 TFLOP/s by a part of the GPU's name, from NVIDIA's data sheets of H200, H100, A100, HGX B200 and L40S
# (where they give the rate with sparsity, half of it) and its white paper on the Ada architecture.
PEAKS = {
    "H200 NVL": 835.5,
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.05,
    "RTX 4090": 165.2,
}
SHAPE = ("model_size", "num_gpus", "batch_size", "max_length")  # what is compared is equal in these


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--placement", nargs="+", choices=("resident", "streamed"), default=["resident", "streamed"]
    )
    options.add_argument(
        "--model-size",
        nargs="+",
        choices=PRESETS,
        help="default: " + "; ".join(f"{name} {' '.join(sizes)}" for name, sizes in MODEL_SIZES.items()),
    )
    options.add_argument(
        "--num-gpus", nargs="+", type=int, help="(CPU: ranks) default: 1 2 4 8, as far as the host has them"
    )
    options.add_argument(
        "--expert-parallel",
        nargs="+",
        type=int,
        help="ranks that share the experts of a layer, where they divide both; default: every divisor",
    )
    options.add_argument("--zero-stage", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2])
    options.add_argument("--scaling", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    options.add_argument("--batch-size", type=int, default=32, help="rows a GPU, for weak scaling")
    options.add_argument(
        "--step-rows", type=int, help="rows a step, for strong scaling; default: --batch-size"
    )
    options.add_argument("--max-length", type=int, default=512, help="tokens a row")
    options.add_argument("--baseline", nargs="*", choices=DEEPSPEED, default=DEEPSPEED)
    options.add_argument("--steps", type=int, default=20, help=f"timed steps after {WARMUP} of warm-up")
    options.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="write a step of rank 0 of each of our rows as a Chrome trace",
    )
    options.add_argument("--keep", action="store_true", help="measure only what the result does not hold yet")
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


# -- what is measured ----------------------------------------------------------------------------------------


def cells(args: argparse.Namespace, jsons: Path, gpus: list[int]) -> Iterator[Cell]:
    """All cells on these numbers of GPUs, baselines after what they are compared with.

    Raises:
        SystemExit: rows of a step that do not divide among the GPUs, or ranks that can share no experts.
    """
    step_rows = args.step_rows or args.batch_size
    if min(gpus) < 1:
        raise SystemExit("--num-gpus must be at least 1")
    uneven = [count for count in gpus if "strong" in args.scaling and step_rows % count]
    if uneven:
        raise SystemExit(f"--step-rows {step_rows} do not divide among {uneven[0]} GPUs: use another number")
    sizes = args.model_size or MODEL_SIZES["resident"]
    possible = {share for size in sizes for count in gpus for share in shares(size, count)}
    for share in args.expert_parallel or ():
        if "resident" in args.placement and share not in possible:
            raise SystemExit(
                f"--expert-parallel {share} must divide the GPUs and the experts of a layer: use "
                f"{', '.join(map(str, sorted(possible)))}, or other --num-gpus"
            )
    rows = {"weak": lambda count: args.batch_size, "strong": lambda count: step_rows // count}
    for placement in args.placement:
        for size in args.model_size or MODEL_SIZES[placement]:
            stages = args.zero_stage if placement == "resident" else [None]
            for stage, count in ((stage, count) for stage in stages for count in gpus):
                loads = dict.fromkeys(rows[scaling](count) for scaling in args.scaling)
                for layout in layouts(args, placement, size, stage, count, jsons):
                    for batch_size in loads:
                        cell = Cell(
                            size,
                            batch_size=batch_size,
                            max_length=args.max_length,
                            steps=args.steps,
                            device=args.device,
                            num_gpus=count,
                            learning_rate=LEARNING_RATE,
                            router_losses=False,
                            record=True,
                            **layout,
                        )
                        is_traced = args.trace and cell.placement not in DEEPSPEED
                        yield replace(cell, trace=trace_file(args.trace, cell)) if is_traced else cell


def shares(size: str, count: int) -> list[int]:
    """How many ranks may share the experts of a layer: divisors of both the experts and the ranks."""
    common = math.gcd(PRESETS[size].num_experts, count)
    return [share for share in range(1, common + 1) if common % share == 0]


def layouts(
    args: argparse.Namespace, placement: str, size: str, stage: int | None, count: int, jsons: Path
) -> Iterator[dict]:
    """Fields of the cells of a preset on `count` GPUs: placement, baselines, and who shares experts."""
    if placement == "streamed":
        yield {"name": placement, "placement": placement}
        return
    path = stage_json(jsons / f"{size}_zero{stage}.json", size, stage)
    for share in shares(size, count):
        if args.expert_parallel and share not in args.expert_parallel:
            continue
        for name in ("resident", *args.baseline):
            yield {
                "name": f"{name} ZeRO-{stage}",
                "placement": name,
                "deepspeed_config": str(path),
                "expert_parallel_size": share,
            }


def stage_json(path: Path, size: str, stage: int) -> Path:
    """The preset's JSON for the GPUs of one machine, under another ZeRO stage."""
    config = json.loads((deepspeed_config.DIRECTORY / f"{size}_a100_node.json").read_text())
    config["zero_optimization"]["stage"] = stage
    path.write_text(json.dumps(config))
    return path


def refusal(cell: Cell) -> str | None:
    """Why a cell cannot run, where that is known before."""
    if cell.placement == "deepspeed.moe" and cell.name.endswith("ZeRO-3"):
        return "DeepSpeed: Native DeepSpeed MoE is not supported with ZeRO Stage 3"
    return None


def trace_file(directory: Path, cell: Cell) -> str:
    """Where the trace of a cell goes."""
    words = (cell.model_size, *cell.name.split(), f"{cell.num_gpus}gpus")
    words += (f"share{cell.expert_parallel_size}",) * (cell.expert_parallel_size is not None)
    return str(directory.resolve() / ("_".join((*words, f"{cell.batch_size}rows")) + ".json"))


def identity(row: dict) -> tuple:
    """What tells the rows of a result apart."""
    return tuple(row.get(key) for key in ("name", "expert_parallel_size", *SHAPE))


# -- what follows from it ------------------------------------------------------------------------------------


def step_flops(size: str, tokens: int, length: int) -> float:
    """Floating-point operations that a step of the model needs.

    Products with weights take 2 operations a weight and token in forward and 4 in backward: 6 · active parameters
    · tokens; tied embeddings count once, as the head. A token attends to S / 2 positions on the average; scores
    and values take 2 · C operations each a position and head, three times that with backward, so L layers of H
    heads take 6 · L · H · C · S a token. Norms, rotary embeddings, softmax and recomputation do not count.
    """
    config = preset_config(size)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 6.0 * (config.active_params() + attention) * tokens


def peak_tflops(gpu: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU by its name; None: not in the table."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in gpu.lower()), None)


def judge(rows: list[dict], gpu: str) -> tuple[list[dict], list[dict]]:
    """The rows with what follows from them, measured on a GPU of that name, and the goals."""
    return [row | derived(row, rows, gpu) for row in rows], goals(rows)


def derived(row: dict, rows: list[dict], gpu: str) -> dict:
    """The further columns of a row."""
    if "error" in row:
        return {}
    flops = step_flops(row["model_size"], row["tokens"], row["max_length"])
    columns = {"tflops_a_gpu": flops / row["step_s"] / row["num_gpus"] / 1e12}
    if peak := peak_tflops(gpu):
        columns["of_peak"] = columns["tflops_a_gpu"] / peak
    for name, kept in (("weak_scaling", "batch_size"), ("strong_scaling", "tokens")):
        base = fewest_gpus(row, rows, kept)
        if base["num_gpus"] < row["num_gpus"]:
            columns[name] = speed(row) / speed(base)
    if row["placement"] == "resident":
        for name in DEEPSPEED:
            other = baseline_of(row, rows, name)
            if other:
                columns[f"over_{name}"] = why_not(row, other) or row["tokens_per_s"] / other["tokens_per_s"]
    return columns


def speed(row: dict) -> float:
    """Tokens a second and GPU."""
    return row["tokens_per_s"] / row["num_gpus"]


def fewest_gpus(row: dict, rows: list[dict], kept: str) -> dict:
    """The row that scaling is measured against: same but for GPUs, for who shares experts, and for rows as far as
    `kept`, batch_size or tokens, stays."""
    same = ("model_size", "name", "max_length", kept)
    found = [r for r in rows if "error" not in r and all(r[key] == row[key] for key in same)]
    return min(found, key=lambda r: (r["num_gpus"], -r["tokens_per_s"]))


def baseline_of(row: dict, rows: list[dict], name: str) -> dict | None:
    """The baseline's row of the same shape, ZeRO stage and sharing of experts."""
    wanted = identity(row | {"name": row["name"].replace("resident", name)})
    return next((other for other in rows if identity(other) == wanted), None)


def why_not(row: dict, other: dict) -> str | None:
    """Why a row is not to be compared with that of a baseline; None: it is."""
    if "error" in other:
        return "it failed"
    apart = abs(other["first_loss"] / row["first_loss"] - 1)
    if not apart <= SAME_START[row["precision"]]:
        return f"it starts elsewhere: loss {other['first_loss']:.6f}, ours {row['first_loss']:.6f}"
    if other.get("dropped_rows"):
        return f"it drops {other['dropped_rows']} rows"
    return None


def goals(rows: list[dict]) -> list[dict]:
    """Of the resident rows of several GPUs, where baselines could be compared with them."""
    judged = []
    ours = [r for r in rows if r["placement"] == "resident" and "error" not in r and r["num_gpus"] > 1]
    for shape in dict.fromkeys(tuple(row[key] for key in SHAPE) for row in ours):
        mine = [row for row in ours if tuple(row[key] for key in SHAPE) == shape]
        size, count, batch_size, length = shape
        where = f"{size} on {count} GPUs, {batch_size} x {length} tokens each"
        for name in DEEPSPEED:
            pairs = [(row, baseline_of(row, rows, name)) for row in mine]
            pairs = [(row, other) for row, other in pairs if other and not why_not(row, other)]
            if not pairs:
                continue
            best = max(row["tokens_per_s"] for row in mine)
            ratio = best / max(other["tokens_per_s"] for _, other in pairs)
            judged.append(goal(f"times the tokens/s of {name}, {where}", 1.0, ratio, at_least=True))
            apart = max(
                abs(row["loss"] - other["loss"]) / (row["first_loss"] - row["loss"]) for row, other in pairs
            )
            judged.append(goal(f"last loss beside {name}, {where}", SAME_LOSS, apart, at_least=False))
    return judged


def host_gpus(device: str | None) -> int:
    """GPUs of this host; on a CPU two ranks are enough to see that all runs."""
    import torch

    return 2 if device == "cpu" else torch.cuda.device_count() or 2


def main() -> None:
    args = parser().parse_args()
    path = args.output / "scale_out.json"
    rows = measured_before(path, args.device) if args.keep else []
    gpus = args.num_gpus or [count for count in (1, 2, 4, 8) if count <= host_gpus(args.device)]
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as jsons:
        done, groups = {identity(row) for row in rows}, []
        for cell in cells(args, Path(jsons), gpus):
            if identity(cell.named()) in done:
                continue
            if error := refusal(cell):
                rows.append(cell.named() | {"error": error})
            else:
                groups.append([cell])
        run_all(groups, path, partial(judge, gpu=machine(args.device)["gpu"]), args.device, rows)


if __name__ == "__main__":
    main()
