"""A task that separates a search over steps from writing the likeliest: reach a number from four others.

    python benchmarks/countdown.py                   # four numbers, 0.8M parameters; about 25 minutes on a core
    python benchmarks/countdown.py --short           # three numbers, few problems, a smaller model; seconds
    python benchmarks/countdown.py --taught own made solutions      # what the value head learns from

A step takes two of the numbers and puts their sum, difference, product or quotient in their place; the last number
must be the target. Many first steps look alike and few can still reach it. One small model learns solutions, and
its value head what steps are worth: those of solutions 1; wrong results, numbers that are not there and lists that
are not what is left 0; other legal steps, at random and the model's own, 1 if an exhaustive search still reaches
the target. With `--taught made` the head never sees the model's own steps, with `solutions` no wrong one at all.
Every arm then solves the same problems, which training never saw, with the same weights. tokens: what an arm
generates for a problem.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.results import DIRECTORY, goal, report

MOST = 99  # the largest number there is a token for
NONE = -100
GROUP = 50  # problems searched together
TAUGHT = ("own", "made", "solutions")  # what the value head learns from; each adds to the next
PERIODS = (2, 3, 4, 5, 7, 10, 16, 25, 40, 64, 100, 200)  # of the waves that a number's embedding begins with


@dataclass(frozen=True)
class Setup:
    """A size of the task. largest: of the given numbers. held_out: problems of the arms. is_shared: training sees
    them too, and nothing else. own_answers: steps between the model's own answers."""

    numbers: int = 4
    largest: int = 10
    held_out: int = 200
    is_shared: bool = False
    width: int = 128
    layers: int = 3
    expert_width: int = 128
    steps: int = 3000
    rows: int = 64
    own_answers: int = 75
    learning_rate: float = 3e-3


SHORT = Setup(
    numbers=3, held_out=12, is_shared=True, width=64, layers=2, expert_width=64, steps=250, rows=32,
    own_answers=50, learning_rate=8e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Numbers in descending order, and a target that can be reached from them."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} : {self.target} \n"


class Tokenizer:
    """Words between spaces; each number is one token."""

    words = ("<pad>", "<end>", "\n", "+", "-", "*", "/", "=", "|", ":", *map(str, range(MOST + 1)))
    pad_token_id, eos_token_id, eos_token = 0, 1, "<end>"

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [self.ids[word] for word in text.split(" ") if word]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_options) -> str:
        return " ".join(self.words[i] for i in ids if i > 1 or not skip_special_tokens)


# -- the task ------------------------------------------------------------------------------------------------


def result(left: int, symbol: str, right: int) -> int | None:
    """left symbol right, None where it is no number from 1 to MOST."""
    if symbol == "/":
        value = left // right if right and left % right == 0 else 0
    else:
        value = {"+": left + right, "-": left - right, "*": left * right}[symbol]
    return value if 1 <= value <= MOST else None


