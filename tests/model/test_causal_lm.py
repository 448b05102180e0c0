"""What the decoder promises beside its equality with Qwen3-MoE: documents, causality, recompute, files."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model import PragnosiaConfig, PragnosiaForCausalLM


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(seed))


def packed(documents: list[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """One row of documents, the rest padding; a document's first token is no target."""
    row = {
        "input_ids": torch.zeros(1, length, dtype=torch.int64),
        "labels": torch.full((1, length), -100),
        "document_ids": torch.zeros(1, length, dtype=torch.int64),
        "position_ids": torch.zeros(1, length, dtype=torch.int64),
    }
    start = 0
    for number, ids in enumerate(documents, 1):
        stop = start + len(ids)
        row["input_ids"][0, start:stop] = ids
        row["labels"][0, start + 1 : stop] = ids[1:]
        row["document_ids"][0, start:stop] = number
        row["position_ids"][0, start:stop] = torch.arange(len(ids))
        start = stop
    return row


@pytest.fixture
def documents():
    return [random_ids(length, seed=length) for length in (7, 1, 12, 5)]


def test_packed_documents_equal_separate_ones(build, documents):
    model = build(router_aux_loss_coef=0.0)
    row = packed(documents, length=30)
    together = model(**row)
    alone = [model(document[None], labels=document[None]) for document in documents]
    assert together.loss_sum.item() == pytest.approx(sum(out.loss_sum.item() for out in alone), rel=1e-5)
    tokens = sum(map(len, documents))
    z_loss = sum(out.z_loss.item() * len(ids) for out, ids in zip(alone, documents, strict=True)) / tokens
    assert together.z_loss.item() == pytest.approx(z_loss, rel=1e-5)
    assert torch.equal(together.load_LE, sum(out.load_LE for out in alone))

    row.pop("labels")
    logits = model(**row).logits[0, :tokens]
    expected = torch.cat([model(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_packed_documents_are_the_sum_over_separate_ones(build, documents):
    model = build(router_aux_loss_coef=0.0)
    counts = {"num_targets": sum(len(ids) - 1 for ids in documents), "num_tokens": sum(map(len, documents))}
    model(**packed(documents, length=30), **counts).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for document in documents:
        model(document[None], labels=document[None], **counts).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("with_documents", [False, True])
def test_a_later_token_changes_no_earlier_logit(build, with_documents):
    model = build()
    ids = random_ids(2, 16)
    more = {"document_ids": torch.ones_like(ids)} if with_documents else {}
    before = model(ids, **more).logits
    for position in (1, 9, 15):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 67
        after = model(changed, **more).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after[:, position:], before[:, position:], rtol=1e-2)


@pytest.mark.parametrize("fill", [0, 66])
def test_padding_changes_nothing(build, documents, fill):
    """Neither how much there is nor which token stands there: outputs, losses, statistics, gradients."""
    model = build()
    outputs, grads = [], []
    for length in (25, 40):
        row = packed(documents, length)
        row["input_ids"][row["document_ids"] == 0] = fill if length == 40 else 0
        outputs.append(model(**row))
        outputs[-1].loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    short, long = outputs
    for name in ("loss", "loss_sum", "balance_loss", "z_loss", "router_entropy", "load_LE"):
        torch.testing.assert_close(short[name], long[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_of_padding_has_zero_loss_and_zero_gradients_everywhere(build):
    model = build()
    row = packed([], length=8)
    output = model(**row)
    output.loss.backward()
    assert output.loss.item() == 0 and output.loss_sum.item() == 0 and output.load_LE.sum() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_recompute_counts_losses_once(build, documents):
    row = packed(documents, length=30)
    results = []
    for recompute in (False, True):
        model = build().train()
        if recompute:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        output = model(**row)
        output.loss.backward()
        assert len(calls) == 1 + recompute
        results.append((output, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, plain_grads), (recomputed, recomputed_grads) = results
    for name in ("loss", "loss_sum", "balance_loss", "z_loss", "router_entropy", "load_LE"):
        assert torch.equal(plain[name], recomputed[name]), name
    assert plain.balance_loss > 0 and plain.z_loss > 0
    for name, grad in plain_grads.items():
        torch.testing.assert_close(recomputed_grads[name], grad, rtol=1e-5, atol=1e-8, msg=name)


def test_entropy_and_load_of_a_router_that_does_not_choose(build):
    model = build()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    output = model(random_ids(1, 5), labels=random_ids(1, 5))
    assert output.router_entropy.item() == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-6)
    assert output.balance_loss.item() == pytest.approx(2.0, rel=1e-6)  # k when every probability is 1/E
    assert output.load_LE.shape == (2, 8) and output.load_LE.sum(1).tolist() == [10.0, 10.0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_to_the_bit(build, tmp_path, tied):
    model = build(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 11)
    for loaded in (
        PragnosiaForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(loaded) is PragnosiaForCausalLM
        weights = loaded.state_dict()
        assert all(torch.equal(weights.pop(name), weight) for name, weight in model.state_dict().items())
        assert not weights
        # Weights lie where the file was mapped, and products may round by how they are aligned.
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_auto_classes_know_the_model(build, tmp_path):
    build().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is PragnosiaConfig and config.moe_intermediate_size == 16
    assert type(AutoModelForCausalLM.from_config(config)) is PragnosiaForCausalLM


def test_initial_weights_have_the_configured_deviation():
    torch.manual_seed(0)
    config = PragnosiaConfig(
        vocab_size=256, num_hidden_layers=1, initializer_range=0.05, tie_word_embeddings=False
    )
    model = PragnosiaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.005, name
