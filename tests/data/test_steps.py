"""Labelled steps: where they end, what mistakes look like, how the model's own answers join them."""

import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from data import steps
from data.example import Example
from data.loader import prepare, prepare_rows
from data.packing import PackedDataset
from data.prompts import IGNORED
from data.steps import OwnAnswers, StepEnds, calculated, carried, corrupt, lines_of, step_documents
from data.word_problems import word_problems
from training.config import DataArguments

from .conftest import make_loader, write_jsonl


def solution(may: str, both: str) -> list[str]:
    """A solution in GSM8K's form with these two calculations."""
    (first, in_may), (second, total) = may.split("="), both.split("=")
    return [
        f"Natalia sold {first} = <<{may}>>{in_may} clips in May.",
        f"Natalia sold {second} = <<{both}>>{total} clips altogether.",
        f"#### {total}",
    ]


GSM8K = solution("48/2=24", "48+24=72")
QUESTION = "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?"


def gsm8k(question: str = QUESTION, lines=GSM8K) -> Example:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "\n".join(lines)}]
    return Example("reasoning", turns, "gsm8k", prompt_format="problem")


@pytest.fixture(scope="module")
def problems():
    return list(word_problems(per_template=4))


def test_steps_end_with_their_line_or_with_the_answer(tokenizer):
    text = "1 + 1 = 2.\n\n\nSo (2):\n#### 2"
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ends = StepEnds(tokenizer)(tokens)
    pieces = [
        tokenizer.decode(tokens[a:b])
        for a, b in zip([0, *(e + 1 for e in ends)], [e + 1 for e in ends], strict=False)
    ]
    assert [piece.strip() for piece in pieces] == ["1 + 1 = 2.", "So (2):", "#### 2<|im_end|>"]
    assert ends[-1] == len(tokens) - 1


def test_a_blank_line_alone_is_no_step(tokenizer):
    (newline,) = tokenizer("\n")["input_ids"]
    assert StepEnds(tokenizer)([newline, newline, *tokenizer("x")["input_ids"], newline, newline]) == [3]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", 24),
        ("2 * 3 + 4", 10),
        ("2+3*4", 14),
        ("$10 - 4 - 3", 3),
        ("1,000/8", 125),
        ("7/2", Fraction(7, 2)),
        ("1/0", None),
    ],
)
def test_expressions_are_calculated(text, value):
    assert calculated(text) == value


def test_products_may_be_written_with_x():
    line = "At a price of $3 it is 4 x $3 = $<<4*3=12>>12."
    changed = corrupt([line], "", [], Choices(0, "operator", "*", "+"))
    assert changed == (["At a price of $3 it is 4 + 3 = $<<4+3=7>>7."], 0)
    wrong = corrupt([line], "", [], Choices(0, "operand", "4", 5))
    assert wrong == (["At a price of $3 it is 5 x 3 = $<<5*3=15>>15."], 0)


def test_what_follows_a_wrong_number_is_calculated_anew():
    assert carried(GSM8K[1:], {Fraction(24): Fraction(25)}) == [
        "Natalia sold 48+25 = <<48+25=73>>73 clips altogether.",
        "#### 73",
    ]


class Choices(random.Random):
    """Draws that the test has written down."""

    def __init__(self, place, kind, *drawn):
        super().__init__(0)
        self.place, self.kind, self.drawn = place, kind, list(drawn)

    def randrange(self, _count):
        return self.place

    def choices(self, _kinds, _weights):
        return [self.kind]

    def choice(self, options):
        wanted = self.drawn.pop(0)
        return next(o for o in options if wanted in (o, getattr(o, "group", lambda: None)()))


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ((0, "result", 25), solution("48/2=25", "48+25=73")),
        ((0, "operator", "/", "*"), solution("48*2=96", "48+96=144")),
        ((1, "operand", "48", 30), solution("48/2=24", "30+24=54")),
        ((2, "result", 75), [*GSM8K[:2], "#### 75"]),
        ((1, "foreign", "It is 5 + 5 = 10."), [GSM8K[0], "It is 5 + 5 = 10."]),
    ],
)  # fmt: skip
def test_each_kind_of_mistake(draws, expected):
    other = ["It is 5 + 5 = 10.", "#### 10"]
    assert corrupt(GSM8K, QUESTION, other, Choices(*draws)) == (expected, draws[0])


