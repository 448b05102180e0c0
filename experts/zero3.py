"""`zero3`: the bank is cut in pages of ordinary parameters that DeepSpeed's ZeRO-3 fetches and releases.

Under ZeRO-3 with `offload_param`, DeepSpeed gathers a page's parameters when its forward runs and releases them
after. Its prefetcher replays a trace of modules and its collectives need every rank at the same one, so each
rank visits every page in the same order, with rows or without.

ZeRO-3 releases a weight by pointing the parameter at an empty tensor. Autograd must therefore keep no view of a
page (a transposed weight in a grouped GEMM, one expert of a stack): each would hold the whole fetched page until
backward, and memory would grow with the experts there are. `PageFunction` keeps the rows alone.
"""

import torch
from torch import Tensor, nn

from experts.page import ExpertPage, Groups, swiglu_experts
from kernels.dispatch import combine, permute
from kernels.reference import Routing


class PageFunction(torch.autograd.Function):
    """A page's experts, recomputed in backward from the rows and the weights fetched again."""

    @staticmethod
    def forward(ctx, page: ExpertPage, rows_ND: Tensor, counts_R: Tensor, *weights: Tensor) -> Tensor:
        ctx.page = page
        ctx.save_for_backward(rows_ND, counts_R)
        return swiglu_experts(rows_ND, Groups(counts_R), *weights)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):
        rows_ND, counts_R = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in (rows_ND, *ctx.page.parameters())]
            output_ND = swiglu_experts(inputs[0], Groups(counts_R), *inputs[1:])
        grad_rows_ND, *grad_weights = torch.autograd.grad(output_ND, inputs, grad_ND)
        return None, grad_rows_ND, None, *grad_weights


class Zero3Page(ExpertPage):
    """A page that ZeRO-3 can release between its forward and its backward."""

    def forward(self, rows_ND: Tensor, counts_R: Tensor) -> Tensor:
        return PageFunction.apply(self, rows_ND, counts_R, *self.parameters())


class Zero3Bank(nn.Module):
    """E experts as E / R pages of R."""

    def __init__(self, config, page_size: int):
        super().__init__()
        assert config.num_experts % page_size == 0, (config.num_experts, page_size)
        self.page_size = page_size
        self.pages = nn.ModuleList(
            Zero3Page(page_size, config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.num_experts // page_size)
        )

    def forward(self, hidden_TD: Tensor, routing: Routing) -> Tensor:
        counts_pages = routing.counts_E.split(self.page_size)
        rows_pages = permute(hidden_TD, routing).split(
            routing.counts_E.view(-1, self.page_size).sum(1).tolist()
        )
        outputs = [
            page(rows, counts)
            for page, rows, counts in zip(self.pages, rows_pages, counts_pages, strict=True)
        ]
        return combine(torch.cat(outputs), routing)
