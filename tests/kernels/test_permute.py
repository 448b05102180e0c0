"""The kernels that move rows equal their plain PyTorch twins: in Triton's interpreter and on a GPU.

Run as a program with TRITON_INTERPRET=1 this file makes every check in the interpreter.
"""

import pytest
import torch
from torch.utils import deterministic

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kernels import permute, reference  # noqa: E402
from tests.kernels.gpu_code import SHARED, assert_fits, interpreted, run_checks  # noqa: E402

SHAPES = [  # T, E, K, D
    (0, 4, 2, 16), (1, 4, 1, 1), (7, 4, 4, 24), (9, 7, 2, 768), (33, 60, 8, 130), (8, 8, 2, 512),
    (5, 16, 16, 40), (2, 4, 2, 4000),
]  # fmt: skip


def routed(tokens: int, experts: int, active: int, device: str, dtype=torch.float32) -> reference.Routing:
    """A routing whose weights are a leaf."""
    routing, _ = reference.route(torch.randn(tokens, experts), active)
    routing = reference.Routing(*(tensor.to(device) for tensor in routing))
    return routing._replace(weights_TK=routing.weights_TK.to(dtype).requires_grad_())


def results(module, hidden_TD, rows_ND, routing, grad_ND, grad_TD) -> dict[str, torch.Tensor]:
    """All outputs and gradients, detached."""
    hidden_TD, rows_ND = hidden_TD.detach().requires_grad_(), rows_ND.detach().requires_grad_()
    weights_TK = routing.weights_TK.detach().requires_grad_()
    routing = routing._replace(weights_TK=weights_TK)
    permuted_ND = module.permute(hidden_TD, routing)
    combined_TD = module.combine(rows_ND, routing)
    summed_TD = module.unpermute(rows_ND, routing.places_TK)
    (grad_hidden_TD,) = torch.autograd.grad(permuted_ND, hidden_TD, grad_ND)
    grad_rows_ND, grad_weights_TK = torch.autograd.grad(combined_TD, (rows_ND, weights_TK), grad_TD)
    (grad_summed_ND,) = torch.autograd.grad(summed_TD, rows_ND, grad_TD)
    values = {key: value.detach() for key, value in locals().items() if key.endswith(("_TD", "_ND", "_TK"))}
    return {key: values[key] for key in values if key not in ("hidden_TD", "rows_ND", "weights_TK")}


def assert_equal_moves(tokens, experts, active, width, dtype, device) -> None:
    """Copies are equal to the twin's; sums as close to fp64 as the twin's, or within 2x."""
    routing = routed(tokens, experts, active, "cpu")
    shapes = (tokens, width), (tokens * active, width), (tokens * active, width), (tokens, width)
    hidden_TD, rows_ND, grad_ND, grad_TD = (torch.randn(shape).to(dtype) for shape in shapes)

    def run(module, where, dtype):
        weights_TK = routing.weights_TK.to(torch.promote_types(dtype, torch.float32))
        own = reference.Routing(*(x.to(where) for x in routing._replace(weights_TK=weights_TK)))
        tensors = (x.to(where, dtype) for x in (hidden_TD, rows_ND, grad_ND, grad_TD))
        hidden, rows, *grads = tensors
        return {key: value.cpu() for key, value in results(module, hidden, rows, own, *grads).items()}

    found, twin = run(permute, device, dtype), run(reference, device, dtype)
    exact = run(reference, "cpu", torch.float64)
    for name in ("permuted_ND", "grad_summed_ND"):
        assert torch.equal(found[name], twin[name]), name
    for name, best in exact.items():
        assert found[name].dtype == twin[name].dtype and found[name].shape == best.shape
        if best.numel():
            error, allowance = ((x[name].double() - best).abs().max() for x in (found, twin))
            rounding = 4 * torch.finfo(found[name].dtype).eps * best.abs().max()
            assert error <= 2 * allowance + rounding, (name, error, allowance)


def check_equal_to_the_twin(device: str) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        assert_equal_moves(*shape, torch.float32, device)


def check_half_precision(device: str) -> None:
    torch.manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.float16 or device == "cuda":  # the interpreter has no bf16
            assert_equal_moves(65, 7, 4, 96, dtype, device)


def check_sums_are_rounded_once(device: str) -> None:
    """1 + 2^-11 + 2^-11 is a number of fp16; added one by one in fp16 it stays 1."""
    rows_ND = torch.tensor([[1.0], [2**-11], [2**-11]], dtype=torch.float16, device=device)
    places_TK = torch.tensor([[0, 1, 2]], device=device)
    assert permute.gather_op(rows_ND, places_TK, None).item() == 1 + 2**-10


def check_gradients_in_fp64(device: str) -> None:
    torch.manual_seed(2)
    routing = routed(3, 4, 2, device, torch.float64)
    hidden_TD = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    rows_ND = torch.randn(6, 2, dtype=torch.float64, device=device, requires_grad=True)

    def combined(rows, weights):
        return permute.combine(rows, routing._replace(weights_TK=weights))

    assert torch.autograd.gradcheck(lambda hidden: permute.permute(hidden, routing), (hidden_TD,))
    assert torch.autograd.gradcheck(lambda rows: permute.unpermute(rows, routing.places_TK), (rows_ND,))
    assert torch.autograd.gradcheck(combined, (rows_ND, routing.weights_TK))


