"""Small models in fp32 on CPU, and their twins in `transformers`."""

import pytest
import torch

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,  # large enough that attention and routing are far from uniform
}


@pytest.fixture
def build():
    """A function of config overrides to a model with random weights, norms included."""

    def build_model(**overrides):
        from model import PragnosiaConfig, PragnosiaForCausalLM

        torch.manual_seed(0)
        model = PragnosiaForCausalLM(PragnosiaConfig(**{**SIZES, **overrides}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return model

    return build_model


@pytest.fixture
def twin():
    """A function of our model to `Qwen3MoeForCausalLM` with the same weights."""

    def build_twin(model):
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        ours = model.config
        fields = {name: getattr(ours, name) for name in SIZES}
        config = Qwen3MoeConfig(
            **fields,
            norm_topk_prob=ours.norm_topk_prob,
            tie_word_embeddings=ours.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
            rms_norm_eps=ours.rms_norm_eps,
            attn_implementation="eager",
        )
        theirs = Qwen3MoeForCausalLM(config)
        theirs.load_state_dict(stack_experts(model.state_dict()), strict=True)
        return theirs

    return build_twin


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to those of the module in `transformers`: gate above up in one tensor."""
    stacked = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_proj"):
            up = tensors[name.replace("gate_proj", "up_proj")]
            stacked[name.replace("gate_proj", "gate_up_proj")] = torch.cat((tensor, up), dim=1)
        elif not name.endswith("experts.up_proj"):
            stacked[name] = tensor
    return stacked


@pytest.fixture
def gradients():
    """A function of our model to its gradients under the twin's names."""

    def collect(model):
        return stack_experts({name: parameter.grad for name, parameter in model.named_parameters()})

    return collect
