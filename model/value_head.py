"""The value head of a tree of thoughts: how likely a partial solution is right and can still reach the answer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_VALUE = -100
"""Label of a place where no step ends, or of a step whose worth is not known."""


class ValueHead(nn.Module):
    """value = σ(MLP(h)) of the hidden state at a step's last token (verifiers: arXiv 2110.14168).

    `out_proj` starts at 0, and so every value at 1/2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """fp32 logits of the values of `hidden` [..., D], without the last dimension."""
        return self.out_proj(F.silu(self.in_proj(hidden))).squeeze(-1).float()


def value_loss(
    head: ValueHead, hidden_BSD: Tensor, labels_BS: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The fp32 sum of the binary cross entropy at labelled places, and what is reported of it (`component_sums`).

    A batch without labels computes nothing but still takes part in what ranks do together.
    """
    if labels_BS is None:
        labels_BS = torch.full(hidden_BSD.shape[:2], NO_VALUE, device=hidden_BSD.device)
    is_labelled_BS = labels_BS != NO_VALUE
    logits_T, labels_T = head(hidden_BSD[is_labelled_BS]), labels_BS[is_labelled_BS]
    loss_sum = F.binary_cross_entropy_with_logits(logits_T, labels_T.float(), reduction="sum")
    right, count = ((logits_T > 0) == (labels_T > 0)).sum(), is_labelled_BS.sum().float()
    parts = {"tree/value_loss": loss_sum.detach(), "tree/value_accuracy": right.float()}
    return loss_sum, {name: torch.stack([total, count]) for name, total in parts.items()}
