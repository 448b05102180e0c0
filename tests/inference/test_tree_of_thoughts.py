"""The search against forwards without cache, its rules on the trees it returns, and greedy decoding."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.countdown import Tokenizer
from inference.generation import Sampling, generate, prompt_ids
from inference.tree_of_thoughts import Thought, Tree, _Search, leaves, tree_of_thoughts
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.components import MemoryConfig, TreeConfig
from training.config import UserError

PROMPTS = ["1 2 3", "7 \n 4", "5 6 7 8 9 \n #### 3"]
CACHES = {
    "keys and values": {},
    "sums of step routing": {"routing": "step", "expert_pool": 3},
    "memory": {
        "memory": asdict(MemoryConfig(32, memory_size=16, head_dim=8, num_memory_layers=1, chunk_size=4))
    },
}


class Words(Tokenizer):
    """Few words, so that steps and answers of a random model end."""

    words = ("<pad>", "<end>", "\n", "####", *"0123456789")


def tree(**fields) -> TreeConfig:
    return TreeConfig(**{"hidden_size": 32, "max_thought_tokens": 5, "temperature": 1.5, **fields})


def build(**fields) -> PragnosiaForCausalLM:
    torch.manual_seed(3)
    config = PragnosiaConfig(
        vocab_size=len(Words()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_experts=4, moe_intermediate_size=16, max_position_embeddings=64, initializer_range=0.3,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, **{"tree": asdict(tree()), **fields},
    )  # fmt: skip
    model = PragnosiaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def search(model, prompts=PROMPTS, score="value", seed=0, max_new_tokens=24, **fields) -> list[Tree]:
    return tree_of_thoughts(
        model, Words(), prompts, tree(**fields), score=score, seed=seed, max_new_tokens=max_new_tokens
    )


def thoughts(found: list[Tree]) -> list[Thought]:
    return [thought for one in found for thought in one.root.descendants()]


@pytest.mark.parametrize("fields", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("how", ["bfs", "dfs", "best_of_n"])
def test_values_are_those_of_a_forward_without_cache(fields, how):
    """Rows are selected, repeated and joined on the way; each must still have seen its own path and no padding."""
    model = build(**fields)
    checked = 0
    for prompt, one in zip(PROMPTS, search(model, search=how, beam_width=2, branching=3), strict=True):
        for thought in one.root.descendants():
            ids = torch.tensor([prompt_ids(Words(), prompt) + thought.answer_tokens()])
            with torch.no_grad():
                expected = model(input_ids=ids, output_values=True, use_cache=False).step_values[0, -1]
            assert thought.value == pytest.approx(expected.item(), abs=1e-5)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("fields", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("score", ["value", "likelihood"])
def test_one_state_and_one_proposal_are_greedy_decoding(fields, score):
    model, one = build(**fields), {"beam_width": 1, "branching": 1, "temperature": 0.0}
    expected = generate(model, Words(), PROMPTS, Sampling.greedy(24), device="cpu")
    assert [found.answer for found in search(model, score=score, **one)] == expected
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        assert search(model, [prompt], score=score, **one)[0].answer == answer


def test_a_single_state_computes_the_very_logits_of_greedy_decoding(model, monkeypatch):
    from inference import generation
    from inference import tree_of_thoughts as module

    seen = {generation: [], module: []}
    for place, logits in seen.items():

        def noted(logits_BV, sampling, generator, logits=logits):
            logits.append(logits_BV)
            return logits_BV.argmax(-1)

        monkeypatch.setattr(place, "next_tokens", noted)
    generate(model, Words(), PROMPTS[:1], Sampling.greedy(24), device="cpu")
    search(model, PROMPTS[:1], beam_width=1, branching=1, temperature=0.0)
    ours, theirs = seen[module], seen[generation]
    assert len(theirs) > 8 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_steps_end_where_they_should_and_answers_are_bounded(model):
    found = search(model, max_new_tokens=11, branching=6)
    for thought in thoughts(found):
        *inner, last = thought.tokens
        written = len(thought.answer_tokens())
        assert len(thought.tokens) <= 5 and written <= 11 and 1 not in inner
        assert thought.finished == (last == 1 or written == 11)
        solid = [i for i, token in enumerate(thought.tokens) if token != 2]
        assert 2 not in thought.tokens[solid[0] if solid else 0 : -1]
    assert any(t.tokens[-1] == 1 for t in thoughts(found)) and any(t.tokens[-1] == 2 for t in thoughts(found))
    assert [one.tokens >= sum(len(t.tokens) for t in one.root.descendants()) for one in found] == [True] * 3


def test_the_context_is_never_exceeded(model):
    long = " ".join("12345" * 20)
    (found,) = search(model, [long], max_new_tokens=100, beam_width=1, branching=2)
    assert max(len(thought.answer_tokens()) for thought in thoughts([found])) <= 32
    with_room = search(model, [" ".join("12345" * 20)[-63:]], max_new_tokens=100, beam_width=1, branching=2)
    assert with_room[0].answer == found.answer  # the beginning was cut off


def depths(one: Tree) -> dict[int, list[Thought]]:
    found: dict[int, list[Thought]] = {}
    for thought in one.root.descendants():
        found.setdefault(len(thought.path()), []).append(thought)
    return found


@pytest.mark.parametrize("how", ["product", "min", "last"])
def test_breadth_first_keeps_the_best_paths(model, how):
    found = search(model, beam_width=3, branching=4, path_score=how, pruning_threshold=0.0, max_depth=3)
    for one in found:
        for depth, level in depths(one).items():
            kept = [thought for thought in level if thought.kept]
            if depth <= 3:
                assert len(kept) == min(3, len(level))
                dropped = [thought.score for thought in level if not thought.kept]
                assert not dropped or min(thought.score for thought in kept) >= max(dropped)
            else:  # written to the end without a choice
                assert kept == level and len(level) <= 3
        for thought in one.root.descendants():
            values = torch.tensor([step.value for step in thought.path()], dtype=torch.float64)
            expected = {"product": values.prod(), "min": values.min(), "last": values[-1]}[how]
            assert thought.score == pytest.approx(expected.item())
            assert thought.kept or not thought.children


def test_pruning_drops_what_is_below_and_keeps_the_best(model):
    free = search(model, branching=6, pruning_threshold=0.0)
    threshold = sorted(thought.value for thought in thoughts(free))[len(thoughts(free)) // 2]
    for one in search(model, branching=6, pruning_threshold=threshold):
        for level in [level for depth, level in depths(one).items() if depth <= 3]:
            kept = [thought for thought in level if thought.kept]
            assert len(kept) == 1 or all(thought.value >= threshold for thought in kept)
    for one in search(model, pruning_threshold=1.0):
        for depth, level in depths(one).items():
            best = max(level, key=lambda thought: thought.score)
            assert depth > 3 or [thought for thought in level if thought.kept] == [best]
        assert one.leaf.finished


def test_equal_steps_become_one(model):
    for one in search(model, temperature=0.0, branching=5):
        assert all(len(thought.children) <= 1 for thought in [one.root, *one.root.descendants()])
        assert one.tokens > 4 * len(one.root.children[0].tokens)


def test_depth_first_goes_on_from_the_best_and_comes_back(model):
    values = sorted(thought.value for thought in thoughts(search(model, branching=4)))
    came_back = 0
    for seed, threshold in enumerate((values[len(values) // 4], values[len(values) // 2])):
        settings = {"search": "dfs", "beam_width": 8, "branching": 4, "pruning_threshold": threshold}
        for one in search(model, seed=seed, **settings):
            for thought in [one.root, *one.root.descendants()]:
                going = [child for child in thought.children if not child.finished]
                expanded = [child for child in going if child.children]
                best = sorted(going, key=lambda child: -child.score)[: len(expanded)]
                assert {id(child) for child in expanded} == {id(child) for child in best}
                came_back += len(expanded) > 1
                assert thought.kept or not thought.children
            assert one.leaf.finished
    assert came_back > 4
    one_answer = search(model, search="dfs", beam_width=1, branching=4, pruning_threshold=0.0)
    assert all(len(leaves(one)) >= 1 and one.tokens < 150 for one in one_answer)


def test_best_of_n_draws_whole_solutions(model):
    for one in search(model, search="best_of_n", beam_width=2, branching=4, max_depth=1):
        assert len(one.root.children) == 8 and len(leaves(one)) == 8
        assert all(len(thought.children) <= 1 for thought in one.root.descendants())


def test_likelihoods_are_those_of_the_tokens(model):
    for prompt, one in zip(PROMPTS, search(model, score="likelihood", pruning_threshold=0.0), strict=True):
        start = prompt_ids(Words(), prompt)
        for thought in one.root.descendants():
            tokens = thought.answer_tokens()
            with torch.no_grad():
                logits_SV = model(input_ids=torch.tensor([start + tokens]), use_cache=False).logits[0]
            log_SV = logits_SV.log_softmax(-1)[len(start) - 1 : -1]
            expected = log_SV.gather(1, torch.tensor(tokens)[:, None]).sum()
            assert thought.score == pytest.approx(expected.exp().item(), rel=1e-3)
        assert one.leaf.score == max(leaf.score for leaf in leaves(one))


def test_the_seed_decides(model):
    def said(seed):
        return [thought.tokens for thought in thoughts(search(model, seed=seed))]

    assert said(1) == said(1) != said(2)


def elected(model, *candidates: tuple[str, float], finished=True) -> str:
    words = Words()
    one = Tree(Thought(None, []))
    for text, score in candidates:
        leaf = Thought(one.root, words(text)["input_ids"], text, score, score, finished=finished)
        one.root.children.append(leaf)
    chosen = _Search(model, words, tree(), "value", 8, 0, "cpu", None, lambda: False).elect(one)
    return chosen.text


def test_leaves_vote_with_their_scores(model):
    assert elected(model, ("1 #### 4", 0.3), ("2 #### 4", 0.4), ("#### 5", 0.6)) == "2 #### 4"
    assert elected(model, ("1 #### 4", 0.1), ("2 #### 4", 0.2), ("#### 5", 0.6)) == "#### 5"
    assert elected(model, ("1 1", 0.3), ("2 2", 0.4), finished=False) == "2 2"


def test_asked_to_stop_it_answers_with_what_there_is(model):
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == 7

    (one,) = tree_of_thoughts(model, Words(), PROMPTS[:1], tree(), max_new_tokens=24, stop=stop)
    whole = search(model, PROMPTS[:1])[0]
    assert len(asked) == 7 and 0 < one.tokens < whole.tokens
    assert one.answer == Words().decode(one.leaf.answer_tokens(), True) and not one.leaf.children


def test_a_model_without_a_value_head_is_one_line(model):
    base = build(tree=None)
    for call in (
        lambda: tree_of_thoughts(base, Words(), PROMPTS),
        lambda: base.generate_with_tree(Words(), PROMPTS, tree()),
    ):
        with pytest.raises(UserError, match="no value head: train one with --use-tree-of-thoughts"):
            call()
    assert search(base, score="likelihood")[0].leaf.finished  # needs none


def test_the_model_s_own_method_and_settings(model):
    ours = model.generate_with_tree(Words(), PROMPTS, max_new_tokens=24)
    assert [one.answer for one in ours] == [one.answer for one in search(model)]


def test_the_tree_as_text(model):
    one = search(model, PROMPTS[:1], branching=3)[0]
    lines = one.text().splitlines()
    assert len(lines) == len(thoughts([one])) and len(one.path_text().splitlines()) == len(one.path)
    chosen = [line for line in lines if line.lstrip()[5] == "*"]
    for depth, (line, step) in enumerate(zip(chosen, one.path, strict=True)):
        assert line == f"{'  ' * depth}{step.value:.2f} * {step.text}"
