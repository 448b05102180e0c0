"""Documents packed into rows of one length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data.documents import Documents
from data.prompts import IGNORED

EMPTY = -1
"""The index of a row that is all padding."""


def pack(lengths: Sequence[int], max_length: int, seed: int = 0) -> list[list[int]]:
    """Which documents share a row: best fit, longest first, equally long ones in an order `seed` decides.

    Every document is in exactly one row, and no row holds more than `max_length` tokens.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by the room they have left
    rooms = 0  # bit r is set while with_room[r] is not empty
    mixed = np.random.default_rng(seed).permutation(len(lengths))
    for document in mixed[np.argsort(-np.asarray(lengths)[mixed], kind="stable")].tolist():
        length = int(lengths[document])
        assert 0 < length <= max_length, f"document of {length} tokens in rows of {max_length}"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(document)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


class PackedDataset(torch.utils.data.Dataset):
    """Rows of `max_length` tokens, each of several whole documents and padding at the end.

    Item `i` is a dict of int64 tensors of shape `[max_length]`:
        input_ids: tokens; `pad_id` where padding is.
        labels: the token itself where it is a target, else -100; not shifted. A document's first token never
            is one.
        document_ids: 1, 2, ... in the order of the row; 0 where padding is.
        position_ids: the position in its document; 0 where padding is.
        value_labels: 1 or 0 at the end of a step, else -100; only if some part has them.
    Item `EMPTY` is a row of padding alone.

    Args:
        parts: documents and their weight: how often an epoch shows them. A row holds documents of one part.
        seed: decides which documents share a row.

    Attributes:
        num_examples, num_targets, target_bytes: sums over the parts, weights aside.
    """

    def __init__(
        self, parts: Sequence[tuple[Documents, float]], max_length: int, pad_id: int, seed: int = 0
    ) -> None:
        self.max_length = max_length
        self.pad_id = pad_id
        self.parts = list(parts)
        self.has_values = any(documents.values is not None for documents, _ in self.parts)
        self.rows = [
            (part, row)
            for part, (docs, _) in enumerate(parts)
            for row in pack(docs.lengths(), max_length, seed)
        ]
        self.num_examples = sum(documents.examples for documents, _ in parts)
        self.num_targets = sum(int(documents.targets.sum()) for documents, _ in parts)
        self.target_bytes = sum(documents.target_bytes for documents, _ in parts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {
            "input_ids": torch.full((self.max_length,), self.pad_id, dtype=torch.int64),
            "labels": torch.full((self.max_length,), IGNORED, dtype=torch.int64),
            "document_ids": torch.zeros(self.max_length, dtype=torch.int64),
            "position_ids": torch.zeros(self.max_length, dtype=torch.int64),
        }
        if self.has_values:
            row["value_labels"] = torch.full((self.max_length,), IGNORED, dtype=torch.int64)
        if index == EMPTY:
            return row
        part, members = self.rows[index]
        documents = self.parts[part][0]
        start = 0
        for number, member in enumerate(members, 1):
            span = slice(documents.offsets[member], documents.offsets[member + 1])
            tokens = torch.from_numpy(documents.tokens[span].astype(np.int64))
            end = start + len(tokens)
            row["input_ids"][start:end] = tokens
            row["labels"][start:end] = tokens.masked_fill(
                ~torch.from_numpy(documents.targets[span].copy()), IGNORED
            )
            if documents.values is not None:
                row["value_labels"][start:end] = torch.from_numpy(documents.values[span].astype(np.int64))
            row["document_ids"][start:end] = number
            row["position_ids"][start:end] = torch.arange(len(tokens))
            start = end
        return row

    def epoch_rows(self, seed: int, epoch: int) -> np.ndarray:
        """Row indices of an epoch in its order, int64: a pure function of `seed` and `epoch`.

        A part of weight 2.3 gives each of its rows twice and three tenths of them, chosen anew each epoch,
        once more.
        """
        rng = np.random.default_rng([seed, epoch])
        owners = np.array([part for part, _ in self.rows], np.int64)
        chosen = []
        for part, (_, weight) in enumerate(self.parts):
            rows = np.flatnonzero(owners == part)
            chosen += [rows] * int(weight)
            chosen.append(rng.permutation(rows)[: round(weight % 1 * len(rows))])
        order = np.concatenate(chosen) if chosen else owners
        rng.shuffle(order)
        return order


def stack(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as one microbatch: tensors of shape `[len(rows), max_length]`."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
