"""How good a model is: loss on target tokens, and answers that a program can check.

Every number is a quotient of sums over examples or tokens, all-reduced over ranks, so that neither the batch
size nor the number of ranks changes it. torch is imported inside the functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from inference.code_execution import passes_tests
from inference.generation import Sampling, generate

if TYPE_CHECKING:
    import torch

    from data.example import Example

ANSWERS = 200
"""Examples of a family that are answered and checked unless told otherwise: generation is slow."""

ANSWER_GROUP = 16
"""Prompts answered together. Fixed: rounding differs between batch shapes and could flip a near tie, so
groups are the same for every batch size and rank count."""

ANSWER_TOKENS = 256
"""Most tokens of a checked answer."""


def evaluate_loss(
    model: object,
    datasets: Mapping[str, object],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: str | torch.device,
) -> dict[str, dict[str, float]]:
    """Loss of each family's `PackedDataset` and "overall": {"loss", "perplexity", "bits_per_byte", "tokens",
    "samples"}.

    loss: mean cross entropy of the target tokens, nats. bits_per_byte: the same information per UTF-8 byte of
    target text, which compares across tokenizers. tokens: targets. samples: examples. Each rank computes its
    share; all ranks make equally many forward passes (ZeRO-3 needs that) and return the same numbers. Without
    any targets the losses are nan.

    With step routing also "training_choice_loss", with the pools that training would choose, and "choice_gap",
    by how much "loss", with causal pools, lies above it. It takes a second pass, and depends as training does on
    the rows that come together: on the batch size and the number of ranks.
    """
    from model.step_routing import step_routers, training_choice

    was_training = model.training
    model.eval()
    share = {"batch_size": batch_size, "rank": rank, "world_size": world_size, "device": device}
    rows = _loss_rows(model, datasets, **share)
    if step_routers(model):
        with training_choice(model):
            chosen = _loss_rows(model, datasets, **share)
        for family, row in rows.items():
            row["training_choice_loss"] = chosen[family]["loss"]
            row["choice_gap"] = row["loss"] - row["training_choice_loss"]
    model.train(was_training)
    return rows


def _loss_rows(
    model: object,
    datasets: Mapping[str, object],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: str | torch.device,
) -> dict[str, dict[str, float]]:
    import torch
    import torch.distributed as dist

    from data.loader import eval_batches

    sums: dict[str, tuple[float, int, int, int]] = {}
    for family, dataset in datasets.items():
        total = torch.zeros(2, dtype=torch.float64, device=device)  # summed cross entropy, number of targets
        for batch in eval_batches(dataset, batch_size, rank, world_size):
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.no_grad():
                total[0] += model(**batch).loss_sum.double()
            total[1] += (batch["labels"][:, 1:] != -100).sum()
        if world_size > 1:
            dist.all_reduce(total)
        loss_sum, targets = total.tolist()
        assert targets == dataset.num_targets, (family, targets, dataset.num_targets)
        sums[family] = (loss_sum, dataset.num_targets, dataset.target_bytes, dataset.num_examples)
    overall = tuple(sum(column) for column in zip((0.0, 0, 0, 0), *sums.values(), strict=True))
    return {name: _loss_row(*row) for name, row in {**sums, "overall": overall}.items()}


def _loss_row(loss_sum: float, targets: int, target_bytes: int, samples: int) -> dict[str, float]:
    from training.metrics import perplexity

    loss = loss_sum / targets if targets else math.nan
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss_sum / target_bytes / math.log(2) if targets else math.nan,
        "tokens": targets,
        "samples": samples,
    }


def evaluate_answers(
    model: object,
    tokenizer: object,
    examples: Sequence[Example],
    *,
    rank: int,
    world_size: int,
    device: str | torch.device,
    execute_code: bool = False,
) -> list[dict[str, object]]:
    """Answer examples greedily, check them: {"family", "prompt", "expected", "answer", "correct"} each.

    correct is None where nothing can tell: free text, or code without tests or without `execute_code`. Groups
    of examples are dealt to the ranks, each of which holds the whole model; all return the whole list.
    """
    import torch.distributed as dist
    from tqdm import tqdm

    from data.prompts import prompt_text

    asked = [example for example in examples if example.prompt_messages()]
    model.eval()
    mine: list[tuple[int, str, bool | None]] = []
    starts = range(rank * ANSWER_GROUP, len(asked), world_size * ANSWER_GROUP)
    # disable=None: a bar on a terminal, nothing in a log.
    for start in tqdm(starts, desc="answers", unit="group", leave=False, disable=True if rank else None):
        group = asked[start : start + ANSWER_GROUP]
        prompts = [prompt_text(e.prompt_messages(), e.prompt_format, tokenizer) for e in group]
        answers = generate(model, tokenizer, prompts, Sampling.greedy(ANSWER_TOKENS), device=device)
        for offset, (example, answer) in enumerate(zip(group, answers, strict=True)):
            mine.append((start + offset, answer, check_answer(example, answer, execute_code)))
    shares = [mine]
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, mine)
    return [
        {
            "family": asked[i].family,
            "prompt": asked[i].prompt_messages()[-1]["content"],
            "expected": asked[i].answer(),
            "answer": answer,
            "correct": correct,
        }
        for i, answer, correct in sorted(record for share in shares for record in share)
    ]


def evaluate_searches(
    model: object,
    tokenizer: object,
    examples: Sequence[Example],
    *,
    rank: int,
    world_size: int,
    device: str | torch.device,
) -> list[dict[str, object]]:
    """Accuracy against tokens, a row for each way of answering: {"search", "exact_match", "answers", "tokens"}.

    tokens: generated for one answer, those of dropped steps included. The greedy way is the search with one state
    and one proposal; the beam keeps the likeliest paths, of as many proposals as the tree; best of n draws as many
    whole solutions as the tree proposes steps to one depth. Groups of examples are dealt to the ranks.

    Raises:
        UserError: the model has no value head.
    """
    import torch
    import torch.distributed as dist

    from data.prompts import prompt_text
    from inference.tree_of_thoughts import tree_config, tree_of_thoughts

    own = tree_config(model)
    named = f"{own.beam_width}x{own.branching}"
    searches = {
        "greedy": (replace(own, search="bfs", beam_width=1, branching=1, temperature=0.0), "likelihood"),
        f"likelihood beam {named}": (replace(own, search="bfs", pruning_threshold=0.0), "likelihood"),
        f"best of {own.beam_width * own.branching}": (replace(own, search="best_of_n"), "value"),
        f"tree {named}": (replace(own, search="dfs" if own.search == "dfs" else "bfs"), "value"),
    }
    model.eval()
    rows = []
    for name, (tree, score) in searches.items():
        total = torch.zeros(3, dtype=torch.float64, device=device)  # right answers, answers, tokens
        for start in range(rank * ANSWER_GROUP, len(examples), world_size * ANSWER_GROUP):
            group = examples[start : start + ANSWER_GROUP]
            prompts = [prompt_text(e.prompt_messages(), e.prompt_format, tokenizer) for e in group]
            found = tree_of_thoughts(
                model,
                tokenizer,
                prompts,
                tree,
                score=score,
                max_new_tokens=ANSWER_TOKENS,
                seed=start,
                device=device,
            )
            for example, one in zip(group, found, strict=True):
                total += torch.tensor(
                    [bool(check_answer(example, one.answer, False)), 1, one.tokens], device=device
                )
        if world_size > 1:
            dist.all_reduce(total)
        right, answers, tokens = total.tolist()
        count = max(answers, 1.0)
        rows.append(
            {"search": name, "exact_match": right / count, "answers": int(answers), "tokens": tokens / count}
        )
    return rows


def check_answer(example: Example, answer: str, execute_code: bool) -> bool | None:
    """Whether an answer is right, None if nothing can tell; generated code runs only if `execute_code`."""
    from data.verify import is_correct

    if example.tests is None:
        return is_correct(example, answer)
    if not execute_code:
        return None
    fenced = re.search(r"```(?:python|py)?\n(.*?)(?:```|$)", answer, flags=re.DOTALL)
    return passes_tests(fenced[1] if fenced else answer, example.tests)


def can_be_checked(example: Example, execute_code: bool) -> bool:
    """Whether `check_answer` will tell right from wrong for this example."""
    from data.verify import is_correct

    return execute_code if example.tests is not None else is_correct(example, "") is not None


def answer_scores(records: Sequence[Mapping[str, object]]) -> dict[str, dict[str, float]]:
    """Per family with checked answers: {"exact_match" or, for code, "pass_rate"; "answers"}."""
    verdicts: dict[str, list[bool]] = {}
    for record in records:
        if record["correct"] is not None:
            verdicts.setdefault(record["family"], []).append(record["correct"])
    return {
        family: {"pass_rate" if family == "code" else "exact_match": sum(v) / len(v), "answers": len(v)}
        for family, v in verdicts.items()
    }
