"""The rules of the task, its data, and the short run with its gate."""

import json
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import countdown
from benchmarks.countdown import (
    NONE,
    SHORT,
    Problem,
    Setup,
    Tokenizer,
    batch_of,
    drawn,
    explored,
    held_out_problems,
    is_solved,
    judged,
    mistaken,
    moves,
    reaches,
    steps_of,
    worth,
)
from tests.preloaded import python

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = Problem((6, 4, 2), 20)
SOLUTION = ["6 + 4 = 10 | 10 2", "10 * 2 = 20 | 20"]


def test_legal_steps_take_the_larger_number_first():
    found = dict(moves((6, 4, 2)))
    assert found["6 / 2 = 3 | 4 3"] == (4, 3) and found["6 - 4 = 2 | 2 2"] == (2, 2)
    assert not any(step.startswith(("2 ", "6 / 4")) for step in found) and len(found) == 11
    assert set(dict(moves((90, 20)))) == {"90 - 20 = 70 | 70"}  # nothing above 99
    assert set(dict(moves((50, 50)))) == {"50 / 50 = 1 | 1"}  # nor below 1


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (SOLUTION, [True, True]),
        (["6 * 4 = 24 | 24 2", "24 - 2 = 22 | 22"], [False, False]),  # legal, but 20 is out of reach
        (["6 + 4 = 11 | 11 2", "11 * 2 = 20 | 20"], [False, False]),
        (["6 + 4 = 10 | 10 2", "10 + 2 = 20 | 20"], [True, False]),
        (["6 + 4 = 10 | 10 10", "10 + 10 = 20 | 20"], [False, False]),
    ],
)
def test_steps_are_worth_what_an_exhaustive_search_says(steps, expected):
    assert worth(PROBLEM, steps) == expected
    assert is_solved(PROBLEM, " \n ".join(steps)) == expected[-1]


def test_only_a_whole_solution_solves():
    assert not is_solved(PROBLEM, SOLUTION[0]) and not is_solved(PROBLEM, "")
    assert not is_solved(PROBLEM, " \n ".join([*SOLUTION, "20 + 0 = 20 | 20"]))
    assert reaches((2, 2, 2), 8) and not reaches((2, 2, 2), 7)


def test_problems_can_be_solved_and_mistakes_are_none_of_the_legal_steps():
    rng = random.Random(0)
    for _ in range(300):
        problem, steps = drawn(rng, Setup())
        assert worth(problem, steps) == [True] * 3 and problem.target >= 10
        assert mistaken(rng, problem, problem.numbers) not in dict(moves(problem.numbers))
        other = explored(rng, problem, steps)
        verdicts = worth(problem, other)
        assert verdicts == sorted(verdicts, reverse=True) and 1 <= len(other) <= 3


def test_a_batch_labels_the_ends_of_steps_and_teaches_solutions_alone():
    tokenizer = Tokenizer()
    wrong = ["6 * 4 = 24 | 24 2"]
    batch = batch_of([(PROBLEM, SOLUTION, True), (PROBLEM, wrong, False)], tokenizer)
    first, second = ([int(x) for x in row if x != NONE] for row in batch["value_labels"])
    assert (first, second) == ([1, 1], [0])
    words = [tokenizer.words[i] for i in batch["input_ids"][0][batch["labels"][0] != NONE].tolist()]
    assert steps_of(" ".join(words).replace("<end>", "")) == SOLUTION and words[-1] == "<end>"
    assert (batch["labels"][1] == NONE).all() and batch["document_ids"][1].sum() < batch["document_ids"][
        0
    ].sum()
    for row in (0, 1):
        ends = batch["input_ids"][row][batch["value_labels"][row] != NONE].tolist()
        assert ends == ([2, 1], [2])[row]


def test_problems_of_the_arms_are_fixed_and_different():
    assert held_out_problems(SHORT) == held_out_problems(SHORT)
    assert len(set(held_out_problems(Setup()))) == 200


def test_goals_are_differences_of_means():
    def rows(*solved):
        return [
            {"arm": a, "solved": s, "taught": "own"}
            for a, s in zip(("greedy", "likelihood beam 4x8", "tree 4x8 product"), solved, strict=True)
        ]

    near, far = judged([*rows(0.3, 0.4, 0.5), *rows(0.3, 0.4, 0.6)]), judged(rows(0.1, 0.2, 0.5))
    assert [goal["met"] for goal in near] == [True, False] and near[0]["measured"] == pytest.approx(0.25)
    assert [goal["met"] for goal in far] == [True, True]


@pytest.mark.slow
def test_the_short_run_meets_its_goals(tmp_path):
    command = [
        python(),
        str(ROOT / "benchmarks" / "countdown.py"),
        "--short",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "countdown_short.json").read_text())
    arms = {row["arm"]: row for row in result["rows"]}
    assert set(arms) == {"greedy", "likelihood beam 4x8", "random score 4x8", "tree 4x8 product"}
    assert all(goal["met"] for goal in result["goals"]) and len(result["goals"]) == 2
    assert arms["greedy"]["tokens"] == 17 and arms["tree 4x8 product"]["tokens"] > 100
    assert "| arm | solved | tokens |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("taught", "values"), [("made", {0, 1}), ("solutions", {1})])
def test_what_the_head_is_taught(monkeypatch, taught, values):
    """Of problems that are not shared, whose solutions are all right."""
    seen, made = [], countdown.batch_of
    monkeypatch.setattr(countdown, "batch_of", lambda *rows: seen.append(made(*rows)) or seen[-1])
    setup = replace(SHORT, is_shared=False, steps=20, own_answers=5)
    countdown.train(setup, held_out_problems(setup), 0, "cpu", taught)
    assert set(torch.cat([batch["value_labels"].flatten() for batch in seen]).tolist()) - {NONE} == values
