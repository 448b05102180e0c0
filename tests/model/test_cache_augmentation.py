"""The coprocessor: what its latents may know, that training and generation agree, and that off is off."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from inference.generation import Sampling, decode
from model.components import COPROCESSORS, CacheConfig, MemoryConfig
from training.cache_stage import with_traces

AHEAD = 4
MEMORY = dataclasses.asdict(
    MemoryConfig(hidden_size=32, memory_size=16, head_dim=8, num_memory_layers=2, chunk_size=4, dropout=0.0)
)


@pytest.fixture
def augmented(build):
    """A function of a coprocessor's settings to a model, in evaluation mode, whose coprocessor does something."""

    def build_augmented(window=None, config=None, **settings):
        settings = {"num_heads": 4, "dropout": 0.0, "num_latents": 3, "num_traces": 3} | settings
        cache = CacheConfig(hidden_size=32, num_ahead_tokens=AHEAD, **settings)
        model = build(cache=dataclasses.asdict(cache), pad_token_id=0, **(config or {})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight"):
                assert not parameter.any(), name
                torch.nn.init.normal_(parameter, std=0.3 if ".memory." in name else 0.1)
        for layer in model.model.layers:
            layer.self_attn.window = window
        return model

    return build_augmented


@pytest.fixture
def batch():
    """Two rows, the first of two documents and padding; some prompts are no targets."""
    ids = torch.randint(1, 67, (2, 14), generator=torch.Generator().manual_seed(2))
    documents, positions = torch.ones_like(ids), torch.arange(14).repeat(2, 1)
    documents[0, 6:12], documents[0, 12:], positions[0, 6:] = 2, 0, torch.arange(8)
    labels = ids.where(documents > 0, -100)
    labels[:, 0], labels[0, 6], labels[1, 3:5] = -100, -100, -100
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}


def traced(model, batch, key="a key"):
    return with_traces(batch, model.cache.settings, key)


def loss_by_generation(model, batch) -> float:
    """The loss of the ahead tokens, computed as an answer is: prefill, latents, token by token."""
    total = 0.0
    for row, (traces, labels) in enumerate(zip(batch["traces"], batch["ahead_labels"], strict=True)):
        for last, targets in zip(traces.tolist(), labels, strict=True):
            own = batch["document_ids"][row] == batch["document_ids"][row, last]
            ids = batch["input_ids"][row : row + 1, own]
            last -= int(own.nonzero()[0])
            output = model(ids[:, : last + 1], use_cache=True, augment=True)
            for step, target in enumerate(targets, 1):
                if target != -100:
                    total += F.cross_entropy(output.logits[:, -1], target[None]).item()
                if last + step == ids.shape[1]:
                    break
                token = ids[:, last + step : last + step + 1]
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return total


@torch.no_grad()
@pytest.mark.parametrize("coprocessor", COPROCESSORS)
@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize(("factor", "window", "newest"), [(1.0, None, 100), (0.5, 3, 4)])
def test_traces_are_trained_as_they_will_be_generated(
    augmented, batch, coprocessor, factor, window, newest, memory
):
    settings = {"coprocessor": coprocessor, "retrieval_factor": factor, "max_cache_length": newest}
    model = augmented(window, config={"memory": memory}, **settings)
    batch = traced(model, batch)
    output = model(**batch)
    assert (batch["ahead_labels"] != -100).sum() > 12
    assert output.loss_sum.item() == pytest.approx(loss_by_generation(model, batch), rel=1e-5)
    total, count = output.component_sums["cache/ahead_loss"].tolist()
    assert total == pytest.approx(output.loss_sum.item()) and count == (batch["ahead_labels"] != -100).sum()
    base = output.component_sums["cache/base_loss"][0].item()
    assert abs(base - total) > 0.1  # latents do something


@torch.no_grad()
def test_base_losses_at_a_place_are_those_of_the_model_without_latents(augmented, batch):
    model = augmented()
    batch = traced(model, batch)
    sums = model(**batch).component_sums
    logits = model(
        batch["input_ids"], document_ids=batch["document_ids"], position_ids=batch["position_ids"]
    ).logits
    for place in (1, 2, 4):
        expected = [
            F.cross_entropy(logits[row, last + place - 1], label).item()
            for row in range(2)
            for last, label in zip(
                batch["traces"][row].tolist(), batch["ahead_labels"][row, :, place - 1], strict=True
            )
            if label != -100
        ]
        total, count = sums[f"cache/base_loss_at_{place}"].tolist()
        assert count == len(expected) and total == pytest.approx(sum(expected), rel=1e-5)
        assert sums[f"cache/loss_at_{place}"][0].item() != pytest.approx(total, rel=1e-3)
    assert "cache/loss_at_8" not in sums


