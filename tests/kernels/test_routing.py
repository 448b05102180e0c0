"""The routing kernels equal their plain PyTorch twin: in Triton's interpreter and on a GPU.

Run as a program with TRITON_INTERPRET=1 this file makes every check in the interpreter.
"""

import pytest
import torch
from torch.utils import deterministic

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from kernels import reference, routing  # noqa: E402
from tests.kernels.gpu_code import SHARED, assert_fits, interpreted, run_checks  # noqa: E402

SHAPES = [  # T, E, K
    (0, 8, 2), (1, 1, 1), (7, 4, 4), (17, 60, 8), (9, 128, 4), (257, 4, 2), (3, 40, 16),
]  # fmt: skip
SCORES = [
    {},
    {"renormalise": False},
    {"scores": "sigmoid", "scale": 2.5},
    {"scores": "sigmoid", "renormalise": False},
]
CHOICES = ("all", "valid", "pool", "pools", "bias")
INTEGERS = ("ids_TK", "counts_E", "order_N", "places_TK")


def limits(choice: str, tokens: int, experts: int, active: int) -> dict:
    """What `choice` adds to the arguments of `route`."""
    if choice == "valid":
        return {"valid_T": torch.rand(tokens) < 0.6}
    if choice == "bias":
        return {"bias_E": 0.3 * torch.randn(experts)}
    if choice in ("pool", "pools"):
        allowed = torch.rand(tokens + 1, experts).argsort(1) < min(active + 1, experts)
        return {"allowed": allowed[1:] if choice == "pools" else allowed[0]}
    return {}


