"""Decoding: one loop for batched evaluation answers, for the trainer's samples and for a streamed chat.

The loop is our own rather than `transformers`' `generate` because a chat has to stop between two tokens, and
because ranks that compute one model together (tensor parallelism, ZeRO-3) must all feed the same token next.
torch is imported inside the functions: scripts print their help without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.config import Checked, UserError, option

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from data.example import Example


@dataclass
class Sampling(Checked):
    """How an answer is drawn."""

    max_new_tokens: int = option(512, "most tokens of an answer", flag="max-length", minimum=1)
    temperature: float = option(0.7, "divides the logits; 0 takes the likeliest token", minimum=0, maximum=10)
    top_p: float = option(
        0.9, "draw from the likeliest tokens whose probabilities reach this; 1: all", minimum=0, maximum=1
    )
    top_k: int = option(50, "draw from this many likeliest tokens; 0: all", minimum=0)
    seed: int | None = option(None, "seed of the draws (default: another each time)", minimum=0)

    def check(self) -> None:
        if self.top_p == 0:
            raise UserError("--top-p must be above 0: it is the probability that the drawn tokens reach")

    @classmethod
    def greedy(cls, max_new_tokens: int) -> Sampling:
        return cls(max_new_tokens=max_new_tokens, temperature=0.0)


def next_tokens(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """Draw one token a row: fp32 logits [B, V] on any device -> int64 [B] on the CPU."""
    import torch

    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).cpu()
    # Few candidates are drawn on the CPU, so that one seed gives one answer on every device.
    width = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    kept_BK, ids_BK = (logits_BV.float() / sampling.temperature).topk(width, dim=-1)
    probs_BK = kept_BK.softmax(dim=-1).cpu()
    # Sorted descending: a token stays when the ones before it have not reached top_p; the first always stays.
    before_BK = probs_BK.cumsum(dim=-1) - probs_BK
    probs_BK = probs_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    choice_B1 = torch.multinomial(probs_BK, 1, generator=generator)
    return ids_BK.cpu().gather(1, choice_B1).squeeze(1)


def context_length(model: object) -> int:
    """Positions the model was built for, prompt and answer together."""
    return int(getattr(model, "module", model).config.max_position_embeddings)


def latents_every(model: object) -> int | None:
    """After how many new tokens the coprocessor runs again: 0 for never, None where there are no latents."""
    cache = getattr(getattr(model, "module", model).config, "cache", None)
    return cache["update_freq"] if cache and cache["retrieval_factor"] > 0 else None


def decode(
    model: object,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_token_id: int,
    pad_token_id: int,
    device: str | torch.device,
    agree: Callable[[torch.Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt: None for one that has ended (eos is not yielded).

    Prompts are padded on the left into one batch with a KV cache. `model` is a causal LM or a DeepSpeed
    engine around one. `agree` overwrites an int64 CPU tensor [B + 1] (tokens, then the stop mark) with rank
    0's; it is given when several ranks compute the model together, which must all call this with equal
    prompts. `stop` is asked before every token. Where the model has a coprocessor it reads the prompt, and then
    again every `update_freq` tokens. Raises UserError for a prompt that fills the context.
    """
    import torch

    context = context_length(model)
    longest = max(len(prompt) for prompt in prompts)
    if longest >= context:
        raise UserError(f"a prompt of {longest} tokens leaves no room in a context of {context} tokens")
    rows = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    input_BS = torch.tensor(rows, device=device)
    mask_BS = torch.tensor(seen, device=device)
    position_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool)
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache, every = None, latents_every(model)
    for step in range(min(sampling.max_new_tokens, context - longest)):
        is_due = every is not None and (step % every if every else step) == 0
        # no_grad, not inference_mode: ZeRO-3 writes into its gathered parameters, which that mode forbids.
        # It ends before the yield, else the caller would run without gradients too.
        with torch.no_grad():
            output = model(
                input_ids=input_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **({"augment": True} if is_due else {}),
            )
        cache = output.past_key_values
        token_B = next_tokens(output.logits[:, -1].float(), sampling, generator)
        if agree is not None:
            message = torch.cat([token_B, torch.tensor([int(stop())])])
            agree(message)
            token_B, stopped = message[:-1], bool(message[-1])
        else:
            stopped = stop()
        ended_B |= token_B == eos_token_id
        if stopped or ended_B.all():
            return
        yield [None if ended else int(token) for token, ended in zip(token_B, ended_B, strict=True)]
        input_BS = token_B.masked_fill(ended_B, pad_token_id).to(device)[:, None]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(prompts), 1)], dim=1)
        position_BS = position_BS[:, -1:] + 1


