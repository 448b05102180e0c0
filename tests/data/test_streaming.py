"""Streams: the same contract as rows in memory, with bounded memory."""

import random
import tracemalloc

import pytest

from data import loader as loading
from data import streaming
from data.loader import prepare
from data.prompts import IGNORED
from data.streaming import shuffled
from training.config import UserError

from .conftest import arithmetic, make_loader, steps, write_jsonl


@pytest.fixture
def data(tmp_path, arguments, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "BUFFER", 40)
    monkeypatch.setattr(streaming, "CHUNK", 16)
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(150))
    return prepare(arguments(path, streaming=True, max_length=64), tokenizer, 0)


def questions(found, tokenizer) -> list[str]:
    text = "".join(tokenizer.decode(list(row)) for step in found for row in step)
    return sorted(part.split("\n\n")[0] for part in text.split("Problem:\n")[1:])


def test_an_epoch_shows_every_training_row_once_and_no_validation_row(data, tokenizer):
    held_out = {example.messages[0]["content"] for example in data.validation_examples["reasoning"]}
    expected = [row["question"] for row in arithmetic(150) if row["question"] not in held_out]
    assert held_out and questions(steps([make_loader(data)]), tokenizer) == sorted(expected)


def test_a_step_has_the_same_rows_for_every_split(data):
    split = [make_loader(data, 1, 2, rank, 2) for rank in range(2)]
    assert steps(split) == steps([make_loader(data, 4)])


def test_order_resume_and_workers(data):
    whole = steps([make_loader(data)], epoch=1)
    assert whole == steps([make_loader(data, workers=2)], epoch=1)
    assert whole[5:] == steps([make_loader(data)], epoch=1, start_step=5)
    assert whole != steps([make_loader(data)], epoch=2)
    assert make_loader(data).steps_per_epoch is None


def test_the_last_step_is_filled(data):
    last = list(make_loader(data, micro=7).epoch(0))[-1][0]
    assert last["input_ids"].shape == (7, 64)
    assert (last["labels"] != IGNORED).any()


def test_weights(tmp_path, arguments, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 16)
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(40))
    data = prepare(arguments(f"{path}:2", streaming=True, max_length=64), tokenizer, 0)
    found = questions(steps([make_loader(data)]), tokenizer)
    assert len(found) == 2 * len(set(found)) >= 70


def test_sources_are_mixed_by_size_and_report_their_origin(tmp_path, arguments, tokenizer):
    big = write_jsonl(tmp_path / "big.jsonl", arithmetic(900))
    small = write_jsonl(
        tmp_path / "small.jsonl", [{"text": f"text {i} of the small file"} for i in range(300)]
    )
    data = prepare(arguments(f"{big},{small}", streaming=True), tokenizer, 0)
    assert [line["source"] for line in data.report] == [str(big), str(small)]
    assert set(data.validation) == {"reasoning", "text"}
    first = [example.family for chunk in data.train.chunks(0, 0) for example in chunk][:300]
    assert 20 < first.count("text") < 200


def test_shuffling_keeps_every_item_and_holds_few():
    taken = 0

    def items():
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield i

    shuffling = shuffled(items(), 50, random.Random(0))
    first = [next(shuffling) for _ in range(100)]
    assert taken <= 151 and first != sorted(first)
    assert sorted([*first, *shuffling]) == list(range(1000))


def test_memory_stays_bounded(tmp_path, arguments, tokenizer, monkeypatch):
    """Reading a 20 MB file through small buffers holds less than a quarter of it."""
    for module, name in ((streaming, "BUFFER"), (streaming, "CHUNK"), (loading, "SCANNED")):
        monkeypatch.setattr(module, name, 64)
    rows = ({"prompt": f"{i} " + "x" * 10_000, "answer": str(i)} for i in range(2000))
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = prepare(arguments(path, streaming=True, validation_fraction=0.0), tokenizer, 0)
    tracemalloc.start()
    count = sum(len(chunk) for chunk in data.train.chunks(0, 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000 and peak < path.stat().st_size / 4


def test_rows_without_targets_are_an_error_not_an_endless_epoch(tmp_path, arguments, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": str(i), "answer": ""} for i in range(10)])
    data = prepare(arguments(path, streaming=True, validation_fraction=0.0), tokenizer, 0)
    with pytest.raises(UserError, match="no row of the streamed datasets has a target"):
        next(make_loader(data).epoch(0))


def test_a_bad_line_deep_in_a_stream_is_named(tmp_path, arguments, tokenizer, monkeypatch):
    monkeypatch.setattr(loading, "SCANNED", 10)
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(50))
    with path.open("a") as file:
        file.write('{"question": "cut')
    data = prepare(arguments(path, streaming=True), tokenizer, 0)
    with pytest.raises(UserError, match=r"a\.jsonl:51: the file is cut off here"):
        list(make_loader(data).epoch(0))
