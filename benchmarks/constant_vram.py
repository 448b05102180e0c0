"""GPU memory of training against the number of experts, streamed: it should not grow.

    python benchmarks/constant_vram.py
    python benchmarks/constant_vram.py --model-size 1B --num-experts 8 32 128 --expert-page-size 4
    python benchmarks/constant_vram.py --presets

Width, depth, active experts and page stay as they are in one preset; the experts a layer grow. Goal: from the
fewest to the most, the allocated peak rises by at most 2%. The result is `constant_vram.json` and a plot.

With `--presets` the five presets as they are, 8-bit moments for the largest. Goals: GPU memory of each, and host
memory of the largest. The result is `presets_vram.json`.

`benchmarks/cell.py` says what a row holds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cell import WARMUP, Cell, run_all
from benchmarks.results import DIRECTORY, REPOSITORY, goal, gpu_goals, machine, save
from model.presets import PRESETS

MOST_GROWTH = 0.02
HOST_GOAL_GB = 60  # the 13B model with 8-bit moments
PLOT = REPOSITORY / "docs" / "images" / "constant_vram.png"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", default="3B", help="whose width, depth and expert width")
    options.add_argument("--num-experts", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    options.add_argument(
        "--presets", nargs="*", metavar="PRESET", help="measure these instead (default: all)"
    )
    options.add_argument("--batch-size", type=int, default=1)
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument(
        "--expert-page-size", type=int, default=2, help="with --presets as --expert-vram allows"
    )
    options.add_argument("--expert-vram", default="128MB", help="with --presets")
    options.add_argument("--expert-state", default=None, help="default: bf16, with --presets int8 for 13B")
    options.add_argument(
        "--deepspeed-config",
        default=None,
        help="default: streamed_offload, for 13B with --presets streamed_zero3",
    )
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--steps", type=int, default=5, help=f"timed steps after {WARMUP} of warm-up")
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--plot", type=Path, default=PLOT, help="default: docs/images/constant_vram.png")
    return options


def growth_cells(args: argparse.Namespace, shared: dict) -> list[Cell]:
    """One size, more and more experts."""
    return [
        Cell(
            args.model_size,
            num_experts=experts,
            expert_page_size=args.expert_page_size,
            expert_state=args.expert_state,
            deepspeed_config=args.deepspeed_config or "streamed_offload",
            **shared,
        )
        for experts in sorted(args.num_experts)
    ]


def preset_cells(args: argparse.Namespace, shared: dict) -> list[Cell]:
    """The presets as they are."""
    return [
        Cell(
            size,
            expert_state=args.expert_state or ("int8" if size == "13B" else None),
            expert_vram=args.expert_vram,
            deepspeed_config=args.deepspeed_config
            or ("streamed_zero3" if size == "13B" else "streamed_offload"),
            **shared,
        )
        for size in args.presets or [name for name in PRESETS if name != "tiny"]
    ]


def growth_goals(rows: list[dict]) -> list[dict]:
    """How much the allocated peak grew from the fewest experts to the most."""
    peaks = {row["experts"]: row["gpu_allocated_gb"] for row in rows if "gpu_allocated_gb" in row}
    if len(peaks) < 2:
        return []
    fewest, most = min(peaks), max(peaks)
    growth = peaks[most] / peaks[fewest] - 1
    return [goal(f"growth of GPU memory, {fewest} to {most} experts", MOST_GROWTH, growth, at_least=False)]


def preset_goals(rows: list[dict]) -> list[dict]:
    """GPU memory of the presets, and host memory of 13B with 8-bit moments."""
    host = [
        goal(
            "GB of host memory, 13B streamed, 8-bit moments", HOST_GOAL_GB, row["host_rss_gb"], at_least=False
        )
        for row in rows
        if row["model_size"] == "13B" and row.get("state") == "int8"
    ]
    return gpu_goals(rows) + host


def draw(rows: list[dict], gpu: str, path: Path):
    """GPU memory against the number of experts, beside what the experts take in host memory; the figure."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in rows if "gpu_allocated_gb" in row), key=lambda row: row["experts"])
    experts = [row["experts"] for row in rows]
    figure = Figure(figsize=(7.5, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    lines = (
        ("experts and their optimizer state, in host memory", "experts_gb", "tab:gray", "--"),
        ("GPU memory, allocated peak", "gpu_allocated_gb", "tab:green", "-"),
    )
    for label, column, colour, style in lines:
        values = [row[column] for row in rows]
        axes.plot(experts, values, style, marker="o", color=colour, label=label, linewidth=2)
        for place, value in zip(experts, values, strict=True):
            axes.annotate(
                f"{value:.3g}", (place, value), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
    size, load = rows[0]["model_size"], f"{rows[0]['batch_size']} x {rows[0]['max_length']} tokens"
    preset = PRESETS[size]
    axes.set_xticks(experts, [str(number) for number in experts])
    axes.set_ylim(bottom=0, top=1.1 * max(row["experts_gb"] for row in rows))
    axes.set(
        xlabel="experts a layer (2 of them active)",
        ylabel="GB",
        title=f"{size} shape: {preset.num_layers} layers, D {preset.hidden_size}, F {preset.expert_width}; "
        f"{load} a step; {gpu}",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    save(figure, path)
    return figure


def main() -> None:
    args = parser().parse_args()
    keys = ("batch_size", "max_length", "steps", "device", "gradient_checkpointing")
    shared = {"placement": "streamed"} | {key: getattr(args, key) for key in keys}
    if args.presets is not None:
        cells, goals, name = preset_cells(args, shared), preset_goals, "presets_vram"
    else:
        cells, goals, name = growth_cells(args, shared), growth_goals, "constant_vram"
    path = args.output / f"{name}.json"
    rows = run_all([[cell] for cell in cells], path, lambda rows: (rows, goals(rows)), args.device)
    if args.presets is None and any("gpu_allocated_gb" in row for row in rows):
        draw(rows, machine(args.device)["gpu"], args.plot)
        print(f"drawn {args.plot}")


if __name__ == "__main__":
    main()
