"""Where expert banks live. Every bank is a module with `forward(hidden_TD, routing) -> hidden_TD`.

    resident   the whole bank in device memory (`resident.py`)
    zero3      pages of ordinary parameters under DeepSpeed ZeRO-3 with offload (`zero3.py`)
    streamed   host memory that DeepSpeed does not know of, passed through GPU slots page by page (`streamed.py`)

A placement changes names and shapes of parameters but not the model: `canonical` maps each parameter to the
name it has in an exported checkpoint and, for a page, the first expert it holds.
"""

import re

_PAGE = re.compile(r"^(.*\.experts)\.pages\.(\d+)\.(\w+)$")


def canonical(name: str, shape: tuple[int, ...]) -> tuple[str, int | None]:
    """The exported name of a parameter and, when it is a page, the number of the page's first expert.

    `shape` is the parameter's full shape; its first dimension is the page size.
    """
    match = _PAGE.match(name)
    if match is None:
        return name, None
    return f"{match[1]}.{match[3]}", int(match[2]) * shape[0]


def default_page_size(num_experts: int) -> int:
    """Eight experts a page, or the largest divisor of the bank below that."""
    return max(size for size in range(1, min(8, num_experts) + 1) if num_experts % size == 0)
