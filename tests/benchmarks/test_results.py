"""What every benchmark's result is made of."""

import json

import pytest

from benchmarks.results import goal, gpu_goals, measured_before, report, table


@pytest.mark.parametrize(
    ("measured", "at_least", "met"), [(2, True, False), (3, True, True), (4, False, False)]
)
def test_goal(measured, at_least, met):
    judged = goal("speed", 3, measured, at_least=at_least)
    assert judged == {"name": "speed", "target": 3, "measured": measured, "met": met}


def test_table_leaves_missing_cells_empty():
    assert table([{"a": 1, "b": 0.12345}, {"b": 12345.6, "c": "x"}]).splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| 1 | 0.1235 |  |",
        "|  | 1.235e+04 | x |",
    ]


def test_goals_of_gpu_memory_come_from_rows():
    row = {"model_size": "350M", "placement": "zero3", "batch_size": 1, "max_length": 512, "experts": 8}
    changes = (
        {"placement": "resident"},
        {"placement": "fsdp2"},
        {"batch_size": 4},
        {"max_length": 64},
        {"experts": 4},
    )
    others = [{**row, "gpu_allocated_gb": 0.2, **change} for change in changes]
    assert gpu_goals([*others, {**row, "error": "out of memory"}]) == []
    (judged,) = gpu_goals([*others, {**row, "gpu_allocated_gb": 0.6}, {**row, "gpu_allocated_gb": 0.41}])
    assert (judged["target"], judged["measured"], judged["met"]) == (0.4, 0.41, False)
    assert gpu_goals([{**row, "placement": "streamed", "gpu_allocated_gb": 0.4}])[0]["met"]


def test_a_result_is_continued_where_it_was_measured_and_nowhere_else(tmp_path, capsys):
    path = tmp_path / "deep" / "result.json"
    assert measured_before(path, "cpu") == []
    rows = [{"a": 1.5}, {"a": 2, "error": "out of memory"}]
    report(path, rows, [goal("speed", 3, 4, at_least=True)], "cpu")
    result = json.loads(path.read_text())
    assert list(result) == ["command", "gpu", "versions", "commit", "date", "rows", "goals"]
    text = capsys.readouterr().out
    assert table(rows) in text and "goal speed: target 3, measured 4: met" in text and result["gpu"] in text
    assert measured_before(path, "cpu") == rows[:1]
    result["versions"]["torch"] = "0.4"
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="start anew"):
        measured_before(path, "cpu")
