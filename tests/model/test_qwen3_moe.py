"""The model is Qwen3-MoE weight for weight: logits, loss and gradients against `transformers`."""

import pytest
import torch

SHAPES = {
    "grouped queries, tied": {},
    "untied": {"tie_word_embeddings": False},
    "one expert a token": {"num_experts_per_tok": 1},
    "one expert a token, its probability as weight": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts": {"num_experts_per_tok": 8},
    "eight of sixteen experts": {"num_experts": 16, "num_experts_per_tok": 8, "tie_word_embeddings": False},
    "no grouping": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "heads wider than the model": {"num_attention_heads": 6, "head_dim": 16},
    "deep and narrow": {"hidden_size": 16, "num_hidden_layers": 4, "moe_intermediate_size": 40},
    "another rotary base and epsilon": {"rope_theta": 1e6, "rms_norm_eps": 1e-3},
}
TOLERANCE = 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def batch():
    """Two rows of 19 tokens with targets on a part of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 67, (2, 19), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.7, ids, -100)
    return ids, labels


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_logits_loss_and_every_gradient(build, twin, gradients, batch, overrides):
    ids, labels = batch
    model = build(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **overrides)
    theirs = twin(model)
    assert relative_error(model(ids).logits, theirs(ids).logits) <= TOLERANCE

    loss = model(ids, labels=labels).loss
    expected = theirs(ids, labels=labels).loss
    loss.backward()
    expected.backward()
    assert abs(loss.item() - expected.item()) <= TOLERANCE * expected.item()
    found = gradients(model)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert found.keys() == wanted.keys()
    if model.config.num_experts_per_tok == 1 and model.config.norm_topk_prob:
        # Renormalised, the only weight is 1 whatever the router says: its gradient is rounding.
        for name in [name for name in wanted if name.endswith("gate.weight")]:
            assert max(found.pop(name).abs().max(), wanted.pop(name).abs().max()) < 1e-7
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("padded_side", ["left", "right"])
def test_logits_with_padding(build, twin, batch, padded_side):
    ids, _ = batch
    mask = torch.ones_like(ids)
    mask[1, slice(0, 6) if padded_side == "left" else slice(13, None)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = build()
    found = model(ids, attention_mask=mask, position_ids=positions).logits
    expected = twin(model)(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    assert relative_error(found[real], expected[real]) <= TOLERANCE


@pytest.mark.parametrize("num_active", [1, 2, 8])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_of_one_layer(build, twin, batch, num_active, padded):
    ids, labels = batch
    document_ids = torch.ones_like(ids)
    if padded:
        document_ids[0, 11:] = 0
        labels = torch.where(document_ids > 0, labels, -100)
    model = build(
        num_hidden_layers=1, num_experts_per_tok=num_active, router_aux_loss_coef=1.0, router_z_loss_coef=0.0
    )
    theirs = twin(model)
    theirs.router_aux_loss_coef = 1.0
    found = model(ids, labels=labels, document_ids=document_ids)
    expected = theirs(
        ids, labels=labels, attention_mask=document_ids if padded else None, output_router_logits=True
    )
    assert found.balance_loss.item() == pytest.approx(expected.aux_loss.item(), rel=TOLERANCE)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE)

    found.loss.backward()
    expected.loss.backward()
    router = "model.layers.0.mlp.gate.weight"
    error = relative_error(model.get_parameter(router).grad, theirs.get_parameter(router).grad)
    assert error <= TOLERANCE


def test_z_loss_is_the_mean_squared_logsumexp_over_real_tokens_and_layers(build, batch):
    ids, labels = batch
    document_ids = torch.ones_like(ids)
    document_ids[0, 11:] = 0
    labels = torch.where(document_ids > 0, labels, -100)
    model = build(router_aux_loss_coef=0.0, router_z_loss_coef=0.7)
    logits_LTE = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda router, inputs, _: logits_LTE.append(inputs[0] @ router.weight.T)
        )
    output = model(ids, labels=labels, document_ids=document_ids)
    real = document_ids.reshape(-1) > 0
    squares = [logits_TE[real].exp().sum(-1).log().square().mean() for logits_TE in logits_LTE]
    expected = torch.stack(squares).mean().item()
    assert output.z_loss.item() == pytest.approx(expected, rel=TOLERANCE)
    targets = (labels[:, 1:] != -100).sum()
    assert output.loss.item() == pytest.approx(
        (output.loss_sum / targets).item() + 0.7 * expected, rel=TOLERANCE
    )
