"""What a training run asks of the place where its experts live, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from experts.resident import ResidentBank
from experts.zero3 import Zero3Bank


class Placement:
    """Experts that are ordinary parameters of the model: DeepSpeed reduces, updates and saves them.

    A placement that keeps weights elsewhere overrides what it must do itself (see `experts/streamed.py`).
    """

    groups: tuple[dict, ...] = ()
    """Learning-rate groups of weights that the placement updates itself, as in an optimizer's `param_groups`."""
    updating: bool = False
    """Whether some of the weights are those of the next step already: no moment to save."""

    def __init__(self, build_bank: Callable[..., nn.Module]):
        self.build_bank = build_bank

    def attach(self, engine: object) -> None:
        """Learn the engine that the model has been given to."""

    def take_refused(self) -> int:
        """Experts whose gradient was not finite since the last call; they were not updated."""
        return 0

    def fill(self, source: Callable[..., Tensor]) -> None:
        """Give the weights that are no parameters their values (see `training.weights.Source`)."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(exported name, CPU tensor) of the weights that are no parameters; collective."""
        return iter(())

    def save(self, directory: Path) -> None:
        """Write weights and optimizer state that DeepSpeed does not know of; every rank writes its own."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote, whatever the number of ranks was."""


def ordinary_placement(name: str, page_size: int | None, expert_parallel: int = 1, **settings) -> Placement:
    """`resident` or `zero3`; resident experts are spread over groups of `expert_parallel` ranks, with settings of
    `ExpertParallelBank`."""
    if name == "zero3":
        assert page_size is not None
        return Placement(partial(Zero3Bank, page_size=page_size))
    assert name == "resident", name
    if expert_parallel > 1:
        from experts.expert_parallel import ExpertParallelBank  # all others need no DeepSpeed

        return Placement(partial(ExpertParallelBank, size=expert_parallel, **settings))
    return Placement(ResidentBank)
