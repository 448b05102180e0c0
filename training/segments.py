"""Rows cut in parts that are trained one after the other."""

from itertools import pairwise

from training.step import Batch


def in_segments(microbatches: list[Batch], count: int) -> list[Batch]:
    """Each microbatch cut in `count` parts of its rows, in order. `document_ids` of a part are those of the whole
    row so far. The first token of a later part is no target."""

    def part(batch: Batch, start: int, stop: int) -> Batch:
        return {key: x[:, (key != "document_ids") * start : stop] for key, x in batch.items()}

    if count == 1:
        return microbatches
    parts = []
    for batch in microbatches:
        ends = range(0, batch["input_ids"].shape[1] + 1, batch["input_ids"].shape[1] // count)
        parts += [part(batch, start, stop) for start, stop in pairwise(ends)]
    return parts
