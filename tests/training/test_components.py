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


def test_flags_of_a_component_that_is_not_there_are_refused():
    config, args = preset_config("tiny"), MemoryArguments(memory_window=64)
    with pytest.raises(UserError, match="--memory-window has no effect without --use-neural-memory"):
        refuse_idle_flags("memory", args, config, TrainingArguments())
    refuse_idle_flags("memory", args, config, TrainingArguments(use_neural_memory=True))
    refuse_idle_flags("memory", MemoryArguments(), config, TrainingArguments())


def test_flags_of_another_coprocessor_are_refused():
    config, args = preset_config("tiny"), TrainingArguments(use_cache_augmentation=True)
    with pytest.raises(UserError, match="--cache-heads has no effect on --coprocessor lora"):
        refuse_idle_flags("cache", CacheArguments(coprocessor="lora", cache_num_heads=4), config, args)
    refuse_idle_flags("cache", CacheArguments(coprocessor_layers=3), config, args)
    config.cache = from_arguments("cache", CacheArguments(coprocessor="copy"), config).__dict__
    with pytest.raises(UserError, match="--coprocessor-layers has no effect on --coprocessor copy"):
        refuse_idle_flags("cache", CacheArguments(coprocessor_layers=3), config, TrainingArguments())


def test_one_line_for_sizes_that_do_not_fit():
    with pytest.raises(UserError, match=r"--use-neural-memory: a memory of 100 slots .* multiple of it"):
        from_arguments("memory", MemoryArguments(memory_size=100), preset_config("tiny"))
