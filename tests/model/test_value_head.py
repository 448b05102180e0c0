"""The value head: nothing without it, its loss exact under any split, its weights new in a base model."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from model.components import TreeConfig
from model.config import PragnosiaConfig
from model.value_head import NO_VALUE
from training.weights import directory_weights, fill, initial_weights

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 3]])
LABELS = IDS.masked_fill(torch.arange(6) < 2, -100)
VALUES = torch.tensor([[NO_VALUE, NO_VALUE, 1, NO_VALUE, 0, NO_VALUE], [NO_VALUE] * 5 + [1]])


def tree(**fields):
    return asdict(TreeConfig(hidden_size=32, **fields))


@pytest.fixture
def headed(build):
    """A model whose head says something, and its values at all places of IDS."""
    model = build(tree=tree())
    torch.nn.init.normal_(model.value_head.out_proj.weight, std=0.5)
    return model


def test_a_new_head_says_a_half_and_counts_as_parameters(build):
    model = build(tree=tree())
    values_BS = model(input_ids=IDS, output_values=True).step_values
    assert values_BS.dtype == torch.float32 and torch.equal(values_BS, torch.full((2, 6), 0.5))
    own = sum(parameter.numel() for parameter in model.value_head.parameters())
    assert own == model.config.num_params() - build().config.num_params()
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()


def test_without_value_labels_everything_is_the_base_model(build, headed):
    base = build()
    base.load_state_dict({n: x for n, x in headed.state_dict().items() if not n.startswith("value_head.")})
    ours, theirs = (model(input_ids=IDS, labels=LABELS) for model in (headed, base))
    assert torch.equal(ours.loss, theirs.loss) and theirs.component_sums is None
    assert torch.equal(headed(input_ids=IDS).logits, base(input_ids=IDS).logits)
    for model, output in ((headed, ours), (base, theirs)):
        output.loss.backward()
        model.grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(grad, headed.grads[name]) for name, grad in base.grads.items())
    # The head still takes part in the backward pass, which ZeRO reduces on every rank.
    assert not headed.value_head.in_proj.weight.grad.any()


def test_the_loss_is_the_cross_entropy_at_labelled_places(headed):
    values_BS = headed(input_ids=IDS, output_values=True).step_values
    labelled = VALUES != NO_VALUE
    expected = F.binary_cross_entropy(values_BS[labelled], VALUES[labelled].float(), reduction="sum")
    with_values = headed(input_ids=IDS, labels=LABELS, value_labels=VALUES)
    added = with_values.loss - headed(input_ids=IDS, labels=LABELS).loss
    torch.testing.assert_close(added, 0.5 * expected / 3)
    loss_sum, count = with_values.component_sums["tree/value_loss"].tolist()
    assert (loss_sum, count) == (pytest.approx(expected.item()), 3)
    right = ((values_BS > 0.5) == (VALUES == 1))[labelled].sum()
    assert with_values.component_sums["tree/value_accuracy"].tolist() == [right, 3]
    assert torch.equal(with_values.loss_sum, headed(input_ids=IDS, labels=LABELS).loss_sum)


def test_gradients_do_not_depend_on_the_split(headed):
    def gradients(parts):
        headed.zero_grad()
        for part in parts:
            batch = {"input_ids": IDS[part], "labels": LABELS[part], "value_labels": VALUES[part]}
            headed(**batch, num_targets=8, num_tokens=12, num_value_labels=3).loss.backward()
        return [p.grad.clone() for p in headed.value_head.parameters()]

    whole, split = gradients([slice(0, 2)]), gradients([slice(0, 1), slice(1, 2)])
    assert all(grad.any() for grad in whole)
    torch.testing.assert_close(whole, split)


def test_values_reach_the_layers_below(headed):
    headed(
        input_ids=IDS, labels=torch.full_like(IDS, -100), value_labels=VALUES, num_tokens=10**9
    ).loss.backward()
    assert headed.model.layers[0].self_attn.q_proj.weight.grad.norm() > 1e-4


def test_a_base_checkpoint_gets_a_new_head_and_a_head_is_left_behind(build, headed, tmp_path):
    from safetensors.torch import save_file

    for name, model in (("base", build()), ("headed", headed)):
        (tmp_path / name).mkdir()
        state = {key: x for key, x in model.state_dict().items() if key != "lm_head.weight"}
        save_file(state, tmp_path / name / "model.safetensors")
    upward, downward = build(tree=tree()), build()
    fill(upward, directory_weights(tmp_path / "base", initial_weights(0, 0.02)))
    assert upward.value_head.in_proj.weight.any() and not upward.value_head.out_proj.weight.any()
    assert torch.equal(upward(input_ids=IDS).logits, build()(input_ids=IDS).logits)
    fill(downward, directory_weights(tmp_path / "headed"))
    assert torch.equal(downward(input_ids=IDS).logits, headed(input_ids=IDS).logits)


def test_an_exported_head_is_read_back(headed, tmp_path):
    """By `transformers` itself, whose initialisation must not undo what the file says."""
    from model import PragnosiaForCausalLM

    headed.save_pretrained(tmp_path)
    loaded = PragnosiaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.value_head.out_proj.weight, headed.value_head.out_proj.weight)
    assert loaded.config.tree == headed.config.tree


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"beam_width": 0}, "beam_width 0 .* at least 1"),
        ({"branching": 0}, "branching 0 .* at least 1"),
        ({"temperature": -1.0}, "temperature -1.0 must be at least 0"),
        ({"pruning_threshold": 1.5}, "pruning_threshold 1.5 between 0 and 1"),
        ({"path_score": "sum"}, "path_score 'sum' does not exist: use product, min, last"),
        ({"search": "mcts"}, "search 'mcts' does not exist: use bfs, dfs, best_of_n"),
    ],
)
def test_a_wrong_configuration_is_one_line(fields, line):
    with pytest.raises(ValueError, match=line):
        TreeConfig(hidden_size=32, **fields)


def test_the_configuration_is_part_of_the_model_s(tmp_path):
    config = PragnosiaConfig(tree=tree(beam_width=3))
    config.save_pretrained(tmp_path)
    found = TreeConfig(**PragnosiaConfig.from_pretrained(tmp_path).tree)
    assert (found.beam_width, found.branching) == (3, 6)
    assert math.isclose(found.value_loss_weight, 0.5)