def on(device: str, arguments: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def losses(result, weights_TK) -> torch.Tensor:
    """Something that depends on all that has a gradient."""
    routed, statistics = result
    return (routed.weights_TK * weights_TK).sum() + 0.3 * statistics.balance_sum - 0.1 * statistics.z_sum


def assert_equal_routes(logits_TE, active: int, arguments: dict, device: str) -> None:
    """Choices and places are equal to the twin's; the rest is as close to fp64 as the twin is, or within 2x."""
    grads_TK = torch.randn(len(logits_TE), active)
    found_TE = logits_TE.to(device, copy=True).requires_grad_()
    own_TE, exact_TE = (logits_TE.to(dtype, copy=True) for dtype in (logits_TE.dtype, torch.float64))
    results = []
    for function, logits, where in (
        (routing.route, found_TE, device),
        (reference.route, own_TE.requires_grad_(), "cpu"),
        (reference.route, exact_TE.requires_grad_(), "cpu"),
    ):
        result = function(logits, active, **on(where, arguments))
        losses(result, grads_TK.to(where)).backward()
        results.append(({**result[0]._asdict(), **result[1]._asdict(), "grad": logits.grad}, logits.dtype))
    (found, _), (twin, _), (exact, _) = results
    for name in INTEGERS:
        assert torch.equal(found[name].cpu(), twin[name]), name
        assert found[name].dtype == torch.int64
    for name in exact.keys() - {*INTEGERS}:
        assert found[name].dtype == twin[name].dtype and found[name].requires_grad == twin[name].requires_grad
        actual, same, best = found[name].detach().cpu().double(), twin[name].double(), exact[name]
        if not best.numel():
            continue
        error, allowance = (actual - best).abs().max(), (same - best).abs().max()
        rounding = 8 * torch.finfo(twin[name].dtype).eps * (1 + best.abs().max())
        assert error <= 2 * allowance + rounding, (name, error, allowance)


def check_equal_to_the_twin(device: str) -> None:
    torch.manual_seed(0)
    for number, (tokens, experts, active) in enumerate(SHAPES):
        for choice in CHOICES[number % 2 :: 2]:
            scores = SCORES[(number + CHOICES.index(choice)) % len(SCORES)]
            arguments = {**scores, **limits(choice, tokens, experts, active)}
            assert_equal_routes(torch.randn(tokens, experts), active, arguments, device)


def check_every_kind_of_score_and_choice(device: str) -> None:
    torch.manual_seed(1)
    for scores in SCORES:
        for choice in CHOICES:
            assert_equal_routes(torch.randn(33, 12), 3, {**scores, **limits(choice, 33, 12, 3)}, device)


def check_half_precision(device: str) -> None:
    torch.manual_seed(2)
    for dtype in (torch.float16, torch.bfloat16):
        if dtype == torch.float16 or device == "cuda":  # the interpreter has no bf16
            for choice in CHOICES:
                for number, scores in enumerate(SCORES):
                    logits_TE = 3 * torch.randn(33, (60, 24)[number % 2]).to(dtype)
                    arguments = {**scores, **limits(choice, *logits_TE.shape, 3)}
                    assert_equal_routes(logits_TE, 3, arguments, device)


def check_many_tokens_a_program(device: str) -> None:
    """Chunks of several tiles, the last chunk and the last tile not full."""
    torch.manual_seed(3)
    before, routing.PROGRAMS = routing.PROGRAMS, 2
    try:
        for tokens, experts, active in ((25, 128, 4), (300, 8, 2)):
            for choice in ("all", "valid"):
                arguments = limits(choice, tokens, experts, active)
                assert_equal_routes(torch.randn(tokens, experts), active, arguments, device)
    finally:
        routing.PROGRAMS = before


def narrow(device: str) -> tuple[torch.dtype, ...]:
    """Logits of 16 bits, which are chosen by other means than wider ones; the interpreter has no bf16."""
    return (torch.float16, torch.bfloat16) if device == "cuda" else (torch.float16,)


def check_ties_go_to_the_lowest_ids(device: str) -> None:
    torch.manual_seed(4)
    for dtype in (torch.float32, *narrow(device)):
        for logits_TE in (
            torch.zeros(9, 6),
            torch.randn(40, 9).round(),
            torch.tensor([[0.0, -0.0, 0.0, -0.0]]),
        ):
            assert_equal_routes(logits_TE.to(dtype), 3, {}, device)
    routed, _ = routing.route(torch.zeros(9, 6, device=device), 3)
    assert routed.ids_TK.tolist() == [[0, 1, 2]] * 9


def check_crowded_and_empty_experts(device: str) -> None:
    torch.manual_seed(5)
    logits_TE = torch.randn(130, 16)
    logits_TE[:, 5] += 100
    assert_equal_routes(logits_TE, 1, {}, device)
    assert_equal_routes(1e4 * torch.randn(65, 16), 3, {}, device)
    assert_equal_routes(torch.randn(20, 8), 2, {"valid_T": torch.zeros(20, dtype=torch.bool)}, device)


def check_allowed_experts_that_are_next_to_impossible(device: str) -> None:
    logits_TE = torch.tensor([[300.0, 1.0, 0.0, 2.0]])
    allowed = torch.tensor([False, True, True, True])
    for dtype in (torch.float32, *narrow(device)):
        assert_equal_routes(logits_TE.to(dtype), 2, {"allowed": allowed}, device)


def check_not_a_number_spoils_its_token_alone(device: str) -> None:
    torch.manual_seed(6)
    for dtype in (torch.float32, *narrow(device)):
        logits_TE = torch.randn(20, 7).to(dtype)
        logits_TE[3, 4] = logits_TE[5] = torch.nan
        logits_TE[7, 2] = -logits_TE[3, 4]  # with its sign set
        logits_TE[9, :5] = -torch.inf
        expected, _ = reference.route(logits_TE, 3)
        found, statistics = routing.route(logits_TE.to(device), 3)
        for name in INTEGERS:
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
        torch.testing.assert_close(found.weights_TK.cpu(), expected.weights_TK, equal_nan=True)
        assert found.weights_TK.isnan().any(1).nonzero().flatten().tolist() == [3, 5, 7]
        assert statistics.z_sum.isnan() and statistics.balance_sum.isnan()


def check_gradients_in_fp64(device: str) -> None:
    torch.manual_seed(7)
    for scores in SCORES:
        arguments = on(device, limits("valid", 5, 6, 2) | limits("bias", 5, 6, 2))

        def differentiable(logits_TE, arguments={**scores, **arguments}):  # noqa: B006
            routed, statistics = routing.route(logits_TE, 2, **arguments)
            return routed.weights_TK, statistics.balance_sum, statistics.z_sum

        logits_TE = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
        # In a random direction: each forward takes the interpreter a quarter of a second.
        assert torch.autograd.gradcheck(differentiable, logits_TE, fast_mode=True)


def check_each_gradient_alone(device: str) -> None:
    """A result that nothing depends on needs no gradient."""
    torch.manual_seed(8)
    logits_TE, valid_T = torch.randn(40, 6), torch.rand(40) < 0.5
    picks = (lambda r: r[0].weights_TK[:, 0].sum(), lambda r: r[1].balance_sum, lambda r: r[1].z_sum)
    for pick in picks:
        grads = []
        for module, where in ((reference, "cpu"), (routing, device)):
            logits = logits_TE.to(where, copy=True).requires_grad_()
            pick(module.route(logits, 2, valid_T=valid_T.to(where))).backward()
            grads.append(logits.grad.cpu())
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def check_everything_is_written(device: str) -> None:
    """Fresh memory is filled with NaN and the largest integers."""
    torch.manual_seed(9)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    try:
        assert torch.empty(3, device=device).isnan().all()
        for choice in ("valid", "pools"):
            assert_equal_routes(torch.randn(33, 60), 4, limits(choice, 33, 60, 4), device)
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before


def check_strided_inputs(device: str) -> None:
    torch.manual_seed(10)
    wide_TE, weights_TK = torch.randn(33, 16), torch.randn(3, 33).t()
    for module, where in ((reference, "cpu"), (routing, device)):
        logits_TE = wide_TE.to(where)[:, ::2].requires_grad_()
        result = module.route(logits_TE, 3, valid_T=(wide_TE[:, 0] > 0).to(where))
        (grad_TE,) = torch.autograd.grad(losses(result, weights_TK.to(where)), logits_TE)
        if module is reference:
            expected_TE = grad_TE
    torch.testing.assert_close(grad_TE.cpu(), expected_TE, rtol=1e-5, atol=1e-5)


def check_compiles_as_one_graph(device: str) -> None:
    torch.manual_seed(11)
    valid_T = (torch.rand(33) < 0.6).to(device)

    def objective(logits_TE):
        return losses(routing.route(logits_TE.sin(), 2, valid_T=valid_T), 1.0)

    backend = "inductor" if device == "cuda" else "aot_eager"
    grads = []
    for function in (objective, torch.compile(objective, fullgraph=True, backend=backend)):
        torch.manual_seed(11)
        logits_TE = torch.randn(33, 8).to(device).requires_grad_()
        function(logits_TE).backward()
        grads.append(logits_TE.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def check_the_registered_operations(device: str) -> None:
    logits_TE = torch.randn(9, 6, device=device, requires_grad=True)
    arguments = (logits_TE, 2, True, False, 1.0, None, None, None)
    # The rest of opcheck wants results that are all floats.
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(routing.route_op, arguments, test_utils=tests)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.slow
def test_interpreter():
    assert interpreted(__file__) == [check.__name__ for check in CHECKS]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 128, 256])
