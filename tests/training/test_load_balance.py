"""`--load-balance`: whole runs whose routers have biases, on disk and on other ranks; settings that contradict."""

import json
import shutil

import pytest
import torch

from model.presets import preset_config
from tests.training.runs import losses, run, weights, write_rows
from training.checkpoint import load_model
from training.config import TrainingArguments, UserError
from training.plan import make_plan

STEPS, BEFORE, MOVED = 40, 26, 39
FLAGS = ("--load-balance", "bias", "--max-steps", str(STEPS), "--save-steps", "13", "--eval-steps", "50")
FLAGS += ("--keep-checkpoints", "9")
# So slow that rounding, which another number of ranks changes, sends no token elsewhere.
FLAGS += ("--learning-rate", "1e-5", "--local-learning-rate", "1e-5")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def zero1(tmp_path_factory):
    """Converted for another number of ranks, which loses buffers."""
    path = tmp_path_factory.mktemp("json") / "zero1.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return ("--deepspeed-config", str(path))


@pytest.fixture(scope="module")
def whole(data, zero1, tmp_path_factory):
    return run(data, tmp_path_factory.mktemp("whole") / "out", *FLAGS, *zero1)[0]


def nudges(directory) -> torch.Tensor:
    """[L, E] of a model directory, as evaluation and chat load it."""
    model, _ = load_model(directory, "cpu", torch.bfloat16)
    return torch.stack([layer.mlp.gate.nudges_E for layer in model.model.layers])


@pytest.mark.slow
def test_every_step_but_the_last_ones_moves_the_biases(whole):
    before, moved, last = (nudges(whole / f"checkpoint-{n}" / "model") for n in (BEFORE, MOVED, STEPS))
    assert ((before % 2 == BEFORE % 2) | (before.abs() < BEFORE)).all() and before.abs().max() > 5
    assert not torch.equal(before, moved) and moved.abs().max() <= MOVED
    assert torch.equal(moved, last) and torch.equal(last, nudges(whole / "final_model"))
    config = json.loads((whole / "final_model" / "config.json").read_text())
    assert config["router_bias"] and config["router_aux_loss_coef"] > 0  # for a run that balances by a loss


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_with_them(data, whole, zero1, tmp_path, ranks):
    """To the bit on as many ranks; on another number a step's load is still that of all ranks."""
    copy = shutil.copytree(whole, tmp_path / "out" / whole.name)
    for name in ("final_model", f"checkpoint-{MOVED}", f"checkpoint-{STEPS}"):
        shutil.rmtree(copy / name)
    batch = ("--batch-size", str(2 // ranks))
    run(data, tmp_path / "out", *FLAGS, *zero1, *batch, "--resume", str(copy), world_size=ranks)
    if ranks == 1:
        assert weights(copy / "final_model") == weights(whole / "final_model")
    assert torch.equal(nudges(copy / "final_model"), nudges(whole / "final_model"))
    assert losses(copy) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        ({"routing": "step"}, {"load_balance": "bias"}, ("--load-balance bias", "--routing token")),
        ({}, {"load_balance": "bias", "export_format": "qwen3_moe"}, ("qwen3_moe", "--load-balance aux")),
        ({"router_bias": True}, {"export_format": "qwen3_moe"}, ("qwen3_moe", "leave it out")),
        ({}, {"load_balance": "loss"}, ("--load-balance", "aux, bias, none")),
    ],
)
def test_what_cannot_work_is_one_line_with_the_way_out(config, settings, words):
    with pytest.raises(UserError) as error:
        args = TrainingArguments(**settings)
        make_plan(
            preset_config("tiny", **config), args, size="tiny", max_length=64, device="cpu", world_size=1
        )
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
