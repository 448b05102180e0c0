"""The language-model head: logits for generation, summed cross entropy for training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOSS_CHUNK = (
    1024  # targets whose logits exist at once: with a bf16 copy 1024 · V · 6 bytes, 201 MB at V = 32,768
)


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
    computes it chunk by chunk, in place of the logits, and backward only scales it. (Recomputing logits in
    backward costs a product more, and under ZeRO-3 needs the weight a second time.) Gradients of the weight add up
    in fp32.
    """

    @staticmethod
    def forward(ctx, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        loss_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        grad_hidden_TD, grad_weight_VD = torch.empty_like(hidden_TD), None
        for start in range(0, len(targets_T), LOSS_CHUNK):
            rows = slice(start, start + LOSS_CHUNK)
            targets_T1 = targets_T[rows, None]
            logits_TV = F.linear(hidden_TD[rows], weight_VD).float()
            logits_TV -= logits_TV.amax(1, keepdim=True)
            loss_sum -= logits_TV.gather(1, targets_T1).sum()
            sum_T1 = logits_TV.exp_().sum(1, keepdim=True)
            loss_sum += sum_T1.log().sum()
            if not with_gradient:
                continue
            logits_TV /= sum_T1
            logits_TV.scatter_add_(1, targets_T1, torch.full_like(sum_T1, -1.0))
            grad_logits_TV = logits_TV.to(hidden_TD.dtype)
            del logits_TV
            grad_hidden_TD[rows] = grad_logits_TV @ weight_VD
            part_VD = grad_logits_TV.T @ hidden_TD[rows]
            if grad_weight_VD is None:
                grad_weight_VD = part_VD if len(targets_T) <= LOSS_CHUNK else part_VD.float()
            else:
                grad_weight_VD += part_VD
        if with_gradient:
            if grad_weight_VD is None:
                grad_weight_VD = torch.zeros_like(weight_VD)
            ctx.save_for_backward(grad_hidden_TD, grad_weight_VD.to(weight_VD.dtype))
        return loss_sum

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_TD.mul_(grad), grad_weight_VD.mul_(grad), None  # in place: there is no second time
