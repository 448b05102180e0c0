"""Random-number generators: seeded at the start, their state saved and restored with checkpoints."""

import random

import numpy
import torch


def set_seeds(seed: int, deterministic: bool) -> None:
    """Seed every generator that training could draw from."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads memory it has not written; DeepSpeed allocates its whole bucket in every step.
    torch.utils.deterministic.fill_uninitialized_memory = False


def random_state() -> dict:
    """State of those generators."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict) -> None:
    """Undo `random_state`."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
