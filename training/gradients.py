"""How whole gradients leave the GPU, their norms, and whether they are finite: less memory and fewer calls."""

import functools
from collections.abc import Iterable

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

OFFLOAD_PART = 2**21  # values of a gradient that move to host memory at once


def offload_in_parts(optimizer: object) -> None:
    """Bound what DeepSpeed takes on the GPU to move a gradient to host memory.

    For its norm it makes an fp64 copy, whole (ZeRO 1, 2) or in parts of 2 GB (ZeRO 3), and then an fp32 copy. Of
    the largest gradient, the embedding's, these were a third of the GPU memory of a streamed model.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm_of = functools.partial(optimizer._constant_buffered_norm2, buffer_size=4 * OFFLOAD_PART)
        move_whole = optimizer._offload_grad_partition_at_boundary

        def move(param: nn.Parameter, gradient: Tensor, *on_disk: dict) -> None:
            number = optimizer.get_param_id(param)
            group, first, _ = optimizer.grad_position[number]
            if optimizer._swappable_optimizer_subgroup(group):
                move_whole(param, gradient, *on_disk)
                return
            optimizer.norm_for_param_grads[number] = norm_of(gradient)
            target = optimizer.fp32_partitioned_groups_flat[group].grad.narrow(0, first, gradient.numel())
            for there, part in zip(
                target.split(OFFLOAD_PART), gradient.view(-1).split(OFFLOAD_PART), strict=True
            ):
                there.copy_(part.to(there.dtype), non_blocking=True)

        optimizer._constant_buffered_norm2 = norm_of
        optimizer._offload_grad_partition_at_boundary = move
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    whole = optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu

    def set_norm(param: nn.Parameter) -> None:
        gradient = optimizer.get_param_gradient_attribute(param)
        gradient = param.grad if gradient is None else gradient
        number = optimizer.get_param_id(param)
        _, first, _, count = optimizer.grad_position[number]
        parts = gradient.view(-1).narrow(0, first, count).split(OFFLOAD_PART)
        optimizer.norm_for_param_grads[number] = torch.stack([part.double().norm() for part in parts]).norm()

    def copy(param: nn.Parameter) -> None:
        places, number = optimizer.grad_position, optimizer.get_param_id(param)
        place, clear = places[number], optimizer.clear_grad_attribute
        group, source, target, count = place
        optimizer.clear_grad_attribute = lambda _: None  # not before the last part is on its way
        try:
            for first in range(0, count, OFFLOAD_PART):
                places[number] = [group, source + first, target + first, min(OFFLOAD_PART, count - first)]
                whole(param)
        finally:
            places[number], optimizer.clear_grad_attribute = place, clear
        clear(param)

    optimizer.set_norm_for_param_grad_in_gpu = set_norm
    optimizer.async_inplace_copy_grad_to_fp32_buffer_from_gpu = copy


def take_norms_at_once(optimizer: object) -> None:
    """Under ZeRO 1 and 2 one operation for the norms of all gradients, where DeepSpeed calls four for each, and
    one to see whether they are finite, where it calls thirteen.

    No rank holds a part of a layer, so all gradients count, and the norm of their norms is that of them all.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    norm_of = optimizer.get_grad_norm_direct

    def any_not_finite() -> Tensor:
        """Bool [1]; fp64, in which no sum of squares overflows."""
        groups = (optimizer.averaged_gradients[i] for i in range(len(optimizer.bit16_groups)))
        gradients = [gradient for group in groups for gradient in group if gradient is not None]
        norms = torch._foreach_norm(gradients, dtype=torch.float64) if gradients else [torch.zeros(())]
        return torch.stack(norms).isfinite().all().logical_not()[None]

    def norm(gradients: Iterable[Tensor], params: list[nn.Parameter], norm_type: float = 2) -> Tensor:
        if gradients := list(gradients):  # a rank may own none of a group
            gradients = [torch.stack(torch._foreach_norm(gradients, norm_type, dtype=torch.float64))]
        return norm_of(gradients, params[:1], norm_type)

    optimizer.get_grad_norm_direct = norm
    optimizer.has_overflow_partitioned_grads_serial = any_not_finite
