"""The worked examples of docs/datasets.md, run as they stand there."""

import re
from pathlib import Path

import pytest

from data.hub import HUB
from data.loader import prepare
from data.prompts import FORMATS
from data.sources import EMBEDDED

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    row = block("json")
    (tmp_path / "faq.jsonl").write_text(row + row.replace("refunds", "delivery").replace("money", "parcel"))
    (tmp_path / "datasets.yaml").write_text(block("yaml"))
    (tmp_path / "capitals.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_yaml_example(folder, arguments, tokenizer):
    data = prepare(arguments("faq:2", dataset_config="datasets.yaml"), tokenizer, 0)
    (line,) = data.report
    assert (line["family"], line["licence"], line["weight"]) == ("chat", "CC0", 2.0)
    assert (line["rows"], line["validation_rows"]) == (1, 1)
    text = tokenizer.decode(data.train[0]["input_ids"])
    assert re.search(r"### Instruction:\nHow do I get my \w+ back\?\n\n### Response:\nSend the goods", text)


def test_python_example(folder, arguments, tokenizer):
    data = prepare(arguments("capitals.py:10"), tokenizer, 0)
    assert data.train.num_examples == 3 and data.validation["chat"].num_examples == 1
    assert len(data.train.epoch_rows(0, 0)) == 10 * len(data.train)


def test_every_name_and_format_is_documented():
    names = [*EMBEDDED, *HUB, *FORMATS, *(dataset.path for datasets in HUB.values() for dataset in datasets)]
    assert [name for name in names if f"`{name}`" not in DOCUMENT] == []


def test_documented_options_exist():
    from training.config import DataArguments, ModelArguments, TrainingArguments, flag_of

    known = {
        flag_of(field)
        for settings in (DataArguments, ModelArguments, TrainingArguments)
        for field in settings.__dataclass_fields__.values()
    }
    known.add("--list-datasets")
    assert set(re.findall(r"--[a-z][a-z-]+", DOCUMENT)) <= known
