"""The named model sizes, and the way from command-line settings to a configuration. Imports no torch by itself.

The expert width is chosen so that the total meets the nominal size within 3% with tied embeddings and the
32,768-entry vocabulary. `--num-experts` changes the number of experts at the same width: active parameters
stay, the total moves.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.config import ModelArguments, UserError

if TYPE_CHECKING:
    from model.config import PragnosiaConfig


@dataclass(frozen=True)
class Preset:
    """Sizes of one named model; `nominal` is the parameter count its name promises."""

    nominal: float
    hidden_size: int
    num_layers: int
    num_experts: int
    expert_width: int
    heads: int
    head_dim: int
    kv_heads: int


PRESETS = {
    "tiny": Preset(7.4e6, 128, 4, 8, 256, 4, 32, 2),
    "350M": Preset(350e6, 512, 8, 8, 3328, 8, 64, 4),
    "1B": Preset(1e9, 768, 12, 16, 2176, 12, 64, 4),
    "3B": Preset(3e9, 1024, 24, 32, 1216, 16, 64, 4),
    "7B": Preset(7e9, 1536, 32, 64, 704, 12, 128, 4),
    "13B": Preset(13e9, 2048, 40, 96, 528, 16, 128, 4),
}


def custom_preset(hidden_size: int, num_layers: int, num_experts: int, num_active_experts: int) -> Preset:
    """Sizes for `--model-size custom`.

    Heads are 64 wide (128 from width 1,536 up, 32 below 256), four query heads share a key-value head where
    that divides, and the active experts together are as wide as a dense SwiGLU layer of 8/3 the model width.
    """
    head_dim = 128 if hidden_size >= 1536 else 64 if hidden_size >= 256 else 32
    if hidden_size % head_dim:
        raise UserError(
            f"--hidden-size {hidden_size} is not a multiple of its head size {head_dim}: "
            f"use {max(head_dim, round(hidden_size / head_dim) * head_dim)}"
        )
    heads = hidden_size // head_dim
    kv_heads = heads // 4 if heads % 4 == 0 else heads
    expert_width = -(-8 * hidden_size // (3 * num_active_experts * 32)) * 32
    return Preset(0, hidden_size, num_layers, num_experts, expert_width, heads, head_dim, kv_heads)


def preset_config(size: str, **overrides) -> PragnosiaConfig:
    """The configuration of a named size, with any field of `PragnosiaConfig` replaced by keyword."""
    return _config(PRESETS[size], **overrides)


def _config(preset: Preset, **overrides) -> PragnosiaConfig:
    from model.config import PragnosiaConfig

    fields = {
        "hidden_size": preset.hidden_size,
        "num_hidden_layers": preset.num_layers,
        "num_experts": preset.num_experts,
        "moe_intermediate_size": preset.expert_width,
        "num_attention_heads": preset.heads,
        "head_dim": preset.head_dim,
        "num_key_value_heads": preset.kv_heads,
    }
    try:
        return PragnosiaConfig(**{**fields, **overrides})
    except ValueError as error:
        raise UserError(str(error)) from error


def config_from_arguments(args: ModelArguments, **overrides) -> PragnosiaConfig:
    """The configuration that `--model-size` and its companions ask for; `overrides` as in `preset_config`."""
    if args.model_size == "custom":
        missing = [
            flag
            for flag, value in (
                ("--hidden-size", args.hidden_size),
                ("--num-layers", args.num_layers),
                ("--num-experts", args.num_experts),
            )
            if value is None
        ]
        if missing:
            raise UserError(f"--model-size custom also needs {', '.join(missing)}")
        if args.num_active_experts > args.num_experts:
            raise UserError(
                f"--num-active-experts {args.num_active_experts} is more than --num-experts {args.num_experts}"
            )
        preset = custom_preset(args.hidden_size, args.num_layers, args.num_experts, args.num_active_experts)
    else:
        if args.hidden_size is not None or args.num_layers is not None:
            raise UserError(
                f"--hidden-size and --num-layers belong to --model-size custom; {args.model_size} fixes both"
            )
        preset = PRESETS[args.model_size]
    fields = {
        "num_experts_per_tok": args.num_active_experts,
        "router_aux_loss_coef": args.router_aux_loss_coef,
        "router_z_loss_coef": args.router_z_loss_coef,
        "routing": args.routing,
        "expert_pool": args.expert_pool,
    }
    if args.num_experts is not None:
        fields["num_experts"] = args.num_experts
    return _config(preset, **{**fields, **overrides})


def size_of(config: PragnosiaConfig) -> str:
    """The preset with this width, depth and expert width, else custom."""
    for name, preset in PRESETS.items():
        sizes = (preset.hidden_size, preset.num_layers, preset.expert_width)
        if sizes == (config.hidden_size, config.num_hidden_layers, config.moe_intermediate_size):
            return name
    return "custom"


def rerouted(config: PragnosiaConfig, args: ModelArguments) -> PragnosiaConfig:
    """The same model, whose weights serve either, with the routing of `args` and the pool that they name."""
    kept = config.expert_pool if config.routing == args.routing else None
    fields = {"routing": args.routing, "expert_pool": args.expert_pool or kept}
    try:
        return type(config).from_dict({**config.to_dict(), **fields})
    except ValueError as error:
        raise UserError(f"--routing {args.routing}: {error}") from None


def check_agreement(
    args: ModelArguments, config: PragnosiaConfig, origin: object, given: Container[str]
) -> None:
    """Refuse `given` settings that contradict the model that training starts from; all others follow it.

    Raises:
        UserError: names the flag and both values.
    """
    found = {
        "model_size": size_of(config),
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_experts": config.num_experts,
        "num_active_experts": config.num_experts_per_tok,
        "routing": config.routing,
        "expert_pool": config.expert_pool,
    }
    for name, value in found.items():
        asked = getattr(args, name)
        if name in given and asked not in (value, "custom", None):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {asked}: the model in {origin} has {value}; leave {flag} out")
