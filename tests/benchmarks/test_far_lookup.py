"""The lookup beyond the window: its rows, its goals, and the short run that has to be learnt."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.far_lookup import SHORT, Task, goals
from tests.preloaded import python

ROOT = Path(__file__).resolve().parents[2]


def test_a_key_has_one_value_in_a_row_and_its_last_place_is_known():
    task = Task(symbols=5, pairs=12)
    ids, back = task.rows(8, 12, torch.Generator().manual_seed(0))
    for row, distances in zip(ids.tolist(), back.tolist(), strict=True):
        known, places = {}, {}
        for place in range(0, 24, 2):
            key, value = row[place : place + 2]
            assert key < 5 <= value < 10 and known.setdefault(key, value) == value
            assert distances[place // 2] == (place - places[key] if key in places else 0)
            places[key] = place
    labels = task.batch(torch.Generator().manual_seed(0))["labels"]
    assert (labels[:, ::2] == -100).all() and (labels[:, 1] == -100).all() and (labels != -100).any()


def test_prompts_end_in_a_key_that_is_near_or_far():
    for kind, longer in (("near", 1), ("far", 1), ("far", 4)):
        ids, values = SHORT.prompts(kind, longer)
        assert ids.shape == (len(values), 2 * SHORT.pairs * longer - 1)
        for row, value in zip(ids[:50].tolist(), values[:50].tolist(), strict=True):
            before = [place for place in range(0, len(row) - 1, 2) if row[place] == row[-1]]
            distance = len(row) - 1 - before[-1]
            assert row[before[-1] + 1] == value and (distance <= 6 if kind == "near" else distance > 16)


def test_goals_are_of_the_worst_seed():
    rows = [
        {"arm": "base", "near": 1.0, "far": 0.1},
        {"arm": "light", "near": 1.0, "far": 0.94, "off is base": True},
        {"arm": "light", "near": 0.99, "far": 1.0, "off is base": True},
        {"arm": "pause", "near": 0.5, "far": 0.1, "off is base": False},
    ]
    judged = [(item["measured"], item["met"]) for item in goals(rows)]
    assert judged == [(0.94, False), (0.99, True), (pytest.approx(2 / 3), False)]


@pytest.mark.slow
def test_a_short_run_finds_what_is_far(tmp_path):
    command = [
        python(),
        str(ROOT / "benchmarks" / "far_lookup.py"),
        "--short",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "far_lookup_short.json").read_text())
    base, light = result["rows"]
    assert base["far"] < 0.45 and light["far"] > 0.9 and min(base["near"], light["near"]) > 0.95
    assert light["off is base"] and len(result["goals"]) == 3
