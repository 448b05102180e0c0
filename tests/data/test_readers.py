"""Local files of every kind, and every way in which they can be bad."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from data.readers import read_path
from training.config import UserError

from .conftest import arithmetic, write_jsonl

ROWS = arithmetic(30)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".py":
        path.write_text(f"def examples():\n    yield from {rows!r}\n")
    elif path.name == "split":
        DatasetDict(train=Dataset.from_list(rows), validation=Dataset.from_list(rows[:2])).save_to_disk(
            str(path)
        )
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    return path


NAMES = ("a.jsonl", "a.json", "a.parquet", "a.py", "saved", "split")


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_back_in_order_with_their_place(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    found = list(read_path(path))
    assert [row for _, row in found] == ROWS
    assert found[4][0].startswith(str(path)) and found[4][0].endswith("5")
    validation = [row for _, row in read_path(path, "validation")]
    assert validation == (ROWS[:2] if name == "split" else [])


def error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_path(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_missing(tmp_path):
    assert "does not exist" in error(tmp_path / "no.jsonl")


@pytest.mark.parametrize("name", NAMES[:4])
def test_empty(tmp_path, name):
    (tmp_path / name).touch()
    assert "is empty" in error(tmp_path / name)


def test_truncated_jsonl_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_bytes(path.read_bytes()[:-5])
    assert "a.jsonl:30: the file is cut off here" in error(path)


def test_broken_line_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n{"text": "b"}\n')
    assert "a.jsonl:3: not JSON" in error(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "café"}\n'.encode("latin-1"))
    assert "a.jsonl:1: not UTF-8" in error(path)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_truncated(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    error(path)


def test_json_that_is_no_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}')
    assert "must hold a list" in error(path)


def test_damaged_saved_folder(tmp_path):
    path = write(tmp_path / "saved", ROWS)
    next(path.glob("*.arrow")).write_bytes(b"x")
    assert "damaged" in error(path)
    assert "damaged" in error(tmp_path)


def test_saved_folder_without_train_split(tmp_path):
    DatasetDict(test=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "splits"))
    assert "no split 'train', only test" in error(tmp_path / "splits")


def test_other_suffix(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    assert "cannot read .csv files, only .jsonl" in error(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rows = []\n", "must define a function examples()"),
        ("def examples(:\n", "SyntaxError"),
        ("def examples():\n    yield {}\n    yield {}['a']\n", "a.py:3: KeyError: 'a'"),
        ("import nowhere_to_be_found\n", "a.py:1: ModuleNotFoundError"),
    ],
)
def test_bad_python_file(tmp_path, source, expected):
    path = tmp_path / "a.py"
    path.write_text(source)
    assert expected in error(path)
