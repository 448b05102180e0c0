"""From an example to text and tokens: the prompt formats, and which tokens are targets.

Prompt and answer are tokenized apart and joined, so that the tokens of a prompt in training are exactly those
that generation starts from. Every answer ends with the end-of-sequence token, and only answers are targets
unless `train_on_prompt` is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is no target."""

FORMATS = ("chat_template", "instruction", "task", "problem", "text")
DEFAULT_FORMAT = {"chat": "chat_template", "code": "task", "reasoning": "problem", "text": "text"}

# What stands before and after a user's message.
_FRAMES = {
    "instruction": ("### Instruction:\n", "\n\n### Response:\n"),
    "task": ("Task:\n", "\n\nSolution:\n"),
    "problem": ("Problem:\n", "\n\nSolution:\n"),
    "text": ("", ""),
}

Segment = tuple[str, bool]
"""A piece of text and whether it is an answer."""


def prompt_text(
    messages: Sequence[dict[str, str]], prompt_format: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The text a model continues with its answer; `messages` ends with the user's turn."""
    if prompt_format == "chat_template" and tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # A tokenizer that came without a chat template gets the plain instruction format.
    before, after = _FRAMES["instruction" if prompt_format == "chat_template" else prompt_format]
    pieces = []
    for message in messages:
        if message["role"] == "user":
            pieces.append(before + message["content"].strip() + after)
        elif message["role"] == "assistant":
            pieces.append(message["content"].strip() + tokenizer.eos_token + "\n\n")
        else:
            pieces.append(message["content"].strip() + "\n\n")
    return "".join(pieces)


def segments(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The document as alternating prompt and answer texts; an answer's text ends with the end-of-sequence
    token.

    An answer is what the rendered conversation gains by it: the text up to and including the answer less the
    text that asks for it. A chat template that rewrites earlier turns (dropping their reasoning, say) leaves
    only the turns for which this holds as answers.
    """
    pieces: list[Segment] = []
    done = ""
    for i, message in enumerate(example.messages):
        if message["role"] != "assistant" or not message["content"].strip():
            continue
        prompt = prompt_text(example.messages[:i], example.prompt_format, tokenizer)
        if not prompt.startswith(done):
            pieces, done = [], ""
        if prompt != done:
            pieces.append((prompt[len(done) :], False))
        answer = _answer_text(example, i, prompt, tokenizer)
        pieces.append((answer, True))
        done = prompt + answer
    return pieces


def _answer_text(example: Example, i: int, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of answer `i` as it follows `prompt`, ending with the end-of-sequence token."""
    if example.prompt_format == "chat_template" and tokenizer.chat_template is not None:
        rendered = tokenizer.apply_chat_template(example.messages[: i + 1], tokenize=False)
        if rendered.startswith(prompt) and tokenizer.eos_token in rendered[len(prompt) :]:
            return rendered[len(prompt) : rendered.rindex(tokenizer.eos_token)] + tokenizer.eos_token
    content = example.messages[i]["content"]
    return (content if example.prompt_format == "text" else content.strip()) + tokenizer.eos_token


def encode_all(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    train_on_prompt: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each example, not yet cut to a length; labels are -100 where no target is."""
    documents = [segments(example, tokenizer) for example in examples]
    texts = [text for document in documents for text, _ in document]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    result = []
    for document in documents:
        input_ids: list[int] = []
        labels: list[int] = []
        for _, is_answer in document:
            ids = next(encoded)
            input_ids += ids
            labels += ids if is_answer or train_on_prompt else [IGNORED] * len(ids)
        if labels:
            labels[0] = IGNORED  # nothing comes before a document's first token to predict it from
        result.append((input_ids, labels))
    return result


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    train_on_prompt: bool = False,
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example, both cut to `max_length`.

    Labels are not shifted: a target's label is its own token id, all else is -100.
    """
    input_ids, labels = encode_all([example], tokenizer, train_on_prompt)[0]
    return input_ids[:max_length], labels[:max_length]
