"""Decoding against `transformers`, padding and cache against single forwards, streaming against decoding."""

import pytest
import torch

from inference.generation import Sampling, decode, generate, next_tokens, prompt_ids, stream_text
from training.config import UserError

PROMPTS = ["a", "What is 2 + 3?", "Grüße, мир, 世界! " * 3]


def greedy_without_cache(model, tokenizer, prompt: str, length: int) -> list[int]:
    ids = prompt_ids(tokenizer, prompt)
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return ids[start:]


def test_padded_batch_with_cache_equals_single_rows_without(loaded) -> None:
    model, tokenizer = loaded
    expected = [tokenizer.decode(greedy_without_cache(model, tokenizer, p, 24)) for p in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    assert generate(model, tokenizer, PROMPTS, Sampling.greedy(24), device="cpu") == expected


def test_equals_generate_of_transformers(loaded) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([prompt_ids(tokenizer, PROMPTS[1])])
    theirs = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert generate(model, tokenizer, PROMPTS[1:2], Sampling.greedy(16), device="cpu") == [
        tokenizer.decode(theirs, skip_special_tokens=True)
    ]


def test_stops_at_eos_and_ignores_it(loaded, monkeypatch) -> None:
    model, tokenizer = loaded
    answer = greedy_without_cache(model, tokenizer, "a", 24)
    steps = decode(
        model,
        [prompt_ids(tokenizer, "a"), prompt_ids(tokenizer, PROMPTS[1])],
        Sampling.greedy(24),
        eos_token_id=answer[3],
        pad_token_id=0,
        device="cpu",
    )
    first, second = zip(*steps, strict=True)
    end = answer.index(answer[3])
    assert list(first) == answer[:end] + [None] * (len(first) - end)
    assert len([t for t in second if t is not None]) > end


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 50), (1.5, 0.5, 0), (1.0, 1.0, 3)]
)
def test_sampling_distribution_equals_the_warpers_of_transformers(temperature, top_p, top_k) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_V = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    probs_V = expected.softmax(-1)[0]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    draws = 40_000
    tokens = next_tokens(logits_V.expand(draws, -1), sampling, torch.Generator().manual_seed(0))
    counts_V = torch.bincount(tokens, minlength=100)
    assert ((counts_V > 0) <= (probs_V > 0)).all()
    # Five standard deviations of a binomial count.
    deviation_V = (draws * probs_V * (1 - probs_V)).sqrt()
    assert ((counts_V - draws * probs_V).abs() <= 5 * deviation_V + 1).all()


def test_seed_repeats_and_no_seed_varies(loaded) -> None:
    model, tokenizer = loaded

    def draw(seed: int | None) -> str:
        sampling = Sampling(max_new_tokens=24, temperature=2.0, top_p=1.0, top_k=0, seed=seed)
        return generate(model, tokenizer, ["a"], sampling, device="cpu")[0]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_context_is_never_exceeded(loaded) -> None:
    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    steps = decode(
        model, [[5] * (context - 7)], Sampling.greedy(100), eos_token_id=-1, pad_token_id=0, device="cpu"
    )
    assert len(list(steps)) == 7
    with pytest.raises(UserError, match=f"{context} tokens"):
        next(
            decode(model, [[5] * context], Sampling.greedy(1), eos_token_id=-1, pad_token_id=0, device="cpu")
        )
    # generate cuts the beginning instead: the end of the prompt decides.
    long = "x" * (2 * context) + "end"
    assert generate(model, tokenizer, [long], Sampling.greedy(8), device="cpu") == generate(
        model, tokenizer, [long[-(context - 8) :]], Sampling.greedy(8), device="cpu"
    )


@pytest.mark.parametrize("text", ["plain", "Grüße 世界 🙂🏳️‍🌈 é", "\ufffd real \ufffd", "", "ends in half 🙂"])
def test_stream_equals_decoding_and_never_takes_back(byte_tokenizer, text: str) -> None:
    tokens = prompt_ids(byte_tokenizer, text)
    if text.startswith("ends"):
        tokens = tokens[:-2]
    pieces = list(stream_text(byte_tokenizer, tokens))
    assert "".join(pieces) == byte_tokenizer.decode(tokens)
    assert all(pieces)
    if "\ufffd" not in byte_tokenizer.decode(tokens):
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_of_random_bytes_equals_decoding(byte_tokenizer) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        tokens = torch.randint(3, len(byte_tokenizer), (40,), generator=generator).tolist()
        assert "".join(stream_text(byte_tokenizer, tokens)) == byte_tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"temperature": -1}, "--temperature must be at least 0"),
        ({"top_p": 0}, "--top-p must be above 0"),
        ({"top_p": 1.5}, "--top-p must be at most 1"),
        ({"top_k": 2.5}, "--top-k must be a whole number"),
        ({"max_new_tokens": 0}, "--max-length .* must be at least 1"),
    ],
)
def test_bad_sampling_settings(setting: dict, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Sampling(**setting)
