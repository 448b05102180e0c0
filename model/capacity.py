"""The capacity of experts: which of a router's choices are kept where an expert may take only so many."""

import torch
from torch import Tensor

from kernels.reference import Routing


def within_capacity(routing: Routing, capacity: int, valid_T: Tensor | None) -> Routing:
    """The routing of which each expert takes at most `capacity` choices; nothing waits for the device.

    Choices of real tokens (valid_T, None = all) go before those of padding, then earlier tokens before later ones;
    a token chooses an expert once, so there are no equals. What is dropped stands behind all rows that are kept.
    Weights stay what they are: those of a token with a dropped choice add up to less than before.
    """
    expert_N = routing.ids_TK.flatten()[routing.order_N]
    first_N = (routing.counts_E.cumsum(0) - routing.counts_E)[expert_N]
    line_N = torch.arange(len(first_N), device=first_N.device) - first_N  # who of the same expert goes before
    if valid_T is not None:
        real_N = valid_T[routing.order_N // routing.ids_TK.shape[1]].long()
        before_N = real_N.cumsum(0) - real_N
        before_N = before_N - before_N[first_N]
        real_E = torch.zeros_like(routing.counts_E).index_add_(0, expert_N, real_N)
        line_N = torch.where(real_N > 0, before_N, real_E[expert_N] + line_N - before_N)
    kept_N = line_N < capacity
    place_N = torch.where(kept_N, kept_N.cumsum(0), kept_N.sum() + (~kept_N).cumsum(0)) - 1
    order_N = torch.empty_like(routing.order_N)
    order_N[place_N] = routing.order_N
    counts_E = routing.counts_E.clamp(max=capacity)
    return routing._replace(counts_E=counts_E, order_N=order_N, places_TK=place_N[routing.places_TK])


def drops(load_LE: Tensor, capacity: int) -> dict[str, Tensor]:
    """What a microbatch reports: how many of its real tokens' choices are dropped, and how many there are."""
    return {"router/dropped_share": torch.stack([(load_LE - capacity).clamp(min=0).sum(), load_LE.sum()])}
