"""A page: R experts stored together, the unit that is fetched, computed and released."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import has_grouped_gemm, triton_grouped_gemm
from kernels.reference import swiglu


class ExpertPage(nn.Module):
    """Weights of R SwiGLU experts and their computation on rows sorted by expert."""

    def __init__(self, num_experts: int, hidden_size: int, expert_width: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, expert_width, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(num_experts, expert_width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_width))

    def forward(self, rows_ND: Tensor, counts_R: Tensor) -> Tensor:
        """rows_ND, sorted by expert, through their experts; counts_R (int64) rows each."""
        return swiglu_experts(rows_ND, Groups(counts_R), self.gate_proj, self.up_proj, self.down_proj)


@dataclass
class Groups:
    """How many consecutive rows each expert of a page has: on the host `sizes`, on the device `ends_R`, found from
    the counts where they are asked for; whoever has them sets them, and spares a wait."""

    counts_R: Tensor | None = None

    @cached_property
    def sizes(self) -> list[int]:
        return self.counts_R.tolist()

    @cached_property
    def ends_R(self) -> Tensor:
        """int32, where each expert's rows end."""
        return self.counts_R.cumsum(0).to(torch.int32)


def swiglu_experts(
    rows_ND: Tensor, groups: Groups, gate_RFD: Tensor, up_RFD: Tensor, down_RDF: Tensor
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; rows sorted by expert."""
    gate_NF = grouped_matmul(rows_ND, gate_RFD.transpose(1, 2), groups)
    up_NF = grouped_matmul(rows_ND, up_RFD.transpose(1, 2), groups)
    return grouped_matmul(swiglu(gate_NF, up_NF), down_RDF.transpose(1, 2), groups)


def grouped_matmul(rows_NI: Tensor, weight_RIO: Tensor, groups: Groups) -> Tensor:
    """Each expert's slice of rows times its own weight: [N, I] × [R, I, O] → [N, O].

    One grouped GEMM where a library has a fast one, else a product an expert. Experts without rows take part with
    an empty product, so that every weight gets a gradient on every rank: ranks that skip a parameter would leave
    the others waiting in its reduction.
    """
    if rows_NI.shape[0] and has_grouped_gemm(rows_NI):
        return F.grouped_mm(rows_NI, weight_RIO, offs=groups.ends_R)
    if rows_NI.shape[0] and (grouped_gemm := triton_grouped_gemm(rows_NI)):
        weight_ROI = weight_RIO.transpose(1, 2)
        if weight_RIO.is_contiguous():
            return grouped_gemm(rows_NI, weight_RIO, groups.ends_R)
        if weight_ROI.is_contiguous():  # else a page within rows that hold more, which it does not take
            return grouped_gemm(rows_NI, weight_ROI, groups.ends_R, trans_b=True)
    slices = rows_NI.split(groups.sizes)
    return torch.cat([slice_NI @ weight for slice_NI, weight in zip(slices, weight_RIO, strict=True)])


def grouped_outer(grads_NO: Tensor, rows_NI: Tensor, groups: Groups) -> Tensor:
    """The weight gradient of each expert: Σ over its rows of grad ⊗ row, [N, O] and [N, I] → [R, O, I]."""
    if rows_NI.shape[0] and has_grouped_gemm(rows_NI):
        return F.grouped_mm(grads_NO.t(), rows_NI, offs=groups.ends_R)
    pairs = zip(grads_NO.split(groups.sizes), rows_NI.split(groups.sizes), strict=True)
    return torch.stack([grads.t() @ rows for grads, rows in pairs])
