"""Which implementation runs, why, and that it can be overruled."""

import copy

import pytest
import torch

from kernels import dispatch, reference
from model import PragnosiaForCausalLM
from model.presets import preset_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def auto():
    yield
    dispatch.use("auto")


def moved(logits_TE, hidden_TD):
    routing, statistics = dispatch.route(logits_TE, 2)
    rows_ND = dispatch.permute(hidden_TD, routing)
    summed_TD = dispatch.unpermute(rows_ND, routing.places_TK)
    return *routing, *statistics, rows_ND, dispatch.combine(rows_ND, routing), summed_TD


def test_plain_pytorch_on_a_cpu():
    reason = "kernels need an NVIDIA GPU of compute capability 7.5 or later"
    assert dispatch.obstacle(CPU, 8, 2, 64) == reason
    assert dispatch.describe(CPU, 8, 2, 64) == f"plain PyTorch ({reason})"
    assert dispatch.chosen(CPU, 8, 2, 64) == "reference"


@pytest.mark.parametrize("shape", [(8, 17, 64), (1025, 2, 64), (8, 2, 8193)])
def test_shapes_that_registers_do_not_hold(shape):
    assert "at most 16 of 1,024 experts" in dispatch.obstacle(torch.device("cuda"), *shape)


def test_what_is_asked_for():
    dispatch.use("reference")
    assert dispatch.describe(CPU, 8, 2, 64) == "plain PyTorch (kernels are not asked for)"
    dispatch.use("triton")
    with pytest.raises(ValueError, match="no Triton kernels: kernels need an NVIDIA GPU"):
        dispatch.route(torch.zeros(3, 4), 2)
    dispatch.use("auto")
    assert dispatch.chosen(CPU, 8, 2, 64) == "reference"


def test_operations_are_the_reference_on_a_cpu():
    torch.manual_seed(0)
    logits_TE, hidden_TD = torch.randn(9, 4), torch.randn(9, 16)
    routing, statistics = reference.route(logits_TE, 2)
    rows_ND = reference.permute(hidden_TD, routing)
    expected = *routing, *statistics, rows_ND, reference.combine(rows_ND, routing), 2 * hidden_TD
    for found, wanted in zip(moved(logits_TE, hidden_TD), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_graph_under_torch_compile():
    torch.manual_seed(0)
    inputs = torch.randn(9, 4), torch.randn(9, 16)
    compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*inputs), moved(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def check_forced_kernels(device: str) -> None:
    """The model's own operations, compiled and not, through the kernels: equal to the reference's."""
    torch.manual_seed(0)
    inputs = torch.randn(33, 6).to(device), torch.randn(33, 24).to(device)
    dispatch.use("reference")
    expected = moved(*inputs)
    dispatch.use("triton")
    assert dispatch.describe(inputs[0].device, 6, 2, 24) == "Triton kernels"
    with torch.profiler.profile() as profile:
        found = moved(*inputs)
    names = {event.key for event in profile.key_averages()}
    assert {"pragnosia::route", "pragnosia::permute", "pragnosia::gather"} <= names
    compiled = torch.compile(moved, fullgraph=True, backend="aot_eager")(*inputs)
    for actual in (found, compiled):
        for new, old in zip(actual, expected, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def check_model(device: str) -> None:
    """Outputs, statistics and gradients of a model with the kernels equal those with plain PyTorch."""
    for options in ({"router_bias": True}, {"routing": "step"}):
        config = preset_config("tiny", num_hidden_layers=2, vocab_size=64, **options)
        start = PragnosiaForCausalLM(config).to(device)
        torch.manual_seed(0)
        for counts in start.buffers():
            counts.random_(-100, 100)
        ids = torch.randint(1, 64, (2, 12)).to(device)
        documents = torch.tensor([[1] * 12, [1] * 4 + [2] * 6 + [0] * 2]).to(device)
        found = {}
        for kernels in ("reference", "triton"):
            dispatch.use(kernels)
            model = copy.deepcopy(start)  # which also counts the pools
            output = model(input_ids=ids, labels=ids, document_ids=documents)
            output.loss.backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            found[kernels] = {**{k: v.detach() for k, v in output.items()}, **grads}
        assert torch.equal(found["triton"]["load_LE"], found["reference"]["load_LE"])
        for name, expected in found["reference"].items():
            torch.testing.assert_close(found["triton"][name], expected, rtol=1e-4, atol=1e-5)


CHECKS = check_forced_kernels, check_model


@pytest.mark.slow
def test_interpreter():
    from tests.kernels.gpu_code import interpreted

    assert interpreted(__file__) == [check.__name__ for check in CHECKS]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
def test_kernels_are_found_best_on_a_gpu():
    device = torch.device("cuda", 0)
    assert dispatch.describe(device, 8, 2, 64) == "Triton kernels"
    routing, _ = dispatch.route(torch.randn(5, 40, device=device), 17)
    rows_ND = dispatch.permute(torch.randn(5, 8, device=device), routing)
    assert rows_ND.shape == (85, 8)


if __name__ == "__main__":
    from tests.kernels.gpu_code import run_checks

    run_checks(CHECKS)
