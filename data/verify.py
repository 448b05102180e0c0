"""Is an answer right? Checks that need no judge."""

from __future__ import annotations

import re

from data.example import Example

_NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def final_number(text: str) -> str | None:
    """The number after the last `####`, spelt plainly (`1,200.50` -> `1200.5`), None if there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def final_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced, white space removed; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + 6, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return re.sub(r"\s+", "", text[start + 7 : end])
    return None


def is_correct(example: Example, text: str) -> bool | None:
    """Whether `text` answers `example`; None when only running code or a reader could tell.

    Reasoning: the final number (or box) equals the reference's. The procedural instructions have one right
    answer each: equal but for case, white space and a closing full stop.
    """
    if example.family == "reasoning":
        for final in (final_number, final_box):
            expected = final(example.answer())
            if expected is not None:
                return final(text) == expected
        return None
    if example.dataset == "instructions":
        return _plain(text) == _plain(example.answer())
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").lower()
