"""What the kernels are compared with computes the same, as far as a CPU can tell; goals follow from the rows."""

import inspect

import pytest
import torch

from benchmarks import kernels
from kernels import reference


def some_logits(tokens: int, experts: int) -> torch.Tensor:
    """Without ties, as in the benchmark."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(tokens, experts, generator=generator).argsort(1) - experts // 2) / 64


def test_eager_routing_is_the_reference():
    found_TE, expected_TE = (some_logits(50, 12).requires_grad_() for _ in range(2))
    found = kernels.eager_route(found_TE, 3)
    expected = kernels.flat(reference.route(expected_TE, 3))
    assert found.keys() == expected.keys() - {"load_E"} and kernels.agree(expected, found)
    for result in (found, expected):
        (result["weights_TK"][:, 0].sum() + result["balance_sum"] + result["z_sum"]).backward()
    torch.testing.assert_close(found_TE.grad, expected_TE.grad)


def test_deepspeeds_router_chooses_the_same():
    logits_TE = some_logits(50, 12)
    found, expected = kernels.deepspeed_route(12, 3)(logits_TE), kernels.flat(reference.route(logits_TE, 3))
    assert kernels.agree(expected, found)
    weights_TK, order_N = found["deepspeed"]
    torch.testing.assert_close(weights_TK.sort().values, expected["weights_TK"].sort().values)
    assert torch.equal(order_N // 3, expected["order_N"] // 3)  # the same token in each row


def test_deepspeeds_token_operations_take_what_they_are_given():
    from deepspeed.moe.ep_kernels import gather_rows, permute_rows
    from deepspeed.ops.triton_ops.autoep_fused_token_ops import fused_weighted_restore

    names = [
        list(inspect.signature(op).parameters) for op in (gather_rows, permute_rows, fused_weighted_restore)
    ]
    assert names[:2] == [["src", "index"], ["rows", "permuted_indices"]]
    assert names[2] == ["combined_rows", "top_scores", "token_indices_sorted", "top_k", "shape"]


def test_a_difference_is_seen():
    mine = {"counts_E": torch.tensor([2, 1]), "weights_TK": torch.tensor([1.0, 0.5]), "own": torch.zeros(1)}
    assert kernels.agree(mine, {**mine, "weights_TK": mine["weights_TK"] + 0.01})
    assert not kernels.agree(mine, {**mine, "weights_TK": mine["weights_TK"] + 0.03})
    assert not kernels.agree(mine, {**mine, "counts_E": torch.tensor([1, 2])})


def test_goals_are_of_the_headline_and_of_what_agreed():
    cell, width = kernels.HEADLINE, {"width": 512}
    rows = [
        {"operation": "route", **cell, "implementation": "ours", "p50_us": 30.0, "gb_s": 900.0},
        {"operation": "route", **cell, "implementation": "eager", "p50_us": 150.0, "times": 5.0},
        {
            "operation": "route",
            **cell,
            "implementation": "compile",
            "p50_us": 60.0,
            "note": "outputs disagree",
        },
        {"operation": "route", **cell, "tokens": 1024, "implementation": "ours", "p50_us": 90.0},
        {"operation": "permute", **cell, **width, "implementation": "ours", "gb_s": 2400.0},
        {"operation": "permute", **cell, **width, "implementation": "deepspeed", "times": 0.9},
    ]
    judged = {goal["name"]: (goal["measured"], goal["met"]) for goal in kernels.goals(rows)}
    assert judged == {
        "route, 16k tokens, 8 of 128: ours p50_us": (30.0, True),
        "route, 16k tokens, 8 of 128: eager times": (5.0, False),
        "permute, GB/s, median of 16k tokens": (2400.0, True),
        "permute, least gain over DeepSpeed": (0.9, False),
    }


@pytest.mark.parametrize("operations", [kernels.routes(64, 8, 2), kernels.moves(64, 8, 2, 32)])
@pytest.mark.gpu
def test_every_operation_is_measured_against_all_that_have_it(monkeypatch, operations):
    monkeypatch.setattr("torch._functorch.config.donated_buffer", False)
    for row in kernels.measure({"tokens": 64}, operations, 1000.0):
        assert row["p50_us"] > 0 and "note" not in row, row
