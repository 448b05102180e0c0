"""Settings of a run: typed dataclasses, read by one command line (`training/command_line.py`); no torch.

Each field declares its default, its help line and its legal range once; the command line, the YAML file and
the Python API all read that declaration. Values are converted and checked in `__post_init__`, so every way in
gives the same error.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MODEL_SIZES = ("tiny", "350M", "1B", "3B", "7B", "13B", "custom")


class UserError(ValueError):
    """A mistake the user can mend: one clear line that says what is wrong and the way out."""


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    several: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its command-line description.

    Args:
        flag: name on the command line, without dashes, where it differs from the field's name.
        choices: legal values; with `several`, legal members of a comma-separated list.
        minimum, maximum: inclusive range of a number.
    """
    metadata = {
        "help": help,
        "flag": flag,
        "choices": choices,
        "several": several,
        "range": (minimum, maximum),
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """The command-line spelling of a field, for example `--batch-size`."""
    return "--" + (field.metadata["flag"] or field.name.replace("_", "-"))


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`": did you mean X?"` for the nearest of `words` (case, `_` and `-` aside), else an empty string.

    A word that begins like one of `words` means that one.
    """
    folded = {w.lower().replace("_", "-").lstrip("-"): w for w in words}
    word = word.lower().replace("_", "-").lstrip("-")
    near = [w for w in folded if word and w.startswith(word)]
    near = near or difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    return f": did you mean {folded[near[0]]}?" if near else ""


def parse_size(flag: str, text: str) -> float:
    """Bytes of `512MB`, `1.5 GB` or a plain number. Raises UserError."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    try:
        size = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    except (TypeError, ValueError):
        size = 0.0
    if size <= 0:
        raise UserError(f"{flag} must be a size like 512MB or 4GB, not {text!r}")
    return size


class Checked:
    """Converts and checks every field of a settings dataclass against its declaration."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(self, field.name, _checked_value(field, hints[field.name], getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Rules between fields; raises UserError."""


def _checked_value(field: dataclasses.Field, hint: Any, value: Any) -> Any:
    """`value` in the field's type and range; numbers may come as strings, which is how YAML reads `1e-4`, and None
    as `none`."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not types.NoneType]
    optional = types.NoneType in typing.get_args(hint)
    kind, name = kinds[0], flag_of(field)
    if field.metadata["flag"]:
        name += f" ({field.name})"
    if optional and value in (None, "none"):
        return None
    if value is None:
        raise UserError(f"{name} needs a value")
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, not {value!r}")
        return value
    if kind in (int, float):
        try:
            if isinstance(value, bool):
                raise ValueError
            number = kind(value)
            if number != float(value) or not math.isfinite(number):  # 2.5 is no whole number
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name} must be a {'whole ' * (kind is int)}number, not {value!r}") from None
        low, high = field.metadata["range"]
        if low is not None and number < low:
            raise UserError(f"{name} must be at least {low}, not {number}")
        if high is not None and number > high:
            raise UserError(f"{name} must be at most {high}, not {number}")
        return number
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a YAML file's `dataset: 1` or `resume: 20260101` is still a name
    if not isinstance(value, str):
        raise UserError(f"{name} must be a text, not {value!r}")
    if not value:
        raise UserError(f"{name} must not be empty")
    choices = field.metadata["choices"]
    for part in value.split(",") if field.metadata["several"] else [value]:
        if choices and part not in choices:
            hint_text = did_you_mean(part, choices)
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {part!r}{hint_text}")
    return value


@dataclass
class ModelArguments(Checked):
    """What is trained."""

    model_size: str = option(
        "tiny", "preset; custom takes --hidden-size, --num-layers and --num-experts", choices=MODEL_SIZES
    )
    hidden_size: int | None = option(None, "model width, with --model-size custom", minimum=1)
    num_layers: int | None = option(None, "decoder layers, with --model-size custom", minimum=1)
    num_experts: int | None = option(None, "experts a layer (default: the preset's)", minimum=1)
    num_active_experts: int = option(2, "experts a token uses", minimum=1)
    routing: str = option(
        "token",
        "token: each token chooses among all experts; step: among a pool that serves a microbatch",
        choices=("token", "step"),
    )
    expert_pool: int | None = option(
        None, "experts in the pool, with --routing step (default: --num-active-experts)", minimum=1
    )
    router_aux_loss_coef: float = option(
        0.01, "weight of the router's balance loss, with --load-balance aux", minimum=0
    )
    router_z_loss_coef: float = option(0.001, "weight of the router's z loss", minimum=0)
    tokenizer: str | None = option(None, "tokenizer directory (default: the one in data/tokenizer)")
    init_from: str | None = option(None, "start from this run, checkpoint or Qwen3-MoE directory")

    def check(self) -> None:
        if self.expert_pool is not None and self.routing != "step":
            raise UserError(f"--expert-pool {self.expert_pool} needs --routing step")
        shape = {"--hidden-size": self.hidden_size, "--num-layers": self.num_layers}
        if self.model_size == "custom":
            shape["--num-experts"] = self.num_experts
            missing = [flag for flag, value in shape.items() if value is None]
            if missing:
                raise UserError(f"--model-size custom needs {' and '.join(missing)}")
        else:
            given = [flag for flag, value in shape.items() if value is not None]
            if given:
                raise UserError(
                    f"{' and '.join(given)} cannot change preset {self.model_size}: use --model-size custom"
                )


@dataclass
class DataArguments(Checked):
    """What it is trained on."""

    dataset: str = option(
        "all",
        "all, or names, files, hub names with commas between, each with an optional weight: chat:2,x.jsonl:1",
    )
    max_length: int = option(512, "tokens in a row", minimum=2)
    max_samples: int | None = option(None, "use at most this many examples of each dataset", minimum=1)
    num_workers: int = option(2, "threads that load data", minimum=0)
    train_on_prompt: bool = option(False, "learn the prompts too, not the answers alone")
    streaming: bool = option(False, "read datasets as a stream, for those larger than memory")
    validation_fraction: float = option(0.05, "share of the data held out", minimum=0, maximum=0.5)
    cache_dir: str | None = option(None, "tokenized data (default: pragnosia in the user's cache directory)")
    dataset_config: str | None = option(None, "YAML file that declares your own datasets")


@dataclass
class TrainingArguments(Checked):
    """How it is trained. Names are those of `transformers.TrainingArguments` where it has one."""

    output_dir: str = option("./outputs", "where runs are written")
    num_train_epochs: int = option(3, "passes over the data", flag="epochs", minimum=1)
    max_steps: int | None = option(None, "stop after this many optimizer updates", minimum=1)
    per_device_train_batch_size: int = option(
        4, "rows a GPU computes at once (a microbatch)", flag="batch-size", minimum=1
    )
    gradient_accumulation_steps: int = option(1, "microbatches an optimizer update", minimum=1)
    segments: int = option(
        1,
        "parts of a row that are trained one after the other: each goes on from the keys and memories of the one "
        "before, whose gradients end there",
        minimum=1,
    )
    learning_rate: float = option(1e-4, "peak learning rate", minimum=0)
    local_learning_rate: float = option(1e-3, "peak learning rate of the experts' parameters", minimum=0)
    lr_scheduler_type: str = option(
        "cosine",
        "learning rate after the warmup (warmup: stays at the peak)",
        flag="lr-scheduler",
        choices=("cosine", "linear", "constant", "warmup"),
    )
    warmup_steps: int = option(0, "steps over which the learning rate rises", minimum=0)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices", minimum=0)
    gradient_clip: float = option(1.0, "largest global gradient norm; 0 turns clipping off", minimum=0)
    load_balance: str = option(
        "aux",
        "how experts are kept evenly used: aux, a loss; bias, a bias on the choice that each step moves; or none",
        choices=("aux", "bias", "none"),
    )
    seed: int = option(42, "random seed", minimum=0, maximum=2**32 - 1)
    precision: str | None = option(
        None, "bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on CPU)", choices=("bf16", "fp16", "fp32")
    )
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    device: str | None = option(
        None, "cuda or cpu (default: cuda where there is one)", choices=("cuda", "cpu")
    )
    placement: str = option(
        "auto",
        "where experts live: resident in GPU memory, streamed from host memory and updated on the way, or zero3: "
        "DeepSpeed's own offload (auto: resident where the estimate fits, else streamed)",
        choices=("auto", "resident", "streamed", "zero3"),
    )
    offload_to_cpu: bool | None = option(
        None, "the same as --placement streamed, and --placement resident with no-"
    )
    gpu_memory: str | None = option(
        None, "most memory that the run may allocate on a GPU, e.g. 4GB; the plan keeps to it (default: all)"
    )
    expert_page_size: int | None = option(
        None,
        "experts fetched together (default: zero3 8, streamed as --expert-vram allows)",
        minimum=1,
    )
    expert_vram: str | None = option(
        None, "GPU memory for streamed experts, e.g. 512MB (default: a fiftieth of the GPU's, 256MB to 1GB)"
    )
    expert_state: str | None = option(
        None,
        "optimizer state of streamed experts: fp32 (with a master copy), bf16 or int8 (default: bf16; fp32 with "
        "--precision fp32)",
        choices=("fp32", "bf16", "int8"),
    )
    expert_store: str = option(
        "host",
        "where streamed experts lie: host memory, or nvme: beyond --expert-ram in files under --nvme-path",
        choices=("host", "nvme"),
    )
    nvme_path: str | None = option(None, "directory of a fast disk, with --expert-store nvme")
    expert_ram: str | None = option(
        None,
        "host memory for streamed experts with --expert-store nvme, e.g. 32GB (default: half of what is free)",
    )
    expert_parallel_size: int | None = option(
        None,
        "GPUs that share the experts of a layer, with resident experts; divides both their number and the GPUs' "
        "(default: the JSON's rule, or as many as can)",
        minimum=1,
    )
    capacity_factor: float | None = option(
        None,
        "where GPUs share experts: an expert takes at most this many times the even share of the choices in a "
        "GPU's microbatch, and training drops the others (default: none, which drops none)",
        minimum=0.01,
    )
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed JSON: a path or a name in deepspeed_configs (default: by preset, placement and machine)",
    )
    logging_steps: int = option(100, "steps between log lines", minimum=1)
    eval_steps: int = option(1000, "steps between validations", minimum=1)
    save_steps: int = option(5000, "steps between checkpoints", minimum=1)
    save_strategy: str = option(
        "steps",
        "steps: every --save-steps and after each epoch; epoch: after each epoch; no: final model only",
        choices=("steps", "epoch", "no"),
    )
    keep_checkpoints: int = option(3, "newest checkpoints to keep", minimum=1)
    early_stopping_patience: int | None = option(
        None, "stop after this many validations without a better loss", minimum=1
    )
    resume: str | None = option(None, "continue this run, checkpoint or glob")
    report_to: str = option(
        "tensorboard",
        "tensorboard, wandb or none, several with commas; metrics.jsonl is always written",
        choices=("tensorboard", "wandb", "none"),
        several=True,
    )
    deterministic: bool = option(False, "bit-for-bit repeatable, slower")
    max_nan_steps: int = option(
        5, "stop after this many steps in a row whose numbers are not finite", minimum=1
    )
    export_format: str = option("pragnosia", "format of final_model", choices=("pragnosia", "qwen3_moe"))
    use_neural_memory: bool | None = option(
        None, "give the model a neural memory beside attention (default: as the model it starts from)"
    )
    use_cache_augmentation: bool | None = option(
        None, "give it a coprocessor that extends the key-value cache (default: likewise)"
    )
    use_tree_of_thoughts: bool | None = option(
        None, "give it a value head, trained on steps of reasoning (default: likewise)"
    )
    value_refresh: int = option(
        0, "steps between the model's own answers that the value head learns from too (0: none)", minimum=0
    )
    stage: str = option(
        "base",
        "base: train the model; cache: the coprocessor of cache augmentation on a model that stays as it is",
        choices=("base", "cache"),
    )
    cache_joint: bool = option(False, "with --stage cache, train the model too")

    def check(self) -> None:
        if self.cache_joint and self.stage != "cache":
            raise UserError("--cache-joint needs --stage cache")
        if self.cache_joint and self.gradient_checkpointing:
            raise UserError(
                "--cache-joint learns through the cache, which no recompute fills: use --no-gradient-checkpointing"
            )
        if self.offload_to_cpu is not None and self.placement != "auto":
            flag = "--offload-to-cpu" if self.offload_to_cpu else "--no-offload-to-cpu"
            raise UserError(f"--placement and {flag} both set the placement: give one of them")
        sizes = {
            "--gpu-memory": self.gpu_memory,
            "--expert-vram": self.expert_vram,
            "--expert-ram": self.expert_ram,
        }
        for flag, size in sizes.items():
            if size is not None:
                parse_size(flag, size)
        if self.expert_store == "nvme" and self.nvme_path is None:
            raise UserError("--expert-store nvme needs --nvme-path: a directory of a fast disk")
        if self.expert_store == "host" and (self.nvme_path or self.expert_ram):
            raise UserError("--nvme-path and --expert-ram need --expert-store nvme")
        if "none" in self.reporters and len(self.reporters) > 1:
            raise UserError("--report-to none cannot stand beside others")
        if self.segments > 1 and self.gradient_checkpointing:
            raise UserError(
                "--gradient-checkpointing has no effect on --segments, which cannot be computed again: use "
                "--no-gradient-checkpointing"
            )
        if self.segments > 1 and self.stage == "cache":
            raise UserError("--segments is for --stage base: leave it out")

    @property
    def backward_passes(self) -> int:
        """Of an optimizer update: its microbatches, and their segments."""
        return self.gradient_accumulation_steps * self.segments

    @property
    def requested_placement(self) -> str:
        """auto, resident, streamed or zero3: --placement and --offload-to-cpu joined."""
        if self.offload_to_cpu is None:
            return self.placement
        return "streamed" if self.offload_to_cpu else "resident"

    @property
    def reporters(self) -> list[str]:
        """The members of `report_to`."""
        return self.report_to.split(",")


@dataclass
class MemoryArguments(Checked):
    """Neural memory, with --use-neural-memory (`model/memory.py`)."""

    memory_size: int = option(2048, "slots of a memory: its heads times their size", minimum=1)
    num_memory_layers: int = option(
        3, "decoder layers with a memory, evenly spread", flag="memory-layers", minimum=1
    )
    memory_dropout: float = option(0.1, "dropout of what is read", minimum=0, maximum=0.9)
    memory_head_dim: int | None = option(
        None, "size of a memory's head (default: 128, or 64 below a width of 1024)", minimum=1
    )
    memory_window: int | None = option(
        None, "tokens that attention sees in layers with a memory (default: all)", minimum=1
    )


@dataclass
class CacheArguments(Checked):
    """Cache augmentation, with --use-cache-augmentation (`model/cache_augmentation.py`)."""

    coprocessor: str = option(
        "light",
        "what reads the cache: light (cross-attention), copy (the model itself) or lora (its low-rank update); to "
        "compare with: soft (the model as it is), pause (nothing)",
        choices=("light", "copy", "lora", "soft", "pause"),
    )
    coprocessor_layers: int = option(2, "layers of a light coprocessor", minimum=1)
    cache_num_heads: int = option(8, "heads of its attention", flag="cache-heads", minimum=1)
    cache_dropout: float = option(0.1, "dropout in it", minimum=0, maximum=0.9)
    num_latents: int = option(16, "latents it appends", minimum=1)
    num_ahead_tokens: int = option(16, "tokens after the latents that it learns from", minimum=1)
    num_traces: int = option(8, "places in a row where it is trained", minimum=1)
    max_cache_length: int = option(65536, "newest cache entries that it reads", minimum=1)
    retrieval_factor: float = option(1.0, "weight of the latents in attention; 0: the base model", minimum=0)
    cache_update_freq: int = option(
        0, "generated tokens between its runs (0: once, at the end of the prompt)", minimum=0
    )


@dataclass
class TreeArguments(Checked):
    """Tree of thoughts, with --use-tree-of-thoughts (`inference/tree_of_thoughts.py`)."""

    tree_beam_width: int = option(4, "partial solutions that are kept", minimum=1)
    tree_branching: int | None = option(
        None, "steps proposed for each (default: twice --tree-beam-width)", minimum=1
    )
    tree_max_depth: int = option(3, "most steps of a solution", minimum=1)
    tree_temperature: float = option(0.7, "temperature of proposals", minimum=0)
    tree_top_k: int = option(50, "likeliest tokens that proposals are drawn from", minimum=1)
    tree_pruning_threshold: float = option(0.1, "value below which a step is dropped", minimum=0, maximum=1)
    tree_path_score: str = option(
        "product", "score of a path from the values of its steps", choices=("product", "min", "last")
    )
    tree_search: str = option("bfs", "order of the search", choices=("bfs", "dfs", "best_of_n"))
    max_thought_tokens: int = option(64, "most tokens of a step", minimum=1)
    value_loss_weight: float = option(0.5, "weight of the value head's loss", minimum=0)
