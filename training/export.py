"""The exported model directory: weights, configuration, tokenizer and the code to load it anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from model import PragnosiaConfig, PragnosiaForCausalLM
from training.config import UserError
from training.weights import directory_weights, exported_tensors, fill, qwen3_moe_tensors, write_shards

REPOSITORY = Path(__file__).resolve().parent.parent
# The modules a loaded model needs, written flat beside the weights for `trust_remote_code`.
MODEL_CODE = (
    "model/config.py", "model/components.py", "model/attention.py", "model/capacity.py", "model/router.py",
    "model/step_routing.py", "model/moe.py", "model/head.py", "model/value_head.py",
    "model/generation_cache.py", "model/extended_cache.py", "model/memory.py", "model/cache_augmentation.py",
    "model/answers.py", "model/causal_lm.py", "experts/page.py", "experts/resident.py",
    "kernels/reference.py", "kernels/dispatch.py", "kernels/cache_attention.py",
)  # fmt: skip
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings",
    "rms_norm_eps", "initializer_range", "norm_topk_prob", "router_aux_loss_coef", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def to_qwen3_moe(config: PragnosiaConfig):
    """The same architecture as a `Qwen3MoeConfig`, which has no pools or components (`make_plan` refuses them)."""
    from transformers import Qwen3MoeConfig

    assert config.routing == "token", config.routing
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    result = Qwen3MoeConfig(**fields, rope_parameters=rope, intermediate_size=config.moe_intermediate_size)
    result.architectures = ["Qwen3MoeForCausalLM"]
    return result


def from_qwen3_moe(directory: Path) -> PragnosiaConfig:
    """Our configuration of a Qwen3-MoE directory.

    Raises:
        UserError: it uses something this architecture has not (dense layers, windows, biases, scaled rotary,
            another activation).
    """
    from transformers import Qwen3MoeConfig

    theirs = Qwen3MoeConfig.from_pretrained(directory)
    rope = theirs.rope_parameters or {}
    unsupported = {
        "dense layers (mlp_only_layers, decoder_sparse_step)": theirs.mlp_only_layers
        or theirs.decoder_sparse_step != 1,
        "sliding windows": theirs.sliding_window,
        "attention biases": theirs.attention_bias,
        f"{theirs.hidden_act} experts": theirs.hidden_act != "silu",
        f"{rope.get('rope_type')} rotary embeddings": rope.get("rope_type", "default") != "default",
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(f"{directory} uses {what}, which this architecture has not")
    fields = {name: getattr(theirs, name, None) for name in SHARED_FIELDS}
    fields["head_dim"] = fields["head_dim"] or theirs.hidden_size // theirs.num_attention_heads
    try:
        return PragnosiaConfig(**fields, rope_theta=rope.get("rope_theta", 10000.0))
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None


def export_model(model, tokenizer, directory: Path, *, export_format: str, write: bool) -> None:
    """Write the model directory. Collective under ZeRO-3; only the rank with `write` touches the disk."""
    tensors = exported_tensors(model)
    if export_format == "qwen3_moe":
        tensors = qwen3_moe_tensors(tensors)
    if write:
        directory.mkdir(parents=True, exist_ok=True)
    write_shards(tensors, directory, write)
    if not write:
        return
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if export_format == "qwen3_moe":
        config = to_qwen3_moe(model.config)
        config.dtype = dtype
        config.save_pretrained(directory)
    else:
        config = PragnosiaConfig(**{**model.config.to_dict(), "dtype": dtype})
        config.architectures = ["PragnosiaForCausalLM"]
        config.auto_map = {
            "AutoConfig": "config.PragnosiaConfig",
            "AutoModelForCausalLM": "causal_lm.PragnosiaForCausalLM",
        }
        config.save_pretrained(directory)
        write_model_code(directory)
    generation = model.generation_config
    generation.pad_token_id, generation.eos_token_id = config.pad_token_id, config.eos_token_id
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_model_code(directory: Path) -> None:
    """The model's modules, flat, with their imports of one another made relative."""
    for name in MODEL_CODE:
        source = (REPOSITORY / name).read_text(encoding="utf-8")
        flat = re.sub(
            r"^from (?:model|experts|kernels)\.(\w+) import", r"from .\1 import", source, flags=re.M
        )
        (directory / Path(name).name).write_text(flat, encoding="utf-8")


@torch.no_grad()
def probe_logits(model, device: torch.device) -> torch.Tensor:
    """fp32 logits on CPU of a fixed short input; collective under ZeRO-3."""
    ids = torch.arange(16, device=device)[None] * 7919 % model.config.vocab_size
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids, use_cache=False).logits.float().cpu()
    model.train(was_training)
    return logits


def verify_export(
    directory: Path,
    expected_BSV: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
    trained_on: torch.device | None = None,
) -> None:
    """Reload an exported directory and compare its logits with those of the model it came from.

    Another kind of device than the model was trained on rounds otherwise, and sends a token to another expert now
    and then, whose logits are others; there half of the tokens have to agree. Damage that few meet is not seen.

    Raises:
        UserError: they differ by more than rounding.
    """
    from training.checkpoint import load_config

    with torch.device("meta"):
        model = PragnosiaForCausalLM(load_config(directory))
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    fill(model, directory_weights(directory))
    found_BSV = probe_logits(model, device)
    error = (found_BSV - expected_BSV).norm() / expected_BSV.norm()
    if trained_on is not None and trained_on.type != device.type:
        error = ((found_BSV - expected_BSV).norm(dim=-1) / expected_BSV.norm(dim=-1)).median()
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if not error <= tolerance:
        raise UserError(f"{directory}: reloaded logits differ from the trained model's by {error:.2e}")