def test_200_repeats_are_equal_on_a_gpu(experts):
    torch.manual_seed(0)
    logits_TE = torch.randn(20_000, experts, device="cuda").bfloat16().requires_grad_()
    first = None
    for _ in range(200):
        routed, statistics = routing.route(logits_TE, 2)
        (grad_TE,) = torch.autograd.grad(losses((routed, statistics), 1.0), logits_TE)
        result = [*routed, *statistics, grad_TE]
        first = first or result
        assert all(torch.equal(old, new) for old, new in zip(first, result, strict=True))


@pytest.mark.gpu
def test_logits_beyond_2_to_31_on_a_gpu():
    tokens, experts = 2**21 + 5, 1024
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GB of free GPU memory")
    torch.manual_seed(0)
    logits_TE = torch.zeros(tokens, experts, dtype=torch.float16, device="cuda")
    logits_TE[-1000:] = torch.randn(1000, experts, device="cuda")
    logits_TE.requires_grad_()
    routed, statistics = routing.route(logits_TE, 2)
    losses((routed, statistics), 1.0).backward()
    last_TE = logits_TE.detach()[-1000:].requires_grad_()
    expected, _ = reference.route(last_TE, 2)
    assert torch.equal(routed.ids_TK[-1000:], expected.ids_TK)
    assert routed.ids_TK[:-1000].eq(torch.arange(2, device="cuda")).all()
    assert torch.equal(routed.order_N, routed.ids_TK.flatten().argsort(stable=True))
    assert torch.equal(routed.places_TK.flatten(), reference.inverse(routed.order_N))
    assert logits_TE.grad[-1000:].isfinite().all() and logits_TE.grad[-1].any()


