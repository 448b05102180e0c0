"""A page: R experts stored together, the unit that is fetched, computed and released."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return swiglu_experts(rows_ND, counts_R, self.gate_proj, self.up_proj, self.down_proj)


def swiglu_experts(
    rows_ND: Tensor, counts_R: Tensor, gate_RFD: Tensor, up_RFD: Tensor, down_RDF: Tensor
) -> Tensor:
    """down(silu(gate(x)) · up(x)) of each row's expert; rows sorted by expert."""
    gate_NF = grouped_linear(rows_ND, gate_RFD, counts_R)
    up_NF = grouped_linear(rows_ND, up_RFD, counts_R)
    return grouped_linear(swiglu(gate_NF, up_NF), down_RDF, counts_R)


def grouped_linear(rows_NI: Tensor, weight_ROI: Tensor, counts_R: Tensor) -> Tensor:
    """Each expert's slice of rows times its own weight, transposed: [N, I] × [R, O, I] → [N, O].

    One grouped GEMM where the library has a fast one (bf16 on sm90 and later), else a product an expert. Experts
    without rows take part with an empty product, so that every weight gets a gradient on every rank: ranks that
    skip a parameter would leave the others waiting in its reduction.
    """
    if rows_NI.shape[0] and has_grouped_gemm(rows_NI):
        offsets_R = counts_R.cumsum(0).to(torch.int32)
        return F.grouped_mm(rows_NI, weight_ROI.transpose(1, 2), offs=offsets_R)
    slices = rows_NI.split(counts_R.tolist())
    return torch.cat(
        [F.linear(slice_NI, weight) for slice_NI, weight in zip(slices, weight_ROI, strict=True)]
    )


def has_grouped_gemm(rows: Tensor) -> bool:
    """Whether `F.grouped_mm` has a kernel of its own for this device and dtype (elsewhere it loops, slower)."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(rows.device) >= (9, 0)
    )
