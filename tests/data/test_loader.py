"""Preparing data, and the order of the microbatches."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from data.loader import ahead, eval_batches, prepare, prepare_rows
from data.prompts import IGNORED
from tests.preloaded import python
from training.config import UserError

from .conftest import arithmetic, make_loader, steps, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    from training.config import DataArguments

    args = DataArguments(max_length=64, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return prepare_rows(arithmetic(101), args, tokenizer)


def rows_of(batches) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def every_row(data) -> list[tuple[int, ...]]:
    return sorted(tuple(data.train[i]["input_ids"].tolist()) for i in range(len(data.train)))


@pytest.mark.parametrize(
    ("micro", "accumulation", "world"), [(1, 4, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
)
def test_a_step_has_the_same_rows_for_every_split(data, micro, accumulation, world):
    split = [make_loader(data, micro, accumulation, rank, world) for rank in range(world)]
    assert steps(split) == steps([make_loader(data, 4)])
    for batches in split[0].epoch(0):
        assert len(batches) == accumulation
        assert all(tensor.shape == (micro, 64) for batch in batches for tensor in batch.values())


def test_an_epoch_shows_every_row_once_and_fills_the_last_step_with_empty_rows(data):
    one = make_loader(data, 7)
    assert len(data.train) % 7, "the case needs an incomplete last step"
    found = [row for step in steps([one]) for row in step]
    empty = (0,) * 64
    assert len(found) == 7 * one.steps_per_epoch
    assert sorted(row for row in found if row != empty) == every_row(data)
    last = list(one.epoch(0))[-1][0]
    assert (last["labels"][-1] == IGNORED).all() and (last["document_ids"][-1] == 0).all()


def test_the_order_depends_on_seed_and_epoch_alone(data):
    assert steps([make_loader(data)]) == steps([make_loader(data)])
    assert steps([make_loader(data)], epoch=0) != steps([make_loader(data)], epoch=1)
    assert steps([make_loader(data, seed=0)]) != steps([make_loader(data, seed=1)])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(data, workers):
    assert steps([make_loader(data, workers=workers)]) == steps([make_loader(data)])


@pytest.mark.parametrize("start", [0, 1, 7])
def test_resuming_gives_the_rest_of_the_epoch(data, start):
    assert (
        steps([make_loader(data, workers=2)], epoch=2, start_step=start)
        == steps([make_loader(data)], epoch=2)[start:]
    )


def test_workers_stay_ahead_in_order_by_their_number_alone():
    asked = []

    def items():
        for i in range(10):
            asked.append(i)
            yield i

    results = ahead(lambda i: i * i, items(), 3)
    assert next(results) == 0 and asked == [0, 1, 2, 3]
    assert list(results) == [i * i for i in range(1, 10)]


def test_a_worker_s_error_reaches_the_loop():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1 // i, [1, 0, 1], 2))


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (3, 1), (2, 2), (2, 3)])
def test_evaluation_sees_every_row_once_in_equally_many_batches(data, batch_size, world):
    shares = [list(eval_batches(data.train, batch_size, rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    found = [row for share in shares for row in rows_of(share)]
    assert sorted(row for row in found if any(row)) == every_row(data)
    targets = sum(int((batch["labels"] != IGNORED).sum()) for share in shares for batch in share)
    assert targets == data.train.num_targets


def test_each_family_has_rows_to_validate_on(arguments, tokenizer):
    made = prepare(arguments(max_samples=300), tokenizer, 0)
    assert set(made.validation) == {"chat", "code", "reasoning"} == set(made.validation_examples)
    assert all(dataset.num_targets > 0 for dataset in made.validation.values())
    assert made.train.num_examples == sum(line["rows"] for line in made.report) == 5 * 300
    json.dumps(made.report)
    for family, examples in made.validation_examples.items():
        assert made.validation[family].num_examples == len(examples)


def test_the_report_says_where_the_data_came_from(tmp_path, arguments, tokenizer, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(50), {"question": "?", "answer": ""}])
    made = prepare(arguments(f"{path}:2,word_problems", max_samples=60), tokenizer, 0)
    first, second = made.report
    assert (first["source"], first["family"], first["weight"], first["dropped"]) == (
        str(path),
        "reasoning",
        2.0,
        1,
    )
    assert (second["source"], second["licence"]) == ("embedded", "this project's")
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0].startswith(f"data: reasoning {path}: {path} (not stated), ") and "weight 2" in printed[0]
    )
    assert "1 dropped" in printed[0] and "embedded" in printed[1]


def test_only_rank_0_talks(arguments, tokenizer, capsys):
    prepare(arguments("word_problems", max_samples=20), tokenizer, 0, rank=1, world_size=2)
    assert capsys.readouterr().out == ""


def test_evaluation_takes_a_file_whole(tmp_path, arguments, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(50))
    made = prepare(arguments(path), tokenizer, 0, evaluation=True)
    assert made.validation["reasoning"].num_examples == 50 and len(made.train) == 0


def test_rows_given_directly(data, tokenizer, arguments):
    assert data.train.num_examples + data.validation["reasoning"].num_examples == 101
    with pytest.raises(UserError, match="row 2: columns x fit no known schema"):
        prepare_rows([{"text": "a"}, {"x": "b"}], arguments(), tokenizer)
    with pytest.raises(UserError, match="the dataset has no rows"):
        prepare_rows([], arguments(), tokenizer)


def test_an_epoch_without_rows_is_an_error(tmp_path, arguments, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(20))
    with pytest.raises(UserError, match="no rows to train on"):
        make_loader(prepare(arguments(f"{path}:0.001"), tokenizer, 0))


RANK = """
import sys
import torch.distributed as dist
from data.loader import prepare
from data.tokenizer_asset import load_tokenizer
from training.config import DataArguments, UserError
rank, store, cache, dataset = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
try:
    data = prepare(DataArguments(dataset=dataset, cache_dir=cache), load_tokenizer(), 0, rank, 2)
    print(len(data.train), data.train.num_targets)
except UserError as error:
    print("UserError", error)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "expected"), [(40, ""), (0, "UserError")])
def test_two_ranks_get_the_same_data_or_the_same_error(tmp_path, rows, expected):
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(rows))
    command = [python(), "-c", RANK]
    rest = [str(tmp_path / "store"), str(tmp_path / "cache"), str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), *rest], cwd=REPOSITORY, env=environment, stdout=-1, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines()[-1] for process in ranks]
    assert said[0] == said[1] and said[0].startswith(expected)
    assert rows == 0 or int(said[0].split()[0]) > 0


def test_microbatches_are_int64(data):
    (batch,) = next(make_loader(data).epoch(0))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert set(batch) == {"input_ids", "labels", "document_ids", "position_ids"}
