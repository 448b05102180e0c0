"""Cache augmentation on what a windowed model cannot see: the value of a key that stood far back.

    python benchmarks/far_lookup.py                       # 3,000 steps an arm
    python benchmarks/far_lookup.py --seeds 0 1 2 --arms light joint
    python benchmarks/far_lookup.py --short               # a smaller task, half a minute

A row is a stream of keys, each followed by the value that this row gives it; keys come back, so their values can
be known. The model is dense, of two layers whose attention sees 8 tokens. It is trained first; then each arm gets
as many steps and as many latents:

    base     the model as it is
    pause    learnt tokens in the place of latents, which read nothing beyond the window; the model frozen
    soft     learnt tokens that the model itself runs over its whole cache; the model is trained with them
    light    the light coprocessor; the model frozen
    lora     a low-rank update of the model as coprocessor; the model frozen
    copy     a copy of the model as coprocessor; the model frozen
    joint    the light coprocessor; the model is trained with it
    silent   the light coprocessor, which learns from the ahead tokens alone, without the readout; the model frozen

Accuracy is of the value after a prompt, computed as in generation: `near` if the key stood within the window,
`far` if it last stood further back than two layers can pass anything on, `far, 4x` for prompts four times as long.
With retrieval_factor 0 every arm with a frozen model must give the logits of the base to the bit.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.results import DIRECTORY, goal, report
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.components import CacheConfig
from training.cache_stage import with_traces
from training.schedule import learning_rate_factor
from training.step import count_targets
from training.weights import fill, initial_weights, model_weights

WINDOW, LAYERS = 8, 2
ARMS = ("pause", "soft", "light", "lora", "copy", "joint", "silent")
TRAINS_MODEL = ("soft", "joint")
GATES = {"far": 0.95, "near": 0.98}
RATE, ROWS, PROMPTS = 2e-3, 32, 512


@dataclass(frozen=True)
class Task:
    """A stream of `pairs` pairs over as many keys as values; vocabulary: keys, then values."""

    symbols: int = 12
    pairs: int = 32
    base_steps: int = 1500
    steps: int = 3000

    def rows(self, count: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [count, 2 · pairs]; how many tokens back each key last stood [count, pairs], 0: never."""
        keys = torch.randint(self.symbols, (count, pairs), generator=generator)
        value_of = torch.randint(self.symbols, (count, self.symbols), generator=generator)
        values = self.symbols + value_of.gather(1, keys)
        order = torch.arange(pairs)
        before = (keys[:, :, None] == keys[:, None]) & (order < order[:, None])
        last = torch.where(before, order, -1).amax(2)
        return torch.stack((keys, values), 2).flatten(1), torch.where(last < 0, 0, 2 * (order - last))

    def batch(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A microbatch whose targets are the values that can be known."""
        ids, back = self.rows(ROWS, self.pairs, generator)
        labels = torch.full_like(ids, -100)
        labels[:, 1::2] = ids[:, 1::2].where(back > 0, -100)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return {
            "input_ids": ids,
            "labels": labels,
            "document_ids": torch.ones_like(ids),
            "position_ids": positions,
        }

    def prompts(self, kind: str, longer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts [PROMPTS, S] that end in a key, near or far, and the values to be told [PROMPTS]."""
        generator = torch.Generator().manual_seed(10**6)
        kept: list[torch.Tensor] = []
        while sum(map(len, kept)) < PROMPTS:
            ids, back = self.rows(PROMPTS, longer * self.pairs, generator)
            far = LAYERS * WINDOW
            fits = back[:, -1] > far if kind == "far" else (back[:, -1] > 0) & (back[:, -1] <= WINDOW - 2)
            kept.append(ids[fits])
        ids = torch.cat(kept)[:PROMPTS]
        return ids[:, :-1], ids[:, -1]


def build(
    task: Task, cache: CacheConfig | None, source, device: str, arm: str = "base"
) -> PragnosiaForCausalLM:
    """A windowed model with weights from `source`, and the coprocessor of an arm."""
    config = PragnosiaConfig(
        vocab_size=2 * task.symbols, hidden_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=128,
        router_aux_loss_coef=0.0, router_z_loss_coef=0.0, max_position_embeddings=1024,
        cache=cache and asdict(cache),
    )  # fmt: skip
    model = PragnosiaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.window = WINDOW
    fill(model, source)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(arm in ("base", *TRAINS_MODEL) or name.startswith("cache."))
    return model.to(device)


def train(
    model: PragnosiaForCausalLM, task: Task, steps: int, seed: int, *, has_readout: bool = True
) -> float:
    """AdamW on fresh rows every step; returns the seconds."""
    started, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate_factor("cosine", step, steps, min(100, steps // 10))
        batch = task.batch(generator)
        if model.cache is not None:
            batch = with_traces(batch, model.cache.settings, step)
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        (output.loss if has_readout else output.loss_sum / count_targets(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


@torch.no_grad()
def next_logits(model: PragnosiaForCausalLM, ids_BS: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] of what comes after each prompt, with latents where the model has them."""
    model.eval()
    parts = ids_BS.to(model.device).split(128)
    return torch.cat(
        [model(part, augment=model.cache is not None, logits_to_keep=1).logits[:, -1].cpu() for part in parts]
    )


def accuracies(model: PragnosiaForCausalLM, task: Task) -> dict[str, float]:
    """near, far and far at four times the length."""
    kinds = {"near": ("near", 1), "far": ("far", 1), "far, 4x": ("far", 4)}
    result = {}
    for name, (kind, longer) in kinds.items():
        ids, values = task.prompts(kind, longer)
        result[name] = (next_logits(model, ids).argmax(-1) == values).float().mean().item()
    return result


def is_base_without_latents(model: PragnosiaForCausalLM, base: PragnosiaForCausalLM, task: Task) -> bool:
    """Whether retrieval_factor 0 gives the base's logits, to the bit."""
    off = copy.copy(model)
    off.config = copy.deepcopy(model.config)
    off.config.cache["retrieval_factor"] = 0.0
    ids, _ = task.prompts("far")
    return torch.equal(next_logits(off, ids[:128]), next_logits(base, ids[:128]))


def run(task: Task, arms: list[str], latents: int, seed: int, device: str) -> list[dict]:
    """One row an arm."""
    torch.manual_seed(seed)
    fresh = initial_weights(seed, 0.05)
    base = build(task, None, fresh, device)
    seconds = train(base, task, task.base_steps, seed)
    base.requires_grad_(False)  # products of matrices may round otherwise where a weight requires a gradient
    shared = {"seed": seed, "latents": latents}
    rows = [{"arm": "base", **shared, "latents": 0, "steps": task.base_steps, **accuracies(base, task)}]
    rows[0] |= {"trained": sum(p.numel() for p in base.parameters()), "seconds": seconds}
    print(rows[0], flush=True)
    for arm in arms:
        cache = CacheConfig(
            64, num_heads=4, dropout=0.0, num_latents=latents, num_ahead_tokens=4, num_traces=8,
            coprocessor="light" if arm in ("joint", "silent") else arm,
        )  # fmt: skip
        model = build(task, cache, model_weights(base, fresh), device, arm)
        seconds = train(model, task, task.steps, seed + 1, has_readout=arm != "silent")
        row = {"arm": arm, **shared, "steps": task.steps, **accuracies(model, task)}
        row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row["seconds"] = seconds
        if arm not in TRAINS_MODEL:
            row["off is base"] = is_base_without_latents(model, base, task)
        rows.append(row)
        print(row, flush=True)
    return rows


def goals(rows: list[dict]) -> list[dict]:
    """The worst seed of the light coprocessor, and whether every frozen model is its base without latents."""
    light = [row for row in rows if row["arm"] == "light"]
    judged = [
        goal(
            f"{kind} accuracy, light coprocessor, worst seed",
            target,
            min(row[kind] for row in light),
            at_least=True,
        )
        for kind, target in GATES.items()
        if light
    ]
    frozen = [row["off is base"] for row in rows if "off is base" in row]
    if frozen:
        judged.append(
            goal("models that are their base without latents", 1.0, sum(frozen) / len(frozen), at_least=True)
        )
    return judged


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    options.add_argument("--latents", type=int, default=4)
    options.add_argument("--steps", type=int, default=None, help=f"of each arm (default: {Task.steps})")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--short", action="store_true", help="4 keys and values, light coprocessor alone")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


SHORT = Task(symbols=4, pairs=16, base_steps=120, steps=90)


def main() -> None:
    args = parser().parse_args()
    task = SHORT if args.short else Task(steps=args.steps or Task.steps)
    arms = ["light"] if args.short else args.arms
    torch.set_num_threads(1)
    rows = [row for seed in args.seeds for row in run(task, arms, args.latents, seed, args.device)]
    report(args.output / f"far_lookup{'_short' * args.short}.json", rows, goals(rows), args.device)


if __name__ == "__main__":
    main()
