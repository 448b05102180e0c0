"""Sizes of streamed experts: bytes of an expert, and how many travel together. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2.0 + 8 / 256}  # both moments of a value, scales included
DEFAULT_BUDGET, MOST_BY_DEFAULT = 256e6, 1e9


def automatic_budget(gpu_bytes: float) -> float:
    """GPU memory for streamed experts where nobody says how much: a fiftieth of it, 256 MB at least, 1 GB at most.

    Larger pages spend less time on starting copies and kernels. The shares are chosen, not measured.
    """
    return min(max(gpu_bytes / 50, DEFAULT_BUDGET), MOST_BY_DEFAULT)


def bytes_per_value(state: str, precision: str, accumulate: bool) -> float:
    """Host memory of one expert weight: itself, its moments, with fp32 state its master copy, its accumulator."""
    weight = 4 if precision == "fp32" else 2
    master = 4 if state == "fp32" and precision != "fp32" else 0
    return weight + MOMENT_BYTES[state] + master + accumulate * (4 if state == "fp32" else 2)


def device_bytes(
    config: PragnosiaConfig,
    page_size: int,
    num_slots: int,
    *,
    state: str,
    precision: str,
    accumulate: bool,
    ranks: int,
) -> float:
    """GPU memory of the slots, and of a page's gradients while it is updated."""
    values = page_size * config.expert_params()
    weight = 4 if precision == "fp32" else 2
    slot = bytes_per_value(state, precision, accumulate) / ranks + (weight if ranks > 1 else 0)
    return values * (num_slots * slot + 2 * weight * (1 if ranks == 1 else 2))


def choose_pages(
    config: PragnosiaConfig, budget: float | None, page_size: int | None, **sizes
) -> tuple[int, int] | None:
    """(experts a page, slots): as few pages a layer as three slots of them fit, else one expert in two slots.

    With three slots one page is fetched, one computed and one written back at any time. `page_size` fixes the
    page; `sizes` are the rest of `device_bytes`'s arguments. None where not even the smallest choice fits.
    """
    limit, experts = budget or DEFAULT_BUDGET, config.num_experts
    # Pages of equal size: 32 experts go in 11, 11 and 10 and not in 15, 15 and 2.
    pages = (
        [page_size] if page_size else sorted({-(-experts // n) for n in range(1, experts + 1)}, reverse=True)
    )
    for num_slots in (3, 2):
        for page in pages:
            if device_bytes(config, page, num_slots, **sizes) <= limit:
                return page, num_slots
    return None if budget else (page_size or 1, 3)
