"""Components find their way into a model's configuration, or one line says why not."""

import dataclasses

import pytest

from model.components import MemoryConfig, TreeConfig
from model.presets import preset_config
from training.components import COMPONENTS, add_components, from_arguments, refuse_idle_flags
from training.config import CacheArguments, MemoryArguments, TrainingArguments, TreeArguments, UserError

GROUPS = {"memory": MemoryArguments, "cache": CacheArguments, "tree": TreeArguments}


@pytest.mark.parametrize("name", COMPONENTS)
def test_flags_and_configurations_have_the_same_defaults(name):
    config = preset_config("tiny")
    _, kind = COMPONENTS[name]
    assert from_arguments(name, GROUPS[name](), config) == kind(hidden_size=config.hidden_size)


@pytest.mark.parametrize("name", COMPONENTS)
def test_added_kept_and_taken_away(name):
    config, flag = preset_config("tiny"), COMPONENTS[name][0]
    add_components(config, TrainingArguments())
    assert getattr(config, name) is None
    add_components(config, TrainingArguments(**{flag: True}))
    added = getattr(config, name)
    assert added == dataclasses.asdict(COMPONENTS[name][1](hidden_size=config.hidden_size))
    add_components(config, TrainingArguments())
    assert getattr(config, name) == added
    add_components(config, TrainingArguments(**{flag: False}))
    assert getattr(config, name) is None


class Module:
    config = MemoryConfig(hidden_size=128, memory_size=64)


def test_a_module_lends_its_configuration():
    config = preset_config("tiny")
    add_components(config, TrainingArguments(), memory=Module())
    assert config.memory["memory_size"] == 64
    with pytest.raises(
        UserError, match=r"--use-neural-memory: the model has .* another memory_size, 64: leave"
    ):
        add_components(config, TrainingArguments(), memory=MemoryConfig(hidden_size=128))


@pytest.mark.parametrize("name", COMPONENTS)
def test_one_line_for_another_width(name):
    given = {name: COMPONENTS[name][1](hidden_size=256)}
    with pytest.raises(UserError, match=r"has hidden size 256, the model 128: give .*Config the model's"):
        add_components(preset_config("tiny"), TrainingArguments(), **given)


def test_what_shapes_no_weights_can_be_changed_on_a_trained_model():
    config = preset_config("tiny")
    add_components(config, TrainingArguments(), tree=TreeConfig(hidden_size=128))
    add_components(config, TrainingArguments(), tree=TreeConfig(hidden_size=128, beam_width=2))
    assert config.tree["beam_width"] == 2


MEMORY, CACHE, TREE = ({use: True} for use, _ in COMPONENTS.values())


@pytest.mark.parametrize(
    ("arguments", "args", "message"),
    [
        (MemoryArguments(memory_window=64), {}, "--memory-window .* without --use-neural-memory"),
        (MemoryArguments(memory_window=64), {"use_neural_memory": False}, "without --use-neural-memory"),
        (MemoryArguments(memory_dropout=0.2), MEMORY | {"stage": "cache"}, "or add --cache-joint"),
        (CacheArguments(coprocessor="lora", cache_num_heads=4), CACHE, "--cache-heads .* lora: leave it out"),
        (CacheArguments(coprocessor="copy", coprocessor_layers=3), CACHE, "--coprocessor-layers .* copy"),
        (
            CacheArguments(coprocessor="pause", max_cache_length=9),
            CACHE,
            "--max-cache-length .* pause: leave",
        ),
        (
            CacheArguments(coprocessor="pause", cache_dropout=0.0),
            CACHE | {"stage": "cache"},
            "--cache-dropout .* pause: leave it out",
        ),
        (CacheArguments(num_traces=4), CACHE, "--num-traces has no effect without --stage cache"),
        (
            TreeArguments(value_loss_weight=1.0),
            TREE | {"stage": "cache"},
            "--value-loss-weight .* leave it out",
        ),
    ],
)
def test_flags_that_change_nothing_are_refused(arguments, args, message):
    (name,) = (name for name, group in GROUPS.items() if isinstance(arguments, group))
    with pytest.raises(UserError, match=message):
        refuse_idle_flags(name, arguments, TrainingArguments(**args))


@pytest.mark.parametrize(
    ("arguments", "args"),
    [
        (MemoryArguments(), {}),
        (MemoryArguments(memory_window=64, memory_dropout=0.2), MEMORY),
        (MemoryArguments(memory_dropout=0.2), MEMORY | {"stage": "cache", "cache_joint": True}),
        (CacheArguments(cache_num_heads=4, max_cache_length=9), CACHE),
        (CacheArguments(coprocessor="soft", cache_dropout=0.0, num_traces=4), CACHE | {"stage": "cache"}),
        (CacheArguments(coprocessor="pause", retrieval_factor=2.0, num_latents=4), CACHE),
        (TreeArguments(value_loss_weight=1.0, tree_search="best_of_n", tree_max_depth=9), TREE),
    ],
)
def test_flags_that_change_something_are_taken(arguments, args):
    (name,) = (name for name, group in GROUPS.items() if isinstance(arguments, group))
    refuse_idle_flags(name, arguments, TrainingArguments(**args))


def test_one_line_for_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"--use-neural-memory: a memory of 100 slots .* multiple of it"):
        from_arguments("memory", MemoryArguments(memory_size=100), preset_config("tiny"))
