"""Learning-rate schedules: their fixed points, and against those of `transformers`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from training.schedule import learning_rate_factor

KINDS = ("cosine", "linear", "constant", "warmup")


def factors(kind: str, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(kind, step, total, warmup) for step in range(total)]


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_is_that_of_transformers(kind, warmup):
    if kind == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer(), warmup, 40)
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer(), warmup, 40, min_lr_rate=0.1)
    (expected,) = schedule.lr_lambdas
    found = factors(kind, 40, warmup)
    assert found[warmup:] == pytest.approx([expected(step) for step in range(warmup, 40)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup"])
def test_warm_up_rises_evenly_and_never_starts_at_zero(kind):
    assert factors(kind, 20, 4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_ends():
    assert learning_rate_factor("cosine", 50, 50, 5) == pytest.approx(0.1)
    assert learning_rate_factor("linear", 50, 50, 5) == 0
    assert learning_rate_factor("cosine", 27, 50, 4) == pytest.approx(0.55)  # half way
    assert factors("warmup", 50, 5)[5:] == [1.0] * 45
    assert factors("constant", 50, 5) == [1.0] * 50


@given(st.sampled_from(KINDS), st.integers(1, 300), st.integers(0, 300), st.integers(0, 600))
def test_every_factor_is_between_zero_and_one_and_falls_after_the_warm_up(kind, total, warmup, step):
    """Also past the end, which a streamed data set may reach, and with a warm-up longer than the run."""
    here, after = (learning_rate_factor(kind, s, total, warmup) for s in (step, step + 1))
    assert 0 <= here <= 1
    if kind != "constant" and step + 1 < warmup:
        assert after > here
    elif step >= warmup:
        assert after <= here
