"""Search over steps of reasoning, guided by the model's value head (Tree of Thoughts, arXiv 2305.10601).

A thought is one step: the tokens up to a line break or the end of the answer. A state is a partial solution with
its row of a key-value cache. All states of all problems that are expanded together are one batch: their rows are
gathered from the caches in which they were left and joined with padding on the left, as prompts are; each row
leaves the batch with the last token of its step. So nothing is computed for rows that wait, and no padding ever
stands within a row, which a cache that holds states could not forget.

    bfs         `branching` steps are proposed to each state, and the best `beam_width` of a problem's go on
    dfs         the best new state goes on at once; where it is below `pruning_threshold` the search goes back
    best_of_n   `beam_width · branching` whole solutions, each drawn by itself

torch is imported inside the functions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.steps import StepEnds
from data.verify import final_box, final_number
from inference.generation import Sampling, context_length, latents_every, next_tokens, prompt_ids
from training.config import UserError

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from model.components import TreeConfig

SCORES = ("value", "likelihood", "random")
ANSWER_TOKENS = 256
"""Most tokens of an answer unless told otherwise."""


@dataclass(eq=False)
class Front:
    """States that were left together: rows of one cache.

    mask_BM: 1 where a cache entry is no padding. position_B: of the next token. logits_BV: fp32, its logits.
    """

    cache: DynamicCache
    mask_BM: torch.Tensor
    position_B: torch.Tensor
    logits_BV: torch.Tensor

    def select(self, rows: Sequence[int]) -> Front:
        """These rows, in this order, as often as they are named; this front stays as it is."""
        import torch

        index_B = torch.tensor(rows, device=self.mask_BM.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.reorder_cache(index_B)
        return Front(cache, self.mask_BM[index_B], self.position_B[index_B], self.logits_BV[index_B])


def join(fronts: Sequence[Front]) -> Front:
    """The rows of several fronts, one after another, with padding on the left of the shorter ones."""
    import torch
    import torch.nn.functional as F

    if len(fronts) == 1:
        return fronts[0]
    longest = max(front.mask_BM.shape[1] for front in fronts)
    missing = [longest - front.mask_BM.shape[1] for front in fronts]
    cache = copy.copy(fronts[0].cache)
    cache.layers = []
    for layers in zip(*(front.cache.layers for front in fronts), strict=True):
        layer = copy.copy(layers[0])
        for name in ("keys", "values"):
            parts = (
                F.pad(getattr(one, name), (0, 0, pad, 0)) for one, pad in zip(layers, missing, strict=True)
            )
            setattr(layer, name, torch.cat(list(parts)))
        if getattr(layer, "states", None):
            layer.states = {name: torch.cat([one.states[name] for one in layers]) for name in layer.states}
        cache.layers.append(layer)
    masks = [F.pad(front.mask_BM, (pad, 0)) for front, pad in zip(fronts, missing, strict=True)]
    rest = (torch.cat([getattr(front, name) for front in fronts]) for name in ("position_B", "logits_BV"))
    return Front(cache, torch.cat(masks), *rest)


@dataclass(eq=False)
class Thought:
    """A step of a partial solution, and so a node of the tree.

    value: of this step. score: of the path to here. finished: nothing can follow. kept: the search went on from
    here, or took it as an answer. state: its row of a front, while the search may still go on from here.
    """

    parent: Thought | None
    tokens: list[int]
    text: str = ""
    value: float = 1.0
    score: float = 1.0
    finished: bool = False
    kept: bool = True
    children: list[Thought] = field(default_factory=list)
    state: tuple[Front, int] | None = None

    def path(self) -> list[Thought]:
        """The steps from the first to this one."""
        steps, step = [], self
        while step.parent:
            steps.append(step)
            step = step.parent
        return steps[::-1]

    def answer_tokens(self) -> list[int]:
        """All tokens of the path."""
        return [token for step in self.path() for token in step.tokens]

    def descendants(self) -> Iterator[Thought]:
        """All thoughts below this one."""
        waiting = self.children[::-1]
        while waiting:
            thought = waiting.pop()
            yield thought
            waiting += thought.children[::-1]


@dataclass
class Tree:
    """What a search found for one problem.

    answer: the text of the chosen leaf. path: its steps. root: the prompt, with all that was proposed below it.
    tokens: how many were generated, duplicates included.
    """

    root: Thought
    tokens: int = 0
    leaf: Thought | None = None
    answer: str = ""

    @property
    def path(self) -> list[Thought]:
        return self.leaf.path() if self.leaf else []

    def path_text(self) -> str:
        """The chosen steps, each after its value."""
        return "\n".join(f"{step.value:.2f}  {step.text}" for step in self.path)

    def text(self) -> str:
        """All thoughts, each below the one it follows, after its value; `*` marks the chosen path, `.` others that
        were kept."""
        chosen = set(map(id, self.path))
        return "\n".join(
            f"{'  ' * (len(step.path()) - 1)}{step.value:.2f} "
            f"{'*' if id(step) in chosen else '.' if step.kept else ' '} {step.text}"
            for step in self.root.descendants()
        )


def tree_of_thoughts(
    model: object,
    tokenizer: object,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tree: TreeConfig | None = None,
    *,
    score: str = "value",
    max_new_tokens: int = ANSWER_TOKENS,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    agree: Callable[[torch.Tensor], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Tree]:
    """Search for an answer to each prompt, all in one batch.

    Args:
        model: a model with a value head, or an engine around one, in evaluation mode.
        prompts: finished prompts, or their tokens; one longer than the context less `max_new_tokens` (at most half
            of it) loses its beginning.
        tree: default the model's own.
        score: what a step is worth: "value" of the value head, "likelihood" of its tokens, or "random".
        seed: of the draws; None for another each time.
        device: default that of the model's parameters.
        agree: as in `generation.decode`, where several ranks compute the model together.
        stop: asked before every token; once it is true, each problem's best partial solution is its answer.

    Raises:
        UserError: the model has no value head and `score` asks for it.
    """
    assert score in SCORES, score
    tree = tree or tree_config(model)
    if score == "value":
        tree_config(model)
    device = device or next(model.parameters()).device
    search = _Search(model, tokenizer, tree, score, max_new_tokens, seed, device, agree, stop)
    room = search.context - min(max_new_tokens, search.context // 2)
    encoded = [prompt_ids(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    trees = search.plant([ids[-room:] for ids in encoded])
    searches = {"bfs": search.breadth_first, "dfs": search.depth_first, "best_of_n": search.best_of_n}
    searches[tree.search](trees)
    for one in trees:
        one.leaf = search.elect(one)
        tokens = one.leaf.answer_tokens() if one.leaf else []
        one.answer = search.decoded(tokens)
    return trees


def tree_config(model: object) -> TreeConfig:
    """The search that a model was trained for. Raises UserError where it has no value head."""
    from model.components import TreeConfig

    own = getattr(model, "module", model).config.tree
    if not own:
        raise UserError("this model has no value head: train one with --use-tree-of-thoughts")
    return TreeConfig(**own)


@dataclass(eq=False)
class _Draft:
    """A step that is being written."""

    parent: Thought
    room: int
    tokens: list[int] = field(default_factory=list)
    begun: bool = False
    log_likelihood: float = 0.0


class _Search:
    def __init__(
        self, model, tokenizer, tree: TreeConfig, score: str, max_new_tokens, seed, device, agree, stop
    ):
        import torch

        self.model, self.tokenizer, self.tree, self.score = model, tokenizer, tree, score
        self.max_new_tokens, self.agree, self.stop = max_new_tokens, agree, stop
        self.context = context_length(model)
        self.device = device
        self.ends = StepEnds(tokenizer)
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.stopped = False

    # -- searches --------------------------------------------------------------------------------------------

    def breadth_first(self, trees: list[Tree]) -> None:
        beams = [[one.root] for one in trees]
        for _ in range(self.tree.max_depth):
            grown = self.grow(trees, beams, self.tree.branching, self.tree.temperature)
            beams = [self.keep(thoughts, self.tree.beam_width) for thoughts in grown]
        self.complete(trees, beams)

    def best_of_n(self, trees: list[Tree]) -> None:
        count = self.tree.beam_width * self.tree.branching
        beams = self.grow(trees, [[one.root] for one in trees], count, self.tree.temperature, merge=False)
        while any(beams):
            beams = self.grow(trees, beams, 1, self.tree.temperature)

    def depth_first(self, trees: list[Tree]) -> None:
        """Until a problem has `beam_width` answers, or as many states have been taken up as in `breadth_first`."""
        stacks = [[one.root] for one in trees]
        for _ in range(1 + self.tree.beam_width * self.tree.max_depth):
            open_ones = [len(leaves(one)) < self.tree.beam_width for one in trees]
            tops = [
                [stack.pop()] if stack and go else [] for stack, go in zip(stacks, open_ones, strict=True)
            ]
            deep = [[top for top in own if len(top.path()) == self.tree.max_depth] for own in tops]
            self.complete(trees, deep)
            tops = [[top for top in own if len(top.path()) < self.tree.max_depth] for own in tops]
            grown = self.grow(trees, tops, self.tree.branching, self.tree.temperature)
            for stack, thoughts in zip(stacks, grown, strict=True):
                best_first = self.keep(thoughts, len(thoughts))
                if stack and best_first and best_first[0].value < self.tree.pruning_threshold:
                    best_first[0].kept = False
                else:
                    stack += [thought for thought in best_first[::-1] if not thought.finished]
        unanswered = [[] if leaves(one) else stack[-1:] for one, stack in zip(trees, stacks, strict=True)]
        self.complete(trees, unanswered)

    def complete(self, trees: list[Tree], beams: list[list[Thought]]) -> None:
        """Write what follows the searched steps, without a choice."""
        while any(thought for beam in beams for thought in beam if not thought.finished) and not self.stopped:
            beams = self.grow(trees, beams, 1, temperature=0.0)

    def keep(self, thoughts: list[Thought], width: int) -> list[Thought]:
        """The best `width` thoughts, best first; those below the pruning threshold only if all are."""
        ranked = sorted(thoughts, key=lambda thought: -thought.score)
        good = [thought for thought in ranked if thought.value >= self.tree.pruning_threshold]
        kept = (good or ranked[:1])[:width]
        for thought in thoughts:
            thought.kept = any(thought is other for other in kept)
            thought.state = thought.state if thought.kept else None
        return kept

    def elect(self, one: Tree) -> Thought | None:
        """The best leaf of the answer with the most score behind it; where nothing is finished, the best path."""
        candidates = leaves(one) or [t for t in one.root.descendants() if t.kept and not t.children]
        weights: dict[object, float] = {}
        for leaf in candidates:
            key = self.vote(leaf)
            weights[key] = weights.get(key, 0.0) + leaf.score
        return max(candidates, key=lambda leaf: (weights[self.vote(leaf)], leaf.score), default=None)

    def vote(self, leaf: Thought) -> object:
        """What a leaf answers: its final number or box, else its whole text."""
        text = self.decoded(leaf.answer_tokens())
        return final_number(text) or final_box(text) or " ".join(text.split())

    # -- proposals -------------------------------------------------------------------------------------------

    def plant(self, prompts: list[list[int]]) -> list[Tree]:
        """Read the prompts, each once; a coprocessor reads them too, and no more after that."""
        import torch

        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        input_BS = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        mask_BS = torch.tensor(seen, device=self.device)
        position_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        augment = {} if latents_every(self.model) is None else {"augment": True}
        front, _ = self.read(None, input_BS, mask_BS, position_BS, **augment)
        return [Tree(Thought(None, [], state=(front, row))) for row in range(len(prompts))]

    def read(self, cache, input_BS, mask_BM, position_BS, **options) -> tuple[Front, torch.Tensor | None]:
        """Feed tokens; also the values [B] after them, on the CPU, where values are scores."""
        import torch

        with torch.no_grad():
            output = self.model(
                input_ids=input_BS,
                attention_mask=mask_BM,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                output_values=self.score == "value",
                **options,
            )
        values_B = None if output.step_values is None else output.step_values[:, -1].cpu()
        logits_BV = output.logits[:, -1].float()
        return Front(output.past_key_values, mask_BM, position_BS[:, -1] + 1, logits_BV), values_B

    def grow(
        self,
        trees: list[Tree],
        beams: list[list[Thought]],
        branching: int,
        temperature: float,
        merge: bool = True,
    ) -> list[list[Thought]]:
        """Propose `branching` steps to each unfinished thought of each problem; the new thoughts of each problem.

        Equal steps of one parent become one thought where `merge` is set.
        """
        parents = [
            (one, thought)
            for one, beam in zip(trees, beams, strict=True)
            for thought in beam
            if not thought.finished
        ]
        grown = {id(one): [] for one in trees}
        if not parents or self.stopped:
            return [[] for _ in trees]
        drafts = self.write([thought for _, thought in parents], branching, temperature)
        for number, (one, parent) in enumerate(parents):
            parent.state = None
            for thought in drafts[number * branching : (number + 1) * branching]:
                one.tokens += len(thought.tokens)
                if merge and any(thought.tokens == other.tokens for other in parent.children):
                    continue
                parent.children.append(thought)
                grown[id(one)].append(thought)
        return [grown[id(one)] for one in trees]

    def write(self, parents: list[Thought], branching: int, temperature: float) -> list[Thought]:
        """`branching` steps after each parent, written in lockstep."""
        import torch

        sampling = Sampling(temperature=temperature, top_p=1.0, top_k=self.tree.top_k)
        front = gather(parents)
        if branching > 1:
            front = front.select([row for row in range(len(parents)) for _ in range(branching)])
        drafts = [_Draft(parent, self.room(parent, front, row)) for row, parent in enumerate(
            parent for parent in parents for _ in range(branching)
        )]  # fmt: skip
        written: dict[int, Thought] = {}
        writing = drafts
        while writing:
            token_B = next_tokens(front.logits_BV, sampling, self.generator)
            if self.agree is not None:
                message = torch.cat([token_B, torch.tensor([int(self.stop())])])
                self.agree(message)
                token_B, self.stopped = message[:-1], bool(message[-1])
            else:
                self.stopped = self.stop()
            if self.score == "likelihood":
                log_B = front.logits_BV.log_softmax(-1).cpu().gather(1, token_B[:, None])[:, 0]
                for draft, log_likelihood in zip(writing, log_B.tolist(), strict=True):
                    draft.log_likelihood += log_likelihood
            front, values_B = self.feed(front, token_B)
            if self.agree is not None and values_B is not None:
                self.agree(values_B)
            ended, going = [], []
            for row, (draft, token) in enumerate(zip(writing, token_B.tolist(), strict=True)):
                draft.tokens.append(token)
                end, draft.begun = self.ends.follow(draft.begun, token)
                cut = len(draft.tokens) >= min(self.tree.max_thought_tokens, draft.room)
                (ended if end or cut or self.stopped else going).append(row)
            if ended:
                left = front.select(ended)
                for place, row in enumerate(ended):
                    value = None if values_B is None else float(values_B[row])
                    written[id(writing[row])] = self.thought(writing[row], value, (left, place))
                writing = [writing[row] for row in going]
                front = front.select(going) if going else front
        return [written[id(draft)] for draft in drafts]

    def room(self, parent: Thought, front: Front, row: int) -> int:
        """Tokens that an answer may still get."""
        return min(
            self.max_new_tokens - len(parent.answer_tokens()), self.context - int(front.position_B[row])
        )

    def feed(self, front: Front, token_B: torch.Tensor) -> tuple[Front, torch.Tensor | None]:
        import torch

        mask_BM = torch.cat([front.mask_BM, front.mask_BM.new_ones(len(token_B), 1)], dim=1)
        return self.read(front.cache, token_B.to(self.device)[:, None], mask_BM, front.position_B[:, None])

    def thought(self, draft: _Draft, value: float | None, state: tuple[Front, int]) -> Thought:
        """A written step with its value and its path's score."""
        import torch

        if self.score == "likelihood":
            value = math.exp(draft.log_likelihood)
        elif self.score == "random":
            value = torch.rand((), generator=self.generator).item()
        finished = draft.tokens[-1] == self.tokenizer.eos_token_id or len(draft.tokens) >= draft.room
        text = self.decoded(draft.tokens).strip()
        thought = Thought(draft.parent, draft.tokens, text, value, finished=finished, state=state)
        values = [step.value for step in thought.path()]
        how = "product" if self.score == "likelihood" else self.tree.path_score
        thought.score = {"product": math.prod, "min": min, "last": lambda v: v[-1]}[how](values)
        thought.state = None if finished else state
        return thought

    def decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def gather(thoughts: Sequence[Thought]) -> Front:
    """The states of thoughts as one front, in their order."""
    fronts: dict[int, tuple[Front, list[int]]] = {}
    places: list[tuple[int, int]] = []
    for thought in thoughts:
        front, row = thought.state
        _, rows = fronts.setdefault(id(front), (front, []))
        places.append((list(fronts).index(id(front)), len(rows)))
        rows.append(row)
    joined = join([front.select(rows) for front, rows in fronts.values()])
    starts = [0]
    for _, rows in fronts.values():
        starts.append(starts[-1] + len(rows))
    order = [starts[number] + row for number, row in places]
    return joined if order == sorted(order) else joined.select(order)


def leaves(one: Tree) -> list[Thought]:
    """The finished solutions of a tree that the search kept."""
    return [thought for thought in one.root.descendants() if thought.finished and thought.kept]
