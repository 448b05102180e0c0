"""Procedural programming tasks with unit tests.

A template is a description, a solution and calls to test it with; `{k}` is a number, `{f}` the function's
name and `{x}` its argument's. The expected results are those of the template's own solution. Validation holds
whole templates out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from data.example import Example

_OPENINGS = (
    "Write a Python function `{head}` that {what}.",
    "Implement `{head}` in Python. It {what}.",
    "Define a function `{head}` which {what}.",
    "Complete the Python function `{head}`: it {what}.",
)
INPUTS = {
    "number": (0, 1, 5, 9, 12, -3, 30),
    "list": (
        [],
        [3, 1, 2],
        [5, 11, -2, 8],
        [10, 0, 7, 7, 4, -1, 3],
        [2, 4, 6, 9, 12, 15, 20, 31, 33, 11, 13, 5, 1, 8],
    ),
    "text": (
        "",
        "a",
        "level",
        "Hello World",
        "one two  three",
        "a responsibility of international organisations",
    ),
}
ARGUMENTS = {
    "number": ("x", "n", "value", "number"),
    "list": ("numbers", "values", "items", "data"),
    "text": ("text", "s", "string", "line"),
}


@dataclass(frozen=True)
class Task:
    """A kind of function: `names` to choose from, the `kind` of its argument, what it does, and its body."""

    names: tuple[str, ...]
    kind: str
    what: str
    body: str


TASKS = (
    Task(
        ("add_{k}", "plus_{k}", "increase_by_{k}"),
        "number",
        "returns {x} plus {k}",
        "return {x} + {k}",
    ),
    Task(
        ("subtract_{k}", "minus_{k}", "decrease_by_{k}"),
        "number",
        "returns {x} minus {k}",
        "return {x} - {k}",
    ),
    Task(
        ("times_{k}", "multiply_by_{k}"),
        "number",
        "returns {x} times {k}",
        "return {x} * {k}",
    ),
    Task(
        ("divide_by_{k}", "over_{k}"),
        "number",
        "returns {x} divided by {k} without the rest",
        "return {x} // {k}",
    ),
    Task(
        ("remainder_{k}", "mod_{k}"),
        "number",
        "returns the remainder of {x} divided by {k}",
        "return {x} % {k}",
    ),
    Task(
        ("is_multiple_of_{k}", "divisible_by_{k}"),
        "number",
        "tells whether {x} is divisible by {k}",
        "return {x} % {k} == 0",
    ),
    Task(
        ("above_{k}", "is_greater_than_{k}"),
        "number",
        "tells whether {x} is greater than {k}",
        "return {x} > {k}",
    ),
    Task(
        ("at_most_{k}", "cap_at_{k}"),
        "number",
        "returns {x}, but never more than {k}",
        "return min({x}, {k})",
    ),
    Task(
        ("at_least_{k}", "floor_at_{k}"),
        "number",
        "returns {x}, but never less than {k}",
        "return max({x}, {k})",
    ),
    Task(
        ("distance_to_{k}", "gap_to_{k}"),
        "number",
        "returns the distance between {x} and {k}",
        "return abs({x} - {k})",
    ),
    Task(
        ("sum_to_plus_{k}", "triangle_plus_{k}"),
        "number",
        "returns the sum of the whole numbers from 1 to {x}, plus {k}",
        "return sum(range(1, {x} + 1)) + {k}",
    ),
    Task(
        ("digits_sum_plus_{k}", "digit_total_plus_{k}"),
        "number",
        "returns the sum of the digits of {x}, plus {k}",
        "return sum(int(digit) for digit in str(abs({x}))) + {k}",
    ),
    Task(
        ("add_{k}_to_all", "raise_all_by_{k}"),
        "list",
        "adds {k} to every number in {x}",
        "return [item + {k} for item in {x}]",
    ),
    Task(
        ("scale_by_{k}", "multiply_all_by_{k}"),
        "list",
        "multiplies every number in {x} by {k}",
        "return [item * {k} for item in {x}]",
    ),
    Task(
        ("keep_above_{k}", "greater_than_{k}"),
        "list",
        "returns the numbers in {x} that are greater than {k}",
        "return [item for item in {x} if item > {k}]",
    ),
    Task(
        ("keep_below_{k}", "less_than_{k}"),
        "list",
        "returns the numbers in {x} that are less than {k}",
        "return [item for item in {x} if item < {k}]",
    ),
    Task(
        ("multiples_of_{k}", "keep_multiples_of_{k}"),
        "list",
        "returns the numbers in {x} that {k} divides",
        "return [item for item in {x} if item % {k} == 0]",
    ),
    Task(
        ("count_above_{k}", "how_many_above_{k}"),
        "list",
        "counts the numbers in {x} that are greater than {k}",
        "return sum(1 for item in {x} if item > {k})",
    ),
    Task(
        ("first_{k}", "take_{k}"),
        "list",
        "returns the first {k} items of {x}",
        "return {x}[:{k}]",
    ),
    Task(
        ("last_{k}", "tail_{k}"),
        "list",
        "returns the last {k} items of {x}",
        "return {x}[-{k}:]",
    ),
    Task(
        ("drop_{k}", "skip_{k}"),
        "list",
        "returns {x} without its first {k} items",
        "return {x}[{k}:]",
    ),
    Task(
        ("every_{k}", "step_{k}"),
        "list",
        "returns every item of {x} at a distance of {k}",
        "return {x}[::{k}]",
    ),
    Task(
        ("contains_{k}", "has_{k}"),
        "list",
        "tells whether {k} is in {x}",
        "return {k} in {x}",
    ),
    Task(
        ("without_{k}", "remove_{k}"),
        "list",
        "returns {x} without every {k}",
        "return [item for item in {x} if item != {k}]",
    ),
    Task(
        ("sum_of_squares_plus_{k}", "square_total_plus_{k}"),
        "list",
        "returns the sum of the squares of {x}, plus {k}",
        "return sum(item * item for item in {x}) + {k}",
    ),
    Task(
        ("largest_or_{k}", "max_or_{k}"),
        "list",
        "returns the largest number in {x}, or {k} if there is none",
        "return max({x}, default={k})",
    ),
    Task(
        ("smallest_or_{k}", "min_or_{k}"),
        "list",
        "returns the smallest number in {x}, or {k} if there is none",
        "return min({x}, default={k})",
    ),
    Task(
        ("sorted_first_{k}", "smallest_{k}"),
        "list",
        "returns the {k} smallest numbers of {x} in order",
        "return sorted({x})[:{k}]",
    ),
    Task(
        ("reversed_first_{k}", "backwards_{k}"),
        "list",
        "returns the first {k} items of {x} in reverse order",
        "return {x}[:{k}][::-1]",
    ),
    Task(
        ("running_total_from_{k}", "cumulative_from_{k}"),
        "list",
        "returns the running totals of {x}, starting at {k}",
        "total = {k}\n"
        "    totals = []\n"
        "    for item in {x}:\n"
        "        total += item\n"
        "        totals.append(total)\n"
        "    return totals",
    ),
    Task(
        ("index_of_{k}", "position_of_{k}"),
        "list",
        "returns the position of {k} in {x}, or -1 if it is not there",
        "return {x}.index({k}) if {k} in {x} else -1",
    ),
    Task(
        ("repeat_{k}", "copies_{k}"),
        "text",
        "returns {x} repeated {k} times",
        "return {x} * {k}",
    ),
    Task(
        ("prefix_{k}", "head_{k}"),
        "text",
        "returns the first {k} characters of {x}",
        "return {x}[:{k}]",
    ),
    Task(
        ("suffix_{k}", "ending_{k}"),
        "text",
        "returns the last {k} characters of {x}",
        "return {x}[-{k}:]",
    ),
    Task(
        ("longer_than_{k}", "exceeds_{k}"),
        "text",
        "tells whether {x} has more than {k} characters",
        "return len({x}) > {k}",
    ),
    Task(
        ("pad_to_{k}", "fill_to_{k}"),
        "text",
        "fills {x} with spaces on the right to {k} characters",
        "return {x}.ljust({k})",
    ),
    Task(
        ("words_longer_than_{k}", "long_words_{k}"),
        "text",
        "returns the words of {x} with more than {k} letters",
        "return [word for word in {x}.split() if len(word) > {k}]",
    ),
    Task(
        ("first_{k}_words", "take_{k}_words"),
        "text",
        "returns the first {k} words of {x} as a list",
        "return {x}.split()[:{k}]",
    ),
    Task(
        ("reverse_prefix_{k}", "mirror_{k}"),
        "text",
        "returns the first {k} characters of {x} in reverse order",
        "return {x}[:{k}][::-1]",
    ),
    Task(
        ("upper_first_{k}", "shout_{k}"),
        "text",
        "returns {x} with its first {k} characters in capitals",
        "return {x}[:{k}].upper() + {x}[{k}:]",
    ),
)


def code_tasks(per_template: int = 60, seed: int = 0) -> Iterator[Example]:
    """`per_template` distinct tasks of each template, in an order that mixes the templates."""
    made = []
    for task in TASKS:
        rng = random.Random(f"{seed}/{task.names[0]}")
        choices = [
            (name, k, argument, opening)
            for name in task.names
            for k in range(2, 12)
            for argument in ARGUMENTS[task.kind]
            for opening in _OPENINGS
        ]
        made += [_example(task, *choice) for choice in rng.sample(choices, per_template)]
    random.Random(seed).shuffle(made)
    yield from made


def _example(task: Task, name: str, k: int, argument: str, opening: str) -> Example:
    function = name.format(k=k)
    words = {"k": k, "x": argument}
    head = f"{function}({argument})"
    solution = f"def {head}:\n    {task.body.format(**words)}"
    scope: dict = {}
    exec(solution, scope)
    calls = ((function, value, scope[function](value)) for value in INPUTS[task.kind])
    return Example(
        family="code",
        messages=[
            {"role": "user", "content": opening.format(head=head, what=task.what.format(**words))},
            {"role": "assistant", "content": solution},
        ],
        dataset="functions",
        tests="\n".join(f"assert {name}({value!r}) == {result!r}" for name, value, result in calls),
        template=task.names[0],
        prompt_format="task",
    )
