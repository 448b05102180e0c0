"""Procedural word problems in the form of GSM8K: steps with their arithmetic, then `#### answer`.

A template is a question, its numbers, and its solution, in which `[name=expression]` stands for a step: it is
written as `3 * 4 = 12` and names the result for later steps. The last result is the answer. Validation holds
whole templates out, so it measures problems of kinds never seen in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data.example import Example

NAMES = (
    "Ada", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena",
    "Marco", "Nina", "Omar", "Paula", "Quinn", "Rosa", "Samir", "Tara", "Ugo", "Vera", "Walid", "Xenia",
    "Yusuf", "Zoe", "Aiko", "Bruno", "Chloe", "Dario", "Emma", "Felix", "Gita", "Hana", "Ivan", "Julia",
    "Kofi", "Lars", "Mina", "Noah",
)  # fmt: skip
ITEMS = (
    "apples", "pencils", "books", "marbles", "stickers", "cookies", "oranges", "stamps", "shells",
    "cards", "buttons", "candles", "flowers", "balloons", "eggs", "postcards", "bottles", "muffins",
    "beads", "notebooks",
)  # fmt: skip
SHOPS = ("bakery", "bookshop", "market", "museum", "kiosk", "supermarket", "theatre", "club")
_STEP = re.compile(r"\[(\w+)=([^\]]+)\]")
_OPERATOR = re.compile(r"([-+*/])")


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    Attributes:
        name: the key of the validation split.
        question: text with `{name}`, `{other}`, `{item}`, `{shop}` and the numbers by name.
        numbers: `(lowest, highest)`, or an expression over the numbers before it.
        solution: one step a line.
        where: an expression that must hold.
    """

    name: str
    question: str
    numbers: dict[str, tuple[int, int] | str]
    solution: str
    where: str = "True"


