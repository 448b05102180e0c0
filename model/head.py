"""The language-model head: logits for generation, summed cross entropy for training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSS_CHUNK = 2048  # targets whose logits exist at once: 2048 · V · 4 bytes = 268 MB at V = 32,768


class LanguageModelHead(nn.Linear):
    """A bias-free linear layer to the vocabulary."""

    def forward(self, hidden: Tensor, targets_T: Tensor | None = None) -> Tensor:
        """Logits of `hidden`; with targets_T (int64), the fp32 sum of their cross entropy for hidden [T, D]."""
        if targets_T is None:
            return F.linear(hidden, self.weight)
        return LinearCrossEntropySum.apply(hidden, self.weight, targets_T)


class LinearCrossEntropySum(torch.autograd.Function):
    """Σ_t CE(hidden_t · weightᵀ, target_t) without ever holding all logits.

    The gradient of a sum of cross entropies is known as soon as the logits are, softmax minus one-hot, so forward
    computes it chunk by chunk and backward only scales it. (Recomputing logits in backward costs a product more,
    and under ZeRO-3 needs the weight a second time.) Gradients of the weight accumulate in fp32.
    """

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        loss_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden_TD = torch.empty_like(hidden_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if with_gradient else None
        for start in range(0, len(targets_T), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            logits_TV = F.linear(hidden_TD[rows], weight_VD).float()
            loss_sum += F.cross_entropy(logits_TV, targets_T[rows], reduction="sum")
            if not with_gradient:
                continue
            probs_TV = logits_TV.softmax(-1)
            probs_TV.scatter_add_(1, targets_T[rows, None], torch.full_like(probs_TV[:, :1], -1.0))
            grad_logits_TV = probs_TV.to(hidden_TD.dtype)
            grad_hidden_TD[rows] = grad_logits_TV @ weight_VD
            grad_weight_VD += grad_logits_TV.T @ hidden_TD[rows]
        if with_gradient:
            ctx.save_for_backward(grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return (
            grad_hidden_TD * grad.to(grad_hidden_TD.dtype),
            grad_weight_VD * grad.to(grad_weight_VD.dtype),
            None,
        )