def test_mistakes_in_real_data_are_wrong_and_leave_what_stands_before(problems):
    rng, kinds = random.Random(0), set()
    for example, other in zip(problems[1:], problems, strict=False):
        lines = lines_of(example.answer())
        changed, place = corrupt(lines, example.messages[0]["content"], lines_of(other.answer()), rng)
        assert changed[:place] == lines[:place] and changed[place] != lines[place]
        kinds.add((len(changed) == len(lines), place))
        expression, before = (steps._EQUATION.search(line) for line in (changed[place], lines[place]))
        if expression and before and len(changed) == len(lines):
            right = steps.spelt(calculated(expression[1])) == expression[2]
            same = before[1] == expression[1]
            assert right != same, "either the result is wrong or the calculation is another"
    assert len(kinds) > 4


def decoded_steps(documents, tokenizer) -> list[tuple[str, list[tuple[str, int]]]]:
    """(prompt, [(step, value)]) of each document, cut by its labels alone."""
    found = []
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        tokens, values = documents.tokens[start:end].tolist(), documents.values[start:end].tolist()
        ends = [i for i, value in enumerate(values) if value != IGNORED]
        text = [
            tokenizer.decode(tokens[a:b])
            for a, b in zip([0, *(e + 1 for e in ends)], [e + 1 for e in ends], strict=False)
        ]
        prompt, _, text[0] = text[0].partition("Solution:\n")
        found.append((prompt, [(step.strip(), values[e]) for step, e in zip(text, ends, strict=True)]))
    return found


def test_documents_are_right_up_to_a_mistake(problems, tokenizer):
    documents = step_documents(problems, tokenizer, 512)
    assert len(documents) == len(problems) and not documents.targets.any()
    gold = 0
    for example, (prompt, labelled) in zip(problems, decoded_steps(documents, tokenizer), strict=True):
        assert example.messages[0]["content"] in prompt
        own = lines_of(example.answer())
        own[-1] += "<|im_end|>"
        values = [value for _, value in labelled]
        right = sum(values)
        assert values == [1] * right + [0] * (len(values) - right)
        assert [step for step, _ in labelled[:right]] == own[:right]
        gold += right == len(values)
        if right < len(values):
            assert labelled[right][0] != own[right]
    assert 0.2 < gold / len(problems) < 0.5
    share = (documents.values == 1).sum() / (documents.values != IGNORED).sum()
    assert 0.4 < share < 0.65


def test_documents_are_the_same_every_time_and_others_with_another_seed(problems, tokenizer):
    first, again, other = (step_documents(problems, tokenizer, 512, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.values, again.values)
    assert not np.array_equal(first.tokens, other.tokens)


def test_long_documents_are_cut_and_those_without_a_step_left_out(tokenizer):
    whole = step_documents([gsm8k()], tokenizer, 512)
    first = int(np.flatnonzero(whole.values != IGNORED)[0]) + 1
    assert step_documents([gsm8k()], tokenizer, first).lengths().tolist() == [first]
    assert len(step_documents([gsm8k()], tokenizer, first - 1)) == 0


def test_other_families_have_no_steps(tokenizer):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "3 + 4 = 7"}]
    assert len(step_documents([Example("chat", turns, "x")], tokenizer, 64)) == 0


# -- in the data of a run ------------------------------------------------------------------------------------


