"""The router: which experts a token uses, and the losses that keep them used evenly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import route
from kernels.reference import RouterStatistics, Routing
from model.config import PragnosiaConfig


class Router(nn.Module):
    """softmax → top-k → renormalise over all experts of one layer (Qwen3-MoE's router): `token` routing."""

    def __init__(self, config: PragnosiaConfig):
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(
        self, hidden_TD: Tensor, valid_T: Tensor | None, _choice: object = None
    ) -> tuple[Routing, RouterStatistics]:
        """Routing of the tokens and sums over those of valid_T; the third argument is for `StepRouter`."""
        logits_TE = F.linear(hidden_TD, self.weight)
        return route(logits_TE, self.num_active, self.renormalise, valid_T)
