"""What happens before an engine stands."""

from types import SimpleNamespace

import pytest
import torch

from training import engine
from training.engine import say_what_is_compiled, take_norms_in_parts


def test_a_lock_on_an_op_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "cpu_adam").mkdir()
    say_what_is_compiled()
    assert capsys.readouterr().out == ""
    lock = tmp_path / "cpu_adam" / "lock"
    lock.touch()
    say_what_is_compiled()
    assert (
        capsys.readouterr().out
        == f"cpu_adam is being compiled by another process; if there is none, delete {lock}\n"
    )
    monkeypatch.setenv("RANK", "1")
    say_what_is_compiled()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kept", [False, True])
def test_norms_of_offloaded_gradients_are_taken_in_parts(monkeypatch, kept):
    """DeepSpeed's whole-model runs are in test_layouts.py; here a gradient has many parts, and a place in it."""
    monkeypatch.setattr(engine, "NORM_PART", 7)
    optimizer = object.__new__(engine.DeepSpeedZeroOptimizer)
    parameter = SimpleNamespace(grad=None if kept else torch.randn(5, 9))
    gradient = torch.randn(5, 9) if kept else parameter.grad
    optimizer.get_param_gradient_attribute = lambda _: gradient if kept else None
    optimizer.get_param_id = lambda _: 3
    optimizer.grad_position, optimizer.norm_for_param_grads = {3: [0, 4, 0, 30]}, {}
    take_norms_in_parts(optimizer)
    optimizer.set_norm_for_param_grad_in_gpu(parameter)
    expected = gradient.flatten()[4:34].double().norm()
    torch.testing.assert_close(optimizer.norm_for_param_grads[3], expected)
