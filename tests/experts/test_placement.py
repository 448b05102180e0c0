"""What a run asks of any placement; experts that are parameters leave it all to DeepSpeed."""

import pytest

from experts.placement import ordinary_placement
from experts.resident import ResidentBank
from experts.zero3 import Zero3Bank
from model.presets import preset_config
from training.weights import initial_weights

CONFIG = preset_config("tiny", hidden_size=16, moe_intermediate_size=8)


@pytest.mark.parametrize(
    ("name", "page_size", "kind"), [("resident", None, ResidentBank), ("zero3", 4, Zero3Bank)]
)
def test_experts_that_are_parameters(tmp_path, name, page_size, kind):
    placement = ordinary_placement(name, page_size)
    bank = placement.build_bank(CONFIG)
    assert isinstance(bank, kind)
    assert sum(parameter.numel() for parameter in bank.parameters()) == 8 * CONFIG.expert_params()
    assert getattr(bank, "page_size", None) == page_size
    placement.fill(initial_weights(0, 0.02))
    placement.save(tmp_path)
    placement.load(tmp_path)
    assert not list(tmp_path.iterdir()) and not list(placement.tensors())
    assert placement.take_refused() == 0 and not placement.updating and not placement.groups


def test_other_names_are_a_mistake():
    with pytest.raises(AssertionError):
        ordinary_placement("streamed", 1)
    with pytest.raises(AssertionError):
        ordinary_placement("zero3", None)
