"""The summed cross entropy of the head against `F.cross_entropy`, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

import model.head
from model.head import LanguageModelHead, LinearCrossEntropySum

CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(model.head, "LOSS_CHUNK", CHUNK)


def inputs(targets: int, width: int = 6, vocab: int = 11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(targets)
    hidden = torch.randn(targets, width, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.randint(vocab, (targets,), generator=generator),
    )


@pytest.mark.parametrize("targets", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_cross_entropy_in_fp64(targets, dtype, tolerance):
    hidden, weight, target_ids = inputs(targets, dtype=dtype)
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = F.cross_entropy(wide_hidden @ wide_weight.T, target_ids, reduction="sum")
    found = LinearCrossEntropySum.apply(hidden, weight, target_ids)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)

    (0.5 * expected).backward()
    (0.5 * found).backward()
    for mine, reference in ((hidden, wide_hidden), (weight, wide_weight)):
        assert mine.grad.dtype == dtype
        assert (mine.grad.double() - reference.grad).norm() <= tolerance * reference.grad.norm()


def test_a_second_backward_is_an_error_and_not_another_gradient():
    hidden, weight, target_ids = inputs(CHUNK + 2)
    loss = LinearCrossEntropySum.apply(hidden, weight, target_ids)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_no_targets_give_zero_and_zero_gradients():
    hidden, weight, target_ids = inputs(0)
    loss = LinearCrossEntropySum.apply(hidden, weight, target_ids)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, 6)
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_no_gradient_is_computed_that_nobody_wants():
    hidden, weight, target_ids = (x.detach() for x in inputs(CHUNK + 1))
    loss = LinearCrossEntropySum.apply(hidden, weight, target_ids)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(
        F.cross_entropy(hidden @ weight.T, target_ids, reduction="sum").item()
    )


def test_head_gives_logits_or_the_loss_of_the_same_logits():
    head = LanguageModelHead(6, 11, bias=False)
    hidden, _, target_ids = inputs(9, dtype=torch.float32)
    logits = head(hidden)
    assert logits.shape == (9, 11)
    expected = F.cross_entropy(logits, target_ids, reduction="sum").item()
    assert head(hidden, target_ids).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_chunks_of_the_model(build, tied, monkeypatch):
    """Loss and gradients of a whole model do not depend on the chunk."""
    ids = torch.randint(0, 67, (2, 13), generator=torch.Generator().manual_seed(5))
    results = []
    for chunk in (1, 5, 1000):
        monkeypatch.setattr(model.head, "LOSS_CHUNK", chunk)
        network = build(tie_word_embeddings=tied)
        loss = network(ids, labels=ids).loss
        loss.backward()
        results.append((loss, network.lm_head.weight.grad, network.model.embed_tokens.weight.grad))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
