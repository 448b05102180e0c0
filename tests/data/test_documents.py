"""Tokenized documents and their cache."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import documents
from data.documents import cached_entry, read_entry, tokenize
from data.example import Example
from data.sources import resolve
from training.config import UserError

from .conftest import arithmetic, write_jsonl


def chat(question: str, answer: str) -> Example:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Example("chat", turns, "test")


def text(content: str) -> Example:
    return Example("text", [{"role": "assistant", "content": content}], "test", prompt_format="text")


def test_documents_count_what_they_keep_drop_and_cut(tokenizer):
    made = tokenize(
        [chat("a", "b"), chat("a", ""), chat("a", "b " * 100), chat("a " * 100, "b")], tokenizer, 32
    )
    assert (len(made), made.examples, made.dropped, made.truncated) == (2, 2, 2, 2)
    assert made.lengths().max() == 32
    assert tokenizer.decode(made.tokens[made.targets][:2].tolist()) == "b<|im_end|>"


def test_target_bytes_are_the_answers_bytes_in_utf8(tokenizer):
    assert tokenize([chat("größer", "größer"), chat("x", "12")], tokenizer, 64).target_bytes == 8 + 2
    cut = tokenize([chat("a", "b " * 100)], tokenizer, 32)
    answer = tokenizer.decode(cut.tokens[cut.targets].tolist())
    assert cut.target_bytes == len(answer)


def test_long_texts_are_split_without_loss(tokenizer):
    content = "One two three. " * 200
    made = tokenize([text(content), text("short")], tokenizer, 100)
    assert made.examples == 2 and made.truncated == 0 and len(made) > 4
    assert tokenizer.decode(made.tokens.tolist()) == content + "<|im_end|>short<|im_end|>"
    assert not made.targets[made.offsets[:-1]].any()
    assert made.targets.sum() == len(made.tokens) - len(made)


def test_more_examples_than_a_chunk_keep_their_order(tokenizer, monkeypatch):
    examples = [chat("q", str(i)) for i in range(50)]
    whole = tokenize(examples, tokenizer, 64)
    monkeypatch.setattr(documents, "CHUNK", 7)
    assert np.array_equal(tokenize(examples, tokenizer, 64).tokens, whole.tokens)


@pytest.fixture
def source(tmp_path, arguments):
    return resolve(arguments(write_jsonl(tmp_path / "a.jsonl", arithmetic(60))))[0]


def test_a_cached_entry_reads_back_as_it_was_made(source, arguments, tokenizer):
    path = cached_entry(source, tokenizer, arguments())
    entry = read_entry(path)
    assert entry.report["rows"] + entry.report["validation_rows"] == 60
    assert len(entry.validation_examples) == entry.validation.examples >= 1
    fresh = tokenize(source.examples(), tokenizer, 512)
    assert len(fresh.tokens) == len(entry.train.tokens) + len(entry.validation.tokens)
    assert entry.report["tokens"] == len(entry.train.tokens) and entry.train.target_bytes > 0
    assert entry.validation_examples[0].family == "reasoning"


def test_a_second_run_tokenizes_nothing(source, arguments, tokenizer, monkeypatch):
    path = cached_entry(source, tokenizer, arguments())
    monkeypatch.setattr(documents, "make_entry", None)
    assert cached_entry(source, tokenizer, arguments()) == path
    assert cached_entry(replace(source, weight=3.0), tokenizer, arguments()) == path


def test_content_and_settings_make_another_entry(source, arguments, tokenizer):
    import copy

    keys = {cached_entry(source, tokenizer, arguments())}
    for settings in (
        {"max_length": 64},
        {"train_on_prompt": True},
        {"max_samples": 9},
        {"validation_fraction": 0.2},
    ):
        keys.add(cached_entry(source, tokenizer, arguments(**settings)))
    keys.add(cached_entry(source, tokenizer, arguments(), evaluation=True))
    keys.add(cached_entry(replace(source, prompt_format="instruction"), tokenizer, arguments()))
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("assistant", "helper")
    keys.add(cached_entry(source, other, arguments()))
    write_jsonl(Path(source.location), arithmetic(61))
    keys.add(cached_entry(source, tokenizer, arguments()))
    assert len(keys) == 9


def test_a_python_dataset_is_known_by_what_it_yields(tmp_path, arguments):
    (tmp_path / "n.txt").write_text("3")
    file = tmp_path / "mine.py"
    file.write_text(
        f"def examples():\n    for i in range(int(open({str(tmp_path / 'n.txt')!r}).read())):\n"
        "        yield {'text': str(i)}\n"
    )
    (source,) = resolve(arguments(file))
    before = source.fingerprint()
    assert source.fingerprint() == before
    (tmp_path / "n.txt").write_text("4")
    assert source.fingerprint() != before


def test_an_interrupted_write_leaves_no_entry(source, arguments, tokenizer, monkeypatch):
    def broken(entry, directory):
        directory.mkdir()
        (directory / "report.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(documents, "write_entry", broken)
        with pytest.raises(KeyboardInterrupt):
            cached_entry(source, tokenizer, arguments())
    assert list(Path(arguments().cache_dir).iterdir()) == []
    assert read_entry(cached_entry(source, tokenizer, arguments())).report["rows"] > 0


def test_all_rows_dropped_is_an_error_and_some_are_counted(tmp_path, arguments, tokenizer):
    rows = [{"prompt": f"q{i}", "answer": "" if i < 5 else "a"} for i in range(20)]
    (source,) = resolve(arguments(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert read_entry(cached_entry(source, tokenizer, arguments())).report["dropped"] == 5
    (source,) = resolve(arguments(write_jsonl(tmp_path / "b.jsonl", rows[:5])))
    with pytest.raises(UserError, match=r"b\.jsonl: none of its 5 rows has a target token within 512 tokens"):
        cached_entry(source, tokenizer, arguments())


def test_an_answer_behind_the_maximum_length_is_no_target(tmp_path, arguments, tokenizer):
    (source,) = resolve(
        arguments(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "long " * 50, "answer": "a"}]))
    )
    with pytest.raises(UserError, match="within 16 tokens; check the answers, or raise --max-length"):
        cached_entry(source, tokenizer, arguments(max_length=16))


def test_a_cache_that_cannot_be_written_is_one_line(source, arguments, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write the token cache .*; set --cache-dir"):
        cached_entry(source, tokenizer, arguments())


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk"
)
def test_a_full_disk_is_one_line_and_leaves_no_entry(source, arguments, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(UserError, match=r"cannot write the token cache .*No space left"):
            cached_entry(source, tokenizer, arguments())
        assert list(cache.iterdir()) == []
    finally:
        subprocess.run(["umount", str(cache)], check=True)
