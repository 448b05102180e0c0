"""What a --dataset means, the hub and what happens without it, and the validation split."""

import contextlib
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from data.hub import HUB
from data.sources import EMBEDDED, Source, list_datasets, load_examples, resolve, split_examples
from training.config import UserError

from .conftest import arithmetic, write_jsonl

REPOSITORY = Path(__file__).resolve().parents[2]


def names(sources: list[Source]) -> list[tuple[str, float]]:
    return [(source.name, source.weight) for source in sources]


def test_all_is_the_families_and_without_a_hub_the_embedded_data(arguments):
    sources = resolve(arguments("all"))
    assert names(sources) == [(name, 1) for name in EMBEDDED]
    assert all(source.origin == "embedded" and "hub not reachable" in source.note for source in sources)


def test_the_real_command_falls_through_in_seconds_and_says_so(tmp_path):
    program = (
        "from data.loader import prepare; from data.tokenizer_asset import load_tokenizer;"
        "from training.config import DataArguments;"
        f"arguments = DataArguments(dataset='reasoning', max_samples=20, cache_dir={str(tmp_path)!r});"
        "prepare(arguments, load_tokenizer(), 0)"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "data: reasoning word_problems: embedded (this project's)" in done.stdout
    assert "hub not reachable" in done.stdout


def test_a_hub_that_does_not_answer_is_asked_once(arguments, monkeypatch):
    """A server that accepts connections and stays silent: one time-out for six datasets."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the closed server ends the loop
                while True:
                    accepted.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        monkeypatch.setattr("data.hub.ANSWER_SECONDS", 0.3)
        sources = resolve(arguments("chat,code,reasoning"))
        server.shutdown(socket.SHUT_RDWR)
    assert {source.origin for source in sources} == {"embedded"}
    assert "timed out" in sources[0].note
    assert len(accepted) == 1


def test_hub_order(arguments, monkeypatch):
    """Primary, then fallback, then embedded, whichever answers and gives a first row."""
    rows = {"databricks/databricks-dolly-15k": [{"instruction": "Q", "context": "", "response": "A"}]}
    monkeypatch.setattr("data.sources.Hub.revision", lambda self, path: ("abc", None))
    monkeypatch.setattr(
        "data.sources.hub_rows",
        lambda path, *rest: ((f"{path}: row {i}", r) for i, r in enumerate(rows[path], 1)),
    )
    (source,) = resolve(arguments("chat"))
    assert (source.name, source.origin) == ("databricks/databricks-dolly-15k", "hub fallback")
    assert "tatsu-lab/alpaca" in source.note and source.family == "chat"
    rows["tatsu-lab/alpaca"] = [{"instruction": "Q", "input": "", "output": "A", "text": ""}]
    (source,) = resolve(arguments("chat"))
    assert (source.name, source.origin, source.note) == ("tatsu-lab/alpaca", "hub", "")


# Columns as the hub's dataset cards give them.
HUB_ROWS = {
    "tatsu-lab/alpaca": {"instruction": "Q", "input": "", "output": "A", "text": "Below is an instruction"},
    "databricks/databricks-dolly-15k": {
        "instruction": "Q",
        "context": "",
        "response": "A",
        "category": "open_qa",
    },
    "sahil2801/CodeAlpaca-20k": {"instruction": "Q", "input": "", "output": "A"},
    "code-search-net/code_search_net": {
        "repository_name": "o/r",
        "func_path_in_repository": "a.py",
        "func_name": "f",
        "whole_func_string": "def f(): 1",
        "language": "python",
        "func_code_string": "A",
        "func_code_tokens": ["A"],
        "func_documentation_string": "Q",
        "func_documentation_tokens": ["Q"],
        "split_name": "train",
        "func_code_url": "https://example.com",
    },
    "openai/gsm8k": {"question": "Q", "answer": "A"},
    "EleutherAI/hendrycks_math": {"problem": "Q", "level": "Level 1", "type": "Algebra", "solution": "A"},
}


def test_every_hub_dataset_has_its_columns_tested():
    assert {dataset.path for datasets in HUB.values() for dataset in datasets} == set(HUB_ROWS)


@pytest.mark.parametrize(("family", "path"), [(family, d.path) for family in HUB for d in HUB[family]])
def test_hub_columns_become_examples_of_their_family(tmp_path, arguments, family, path):
    saved = tmp_path / "saved"
    Dataset.from_list([HUB_ROWS[path]] * 2).save_to_disk(str(saved))
    source = replace(resolve(arguments(saved))[0], family=family)
    first = next(source.examples())
    assert first.family == family
    assert [message["content"] for message in first.messages] == ["Q", "A"]


def test_weights_and_paths(tmp_path, arguments):
    path = write_jsonl(tmp_path / "my file.v2.jsonl", arithmetic(3))
    sources = resolve(
        arguments(f"chitchat:2, {path}:0.5,{tmp_path}/my file.v2.jsonl".rpartition(",")[0] + ",stdlib")
    )
    assert names(sources) == [("chitchat", 2), (str(path), 0.5), ("stdlib", 1)]
    assert names(resolve(arguments("embedded:3"))) == [(name, 3) for name in EMBEDDED]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("resoning", "no dataset 'resoning': did you mean reasoning?"),
        ("nonsense", "no dataset 'nonsense'; there are all, embedded, chat"),
        ("chat,code,chat:2", "dataset chat is named twice"),
        ("embedded,stdlib", "dataset stdlib is named twice"),
        ("chat:0", "weight must be a number above 0, not '0'"),
        ("chat:-1", "weight must be a number above 0, not '-1'"),
        ("chat:lots", "weight must be a number above 0, not 'lots'"),
        ("chat:nan", "weight must be a number above 0, not 'nan'"),
        ("chat,,code", "empty name"),
        ("missing.jsonl", "dataset missing.jsonl does not exist"),
        ("./missing", "dataset ./missing does not exist"),
        ("owner/name", "hub dataset owner/name cannot be had (hub not reachable"),
    ],
)
def test_bad_specs(arguments, spec, expected):
    with pytest.raises(UserError) as caught:
        resolve(arguments(spec))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


CONFIG = """
datasets:
  faq:
    path: faq.jsonl
    family: chat
    fields: {prompt: frage, answer: antwort}
    prompt_format: instruction
    licence: CC0
    validation: held_out.jsonl
"""


def test_yaml_entry_with_its_own_validation_file(tmp_path, arguments):
    write_jsonl(tmp_path / "faq.jsonl", [{"frage": f"q{i}", "antwort": f"a{i}"} for i in range(5)])
    write_jsonl(tmp_path / "held_out.jsonl", [{"frage": "q9", "antwort": "a9"}])
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (source,) = resolve(arguments("faq:4", dataset_config=str(tmp_path / "mine.yaml")))
    assert (source.weight, source.licence, source.origin) == (4, "CC0", str(tmp_path / "faq.jsonl"))
    train, validation = split_examples(source, arguments())
    assert [e.answer() for e in train] == [f"a{i}" for i in range(5)]
    assert [e.answer() for e in validation] == ["a9"]
    assert train[0].prompt_format == "instruction" and train[0].dataset == "faq"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("path: faq.jsonl", "path: no.jsonl"), "no.jsonl does not exist"),
        (("path: faq.jsonl", "pth: faq.jsonl"), "needs either path"),
        (("licence:", "license:"), "no key 'license': did you mean licence?"),
        (("family: chat", "family: chats"), "no family 'chats': did you mean chat?"),
        (("prompt: frage", "promt: frage"), "no field 'promt': did you mean prompt?"),
        (("format: instruction", "format: x"), "no prompt format 'x'; there are chat_template"),
        (("  faq:", "  chat:"), "chat is a name of the built-in data"),
        (("datasets:", "dataset:"), "must have an entry 'datasets'"),
        (("{prompt", "{{prompt"), "no YAML file of datasets"),
    ],
)
def test_bad_yaml(tmp_path, arguments, change, expected):
    write_jsonl(tmp_path / "faq.jsonl", [{"frage": "q", "antwort": "a"}])
    write_jsonl(tmp_path / "held_out.jsonl", [{"frage": "q", "antwort": "a"}])
    (tmp_path / "mine.yaml").write_text(CONFIG.replace(*change))
    with pytest.raises(UserError) as caught:
        resolve(arguments("faq", dataset_config=str(tmp_path / "mine.yaml")))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_missing_yaml(arguments):
    with pytest.raises(UserError, match=r"no\.yaml does not exist"):
        resolve(arguments(dataset_config="no.yaml"))


def prompts(examples) -> set[str]:
    return {example.messages[0]["content"] for example in examples}


def test_local_split_is_by_prompt_and_stays_when_the_file_grows(tmp_path, arguments):
    path = tmp_path / "a.jsonl"
    rows = arithmetic(400)
    twice = rows + [row | {"answer": "another answer"} for row in rows]
    write_jsonl(path, twice)
    args = arguments(path)
    train, validation = (load_examples(str(path), args, split) for split in ("train", "validation"))
    assert not prompts(train) & prompts(validation)
    assert len(train) + len(validation) == 800
    assert 0.02 < len(validation) / 800 < 0.09
    write_jsonl(path, [*arithmetic(800)[400:], *reversed(twice)])
    assert prompts(validation) <= prompts(load_examples(str(path), args, "validation"))


def test_two_prompts_give_one_for_validation_and_one_prompt_none(tmp_path, arguments):
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(2))
    assert len(load_examples(str(path), arguments(path), "validation")) == 1
    assert len(load_examples(str(path), arguments(path), "train")) == 1
    write_jsonl(path, arithmetic(1) * 5)
    assert load_examples(str(path), arguments(path), "validation") == []
    assert len(load_examples(str(path), arguments(path), "train")) == 5


def test_max_samples_and_no_validation(tmp_path, arguments):
    path = write_jsonl(tmp_path / "a.jsonl", arithmetic(100))
    assert len(load_examples(str(path), arguments(path, max_samples=10, validation_fraction=0.0))) == 10
    assert len(load_examples("word_problems", arguments(max_samples=10))) == 10
    assert len(load_examples("word_problems", arguments(max_samples=10), "validation")) == 10


def test_list_datasets_names_every_dataset_and_licence_without_importing_torch():
    table = list_datasets()
    for name, entry in EMBEDDED.items():
        assert any(name in line and entry.licence in line for line in table.splitlines())
    for datasets in HUB.values():
        for dataset in datasets:
            assert any(dataset.path in line and dataset.licence in line for line in table.splitlines())
    program = "import sys, data.sources as s; s.list_datasets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
