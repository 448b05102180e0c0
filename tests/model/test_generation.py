"""Decoding through `transformers`' `generate`: a cache and padding change nothing."""

import pytest
import torch

NEW_TOKENS = 12


@pytest.fixture
def model(build):
    # Untied and wide, or a random model repeats its last token.
    return build(pad_token_id=0, tie_word_embeddings=False, initializer_range=0.4).eval()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 67, (length,), generator=generator) for length in (9, 4, 1)]


def greedy(model, ids, **options):
    return model.generate(
        ids,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat((prompt.new_zeros(width - len(prompt)), prompt)) for prompt in prompts])
    return ids, (torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in prompts])).long()


def test_cache_equals_recomputation(model, prompts):
    with_cache = greedy(model, prompts[0][None], use_cache=True)
    without = greedy(model, prompts[0][None], use_cache=False)
    assert with_cache.past_key_values is not None and without.past_key_values is None
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    assert len(set(with_cache.sequences[0, 9:].tolist())) > 3  # not one token over and over
    torch.testing.assert_close(
        torch.stack(with_cache.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_equals_single_prompts(model, prompts, use_cache):
    ids, mask = left_padded(prompts)
    together = greedy(model, ids, attention_mask=mask, use_cache=use_cache)
    for row, prompt in enumerate(prompts):
        alone = greedy(model, prompt[None], use_cache=use_cache)
        assert together.sequences[row, ids.shape[1] :].tolist() == alone.sequences[0, len(prompt) :].tolist()
        rows = torch.stack(together.logits)[:, row]
        torch.testing.assert_close(rows, torch.stack(alone.logits)[:, 0], rtol=1e-4, atol=1e-4)


def test_cached_step_by_step_equals_one_pass(model, prompts):
    ids = prompts[0][None]
    whole = model(ids).logits
    cache, steps = None, []
    for part in ids.split([4, 1, 1, 3], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_sampling_stops_at_the_end_token(model, prompts):
    first = greedy(model, prompts[0][None]).sequences[0, len(prompts[0])].item()
    stopped = model.generate(prompts[0][None], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=first)
    assert stopped.shape[1] == len(prompts[0]) + 1
