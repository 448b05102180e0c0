"""Steps of reasoning whose worth is known: what a value head learns from.

A step is a line of an answer; it ends with the token that has the line break, or with the end of the answer. A
document of steps is a solution as it stands in the data (each step is worth 1), or one with a mistake put into it:
steps before the mistake are worth 1, it and all after it 0. During a run the model's own answers to training
problems join them, all steps worth 1 if the answer is right and 0 if not: the frequency with which a step leads
this model to the right answer (arXiv 2110.14168). No token of these documents is a target of the language model.
"""

from __future__ import annotations

import itertools
import operator
import random
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.documents import Documents
from data.example import Example
from data.packing import PackedDataset
from data.prompts import IGNORED, prompt_text, segments
from data.verify import is_correct

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from data.loader import TrainLoader

GOLD_SHARE = 1 / 3
"""Solutions that are left as they are: about as many steps are then worth 1 as 0."""
MAX_PROBLEMS = 2000
"""Problems of a dataset that the model may be asked during a run."""
ASKED, ANSWERS = 32, 4
"""Problems asked at a refresh, and answers drawn to each."""

_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_NUMBERS = re.compile(rf"(?<![\d.])(?:{_NUMBER})(?!\d)")
_EXPRESSION = re.compile(rf"(?<![\d.)])(?:{_NUMBER})(?:\s*[-+*/x×]\s*\$?(?:{_NUMBER}))+")
_EQUATION = re.compile(rf"({_EXPRESSION.pattern})\s*=\s*\$?({_NUMBER})(?!\d)")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class StepEnds:
    """Where steps end in the tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.kinds: dict[int, tuple[bool, bool]] = {}  # token -> has a line break, has something else

    def follow(self, begun: bool, token: int) -> tuple[bool, bool]:
        """(whether the step ends with `token`, whether it has begun): a blank line is not a step."""
        if token not in self.kinds:
            piece = self.tokenizer.decode([token])
            self.kinds[token] = "\n" in piece, bool(piece.strip())
        breaks, solid = self.kinds[token]
        begun = begun or solid
        return token == self.tokenizer.eos_token_id or (breaks and begun), begun

    def __call__(self, tokens: Iterable[int]) -> list[int]:
        """The places of the last tokens of steps."""
        places, begun = [], False
        for place, token in enumerate(tokens):
            ended, begun = self.follow(begun, token)
            if ended:
                places.append(place)
                begun = False
        return places


def lines_of(answer: str) -> list[str]:
    """The steps of an answer as text."""
    return [line for line in answer.split("\n") if line.strip()]


def has_steps(example: Example) -> bool:
    """Whether a value head can learn from this example."""
    return (
        example.family == "reasoning" and example.prompt_format != "text" and bool(example.answer().strip())
    )


def step_documents(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int = 0
) -> Documents:
    """A document with labelled steps for each example that has steps, cut to `max_length` tokens.

    What happens to an example depends on `seed`, on its own text and on the example before it.
    """
    ends, made, other = StepEnds(tokenizer), [], []
    for example in filter(has_steps, examples):
        lines = lines_of(example.answer())
        question = example.prompt_messages()[-1]["content"] if example.prompt_messages() else ""
        rng = random.Random(f"{seed}/{question}/{example.answer()}")
        found = corrupt(lines, question, other, rng) if rng.random() >= GOLD_SHARE else None
        steps, right = found or (lines, len(lines))
        stopped = len(steps) < len(lines)
        pieces = [text for text, _ in segments(example, tokenizer)][:-1]
        made.append(labelled(pieces, steps, [i < right for i in range(len(steps))], ends, stopped))
        other = lines
    return join(made, max_length)


def labelled(
    prompt: Sequence[str], steps: Sequence[str], labels: Sequence[bool], ends: StepEnds, stopped: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a document: its prompt in pieces, then its steps; `stopped` before its end."""
    tokenizer = ends.tokenizer
    answer = "\n".join(steps) + ("\n" if stopped else tokenizer.eos_token)
    *before, own = tokenizer([*prompt, answer], add_special_tokens=False)["input_ids"]
    values = [IGNORED] * len(own)
    for place, label in zip(
        ends(own), labels, strict=False
    ):  # a step that shares a token has no end of its own
        values[place] = int(label)
    start = [token for piece in before for token in piece]
    return start + own, [IGNORED] * len(start) + values


