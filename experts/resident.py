"""`resident`: the whole bank is one ordinary set of parameters in device memory."""

from torch import Tensor

from experts.page import ExpertPage
from kernels.dispatch import combine, permute
from kernels.reference import Routing


class ResidentBank(ExpertPage):
    """All E experts of a layer as 3-D parameters named as in the exported checkpoint."""

    def __init__(self, config):
        super().__init__(config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        rows_ND = super().forward(permute(hidden_TD, routing), routing.counts_E)
        return combine(rows_ND, routing)