@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize("coprocessor", COPROCESSORS)
def test_a_frozen_model_lends_gradients_to_every_part_of_its_coprocessor(
    augmented, batch, coprocessor, memory
):
    results, config = [], {"router_aux_loss_coef": 0.0, "memory": memory}
    for recompute in (False, True):
        model = augmented(coprocessor=coprocessor, config=config).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("cache."))
        model.model.gradient_checkpointing = recompute
        output = model(**traced(model, batch))
        output.loss.backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in results[0].items():
        assert (grad is not None) == name.startswith("cache."), name
        if grad is not None and ".experts." not in name and "mlp.gate" not in name:
            assert grad.any(), name
            torch.testing.assert_close(results[1][name], grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("memory", [None, MEMORY])
def test_the_loss_is_a_sum_over_traces_whatever_the_microbatch(augmented, batch, memory):
    model = augmented(config={"router_aux_loss_coef": 0.0, "memory": memory}).train().double()
    whole = traced(model, batch)
    counts = {"num_targets": int((whole["ahead_labels"] != -100).sum()), "num_tokens": 26}
    model(**whole, **counts).loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for row in range(2):
        part = traced(model, {name: x[row : row + 1] for name, x in batch.items()})
        model(**part, **counts).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_readout_counts_half_of_a_mean_over_traces(augmented, batch):
    model = augmented().train()
    output = model(**traced(model, batch), num_targets=3 * 2 * AHEAD, num_tokens=1)
    readout, traces = output.component_sums["cache/readout_loss"].tolist()
    coefficients = model.config.router_aux_loss_coef, model.config.router_z_loss_coef
    routers = sum(
        c * x.item() * 26 for c, x in zip(coefficients, (output.balance_loss, output.z_loss), strict=True)
    )
    expected = output.loss_sum.item() / (3 * 2 * AHEAD) + 0.5 * readout / traces + routers
    assert traces == 6 and output.loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("coprocessor", [kind for kind in COPROCESSORS if kind != "pause"])
def test_latents_read_the_newest_entries_and_no_padding(augmented, coprocessor):
    ids = torch.randint(1, 67, (1, 9), generator=torch.Generator().manual_seed(5))

    model = augmented(
        1, coprocessor=coprocessor, max_cache_length=4
    )  # so that an entry knows its own token alone

    def latents(ids, padding=0):
        cache = DynamicCache()
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            augment=True,
        )
        return torch.cat(
            [layer.states[f"latent_{kind}"] for layer in cache.layers for kind in ("keys", "values")]
        )

    before = latents(ids)
    for place, seen in ((4, False), (5, True), (8, True)):
        changed = ids.clone()
        changed[:, place] = 1 + changed[:, place] % 66
        assert torch.allclose(latents(changed), before, rtol=1e-3, atol=1e-5) != seen, place
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    torch.testing.assert_close(latents(padded, padding=3), before, rtol=1e-4, atol=1e-5)


def answers(model, prompts, tokens=6):
    no_end = {"eos_token_id": -1, "pad_token_id": 0, "device": "cpu"}
    steps = decode(model, prompts, Sampling.greedy(tokens), **no_end)
    return [list(column) for column in zip(*steps, strict=True)]


PROMPTS = [[5, 9, 33, 2, 41, 8, 17], [12, 60, 3], [44]]


@pytest.mark.parametrize("memory", [None, MEMORY])
def test_prompts_of_a_batch_are_answered_as_if_alone(augmented, memory):
    config = {"tie_word_embeddings": False, "memory": memory}
    model = augmented(update_freq=2, retrieval_factor=2.0, config=config)
    together = answers(model, PROMPTS)
    assert [answers(model, [prompt])[0] for prompt in PROMPTS] == together
    assert len({tuple(answer) for answer in together}) == 3


