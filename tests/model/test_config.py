"""Sizes that do not fit together, and parameter counts."""

import pytest
import torch

from model import PragnosiaConfig, PragnosiaForCausalLM


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, ("5", "4", "--num-active-experts")),
        ({"num_experts_per_tok": 0}, ("0", "8", "--num-active-experts")),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, ("6", "4", "multiple")),
        ({"head_dim": 7}, ("7", "even")),
        ({"routing": "steps"}, ("'steps'", "token", "step")),
        ({"routing": "step", "expert_pool": 1}, ("pool of 1", "8", "2", "--expert-pool")),
        ({"routing": "step", "expert_pool": 9}, ("pool of 9", "8", "2", "--expert-pool")),
        ({"routing": "step", "expert_pool": 0}, ("pool of 0", "--expert-pool")),
        ({"expert_pool": 4}, ("--expert-pool 4", "--routing step")),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, words):
    with pytest.raises(ValueError) as error:
        PragnosiaConfig(**fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_active", [1, 3])
def test_counts_equal_the_built_module(tied, num_active):
    config = PragnosiaConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        head_dim=10, num_experts=5, num_experts_per_tok=num_active, moe_intermediate_size=7,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = PragnosiaForCausalLM(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    unused = experts * (5 - num_active) // 5
    assert config.active_params() == config.num_params() - unused


def test_a_pool_is_as_large_as_a_token_needs_unless_said():
    assert PragnosiaConfig(routing="step", num_experts_per_tok=3).expert_pool == 3
    assert PragnosiaConfig(routing="step", expert_pool=5).expert_pool == 5
    assert PragnosiaConfig().expert_pool is None


@pytest.mark.parametrize("fields", [{"routing": "step"}, {"routing": "step", "expert_pool": 4}])
def test_routing_survives_a_file(tmp_path, fields):
    config = PragnosiaConfig(**fields)
    config.save_pretrained(tmp_path)
    assert PragnosiaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_config_survives_a_file(tmp_path):
    config = PragnosiaConfig(
        num_experts=6, router_z_loss_coef=0.5, rope_theta=5e5, pad_token_id=3, eos_token_id=[1, 2]
    )
    config.save_pretrained(tmp_path)
    loaded = PragnosiaConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.num_experts, loaded.rope_theta, loaded.eos_token_id) == (6, 5e5, [1, 2])
