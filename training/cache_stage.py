"""The stage that trains a coprocessor: places to train it at, what it cannot go with, and its validation.

A trace is a place in a row: latents are made from what stands up to it, and the tokens after it are the targets
(see `model/cache_augmentation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from data.loader import eval_batches
from data.prompts import IGNORED
from model.components import CacheConfig
from training.config import TrainingArguments, UserError
from training.metrics import component_metrics, perplexity
from training.step import Batch, count_targets

if TYPE_CHECKING:
    from data.packing import PackedDataset
    from model import PragnosiaConfig

VALIDATION = "validation"


def with_traces(batch: Batch, cache: CacheConfig, key: object) -> Batch:
    """The batch with traces [B, N] and ahead_labels [B, N, A], int64; −100 where there is no target.

    A trace is the token before a target. Which of them a row gets depends on `key` and on the row's tokens alone,
    so it does not matter how rows were split into microbatches and ranks. A row with few gets each once, and
    traces without targets.
    """
    rows = [
        _row_traces(ids, labels, documents, cache, key)
        for ids, labels, documents in zip(
            batch["input_ids"], batch["labels"], batch["document_ids"], strict=True
        )
    ]
    traces, ahead_labels = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return {**batch, "traces": traces, "ahead_labels": ahead_labels}


def _row_traces(
    ids_S: torch.Tensor, labels_S: torch.Tensor, documents_S: torch.Tensor, cache: CacheConfig, key: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """traces [N] and ahead_labels [N, A] of one row."""
    digest = blake2b(f"{key}/".encode() + ids_S.numpy().tobytes(), digest_size=8).digest()
    is_place = (labels_S[1:] != IGNORED) & (documents_S[1:] == documents_S[:-1])
    chosen = np.random.default_rng(int.from_bytes(digest, "little")).permutation(
        np.flatnonzero(is_place.numpy())
    )
    chosen = torch.from_numpy(np.sort(chosen[: cache.num_traces]))
    traces_N = torch.zeros(cache.num_traces, dtype=torch.int64)
    traces_N[: len(chosen)] = chosen
    index_NA = chosen[:, None] + torch.arange(1, cache.num_ahead_tokens + 1)
    inside_NA = index_NA < len(ids_S)
    index_NA = index_NA.clamp(max=len(ids_S) - 1)
    inside_NA &= documents_S[index_NA] == documents_S[chosen][:, None]
    labels_NA = torch.full((cache.num_traces, cache.num_ahead_tokens), IGNORED)
    labels_NA[: len(chosen)] = labels_S[index_NA].masked_fill(~inside_NA, IGNORED)
    return traces_N, labels_NA


def check_stage(
    config: PragnosiaConfig,
    args: TrainingArguments,
    placement: str,
    *,
    given: PragnosiaConfig,
    is_trained: bool,
) -> None:
    """Refuse what the stages cannot do. given: the model before the run added components to it; is_trained:
    whether the run starts from weights.

    Raises:
        UserError: one line with the way out.
    """
    if placement == "streamed" and config.cache and config.cache["coprocessor"] == "copy":
        raise UserError(
            "--coprocessor copy has a second set of experts, which cannot be streamed: use lora or light, or "
            "--placement resident or zero3"
        )
    if args.value_refresh and args.stage == "cache":
        raise UserError(
            "--value-refresh has no effect in --stage cache, which trains no value head: use --value-refresh 0"
        )
    if args.value_refresh and not config.tree:
        raise UserError("--value-refresh needs a value head to train: add --use-tree-of-thoughts")
    if args.stage == "base":
        if config.cache and not given.cache:
            raise UserError(
                "--use-cache-augmentation: a coprocessor learns from a model that is trained already: train that "
                "first without it, then --stage cache --init-from its run"
            )
        return
    if config.cache["retrieval_factor"] == 0:
        raise UserError("--retrieval-factor 0 takes the latents away, so nothing can be learnt: use 1")
    if not (is_trained or args.cache_joint):
        raise UserError("--stage cache leaves the model as it is: give a trained one with --init-from")
    if config.memory and not (given.memory or args.cache_joint):
        raise UserError(
            "--stage cache leaves the model as it is, and --use-neural-memory would add a memory that learns "
            "nothing: train a model with it first, or add --cache-joint"
        )
    if config.tree and not given.tree:
        raise UserError(
            "--stage cache trains no value head, so --use-tree-of-thoughts would add one that learns nothing: "
            "train it in stage base, or leave it out"
        )
    if placement == "streamed" and args.cache_joint:
        raise UserError(
            "--cache-joint passes through the model twice a microbatch, and streamed experts would be updated "
            "twice: use --placement resident or zero3"
        )


@torch.no_grad()
def evaluate_latents(
    model: torch.nn.Module,
    datasets: Mapping[str, PackedDataset],
    cache: CacheConfig,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Losses of each family's traces and "overall": {"loss", "perplexity", "readout_loss", "base_loss",
    "loss_at_<n>", "base_loss_at_<n>", …, "tokens", "samples"}.

    loss: of all ahead tokens, with latents; base_loss: of the same tokens without; _at_<n>: of the n-th token
    after the latents alone (the paper's table 1). tokens: ahead tokens; samples: examples.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, dict[str, float]] = {}
    for family, dataset in datasets.items():
        total: dict[str, torch.Tensor] = {}
        for batch in eval_batches(dataset, batch_size, rank, world_size):
            batch = with_traces(batch, cache, VALIDATION)
            targets = count_targets(batch)
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            own = {n: x for n, x in output.component_sums.items() if n.startswith("cache/")}
            for name, (loss_sum, count) in own.items():
                name = name.removeprefix("cache/")
                total[name] = total.get(name, 0) + loss_sum.double()
                total[f"{name} count"] = total.get(f"{name} count", 0) + count.double()
            total["tokens"] = total.get("tokens", 0) + torch.tensor(
                targets, device=device, dtype=torch.float64
            )
        values = torch.stack(list(total.values()))
        if world_size > 1:
            dist.all_reduce(values)
        sums[family] = dict(zip(total, values.tolist(), strict=True)) | {"samples": dataset.num_examples}
    names = next(iter(sums.values()), {})
    overall = {name: sum(row[name] for row in sums.values()) for name in names}
    model.train(was_training)
    return {family: _row(row) for family, row in {**sums, "overall": overall}.items()}


def _row(sums: dict[str, float]) -> dict[str, float]:
    losses = component_metrics(sums)
    loss = losses.pop("ahead_loss")
    counts = {name: int(sums[name]) for name in ("tokens", "samples")}
    return {"loss": loss, "perplexity": perplexity(loss), **losses, **counts}