@functools.cache
def moves(numbers: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """All legal steps, the larger number first, and what they leave."""
    found = {}
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for symbol in "+-*/":
            value = result(numbers[i], symbol, numbers[j])
            if value is not None:
                left = tuple(sorted([*rest, value], reverse=True))
                found[written(numbers[i], symbol, numbers[j], value, left)] = left
    return tuple(found.items())


def written(left: int, symbol: str, right: int, value: int, rest: Sequence[int]) -> str:
    """A step as text."""
    return f"{left} {symbol} {right} = {value} | {' '.join(map(str, rest))}"


@functools.lru_cache(maxsize=1 << 18)
def reaches(numbers: tuple[int, ...], target: int) -> bool:
    """Whether the target can be made of all the numbers."""
    if len(numbers) == 1:
        return numbers[0] == target
    return any(reaches(left, target) for _, left in moves(numbers))


def worth(problem: Problem, steps: Sequence[str]) -> list[bool]:
    """For each step whether it and those before it are legal and the target is still within reach."""
    numbers, verdicts = problem.numbers, []
    for step in steps:
        numbers = None if numbers is None else dict(moves(numbers)).get(step)
        verdicts.append(numbers is not None and reaches(numbers, problem.target))
        numbers = numbers if verdicts[-1] else None
    return verdicts


def is_solved(problem: Problem, answer: str) -> bool:
    """Whether an answer is a solution to its end."""
    steps = steps_of(answer)
    return len(steps) == len(problem.numbers) - 1 and worth(problem, steps)[-1]


def steps_of(answer: str) -> list[str]:
    return [step.strip() for step in answer.split("\n") if step.strip()]


def walked(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    """Random legal steps to the end."""
    steps = []
    while len(numbers) > 1:
        step, numbers = rng.choice(moves(numbers))
        steps.append(step)
    return steps


def drawn(rng: random.Random, setup: Setup) -> tuple[Problem, list[str]]:
    """A random problem, and the random steps that made it."""
    while True:
        numbers = tuple(sorted((rng.randint(1, setup.largest) for _ in range(setup.numbers)), reverse=True))
        steps = walked(rng, numbers)
        target = int(steps[-1].split(" ")[-1])
        if target >= 10:
            return Problem(numbers, target), steps


def mistaken(rng: random.Random, problem: Problem, numbers: tuple[int, ...]) -> str:
    """A step that is not legal: a wrong result (often the one that is wished for), a number that is not there, or
    a wrong list of what is left."""
    step, left = rng.choice(moves(numbers))
    first, symbol, second, _, value = step.split(" ")[:5]
    first, second, value, rest = int(first), int(second), int(value), list(left)
    rest.remove(value)
    known = range(1, MOST)
    kind = rng.choice(("result", "result", "number", "list"))
    if kind == "result":
        wrong = [n for n in (*known, *[problem.target] * len(known)) if n != value]
        value = rng.choice(wrong)
    elif kind == "number":
        first = rng.choice([n for n in known if n not in numbers])
        value = result(first, symbol, second) or problem.target
    elif rest:
        rest[rng.randrange(len(rest))] = rng.choice([n for n in (*known, *numbers) if n not in rest])
    else:
        return written(first, symbol, second, value, [rng.choice([n for n in known if n != value])])
    return written(first, symbol, second, value, sorted([*rest, value], reverse=True))


def explored(rng: random.Random, problem: Problem, gold: list[str]) -> list[str]:
    """A solution that leaves the right way at a random step: for a mistake, or for any legal steps."""
    steps = gold[: rng.randrange(len(gold))]
    numbers = problem.numbers
    for step in steps:
        numbers = dict(moves(numbers))[step]
    if rng.random() < 0.5:
        return [*steps, mistaken(rng, problem, numbers)]
    return [*steps, *walked(rng, numbers)]


# -- the model -----------------------------------------------------------------------------------------------


def batch_of(documents: Sequence[tuple[Problem, list[str], bool]], tokenizer: Tokenizer) -> dict:
    """One document a row: its problem, its steps, whether the language model learns them; values at their ends."""
    import torch

    rows = []
    for problem, steps, is_learnt in documents:
        whole = len(steps) == len(problem.numbers) - 1
        start = tokenizer(problem.prompt)["input_ids"]
        answer = tokenizer(" \n ".join(steps) + (" <end>" if whole else " \n"))["input_ids"]
        ends = [i for i, token in enumerate(answer) if token in (1, 2)]
        values = [NONE] * len(answer)
        for end, verdict in zip(ends, worth(problem, steps), strict=True):
            values[end] = int(verdict)
        labels = answer if is_learnt else [NONE] * len(answer)
        rows.append((start + answer, [NONE] * len(start) + labels, [NONE] * len(start) + values))
    longest = max(len(tokens) for tokens, _, _ in rows)

    def padded(column: int, fill: int) -> torch.Tensor:
        return torch.tensor([row[column] + [fill] * (longest - len(row[column])) for row in rows])

    real = torch.tensor([[1] * len(row[0]) + [0] * (longest - len(row[0])) for row in rows])
    names = {"input_ids": padded(0, 0), "labels": padded(1, NONE), "value_labels": padded(2, NONE)}
    return {**names, "document_ids": real}


def build(setup: Setup, tokenizer: Tokenizer, seed: int):
    """The untrained model."""
    import torch

    from model import PragnosiaConfig, PragnosiaForCausalLM
    from model.components import TreeConfig

    torch.manual_seed(seed)
    config = PragnosiaConfig(
        vocab_size=len(tokenizer), hidden_size=setup.width, num_hidden_layers=setup.layers,
        num_attention_heads=setup.width // 32, num_key_value_heads=setup.width // 32, head_dim=32, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=setup.expert_width, max_position_embeddings=128,
        pad_token_id=0, eos_token_id=1, initializer_range=0.06,
        tree=asdict(TreeConfig(setup.width, max_depth=setup.numbers - 1, value_loss_weight=1.0)),
    )  # fmt: skip
    model = PragnosiaForCausalLM(config)
    with torch.no_grad():
        waves = torch.arange(MOST + 1)[:, None] * 2 * math.pi / torch.tensor(PERIODS)
        known = torch.cat((waves.cos(), waves.sin()), dim=1) * 2 * config.initializer_range
        model.model.embed_tokens.weight[-len(known) :, : known.shape[1]] = known
    return model


def train(setup: Setup, held_out: list[Problem], seed: int, device: str, taught: str = "own"):
    """The trained model, its training a function of the seed.

    Where problems are shared, the language model learns any legal steps, since solutions would be learnt by heart.
    """
    import torch

    from inference.generation import Sampling, generate

    tokenizer, rng = Tokenizer(), random.Random(seed)
    model = build(setup, tokenizer, seed).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setup.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    own: list[tuple[Problem, list[str], bool]] = []
    unseen = set(held_out)
    started = time.perf_counter()

    def fresh() -> tuple[Problem, list[str]]:
        if setup.is_shared:
            problem = rng.choice(held_out)
            return problem, walked(rng, problem.numbers)
        while True:
            problem, gold = drawn(rng, setup)
            if problem not in unseen:
                return problem, gold

    for step in range(setup.steps):
        if taught == "own" and step >= setup.steps // 10 and step % setup.own_answers == 0:
            asked = [fresh()[0] for _ in range(setup.rows * setup.own_answers // 10)]
            model.eval()
            sampling = Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0, seed=step)
            answers = generate(model, tokenizer, [p.prompt for p in asked], sampling, device=device)
            spoken = [(p, steps_of(answer), False) for p, answer in zip(asked, answers, strict=True)]
            own = [one for one in spoken if 0 < len(one[1]) < setup.numbers]
        documents = []
        for row in range(setup.rows):
            if row % 4 == 3 and own:
                documents.append(rng.choice(own))
            elif row % 2 and taught != "solutions":
                problem, gold = fresh()
                documents.append((problem, explored(rng, problem, gold), False))
            else:
                documents.append((*fresh(), True))
        batch = {name: x.to(device) for name, x in batch_of(documents, tokenizer).items()}
        factor = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / setup.steps))
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate * factor
        model.train()
        output = model(**batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, setup.steps // 20) == 0:
            targets = (batch["labels"] != NONE).sum()
            right, count = output.component_sums["tree/value_accuracy"].tolist()
            loss = float(output.loss_sum.detach() / targets)
            print(
                f"step {step + 1}  loss {loss:.3f}  values right {right / count:.3f}  "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return model.eval(), tokenizer


# -- the arms ------------------------------------------------------------------------------------------------


def arms(base) -> dict[str, tuple]:
    """Name -> (search, what scores its steps). `base` is the model's own TreeConfig."""

    def tree(beam_width: int, branching: int, path_score: str = "product"):
        return replace(base, beam_width=beam_width, branching=branching, path_score=path_score)

    best_of_20 = replace(base, search="best_of_n", beam_width=20, branching=1, path_score="min")
    return {
        "likelihood beam 4x8": (replace(tree(4, 8), pruning_threshold=0.0), "likelihood"),
        "random score 4x8": (replace(tree(4, 8), pruning_threshold=0.0), "random"),
        "tree 4x8 last": (tree(4, 8, "last"), "value"),
        "tree 4x8 min": (tree(4, 8, "min"), "value"),
        "tree 4x8 product": (tree(4, 8), "value"),
        "tree 2x8": (tree(2, 8), "value"),
        "tree 1x5": (tree(1, 5), "value"),
        "tree 8x16": (tree(8, 16), "value"),
        "depth first 4x8": (replace(tree(4, 8), search="dfs"), "value"),
        "best of 20": (best_of_20, "value"),
    }


def measure(
    model, tokenizer: Tokenizer, problems: list[Problem], names: Sequence[str] | None = None
) -> list[dict]:
    """A row for each arm: the share of problems it solves, and the tokens it generates for one."""
    from inference.generation import Sampling, generate
    from inference.tree_of_thoughts import leaves, tree_config, tree_of_thoughts

    prompts = [problem.prompt for problem in problems]
    device = next(model.parameters()).device
    answers = generate(model, tokenizer, prompts, Sampling.greedy(40), device=device)
    right = [is_solved(problem, answer) for problem, answer in zip(problems, answers, strict=True)]
    tokens = sum(len(tokenizer(answer.replace("\n", "\n "))["input_ids"]) + 1 for answer in answers)
    rows = [{"arm": "greedy", "solved": sum(right) / len(right), "tokens": tokens / len(right)}]
    for name, (tree, score) in arms(tree_config(model)).items():
        if names is not None and name not in names:
            continue
        trees = []
        for start in range(0, len(prompts), GROUP):
            group = prompts[start : start + GROUP]
            trees += tree_of_thoughts(
                model, tokenizer, group, tree, score=score, max_new_tokens=40, seed=start
            )
        found = list(zip(problems, trees, strict=True))
        tokens = sum(one.tokens for one in trees) / len(trees)
        solved = sum(is_solved(problem, one.answer) for problem, one in found) / len(found)
        rows.append({"arm": name, "solved": solved, "tokens": tokens})
        if name == "best of 20":
            oracle = [
                any(is_solved(p, tokenizer.decode(leaf.answer_tokens(), True)) for leaf in leaves(one))
                for p, one in found
            ]
            rows.append({"arm": "oracle of 20", "solved": sum(oracle) / len(oracle), "tokens": tokens})
    return rows


def judged(rows: list[dict]) -> list[dict]:
    """The goals, on means over seeds of the model whose head has learnt from its own answers."""

    def mean(arm: str) -> float:
        solved = [row["solved"] for row in rows if (row["arm"], row["taught"]) == (arm, "own")]
        return sum(solved) / len(solved)

    return [
        goal(
            f"tree 4x8 product, share solved above {arm}",
            least,
            mean("tree 4x8 product") - mean(arm),
            at_least=True,
        )
        for arm, least in (("greedy", 0.25), ("likelihood beam 4x8", 0.2))
    ]


def held_out_problems(setup: Setup) -> list[Problem]:
    """The problems of every arm and seed."""
    rng, found = random.Random("held out"), {}
    while len(found) < setup.held_out:
        found[drawn(rng, setup)[0]] = None
    return list(found)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--short", action="store_true", help="three numbers, a smaller model, four arms")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument(
        "--taught", nargs="+", choices=TAUGHT, default=["own"], help="what the head learns from"
    )
    options.add_argument("--steps", type=int, default=None, help="of training")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    options.add_argument("--output", type=Path, default=DIRECTORY, help="default: benchmarks/results")
    return options


def main() -> None:
    args = parser().parse_args()
    setup = SHORT if args.short else Setup()
    setup = replace(setup, steps=args.steps or setup.steps)
    names = ("likelihood beam 4x8", "random score 4x8", "tree 4x8 product") if args.short else None
    problems = held_out_problems(setup)
    rows = []
    for seed, taught in itertools.product(args.seeds, args.taught):
        model, tokenizer = train(setup, problems, seed, args.device, taught)
        known = {"seed": seed, "taught": taught, "parameters": model.config.num_params()}
        rows += [row | known for row in measure(model, tokenizer, problems, names)]
    name = "countdown_short" if args.short else "countdown"
    goals = judged(rows) if "own" in args.taught else []
    report(args.output / f"{name}.json", rows, goals, args.device)


if __name__ == "__main__":
    main()