TEMPLATES = (
    Template(
        "gain",
        "{name} has {a} {item}. {other} gives {name} {b} more. How many {item} does {name} have now?",
        {"a": (3, 60), "b": (2, 40)},
        "{name} now has [x={a}+{b}] {item}.",
    ),
    Template(
        "loss",
        "{name} had {a} {item} and gave {b} of them to {other}. How many {item} are left?",
        {"b": (2, 40), "a": "b+rng.randint(1,50)"},
        "There are [x={a}-{b}] {item} left.",
    ),
    Template(
        "gain_loss",
        "{name} has {a} {item}, buys {b} more and then loses {c}. How many {item} remain?",
        {"a": (5, 60), "b": (2, 30), "c": (1, 12)},
        "After buying there are [x={a}+{b}] {item}.\nAfter losing some there are [y={x}-{c}] {item}.",
        where="a+b>c",
    ),
    Template(
        "boxes",
        "{name} packs {a} {item} into each of {b} boxes. How many {item} does {name} pack?",
        {"a": (2, 25), "b": (2, 12)},
        "{name} packs [x={a}*{b}] {item}.",
    ),
    Template(
        "boxes_loose",
        "A {shop} has {b} boxes with {a} {item} each and {c} loose ones. How many {item} is that?",
        {"a": (3, 24), "b": (2, 12), "c": (1, 20)},
        "The boxes hold [x={a}*{b}] {item}.\nTogether that is [y={x}+{c}] {item}.",
    ),
    Template(
        "share",
        "{name} shares {t} {item} equally among {a} friends. How many does each friend get?",
        {"a": (2, 12), "q": (2, 20), "t": "a*q"},
        "Each friend gets [x={t}/{a}] {item}.",
    ),
    Template(
        "share_rest",
        "{name} keeps {c} of {t} {item} and shares the rest equally among {a} friends. How many does "
        "each friend get?",
        {"a": (2, 9), "q": (2, 15), "c": (1, 20), "t": "a*q+c"},
        "There are [x={t}-{c}] {item} to share.\nEach friend gets [y={x}/{a}] {item}.",
    ),
    Template(
        "cost",
        "One of the {item} costs ${p}. How many dollars do {a} {item} cost?",
        {"p": (2, 30), "a": (2, 15)},
        "They cost [x={a}*{p}] dollars.",
    ),
    Template(
        "change",
        "{name} buys {a} {item} at ${p} each and pays with ${m}. How many dollars of change are due?",
        {"p": (2, 12), "a": (2, 8), "m": "(a*p//50+1)*50"},
        "The {item} cost [x={a}*{p}] dollars.\nThe change is [y={m}-{x}] dollars.",
    ),
    Template(
        "two_goods",
        "At the {shop} {name} buys {a} {item} for ${p} each and a bag for ${q}. How many dollars "
        "does {name} spend?",
        {"a": (2, 12), "p": (2, 12), "q": (3, 40)},
        "The {item} cost [x={a}*{p}] dollars.\nWith the bag it is [y={x}+{q}] dollars.",
    ),
    Template(
        "saving",
        "{name} saves ${p} every week. How many weeks does it take to save ${t}?",
        {"p": (3, 25), "w": (2, 20), "t": "p*w"},
        "It takes [x={t}/{p}] weeks.",
    ),
    Template(
        "saving_start",
        "{name} has ${a} and saves ${p} every week. How many dollars does {name} have after {w} weeks?",
        {"a": (5, 90), "p": (3, 25), "w": (2, 12)},
        "In {w} weeks {name} saves [x={p}*{w}] dollars.\nWith the first money that is [y={a}+{x}] dollars.",
    ),
    Template(
        "saving_goal",
        "{name} wants a bicycle for ${t}, has ${a} already and saves ${p} a week. How many weeks are needed?",
        {"p": (5, 25), "w": (2, 12), "a": (10, 90), "t": "a+p*w"},
        "{name} still needs [x={t}-{a}] dollars.\nThat takes [y={x}/{p}] weeks.",
    ),
    Template(
        "wage",
        "{name} earns ${p} an hour and works {h} hours a day. How many dollars does {name} earn in {d} days?",
        {"p": (8, 25), "h": (2, 9), "d": (2, 7)},
        "In a day {name} earns [x={p}*{h}] dollars.\nIn {d} days that is [y={x}*{d}] dollars.",
    ),
    Template(
        "overtime",
        "{name} earns ${p} an hour for {h} hours and ${q} an hour for {o} hours of overtime. How "
        "many dollars is that in all?",
        {"p": (8, 20), "h": (5, 40), "q": (21, 35), "o": (1, 8)},
        "The normal hours pay [x={p}*{h}] dollars.\n"
        "The overtime pays [y={q}*{o}] dollars.\n"
        "In all that is [z={x}+{y}] dollars.",
    ),
    Template(
        "distance",
        "A train travels {v} miles an hour for {h} hours. How many miles does it travel?",
        {"v": (20, 90), "h": (2, 9)},
        "It travels [x={v}*{h}] miles.",
    ),
    Template(
        "two_legs",
        "{name} cycles {v} miles an hour for {h} hours, then walks {w} miles. How many miles is that?",
        {"v": (6, 18), "h": (1, 5), "w": (1, 9)},
        "Cycling covers [x={v}*{h}] miles.\nAltogether it is [y={x}+{w}] miles.",
    ),
    Template(
        "speed",
        "{name} drives {d} miles in {h} hours. How many miles is that in one hour?",
        {"h": (2, 8), "v": (20, 70), "d": "h*v"},
        "That is [x={d}/{h}] miles in one hour.",
    ),
    Template(
        "times_as_many",
        "{other} has {a} {item}. {name} has {k} times as many. How many do they have together?",
        {"a": (2, 30), "k": (2, 6)},
        "{name} has [x={a}*{k}] {item}.\nTogether they have [y={a}+{x}] {item}.",
    ),
    Template(
        "more_than",
        "{other} has {a} {item}. {name} has {b} more than {other}. How many do they have together?",
        {"a": (2, 60), "b": (2, 30)},
        "{name} has [x={a}+{b}] {item}.\nTogether they have [y={a}+{x}] {item}.",
    ),
    Template(
        "fewer_than",
        "{name} has {a} {item}. {other} has {b} fewer. How many {item} do they have in all?",
        {"b": (1, 25), "a": "b+rng.randint(2,40)"},
        "{other} has [x={a}-{b}] {item}.\nIn all they have [y={a}+{x}] {item}.",
    ),
    Template(
        "half",
        "{name} has {t} {item} and gives half of them to {other}. How many {item} does {name} keep?",
        {"q": (2, 60), "t": "2*q"},
        "{name} keeps [x={t}/2] {item}.",
    ),
    Template(
        "half_then",
        "Half of the {t} {item} in a {shop} are sold in the morning and {b} in the afternoon. How "
        "many are left?",
        {"q": (12, 80), "t": "2*q", "b": (1, 11)},
        "In the morning [x={t}/2] {item} are sold.\n"
        "Then [y={t}-{x}] are left.\n"
        "At the end [z={y}-{b}] are left.",
    ),
    Template(
        "rows",
        "A garden has {r} rows of {c} plants. {d} plants die. How many plants are left?",
        {"r": (3, 15), "c": (3, 15), "d": (1, 8)},
        "There were [x={r}*{c}] plants.\nNow [y={x}-{d}] are left.",
    ),
    Template(
        "pages",
        "A book has {t} pages. {name} reads {p} pages a day for {d} days. How many pages are left?",
        {"p": (5, 30), "d": (2, 9), "t": "p*d+rng.randint(5,120)"},
        "{name} reads [x={p}*{d}] pages.\nThere are [y={t}-{x}] pages left.",
    ),
    Template(
        "days_to_read",
        "{name} has read {a} pages of a book of {t} pages and reads {p} pages a day. How many more "
        "days does it take?",
        {"p": (5, 30), "d": (2, 9), "a": (10, 90), "t": "a+p*d"},
        "There are [x={t}-{a}] pages left.\nThat takes [y={x}/{p}] days.",
    ),
    Template(
        "legs",
        "A farm has {a} cows and {b} hens. How many legs do the animals have together?",
        {"a": (2, 25), "b": (2, 25)},
        "The cows have [x={a}*4] legs.\nThe hens have [y={b}*2] legs.\nTogether they have [z={x}+{y}] legs.",
    ),
    Template(
        "perimeter",
        "A field is {a} metres long and {b} metres wide. How many metres of fence go around it?",
        {"a": (5, 60), "b": (3, 40)},
        "One long and one short side make [x={a}+{b}] metres.\nThe fence is [y=2*{x}] metres.",
    ),
    Template(
        "area",
        "A floor is {a} metres long and {b} metres wide. Tiles cost ${p} a square metre. How many "
        "dollars do the tiles cost?",
        {"a": (2, 12), "b": (2, 12), "p": (2, 20)},
        "The floor has [x={a}*{b}] square metres.\nThe tiles cost [y={x}*{p}] dollars.",
    ),
    Template(
        "percent",
        "A coat costs ${t}. It is reduced by {p} percent. How many dollars does it cost now?",
        {"k": (1, 40), "p": "rng.choice([5,10,20,25,50])", "t": "20*k"},
        "The reduction is [x={t}*{p}/100] dollars.\nNow it costs [y={t}-{x}] dollars.",
    ),
    Template(
        "ages",
        "{name} is {a} years old. {other} is {b} years older. How old will {other} be in {c} years?",
        {"a": (4, 40), "b": (2, 20), "c": (2, 15)},
        "{other} is [x={a}+{b}] years old.\nIn {c} years {other} will be [y={x}+{c}].",
    ),
    Template(
        "age_twice",
        "{name} is {a} years old and {other} is twice as old. How many years older is {other}?",
        {"a": (4, 40)},
        "{other} is [x=2*{a}] years old.\n{other} is [y={x}-{a}] years older.",
    ),
    Template(
        "hours_minutes",
        "A film lasts {h} hours and {m} minutes. How many minutes is that?",
        {"h": (1, 4), "m": (5, 55)},
        "The hours are [x={h}*60] minutes.\nTogether that is [y={x}+{m}] minutes.",
    ),
    Template(
        "dozens",
        "{name} buys {a} dozen eggs and breaks {b} of them. How many whole eggs are left?",
        {"a": (2, 12), "b": (1, 10)},
        "{name} buys [x={a}*12] eggs.\nThere are [y={x}-{b}] whole eggs left.",
    ),
    Template(
        "bus",
        "A bus has {a} passengers. At one stop {b} get off and {c} get on. How many are on the bus now?",
        {"b": (2, 20), "a": "b+rng.randint(3,30)", "c": (2, 20)},
        "After {b} get off there are [x={a}-{b}] passengers.\nNow there are [y={x}+{c}] passengers.",
    ),
    Template(
        "tickets",
        "A {shop} sells {a} tickets for adults at ${p} and {b} tickets for children at ${q}. How "
        "many dollars is that?",
        {"a": (2, 15), "p": (8, 20), "b": (2, 15), "q": (2, 7)},
        "The adults pay [x={a}*{p}] dollars.\n"
        "The children pay [y={b}*{q}] dollars.\n"
        "Together they pay [z={x}+{y}] dollars.",
    ),
    Template(
        "average",
        "{name} scores {a}, {b} and {c} points in three games. What is the average?",
        {"a": (5, 40), "b": (5, 40), "q": (10, 35), "c": "3*q-a-b"},
        "The sum is [x={a}+{b}+{c}] points.\nThe average is [y={x}/3] points.",
        where="c>0",
    ),
    Template(
        "recipe",
        "A recipe for {a} people needs {b} eggs. How many eggs are needed for {c} people?",
        {"a": (2, 6), "k": (2, 6), "b": (2, 9), "c": "a*k"},
        "That is [x={c}/{a}] times the recipe.\nIt needs [y={b}*{x}] eggs.",
    ),
    Template(
        "tank",
        "A tank holds {t} litres and loses {p} litres an hour. How many litres are left after {h} hours?",
        {"p": (2, 15), "h": (2, 9), "t": "p*h+rng.randint(5,90)"},
        "It loses [x={p}*{h}] litres.\nThere are [y={t}-{x}] litres left.",
    ),
    Template(
        "profit",
        "{name} buys {a} {item} for ${p} each and sells all of them for ${q} each. How many dollars "
        "of profit is that?",
        {"a": (2, 20), "p": (2, 12), "g": (1, 9), "q": "p+g"},
        "The profit on each is [x={q}-{p}] dollars.\nOn all it is [y={x}*{a}] dollars.",
    ),
    Template(
        "teams",
        "{a} girls and {b} boys form teams of {k}. How many teams are there?",
        {"k": (2, 8), "n": (3, 9), "a": (2, 12), "b": "k*n-a"},
        "There are [x={a}+{b}] children.\nThey form [y={x}/{k}] teams.",
        where="b>1",
    ),
    Template(
        "three_days",
        "{name} picks {a} {item} on Monday, twice as many on Tuesday and {b} on Wednesday. How many "
        "{item} is that?",
        {"a": (3, 30), "b": (2, 30)},
        "On Tuesday {name} picks [x=2*{a}] {item}.\n"
        "Until Tuesday it is [y={a}+{x}].\n"
        "In all it is [z={y}+{b}] {item}.",
    ),
)


