"""Human conversations from the `chitchat-dataset` package (MIT): the embedded chat data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from data.example import Example
from training.config import UserError

TURNS = 6
"""Turns of a piece of a conversation."""
PIECES = 2
"""Pieces taken of each conversation."""
_PLAIN = re.compile(r"[\x20-\x7e’‘“”…é]+")
_LINK = re.compile(r"https?:|www\.|<|@|\bfuck|\bshit|\bsex|\bbitch|\bdamn", re.IGNORECASE)


def conversations() -> Iterator[Example]:
    """The first `PIECES` pieces of `TURNS` turns of each conversation; the second speaker is the assistant.

    What one speaker sends in a row is one turn. A piece with a link, a swear word, unusual characters or an
    overlong turn is left out. A whole conversation is on one side of the validation split.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import chitchat_dataset
    except ImportError as error:
        raise UserError(
            "the dataset 'chitchat' needs the package chitchat-dataset; run: pip install -r requirements.txt"
        ) from error

    for name, conversation in chitchat_dataset.Dataset().items():
        sent = (message for group in conversation["messages"] for message in group)
        turns = [
            " ".join(" ".join(message["text"].split()) for message in group)
            for _, group in groupby(sent, key=lambda message: message["sender"])
        ]
        for start in range(0, min(len(turns) - 1, PIECES * TURNS), TURNS):
            piece = turns[start : start + TURNS]
            piece = piece[: len(piece) // 2 * 2]
            if all(_is_clean(turn) for turn in piece):
                roles = ("user", "assistant") * (len(piece) // 2)
                yield Example(
                    family="chat",
                    messages=[
                        {"role": role, "content": turn} for role, turn in zip(roles, piece, strict=True)
                    ],
                    dataset="chitchat",
                    template=name,
                )


def _is_clean(turn: str) -> bool:
    return len(turn) <= 200 and _PLAIN.fullmatch(turn) is not None and _LINK.search(turn) is None