def stream_text(tokenizer: object, tokens: Iterable[int]) -> Iterator[str]:
    """Turn tokens into printable pieces of text whose concatenation is the decoded answer.

    A character may be split over several tokens; its half decodes to U+FFFD at the end of the text and is
    held back until the rest arrives, or the answer ends.
    """
    ids: list[int] = []
    shown = 0
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        settled = len(text) - text.endswith("\ufffd")
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if len(text) > shown:
        yield text[shown:]


def prompt_ids(tokenizer: object, prompt: str) -> list[int]:
    """Token ids of a finished prompt; it spells out its special tokens itself."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def generate(
    model: object,
    tokenizer: object,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    device: str | torch.device,
    agree: Callable[[torch.Tensor], None] | None = None,
) -> list[str]:
    """Answer all prompts in one batch; special tokens are left out of the answers.

    Half the context, or less if `max_new_tokens` is less, is kept free for the answers: a longer prompt
    loses its beginning.
    """
    context = context_length(model)
    room = context - min(sampling.max_new_tokens, context // 2)
    encoded = [prompt_ids(tokenizer, prompt)[-room:] for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    steps = decode(
        model,
        encoded,
        sampling,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        device=device,
        agree=agree,
    )
    for step in steps:
        for answer, token in zip(answers, step, strict=True):
            if token is not None:
                answer.append(token)
    return [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in answers
    ]


def generate_enhanced(
    model: object, tokenizer: object, prompts: Sequence[str], sampling: Sampling | None = None
) -> list[str]:
    """Answers on the model's own device, with all its components.

    A model with a value head searches: proposals are drawn as its own search says, and `sampling` has the length
    and the seed.
    """
    sampling = sampling or Sampling()
    if not model.config.tree:
        return generate(model, tokenizer, prompts, sampling, device=model.device)
    from inference.tree_of_thoughts import tree_of_thoughts

    seed = 0 if sampling.temperature == 0 else sampling.seed
    trees = tree_of_thoughts(model, tokenizer, prompts, max_new_tokens=sampling.max_new_tokens, seed=seed)
    return [tree.answer for tree in trees]


def generate_with(
    model: object,
    component: str,
    tokenizer: object,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
) -> list[str]:
    """`generate` on the model's own device, if it has the component: memory or cache.

    Raises:
        UserError: it has not.
    """
    if component == "memory" and not model.config.memory:
        raise UserError("this model has no neural memory: train one with --use-neural-memory")
    if component == "cache" and latents_every(model) is None:
        raise UserError(
            "this model reads no latents: train a coprocessor with --stage cache, or raise its retrieval_factor"
        )
    return generate(model, tokenizer, prompts, sampling or Sampling(), device=model.device)


DRAWN_TOGETHER = 16  # rows of the key-value cache that a training run must have room for


def draw_answers(
    engine: object, tokenizer: object, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[str]:
    """Answers as the model draws them at temperature 1, in the middle of training; all ranks call it together."""
    was_training = engine.training
    engine.eval()
    answers = []
    for start in range(0, len(prompts), DRAWN_TOGETHER):
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, seed=seed + start)
        group = prompts[start : start + DRAWN_TOGETHER]
        answers += generate(
            engine, tokenizer, group, sampling, device=engine.device, agree=follow_rank_zero()
        )
    engine.train(was_training)
    return answers


def follow_rank_zero(group: ProcessGroup | None = None) -> Callable[[torch.Tensor], None] | None:
    """The `agree` of `decode` for ranks of `group` (default: all) that share a model; None on one rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None

    def agree(message: torch.Tensor) -> None:
        on_device = message.to("cuda") if dist.get_backend(group) == "nccl" else message
        dist.broadcast(on_device, src=0, group=group)
        message.copy_(on_device)

    return agree


def sample_answers(
    model: object,
    tokenizer: object,
    examples: Sequence[Example],
    *,
    device: str | torch.device,
    max_new_tokens: int = 128,
) -> list[dict[str, str]]:
    """Greedy answers to examples that have a prompt, as {"family", "prompt", "expected", "answer"}.

    Every rank calls it with the same examples: where the model is spread over ranks, they move in step.
    """
    from data.prompts import prompt_text

    asked = [example for example in examples if example.prompt_messages()]
    if not asked:
        return []
    prompts = [prompt_text(e.prompt_messages(), e.prompt_format, tokenizer) for e in asked]
    was_training = model.training
    model.eval()
    sampling = Sampling.greedy(max_new_tokens)
    answers = generate(model, tokenizer, prompts, sampling, device=device, agree=follow_rank_zero())
    model.train(was_training)
    return [
        {
            "family": example.family,
            "prompt": example.prompt_messages()[-1]["content"],
            "expected": example.answer(),
            "answer": answer.strip(),
        }
        for example, answer in zip(asked, answers, strict=True)
    ]
