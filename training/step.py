"""One optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache

Batch = dict[str, Tensor]


@dataclass
class StepResult:
    """What one step saw, on this rank until `reduce_results` sums it over ranks. Sums are fp64 on the device; what
    a component reports under a name has a count beside it, "<name> count".

    finite: whether some microbatch had a finite loss. applied: whether the weights were updated; DeepSpeed
    refuses a gradient that is not finite. num_tokens: real tokens of all ranks. grad_norm: global norm before
    clipping. refused: experts that were left out of the update because their own gradient was not finite.
    """

    finite: bool
    applied: bool
    num_tokens: int
    sums: dict[str, Tensor]
    load_LE: Tensor | None
    grad_norm: float | None
    refused: int


def train_step(engine, microbatches: list[Batch]) -> StepResult:
    """Forward and backward of every microbatch, then the update.

    The loss of the step is a sum over its target tokens divided by their global number N (the value head's a sum
    over labelled steps, the router's over tokens, likewise). DeepSpeed averages gradients over W ranks, so rank r
    contributes W · Σ_{its targets} CE / N and the average is the exact gradient of Σ_{all targets} CE / N,
    whatever the split into ranks and microbatches. `scale_wrt_gas=False` because N already counts every
    microbatch.

    A microbatch whose loss is not finite on some rank is left out on all of them. If a later one fails when
    gradients have begun to accumulate, an empty batch takes its place, because DeepSpeed reduces gradients in
    the last backward; if every one fails, the step is not applied.

    A microbatch that is a later segment of its rows (see `training/segments.py`) goes on from the one before it.
    """
    device = engine.device
    counts = torch.tensor([[count_targets(b), count_tokens(b), count_values(b)] for b in microbatches])
    counts = counts.sum(0).to(device)
    dist.all_reduce(counts)
    num_targets, num_tokens, num_values = counts.tolist()
    whole = {"num_targets": num_targets, "num_tokens": num_tokens, "num_value_labels": num_values}
    keys = ("loss_sum", "targets", "tokens", "balance", "z", "entropy")
    sums = {key: torch.zeros((), dtype=torch.float64, device=device) for key in keys}
    load_LE, grad_norm, started, applied = None, None, False, False
    goes_on = [b["document_ids"].shape != b["input_ids"].shape for b in microbatches] + [False]
    for index, batch in enumerate(microbatches):
        is_last = index == len(microbatches) - 1
        engine.set_gradient_accumulation_boundary(is_last)
        targets, tokens = count_targets(batch), count_tokens(batch)
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        if not goes_on[index]:
            cache = DynamicCache() if goes_on[index + 1] else None
        output = engine(**batch, **whole, past_key_values=cache)
        if finite_everywhere(output.loss):
            sums["loss_sum"] += output.loss_sum.detach()
            sums["targets"] += targets
            sums["tokens"] += tokens
            sums["balance"] += output.balance_loss * tokens
            sums["z"] += output.z_loss * tokens
            sums["entropy"] += output.router_entropy * tokens
            load_LE = output.load_LE if load_LE is None else load_LE + output.load_LE
            for name, (total, count) in (output.component_sums or {}).items():
                sums[name] = sums.get(name, 0) + total.double()
                sums[f"{name} count"] = sums.get(f"{name} count", 0) + count.double()
        elif not started:
            continue
        else:
            output = engine(**empty_like(batch), **whole)
        started = True
        engine.backward(output.loss * dist.get_world_size(), scale_wrt_gas=False)
        if is_last:
            grad_norm = checked_norm(engine)
            if grad_norm is not None and not math.isfinite(grad_norm):
                engine.zero_grad()
                break
        engine.step()
    else:
        applied = started and engine.was_step_applied()
        if started and grad_norm is None and engine.get_global_grad_norm() is not None:
            grad_norm = float(engine.get_global_grad_norm())
    refused = engine.module.placement.take_refused()
    return StepResult(started, applied, num_tokens, sums, load_LE, grad_norm, refused)


def count_targets(batch: Batch) -> int:
    """Targets of a batch: those after its traces, if it has any. Position 0 has nothing to be predicted from."""
    if "ahead_labels" in batch:
        return int((batch["ahead_labels"] != -100).sum())
    return int((batch["labels"][:, 1:] != -100).sum())


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int((batch["document_ids"][:, -batch["input_ids"].shape[1] :] > 0).sum())


def count_values(batch: Batch) -> int:
    """Labelled ends of steps, for a value head."""
    return int((batch["value_labels"] != -100).sum()) if "value_labels" in batch else 0


def empty_like(batch: Batch) -> Batch:
    """A batch of the same shape without tokens and targets, and with nothing before them."""
    own = batch | {"document_ids": batch["input_ids"]}
    return {key: torch.full_like(x, -100 if key.endswith("labels") else 0) for key, x in own.items()}


def finite_everywhere(loss: Tensor) -> bool:
    """Whether the loss is finite on all ranks."""
    finite = loss.detach().isfinite().float()
    if dist.get_world_size() > 1:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite.item())


def checked_norm(engine) -> float | None:
    """The global norm of reduced gradients where DeepSpeed does not check it, plain fp32 without ZeRO; else None.
    Where ranks own different experts, DeepSpeed clips by their mean norm, so here they are clipped first."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    owned = [p for p in parameters if hasattr(p, "owners")]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if not hasattr(p, "owners")])
    if owned:
        square = torch.nn.utils.get_total_norm([p.grad for p in owned]).square()
        dist.all_reduce(square, group=owned[0].owners)
        norm = (norm.square() + square).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping() or torch.inf, norm)
    return float(norm)


def reduce_results(results: list[StepResult]) -> tuple[dict[str, float], Tensor | None]:
    """Sums over the given steps and all ranks, and the summed router load [L, E] on CPU; collective."""
    keys = list(dict.fromkeys(key for result in results for key in result.sums))
    total = torch.stack([sum(result.sums.get(key, 0) for result in results) for key in keys])
    loads = [result.load_LE for result in results if result.load_LE is not None]
    load_LE = sum(loads) if loads else None
    dist.all_reduce(total)
    if load_LE is not None:
        dist.all_reduce(load_LE)
        load_LE = load_LE.cpu()
    return dict(zip(keys, total.tolist(), strict=True)), load_LE
