"""Rows cut in parts that are trained one after the other."""

from itertools import pairwise

from training.config import UserError
from training.step import Batch


def in_segments(microbatches: list[Batch], count: int) -> list[Batch]:
    """Each microbatch cut in `count` parts of its rows, in order. `document_ids` of a part are those of the whole
    row so far. The first token of a later part is no target.

    Raises:
        UserError: rows that cannot be cut so.
    """

    def part(batch: Batch, start: int, stop: int) -> Batch:
        return {key: x[:, (key != "document_ids") * start : stop] for key, x in batch.items()}

    if count == 1:
        return microbatches
    parts = []
    for batch in microbatches:
        length = batch["input_ids"].shape[1]
        if length % count:
            raise UserError(f"--segments {count} must divide the rows, which have {length} tokens")
        ends = range(0, length + 1, length // count)
        parts += [part(batch, start, stop) for start, stop in pairwise(ends)]
    return parts
