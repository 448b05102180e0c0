"""The named sizes, and the way from command-line settings to a configuration."""

import subprocess
import sys

import pytest
import torch

from model import PragnosiaForCausalLM
from model.presets import PRESETS, check_agreement, config_from_arguments, custom_preset, preset_config
from training.config import ModelArguments, UserError


@pytest.mark.parametrize("size", PRESETS)
def test_counts_of_presets(size):
    config = preset_config(size)
    with torch.device("meta"):
        model = PragnosiaForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(count for name, count in sizes.items() if ".experts." in name)
    assert config.num_params() == sum(sizes.values())
    used = experts * config.num_experts_per_tok // config.num_experts
    assert config.active_params() == sum(sizes.values()) - experts + used
    assert config.num_params() == pytest.approx(PRESETS[size].nominal, rel=0.03)


@pytest.mark.parametrize("size", PRESETS)
def test_more_experts_leave_the_active_parameters_almost_alone(size):
    """Only the router grows, by one row of weights a layer and expert."""
    few = config_from_arguments(ModelArguments(model_size=size, num_experts=8))
    many = config_from_arguments(ModelArguments(model_size=size, num_experts=64))
    rows = 56 * few.hidden_size * few.num_hidden_layers
    assert many.active_params() - few.active_params() == rows
    assert many.num_params() - few.num_params() == rows + 56 * few.num_hidden_layers * few.expert_params()


def test_what_was_given_must_agree_with_the_model():
    tiny, given = preset_config("tiny"), {"num_experts"}
    for agreeing in (8, "none"):
        check_agreement(ModelArguments(num_experts=agreeing), tiny, "runs/1", given)
    with pytest.raises(
        UserError, match="--num-experts 4: the model in runs/1 has 8; leave --num-experts out"
    ):
        check_agreement(ModelArguments(num_experts=4), tiny, "runs/1", given)


def test_arguments_reach_the_configuration():
    args = ModelArguments(
        model_size="350M",
        num_experts=12,
        num_active_experts=3,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.25,
    )
    config = config_from_arguments(args, vocab_size=99)
    assert (config.num_experts, config.num_experts_per_tok, config.vocab_size) == (12, 3, 99)
    assert (config.router_aux_loss_coef, config.router_z_loss_coef) == (0.5, 0.25)


@pytest.mark.parametrize("hidden_size", [96, 128, 256, 320, 640, 1536, 4096])
@pytest.mark.parametrize("num_active", [1, 2, 8])
def test_custom_sizes_fit_together(hidden_size, num_active):
    config = config_from_arguments(
        ModelArguments(
            model_size="custom",
            hidden_size=hidden_size,
            num_layers=2,
            num_experts=8,
            num_active_experts=num_active,
        ),
        vocab_size=64,
    )
    assert config.num_attention_heads * config.head_dim == hidden_size
    active_width = config.moe_intermediate_size * num_active
    assert 8 / 3 * hidden_size <= active_width < 8 / 3 * hidden_size + 32 * num_active
    with torch.device("meta"):
        model = PragnosiaForCausalLM(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_size": "custom"}, ("--hidden-size", "--num-layers", "--num-experts")),
        ({"model_size": "custom", "hidden_size": 128, "num_experts": 4}, ("--num-layers",)),
        ({"model_size": "1B", "hidden_size": 128}, ("--hidden-size", "custom", "1B")),
        ({"model_size": "tiny", "num_layers": 3}, ("--num-layers", "custom", "tiny")),
        ({"model_size": "tiny", "num_active_experts": 9}, ("9", "8", "--num-active-experts")),
        ({"model_size": "tiny", "num_experts": 1}, ("2", "1", "--num-experts")),
        ({"routing": "step", "expert_pool": 9}, ("pool of 9", "8", "--expert-pool")),
        (
            {"model_size": "custom", "hidden_size": 100, "num_layers": 2, "num_experts": 4},
            ("--hidden-size 100", "32", "96"),
        ),
        (
            {
                "model_size": "custom", "hidden_size": 128, "num_layers": 2, "num_experts": 4,
                "num_active_experts": 5,
            },
            ("--num-active-experts 5", "--num-experts 4"),
        ),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(fields, words):
    with pytest.raises(UserError) as error:
        config_from_arguments(ModelArguments(**fields))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_the_remedy_for_an_odd_hidden_size_works():
    with pytest.raises(UserError, match="use 1536"):
        custom_preset(1600, 2, 4, 2)
    custom_preset(1536, 2, 4, 2)


def test_presets_import_no_torch():
    """Through the file itself: `import model` is the package that registers with transformers."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('presets', 'model/presets.py')\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['presets'] = module\n"
        "spec.loader.exec_module(module)\n"
        "assert module.PRESETS and 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
