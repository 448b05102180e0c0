"""Reading DeepSpeed's state, also by way of its universal checkpoints: a sharded state taken apart by parameter,
for another number of ranks."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from experts import exported_name, shared_name
from training.config import UserError

if TYPE_CHECKING:
    from model.config import PragnosiaConfig

# What the converter wants to find in a checkpoint of ZeRO 1 or 2; it lists parameters that tensor parallelism
# treats apart, and here there are none.
UNIVERSAL_CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def to_universal(state: Path, target: Path, config: PragnosiaConfig, *, shares_experts: bool) -> None:
    """Convert a `state/` directory of a ZeRO checkpoint for ranks that share experts, or do not.

    It needs as much free disk as the state takes.

    Raises:
        UserError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    chatter = io.StringIO()
    arguments = Namespace(
        input_folder=str(state),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    try:
        with contextlib.redirect_stdout(chatter):
            ds_to_universal.main(arguments)
        rewrite_experts(target, config, shared=shares_experts)
    except Exception as error:
        raise UserError(
            f"{state} cannot be converted for another number of ranks ({type(error).__name__}: {error}): "
            f"resume with as many ranks as wrote it, or start from its weights with --init-from"
        ) from error


def rewrite_experts(universal: Path, config: PragnosiaConfig, *, shared: bool) -> None:
    """Give the experts' states the names and the form that DeepSpeed reads where ranks share experts (`shared`),
    or where each has all of them; whichever they were written with."""
    import torch
    from deepspeed.checkpoint.constants import CAT_DIM, EP_IS_EXPERT_PARAM, EP_NUM_EXPERTS, PARAM

    wide = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
    for folder in sorted((universal / "zero").iterdir()):
        exported = exported_name(folder.name)
        name = shared_name(exported) if shared else exported
        if name == folder.name:
            continue
        shape = (wide[0], wide[2], wide[1]) if exported.endswith("down_proj") else wide
        for path in folder.glob("*.pt"):
            if path.stem == "step":
                continue
            state = torch.load(path, weights_only=False)
            tensor = (state[PARAM] if isinstance(state, dict) else state).detach().view(shape)
            state = {PARAM: tensor, CAT_DIM: 0}
            if shared:
                state |= {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: config.num_experts}
            torch.save(state, path)
        folder.rename(folder.with_name(name))


def load_state(engine, directory: Path, tag: str) -> None:
    """Read the state `directory / tag` into an engine; collective.

    From a universal checkpoint ZeRO-3 gives every parameter group the settings of the first, and all parameters
    one tensor that counts their steps, which then counts each of them. Both are mended here.

    Raises:
        UserError: there is none.
    """
    own = [(group["weight_decay"], group["name"]) for group in engine.optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(directory), tag=tag)
    if loaded is None:
        raise UserError(f"DeepSpeed found no state in {directory / tag}: use an earlier checkpoint")
    for group, (decay, name) in zip(engine.optimizer.param_groups, own, strict=True):
        group |= {"weight_decay": decay, "name": name}
    for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()
