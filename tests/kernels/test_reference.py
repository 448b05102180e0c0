"""Properties of routing and permutation for any logits, and a readable loop that must agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import combine, inverse, permute, route, swiglu

settings.register_profile("reference", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("reference")


@st.composite
def routed(draw):
    """(logits_TE, K, renormalise, valid_T); coarse logits give ties, an offset gives large values."""
    tokens, experts = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    num_active = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(tokens, experts, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 20.0]))
    if draw(st.booleans()):
        logits = logits.round()
    valid = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    logits = logits + draw(st.sampled_from([0.0, -50.0, 50.0]))
    return logits, num_active, draw(st.booleans()), draw(st.sampled_from([valid, None]))


@given(routed())
def test_choices_and_weights(case):
    logits_TE, num_active, renormalise, valid_T = case
    routing, _ = route(logits_TE, num_active, renormalise, valid_T)
    probs_TE = logits_TE.softmax(-1)
    chosen = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, routing.ids_TK, True)
    assert (chosen.sum(1) == num_active).all()  # K different experts
    best_left = probs_TE.masked_fill(chosen, 0).amax(1)
    chosen_TK = probs_TE.gather(1, routing.ids_TK)
    assert (chosen_TK.amin(1) >= best_left - 1e-6).all()
    assert (chosen_TK.diff(dim=1) <= 1e-6).all()  # best first
    expected = chosen_TK / chosen_TK.sum(1, keepdim=True) if renormalise else chosen_TK
    torch.testing.assert_close(routing.weights_TK, expected, rtol=1e-4, atol=1e-6)


@given(routed(), st.booleans(), st.integers(0, 2**32 - 1))
def test_choices_within_the_allowed_experts(case, one_for_all, seed):
    """As if the others did not exist, but for the statistics: those are of the softmax over all."""
    logits_TE, num_active, renormalise, valid_T = case
    generator = torch.Generator().manual_seed(seed)
    experts = logits_TE.shape[1]
    order = torch.rand((1 if one_for_all else len(logits_TE), experts), generator=generator).argsort(1)
    allowed = torch.rand(order.shape, generator=generator) < 0.3
    allowed.scatter_(1, order[:, :num_active], True)  # at least K
    mask = allowed[0] if one_for_all else allowed
    routing, statistics = route(logits_TE, num_active, renormalise, valid_T, mask)
    allowed = allowed.expand_as(logits_TE)
    _, unlimited = route(logits_TE, num_active, renormalise, valid_T)
    for found, expected in (
        (statistics.z_sum, unlimited.z_sum),
        (statistics.entropy_sum, unlimited.entropy_sum),
    ):
        assert torch.equal(found, expected)
    probs_TE = logits_TE.softmax(-1)
    for token, pool_E in enumerate(allowed):
        pool = pool_E.nonzero().flatten()
        (alone, _), ids = route(logits_TE[token, pool][None], num_active, renormalise), routing.ids_TK[token]
        assert pool_E[ids].all() and len(set(ids.tolist())) == num_active
        assert torch.equal(logits_TE[token, ids], logits_TE[token, pool[alone.ids_TK[0]]])
        weights = alone.weights_TK[0] if renormalise else probs_TE[token, ids]
        torch.testing.assert_close(routing.weights_TK[token], weights, rtol=1e-4, atol=1e-6)
    real = torch.ones(len(logits_TE), dtype=torch.bool) if valid_T is None else valid_T
    assert torch.equal(
        statistics.load_E, torch.bincount(routing.ids_TK[real].flatten(), minlength=experts).float()
    )
    share_E = statistics.load_E / real.sum().clamp(min=1)
    expected = experts * (share_E * probs_TE[real].sum(0)).sum()
    torch.testing.assert_close(statistics.balance_sum, expected, rtol=1e-4, atol=1e-3)


def test_allowed_experts_that_are_next_to_impossible_still_share_the_token():
    logits_TE = torch.tensor([[300.0, 1.0, 0.0, 2.0]], requires_grad=True)
    routing, _ = route(logits_TE, 2, allowed=torch.tensor([False, True, True, True]))
    assert routing.ids_TK.tolist() == [[3, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[2.0, 1.0]]).softmax(-1))
    routing.weights_TK[0, 0].backward()
    assert logits_TE.grad[0, [1, 3]].abs().min() > 0.1 and not logits_TE.grad[0, [0, 2]].any()


def routed_by_hand(logits, num_active, renormalise, allowed, bias, scores, scale):
    """(ids, weights) of one token in Python's own numbers."""
    experts = range(len(logits))
    if scores == "sigmoid":
        score = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        score = [math.exp(x) / total for x in logits]
    wish = list(logits) if bias is None else [score[e] + bias[e] for e in experts]
    ids = sorted((e for e in experts if allowed is None or allowed[e]), key=lambda e: (-wish[e], e))
    ids = ids[:num_active]
    total = sum(score[e] for e in ids) if renormalise else 1.0
    return ids, [scale * score[e] / total for e in ids]