def rows(count: int) -> list[dict]:
    return [
        {"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in range(1, count)
    ]


@pytest.fixture(scope="module")
def data(tokenizer):
    return prepare_rows(rows(60), DataArguments(max_length=64), tokenizer, steps=True)


def test_without_steps_nothing_changes(data, tokenizer):
    plain = prepare_rows(rows(60), DataArguments(max_length=64), tokenizer)
    assert not plain.problems and "steps" not in plain.report[0] and "value_labels" not in plain.train[0]
    for i in range(len(plain.train)):  # the rows of steps stand behind
        assert all(torch.equal(x, data.train[i][name]) for name, x in plain.train[i].items())
        assert (data.train[i]["value_labels"] == IGNORED).all()
    assert plain.train.num_targets == data.train.num_targets
    assert all("value_labels" not in validation[0] for validation in data.validation.values())


def test_every_label_comes_in_some_row(data):
    labels = torch.stack([data.train[i]["value_labels"] for i in range(len(data.train))])
    assert int((labels != IGNORED).sum()) == data.report[0]["steps"] > 100
    assert (data.train[-1]["value_labels"] == IGNORED).all() and len(data.problems) == data.report[0]["rows"]


def test_the_cache_keeps_steps_apart_from_data_without(tmp_path, arguments, tokenizer):
    args = arguments(write_jsonl(tmp_path / "a.jsonl", rows(60)))
    plain, first, again = (prepare(args, tokenizer, 0, steps=on) for on in (False, True, True))
    assert len(list(Path(args.cache_dir).iterdir())) == 2
    assert not plain.train.has_values and first.train.has_values
    assert first.problems == again.problems and first.report == again.report
    assert all(
        torch.equal(first.train[i]["value_labels"], again.train[i]["value_labels"])
        for i in range(len(first.train))
    )


def test_a_stream_has_steps_too(tmp_path, arguments, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", rows(60))
    made = prepare(arguments(path, streaming=True, max_length=64), tokenizer, 0, steps=True)
    batches = [batch for step in make_loader(made).epoch(0) for batch in step]
    assert sum(int((batch["value_labels"] != IGNORED).sum()) for batch in batches) > 100
    assert made.problems and made.report[0]["steps"] is None


# -- the model's own answers ---------------------------------------------------------------------------------


def answering(prompts, _most, _seed):
    """A model that is right about every other question."""
    numbers = [int(prompt.split("What is ")[1].split(" ")[0]) for prompt in prompts]
    return [f"{n} + {n} = {2 * n}\n#### {2 * n + i % 2}" for i, n in enumerate(numbers)]


def own_answers(data, tokenizer, **settings) -> OwnAnswers:
    return OwnAnswers(data.problems, tokenizer, **{"interval": 5, "max_length": 64, "seed": 0, **settings})


def mixed(data, own, step=7, **split):
    """The rows of one step after mixing, over all ranks and microbatches in the order of the step."""
    found = {}
    for rank in range(split.get("world", 1)):
        loader = make_loader(data, rank=rank, **split)
        microbatches = next(iter(loader.epoch(0)))
        own.mix(microbatches, loader, step)
        for batch, places in zip(microbatches, loader.slices, strict=True):
            for row, place in enumerate(places.tolist()):
                found[place] = {name: x[row].tolist() for name, x in batch.items()}
    return [found[place] for place in sorted(found)]


def test_own_answers_are_labelled_by_whether_they_are_right(data, tokenizer):
    own = own_answers(data, tokenizer)
    own.refresh(answering, 5)
    labelled = decoded_steps(own.documents, tokenizer)
    assert len(labelled) == steps.ASKED * steps.ANSWERS
    for prompt, found in labelled:
        number = int(prompt.split("What is ")[1].split(" ")[0])
        answer = int(found[-1][0].removeprefix("#### ").removesuffix("<|im_end|>"))
        assert {value for _, value in found} == {int(answer == 2 * number)} and len(found) == 2
    assert 0.4 < np.mean([found[0][1] for _, found in labelled]) < 0.6


def test_answers_are_drawn_when_they_are_due(data, tokenizer):
    own, asked = own_answers(data, tokenizer), []

    def generate(prompts, most, seed):
        asked.append((step, len(prompts), seed))
        return answering(prompts, most, seed)

    for step in range(12):
        own.refresh(generate, step)
    assert [step for step, _, _ in asked] == [5, 10] and asked[0][2] != asked[1][2]


def test_they_take_the_place_of_rows_with_steps_and_of_no_others(data, tokenizer):
    own = own_answers(data, tokenizer)
    before = mixed(data, own, micro=12)
    own.refresh(answering, 5)
    after, fresh = (
        mixed(data, own, micro=12),
        [own.rows[i]["input_ids"].tolist() for i in range(len(own.rows))],
    )
    changed = [new != old for new, old in zip(after, before, strict=True)]
    with_steps = [any(label != IGNORED for label in row["value_labels"]) for row in before]
    assert 0 < sum(changed) < sum(with_steps) and not any(
        c and not w for c, w in zip(changed, with_steps, strict=True)
    )
    assert all(row["input_ids"] in fresh for row, is_new in zip(after, changed, strict=True) if is_new)
    assert mixed(data, own, micro=12, step=8) != after


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(4, 3, 1), (3, 2, 2), (1, 4, 3)])
def test_ranks_and_microbatches_change_nothing(data, tokenizer, micro, accumulation, world):
    own = own_answers(data, tokenizer)
    own.refresh(answering, 5)
    split = mixed(data, own, micro=micro, accumulation=accumulation, world=world)
    assert split == mixed(data, own, micro=12)


def test_a_checkpoint_keeps_them(data, tokenizer, tmp_path):
    own, resumed = own_answers(data, tokenizer), own_answers(data, tokenizer)
    own.refresh(answering, 5)
    own.save(tmp_path / "own_answers.npz")
    resumed.load(tmp_path / "own_answers.npz")
    assert mixed(data, resumed, micro=12) == mixed(data, own, micro=12)
    assert isinstance(resumed.rows, PackedDataset) and resumed.rows.num_targets == 0
