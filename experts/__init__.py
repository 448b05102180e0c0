"""Where expert banks live. Every bank is a module with `forward(hidden_TD, routing) -> hidden_TD`.

    resident   the whole bank in device memory (`resident.py`), or the experts that a rank owns: rows of the others
               travel to their owners (`expert_parallel.py`)
    zero3      pages of ordinary parameters under DeepSpeed ZeRO-3 with offload (`zero3.py`)
    streamed   host memory that DeepSpeed does not know of, passed through GPU slots page by page (`streamed.py`)

A placement changes names and shapes of parameters but not the model: `canonical` maps each parameter to the
name it has in an exported checkpoint and, for a part of a bank, the first expert it holds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PAGE = re.compile(r"^(.*\.experts)\.pages\.(\d+)\.(\w+)$")
_OWNED = re.compile(r"^(.*\.experts)\.experts\.(w[123])$")
_BANK = re.compile(r"^(.*\.experts)\.(\w+_proj)$")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SHARED_NAMES = {projection: name for name, projection in _PROJECTIONS.items()}


def canonical(name: str, parameter: Tensor) -> tuple[str, int | None]:
    """The exported name of a parameter and, when it is a part of a bank, the number of its first expert.

    `parameter` has its full shape: the first dimension of a page is the page size.
    """
    if match := _PAGE.match(name):
        return f"{match[1]}.{match[3]}", int(match[2]) * parameter.shape[0]
    return exported_name(name), parameter.first_expert if _OWNED.match(name) else None


def shared_name(exported: str) -> str:
    """The name of a parameter where ranks share the experts of a bank, from its exported one."""
    match = _BANK.match(exported)
    return f"{match[1]}.experts.{_SHARED_NAMES[match[2]]}" if match else exported


def exported_name(shared: str) -> str:
    """The inverse of `shared_name`."""
    match = _OWNED.match(shared)
    return f"{match[1]}.{_PROJECTIONS[match[2]]}" if match else shared


def default_page_size(num_experts: int) -> int:
    """Eight experts a page, or the largest divisor of the bank below that."""
    return max(size for size in range(1, min(8, num_experts) + 1) if num_experts % size == 0)
