"""What the reasoning components are worth: tasks that tell them apart, and a model on real data with each of them.

    python benchmarks/components.py --tasks --device cuda --seeds 0 1 2   # the three tasks
    python benchmarks/components.py --tasks recall                        # one, on a core
    python benchmarks/components.py --data embedded,my.jsonl --answers my.jsonl word_problems --seeds 0 1 2

`--tasks` runs `benchmarks/recall.py` (neural memory), `benchmarks/far_lookup.py` (cache augmentation) and
`benchmarks/countdown.py` (tree of thoughts); each has a result of its own, and says what it compares.

`--data` trains and evaluates the real thing through `train_ds.py` and `eval_ds.py`: the base model; the same with
a memory and with a value head, from the same seed on the same rows in the same order; and, on the finished base,
the base trained as much longer and, with as many latents each, pause tokens, soft tokens that the model itself
runs, and coprocessors, with the base frozen or trained too. A row has the perplexity of each family's validation
split; for latents the perplexity of the tokens after them, with and without them; right answers in the validation
split of each dataset of `--answers`; for the value head right answers and tokens of each search. Speed and memory
are there where no other arm ran at the same time. The result is `components.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, REPOSITORY, report

TASKS = ("recall", "far_lookup", "countdown")
CACHE = ("--use-cache-augmentation", "--stage", "cache", "--coprocessor")
ARMS = {  # name -> (flags, whether it starts from the base)
    "base": ((), False),
    "memory": (("--use-neural-memory",), False),
    "memory, window 128": (("--use-neural-memory", "--memory-window", "128"), False),
    "value head": (("--use-tree-of-thoughts",), False),
    "base, longer": ((), True),
    "pause tokens": ((*CACHE, "pause"), True),
    "soft tokens, model trained": ((*CACHE, "soft", "--cache-joint"), True),
    "light": ((*CACHE, "light"), True),
    "light, model trained": ((*CACHE, "light", "--cache-joint"), True),
    "lora": ((*CACHE, "lora"), True),
    "copy": ((*CACHE, "copy"), True),
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
    options.add_argument(
        "--later-steps", type=int, help="of the arms that start from the base (default: a quarter of --steps)"
    )
    options.add_argument("--batch-size", type=int, default=32, help="rows of 512 tokens a step")
    options.add_argument(
        "--value-refresh", type=int, help="of the value head; 0: never (default: an eighth of --steps)"
    )
    options.add_argument("--answers", nargs="*", help="datasets whose answers are checked (default: --data)")
    options.add_argument("--max-samples", type=int, default=200, help="answers of a dataset to check")
    options.add_argument("--side-by-side", type=int, default=1, help="arms trained at a time, on one GPU")
    options.add_argument("--device", choices=("cpu", "cuda"), default=None)
    options.add_argument("--short", action="store_true", help="the tasks as the tests run them")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    options.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "components")
    return options


def script(name: str, *words: object) -> None:
    """Run one of our scripts; what it says is seen."""
    if subprocess.run([sys.executable, str(REPOSITORY / name), *map(str, words)]).returncode:
        raise SystemExit(f"{name} failed, see above")


def run_tasks(args: argparse.Namespace) -> None:
    short = ["--short"] if args.short else []
    for task in args.tasks or TASKS:
        device = ["--device", args.device] if args.device else []
        script(f"benchmarks/{task}.py", "--seeds", *args.seeds, "--output", args.output, *short, *device)


def train(args: argparse.Namespace, arm: str, seed: int, base: Path | None, steps: int) -> Path:
    """The run of an arm."""
    flags = ARMS[arm][0]
    if arm == "value head":
        refresh = max(1, steps // 8) if args.value_refresh is None else args.value_refresh
        flags = (*flags, "--value-refresh", refresh)
    output = args.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    start = ("--model-size", args.model_size) if base is None else ("--init-from", base)
    device = ("--device", args.device) if args.device else ()
    script(
        "train_ds.py", "--dataset", args.data, "--seed", seed, "--max-steps", steps, "--epochs", 1000,
        "--output-dir", output, "--save-strategy", "no", "--warmup-steps", min(100, steps // 10),
        "--batch-size", args.batch_size, "--learning-rate", "5e-4", "--local-learning-rate", "5e-4",
        "--logging-steps", max(1, steps // 20), "--eval-steps", steps, "--report-to", "none",
        *start, *device, *flags,
    )  # fmt: skip
    return max(output.glob("pragnosia_*"))


def evaluate(args: argparse.Namespace, run: Path, dataset: str, *flags: str) -> dict:
    """What eval_ds.py found."""
    file = run / "evaluation.json"
    device = ("--device", args.device) if args.device else ()
    script(
        "eval_ds.py", "--checkpoint", run, "--dataset", dataset, "--max-samples", args.max_samples,
        "--output-file", file, *device, *flags,
    )  # fmt: skip
    return json.loads(file.read_text())


def logged(run: Path, *, alone: bool) -> dict:
    """Perplexities of the last validation (for latents, of the tokens after them, with them and without); where
    nothing ran beside it, median tokens/s and largest GPU memory.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "validation/overall/loss" in row)
    found, has_latents = {}, "validation/overall/base_loss" in last
    names = (
        {"loss": "after_latents", "base_loss": "without_latents"} if has_latents else {"loss": "perplexity"}
    )
    for name, value in last.items():
        _, family, metric = name.split("/") if name.count("/") == 2 else ("", "", "")
        if metric in names:
            found[f"{family}_{names[metric]}"] = math.exp(value)
        elif "loss_at_" in metric and family == "overall":
            found[metric.replace("loss", "perplexity")] = math.exp(value)
    if alone:
        speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
        found["tokens_per_s"] = speeds[len(speeds) // 2]
        peaks = [row["memory/gpu_peak_gb"] for row in rows if "memory/gpu_peak_gb" in row]
        found |= {"gpu_peak_gb": max(peaks)} if peaks else {}
    return found


def measure(args: argparse.Namespace, arm: str, seed: int, base: Path | None) -> tuple[Path, list[dict]]:
    """Train and evaluate an arm: its run, its row and one for each search of its value head."""
    later = max(1, args.steps // 4) if args.later_steps is None else args.later_steps
    steps = later if ARMS[arm][1] else args.steps
    run = train(args, arm, seed, base, steps)
    row = {"arm": arm, "seed": seed, "steps": steps, **logged(run, alone=args.side_by_side == 1)}
    searches = []
    tree = ("--tree",) if arm == "value head" else ()
    for dataset in [args.data] if args.answers is None else args.answers:
        found, name = evaluate(args, run, dataset, *tree), Path(dataset).stem
        for family, scores in found["results"].items():
            if "exact_match" in scores:
                row[f"{name}_{family}_exact_match"] = scores["exact_match"]
        for search in found["searches"]:
            row_of = {"arm": f"{arm}, {search.pop('search')}", "seed": seed, "dataset": name}
            searches.append(row_of | search)
    return run, [row, *searches]


def run_data(args: argparse.Namespace) -> None:
    """All arms of all seeds; those that start from a base, when it is there. A failure is a row with its error."""
    if "base" not in args.arms and any(ARMS[arm][1] for arm in args.arms):
        raise SystemExit("arms after the value head start from the base: add base to --arms")
    rows: list[dict] = []
    one_at_a_time = threading.Lock()

    def run_arm(arm: str, seed: int, base: Path | None) -> Path | None:
        try:
            assert base or not ARMS[arm][1], "the base failed"
            run, found = measure(args, arm, seed, base)
        except (Exception, SystemExit) as failure:
            run, found = None, [{"arm": arm, "seed": seed, "error": f"{type(failure).__name__}: {failure}"}]
        with one_at_a_time:
            rows.extend(found)
            report(args.output / "components.json", rows, [], args.device)
        return run

    with ThreadPoolExecutor(args.side_by_side) as pool:
        for seed in args.seeds:
            first = {arm: pool.submit(run_arm, arm, seed, None) for arm in args.arms if not ARMS[arm][1]}
            later = [arm for arm in args.arms if arm not in first]
            base = first["base"].result() if later else None
            wait([*first.values(), *(pool.submit(run_arm, arm, seed, base) for arm in later)])
    if failed := [row["arm"] for row in rows if "error" in row]:
        raise SystemExit(f"failed: {', '.join(failed)}")


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
