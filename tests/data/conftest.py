import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data.loader import TrainLoader
from data.tokenizer_asset import load_tokenizer
from training.config import DataArguments


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataArguments]:
    """Data settings with a cache of the test's own, and a hub address where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def make(dataset: object = "embedded", **settings: object) -> DataArguments:
        return DataArguments(dataset=str(dataset), cache_dir=str(tmp_path / "cache"), **settings)

    return make


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arithmetic(count: int) -> list[dict]:
    """Rows of the reasoning schema, all different."""
    return [
        {"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(count)
    ]


def make_loader(data, micro=2, accumulation=1, rank=0, world=1, seed=0, workers=0) -> TrainLoader:
    return TrainLoader(
        data.train,
        micro_batch_size=micro,
        accumulation=accumulation,
        rank=rank,
        world_size=world,
        seed=seed,
        num_workers=workers,
    )


def steps(loaders: Sequence[TrainLoader], epoch: int = 0, start_step: int = 0) -> list[list[tuple[int, ...]]]:
    """The rows of each step over all ranks, sorted."""
    return [
        sorted(tuple(row.tolist()) for batches in ranks for batch in batches for row in batch["input_ids"])
        for ranks in zip(*(one.epoch(epoch, start_step) for one in loaders), strict=True)
    ]
