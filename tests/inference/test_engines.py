"""The engines compute the plain model's logits, and a tensor-parallel rank holds a share of the weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.preloaded import python

REPOSITORY = Path(__file__).parents[2]

# Runs as every rank: prints, on rank 0, the largest logit error relative to the plain model and the share of
# the parameters' elements this rank holds.
SCRIPT = """
import json, os, sys
import torch
from inference.arguments import EngineArguments, ModelSource
from inference.engines import open_engine
from training.checkpoint import load_model, resolve_model

checkpoint, settings, device = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
engine = open_engine(
    ModelSource(checkpoint=checkpoint, device=device, precision="fp32"), EngineArguments(**settings)
)
plain, _ = load_model(resolve_model(checkpoint), engine.device, torch.float32)
ids = torch.randint(3, 259, (3, 50), generator=torch.Generator().manual_seed(0)).to(engine.device)
with torch.no_grad():
    expected = plain(input_ids=ids).logits
    error = (engine.model(input_ids=ids).logits - expected).abs().max() / expected.abs().max()
held = {n.removeprefix("module."): p.numel() for n, p in engine.model.named_parameters()}
whole = {n: p.numel() for n, p in plain.named_parameters()}
share = {n: held[n] / whole[n] for n in whole if n in held}
buffers = [f for f in os.listdir("/dev/shm") if f"_{os.environ.get('MASTER_PORT')}_" in f]
if int(os.environ.get("RANK", 0)) == 0:
    print("RESULT " + json.dumps({"error": error.item(), "share": share, "buffers": buffers}))
    engine.close()
else:
    engine.follow()
"""


def run(checkpoint: Path, tmp_path: Path, settings: dict, *launcher: str, device: str = "cpu") -> dict:
    script = tmp_path / "compare.py"
    script.write_text(SCRIPT)
    python_path = os.pathsep.join([str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    result = subprocess.run(
        [python(), *launcher, str(script), str(checkpoint), json.dumps(settings), device],
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": device},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"engine": "torch"}, {"engine": "deepspeed"}, {"offload": True}], ids=str
)
def test_one_rank(checkpoint, tmp_path, settings) -> None:
    assert run(checkpoint, tmp_path, settings)["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")],
    ids=["own ranks", "torchrun"],
)
def test_two_ranks_split_attention_and_experts(checkpoint, tmp_path, launcher) -> None:
    result = run(checkpoint, tmp_path, {} if launcher else {"num_gpus": 2}, *launcher)
    assert result["buffers"] == []
    assert result["error"] < 1e-5
    for name, share in result["share"].items():
        split = ".experts." in name or "_proj.weight" in name
        assert share == (0.5 if split else 1.0), name


@pytest.mark.multi_gpu
def test_two_gpus(checkpoint, tmp_path) -> None:
    assert run(checkpoint, tmp_path, {"num_gpus": 2}, device="cuda")["error"] < 1e-5
