"""ZeRO-3 can free a page only if autograd holds no view of it."""

import torch

from experts.zero3 import Zero3Bank
from kernels.reference import route
from model.presets import preset_config


def test_autograd_keeps_no_view_of_a_page():
    config = preset_config("tiny", hidden_size=16, moe_intermediate_size=8)
    bank = Zero3Bank(config, page_size=4)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    hidden_TD = torch.randn(12, 16, requires_grad=True)
    routing, _ = route(torch.randn(12, 8), 2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in bank.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output_TD = bank(hidden_TD, routing)
    assert kept and not weights & set(kept)
    output_TD.sum().backward()
    assert all(parameter.grad is not None for parameter in bank.parameters())
