"""The capacity of experts; under training it is tested in tests/training/test_expert_parallel.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.resident import ResidentBank
from kernels.reference import combine, permute, route
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.capacity import within_capacity


@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(0, 99), st.integers(1, 12), st.booleans(), st.data()
)
def test_an_expert_takes_so_many_choices_in_order(num_tokens, num_experts, seed, capacity, has_padding, data):
    """Against a loop over tokens, real ones first; what is kept keeps its order, what is dropped is lost."""
    num_active = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    valid_T = torch.rand(num_tokens, generator=generator) > 0.3 if has_padding else None
    whole, _ = route(logits_TE, num_active, valid_T=valid_T)
    found = within_capacity(whole, capacity, valid_T)

    is_real = [True] * num_tokens if valid_T is None else valid_T.tolist()
    taken = {expert: [] for expert in range(num_experts)}
    for token in [
        *(t for t in range(num_tokens) if is_real[t]),
        *(t for t in range(num_tokens) if not is_real[t]),
    ]:
        for choice, expert in enumerate(whole.ids_TK[token].tolist()):
            if len(taken[expert]) < capacity:
                taken[expert].append(num_active * token + choice)
    assert found.counts_E.tolist() == [len(rows) for rows in taken.values()]
    total = int(found.counts_E.sum())
    assert found.order_N[:total].tolist() == [row for rows in taken.values() for row in sorted(rows)]
    assert sorted(found.order_N.tolist()) == list(range(num_tokens * num_active))
    assert torch.equal(found.places_TK.flatten()[found.order_N], torch.arange(num_tokens * num_active))
    assert torch.equal(found.weights_TK, whole.weights_TK)
    if capacity >= num_tokens:
        assert all(torch.equal(*pair) for pair in zip(found, whole, strict=True))

    hidden_TD = torch.randn(num_tokens, 3, generator=generator, dtype=torch.float64)
    rows_ND = permute(hidden_TD, found)
    rows_ND[total:] = 0
    kept = {row for rows in taken.values() for row in rows}
    share_T = [
        sum(whole.weights_TK[t, k].item() for k in range(num_active) if num_active * t + k in kept)
        for t in range(num_tokens)
    ]
    expected_TD = hidden_TD * torch.tensor(share_T, dtype=torch.float64)[:, None]
    torch.testing.assert_close(combine(rows_ND, found), expected_TD)


class Kept(ResidentBank):
    """Experts with a capacity, which add up the choices that they are given."""

    capacity_factor, choices = 0.5, 0

    def capacity(self, tokens: int) -> int:
        return tokens // 4

    def forward(self, hidden_TD, routing):
        self.choices += int(routing.counts_E.sum())
        return hidden_TD


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_alone_drops_and_counts_what_it_drops(checkpointing):
    """16 tokens that choose 2 of 3 experts, in 2 layers; an expert has room for 4 choices."""
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "num_hidden_layers": 2, "hidden_size": 32}
    model = PragnosiaForCausalLM(PragnosiaConfig(**sizes, vocab_size=32), Kept)
    model.model.gradient_checkpointing = checkpointing
    banks = [layer.mlp.experts for layer in model.model.layers]
    ids = torch.arange(16).view(2, 8)
    output = model.train()(input_ids=ids, labels=ids)
    output.loss.backward()
    kept_L = output.load_LE.clamp(max=4).sum(1)
    assert output.load_LE.sum() == 64 and kept_L.max() <= 12
    assert output.component_sums["router/dropped_share"].tolist() == [64 - kept_L.sum(), 64]
    assert [bank.choices for bank in banks] == [(1 + checkpointing) * int(kept) for kept in kept_L]
    for bank in banks:
        bank.choices = 0
    output = model.eval()(input_ids=ids, labels=ids)
    assert output.component_sums is None and [bank.choices for bank in banks] == [32, 32]
