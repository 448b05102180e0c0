"""Which of the reasoning components a run gives its model."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from data.steps import OwnAnswers
from model import PragnosiaConfig
from model.components import CacheConfig, MemoryConfig, TreeConfig
from training.config import Checked, TrainingArguments, UserError, flag_of

if TYPE_CHECKING:
    from data.loader import Data

COMPONENTS = {
    "memory": ("use_neural_memory", MemoryConfig),
    "cache": ("use_cache_augmentation", CacheConfig),
    "tree": ("use_tree_of_thoughts", TreeConfig),
}


# What decides which weights a component has; the rest can be changed on a trained model.
SHAPES = (
    "memory_size", "num_memory_layers", "head_dim", "conv_size", "num_heads", "num_latents", "coprocessor",
    "coprocessor_layers",
)  # fmt: skip


# Flags that a kind of coprocessor does not use.
OF_LIGHT = ("coprocessor_layers", "cache_num_heads")
UNUSED = {
    "light": (), "copy": OF_LIGHT, "lora": OF_LIGHT, "soft": OF_LIGHT,
    "pause": (*OF_LIGHT, "cache_dropout", "max_cache_length"),
}  # fmt: skip


def refuse_idle_flags(name: str, arguments: Checked, args: TrainingArguments) -> None:
    """Raises UserError for a component's flags that change nothing: where the run does not ask for the component,
    where its coprocessor does not use them, and where the run's stage does not train what they are for.
    """
    use, _ = COMPONENTS[name]
    default = type(arguments)()
    changed = {
        field.name: flag_of(field)
        for field in fields(arguments)
        if getattr(arguments, field.name) != getattr(default, field.name)
    }
    if changed and not getattr(args, use):
        raise UserError(f"{next(iter(changed.values()))} has no effect without --{use.replace('_', '-')}")
    idle: dict[str, str] = {}  # field -> why
    if args.stage == "cache":
        idle["value_loss_weight"] = "in --stage cache, which trains no value head: leave it out"
        if not args.cache_joint:
            idle["memory_dropout"] = "on a model that stays as it is: leave it out, or add --cache-joint"
    else:
        idle |= dict.fromkeys(("num_traces", "num_ahead_tokens", "cache_dropout"), "without --stage cache")
    if name == "cache":
        kind = arguments.coprocessor
        idle |= dict.fromkeys(UNUSED[kind], f"on --coprocessor {kind}: leave it out")
    for field, reason in idle.items():
        if field in changed:
            raise UserError(f"{changed[field]} has no effect {reason}")


def from_arguments(name: str, arguments: Checked, config: PragnosiaConfig):
    """The configuration of component `name` that its flags ask for; a flag may carry the name before it.

    Raises:
        UserError: sizes that do not fit together.
    """
    flag, kind = COMPONENTS[name]
    known = {field.name for field in fields(kind)}
    values = {key if key in known else key.removeprefix(f"{name}_"): v for key, v in vars(arguments).items()}
    try:
        return kind(hidden_size=config.hidden_size, **values)
    except ValueError as error:
        raise UserError(f"--{flag.replace('_', '-')}: {error}") from None


def add_components(config: PragnosiaConfig, args: TrainingArguments, **given) -> None:
    """Write the components of a run into its model's configuration.

    given: for each name of `COMPONENTS` its configuration, a module that has one as `config`, or None. What `args`
    neither add nor take away stays as the model has it; a component that is added without a configuration gets the
    usual one.

    Raises:
        UserError: a configuration that does not match the model.
    """
    for name, (flag, kind) in COMPONENTS.items():
        use, present = getattr(args, flag), getattr(config, name)
        wanted = getattr(given.get(name), "config", given.get(name))
        if use is False:
            setattr(config, name, None)
            continue
        if not (use or wanted):
            continue
        option = "--" + flag.replace("_", "-")
        try:
            wanted = wanted or kind(**present or {"hidden_size": config.hidden_size})
        except ValueError as error:
            raise UserError(f"{option}: {error}") from None
        if wanted.hidden_size != config.hidden_size:
            raise UserError(
                f"{option}: the component has hidden size {wanted.hidden_size}, the model {config.hidden_size}: "
                f"give {kind.__name__} the model's"
            )
        written = asdict(wanted)
        changed = [key for key in SHAPES if present and present.get(key) != written.get(key)]
        if changed:
            raise UserError(
                f"{option}: the model has this component with another {changed[0]}, {present[changed[0]]}: "
                f"leave it out"
            )
        setattr(config, name, written)


def components_of(config: PragnosiaConfig) -> list[str]:
    """The names of those that a model has."""
    return [name for name in COMPONENTS if getattr(config, name)]


def has_labelled_steps(config: PragnosiaConfig, args: TrainingArguments) -> bool:
    """Whether a run's data needs labelled steps: whether it trains a value head."""
    has_head = bool(config.tree) if args.use_tree_of_thoughts is None else args.use_tree_of_thoughts
    return has_head and args.stage == "base"


def own_answers(
    config: PragnosiaConfig, args: TrainingArguments, data: Data, tokenizer, max_length: int
) -> OwnAnswers | None:
    """The model's own answers that a run's value head learns from, None without --value-refresh.

    Raises:
        UserError: there is nothing that the value head could learn from.
    """
    trains_head = has_labelled_steps(config, args)
    has_labels = any(line.get("steps", 0) != 0 for line in data.report)  # None: a stream, not counted
    if args.use_tree_of_thoughts and trains_head and not has_labels:
        raise UserError(
            "--use-tree-of-thoughts: the data has no labelled steps of reasoning: add some to --dataset, "
            "reasoning or word_problems, or prepare it with steps=True"
        )
    if not args.value_refresh:
        return None
    if not data.problems:
        raise UserError("--value-refresh: no answer in the data can be checked: add reasoning to --dataset")
    return OwnAnswers(
        data.problems, tokenizer, interval=args.value_refresh, max_length=max_length, seed=args.seed
    )
