"""The memory's separating task: rows that ask what they say, and a short run of it."""

import json
import sys

import pytest
import torch

from benchmarks import recall
from benchmarks.recall import CONTROL, GATE, SHORT, TASKS, Sizes, goals, without_delta


@pytest.mark.parametrize(("task", "sizes"), [("recall", Sizes()), ("recall", SHORT), ("rebound", Sizes())])
def test_queries_ask_for_the_latest_value_and_lie_out_of_reach(task, sizes):
    for length in (sizes.length, 4 * sizes.length):
        ids_BS, labels_BS = TASKS[task](8, length, sizes, torch.Generator().manual_seed(0))
        for ids, labels in zip(ids_BS.tolist(), labels_BS.tolist(), strict=True):
            bound = {}
            places = [place for place, label in enumerate(labels) if label != -100]
            for place in range(places[0] - 1 - sizes.reach):
                if ids[place + 1] >= sizes.vocabulary // 2:
                    bound[ids[place]] = (ids[place + 1], place + 1)
            for place in places:
                value, last = bound[ids[place - 1]]
                assert labels[place] == value and place - 1 - last > sizes.reach
            assert max(ids[places[0] - 1 :]) < sizes.vocabulary // 2  # no answer is shown
            assert len(places) == length - places[0] >= 7


def test_a_memory_without_the_delta_rule_adds_up():
    q, k, v = torch.randn(3, 2, 7, 2, 4, generator=torch.Generator().manual_seed(0))
    beta, decay = torch.rand(2, 7, 2), -torch.rand(2, 7, 2)
    reads, state = [], torch.zeros(2, 2, 4, 4)
    for t in range(7):
        state = state * decay[:, t, :, None, None].exp()
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        reads.append((q[:, t, :, None] @ state)[:, :, 0])
    found, _ = without_delta(q, k, v, beta, decay, None, None, 64)
    torch.testing.assert_close(found, torch.stack(reads, dim=1), rtol=1e-4, atol=1e-5)


def test_goals_are_of_the_worst_with_and_the_best_without():
    rows = [
        {"task": "recall", "model": name, "accuracy": accuracy}
        for name, accuracy in ((GATE, 0.99), (GATE, 0.94), (CONTROL, 0.02), (CONTROL, 0.05), ("full", 0.5))
    ]
    assert [(g["measured"], g["met"]) for g in goals(rows)] == [(0.94, False), (0.05, True)]
    assert goals(rows[-1:]) == []


@pytest.mark.slow
def test_a_memory_recalls_what_a_window_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recall.py", "--short", "--output", str(tmp_path)])
    monkeypatch.setattr(recall, "QUERIES", 2048)
    recall.main()
    result = json.loads((tmp_path / "recall_short.json").read_text())
    assert [row["model"] for row in result["rows"]] == [CONTROL, GATE]
    assert [g["met"] for g in result["goals"]] == [True, True], result["rows"]
    assert result["rows"][1]["accuracy_4x"] > 0.9
