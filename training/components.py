"""Which of the reasoning components a run gives its model."""

from __future__ import annotations

from dataclasses import asdict, fields

from model import PragnosiaConfig
from model.components import CacheConfig, MemoryConfig, TreeConfig
from training.config import Checked, TrainingArguments, UserError

COMPONENTS = {
    "memory": ("use_neural_memory", MemoryConfig),
    "cache": ("use_cache_augmentation", CacheConfig),
    "tree": ("use_tree_of_thoughts", TreeConfig),
}


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
        if present not in (None, asdict(wanted)):
            changed = [key for key, value in asdict(wanted).items() if present[key] != value]
            raise UserError(
                f"{option}: the model has this component with another {changed[0]}, {present[changed[0]]}: "
                f"leave it out"
            )
        setattr(config, name, asdict(wanted))
