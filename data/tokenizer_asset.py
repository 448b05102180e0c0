"""The tokenizer shipped with the repository, and loading another in its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from training.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_DIR = Path(__file__).parent / "tokenizer"


def load_tokenizer(path: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the directory `path` (default: ours), read without the network.

    A tokenizer that names no padding token pads with its end-of-sequence token: rows carry document numbers,
    so padding is never told by its id.

    Raises:
        UserError: the directory is missing, holds no readable tokenizer, or the tokenizer ends no sequence.
    """
    from transformers import AutoTokenizer

    directory = Path(path or TOKENIZER_DIR).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"tokenizer directory {directory} does not exist; give --tokenizer a directory on this machine"
        )
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{directory} holds no tokenizer.json; give --tokenizer a directory saved by save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # each tokenizer class fails on bad files in its own way
        raise UserError(f"{directory} holds no readable tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer in {directory} has no eos_token, so no answer could end; set one in its config"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