def word_problems(per_template: int = 96, seed: int = 0) -> Iterator[Example]:
    """`per_template` distinct problems of each template, in an order that mixes the templates."""
    made = []
    for template in TEMPLATES:
        rng = random.Random(f"{seed}/{template.name}")
        questions: set[str] = set()
        for _ in range(20 * per_template):
            if len(questions) == per_template:
                break
            example = _problem(template, rng)
            question = example.messages[0]["content"]
            if question not in questions:
                questions.add(question)
                made.append(example)
        assert len(questions) == per_template, f"{template.name} has too few distinct problems"
    random.Random(seed).shuffle(made)
    yield from made


def _problem(template: Template, rng: random.Random) -> Example:
    """One problem of a template."""
    while True:
        values: dict[str, int] = {}
        for name, choice in template.numbers.items():
            values[name] = (
                eval(choice, {"rng": rng}, values) if isinstance(choice, str) else rng.randint(*choice)
            )
        if eval(template.where, {}, values):
            break
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "item": rng.choice(ITEMS), "shop": rng.choice(SHOPS)}
    lines = []
    for line in template.solution.split("\n"):
        # text, name, expression, text, ...
        pieces = _STEP.split(line)
        for i in range(1, len(pieces), 3):
            expression = pieces[i + 1].format(**values)
            exact = eval(expression)
            result = values[pieces[i]] = round(exact)
            assert result == exact and result >= 0, f"{template.name}: {expression}"
            pieces[i], pieces[i + 1] = _OPERATOR.sub(r" \1 ", expression), f" = {result}"
        lines.append("".join(pieces).format(**words, **values))
    answer = "\n".join([*lines, f"#### {result}"])
    question = template.question.format(**words, **values)
    return Example(
        family="reasoning",
        messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        dataset="word_problems",
        template=template.name,
        prompt_format="problem",
    )
