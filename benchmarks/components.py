"""What the reasoning components are worth: tasks that tell them apart, and a model on real data with each of them.

    python benchmarks/components.py --tasks                        # the three tasks, one seed: an hour on a core
    python benchmarks/components.py --tasks recall --seeds 0 1 2
    python benchmarks/components.py --data all,my.jsonl --model-size 350M --steps 4000

`--tasks` runs `benchmarks/recall.py` (neural memory), `benchmarks/far_lookup.py` (cache augmentation) and
`benchmarks/countdown.py` (tree of thoughts); each has a result of its own, and says what it compares.

`--data` trains and evaluates the real thing through `train_ds.py` and `eval_ds.py`: the base model; the same with
a memory and with a value head, from the same seed on the same rows in the same order; and, on the finished base,
a coprocessor with the base frozen, jointly, and the base trained as much longer. A row has validation perplexity
by family, exact match, tokens/s and GPU memory; for the value head also accuracy and tokens of each search. The
result is `components.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, REPOSITORY, report

TASKS = ("recall", "far_lookup", "countdown")
CACHE = ("--use-cache-augmentation", "--stage", "cache")
ARMS = {  # name -> (flags, share of the base's steps; None: from the start)
    "base": ((), None),
    "memory": (("--use-neural-memory",), None),
    "memory, window 128": (("--use-neural-memory", "--memory-window", "128"), None),
    "value head": (("--use-tree-of-thoughts",), None),
    "base, longer": ((), 0.25),
    "cache": (CACHE, 0.25),
    "cache, joint": ((*CACHE, "--cache-joint"), 0.25),
}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tasks", nargs="*", choices=TASKS, help="run these (default: all)")
    options.add_argument("--data", help="train on this --dataset, and measure every arm")
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--model-size", default="350M")
    options.add_argument("--steps", type=int, default=4000, help="of the base model")
    options.add_argument("--max-samples", type=int, default=200, help="answers of a family to check")
    options.add_argument("--device", choices=("cpu", "cuda"), default=None)
    options.add_argument("--short", action="store_true", help="the tasks as the tests run them")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "components")
    return options


def script(name: str, *words: object) -> None:
    """Run one of our scripts; what it says is seen."""
    subprocess.run([sys.executable, str(REPOSITORY / name), *map(str, words)], check=True)


def run_tasks(args: argparse.Namespace) -> None:
    short = ["--short"] if args.short else []
    for task in args.tasks or TASKS:
        script(f"benchmarks/{task}.py", "--seeds", *args.seeds, "--output", args.output, *short)


def train(args: argparse.Namespace, arm: str, seed: int, base: Path | None) -> Path:
    """The run of an arm."""
    flags, share = ARMS[arm]
    output = args.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    steps = args.steps if share is None else max(1, int(share * args.steps))
    start = ("--init-from", base) if share is not None else ("--model-size", args.model_size)
    device = ("--device", args.device) if args.device else ()
    script(
        "train_ds.py", "--dataset", args.data, "--seed", seed, "--max-steps", steps, "--output-dir", output,
        "--save-strategy", "no", "--warmup-steps", min(100, steps // 10), "--learning-rate", "5e-4",
        "--local-learning-rate", "5e-4", "--logging-steps", max(1, steps // 20), "--eval-steps", steps,
        *start, *device, *flags,
    )  # fmt: skip
    return max(output.glob("pragnosia_*"))


def evaluate(args: argparse.Namespace, run: Path, *flags: str) -> dict:
    """What eval_ds.py found."""
    file = run / "evaluation.json"
    device = ("--device", args.device) if args.device else ()
    script(
        "eval_ds.py", "--checkpoint", run, "--dataset", args.data, "--max-samples", args.max_samples,
        "--output-file", file, *device, *flags,
    )  # fmt: skip
    return json.loads(file.read_text())


def speed(run: Path) -> dict:
    """Median tokens/s and the largest GPU memory that a run has logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    peaks = [row["memory/gpu_peak_gb"] for row in rows if "memory/gpu_peak_gb" in row]
    return {"tokens_per_s": speeds[len(speeds) // 2]} | ({"gpu_peak_gb": max(peaks)} if peaks else {})


def rows_of(arm: str, seed: int, run: Path, found: dict) -> list[dict]:
    """The arm's row, and one for each search of its value head."""
    row = {"arm": arm, "seed": seed, **speed(run)}
    for family, scores in found["results"].items():
        row[f"{family}_perplexity"] = scores["perplexity"]
        if "exact_match" in scores:
            row[f"{family}_exact_match"] = scores["exact_match"]
    searches = [
        {
            "arm": f"{arm}, {search['search']}",
            "seed": seed,
            **{k: v for k, v in search.items() if k != "search"},
        }
        for search in found["searches"]
    ]
    return [row, *searches]


def run_data(args: argparse.Namespace) -> list[dict]:
    rows = []
    for seed in args.seeds:
        base = None
        for arm in args.arms:
            if ARMS[arm][1] is not None and base is None:
                raise SystemExit(f"--arms {arm!r} starts from the base: name base before it")
            run = train(args, arm, seed, base)
            base = run if arm == "base" else base
            tree = ("--tree",) if "--use-tree-of-thoughts" in ARMS[arm][0] else ()
            rows += rows_of(arm, seed, run, evaluate(args, run, *tree))
            report(args.output / "components.json", rows, [], args.device)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    if args.tasks is None and args.data is None:
        options.error("name --tasks or --data, or both")
    if args.tasks is not None:
        run_tasks(args)
    if args.data:
        run_data(args)


if __name__ == "__main__":
    main()
