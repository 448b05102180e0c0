"""Size as a property: the path of one batch, the longest file, names that hide what a file is for."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.preloaded import python

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("model", "experts", "kernels", "training", "data", "inference", "benchmarks", "examples", "tests")
FILES = [*ROOT.glob("*.py"), ROOT / "launch.sh", *(f for name in SOURCE for f in (ROOT / name).rglob("*.py"))]

# One batch from a file to an optimizer step, in the order in which the data passes through.
PATH = (
    "data/readers.py",
    "data/schema.py",
    "data/prompts.py",
    "data/documents.py",
    "data/packing.py",
    "data/loader.py",
    "training/step.py",
    "model/causal_lm.py",
    "model/moe.py",
    "experts/page.py",
)
CALLED = {
    "data/sources.py",
    "data/hub.py",
    "data/example.py",
    "model/attention.py",
    "model/router.py",
    "model/head.py",
    "kernels/reference.py",
    "kernels/dispatch.py",
    "experts/placement.py",
}
BANKS = {  # where the bank lives -> what else is called, most lines in all
    "resident": ({"experts/resident.py"}, 2950),
    "zero3": ({"experts/zero3.py", "training/gradients.py"}, 3050),
}

STREAMED = (  # a page from its store to a slot, through the computation and the optimizer, and back
    "experts/streamed.py",
    "experts/store.py",
    "experts/ring.py",
    "experts/page.py",
    "kernels/adamw.py",
    "kernels/adamw_triton.py",
)

# Trains one step of the tiny preset and prints the files of this repository whose functions ran for it.
TRACED = """
import json, os, sys
from data.loader import TrainLoader, prepare
from data.tokenizer_asset import load_tokenizer
from model.presets import preset_config
from training.config import DataArguments, TrainingArguments
from training.engine import DTYPES, build_engine, build_model, build_placement, start_ranks
from training.plan import make_plan
from training.step import train_step
from training.weights import initial_weights

rows, root, placement = sys.argv[1:]
args = TrainingArguments(device="cpu", placement=placement)
data_args = DataArguments(dataset=rows, max_length=64, num_workers=0, cache_dir=rows + ".cache")
ranks, tokenizer, config = start_ranks("cpu"), load_tokenizer(), preset_config("tiny")
plan = make_plan(config, args, size="tiny", max_length=64, device="cpu", world_size=1)
model = build_model(
    config, initial_weights(0, 0.02), plan.ds_config, placement=build_placement(plan, args, ranks),
    device=ranks.device, dtype=DTYPES["fp32"],
)
engine = build_engine(model, args, plan.ds_config)
ran = set()

def note(frame, event, _):
    if event == "call" and frame.f_code.co_flags & 1:  # a function, not the body of a module or class
        ran.add(frame.f_code.co_filename)

sys.setprofile(note)
data = prepare(data_args, tokenizer, seed=0)
split = {"micro_batch_size": 4, "accumulation": 1, "rank": 0, "world_size": 1}
loader = TrainLoader(data.train, **split, seed=0, num_workers=0)
result = train_step(engine, next(iter(loader.epoch(0))))
sys.setprofile(None)
assert result.applied
own = [os.path.relpath(f, root) for f in ran if f.startswith(root + os.sep) and "site-packages" not in f]
print("RAN " + json.dumps(own))
"""


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_source_folders_are_all_known():
    found = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[!.]*/*.py")} - {"outputs", "wandb"}
    assert found - {"tests"} == set(SOURCE) - {"tests"}


@pytest.mark.slow
@pytest.mark.parametrize("placement", BANKS)
def test_path_of_one_batch(tmp_path, placement):
    banks, most = BANKS[placement]
    rows = tmp_path / "rows.jsonl"
    sums = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(60)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums))
    done = subprocess.run(
        [python(), "-c", TRACED, str(rows), str(ROOT), placement],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    (ran,) = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("RAN ")]
    assert set(ran) == {*PATH, *CALLED, *banks}
    assert len(PATH) <= 10
    assert sum(lines(ROOT / name) for name in ran) <= most


def test_streamed_experts_are_read_in_one_sitting():
    assert sum(lines(ROOT / name) for name in STREAMED) < 1200


def test_no_long_file():
    assert [(str(file.relative_to(ROOT)), lines(file)) for file in FILES if lines(file) > 600] == []


def test_no_name_that_says_nothing():
    forbidden = {"utils", "util", "common", "misc", "core", "helpers", "helper"}
    names = {part.split(".")[0] for file in FILES for part in file.relative_to(ROOT).parts}
    assert names & forbidden == set()
