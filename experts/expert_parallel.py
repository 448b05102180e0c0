"""`resident` over several ranks: each owns some of a layer's experts, and rows travel to their owners and back.

DeepSpeed's engine knows expert parallelism by the class `AutoEPMoELayer` and by marks on the expert parameters:
it reduces, partitions and saves them over the *expert-data-parallel* group, the ranks that own the same experts.
The layer here is a subclass that takes over those contracts and nothing else: the router, its losses, the
permutation and the experts are the model's own. Written for DeepSpeed 0.19.8.

Of the W ranks of an expert-parallel group each has R = E / W experts.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from experts.page import Groups, swiglu_experts
from kernels.dispatch import combine, permute
from kernels.reference import Routing, inverse


class LocalExperts(nn.Module):
    """The experts that a rank owns, under the names by which DeepSpeed saves them: w1 gate, w2 down, w3 up."""

    def __init__(self, bank: ExpertParallelBank, hidden_size: int, expert_width: int):
        super().__init__()
        self.marks = bank.marks
        self.w1 = nn.Parameter(torch.empty(bank.num_local_experts, expert_width, hidden_size))
        self.w2 = nn.Parameter(torch.empty(bank.num_local_experts, hidden_size, expert_width))
        self.w3 = nn.Parameter(torch.empty(bank.num_local_experts, expert_width, hidden_size))
        self.mark()

    def mark(self) -> None:
        """Tell DeepSpeed, by attributes, whose the parameters are; before ZeRO-3 partitions them."""
        for parameter in self.parameters():
            for name, value in self.marks(parameter.shape).items():
                setattr(parameter, name, value)

    def _apply(self, fn, recurse=True):
        """As every module's, which replaces parameters when their device or dtype changes."""
        super()._apply(fn, recurse)
        self.mark()
        return self

    def forward(self, rows_ND: Tensor, counts_R: Tensor) -> Tensor:
        """rows_ND, sorted by expert, through their experts; a module of its own, which ZeRO-3 fetches."""
        return swiglu_experts(rows_ND, Groups(counts_R), self.w1, self.w3, self.w2)


class ExpertParallelBank(AutoEPMoELayer):
    """E experts of a layer over the W ranks of an expert-parallel group, consecutive ones on each.

    Args:
        config: of the model.
        size: W; divides E and the number of ranks.
        capacity_factor: in training an expert takes at most this many times the even share of a rank's choices
            (see `model/capacity.py`); None: all.
    """

    def __init__(self, config, size: int, capacity_factor: float | None = None):
        nn.Module.__init__(self)  # the parent's takes a module apart that there is not
        self.num_experts, self.ep_size = config.num_experts, size
        self.num_local_experts = config.num_experts // size
        self.capacity_factor = capacity_factor
        self.num_active = config.num_experts_per_tok
        self.num_choices = config.expert_pool or config.num_experts
        self.ep_group_name = f"ep_size_{size}"
        self.folding_group_handles = self.tp_group = None
        self.set_deepspeed_parallelism()
        self.ep_rank = dist.get_rank(self.ep_group)
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, size
        )
        self.experts = LocalExperts(self, config.hidden_size, config.moe_intermediate_size)

    def marks(self, shape: torch.Size) -> dict:
        """Attributes of an expert parameter of this rank: what DeepSpeed reduces, partitions and saves it by, and
        what `experts.canonical` names it by."""
        placement = self.expert_placement_descriptor
        logical_shape = [self.num_experts, *shape[1:]]
        return {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            "ds_zero_partition_process_group": groups._get_expert_data_parallel_group(self.ep_group_name),
            DS_AUTOEP_UC_META: {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            },
            "first_expert": self.ep_rank * self.num_local_experts,
            "owners": self.ep_group,
        }

    def capacity(self, tokens: int) -> int:
        """How many choices an expert takes of so many tokens: its even share, with pools that in the pool, times
        the factor, rounded up."""
        return math.ceil(round(self.capacity_factor * tokens * self.num_active / self.num_choices, 6))

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        """The experts' weighted sum, [T, D]; collective over the group, whatever its ranks' numbers of tokens.

        Dropped rows do not travel, and come back as zeros.
        """
        exchange = Exchange(routing.counts_E, self.ep_group)
        rows_ND = permute(hidden_TD, routing)
        dropped = len(rows_ND) - sum(exchange.sent)
        if dropped:
            rows_ND = rows_ND[:-dropped]
        rows_ND = permute(exchange.to_owners(rows_ND), exchange.by_expert)
        rows_ND = self.experts(rows_ND, exchange.counts_R)
        rows_ND = exchange.from_owners(permute(rows_ND, exchange.by_source))
        if dropped:
            rows_ND = F.pad(rows_ND, (0, 0, 0, dropped))
        return combine(rows_ND, routing)


