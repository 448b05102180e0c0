"""Step routing: one pool a microbatch, chosen evenly over time in training and causally everywhere else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import model.step_routing as step_routing
from inference.generation import Sampling, decode
from kernels.reference import route
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.step_routing import (
    PoolChoice,
    StepRouter,
    largest,
    pool_uses,
    restore_pool_uses,
    step_routers,
    training_choice,
)
from training.weights import fill, initial_weights

EXPERTS, POOL = 8, 3


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 67, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def stepped(build):
    """A function of config overrides to a model with step routing, its own probabilities far from even."""

    def build_stepped(**overrides):
        fields = {"routing": "step", "expert_pool": POOL, "initializer_range": 0.4, "pad_token_id": 0}
        return build(**{**fields, "tie_word_embeddings": False, **overrides})

    return build_stepped


@pytest.fixture
def batch():
    """Rows of packed documents and padding."""
    ids = random_ids(2, 12)
    document_ids = torch.tensor([[1] * 5 + [2] * 7, [1] * 3 + [2] * 6 + [0] * 3])
    labels = torch.where(document_ids > 0, ids, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": document_ids}


def record_routings(model) -> list:
    """A list to which every forward adds, layer by layer, (the router's input, its routing)."""
    seen = []
    for router in step_routers(model):
        router.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].detach(), output[0])))
    return seen


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


# -- training -------------------------------------------------------------------------------------------------


def test_one_pool_serves_the_microbatch_and_alone_learns(stepped, batch):
    model = stepped().train()
    seen = record_routings(model)
    model(**batch).loss.backward()
    for layer, (_, routing) in zip(model.model.layers, seen, strict=True):
        used = routing.counts_E > 0
        assert 2 <= used.sum() <= POOL
        assert (used <= layer.mlp.gate.uses_E.bool()).all() and layer.mlp.gate.uses_E.sum() == POOL
        for weight in layer.mlp.experts.parameters():
            assert torch.equal(weight.grad.flatten(1).any(1), used)
        assert layer.mlp.gate.weight.grad.any(1).all()


def test_the_loss_alone_reaches_the_router(stepped, batch):
    model = stepped(router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()
    model(**batch).loss.backward()
    for router in step_routers(model):
        assert torch.equal(router.weight.grad.any(1), router.uses_E.bool())


def test_the_pool_is_the_likeliest_of_the_real_tokens(stepped, batch):
    model = stepped().train()
    seen = record_routings(model)
    model(**batch)
    real = batch["document_ids"].flatten() > 0
    for router, (hidden_TD, _) in zip(step_routers(model), seen, strict=True):
        mean_E = (hidden_TD @ router.weight.T).softmax(-1)[real].mean(0)
        assert set(mean_E.topk(POOL).indices.tolist()) == set(router.uses_E.nonzero().flatten().tolist())


@pytest.mark.parametrize("training", [True, False])
def test_a_pool_of_all_experts_is_token_routing(build, stepped, batch, training):
    ours, theirs = stepped(expert_pool=EXPERTS).train(training), stepped(routing="token", expert_pool=None)
    found, expected = ours(**batch), theirs.train(training)(**batch)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.load_LE, expected.load_LE)
    found.loss.backward()
    expected.loss.backward()
    for name, gradient in gradients(ours).items():
        assert torch.equal(gradient, gradients(theirs)[name]), name


def skewed_router() -> tuple[StepRouter, torch.Generator]:
    """A router that likes its first expert e³ = 20 times as much as its last, whatever the token."""
    config = PragnosiaConfig(
        hidden_size=4, num_experts=EXPERTS, num_experts_per_tok=2, routing="step", expert_pool=POOL
    )
    router = StepRouter(config).train()
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        router.weight[:, 0] = torch.linspace(3, 0, EXPERTS)
    return router, torch.Generator().manual_seed(1)


def shares_of(router: StepRouter, generator: torch.Generator, steps: int) -> torch.Tensor:
    """The share of the microbatches in whose pool each expert was."""
    for _ in range(steps):
        hidden_TD = torch.randn(32, 4, generator=generator)
        hidden_TD[:, 0] = 1
        router(hidden_TD, None, PoolChoice(1, None, None, 0))
    assert router.uses_E.sum() == steps * POOL
    return router.uses_E / steps


def test_experts_take_turns():
    """After 300 microbatches every share is within a fifth of M / n, though the router likes one 20 times more."""
    even = POOL / EXPERTS
    assert ((shares_of(*skewed_router(), 300) - even).abs() <= 0.2 * even).all()


