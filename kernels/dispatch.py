"""The routing operations as the model calls them, in plain PyTorch or as Triton kernels where these run, and what
multiplies experts."""

import functools
import importlib
import os
import shutil
from collections import namedtuple
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.reference import RouterStatistics, Routing
from kernels.reference import combine as combine_reference
from kernels.reference import permute as permute_reference
from kernels.reference import route as route_reference
from kernels.reference import unpermute as unpermute_reference

MOST_ACTIVE, MOST_EXPERTS, WIDEST = 16, 1024, 8192  # what a program's registers hold
Operations = namedtuple("Operations", "route permute combine unpermute")
_operations = {
    "reference": Operations(route_reference, permute_reference, combine_reference, unpermute_reference)
}
_wanted = "auto"
capability = functools.cache(torch.cuda.get_device_capability)  # asking takes as long as launching a kernel


def use(kernels: str) -> None:
    """Run `triton` or `reference` from now on, in models not yet compiled; auto: the kernels where they run."""
    global _wanted
    assert kernels in ("auto", "triton", "reference"), kernels
    _wanted = kernels
    obstacle.cache_clear()


def describe(device: torch.device, num_experts: int, num_active: int, width: int) -> str:
    """What runs the routing of tokens of `width` values to K of E experts, and why."""
    reason = obstacle(device, num_experts, num_active, width)
    return f"plain PyTorch ({reason})" if reason else "Triton kernels"


@functools.cache
def obstacle(device: torch.device, num_experts: int, num_active: int, width: int) -> str:
    """Why the reference runs and not the Triton kernels; empty where they do."""
    if _wanted == "reference":
        return "kernels are not asked for"
    if num_active > MOST_ACTIVE or num_experts > MOST_EXPERTS or width > WIDEST:
        return f"kernels take at most {MOST_ACTIVE} of {MOST_EXPERTS:,} experts and {WIDEST:,} values a token"
    interpreted = _wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    on_gpu = device.type == "cuda" and torch.version.cuda and capability(device) >= (7, 5)
    if not (on_gpu or interpreted):
        return "kernels need an NVIDIA GPU of compute capability 7.5 or later"
    if not interpreted and not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton needs a C compiler"
    try:  # by name, here and below, because an export copies what is imported, and Triton is not everywhere
        routing, moves = (importlib.import_module(f"kernels.{name}") for name in ("routing", "permute"))
    except ImportError as error:
        return f"{error.name} is not installed"
    _operations["triton"] = Operations(routing.route, moves.permute, moves.combine, moves.unpermute)
    return ""


@torch.compiler.assume_constant_result
def chosen(device: torch.device, num_experts: int, num_active: int, width: int) -> str:
    """The name of what runs; a constant of compiled graphs.

    Raises:
        ValueError: `use("triton")` where that cannot be.
    """
    reason = obstacle(device, num_experts, num_active, width)
    if reason and _wanted == "triton":
        raise ValueError(f"no Triton kernels: {reason}; leave the choice to auto")
    return "reference" if reason else "triton"


def route(
    logits_TE: Tensor,
    num_active: int,
    renormalise: bool = True,
    valid_T: Tensor | None = None,
    allowed: Tensor | None = None,
    bias_E: Tensor | None = None,
    scores: str = "softmax",
    scale: float = 1.0,
) -> tuple[Routing, RouterStatistics]:
    """`kernels.reference.route`."""
    name = chosen(logits_TE.device, logits_TE.shape[1], num_active, 0)
    return _operations[name].route(
        logits_TE, num_active, renormalise, valid_T, allowed, bias_E, scores, scale
    )


def permute(hidden_TD: Tensor, routing: Routing) -> Tensor:
    """`kernels.reference.permute`."""
    return moves(hidden_TD, routing.places_TK).permute(hidden_TD, routing)


def combine(rows_ND: Tensor, routing: Routing) -> Tensor:
    """`kernels.reference.combine`."""
    return moves(rows_ND, routing.places_TK).combine(rows_ND, routing)


def unpermute(rows_ND: Tensor, places_TK: Tensor) -> Tensor:
    """`kernels.reference.unpermute`."""
    return moves(rows_ND, places_TK).unpermute(rows_ND, places_TK)


def moves(values: Tensor, places_TK: Tensor) -> Operations:
    """What moves rows of these values."""
    return _operations[chosen(values.device, 0, places_TK.shape[1], values.shape[1])]


def has_grouped_gemm(rows: Tensor) -> bool:
    """Whether `F.grouped_mm` has a kernel of its own for this device and dtype (elsewhere it loops, slower)."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and capability(rows.device) >= (9, 0)


def triton_grouped_gemm(rows: Tensor) -> Callable[..., Tensor] | None:
    """DeepSpeed's grouped GEMM for compute capability 8.0 to 8.9, where `F.grouped_mm` runs but loops over experts
    and waits for their counts; None elsewhere, for deterministic algorithms (its tiles, and so the order of sums,
    are chosen by timing), and unless Triton was asked for: it is not tested on such a GPU.
    """
    on_ampere = (
        _wanted == "triton"
        and rows.is_cuda
        and rows.dtype in (torch.bfloat16, torch.float16)
        and capability(rows.device)[0] == 8
    )
    if not on_ampere or torch.are_deterministic_algorithms_enabled():
        return None
    try:
        operations = importlib.import_module("deepspeed.ops.triton_ops")
    except ImportError:
        return None
    return operations.group_gemm_triton if operations.is_triton_available() else None
