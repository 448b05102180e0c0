"""This repository's `kernels/` beside Hugging Face's distribution of the same name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
USE = """
import model, transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
model.PragnosiaForCausalLM(model.PragnosiaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1))
import importlib.metadata, kernels
print(importlib.metadata.version("kernels"), kernels.__version__, transformers.utils.is_kernels_available())
"""


@pytest.fixture
def site(tmp_path) -> Path:
    """A directory that claims Hugging Face's `kernels` 0.18.3 is installed."""
    metadata = tmp_path / "kernels-0.18.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.3\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


def run(code: str, *paths: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=paths[0], capture_output=True, text=True
    )


def test_models_import_beside_the_hub_distribution(site):
    result = run(USE, REPOSITORY, site)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0.18.3", "0.0.0", "False"]


def test_the_hub_package_stays_available_where_ours_is_not_the_one_imported(site):
    """A module that is first on the path and not ours is left alone."""
    package = site / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shield = str(REPOSITORY / "model" / "hub_shield.py")
    code = (
        "import importlib.util, transformers.utils.import_utils as u\n"
        f"spec = importlib.util.spec_from_file_location('hub_shield', {shield!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "before = u.is_kernels_available; module.shield(); assert u.is_kernels_available is before"
    )
    result = run(code, site, REPOSITORY)
    assert result.returncode == 0, result.stderr


def test_kernels_imports_nothing():
    result = run(
        "import sys, kernels; assert 'torch' not in sys.modules and 'triton' not in sys.modules", REPOSITORY
    )
    assert result.returncode == 0, result.stderr
