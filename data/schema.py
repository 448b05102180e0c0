"""From a row with somebody's column names to an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.example import FAMILIES, Example
from data.prompts import DEFAULT_FORMAT, FORMATS
from training.config import UserError, did_you_mean

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
FIELDS = ("messages", "prompt", "answer", "system", "text", "tests", "template")
"""What a field map may name."""


@dataclass(frozen=True)
class Schema:
    """Columns that tell a schema, the family it means, and how a row becomes messages."""

    columns: tuple[str, ...]
    family: str
    messages: Callable[[Mapping[str, Any]], list[tuple[str, Any]]]


def _pair(prompt: str, answer: str, context: str | None = None) -> Callable:
    def messages(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        question = row[prompt]
        if context and row.get(context):
            question = f"{question}\n\n{row[context]}"
        turns = [("system", row["system"])] if row.get("system") else []
        return [*turns, ("user", question), ("assistant", row[answer])]

    return messages


def _conversation(column: str, role: str, content: str) -> Callable:
    def messages(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(turn[role], turn[content]) for turn in row[column]]

    return messages


SCHEMAS = (
    Schema(("messages",), "chat", _conversation("messages", "role", "content")),
    Schema(("conversations",), "chat", _conversation("conversations", "from", "value")),
    Schema(("instruction", "output"), "chat", _pair("instruction", "output", "input")),
    Schema(("instruction", "response"), "chat", _pair("instruction", "response", "context")),
    Schema(("question", "answer"), "reasoning", _pair("question", "answer")),
    Schema(("problem", "solution"), "reasoning", _pair("problem", "solution")),
    Schema(
        ("func_documentation_string", "func_code_string"),
        "code",
        _pair("func_documentation_string", "func_code_string"),
    ),
    Schema(("docstring", "code"), "code", _pair("docstring", "code")),
    Schema(("prompt", "answer"), "chat", _pair("prompt", "answer")),
    Schema(("prompt", "completion"), "chat", _pair("prompt", "completion")),
    Schema(("prompt", "response"), "chat", _pair("prompt", "response")),
    Schema(("text",), "text", lambda row: [("assistant", row["text"])]),
)


def check_names(
    family: str | None, prompt_format: str | None, fields: Mapping[str, str] | None, where: str
) -> None:
    """Raises UserError if a family, prompt format or field name does not exist."""
    for name, known, what in (
        (family, FAMILIES, "family"),
        (prompt_format, FORMATS, "prompt format"),
        *((field, FIELDS, "field") for field in fields or ()),
    ):
        if name is not None and name not in known:
            raise UserError(
                f"{where}: no {what} {name!r}{did_you_mean(str(name), known)}; there are {', '.join(known)}"
            )


def to_example(
    row: Any,
    *,
    dataset: str,
    where: str,
    family: str | None = None,
    prompt_format: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> Example:
    """One row as an `Example`.

    Args:
        row: a mapping of column names to values, or an `Example`, which is returned as it is.
        where: file and line, for messages.
        family, prompt_format: override what the columns suggest.
        fields: our field name -> the row's column; only these columns are then looked at.

    Raises:
        UserError: the row is no mapping, its columns fit no schema, or a value is not text.
    """
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be an object with named fields, not {type(row).__name__}")
    if fields:
        missing = [column for column in fields.values() if column not in row]
        if missing:
            raise UserError(
                f"{where}: no column {missing[0]!r}; the row has {', '.join(map(str, row)) or 'none'}"
            )
        row = {field: row[column] for field, column in fields.items()}
    schema = next((schema for schema in SCHEMAS if all(column in row for column in schema.columns)), None)
    if schema is None:
        known = ", ".join("+".join(schema.columns) for schema in SCHEMAS)
        raise UserError(
            f"{where}: columns {', '.join(map(str, row)) or '(none)'} fit no known schema ({known}); "
            "name them with fields in a --dataset-config entry"
        )
    try:
        messages = [_message(role, content) for role, content in schema.messages(row)]
        extra = {name: None if row.get(name) is None else _text(row[name]) for name in ("tests", "template")}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {'+'.join(schema.columns)} not as expected: {error}") from error
    family = family or schema.family
    if schema.family == "text":
        prompt_format = "text"
    return Example(family, messages, dataset, prompt_format=prompt_format or DEFAULT_FORMAT[family], **extra)


def _message(role: Any, content: Any) -> dict[str, str]:
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": "" if content is None else _text(content)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not text")
    return value
