"""A tiny random model with a byte tokenizer, saved as a checkpoint: its answers are random bytes."""

from pathlib import Path

import pytest

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 256


@pytest.fixture(scope="session")
def byte_tokenizer():
    """256 bytes and three special tokens: every character beyond ASCII is split over several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, byte_tokenizer) -> Path:
    """A run directory with final_model/, as training leaves it."""
    import torch

    from model import PragnosiaConfig, PragnosiaForCausalLM
    from training.export import export_model

    torch.manual_seed(0)
    config = PragnosiaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        moe_intermediate_size=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,  # large enough that answers depend on the prompt
        tie_word_embeddings=False,
        pad_token_id=byte_tokenizer.pad_token_id,
        eos_token_id=byte_tokenizer.eos_token_id,
    )
    run = tmp_path_factory.mktemp("outputs") / "pragnosia_tiny_4experts_20260101-000000"
    model = PragnosiaForCausalLM(config).eval()
    export_model(model, byte_tokenizer, run / "final_model", export_format="pragnosia", write=True)
    return run


@pytest.fixture(scope="session")
def give_head():
    """A function that copies final_model/ of a run into another directory with a new value head."""

    def copy(run: Path, target: Path, **fields) -> Path:
        from dataclasses import asdict

        import torch

        from model import PragnosiaForCausalLM
        from model.components import TreeConfig
        from training.checkpoint import load_config, load_tokenizer_for
        from training.export import export_model
        from training.weights import directory_weights, fill, initial_weights

        config = load_config(run / "final_model")
        tokenizer = load_tokenizer_for(run / "final_model", config)
        config.tree = asdict(TreeConfig(hidden_size=config.hidden_size, **fields))
        model = PragnosiaForCausalLM(config).eval()
        fill(model, directory_weights(run / "final_model", initial_weights(0, 0.02)))
        torch.nn.init.normal_(model.value_head.out_proj.weight, generator=torch.Generator().manual_seed(0))
        export_model(model, tokenizer, target / "final_model", export_format="pragnosia", write=True)
        return target

    return copy


@pytest.fixture(scope="session")
def loaded(checkpoint):
    """(model, tokenizer) of the checkpoint, fp32 on CPU."""
    import torch

    from training.checkpoint import load_model, resolve_model

    return load_model(resolve_model(str(checkpoint)), "cpu", torch.float32)