class Exchange:
    """Who sends how many rows to whom in one layer, told by an all-to-all of counts.

    What a rank sends is sorted by expert, so it is sorted by owner. What it receives is sorted by source, and by
    expert within a source; `by_expert` and `by_source` turn it into the order of its experts and back.
    """

    def __init__(self, counts_E: Tensor, group: dist.ProcessGroup):
        self.group = group
        sent_WR = counts_E.view(group.size(), -1)
        received_WR = torch.empty_like(sent_WR)
        dist.all_to_all_single(received_WR, sent_WR, group=group)
        splits = torch.stack((sent_WR.sum(1), received_WR.sum(1)))
        # A wait for the device: a collective must be given its sizes on the host.
        self.sent, self.received = splits.tolist()
        self.counts_R = received_WR.sum(0)
        places_N = self.places_by_expert(received_WR, sum(self.received))
        order_N = inverse(places_N)
        self.by_expert = self.reordering(order_N, places_N)
        self.by_source = self.reordering(places_N, order_N)

    @staticmethod
    def places_by_expert(received_WR: Tensor, total: int) -> Tensor:
        """For each received row, its place when rows are sorted by expert, and by source within an expert."""
        counts_RW = received_WR.t()
        before_RW = (counts_RW.flatten().cumsum(0) - counts_RW.flatten()).view_as(counts_RW)
        before_WR = (received_WR.flatten().cumsum(0) - received_WR.flatten()).view_as(received_WR)
        moved_WR = before_RW.t() - before_WR
        moved_N = moved_WR.flatten().repeat_interleave(received_WR.flatten(), output_size=total)
        return torch.arange(total, device=received_WR.device) + moved_N

    def reordering(self, order_N: Tensor, places_N: Tensor) -> Routing:
        """A permutation of rows as the routing of one choice each, for `permute`."""
        unused = places_N.new_empty(0)
        return Routing(unused, unused, self.counts_R, order_N, places_N[:, None])

    def to_owners(self, rows_ND: Tensor) -> Tensor:
        """Rows sorted by expert, to the ranks that own the experts; the received rows by source."""
        return AllToAll.apply(rows_ND, self.sent, self.received, self.group)

    def from_owners(self, rows_ND: Tensor) -> Tensor:
        """The inverse of `to_owners`."""
        return AllToAll.apply(rows_ND, self.received, self.sent, self.group)


class AllToAll(torch.autograd.Function):
    """Rows to other ranks, `sent` of them to each; their gradients the other way."""

    @staticmethod
    def forward(ctx, rows_ND: Tensor, sent: list[int], received: list[int], group) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        return exchanged(rows_ND, sent, received, group)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        sent, received = ctx.splits
        return exchanged(grad_ND, received, sent, ctx.group), None, None, None


def exchanged(rows_ND: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    """The rows that this rank is sent, by source."""
    result_ND = rows_ND.new_empty(sum(received), *rows_ND.shape[1:])
    dist.all_to_all_single(result_ND, rows_ND.contiguous(), received, sent, group=group)
    return result_ND
