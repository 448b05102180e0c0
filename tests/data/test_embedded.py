"""The embedded datasets: enough of them, verifiable, and split by whole templates."""

import ast
import functools
import re

import pytest

from data.code_tasks import TASKS, code_tasks
from data.conversations import PIECES, TURNS
from data.documents import tokenize
from data.example import Example
from data.instructions import MAKERS, instructions
from data.sources import EMBEDDED, Source, split_examples
from data.verify import final_number
from data.word_problems import TEMPLATES, word_problems
from training.config import DataArguments


@functools.cache
def halves(name: str) -> tuple[list[Example], list[Example]]:
    """(training, validation) examples of an embedded dataset: what takes seconds is made once."""
    source = Source(name, "embedded", name, "embedded", family=EMBEDDED[name].family)
    return split_examples(source, DataArguments(dataset="embedded"))


@pytest.mark.parametrize("generator", [word_problems, code_tasks, instructions])
def test_generators_repeat_themselves_exactly_and_their_problems_never(generator):
    examples = list(generator(per_template=20))
    assert examples == list(generator(per_template=20))
    prompts = [example.messages[0]["content"] for example in examples]
    assert len(set(prompts)) == len(prompts)


def test_word_problem_steps_are_true():
    assert len(TEMPLATES) >= 40
    for example in word_problems():
        answer = example.answer()
        steps = re.findall(r"([\d+*/ -]*\d) = (\d+)", answer)
        assert steps and all(eval(expression) == int(result) for expression, result in steps), answer
        assert final_number(answer) == steps[-1][1]
        assert not re.search(r"[{}\[\]]", answer + example.messages[0]["content"])


def test_generated_functions_pass_their_tests_and_wrong_ones_do_not():
    assert len(TASKS) >= 40
    for example in code_tasks(per_template=4):
        scope: dict = {}
        exec(example.answer() + "\n" + example.tests, scope)
        name = re.match(r"def (\w+)\(", example.answer())[1]
        results = {line.split(" == ")[1] for line in example.tests.splitlines()}
        assert len(results) > 1, f"a constant would pass: {example.tests}"
        with pytest.raises(AssertionError):
            exec(f"def {name}(_):\n    return object()\n{example.tests}", {})


def test_instructions_cover_all_kinds():
    assert {example.template for example in instructions()} == {
        maker.__name__.lstrip("_") for maker in MAKERS
    }


def test_conversations_alternate_and_end_with_an_answer():
    pieces = [piece for half in halves("chitchat") for piece in half]
    assert len(pieces) > 3000
    by_conversation: dict[str, int] = {}
    for piece in pieces:
        roles = [message["role"] for message in piece.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 2 <= len(roles) <= TURNS
        by_conversation[piece.template] = by_conversation.get(piece.template, 0) + 1
    assert max(by_conversation.values()) <= PIECES


def test_stdlib_functions_are_python_without_their_docstring():
    pairs = [pair for half in halves("stdlib") for pair in half]
    assert len(pairs) > 3000
    for pair in pairs:
        name = re.match(r"Write the Python function `(\w+)`\. ", pair.messages[0]["content"])[1]
        (function,) = ast.parse(pair.answer()).body
        assert function.name == name and ast.get_docstring(function) is None
    assert {"heapq.py", "textwrap.py"} <= {pair.template for pair in pairs}
    assert not any("test" in pair.template.split("/") for pair in pairs)


@pytest.mark.parametrize("name", EMBEDDED)
def test_whole_templates_are_held_out(name):
    train, validation = halves(name)
    assert len(train) + len(validation) > 2000 and 0.02 < len(validation) / len(train) < 0.15
    assert not {e.template for e in train} & {e.template for e in validation}
    assert {e.family for e in train + validation} == {EMBEDDED[name].family}


def test_examples_fit_short_rows(tokenizer):
    for generator in (word_problems, code_tasks, instructions):
        documents = tokenize(generator(per_template=10), tokenizer, 160)
        assert documents.truncated == documents.dropped == 0
