"""What streamed experts cost in loss: the same tokens, resident and streamed, routed by token and by step.

    python benchmarks/curves.py
    python benchmarks/curves.py --tokens 3e6 --only resident "streamed int8" --keep

Each arm is a run of `train_ds.py` on the same rows in the same order, from equal weights; on a machine with
several GPUs as many arms run side by side, one a GPU. `resident` is AdamW with fp32 weights and moments; the
streamed arms have bf16 weights, rounded stochastically, with moments in bf16 or 8 bits. The result is written
after each arm, and `--keep` goes on with those that are missing. A row has the validation losses of its arm
against steps, tokens and seconds spent in steps. Goal: the last validation loss of the arms with token routing
at most 1% above that of `resident`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, REPOSITORY, goal, machine, measured_before, report, save, write

MOST_ABOVE = 0.01
BASELINE = "resident"
STREAMED = ("--placement", "streamed", "--expert-state")
ARMS = {
    BASELINE: ("--placement", "resident"),
    "streamed bf16": (*STREAMED, "bf16"),
    "streamed int8": (*STREAMED, "int8"),
    **{
        f"streamed bf16, pools of {pool}": (
            *STREAMED,
            "bf16",
            "--routing",
            "step",
            "--expert-pool",
            str(pool),
        )
        for pool in (2, 4)
    },
}
PLOT = REPOSITORY / "docs" / "images" / "curves.png"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", default="350M")
    options.add_argument("--dataset", default=str(Path(__file__).with_name("installed_python.py")))
    options.add_argument("--tokens", type=float, default=30e6, help="tokens of an arm")
    options.add_argument("--batch-size", type=int, default=32, help="rows a step")
    options.add_argument("--max-length", type=int, default=512, help="tokens a row")
    options.add_argument("--learning-rate", default="5e-4", help="of dense parameters and experts")
    options.add_argument("--evaluations", type=int, default=20, help="points of a curve")
    options.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    options.add_argument(
        "--keep", action="store_true", help="train only the arms the result does not hold yet"
    )
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--plot", type=Path, default=PLOT, help="default: docs/images/curves.png")
    return options


def command(args: argparse.Namespace, arm: str, directory: str) -> list[str]:
    """What trains an arm, its runs below `directory`."""
    steps = max(1, round(args.tokens / (args.batch_size * args.max_length)))
    every = max(1, steps // args.evaluations)
    flags = {
        "--model-size": args.model_size,
        "--dataset": args.dataset,
        "--batch-size": args.batch_size,
        "--max-length": args.max_length,
        "--learning-rate": args.learning_rate,
        "--local-learning-rate": args.learning_rate,
        "--warmup-steps": steps // 20,
        "--max-steps": steps,
        "--epochs": 1000,
        "--validation-fraction": 0.005,
        "--eval-steps": every,
        "--logging-steps": every,
        "--save-strategy": "no",
        "--report-to": "none",
        "--output-dir": directory,
    }
    if args.device:
        flags["--device"] = args.device
    words = [str(word) for word in itertools.chain(*flags.items())]
    return [sys.executable, str(REPOSITORY / "train_ds.py"), *words, *ARMS[arm]]


def settings(args: argparse.Namespace) -> dict:
    """What arms that are compared have in common."""
    common = {key: getattr(args, key) for key in ("model_size", "batch_size", "max_length", "learning_rate")}
    return common | {"dataset": Path(args.dataset).name, "asked_tokens": args.tokens}


def train(args: argparse.Namespace, arm: str, gpus: Queue) -> dict:
    """Train an arm on a GPU taken from the queue; its row."""
    gpu = gpus.get()
    try:
        with tempfile.TemporaryDirectory() as directory:
            chosen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
            done = subprocess.run(
                command(args, arm, directory),
                env={**os.environ, **chosen},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                print(done.stdout[-3000:], file=sys.stderr, flush=True)
                lines = done.stdout.strip().splitlines() or ["no output"]
                return {"arm": arm, "error": lines[-1][:300]}
            (metrics,) = Path(directory).glob("*/metrics.jsonl")
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            return {"arm": arm, **settings(args), **curve(lines, args.batch_size * args.max_length)}
    finally:
        gpus.put(gpu)


def visible_gpus(device: str | None) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES can be set to for one GPU each; a single None where there is none."""
    import torch

    count = 0 if device == "cpu" else torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(number) for number in range(count)]) if count else [None]


def curve(lines: list[dict], step_tokens: int) -> dict:
    """The columns of a row from the lines of `metrics.jsonl`."""
    seconds, before, points, last = 0.0, 0, [], {}
    for line in lines:
        if "step_seconds" in line:
            seconds += line["step_seconds"] * (line["step"] - before)
            before, last = line["step"], line
        elif "validation/overall/loss" in line:
            step = line["step"]
            points.append((step, step * step_tokens, seconds, line["validation/overall/loss"]))
    steps, tokens, times, losses = map(list, zip(*points, strict=True))
    memory = {key: last[f"memory/{key}"] for key in ("gpu_peak_gb", "host_gb") if f"memory/{key}" in last}
    return {
        "tokens": tokens[-1],
        "seconds": seconds,
        "tokens_per_s": tokens[-1] / seconds,
        "loss": losses[-1],
        "best_loss": min(losses),
        **memory,
        "curve": {"step": steps, "tokens": tokens, "seconds": times, "validation_loss": losses},
    }


def goals(rows: list[dict]) -> list[dict]:
    """The last loss of the streamed arms with token routing, over that of the resident one."""
    losses = {row["arm"]: row["loss"] for row in rows if "loss" in row}
    return [
        goal(
            f"last validation loss over resident's, less 1: {arm}",
            MOST_ABOVE,
            losses[arm] / losses[BASELINE] - 1,
            at_least=False,
        )
        for arm in ("streamed bf16", "streamed int8")
        if {arm, BASELINE} <= losses.keys()
    ]


def draw(rows: list[dict], title: str, path: Path):
    """Validation loss against tokens and against seconds; the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=140, layout="constrained")
    for axes, column, unit, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("tokens", "seconds"),
        (1e6, 1.0),
        ("million tokens", "seconds in steps"),
        strict=True,
    ):
        for row in (row for row in rows if column in row["curve"]):
            x = [value / unit for value in row["curve"][column]]
            style = "--" if "pools" in row["arm"] else "-"
            axes.plot(x, row["curve"]["validation_loss"], style, label=row["arm"], linewidth=1.5)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="validation loss, nats a token")
    figure.axes[0].legend()
    figure.suptitle(title, fontsize=10)
    save(figure, path)
    return figure


def main() -> None:
    args = parser().parse_args()
    path = args.output / "curves.json"
    rows = measured_before(path, args.device) if args.keep else []
    rows = [row for row in rows if settings(args).items() <= row.items()]
    arms = [arm for arm in args.only if arm not in {row["arm"] for row in rows}]
    gpus: Queue = Queue()
    for gpu in visible_gpus(args.device):
        gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        for done in as_completed([pool.submit(train, args, arm, gpus) for arm in arms]):
            rows = sorted([*rows, done.result()], key=lambda row: list(ARMS).index(row["arm"]))
            write(path, rows, goals(rows), args.device)
    good = [row for row in rows if "curve" in row]
    if good:
        tokens = f"{good[0]['tokens'] / 1e6:.0f}M tokens"
        draw(good, f"{args.model_size}, {tokens}; {machine(args.device)['gpu']}", args.plot)
        print(f"drawn {args.plot}")
    report(path, rows, goals(rows), args.device)


if __name__ == "__main__":
    main()
