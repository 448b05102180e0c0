"""What is done with whole gradients, beside DeepSpeed's own way."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from training import gradients
from training.gradients import offload_in_parts, take_norms_at_once


@pytest.mark.parametrize("accumulated", [False, True])
def test_gradients_leave_in_parts(monkeypatch, accumulated):
    """Real optimizers are in test_layouts.py; here a gradient has many parts, and a place among others."""
    monkeypatch.setattr(gradients, "OFFLOAD_PART", 7)
    optimizer = object.__new__(gradients.DeepSpeedZeroOptimizer)
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


def test_zero3_takes_norms_and_moves_gradients_in_parts(monkeypatch):
    monkeypatch.setattr(gradients, "OFFLOAD_PART", 2)
    optimizer = object.__new__(gradients.DeepSpeedZeroOptimizer_Stage3)
    optimizer.get_param_id = lambda _: 3
    optimizer.swap_optimizer, optimizer.norm_for_param_grads = False, {}
    optimizer.master_weights_and_grads_dtype = torch.float32
    optimizer.grad_position = {3: [1, 4, 45]}
    host = torch.zeros(60)
    optimizer.fp32_partitioned_groups_flat = [None, host]
    gradient = torch.randn(45).bfloat16()

    def moved() -> tuple[torch.Tensor, torch.Tensor]:
        host.grad = torch.zeros(60)
        optimizer._offload_grad_partition_at_boundary(None, gradient, {}, {})
        return host.grad, optimizer.norm_for_param_grads.pop(3)

    expected, expected_norm = moved()
    offload_in_parts(optimizer)
    seen, split, sizes, to = [], torch.Tensor.split, [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: seen.append(size) or split(x, size))
    monkeypatch.setattr(torch.Tensor, "to", lambda x, kind: sizes.append((kind, x.numel())) or to(x, kind))
    found, norm = moved()
    monkeypatch.undo()
    assert torch.equal(found, expected) and expected.count_nonzero() == 45
    torch.testing.assert_close(norm, expected_norm)
    assert seen == [8, 2, 2] and {size for kind, size in sizes if kind == torch.float32} == {1, 2}

    optimizer._swappable_optimizer_subgroup = lambda _: True  # state on a disk: DeepSpeed's own way
    host.grad, values, places = torch.zeros(60), {}, {}
    optimizer._offload_grad_partition_at_boundary(None, gradient, values, places)
    assert torch.equal(values[1][0], gradient.float()) and places == {1: [4]} and not host.grad.any()


def test_norms_at_once_are_deepspeeds_own(monkeypatch):
    """On one rank, whose reduction changes nothing: of several gradients, of padding, of none, and of a NaN.
    Also what is not finite is found."""
    module = sys.modules[gradients.DeepSpeedZeroOptimizer.__module__]
    monkeypatch.setattr(module.dist, "all_reduce", lambda *_, **__: None)
    optimizer = object.__new__(gradients.DeepSpeedZeroOptimizer)
    optimizer.dp_process_group, optimizer.model_parallel_group = None, None
    optimizer.model_parallel_rank, optimizer.device = 0, "cpu"
    own, own_check = optimizer.get_grad_norm_direct, optimizer.has_overflow_partitioned_grads_serial
    take_norms_at_once(optimizer)
    own_gradients = [torch.randn(5, 9).bfloat16(), 1e4 * torch.randn(3).bfloat16(), torch.randn(1).bfloat16()]
    parameters = [torch.nn.Parameter(gradient.float()) for gradient in own_gradients]
    padding = torch.zeros(4, dtype=torch.bfloat16)
    padding._zero_padding = True
    failed = [*own_gradients, torch.tensor([float("nan")]).bfloat16()]
    for found, owners in (
        (own_gradients, parameters),
        ([*own_gradients, padding], parameters),
        ([padding], []),
        ([], []),
        (failed, [*parameters, parameters[0]]),
    ):
        norm = optimizer.get_grad_norm_direct(iter(found), owners)
        torch.testing.assert_close(norm, own(found, owners), rtol=1e-6, atol=0)
    assert norm == -1  # not finite, as DeepSpeed says it
    infinite, optimizer.bit16_groups = torch.tensor([1.0, -math.inf]).bfloat16(), [None, None]
    for groups, is_bad in (
        ({0: own_gradients, 1: [None, padding]}, False),
        ({0: [], 1: []}, False),
        ({0: own_gradients, 1: [None, *failed]}, True),
        ({0: [infinite], 1: []}, True),
        ({0: [torch.full((9,), 3e38).bfloat16()], 1: []}, False),
    ):
        optimizer.averaged_gradients = groups
        found, expected = optimizer.has_overflow_partitioned_grads_serial(), own_check()
        assert found.item() == expected.item() == is_bad and found.shape == expected.shape
