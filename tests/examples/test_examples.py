"""The examples run as they stand, on a few steps."""

import re

import pytest

from tests.training.runs import REPOSITORY, finish, start
from training.checkpoint import load_config

pytestmark = pytest.mark.slow


def example(name: str, *words: str) -> str:
    """What an example printed."""
    code, text = finish(
        start([str(REPOSITORY / "examples" / f"{name}.py"), *words], PYTHONPATH=str(REPOSITORY))
    )
    assert code == 0, text
    return text


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_custom_training_loop(tmp_path, placement):
    text = example(
        "custom_training_loop", "--steps", "20", "--placement", placement, "--output", str(tmp_path / "out")
    )
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", text))
    assert last < first - 0.3 and (tmp_path / "out" / "config.json").exists()


def test_component_ablation_and_a_program_that_uses_its_models(tmp_path):
    text = example("component_ablation", "--steps", "4", "--output", str(tmp_path))
    rows = re.findall(r"^(base|memory|value head|cache) +validation loss ([\d.]+)", text, re.M)
    assert [arm for arm, _ in rows] == ["base", "memory", "value head", "cache"]
    runs = sorted(tmp_path.glob("pragnosia_*"), key=lambda run: run.stat().st_mtime)
    assert len(runs) == 4
    configs = [load_config(run / "final_model") for run in runs]
    assert [bool(config.memory) for config in configs] == [False, True, False, False]
    assert [bool(config.tree) for config in configs] == [False, False, True, False]
    assert [bool(config.cache) for config in configs] == [False, False, False, True]
    for run in runs:
        text = example("integration", str(run), "What is 2 + 3?", "--max-length", "4")
        assert "generate " in text and "enhanced " in text
