"""Step time, throughput and memory of a training step, for preset x placement x DeepSpeed JSON x GPUs.

    python benchmarks/train_step.py --model-size 350M 1B --placement resident zero3
    python benchmarks/train_step.py --model-size 3B --placement zero3 --batch-size 4 16 --max-length 512
    python benchmarks/train_step.py --model-size 3B --placement streamed --num-gpus 1 2 --name streamed_gpus
    python benchmarks/train_step.py --model-size 1B 3B --kernels reference auto --name train_step_kernels
    python benchmarks/train_step.py --model-size tiny --deepspeed-config my.json --placement resident

Every cell runs in processes of its own, one a GPU (`benchmarks/cell.py` says what a row holds); several
`--kernels` share them and take turns, twice, so that a busy host slows none alone. Goals: allocated GPU memory of
the presets with their experts off the GPU, on one row of 512 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cell import WARMUP, Cell, run_all
from benchmarks.results import DIRECTORY, gpu_goals

AXES = ("num_gpus", "model_size", "placement", "deepspeed_config", "batch_size", "max_length")
AXES += ("expert_page_size", "expert_state")
FIXED = ("gradient_checkpointing", "num_experts", "routing", "steps", "device", "expert_vram")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model-size", nargs="+", default=["tiny"])
    options.add_argument("--placement", nargs="+", default=["resident"])
    options.add_argument("--deepspeed-config", nargs="+", default=[None], help="default: the preset's own")
    options.add_argument("--batch-size", nargs="+", type=int, default=[4], help="rows of a microbatch")
    options.add_argument("--max-length", nargs="+", type=int, default=[512])
    options.add_argument("--num-gpus", nargs="+", type=int, default=[1], help="(CPU: ranks)")
    options.add_argument("--expert-page-size", nargs="+", type=int, default=[None])
    options.add_argument(
        "--expert-state", nargs="+", default=[None], help="of streamed experts; default: bf16"
    )
    options.add_argument(
        "--kernels", nargs="+", choices=("reference", "auto"), default=[None], help="what routes tokens"
    )
    options.add_argument("--expert-vram", default=None, help="of streamed experts")
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--num-experts", type=int, default=None)
    options.add_argument("--routing", choices=("token", "step"), default="token")
    options.add_argument("--steps", type=int, default=10, help=f"timed steps after {WARMUP} of warm-up")
    options.add_argument("--device", choices=("cuda", "cpu"), default=None)
    options.add_argument("--name", default="train_step", help="the result is written to <output>/<name>.json")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def main() -> None:
    args = parser().parse_args()
    fixed = {key: getattr(args, key) for key in FIXED}
    values = itertools.product(*(getattr(args, axis) for axis in AXES))
    turns = args.kernels if len(args.kernels) == 1 else 2 * args.kernels
    groups = [
        [Cell(**dict(zip(AXES, value, strict=True)), **fixed, kernels=kernels) for kernels in turns]
        for value in values
    ]
    path = args.output / f"{args.name}.json"
    run_all(groups, path, lambda rows: (rows, gpu_goals(rows)), args.device)


if __name__ == "__main__":
    main()