@st.composite
def options(draw, experts: int, num_active: int):
    """Further arguments of `route`, and the same for each of 20 tokens by hand. Coarse biases give ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    order = torch.rand(20, experts, generator=generator).argsort(1)
    pools = order < draw(st.integers(num_active, experts))
    allowed = draw(st.sampled_from([None, pools[0], pools]))
    bias = torch.randn(experts, generator=generator) * draw(st.sampled_from([0.0, 0.01, 1.0]))
    bias = draw(st.sampled_from([None, bias, bias.round()]))
    scores, scale = draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.sampled_from([1.0, 2.5]))
    return allowed, bias, scores, scale


@given(st.data(), st.integers(1, 20), st.integers(1, 9), st.booleans(), st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=150)
def test_every_kind_of_score_and_choice_against_a_loop(data, tokens, experts, renormalise, spread):
    num_active = data.draw(st.integers(1, experts))
    allowed, bias, scores, scale = data.draw(options(experts, num_active))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    logits_TE = (spread * torch.randn(tokens, experts, generator=generator) * 4).round() / 4  # with ties
    if allowed is not None and allowed.dim() == 2:
        allowed = allowed[:tokens]
    routing, _ = route(logits_TE, num_active, renormalise, None, allowed, bias, scores, scale)
    for token, logits in enumerate(logits_TE.tolist()):
        mine = allowed if allowed is None or allowed.dim() == 1 else allowed[token]
        by_hand = (mine if mine is None else mine.tolist(), bias if bias is None else bias.tolist())
        ids, weights = routed_by_hand(logits, num_active, renormalise, *by_hand, scores, scale)
        assert routing.ids_TK[token].tolist() == ids
        assert routing.weights_TK[token].tolist() == pytest.approx(weights, rel=1e-5)


def test_weights_where_every_chosen_score_is_zero_in_fp32():
    logits = [[-200.0, -201.0, -203.0]]
    for scores in ("softmax", "sigmoid"):
        row = (
            [*logits[0], 0.0] if scores == "softmax" else logits[0]
        )  # one that takes all, and is not allowed
        allowed = [True] * 3 + [False] * (len(row) - 3)
        ids, weights = routed_by_hand(row, 2, True, allowed, None, scores, 1.0)
        routing, _ = route(torch.tensor([row]), 2, allowed=torch.tensor(allowed), scores=scores)
        assert routing.ids_TK[0].tolist() == ids == [0, 1]
        assert routing.weights_TK[0].tolist() == pytest.approx(weights, rel=1e-5)


NAN = math.nan


@pytest.mark.parametrize(
    ("row", "arguments", "ids"),
    [
        ([1.0, NAN, 9.0, NAN, 3.0], {}, [1, 3, 2]),
        ([1.0, NAN, 9.0, NAN, 3.0], {"allowed": torch.tensor([1, 0, 1, 0, 1]).bool()}, [2, 4, 0]),
        # One logit that is no number spoils the whole softmax, and its own sigmoid alone.
        ([1.0, NAN, 9.0, 8.0, 3.0], {"bias_E": torch.zeros(5)}, [0, 1, 2]),
        ([1.0, NAN, 9.0, 8.0, 3.0], {"bias_E": torch.zeros(5), "scores": "sigmoid"}, [1, 2, 3]),
        ([0.0, -0.0, 0.0, -0.0, -1.0], {}, [0, 1, 2]),
        ([-math.inf, 1.0, -math.inf, 0.0, -math.inf], {}, [1, 3, 0]),
    ],
)
def test_what_is_no_number_comes_first_and_of_equals_the_lowest(row, arguments, ids):
    plain = [0.5, 0.1, 0.4, 0.2, 0.3]
    routing, statistics = route(torch.tensor([plain, row]), 3, **arguments)
    alone, _ = route(torch.tensor([plain]), 3, **arguments)
    assert routing.ids_TK[1].tolist() == ids
    assert torch.equal(routing.ids_TK[0], alone.ids_TK[0])
    assert torch.equal(routing.weights_TK[0], alone.weights_TK[0])
    assert routing.counts_E.sum() == 6 and statistics.z_sum.isnan() == any(map(math.isnan, row))
    assert routing.weights_TK[1].isnan().any() == any(math.isnan(row[e]) for e in ids)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_gradients_of_every_kind_of_score(scores, renormalise):
    generator = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    valid_T, bias_E = torch.tensor([True, True, False, True]), torch.randn(5, generator=generator)

    def differentiable(logits_TE):
        routing, statistics = route(logits_TE, 2, renormalise, valid_T, None, bias_E, scores, 2.5)
        return routing.weights_TK, statistics.balance_sum, statistics.z_sum

    assert torch.autograd.gradcheck(differentiable, (logits_TE,))


@given(routed())
def test_rows_are_sorted_by_expert_then_token(case):
    logits_TE, num_active, renormalise, valid_T = case
    routing, _ = route(logits_TE, num_active, renormalise, valid_T)
    experts_N = routing.ids_TK.flatten()[routing.order_N]
    tokens_N = routing.order_N // num_active
    assert routing.counts_E.tolist() == [
        (routing.ids_TK == e).sum().item() for e in range(logits_TE.shape[1])
    ]
    keys = (experts_N * len(logits_TE) + tokens_N).tolist()
    assert keys == sorted(keys) and len(set(keys)) == logits_TE.shape[0] * num_active
    assert sorted(routing.order_N.tolist()) == list(range(routing.order_N.numel()))


@given(routed())
def test_statistics_are_sums_over_real_tokens(case):
    logits_TE, num_active, renormalise, valid_T = case
    routing, found = route(logits_TE, num_active, renormalise, valid_T)
    real = torch.ones(len(logits_TE), dtype=torch.bool) if valid_T is None else valid_T
    experts = logits_TE.shape[1]
    logits, probs = logits_TE[real].double(), logits_TE[real].double().softmax(-1)
    load = torch.stack([(routing.ids_TK[real] == e).sum() for e in range(experts)]).double()
    share = load / max(1, len(logits))
    torch.testing.assert_close(found.load_E.double(), load)
    close = {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(found.balance_sum.double(), experts * (share * probs.sum(0)).sum(), **close)
    torch.testing.assert_close(found.z_sum.double(), (logits.exp().sum(-1).log() ** 2).sum(), **close)
    entropy = torch.distributions.Categorical(probs=probs).entropy().sum()
    # Entropy is a small difference of large numbers when logits are far from 0, hence the mean over tokens.
    count = max(1, len(logits))
    torch.testing.assert_close(found.entropy_sum.double() / count, entropy / count, **close)


@given(routed())
def test_losses_of_padding_have_no_gradient(case):
    logits_TE, num_active, renormalise, valid_T = case
    logits_TE = logits_TE.requires_grad_()
    _, statistics = route(logits_TE, num_active, renormalise, valid_T)
    (statistics.balance_sum + statistics.z_sum).backward()
    assert not statistics.entropy_sum.requires_grad and not statistics.load_E.requires_grad
    if valid_T is not None:
        assert not logits_TE.grad[~valid_T].any()


@given(st.permutations(range(13)))
def test_inverse(order):
    order_N = torch.tensor(order)
    inverse_N = inverse(order_N)
    assert inverse_N[order_N].tolist() == order_N[inverse_N].tolist() == list(range(13))


@given(routed())
def test_combine_undoes_permute(case):
    """Experts that do nothing: the output is the input times the sum of its weights."""
    logits_TE, num_active, renormalise, valid_T = case
    routing, _ = route(logits_TE, num_active, renormalise, valid_T)
    hidden_TD = torch.randn(len(logits_TE), 3, generator=torch.Generator().manual_seed(0))
    rows_ND = permute(hidden_TD, routing)
    assert torch.equal(rows_ND, hidden_TD[routing.order_N // num_active])
    expected = hidden_TD * routing.weights_TK.sum(1, keepdim=True)
    torch.testing.assert_close(combine(rows_ND, routing), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("experts", "num_active"), [(4, 1), (5, 2), (3, 3)])
def test_gradcheck_of_permute_and_combine(experts, num_active):
    generator = torch.Generator().manual_seed(1)
    routing, _ = route(torch.randn(7, experts, generator=generator), num_active)
    hidden_TD = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows_ND = torch.randn(7 * num_active, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights_TK = routing.weights_TK.double().requires_grad_()

    def combined(rows, weights):
        return combine(rows, routing._replace(weights_TK=weights))

    assert torch.autograd.gradcheck(lambda hidden: permute(hidden, routing), (hidden_TD,))
    assert torch.autograd.gradcheck(combined, (rows_ND, weights_TK))


def test_swiglu_is_silu_of_the_gate_times_up():
    gate, up = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)
    assert not torch.allclose(swiglu(gate, up), F.silu(up) * gate)


def test_logits_in_bf16_are_routed_in_fp32():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing, statistics = route(logits, 2)
    assert routing.weights_TK.dtype == statistics.z_sum.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK, route(logits.float(), 2)[0].weights_TK)
