"""Evaluate a trained model on held-out data.

    python eval_ds.py --checkpoint outputs/pragnosia_tiny_8experts_20260101-120000
    python eval_ds.py --checkpoint 'outputs/*' --dataset reasoning --show-examples 3
    python eval_ds.py --checkpoint my_model --dataset code --execute-code --output-file results.json
    python eval_ds.py --checkpoint my_model --dataset reasoning --tree
    deepspeed --num_gpus 4 eval_ds.py --checkpoint my_model       # each rank evaluates its share

Per family and overall: loss, perplexity, bits per byte; for a model with step routing also the loss with the
pools that training would choose, and the gap. Answers that can be checked are generated greedily,
up to 200 of a family (or --max-samples): exact match where there is one right result, and with --execute-code
the share of generated programs that pass their unit tests. --tree answers the reasoning problems in four ways,
greedily, by the likeliest of a beam, and by the value head's choice among whole solutions and by its search over
steps, and shows accuracy against generated tokens. Files are evaluated whole, named datasets on the
part that training holds out.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from inference.arguments import EvaluationArguments, ModelSource, read_arguments
from inference.engines import choose_device, choose_dtype
from inference.evaluation import (
    ANSWERS,
    answer_scores,
    can_be_checked,
    evaluate_answers,
    evaluate_loss,
    evaluate_searches,
)
from inference.generation import context_length
from training.command_line import run_script
from training.config import DataArguments, UserError

COLUMNS = (
    "loss", "training_choice_loss", "choice_gap", "perplexity", "bits_per_byte", "tokens", "samples",
    "exact_match", "pass_rate", "answers",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Raises UserError."""
    source, arguments = read_arguments(
        "eval_ds.py", "Evaluate a trained model on held-out data.", (ModelSource, EvaluationArguments), argv
    )
    if arguments.output_file:
        check_writable(Path(arguments.output_file))
    # Before the imports that take seconds: a wrong checkpoint is told at once.
    from training.checkpoint import load_model, resolve_model, write_json

    path = resolve_model(source.checkpoint)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(source.device, world_size)
    dtype = choose_dtype(source.precision, device)

    from data.loader import prepare
    from inference.tree_of_thoughts import tree_config
    from training.engine import leave_ranks, start_ranks

    ranks = start_ranks("cpu" if device == "cpu" else "cuda")
    model, tokenizer = load_model(path, ranks.device, dtype)
    if arguments.tree:
        tree_config(model)  # told before the work
    context = context_length(model)
    max_length = arguments.max_length or min(512, context)
    if max_length > context:
        raise UserError(f"--max-length {max_length} is beyond the model's context of {context} tokens")
    data = prepare(
        DataArguments(
            dataset=arguments.dataset,
            max_length=max_length,
            max_samples=arguments.max_samples,
            cache_dir=arguments.cache_dir,
            dataset_config=arguments.dataset_config,
        ),
        tokenizer,
        seed=0,
        rank=ranks.rank,
        world_size=ranks.world_size,
        evaluation=True,
    )
    if not data.validation:
        raise UserError(f"--dataset {arguments.dataset} holds out no rows to evaluate: give a file")
    where = {"rank": ranks.rank, "world_size": ranks.world_size, "device": ranks.device}
    families = evaluate_loss(model, data.validation, batch_size=arguments.batch_size, **where)

    examples = []
    for members in data.validation_examples.values():
        checkable = [e for e in members if can_be_checked(e, arguments.execute_code)]
        checkable = checkable[: arguments.max_samples or ANSWERS]
        shown = [e for e in members if e not in checkable][: max(0, arguments.show_examples - len(checkable))]
        examples += checkable + shown
    records = evaluate_answers(model, tokenizer, examples, execute_code=arguments.execute_code, **where)
    for family, score in answer_scores(records).items():
        families[family].update(score)
    searches = []
    if arguments.tree:
        solvable = [e for e in examples if e.family == "reasoning" and can_be_checked(e, False)]
        searches = evaluate_searches(model, tokenizer, solvable, **where)

    leave_ranks()
    if ranks.rank > 0:
        return
    for family in data.validation:
        show_examples([r for r in records if r["family"] == family][: arguments.show_examples])
    print(table("family", families))
    if arguments.tree:
        print("\n" + table("search", {row["search"]: row for row in searches}))
    if arguments.output_file:
        results = {
            "checkpoint": str(path.resolve()),
            "dataset": arguments.dataset,
            "max_samples": arguments.max_samples,
            "max_length": max_length,
            "batch_size": arguments.batch_size,
            "precision": str(dtype).removeprefix("torch."),
            "device": str(ranks.device),
            "world_size": ranks.world_size,
            "results": families,
            "examples": records,
            "searches": searches,
            "data": data.report,
        }
        write_json(Path(arguments.output_file), results)
        print(f"Results are in {arguments.output_file}.")


def check_writable(file: Path) -> None:
    """Raises UserError where the results could not be written, before the work and not after it."""
    if file.is_dir():
        raise UserError(f"--output-file {file} is a directory: give it a file name")
    if not file.parent.is_dir():
        raise UserError(f"--output-file {file}: the directory {file.parent} does not exist")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"--output-file {file}: {file.parent} cannot be written to")


def show_examples(records: Sequence[Mapping[str, object]]) -> None:
    """Print answers in full."""
    verdicts = {True: "right", False: "wrong", None: "not checked"}
    for record in records:
        print(f"--- {record['family']}, {verdicts[record['correct']]}")
        for part in ("prompt", "expected", "answer"):
            print(f"{part}: {record[part].strip()}")
        print()


def table(what: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line a row, after its name, with the columns that any of them has."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    lines = [[what, *columns]]
    for named, row in rows.items():
        lines.append([named, *(format_cell(row.get(name)) for name in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def format_cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    run_script(main)
