"""The bias of routers: what it changes, how it moves, and that nothing loses it."""

import pytest
import torch
from safetensors.torch import load_file

from model import PragnosiaConfig, PragnosiaForCausalLM
from model.router import BIAS_STEP, Router, nudge_biases
from training.export import export_model, verify_export
from training.weights import directory_weights, fill, model_weights

EXPERTS, TOKENS = 8, 512


@pytest.fixture
def router():
    """A function of config overrides to a router that prefers low experts."""

    def build_router(**overrides):
        sizes = {"hidden_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2}
        router = Router(PragnosiaConfig(**sizes, **overrides))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            router.weight.normal_(std=0.2, generator=generator)
            router.weight[:, 0] = torch.linspace(0.8, -0.8, EXPERTS)
        return router

    return build_router


def tokens(seed: int) -> torch.Tensor:
    hidden_TD = torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(seed))
    hidden_TD[:, 0] = 1
    return hidden_TD


def variation(load_E: torch.Tensor) -> float:
    return (load_E.std(correction=0) / load_E.mean()).item()


@torch.no_grad()
def test_a_skewed_router_becomes_balanced(router):
    biased, plain = router(router_bias=True), router()
    for step in range(400):
        _, statistics = biased(tokens(step), None)
        nudge_biases(biased, statistics.load_E[None])
    assert variation(plain(tokens(999), None)[1].load_E) > 0.6
    assert variation(biased(tokens(999), None)[1].load_E) < 0.15


def test_a_bias_of_zero_changes_no_bit(router):
    results = []
    for module in (router(router_bias=True), router()):
        routing, statistics = module(tokens(0), torch.arange(TOKENS) % 3 > 0)
        (routing.weights_TK[:, 0].sum() + statistics.balance_sum + statistics.z_sum).backward()
        results.append([*routing, *statistics, module.weight.grad])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_bias_decides_the_choice_alone(router):
    """Weights are of the probabilities, and so are the losses."""
    biased, hidden_TD = router(router_bias=True), tokens(0)
    biased.nudges_E[7] = 700
    routing, statistics = biased(hidden_TD, None)
    probs_TE = (hidden_TD @ biased.weight.T).softmax(-1)
    wish_TE = probs_TE + BIAS_STEP * biased.nudges_E
    assert torch.equal(routing.ids_TK, wish_TE.topk(2).indices) and (routing.ids_TK == 7).any(1).all()
    chosen_TK = probs_TE.gather(1, routing.ids_TK)
    torch.testing.assert_close(routing.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))
    assert torch.equal(statistics.z_sum, router()(hidden_TD, None)[1].z_sum)


def test_each_layer_moves_towards_its_own_mean(build):
    model = build(router_bias=True)
    gates = [layer.mlp.gate for layer in model.model.layers]
    nudge_biases(model, torch.tensor([[4.0, 0, 1, 2, 1, 0, 0, 0], [3.0] * EXPERTS]))
    assert gates[0].nudges_E.tolist() == [-1, 1, 0, -1, 0, 1, 1, 1] and not gates[1].nudges_E.any()
    nudge_biases(model, torch.tensor([[0.0] * EXPERTS, [2.0**24, 2.0**24 - 1] + [2.0**24] * 6]))
    assert gates[0].nudges_E.tolist() == [-1, 1, 0, -1, 0, 1, 1, 1]  # no tokens, no move
    assert gates[1].nudges_E.tolist() == [-1, 1] + [-1] * 6  # exact: the mean lies between neighbours of fp32
    with pytest.raises(ValueError):
        nudge_biases(model, torch.zeros(1, EXPERTS))


def test_routers_of_a_copy_in_the_coprocessor_are_left_alone(build):
    model = build(router_bias=True, cache={"hidden_size": 32, "coprocessor": "copy"})
    nudge_biases(model, torch.tensor([[4.0] + [0.0] * (EXPERTS - 1)] * 2))
    assert model.model.layers[1].mlp.gate.nudges_E.any()
    assert not any(layer.mlp.gate.nudges_E.any() for layer in model.cache.copy.layers)


def test_step_routing_has_no_bias():
    with pytest.raises(ValueError, match="a router with biases needs routing token"):
        PragnosiaConfig(router_bias=True, routing="step")


# -- where a bias has to survive ------------------------------------------------------------------------------


@pytest.fixture
def biased(build):
    """A model whose biases lie beyond what bf16 holds, and change choices."""
    model = build(router_bias=True).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.gate.nudges_E.random_(-999, 999, generator=generator)
    return model


def nudges(model) -> list[list[int]]:
    return [layer.mlp.gate.nudges_E.tolist() for layer in model.model.layers]


def test_no_cast_rounds_it(biased):
    before = nudges(biased)
    assert nudges(biased.bfloat16()) == before and any(abs(count) > 256 for count in before[0])


def test_transformers_saves_and_loads_it(biased, tmp_path):
    biased.save_pretrained(tmp_path)
    loaded = PragnosiaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert nudges(loaded) == nudges(biased)


class NoTokenizer:
    def save_pretrained(self, directory):
        pass


def test_an_export_holds_it(biased, build, tmp_path):
    export_model(biased, NoTokenizer(), tmp_path, export_format="pragnosia", write=True)
    ids = torch.arange(16)[None] * 7919 % biased.config.vocab_size
    expected_BSV = biased(input_ids=ids, use_cache=False).logits
    verify_export(tmp_path, expected_BSV, torch.float32, torch.device("cpu"))
    for source in (directory_weights(tmp_path), model_weights(biased)):
        model = build(router_bias=True)
        fill(model, source)
        assert nudges(model) == nudges(biased)
    differs = build()
    fill(differs, directory_weights(tmp_path))  # else the export would prove nothing
    assert not torch.allclose(differs.eval()(input_ids=ids, use_cache=False).logits, expected_BSV, atol=1e-2)


def test_weights_without_one_load_with_zero(biased, build, tmp_path):
    plain = build()
    plain.save_pretrained(tmp_path)
    assert not any("nudges" in name for name in load_file(tmp_path / "model.safetensors"))
    for source in (directory_weights(tmp_path), model_weights(plain)):
        fill(biased, source)
        assert nudges(biased) == [[0] * EXPERTS] * 2
        biased.model.layers[0].mlp.gate.nudges_E += 1
    loaded = PragnosiaForCausalLM.from_pretrained(tmp_path, router_bias=True)
    assert nudges(loaded) == [[0] * EXPERTS] * 2
