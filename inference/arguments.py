"""The command lines of `eval_ds.py` and `chat_ds.py`. Imports no torch."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from training.command_line import Parser, add_options
from training.config import Checked, option


@dataclasses.dataclass
class ModelSource(Checked):
    """Which model, and where it runs."""

    checkpoint: str = option(None, "run, checkpoint, model directory or a glob (its newest match)")
    device: str | None = option(
        None, "cuda or cpu (default: cuda where there is one)", choices=("cuda", "cpu")
    )
    precision: str | None = option(
        None, "bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on CPU)", choices=("bf16", "fp16", "fp32")
    )


@dataclasses.dataclass
class EvaluationArguments(Checked):
    """What is measured."""

    dataset: str = option("all", "all, or names, files, hub names with commas between, as in training")
    batch_size: int = option(8, "rows computed at once", minimum=1)
    max_samples: int | None = option(
        None, "use at most this many examples of each dataset, and answer as many", minimum=1
    )
    max_length: int | None = option(
        None, "tokens in a row; a longer example is cut (default: 512, or the context if less)", minimum=2
    )
    show_examples: int = option(0, "answers to print, of each family", minimum=0)
    output_file: str | None = option(None, "JSON file for the results")
    execute_code: bool = option(False, "run generated code against its unit tests, with limits")
    tree: bool = option(False, "answer also by searches over steps, for a model with a value head")
    cache_dir: str | None = option(None, "tokenized data (default: pragnosia in the user's cache directory)")
    dataset_config: str | None = option(None, "YAML file that declares your own datasets")


@dataclasses.dataclass
class EngineArguments(Checked):
    """What computes the answers."""

    engine: str | None = option(
        None,
        "deepspeed or torch (default: deepspeed on a GPU, torch on CPU)",
        choices=("deepspeed", "torch"),
    )
    num_gpus: int | None = option(None, "GPUs (CPU: processes) the model is split over", minimum=1)
    offload: bool = option(
        False, "keep the weights in host memory (by itself when the model is larger than the GPU)"
    )


def read_arguments(
    prog: str, description: str, settings: Sequence[type], argv: Sequence[str] | None
) -> list[Any]:
    """One instance of each settings dataclass from the command line. Raises UserError."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    for kind in settings:
        add_options(parser, kind)
    given = vars(parser.parse_args(argv))
    return [
        kind(**{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given})
        for kind in settings
    ]
