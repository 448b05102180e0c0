"""What a neural memory can recall: associations beyond the reach of attention, trained from nothing on a CPU.

    python benchmarks/recall.py
    python benchmarks/recall.py --seeds 0 1 2 --tasks recall --arms "window" "window + memory, 64 slots"
    python benchmarks/recall.py --short

Task `recall` (multi-query associative recall, arXiv 2312.04927): a row of 64 tokens begins with 8 pairs of a key
and a value; from token 36 on it is made of these keys, and the model must name the value of each. Attention sees
8 tokens, and so nothing of the pairs, in two layers and through a convolution. Task `rebound`: four rounds of 4
such pairs, of which the last alone counts.

Baselines have the memory's convolution before their attention. `accuracy` is over rows that no training saw,
`accuracy_4x` over such of four times the length. Goals: with a memory at least 0.95, without at most 0.10. The
result is `recall.json`. `--short` is one layer and a small part of the task, for seconds: `recall_short.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.results import DIRECTORY, goal, report
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.attention import Attention
from model.components import MemoryConfig
from model.memory import ShortConvolution, delta_rule
from training.schedule import learning_rate_factor
from training.weights import fill, initial_weights

WIDTH, WINDOW, TAPS = 64, 8, 4
ROWS, SCALE = 32, 0.1
QUERIES = 8192  # asked in a measurement, at least
ROUNDS, ROUND_PAIRS = 4, 4
CONTROL, GATE = "window", "window + memory, 64 slots"
CHANCE, SOLVED = 0.10, 0.95


@dataclass(frozen=True)
class Sizes:
    """How large task and model are, and the training. Tokens: 0 fills, 1 begins a round, then keys, and values in
    the upper half."""

    length: int = 64
    pairs: int = 8
    vocabulary: int = 128
    layers: int = 2
    steps: int = 600
    warmup: int = 50
    rate: float = 3e-3

    @property
    def reach(self) -> int:
        """Tokens that a token can know of without a memory, and as many lie between pairs and queries."""
        return self.layers * (WINDOW - 1 + TAPS - 1)


SHORT = Sizes(length=28, pairs=3, vocabulary=32, layers=1, steps=130, warmup=20, rate=8e-3)


@dataclass(frozen=True)
class Arm:
    """A model: attention with or without a window, a memory of so many slots or none, and how that is written."""

    window: int | None = WINDOW
    slots: int | None = None
    rule: Callable = delta_rule


def recall_rows(rows: int, length: int, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels [rows, length] of task `recall`."""
    ids_BS = torch.zeros(rows, length, dtype=torch.int64)
    pairs = bind(ids_BS, 0, sizes.pairs, sizes, generator)
    return ask(ids_BS, *pairs, 2 * sizes.pairs + sizes.reach, generator)


