"""The one form every dataset is brought into."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FAMILIES = ("chat", "code", "reasoning", "text")


@dataclass(frozen=True)
class Example:
    """One training document.

    Attributes:
        family: one of `FAMILIES`; losses are reported per family.
        messages: `[{"role": "system" | "user" | "assistant", "content": str}, ...]`; assistant turns are the
            answers. A plain text is a single assistant turn with the prompt format `text`.
        dataset: name of the dataset it comes from.
        tests: Python source run after a generated solution; it raises when the solution is wrong.
        template: what the validation split keeps together (a template, a file, a conversation); `None` means
            the text of the prompt.
        prompt_format: a name in `data.prompts.FORMATS`.
    """

    family: str
    messages: list[dict[str, str]]
    dataset: str
    tests: str | None = None
    template: str | None = None
    prompt_format: str = "chat_template"

    def prompt_messages(self) -> list[dict[str, str]]:
        """The messages before the last answer."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.messages[: answers[-1]] if answers else self.messages

    def answer(self) -> str:
        """The last answer, empty if there is none."""
        answers = [message["content"] for message in self.messages if message["role"] == "assistant"]
        return answers[-1] if answers else ""

    def split_hash(self) -> int:
        """A 64-bit hash of the template, or of everything before the first answer, or of a plain text."""
        key = self.template
        if key is None:
            opening = []
            for message in self.messages:
                if message["role"] == "assistant":
                    break
                opening.append(message["content"])
            key = "\x00".join(opening) if opening else self.messages[0]["content"]
        return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big")
