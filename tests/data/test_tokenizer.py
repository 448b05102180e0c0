"""The tokenizer asset, loading others, and training it again."""

import functools
import hashlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer_asset import TOKENIZER_DIR, load_tokenizer
from data.train_tokenizer import VOCAB_SIZE, corpus, material, procedural_text, save, train
from training.config import UserError

RECORD = json.loads((TOKENIZER_DIR / "training.json").read_text())


def test_the_asset_is_what_training_recorded(tokenizer):
    content = (TOKENIZER_DIR / "tokenizer.json").read_bytes()
    assert hashlib.md5(content).hexdigest() == RECORD["md5"]
    assert len(content) < 3_000_000
    assert len(tokenizer) == VOCAB_SIZE == RECORD["vocab_size"]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


shipped = functools.cache(load_tokenizer)  # for hypothesis, which takes no fixtures


# A character that UTF-8 cannot write (a lone surrogate) is no text.
@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(text):
    ids = shipped()(text, add_special_tokens=False)["input_ids"]
    assert shipped().decode(ids, clean_up_tokenization_spaces=False) == text
    assert not set(ids) & set(shipped().all_special_ids)


@pytest.mark.parametrize("text", ["7", "12", "12345", "x=3141592653", "1,000,000.25", "²³½", "٣٤٥٦"])
def test_a_token_holds_at_most_two_digits(tokenizer, text):
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        assert sum(character.isnumeric() for character in tokenizer.decode([token])) <= 2


def test_it_compresses_english_and_code(tokenizer):
    samples = {
        "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. ": 3.0,
        "def first_or_none(values):\n    for value in values:\n        return value\n    return None\n": 3.0,
    }
    for text, characters_a_token in samples.items():
        assert len(text) / len(tokenizer(text)["input_ids"]) > characters_a_token


def test_a_saved_copy_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = load_tokenizer(tmp_path)
    text = "Write 12 + 30.\n\tdone  ok"
    assert copy(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert copy.chat_template == tokenizer.chat_template and copy.pad_token == tokenizer.pad_token


def test_training_twice_gives_the_same_bytes(tmp_path):
    written = []
    for name in ("first", "second"):
        digest = save(train(procedural_text(), 1500), tmp_path / name, {})
        content = (tmp_path / name / "tokenizer.json").read_bytes()
        assert hashlib.md5(content).hexdigest() == digest
        written.append(content)
    assert written[0] == written[1]
    assert len(load_tokenizer(tmp_path / "first")) == 1500


@pytest.mark.slow
def test_training_gives_the_asset_where_the_same_material_is_installed(tmp_path):
    texts = corpus()
    found = material(texts)
    differing = [name for name, value in RECORD["material"].items() if found[name] != value]
    if differing:
        pytest.skip(f"the tokenizer was trained with another {', '.join(differing)}")
    assert save(train(itertools.chain(*texts.values())), tmp_path, found) == RECORD["md5"]
    for file in TOKENIZER_DIR.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_tokenizer_without_padding_token_pads_with_its_end(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).pad_token == tokenizer.eos_token


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda path: [file.unlink() for file in path.iterdir()] and path.rmdir(), "does not exist"),
        (lambda path: (path / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text('{"model": '), "holds no readable tokenizer"),
        (
            lambda path: (path / "tokenizer_config.json").write_text('{"tokenizer_class": '),
            "no readable tokenizer",
        ),
        (
            lambda path: (path / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}'
            ),
            "has no eos_token",
        ),
    ],
)
def test_a_wrong_directory_is_one_line(tokenizer, tmp_path, break_it, expected):
    directory = tmp_path / "tokenizer"
    tokenizer.save_pretrained(directory)
    break_it(directory)
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory)
    assert expected in str(caught.value) and str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
