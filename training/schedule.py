"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

import math


def learning_rate_factor(kind: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """What the base learning rate is multiplied with at `step` (0-based) of `total_steps`.

    Linear warm-up over `warmup_steps`, then `cosine` to a tenth, `linear` to zero, or unchanged for `constant`
    and `warmup` (`constant` has no warm-up phase).
    """
    if kind == "constant":
        return 1.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "warmup":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return 1.0 - progress
    assert kind == "cosine", kind
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
