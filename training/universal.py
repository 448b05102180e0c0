"""DeepSpeed's universal checkpoints: a sharded state taken apart by parameter, for another number of ranks."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from pathlib import Path

from training.config import UserError

# What the converter wants to find in a checkpoint of ZeRO 1 or 2; it lists parameters that tensor parallelism
# treats apart, and here there are none.
UNIVERSAL_CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def to_universal(state: Path, target: Path) -> None:
    """Convert a `state/` directory of a ZeRO checkpoint; needs as much free disk as the state takes.

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
    except Exception as error:
        raise UserError(
            f"{state} cannot be converted for another number of ranks ({type(error).__name__}: {error}): "
            f"resume with as many ranks as wrote it, or start from its weights with --init-from"
        ) from error
