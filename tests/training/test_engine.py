"""What happens before an engine stands."""

from types import SimpleNamespace

import pytest
import torch

from training import engine
from training.engine import offload_in_parts, say_what_is_compiled


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


@pytest.mark.parametrize("accumulated", [False, True])
def test_gradients_leave_in_parts(monkeypatch, accumulated):
    """Real optimizers are in test_layouts.py; here a gradient has many parts, and a place among others."""
    monkeypatch.setattr(engine, "OFFLOAD_PART", 7)
    optimizer = object.__new__(engine.DeepSpeedZeroOptimizer)
    gradient = torch.randn(5, 9).bfloat16()
    parameter = SimpleNamespace(grad=None if accumulated else gradient, grad_accum=gradient)
    whole_group = torch.zeros(50)
    whole_group.grad = torch.zeros(50)
    optimizer.get_param_id = lambda _: 3
    optimizer.use_grad_accum_attribute = accumulated
    optimizer.grad_position, optimizer.norm_for_param_grads = {3: [0, 4, 11, 30]}, {}
    optimizer.single_partition_of_fp32_groups = [whole_group]
    optimizer.master_weights_and_grads_dtype = torch.float32
    optimizer._offload_gradient_safety_enabled = False
    optimizer._record_gradient_stream = optimizer._record_offload_copy = lambda *_: None
    offload_in_parts(optimizer)
    optimizer.set_norm_for_param_grad_in_gpu(parameter)
    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu(parameter)
    expected = gradient.flatten()[4:34].float()
    torch.testing.assert_close(optimizer.norm_for_param_grads[3], expected.double().norm())
    assert torch.equal(whole_group.grad[11:41], expected)
    assert not whole_group.grad[:11].any() and not whole_group.grad[41:].any()
    assert (parameter.grad_accum if accumulated else parameter.grad) is None  # it is gone
    assert optimizer.grad_position == {3: [0, 4, 11, 30]}