def rebound_rows(rows: int, length: int, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels [rows, length] of task `rebound`; longer rows have more rounds."""
    ids_BS = torch.zeros(rows, length, dtype=torch.int64)
    for start in range(0, ROUNDS * length // sizes.length * (2 * ROUND_PAIRS + 1), 2 * ROUND_PAIRS + 1):
        ids_BS[:, start] = 1
        pairs = bind(ids_BS, start + 1, ROUND_PAIRS, sizes, generator)
    return ask(ids_BS, *pairs, start + 1 + 2 * ROUND_PAIRS + sizes.reach, generator)


TASKS = {"recall": recall_rows, "rebound": rebound_rows}


def bind(
    ids_BS: Tensor, start: int, pairs: int, sizes: Sizes, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Write pairs of keys, distinct in a row, and values; returns both, [B, pairs]."""
    first_value = sizes.vocabulary // 2
    keys_BP = 2 + torch.rand(len(ids_BS), first_value - 2, generator=generator).argsort(1)[:, :pairs]
    values_BP = torch.randint(first_value, sizes.vocabulary, keys_BP.shape, generator=generator)
    stop = start + 2 * pairs
    ids_BS[:, start:stop:2], ids_BS[:, start + 1 : stop : 2] = keys_BP, values_BP
    return keys_BP, values_BP


def ask(
    ids_BS: Tensor, keys_BP: Tensor, values_BP: Tensor, start: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Fill the rows from `start` on with keys; the value of each is to follow it, a target that is never shown."""
    rows, length = ids_BS.shape
    which_BQ = torch.randint(keys_BP.shape[1], (rows, length - start), generator=generator)
    ids_BS[:, start:] = keys_BP.gather(1, which_BQ)
    labels_BS = torch.full_like(ids_BS, -100)
    labels_BS[:, start + 1 :] = values_BP.gather(1, which_BQ)[:, :-1]
    return ids_BS, labels_BS


class ConvolvedAttention(Attention):
    """Attention whose input has passed through a short convolution: what a memory has, for a fair baseline."""

    def __init__(self, config: PragnosiaConfig, layer_idx: int, window: int | None):
        super().__init__(config, layer_idx, window)
        self.conv = ShortConvolution(config.hidden_size, TAPS)

    def forward(self, hidden_BSD: Tensor, *rest) -> Tensor:
        batch, length, width = hidden_BSD.shape
        tail_BSD = hidden_BSD.new_zeros(batch, TAPS - 1, width)
        one_document_BS = torch.zeros(batch, length, dtype=torch.int64, device=hidden_BSD.device)
        return super().forward(self.conv(hidden_BSD, tail_BSD, one_document_BS)[0], *rest)


def without_delta(q_BSHC, k_BSHC, v_BSHC, beta_BSH, decay_BSH, _segment_BS, state_BHCC, _chunk_size):
    """A memory that adds and does not replace: S_t = α_t S_{t−1} + β_t k_t v_tᵀ, for rows of one document."""
    length = decay_BSH.shape[1]
    later_SS = torch.ones(length, length, dtype=torch.bool, device=decay_BSH.device).tril(-1)
    logs_BHSS = decay_BSH.transpose(1, 2)[..., None].where(later_SS, 0).cumsum(-2)
    scores_BHSS = torch.einsum("bihc,bjhc->bhij", q_BSHC, k_BSHC) * logs_BHSS.exp().tril()
    return torch.einsum("bhij,bjhc->bihc", scores_BHSS, beta_BSH[..., None] * v_BSHC), state_BHCC


def without_forgetting(q_BSHC, k_BSHC, v_BSHC, beta_BSH, decay_BSH, *rest):
    """The delta rule with α = 1."""
    return delta_rule(q_BSHC, k_BSHC, v_BSHC, beta_BSH, 0 * decay_BSH, *rest)


ARMS = {
    ("recall", CONTROL): Arm(),
    ("recall", GATE): Arm(slots=64),
    ("recall", "full attention"): Arm(window=None),
    **{("recall", f"window + memory, {slots} slots"): Arm(slots=slots) for slots in (32, 16, 8)},
    ("recall", "window + memory, 64 slots, no delta rule"): Arm(slots=64, rule=without_delta),
    ("rebound", CONTROL): Arm(),
    ("rebound", "window + memory, 16 slots"): Arm(slots=16),
    ("rebound", "window + memory, 16 slots, no forgetting"): Arm(slots=16, rule=without_forgetting),
}


def build(arm: Arm, sizes: Sizes, seed: int) -> PragnosiaForCausalLM:
    """A decoder with one dense expert a layer, and the arm's attention and memory in every layer."""
    memory = arm.slots and asdict(
        MemoryConfig(
            hidden_size=WIDTH, memory_size=arm.slots, head_dim=arm.slots, num_memory_layers=sizes.layers,
            dropout=0.0, conv_size=TAPS, window=arm.window,
        )
    )  # fmt: skip
    config = PragnosiaConfig(
        vocab_size=sizes.vocabulary, hidden_size=WIDTH, num_hidden_layers=sizes.layers, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=128,
        router_aux_loss_coef=0.0, router_z_loss_coef=0.0, memory=memory,
    )  # fmt: skip
    model = PragnosiaForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        if layer.memory is None:
            layer.self_attn = ConvolvedAttention(config, index, arm.window)
        else:
            layer.memory.rule = arm.rule
    fill(model, initial_weights(seed, SCALE))
    return model


def train(model: PragnosiaForCausalLM, task: str, sizes: Sizes, steps: int, seed: int, device: str) -> None:
    """`steps` updates on fresh rows."""
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(steps):
        ids_BS, labels_BS = (x.to(device) for x in TASKS[task](ROWS, sizes.length, sizes, generator))
        factor = learning_rate_factor("cosine", step, steps, sizes.warmup)
        optimizer.param_groups[0]["lr"] = sizes.rate * factor
        model(ids_BS, labels=labels_BS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: PragnosiaForCausalLM, task: str, sizes: Sizes, length: int, device: str) -> float:
    """The share of queries answered with the right value."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    right = asked = 0
    while asked < QUERIES:
        ids_BS, labels_BS = (x.to(device) for x in TASKS[task](ROWS, length, sizes, generator))
        found_BS = model(ids_BS, use_cache=False).logits[:, :-1].argmax(-1)
        is_target_BS = labels_BS[:, 1:] >= 0
        right += int((found_BS == labels_BS[:, 1:])[is_target_BS].sum())
        asked += int(is_target_BS.sum())
    return right / asked


def measure(task: str, name: str, sizes: Sizes, seed: int, steps: int, device: str) -> dict:
    """Train and question one arm."""
    started = time.perf_counter()
    model = build(ARMS[task, name], sizes, seed).to(device)
    train(model, task, sizes, steps, seed, device)
    return {
        "task": task,
        "model": name,
        "seed": seed,
        "steps": steps,
        "accuracy": accuracy(model, task, sizes, sizes.length, device),
        "accuracy_4x": accuracy(model, task, sizes, 4 * sizes.length, device),
        "seconds": time.perf_counter() - started,
    }


def goals(rows: list[dict]) -> list[dict]:
    """The worst seed with a memory, and the best without one."""
    found = {
        name: [row["accuracy"] for row in rows if (row["task"], row["model"]) == ("recall", name)]
        for name in (GATE, CONTROL)
    }
    judged = []
    if found[GATE]:
        judged.append(goal("recall with a memory, worst seed", SOLVED, min(found[GATE]), at_least=True))
    if found[CONTROL]:
        judged.append(goal("recall without one, best seed", CHANCE, max(found[CONTROL]), at_least=False))
    return judged


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(name for _, name in ARMS))
    options.add_argument("--short", action="store_true", help="the two models of the goals, on a small task")
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    options.add_argument(
        "--arms", nargs="+", choices=names, default=names, metavar="ARM", help=", ".join(names)
    )
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument(
        "--steps", type=int, default=None, help=f"default: {Sizes.steps}, with --short {SHORT.steps}"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def main() -> None:
    args = parser().parse_args()
    sizes = SHORT if args.short else Sizes()
    wanted = [("recall", CONTROL), ("recall", GATE)] if args.short else ARMS
    path = args.output / ("recall_short.json" if args.short else "recall.json")
    rows = []
    for seed in args.seeds:
        for task, name in wanted:
            if task in args.tasks and name in args.arms:
                rows.append(measure(task, name, sizes, seed, args.steps or sizes.steps, args.device))
                print(rows[-1], flush=True)
    report(path, rows, goals(rows), args.device)


if __name__ == "__main__":
    main()
