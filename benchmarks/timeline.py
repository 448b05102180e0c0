"""What a GPU does during one streamed step: copies up and down, collectives, updates and other kernels in time.

    python benchmarks/timeline.py
    python benchmarks/timeline.py --model-size 7B --batch-size 64 --gradient-checkpointing

torch.profiler records one step of rank 0. The result is `timeline.json`, with the seconds in which each lane was
busy, those in which copies and kernels ran at once, and the heaviest kernels; and a picture of the step. `--trace`
keeps the Chrome trace, for chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cell import Cell, run_cells
from benchmarks.results import DIRECTORY, REPOSITORY, machine, report, save

Span = tuple[float, float]
"""Start and end in seconds."""
LANES = {
    "copies up": "tab:blue",
    "copies down": "tab:cyan",
    "collectives": "tab:purple",
    "AdamW of experts": "tab:orange",
    "other kernels": "tab:green",
}
UPDATES = ("update_kernel", "accumulate_kernel")  # of kernels/adamw_triton.py
PLOT = REPOSITORY / "docs" / "images" / "timeline.png"
SHOWN_S = 0.05  # the second panel


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", default="3B")
    options.add_argument("--batch-size", type=int, default=16, help="rows of a GPU")
    options.add_argument("--max-length", type=int, default=512)
    options.add_argument("--num-gpus", type=int, default=1)
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--expert-state", choices=("fp32", "bf16", "int8"), help="default: bf16")
    options.add_argument("--expert-vram", help="as of train_ds.py, whose default is this one's too")
    options.add_argument("--steps", type=int, default=5, help="timed before the recorded one")
    options.add_argument("--trace", type=Path, help="keep the Chrome trace there")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--plot", type=Path, default=PLOT, help="default: docs/images/timeline.png")
    return options


def lane(event: dict) -> str | None:
    """Where an event of a Chrome trace belongs; None: nothing that the GPU does."""
    name, category = event["name"].lower(), event.get("cat")
    if category == "gpu_memcpy" and "htod" in name:
        return "copies up"
    if category == "gpu_memcpy" and "dtoh" in name:
        return "copies down"
    if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
        return None
    if "nccl" in name:
        return "collectives"
    return "AdamW of experts" if name in UPDATES else "other kernels"


def spans(events: Iterable[dict]) -> dict[str, list[Span]]:
    """Of each lane the times in which it is busy, from the start of the first; none overlap within a lane."""
    found: dict[str, list[Span]] = {name: [] for name in LANES}
    for event in events:
        if event.get("ph") == "X" and (name := lane(event)):
            found[name].append((event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6))
    start = min((span[0] for lane_spans in found.values() for span in lane_spans), default=0.0)
    return {name: union((a - start, b - start) for a, b in found[name]) for name in LANES}


def union(times: Iterable[Span]) -> list[Span]:
    """The same times without overlaps, in order."""
    merged: list[Span] = []
    for start, end in sorted(times):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def seconds(times: Iterable[Span]) -> float:
    return sum(end - start for start, end in times)


def both(one: list[Span], other: list[Span]) -> float:
    """Seconds that are in both."""
    return seconds(one) + seconds(other) - seconds(union([*one, *other]))


def busy(lanes: dict[str, list[Span]]) -> dict[str, float]:
    """The columns that follow from the lanes."""
    copies = union([*lanes["copies up"], *lanes["copies down"]])
    kernels = union([*lanes["AdamW of experts"], *lanes["other kernels"]])
    everything = union(span for name in LANES for span in lanes[name])
    return {
        "recorded_s": everything[-1][1],
        **{f"{name.replace(' ', '_')}_s": seconds(lanes[name]) for name in LANES},
        "copies_and_kernels_at_once_s": both(copies, kernels),
        "up_and_down_at_once_s": both(lanes["copies up"], lanes["copies down"]),
        "nothing_s": everything[-1][1] - seconds(everything),
    }


def heaviest(events: Iterable[dict], count: int = 12) -> list[dict]:
    """The kernels that take most time: name, seconds, launches."""
    time, launches = Counter(), Counter()
    for event in events:
        if event.get("cat") == "kernel" and event.get("ph") == "X":
            time[event["name"]] += event["dur"] / 1e6
            launches[event["name"]] += 1
    return [
        {"kernel": name[:200], "kernel_s": spent, "launches": launches[name]}
        for name, spent in time.most_common(count)
    ]


def draw(lanes: dict[str, list[Span]], title: str, path: Path):
    """The whole step, and its middle enlarged; the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=140, layout="constrained")
    end = max(span[1] for times in lanes.values() for span in times)
    middle = 0.7 * end  # within backward
    for axes, (left, right) in zip(
        figure.subplots(2), ((0, end), (middle, min(end, middle + SHOWN_S))), strict=True
    ):
        for place, (name, colour) in enumerate(LANES.items()):
            shown = [(a, b - a) for a, b in lanes[name] if b > left and a < right]
            axes.broken_barh([(1e3 * a, 1e3 * b) for a, b in shown], (-place - 0.4, 0.8), color=colour)
        axes.set_yticks([-place for place in range(len(LANES))], list(LANES))
        axes.set_xlim(1e3 * left, 1e3 * right)
    axes.set_xlabel("milliseconds of the step; below, a part of its backward")
    figure.suptitle(title, fontsize=10)
    save(figure, path)
    return figure


def main() -> None:
    args = parser().parse_args()
    gpu = machine(None)["gpu"]
    if gpu.startswith("no GPU"):
        raise SystemExit("a timeline of the GPU needs an NVIDIA GPU, and none is here")
    with tempfile.TemporaryDirectory() as directory:
        trace = (args.trace or Path(directory) / "trace.json").resolve()
        cell = Cell(
            args.model_size,
            "streamed",
            args.batch_size,
            args.max_length,
            steps=args.steps,
            num_gpus=args.num_gpus,
            gradient_checkpointing=args.gradient_checkpointing,
            expert_state=args.expert_state,
            expert_vram=args.expert_vram,
            record=True,
            trace=str(trace),
        )
        (row,) = run_cells([cell])
        if "error" in row:
            raise SystemExit(row["error"])
        events = json.loads(trace.read_text())["traceEvents"]
    lanes = spans(events)
    row |= busy(lanes)
    rows = [row, *heaviest(events)]
    title = f"{args.model_size} streamed, {row['tokens']:,} tokens a step, {gpu}"
    draw(lanes, title, args.plot)
    report(args.output / "timeline.json", rows, [], None)
    print(f"drawn {args.plot}")


if __name__ == "__main__":
    main()
