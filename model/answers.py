"""From prompts to answers, with the components that a model has; the code that answers is the repository's."""

from __future__ import annotations

import importlib

from model.components import TreeConfig


class AnswerMethods:
    """What `PragnosiaForCausalLM` can do beside `generate`. Each raises UserError without its component."""

    def generate_with_memory(self, tokenizer, prompts: list[str], sampling=None) -> list[str]:
        """Answers of a model with a neural memory, which reads and writes by itself."""
        return repository("generation").generate_with(self, "memory", tokenizer, prompts, sampling)

    def generate_with_cache(self, tokenizer, prompts: list[str], sampling=None) -> list[str]:
        """Answers after the coprocessor has read each prompt."""
        return repository("generation").generate_with(self, "cache", tokenizer, prompts, sampling)

    def generate_with_tree(
        self, tokenizer, prompts: list[str], tree: TreeConfig | None = None, **options
    ) -> list:
        """The tree of each prompt (see `inference/tree_of_thoughts.py`); `tree.answer` is its answer."""
        return repository("tree_of_thoughts").tree_of_thoughts(self, tokenizer, prompts, tree, **options)

    def generate_enhanced(self, tokenizer, prompts: list[str], sampling=None) -> list[str]:
        """Answers with every component that the model has, and without any those of the model alone."""
        return repository("generation").generate_enhanced(self, tokenizer, prompts, sampling)


def repository(module: str):
    """A module of `inference`; an exported model runs where the repository is not.

    Raises:
        ImportError: it is not here.
    """
    try:
        return importlib.import_module(f"inference.{module}")
    except ImportError as error:
        raise ImportError(
            "answers need this project's repository on the path; `generate` does not"
        ) from error