def test_without_the_control_the_likely_experts_are_always_in(monkeypatch):
    monkeypatch.setattr(step_routing, "BALANCE_RATE", 0.0)
    shares_E = shares_of(*skewed_router(), 300)
    assert shares_E.max() > 0.9 and shares_E.min() == 0


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_largest_takes_the_first_among_equals(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:count]
    found = largest(torch.tensor([scores, scores]), count)
    assert found.shape == (2, len(scores))
    assert found[0].nonzero().flatten().tolist() == found[1].nonzero().flatten().tolist() == sorted(expected)


def test_a_microbatch_without_meaning_is_not_counted(stepped, batch):
    model = stepped().train()
    empty = {**batch, "document_ids": torch.zeros_like(batch["document_ids"])}
    assert model(**{**empty, "labels": torch.full_like(batch["labels"], -100)}).loss == 0
    handle = model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: output * float("nan"))
    assert model(**batch).loss.isnan()
    assert pool_uses(model) == [[0] * EXPERTS] * 2
    handle.remove()
    assert model(**batch).loss.isfinite() and sum(pool_uses(model)[0]) == POOL


def test_recompute_finds_the_pools_of_its_forward(stepped, batch):
    """Two forwards before two backwards, with and without activation checkpointing."""
    other = {**batch, "input_ids": random_ids(2, 12, seed=2)}
    results = []
    for checkpointing in (False, True):
        model = stepped().train()
        model.model.gradient_checkpointing = checkpointing
        loss = model(**batch).loss + 2 * model(**other).loss
        uses = pool_uses(model)
        loss.backward()
        assert pool_uses(model) == uses and sum(uses[0]) == 2 * POOL
        results.append((loss.detach(), gradients(model), uses))
    (loss, expected, uses), (found_loss, found, found_uses) = results
    assert torch.equal(loss, found_loss) and uses == found_uses
    assert sum(count > 0 for count in uses[0]) > POOL  # pools differed, else a mistake would go unseen
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_counts_belong_to_the_run_and_not_to_the_model(stepped, batch):
    model, other = stepped().train(), stepped()
    model(**batch)
    assert not [name for name in model.state_dict() if "uses" in name]
    restore_pool_uses(other, pool_uses(model))
    assert pool_uses(other) == pool_uses(model) != [[0] * EXPERTS] * 2
    for router in step_routers(model.bfloat16()):
        assert router.uses_E.dtype == torch.int64
    with pytest.raises(ValueError):
        restore_pool_uses(other, [])


def test_counts_start_at_zero(stepped, tmp_path):
    """In a model from a file, and in one built without memory and filled."""
    model = stepped().train()
    model(random_ids(1, 9))
    model.save_pretrained(tmp_path)
    loaded = PragnosiaForCausalLM.from_pretrained(tmp_path)
    assert pool_uses(loaded) == [[0] * EXPERTS] * 2
    torch.testing.assert_close(loaded(random_ids(1, 9)).logits, model.eval()(random_ids(1, 9)).logits)
    fill(model, initial_weights(0, 0.02))
    assert pool_uses(model) == [[0] * EXPERTS] * 2


# -- evaluation and generation --------------------------------------------------------------------------------


def test_pools_of_prefixes(stepped, batch):
    """Against a loop: a token's experts are its best among the likeliest of its document so far."""
    model = stepped().eval()
    seen = record_routings(model)
    model(**batch)
    assert pool_uses(model) == [[0] * EXPERTS] * 2
    documents = batch["document_ids"].tolist()
    pools = set()
    for router, (hidden_TD, routing) in zip(step_routers(model), seen, strict=True):
        probs_BSE = (hidden_TD @ router.weight.T).softmax(-1).view(2, 12, EXPERTS).detach()
        ids_BSK = routing.ids_TK.view(2, 12, 2)
        for row in range(2):
            for place in range(12):
                own = [s for s in range(place + 1) if documents[row][s] == documents[row][place]]
                pool = probs_BSE[row, own].sum(0).topk(POOL).indices
                pools.add(tuple(sorted(pool.tolist())))
                best = pool[probs_BSE[row, place, pool].topk(2).indices]
                assert ids_BSK[row, place].tolist() == best.tolist(), (row, place)
    assert len(pools) > 4