def join(documents: Iterable[tuple[list[int], list[int]]], max_length: int) -> Documents:
    """Tokens and labels as `Documents` without targets; those whose labels all lie beyond `max_length` go."""
    cut = [(tokens[:max_length], values[:max_length]) for tokens, values in documents]
    cut = [(tokens, values) for tokens, values in cut if any(value != IGNORED for value in values)]
    tokens = np.array([token for document, _ in cut for token in document], np.uint32)
    return Documents(
        tokens=tokens,
        targets=np.zeros(len(tokens), bool),
        offsets=np.cumsum([0, *(len(document) for document, _ in cut)]).astype(np.int64),
        values=np.array([value for _, values in cut for value in values], np.int8),
    )


def checkable_problems(examples: Iterable[Example]) -> list[Example]:
    """The first `MAX_PROBLEMS` examples with steps whose answers a program can check."""
    found = (example for example in examples if has_steps(example) and is_correct(example, "") is not None)
    return list(itertools.islice(found, MAX_PROBLEMS))


# -- mistakes ------------------------------------------------------------------------------------------------


def corrupt(
    lines: Sequence[str], question: str, other: Sequence[str], rng: random.Random
) -> tuple[list[str], int] | None:
    """A solution with a mistake, and the place of the first wrong step; None where no mistake can be made.

    The mistake is a wrong result, an operand that is not in the problem, another operator, or a step of `other`,
    where the solution stops. All but the last are carried on: later steps calculate with the wrong number.
    """
    for _ in range(8):
        place = rng.randrange(len(lines))
        kind = rng.choices(("result", "operand", "operator", "foreign"), (4, 2, 2, 2))[0]
        if kind == "foreign":
            strangers = [line for line in other if line not in lines and not line.startswith("####")]
            if strangers:
                return [*lines[:place], rng.choice(strangers)], place
            continue
        known = {number(found) for text in (question, *lines[:place]) for found in _NUMBERS.findall(text)}
        changed = _mistake(lines[place], kind, known, rng)
        if changed is not None:
            line, old, new = changed
            return [*lines[:place], line, *carried(lines[place + 1 :], {old: new})], place
    return None


def _mistake(
    line: str, kind: str, known: set[Fraction], rng: random.Random
) -> tuple[str, Fraction, Fraction] | None:
    """A line with a mistake in its equation (or in its answer, after ####), the old result and the new."""
    equation = _EQUATION.search(line)
    if equation is None:
        answer = _NUMBERS.search(line) if line.startswith("####") else None
        if answer is None or kind != "result":
            return None
        old = number(answer[0])
        new = _beside(old, rng)
        return line[: answer.start()] + spelt(new) + line[answer.end() :], old, new
    left, old = equation[1], number(equation[2])
    if kind == "result":
        changed, new = left, _beside(old, rng)
    else:
        left = plain(left)
        pattern = _NUMBERS if kind == "operand" else re.compile(r"[-+*/]")
        found = rng.choice(list(pattern.finditer(left)))
        if kind == "operand":
            put = rng.choice([n for n in range(2, 100) if n not in known])
        else:
            put = rng.choice([symbol for symbol in _OPERATORS if symbol != found[0]])
        changed = left[: found.start()] + str(put) + left[found.end() :]
        new = calculated(changed)
    if new is None or new < 0 or new == old:
        return None
    return rewritten(line, left, changed, old, new), old, new


def carried(lines: Sequence[str], renamed: dict[Fraction, Fraction]) -> list[str]:
    """Later steps of a solution in which numbers have changed, with what follows from them calculated anew."""
    result, renamed = [], dict(renamed)

    def rename(found: re.Match) -> str:
        value = number(found[0])
        return spelt(renamed[value]) if value in renamed else found[0]

    for line in lines:
        line = _NUMBERS.sub(rename, line)
        equation = _EQUATION.search(line)
        if equation is not None:
            left, old, new = equation[1], number(equation[2]), calculated(equation[1])
            if new is not None and new != old:
                line = rewritten(line, left, left, old, new)
                renamed[old] = new
        result.append(line)
    return result


def rewritten(line: str, left: str, new_left: str, old: Fraction, new: Fraction) -> str:
    """A line with one side of its equation exchanged for another, wherever it stands, and then the result."""
    pieces, end = [], 0
    for found in _EXPRESSION.finditer(line):
        if plain(found[0]) == plain(left):
            text = re.sub(r"([-+*/])", r" \1 " if " " in found[0] else r"\1", plain(new_left))
            pieces += [line[end : found.start()], text.replace("*", "x") if "x" in found[0] else text]
            end = found.end()
    before, after = "".join(pieces), line[end:]
    after = _NUMBERS.sub(lambda found: spelt(new) if number(found[0]) == old else found[0], after)
    return before + after


