"""The Mixture-of-Experts feed-forward: a router and a bank of experts."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experts.resident import ResidentBank
from kernels.reference import RouterStatistics, Routing, swiglu
from model.capacity import within_capacity
from model.config import PragnosiaConfig
from model.router import Router
from model.step_routing import PoolChoice, StepRouter

BuildBank = Callable[[PragnosiaConfig], nn.Module]


class MoEBlock(nn.Module):
    """A router, and the bank it routes to; knows not where the bank's weights live (see `experts/`)."""

    def __init__(self, config: PragnosiaConfig, build_bank: BuildBank = ResidentBank):
        super().__init__()
        self.gate = StepRouter(config) if config.routing == "step" else Router(config)
        self.experts = build_bank(config)

    def forward(
        self, hidden_TD: Tensor, valid_T: Tensor | None, choice: PoolChoice, *first: SimpleNamespace
    ) -> tuple[Tensor, RouterStatistics]:
        """The experts' outputs, weighted and summed, and the router's statistics. first: see `DecoderLayer`."""
        routing, statistics = self.gate(hidden_TD, valid_T, choice)
        if self.training and getattr(self.experts, "capacity_factor", None):
            routing = within_capacity(routing, self.experts.capacity(len(hidden_TD)), valid_T)
        return self.experts(hidden_TD, routing, *first), statistics


def moe_loop(
    hidden_TD: Tensor, routing: Routing, gate_proj_EFD: Tensor, up_proj_EFD: Tensor, down_proj_EDF: Tensor
) -> Tensor:
    """What every bank computes, one expert after the other: the oracle of the grouped paths."""
    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(gate_proj_EFD.shape[0]):
        token_N, choice_N = torch.where(routing.ids_TK == expert)
        rows_ND = hidden_TD[token_N]
        middle_NF = swiglu(F.linear(rows_ND, gate_proj_EFD[expert]), F.linear(rows_ND, up_proj_EFD[expert]))
        rows_ND = F.linear(middle_NF, down_proj_EDF[expert])
        weights_N = routing.weights_TK[token_N, choice_N].to(rows_ND.dtype)
        output_TD = output_TD.index_add(0, token_N, rows_ND * weights_N[:, None])
    return output_TD
