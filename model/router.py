"""The router: which experts a token uses, and what keeps them used evenly."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import route
from kernels.reference import RouterStatistics, Routing
from model.config import PragnosiaConfig

BIAS_STEP = 1e-3  # γ of DeepSeek-V3 (arXiv 2412.19437, section 4.2)


class Router(nn.Module):
    """softmax → top-k → renormalise over all experts of one layer (Qwen3-MoE's router): `token` routing.

    nudges_E (int64, or None without `router_bias`): BIAS_STEP times these are added to the probabilities for the
    choice alone (see `nudge_biases`). Counted and not added up, so that no cast of the model to bf16 rounds them.
    """

    def __init__(self, config: PragnosiaConfig):
        super().__init__()
        self.num_active = config.num_experts_per_tok
        self.renormalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        nudges_E = torch.zeros(config.num_experts, dtype=torch.int64) if config.router_bias else None
        self.register_buffer("nudges_E", nudges_E)

    def forward(
        self, hidden_TD: Tensor, valid_T: Tensor | None, _choice: object = None
    ) -> tuple[Routing, RouterStatistics]:
        """Routing of the tokens and sums over those of valid_T; the third argument is for `StepRouter`."""
        logits_TE = F.linear(hidden_TD, self.weight)
        bias_E = None if self.nudges_E is None else self.nudges_E * BIAS_STEP
        return route(logits_TE, self.num_active, self.renormalise, valid_T, bias_E=bias_E)


def nudge_biases(model: nn.Module, load_LE: Tensor) -> None:
    """Balancing without a loss (arXiv 2408.15664, algorithm 1): each expert's bias one BIAS_STEP up or down.

    load_LE: rows of each layer's experts in a whole optimizer step, of all ranks and microbatches. Who has less
    than the mean goes up, who has more goes down.
    """
    routers = [  # a coprocessor that is a copy of the model has routers of its own
        module
        for name, module in model.named_modules()
        if isinstance(module, Router) and not name.startswith("cache.")
    ]
    for router, load_E in zip(routers, load_LE.double(), strict=True):
        router.nudges_E += (load_E.sum() - len(load_E) * load_E).sign().long()