@pytest.mark.gpu
def test_cuda_graph():
    torch.manual_seed(0)
    logits_TE = torch.randn(500, 32, device="cuda", requires_grad=True)

    def step():
        routed, statistics = routing.route(logits_TE, 4)
        return *routed, *statistics, *torch.autograd.grad(losses((routed, statistics), 1.0), logits_TE)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            logits_TE.normal_()
        graph.replay()
        assert all(torch.equal(old, new) for old, new in zip(captured, step(), strict=True))


REAL, INTEGER, BYTE = "*fp32", "*i64", "*u8"


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_compiles_for(capability, tmp_path):
    def fits(kernel, types, registers, launch=routing.LAUNCH):
        assert_fits(kernel, types, launch, capability, tmp_path, registers)

    # 16 bits, without a bias and with one, which are two ways to choose; fp32 logits are the easier ones.
    cases = (128, 8, "*bf16", False), (1024, 16, "*fp16", True)
    for experts, active, logits, limited in cases:
        block_T, block_E = routing.tile(experts)
        sizes = {"K": active, "BLOCK_T": block_T, "BLOCK_E": block_E, "BLOCK_K": active}
        kind = {"RENORMALISE": not limited, "SIGMOID": limited, "REAL": tl.float32, "scale": "fp32"}
        token = {"logits": logits, "ids": INTEGER, "weights": REAL, "lse_T": REAL, "load_E": REAL}
        mask = {"valid": BYTE, "allowed": BYTE, "bias": REAL, "load_PE": "*i32"}
        if not limited:
            mask = dict.fromkeys(mask)
        chunk = {"hist_PE": "*i32", "first_PE": "*i32", "probs_PE": REAL, "probs_E": REAL, "sums_3P": REAL}
        total = dict.fromkeys(("balance", "z", "entropy", "tokens"), REAL)
        places = {"counts_E": INTEGER, "order_N": INTEGER, "places_TK": INTEGER}
        grads = {"grad_weights": REAL, "grad_balance": REAL, "grad_z": REAL, "grad_logits": logits}
        types = {**sizes, **kind, **token, **mask, **chunk, **total, **places, **grads}
        fits(routing.forward_kernel, types, 168)
        block_T, _ = routing.tile(experts, routing.TILE // 4)
        fits(routing.backward_kernel, {**types, "BLOCK_T": block_T}, 255, routing.LAUNCH_BACKWARD)
        block_N = min(routing.PLACE_ROWS, routing.tile(experts, routing.PLACE_TILE)[0])
        fits(routing.place_kernel, {**types, "BLOCK_P": routing.PROGRAMS, "BLOCK_N": block_N}, 128)
    fits(routing.finalize_kernel, {**types, **routing.FINALIZE}, 128)


if __name__ == "__main__":
    run_checks(CHECKS)