@pytest.mark.parametrize("changed", range(12))
def test_a_later_token_changes_no_earlier_logit(stepped, batch, changed):
    model = stepped().eval()
    ids = batch["input_ids"].clone()
    ids[:, changed] = ids[:, changed] % 66 + 1
    documents = batch["document_ids"]
    for fields in ({}, {"document_ids": documents}):
        before = model(batch["input_ids"], **fields).logits
        after = model(ids, **fields).logits
        torch.testing.assert_close(before[:, :changed], after[:, :changed], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(before[:, changed], after[:, changed], rtol=1e-2)
        if fields:  # the other documents of the row do not see it either
            others = documents != documents[:, changed : changed + 1]
            torch.testing.assert_close(before[others], after[others], rtol=1e-4, atol=1e-5)


def test_training_does_look_ahead_and_is_measured(stepped, batch):
    """The training choice in evaluation: training's own loss, which later tokens do change; nothing is counted."""
    model = stepped().train()
    model(**batch)
    uses = pool_uses(model)
    with training_choice(model.eval()):
        found = model(**batch).loss_sum
        changed = batch["input_ids"].clone()
        changed[:, 6:] = random_ids(2, 6, seed=5)
        differs = model(batch["input_ids"]).logits[:, :6] != model(changed).logits[:, :6]
    assert pool_uses(model) == uses and differs.any()
    assert not torch.equal(model(**batch).loss_sum, found)
    assert torch.equal(model.train()(**batch).loss_sum, found)
    with pytest.raises(RuntimeError), training_choice(model):
        raise RuntimeError
    assert not any(router.as_in_training for router in step_routers(model))


@pytest.mark.parametrize("parts", [[4, 1, 1, 3], [1] * 9, [8, 1], [2, 7]])
def test_the_cache_holds_the_sums(stepped, parts):
    model = stepped().eval()
    ids = random_ids(2, 9)
    cache, steps = None, []
    for part in ids.split(parts, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_cache_padding_and_beams(stepped, num_beams):
    model = stepped().eval()
    prompts = [random_ids(length, seed=length) for length in (9, 4, 1)]
    ids = torch.stack([torch.cat((torch.zeros(9 - len(p), dtype=torch.int64), p)) for p in prompts])
    options = {"max_new_tokens": 15, "do_sample": False, "num_beams": num_beams}
    mask = (ids > 0).long()
    together = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)[0, len(prompt) :]
        assert together[row, 9 : 9 + len(alone)].tolist() == alone.tolist()


def test_our_decoding_of_padded_prompts_equals_recomputation(stepped):
    model = stepped().eval()
    prompts = [random_ids(length, seed=length).tolist() for length in (9, 4, 1)]
    options = {"eos_token_id": 66, "pad_token_id": 0, "device": "cpu"}
    answers = list(zip(*decode(model, prompts, Sampling.greedy(12), **options), strict=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        own = [token for token in answer if token is not None]
        logits = model(torch.tensor([prompt + own]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == own


def test_masks_of_eager_attention_say_the_same(stepped):
    model = stepped().eval()
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    found = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)


def test_a_cache_starts_anew_and_refuses_what_it_cannot_do(stepped):
    model = stepped().eval()
    ids, cache = random_ids(1, 5), DynamicCache()
    first = model(ids, past_key_values=cache).logits
    with pytest.raises(ValueError, match="assistant"):
        cache.crop(-1)
    cache.reset()
    assert torch.equal(model(ids, past_key_values=cache).logits, first)
    static = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=static)


def test_a_token_model_keeps_plain_caches(build):
    output = build().eval()(random_ids(1, 5), use_cache=True)
    assert [type(layer).__name__ for layer in output.past_key_values.layers] == ["DynamicLayer"] * 2


def test_route_sees_the_pool_of_a_router(stepped):
    """The router adds nothing to `route` but the pool."""
    router = step_routers(stepped())[0].train()
    hidden_TD = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    choice = PoolChoice(1, None, None, 0)
    routing, statistics = router(hidden_TD, None, choice)
    expected, sums = route(hidden_TD @ router.weight.T, 2, True, None, choice.pool_E)
    assert torch.equal(routing.ids_TK, expected.ids_TK)
    torch.testing.assert_close(routing.weights_TK, expected.weights_TK)
    torch.testing.assert_close(statistics.balance_sum, sums.balance_sum)


def test_the_model_is_built_with_the_router_it_asks_for(build, stepped):
    assert len(step_routers(stepped())) == 2 and step_routers(build()) == []
    assert isinstance(stepped(), PragnosiaForCausalLM)
