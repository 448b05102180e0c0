"""`zero3`: the bank is cut in pages of ordinary parameters that DeepSpeed's ZeRO-3 fetches and releases.

Under ZeRO-3 with `offload_param`, DeepSpeed gathers a page's parameters when its forward runs and releases them
after. Its prefetcher replays a trace of modules and its collectives need every rank at the same one, so each
rank visits every page in the same order, with rows or without.
"""

import torch
from torch import Tensor, nn

from experts.page import ExpertPage
from kernels.reference import Routing, combine, permute


class Zero3Bank(nn.Module):
    """E experts as E / R pages of R."""

    def __init__(self, config, page_size: int):
        super().__init__()
        assert config.num_experts % page_size == 0, (config.num_experts, page_size)
        self.page_size = page_size
        self.pages = nn.ModuleList(
            ExpertPage(page_size, config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.num_experts // page_size)
        )

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        counts_pages = routing.counts_E.split(self.page_size)
        rows_pages = permute(hidden_TD, routing).split(routing.counts_E.view(-1, self.page_size).sum(1).tolist())
        outputs = [page(rows, counts) for page, rows, counts in zip(self.pages, rows_pages, counts_pages, strict=True)]
        return combine(torch.cat(outputs), routing)