@torch.no_grad()
def test_latents_are_replaced_every_so_many_tokens(augmented):
    """The token of a refresh sees only latents made from all that comes before it."""
    model = augmented(update_freq=2)
    cache = DynamicCache()
    model(torch.tensor(PROMPTS[:1]), past_key_values=cache, use_cache=True, augment=True)
    first = cache.layers[1].states["latent_keys"]
    model(torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    assert cache.layers[1].states["latent_keys"] is first
    model(torch.tensor([[8]]), past_key_values=cache, use_cache=True, augment=True)
    second = cache.layers[1].states["latent_keys"]
    assert second.shape == first.shape and not torch.allclose(second, first)
    assert cache.get_seq_length() == 9  # tokens alone
    calls = []
    model.cache.register_forward_hook(lambda *_: calls.append(1))
    answers(model, PROMPTS, tokens=5)
    assert len(calls) == 3
    model.config.cache["update_freq"] = 0
    answers(model, PROMPTS, tokens=5)
    assert len(calls) == 4


@torch.no_grad()
def test_a_memory_holds_tokens_alone_and_each_once(augmented):
    """Where latents weigh nothing, a prompt whose last token is computed twice leaves what one pass leaves."""
    model, states = augmented(config={"memory": MEMORY}, retrieval_factor=1e-30), []
    for augment in (True, False):
        cache = model(torch.tensor(PROMPTS[:1]), use_cache=True, augment=augment).past_key_values
        states.append([layer.states[name] for layer in cache.layers for name in ("memory", "memory_tail")])
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_the_cache_take_their_latents_along(augmented):
    model = augmented()
    prompts, order = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]), torch.tensor([1, 0, 1])
    cache = model(prompts, use_cache=True, augment=True).past_key_values
    expected = model(torch.tensor([[3], [3]]), past_key_values=cache, use_cache=True).logits[order]
    cache = model(prompts, use_cache=True, augment=True).past_key_values
    cache.reorder_cache(order)
    found = model(torch.tensor([[3], [3], [3]]), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected[0], expected[1], rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize("coprocessor", COPROCESSORS)
def test_factor_0_and_no_coprocessor_are_the_base_to_the_bit(augmented, build, coprocessor, memory):
    model = augmented(coprocessor=coprocessor, retrieval_factor=0.0, config={"memory": memory})
    base = build(pad_token_id=0, memory=memory).eval()
    base.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith("cache.")})
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(model(ids, augment=True).logits, base(ids).logits)
    assert torch.equal(model(ids, labels=ids).loss, base(ids, labels=ids).loss)
    assert answers(model, PROMPTS) == answers(base, PROMPTS)
    model.config.cache["retrieval_factor"] = 1.0
    assert not torch.allclose(model(ids, augment=True).logits[:, -1], base(ids).logits[:, -1], rtol=1e-2)


@pytest.mark.parametrize("memory", [None, MEMORY])
@pytest.mark.parametrize("coprocessor", COPROCESSORS)
def test_parameters_are_counted(augmented, coprocessor, memory):
    model = augmented(coprocessor=coprocessor, coprocessor_layers=3, config={"memory": memory})
    assert model.config.num_params() == sum(parameter.numel() for parameter in model.parameters())
    bare = type(model.config)(**{**model.config.to_dict(), "cache": None})
    assert model.config.active_params() == bare.active_params()


def test_generate_with_cache_answers_texts(augmented):
    from training.config import UserError

    class Tokenizer:
        eos_token_id, pad_token_id = -1, 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(word) for word in text.split()]}

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    model = augmented()
    found = model.generate_with_cache(Tokenizer(), ["5 9 33", "44"], Sampling.greedy(3))
    assert found == [" ".join(map(str, answer)) for answer in answers(model, [[5, 9, 33], [44]], 3)]
    model.config.cache["retrieval_factor"] = 0.0
    with pytest.raises(UserError, match="reads no latents: train a coprocessor"):
        model.generate_with_cache(Tokenizer(), ["5"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coprocessor": "heavy"}, "coprocessor 'heavy' does not exist: use light, copy, lora, soft, pause"),
        ({"num_latents": 0}, "num_latents 0 .* at least 1"),
        ({"num_heads": 5}, "width of 32 cannot be cut into 5 heads .* --cache-heads"),
        ({"retrieval_factor": -1.0}, "retrieval_factor -1.0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(hidden_size=32, **settings)