def check_everything_is_written(device: str) -> None:
    """Fresh memory is filled with NaN."""
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert_equal_moves(65, 7, 4, 200, torch.float32, device)
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before


def check_strided_inputs(device: str) -> None:
    torch.manual_seed(4)
    routing = routed(9, 4, 2, device)
    routing = routing._replace(weights_TK=torch.rand(2, 9).to(device).t())
    hidden_TD, rows_ND = torch.randn(9, 32).to(device)[:, ::2], torch.randn(16, 18).to(device).t()
    grads = torch.ones(1, device=device).expand(18, 16), torch.randn(16, 9).to(device).t()
    found, twin = (results(module, hidden_TD, rows_ND, routing, *grads) for module in (permute, reference))
    for name, expected in twin.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)


def check_compiles_as_one_graph(device: str) -> None:
    torch.manual_seed(5)
    routing = routed(9, 4, 2, device)

    def objective(hidden_TD):
        rows_ND = permute.permute(hidden_TD, routing).sin()
        summed_TD = permute.combine(rows_ND, routing) + permute.unpermute(rows_ND, routing.places_TK)
        return summed_TD.square().sum()

    backend = "inductor" if device == "cuda" else "aot_eager"
    hidden_TD = torch.randn(9, 16).to(device).requires_grad_()
    inputs = hidden_TD, routing.weights_TK
    expected = torch.autograd.grad(objective(hidden_TD), inputs)
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    for old, new in zip(expected, torch.autograd.grad(compiled(hidden_TD), inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def check_the_registered_operations(device: str) -> None:
    routing = routed(9, 4, 2, device)
    hidden_TD, rows_ND = (torch.randn(n, 8, device=device, requires_grad=True) for n in (9, 18))
    torch.library.opcheck(permute.permute_op, (hidden_TD, routing.places_TK))
    for weights_TK in (None, routing.weights_TK):
        torch.library.opcheck(permute.gather_op, (rows_ND, routing.places_TK, weights_TK))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.slow
def test_interpreter():
    assert interpreted(__file__) == [check.__name__ for check in CHECKS]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [512, 768, 4096])
def test_200_repeats_are_equal_on_a_gpu(width):
    torch.manual_seed(0)
    routing = routed(3000, 16, 8, "cuda")
    tensors = [torch.randn(n, width, device="cuda").bfloat16() for n in (3000, 24_000, 24_000, 3000)]
    first = None
    for _ in range(200):
        found = results(permute, *tensors[:2], routing, *tensors[2:])
        first = first or found
        assert all(torch.equal(first[name], found[name]) for name in first)


@pytest.mark.gpu
def test_rows_beyond_2_to_31_values_on_a_gpu():
    tokens, width = 2**18 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    torch.manual_seed(0)
    routing = routed(tokens, 4, 2, "cuda")
    hidden_TD = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    rows_ND = permute.permute(hidden_TD, routing)
    combined_TD = permute.combine(rows_ND, routing)
    for n in (0, 2**19, 2 * tokens - 1):
        assert torch.equal(rows_ND[n], hidden_TD[routing.order_N[n] // 2])
    # The weights of a token sum to 1.
    torch.testing.assert_close(combined_TD, hidden_TD, rtol=1e-2, atol=1e-2)
    combined_TD.backward(torch.ones_like(combined_TD))
    torch.testing.assert_close(hidden_TD.grad, torch.ones_like(hidden_TD), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    routing = routed(500, 32, 4, "cuda")
    tensors = [torch.randn(n, 768, device="cuda") for n in (500, 2000, 2000, 500)]

    def step():
        return results(permute, *tensors[:2], routing, *tensors[2:])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        for tensor in tensors:
            tensor.normal_()
        graph.replay()
        found = step()
        assert all(torch.equal(captured[name], found[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_compiles_for(capability, tmp_path):
    """What needs most on every kind of GPU, the rest on the oldest."""
    places, oldest = {"places": "*i64"}, capability == min(SHARED)
    cases = (8192, 16, "*fp32"), (512, 2, "*fp16"), (2048, 8, "*bf16")
    for width, active, dtype in cases if oldest else cases[:1]:
        sizes = {"K": active, "REAL": tl.float32, **places}
        plain = dict.fromkeys(("rows", "weights", "grad_weights"))
        weighted = {"rows": dtype, "weights": "*fp32", "grad_weights": "*fp32"}
        for types in (weighted, plain) if oldest else (weighted,):
            types = {**sizes, "x": dtype, "out": dtype, **types}
            launch, shape = permute.spread_tile(width)
            assert_fits(permute.spread_kernel, types | shape, launch, capability, tmp_path, 64)
            launch, shape = permute.gather_tile(width, active)
            types |= {**shape, "rows": dtype}
            assert_fits(permute.gather_kernel, types, launch, capability, tmp_path, 128)


if __name__ == "__main__":
    run_checks(CHECKS)
