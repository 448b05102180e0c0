"""Train the tokenizer shipped in data/tokenizer: byte-level BPE with 32,768 entries.

    python data/train_tokenizer.py                       # writes data/tokenizer
    python data/train_tokenizer.py --output DIR --vocab-size 8192

The text comes from what requirements.txt installs: the standard library's source, human conversations,
documentation of the pinned packages, and the procedural generators of this package. With the versions
recorded in `training.json` beside the tokenizer the result is the same to the byte.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.code_tasks import code_tasks
from data.instructions import instructions
from data.stdlib_functions import stdlib_files
from data.tokenizer_asset import TOKENIZER_DIR
from data.word_problems import word_problems

VOCAB_SIZE = 32_768
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
DOCUMENTED = ("transformers", "datasets", "matplotlib", "hypothesis", "wandb", "deepspeed")
"""Pinned packages whose docstrings are English prose to learn from (folders `models` repeat themselves)."""
CHAT_REPEATS = 2
"""How often conversations are counted: everyday English is scarce in the rest."""
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

# Contractions, words with the character before them, at most two digits, punctuation, space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. What stands between the generation marks is what a model writes. The newline is an expression
# because a bare one after a block tag would be trimmed.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def stdlib_text() -> Iterator[str]:
    """The source files of the standard library."""
    for path in stdlib_files():
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def documentation() -> Iterator[str]:
    """The distinct docstrings of the packages in `DOCUMENTED`."""
    seen: set[str] = set()
    for package in DOCUMENTED:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations, f"{package} is not installed"
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(
            path for path in root.rglob("*.py") if "models" not in path.relative_to(root).parts
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                try:
                    tree = ast.parse(path.read_text(encoding="utf-8"))
                except (SyntaxError, UnicodeDecodeError):
                    continue
            nodes: list[ast.AST] = [tree]
            for node in nodes:  # as ast.walk, without the expressions: they hold no definitions
                nodes += (child for child in ast.iter_child_nodes(node) if isinstance(child, _STATEMENTS))
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node)
                    if text and text not in seen:
                        seen.add(text)
                        yield text


def chat_text() -> Iterator[str]:
    """The messages of the conversations."""
    import chitchat_dataset

    for conversation in chitchat_dataset.Dataset().values():
        for group in conversation["messages"]:
            for message in group:
                for _ in range(CHAT_REPEATS):
                    yield message["text"]


def procedural_text() -> Iterator[str]:
    """Word problems, programming tasks and instructions."""
    for generator in (word_problems, code_tasks, instructions):
        for example in generator():
            for message in example.messages:
                yield message["content"]


def corpus() -> dict[str, list[str]]:
    """All of the text by where it comes from."""
    return {part.__name__: list(part()) for part in (stdlib_text, documentation, chat_text, procedural_text)}


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE):
    """A byte-level BPE `tokenizers.Tokenizer` of exactly `vocab_size` entries trained on `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, "too little text for this many entries"
    return tokenizer


def material(texts: dict[str, list[str]]) -> dict[str, str]:
    """What on this machine decides the result: versions, and hashes of the text they installed."""
    packages = ("tokenizers", "chitchat-dataset", *DOCUMENTED)
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    for part in (stdlib_text, documentation, chat_text):
        joined = "\0".join(texts[part.__name__]).encode("utf-8", "surrogatepass")
        found[part.__name__] = hashlib.md5(joined).hexdigest()
    return found


def save(tokenizer, directory: Path, made_from: dict[str, str]) -> str:
    """Write the tokenizer with its chat template, and `training.json`; returns the md5 of the former."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.save_pretrained(directory)
    digest = hashlib.md5((directory / "tokenizer.json").read_bytes()).hexdigest()
    record = {"vocab_size": tokenizer.get_vocab_size(), "md5": digest, "material": made_from}
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return digest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=TOKENIZER_DIR, help="directory to write (default: %(default)s)"
    )
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="entries (default: %(default)s)")
    args = parser.parse_args()
    texts = corpus()
    digest = save(train(itertools.chain(*texts.values()), args.vocab_size), args.output, material(texts))
    print(f"{args.output}: {args.vocab_size} entries, md5 {digest}")


if __name__ == "__main__":
    main()
