"""What happens before an engine stands."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from training import engine
from training.engine import (
    device_with_room,
    limit_gpu_memory,
    offload_in_parts,
    say_what_is_compiled,
    take_norms_at_once,
)


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
    moved, whole = [], optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu
    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu = lambda parameter: (
        moved.append(optimizer.grad_position[3][3]), whole(parameter)
    )  # fmt: skip
    offload_in_parts(optimizer)
    optimizer.set_norm_for_param_grad_in_gpu(parameter)
    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu(parameter)
    expected = gradient.flatten()[4:34].float()
    torch.testing.assert_close(optimizer.norm_for_param_grads[3], expected.double().norm())
    assert torch.equal(whole_group.grad[11:41], expected)
    assert not whole_group.grad[:11].any() and not whole_group.grad[41:].any()
    assert (parameter.grad_accum if accumulated else parameter.grad) is None  # it is gone
    assert optimizer.grad_position == {3: [0, 4, 11, 30]} and moved == [7, 7, 7, 7, 2]


def test_zero3_takes_norms_in_parts(monkeypatch):
    monkeypatch.setattr(engine, "OFFLOAD_PART", 2)
    optimizer = object.__new__(engine.DeepSpeedZeroOptimizer_Stage3)
    offload_in_parts(optimizer)
    gradient = torch.randn(5, 9)
    seen, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: seen.append(size) or split(x, size))
    found = optimizer._constant_buffered_norm2(gradient)
    torch.testing.assert_close(found, gradient.double().norm())
    assert seen == [8]


def test_norms_at_once_are_deepspeeds_own(monkeypatch):
    """On one rank, whose reduction changes nothing: of several gradients, of padding, of none, and of a NaN.
    Also what is not finite is found."""
    module = sys.modules[engine.DeepSpeedZeroOptimizer.__module__]
    monkeypatch.setattr(module.dist, "all_reduce", lambda *_, **__: None)
    optimizer = object.__new__(engine.DeepSpeedZeroOptimizer)
    optimizer.dp_process_group, optimizer.model_parallel_group = None, None
    optimizer.model_parallel_rank, optimizer.device = 0, "cpu"
    own, own_check = optimizer.get_grad_norm_direct, optimizer.has_overflow_partitioned_grads_serial
    take_norms_at_once(optimizer)
    gradients = [torch.randn(5, 9).bfloat16(), 1e4 * torch.randn(3).bfloat16(), torch.randn(1).bfloat16()]
    parameters = [torch.nn.Parameter(gradient.float()) for gradient in gradients]
    padding = torch.zeros(4, dtype=torch.bfloat16)
    padding._zero_padding = True
    failed = [*gradients, torch.tensor([float("nan")]).bfloat16()]
    for found, owners in (
        (gradients, parameters),
        ([*gradients, padding], parameters),
        ([padding], []),
        ([], []),
        (failed, [*parameters, parameters[0]]),
    ):
        norm = optimizer.get_grad_norm_direct(iter(found), owners)
        torch.testing.assert_close(norm, own(found, owners), rtol=1e-6, atol=0)
    assert norm == -1  # not finite, as DeepSpeed says it
    infinite, optimizer.bit16_groups = torch.tensor([1.0, -math.inf]).bfloat16(), [None, None]
    for groups, is_bad in (
        ({0: gradients, 1: [None, padding]}, False),
        ({0: [], 1: []}, False),
        ({0: gradients, 1: [None, *failed]}, True),
        ({0: [infinite], 1: []}, True),
        ({0: [torch.full((9,), 3e38).bfloat16()], 1: []}, False),
    ):
        optimizer.averaged_gradients = groups
        found, expected = optimizer.has_overflow_partitioned_grads_serial(), own_check()
        assert found.item() == expected.item() == is_bad and found.shape == expected.shape


def test_memory_that_a_run_may_use(monkeypatch):
    """With a GPU of 80 bytes that is only described, of which another process has 30."""
    gpu, caps = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: caps.append(share))
    for limit in (20.0, 160.0):
        limit_gpu_memory(limit, gpu)
    limit_gpu_memory(20.0, torch.device("cpu"))
    assert caps == [0.25, 1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    for share, room in ((1.0, 50), (0.25, 10)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _, share=share: share)
        assert device_with_room(gpu, 0.8 * room - 0.1) == gpu
        assert device_with_room(gpu, 0.8 * room) == torch.device("cpu")
    assert device_with_room(torch.device("cpu"), 0) == torch.device("cpu")
