"""Text, tokens and order: everything between a file and a microbatch.

A batch comes about in four stages, one module each:

    sources.py   a dataset spec (`chat:2,my.jsonl`) -> sources -> `Example`s, split into train and validation
    prompts.py   an `Example` -> prompt and answer text -> token ids and labels
    packing.py   tokenized documents -> rows of `max_length` tokens with document boundaries
    loader.py    rows -> the microbatches of each step, the same for every number of ranks

This module imports no torch.
"""

from data.example import FAMILIES, Example

__all__ = ["FAMILIES", "Example"]