def _beside(value: Fraction, rng: random.Random) -> Fraction:
    """A wrong result: near the right one, or a power of ten beside it."""
    near = [value + change for change in (-10, -3, -2, -1, 1, 2, 3, 10)] + [value * 10]
    return rng.choice([other for other in near if other >= 0 and other != value])


def calculated(expression: str) -> Fraction | None:
    """The value of numbers joined by + - * /, None where it divides by 0."""
    parts = re.split(r"([-+*/])", plain(expression))
    terms, signs = [number(parts[0])], []
    for symbol, text in zip(parts[1::2], parts[2::2], strict=True):
        value = number(text)
        if symbol == "/" and value == 0:
            return None
        if symbol in "*/":
            terms[-1] = _OPERATORS[symbol](terms[-1], value)
        else:
            terms.append(value)
            signs.append(symbol)
    total = terms[0]
    for symbol, term in zip(signs, terms[1:], strict=True):
        total = _OPERATORS[symbol](total, term)
    return total


def plain(expression: str) -> str:
    """An expression without spaces and dollars, with `*` for products."""
    return re.sub("[x×]", "*", re.sub(r"[\s$]", "", expression))


def number(text: str) -> Fraction:
    """The value of a number as text."""
    return Fraction(text.replace(",", ""))


def spelt(value: Fraction) -> str:
    """A number as text, with at most two decimals."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.2f}".rstrip("0").rstrip(".")


# -- the model's own answers ---------------------------------------------------------------------------------


class OwnAnswers:
    """Rows of a model's answers to training problems, which take the place of rows with mistakes.

    Every `interval` steps the model answers anew. Which rows of a step give way, and to what, depends on the seed,
    the step and the place in it alone, not on ranks and microbatches. A checkpoint keeps the answers (`save`), so
    that a resumed run goes on with the same ones.
    """

    def __init__(
        self,
        problems: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        interval: int,
        max_length: int,
        seed: int,
    ) -> None:
        self.problems, self.tokenizer = list(problems), tokenizer
        self.interval, self.max_length, self.seed = interval, max_length, seed
        self._set(join([], max_length))

    def _set(self, documents: Documents) -> None:
        self.documents = documents
        pad_id = self.tokenizer.pad_token_id
        self.rows = PackedDataset([(documents, 1.0)], self.max_length, pad_id, self.seed)

    def refresh(self, generate: Callable[[list[str], int, int], list[str]], step: int) -> None:
        """Draw answers where `step` is due; `generate(prompts, most tokens, seed)` is collective over ranks."""
        if step == 0 or step % self.interval:
            return
        rng = random.Random(f"{self.seed}/{step}")
        asked = rng.sample(self.problems, min(ASKED, len(self.problems)))
        asked = [example for example in asked for _ in range(ANSWERS)]
        prompts = [prompt_text(e.prompt_messages(), e.prompt_format, self.tokenizer) for e in asked]
        gold = self.tokenizer([e.answer() for e in asked], add_special_tokens=False)["input_ids"]
        answers = generate(prompts, 16 + max(len(tokens) for tokens in gold), rng.randrange(2**31))
        ends, made = StepEnds(self.tokenizer), []
        for example, prompt, answer in zip(asked, prompts, answers, strict=True):
            lines = lines_of(answer)
            made.append(labelled([prompt], lines, [is_correct(example, answer)] * max(1, len(lines)), ends))
        self._set(join(made, self.max_length))

    def mix(self, microbatches: list[dict[str, torch.Tensor]], loader: TrainLoader, step: int) -> None:
        """Exchange about half of the rows with labelled steps in a step's microbatches, in place."""
        if not len(self.rows):
            return
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(0, 2 * len(self.rows), loader.rows_per_step)
        for batch, own in zip(microbatches, loader.slices, strict=True):
            for row, place in enumerate(own.tolist()):
                if chosen[place] < len(self.rows) and (batch["value_labels"][row] != IGNORED).any():
                    for name, values in self.rows[int(chosen[place])].items():
                        batch[name][row] = values

    def save(self, file: Path) -> None:
        """Write the answers of now."""
        arrays = {name: getattr(self.documents, name) for name in ("tokens", "targets", "offsets", "values")}
        np.savez(file, **arrays)

    def load(self, file: Path) -> None:
        """Undo `save`."""
        with np.load(file) as arrays:
            self._set(Documents(**arrays))
