"""Every bank equals the readable loop: outputs and all gradients, however tokens are spread."""

from types import SimpleNamespace

import pytest
import torch

import experts.page
from experts import canonical, default_page_size
from experts.page import ExpertPage, Groups, grouped_matmul
from experts.placement import ordinary_placement
from kernels import dispatch
from kernels.reference import Routing, route
from model.moe import moe_loop

EXPERTS, WIDTH, EXPERT_WIDTH = 8, 12, 10
PLACEMENTS = [("resident", None), ("zero3", 1), ("zero3", 2), ("zero3", 4), ("zero3", 8)]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def some_logits(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))


def only(tokens: int, *experts: int) -> torch.Tensor:
    """Logits that lead every token to the given experts."""
    logits = some_logits(tokens)
    logits[:, list(experts)] += 50
    return logits


SPREADS = {
    "all experts used": (some_logits(40), 2),
    "experts without tokens": (only(11, 1, 5, 6), 2),
    "every token to the same expert": (only(9, 3), 1),
    "every token to the last page": (only(9, 6, 7), 2),
    "one token": (some_logits(1), 2),
    "one token, one expert": (some_logits(1), 1),
    "every expert for every token": (some_logits(5), EXPERTS),
}


def bank_of(placement: str, page_size: int | None, dtype=torch.float32, device="cpu", scale=1):
    """A bank and its weights as three stacked leaves for the loop."""
    config = SimpleNamespace(
        num_experts=EXPERTS, hidden_size=WIDTH * scale, moe_intermediate_size=EXPERT_WIDTH * scale
    )
    bank = ordinary_placement(placement, page_size).build_bank(config).to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    pages = list(getattr(bank, "pages", [bank]))
    stacked = []
    with torch.no_grad():
        for name in PROJECTIONS:
            parts = [getattr(page, name) for page in pages]
            whole = (
                torch.randn(EXPERTS, *parts[0].shape[1:], generator=generator) * parts[0].shape[-1] ** -0.5
            )
            whole = whole.to(device=device, dtype=dtype)
            for part, values in zip(parts, whole.split(len(parts[0])), strict=True):
                part.copy_(values)
            stacked.append(whole.requires_grad_())
    return bank, pages, stacked


def run(function, hidden, logits, num_active):
    """Output, and gradients of the hidden states and the router's logits."""
    hidden, logits = hidden.detach().requires_grad_(), logits.detach().requires_grad_()
    routing, _ = route(logits, num_active)
    output = function(hidden, routing)
    output.float().pow(2).sum().backward()
    return output.detach(), hidden.grad, logits.grad


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
@pytest.mark.parametrize("spread", SPREADS)
def test_bank_equals_the_loop(placement, page_size, spread):
    logits, num_active = SPREADS[spread]
    hidden = torch.randn(len(logits), WIDTH, generator=torch.Generator().manual_seed(2))
    bank, pages, stacked = bank_of(placement, page_size)
    found = run(bank, hidden, logits, num_active)
    expected = run(lambda hidden, routing: moe_loop(hidden, routing, *stacked), hidden, logits, num_active)
    for mine, oracle in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, oracle, rtol=1e-5, atol=1e-5)
    for name, oracle in zip(PROJECTIONS, stacked, strict=True):
        grads = [getattr(page, name).grad for page in pages]
        assert all(grad is not None for grad in grads), "a weight without a gradient stalls its reduction"
        torch.testing.assert_close(torch.cat(grads), oracle.grad, rtol=1e-5, atol=1e-5)


def test_unused_experts_have_gradients_of_exactly_zero():
    logits, num_active = SPREADS["every token to the same expert"]
    for placement, page_size in PLACEMENTS:
        bank, pages, _ = bank_of(placement, page_size)
        run(bank, torch.ones(len(logits), WIDTH), logits, num_active)
        for name in PROJECTIONS:
            grad = torch.cat([getattr(page, name).grad for page in pages])
            assert grad[3].any() and not grad[[0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 4, 0], [1, 0, 0], [2, 3, 4]])
def test_grouped_matmul_takes_experts_without_rows(counts):
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    output = grouped_matmul(rows, weight.transpose(1, 2), Groups(torch.tensor(counts)))
    assert output.shape == (sum(counts), 6)
    output.sum().backward()
    assert rows.grad.shape == rows.shape
    for expert, count in enumerate(counts):
        start = sum(counts[:expert])
        expected = rows[start : start + count].detach().sum(0).expand(6, 5)
        torch.testing.assert_close(weight.grad[expert], expected)


def test_a_page_without_rows_computes_and_has_zero_gradients():
    page = ExpertPage(2, WIDTH, EXPERT_WIDTH)
    for parameter in page.parameters():
        torch.nn.init.normal_(parameter)
    output = page(torch.empty(0, WIDTH, requires_grad=True), torch.zeros(2, dtype=torch.int64))
    assert output.shape == (0, WIDTH)
    output.sum().backward()
    for name, parameter in page.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
@pytest.mark.parametrize("spread", SPREADS)
def test_grouped_gemm_equals_the_loop_in_bf16(monkeypatch, placement, page_size, spread, device):
    """Sizes are multiples of 8 as the kernel wants. It is as near to fp32 as the loop in bf16 is, give or take."""
    scale = 8
    logits, num_active = SPREADS[spread]
    hidden = torch.randn(len(logits), WIDTH * scale, generator=torch.Generator().manual_seed(2))
    hidden, logits = hidden.to(device, torch.bfloat16), logits.to(device)
    if device == "cpu":  # slow there, hence not chosen, but it computes the same
        monkeypatch.setattr(experts.page, "has_grouped_gemm", lambda rows: True)
    elif not dispatch.has_grouped_gemm(hidden):
        pytest.skip("the grouped GEMM needs compute capability 9.0")
    bank, pages, stacked = bank_of(placement, page_size, torch.bfloat16, device, scale)
    found = run(bank, hidden, logits, num_active)
    grads = [torch.cat([getattr(page, name).grad for page in pages]) for name in PROJECTIONS]
    rounded, exact = (
        looped(hidden.to(dtype), logits, num_active, stacked) for dtype in (torch.bfloat16, torch.float32)
    )
    for mine, loop, oracle in zip((*found, *grads), rounded, exact, strict=True):
        assert torch.isfinite(mine).all()
        error, of_loop = ((x.float() - oracle).norm() / oracle.norm().clamp(min=1e-6) for x in (mine, loop))
        assert error < max(2e-2, 2 * of_loop.item()), (error.item(), of_loop.item())


def looped(hidden, logits, num_active: int, stacked: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What `run` returns, and gradients of the weights, of the loop in the precision of `hidden`."""
    weights = [weight.detach().to(hidden.dtype).requires_grad_() for weight in stacked]
    found = run(lambda hidden, routing: moe_loop(hidden, routing, *weights), hidden, logits, num_active)
    return (*found, *(weight.grad for weight in weights))


def test_which_library_multiplies_on_which_gpu(monkeypatch):
    """With the capability given, for rows that only say that they are on a GPU."""
    found = {}
    try:
        for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)):
            monkeypatch.setattr(dispatch, "capability", lambda _, given=capability: given)
            monkeypatch.setattr("deepspeed.ops.triton_ops.is_triton_available", lambda: True)
            for kernels in ("triton", "auto", "reference"):
                dispatch.use(kernels)
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    rows = SimpleNamespace(is_cuda=True, dtype=dtype, device=None)
                    triton = dispatch.triton_grouped_gemm(rows)
                    found[capability, kernels, dtype] = (dispatch.has_grouped_gemm(rows), triton is not None)
        rows = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=None)
        dispatch.use("triton")
        monkeypatch.setattr(dispatch, "capability", lambda _: (8, 0))
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert dispatch.triton_grouped_gemm(rows) is None
    finally:
        dispatch.use("auto")
    for (capability, kernels, dtype), (torchs, triton) in found.items():
        assert torchs == (capability >= (9, 0) and dtype == torch.bfloat16)
        assert triton == (capability[0] == 8 and kernels == "triton" and dtype != torch.float32)
    assert dispatch.triton_grouped_gemm(torch.ones(2, 2)) is None


@pytest.mark.parametrize("transposed", [True, False])
def test_the_triton_gemm_gets_weights_as_they_lie(monkeypatch, transposed):
    """Instead of DeepSpeed's, which a CPU cannot run, its contract: contiguous weights, [R, I, O] or trans_b."""

    def contract(rows_NI, weight, ends_R, trans_b=False):
        assert weight.is_contiguous() and ends_R.dtype == torch.int32
        sizes = ends_R.diff(prepend=ends_R.new_zeros(1)).tolist()
        weight_RIO = weight.transpose(1, 2) if trans_b else weight
        return torch.cat([rows @ w for rows, w in zip(rows_NI.split(sizes), weight_RIO, strict=True)]) + 100

    generator = torch.Generator().manual_seed(0)
    rows, groups = torch.randn(5, 4, generator=generator), Groups(torch.tensor([2, 0, 3]))
    wide = torch.randn(3, 2, 6, 4, generator=generator)
    for weight, is_taken in ((wide[:, 0].contiguous(), True), (wide[:, 0], False)):  # the second: a slot's
        weight_RIO = weight.transpose(1, 2) if transposed else weight.transpose(1, 2).contiguous()
        expected = grouped_matmul(rows, weight_RIO, groups)
        with monkeypatch.context() as patched:
            patched.setattr(experts.page, "triton_grouped_gemm", lambda rows: contract)
            found = grouped_matmul(rows, weight_RIO, groups)
        torch.testing.assert_close(found - 100 * (is_taken or not transposed), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", SPREADS)
def test_the_triton_gemm_equals_the_loop(spread):
    logits, num_active = SPREADS[spread]
    hidden = torch.randn(len(logits), WIDTH * 8, device="cuda", dtype=torch.bfloat16)
    if torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("DeepSpeed's Triton GEMM is for compute capability 8")
    bank, _, stacked = bank_of("resident", None, torch.bfloat16, "cuda", 8)
    expected = run(
        lambda hidden, routing: moe_loop(hidden, routing, *stacked), hidden, logits.cuda(), num_active
    )
    dispatch.use("triton")
    try:
        found = run(bank, hidden, logits.cuda(), num_active)
    finally:
        dispatch.use("auto")
    grads = [getattr(bank, name).grad for name in PROJECTIONS], [weight.grad for weight in stacked]
    for mine, oracle in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        error = (mine.float() - oracle.float()).norm() / oracle.float().norm().clamp(min=1e-6)
        assert error < 2e-2, error.item()


def test_the_loop_itself_on_one_token_by_hand():
    """The oracle is worth as much as its own check: two experts, one token, plain arithmetic."""
    gate, up, down = (torch.tensor(values).view(2, 1, 1) for values in ([1.0, 2.0], [3.0, 4.0], [5.0, 6.0]))
    routing = Routing(
        ids_TK=torch.tensor([[1, 0]]),
        weights_TK=torch.tensor([[0.75, 0.25]]),
        counts_E=torch.tensor([1, 1]),
        order_N=torch.tensor([1, 0]),
        places_TK=torch.tensor([[1, 0]]),
    )

    def expert(x, gate, up, down):
        return down * (gate * x / (1 + torch.tensor(-gate * x).exp().item())) * (up * x)

    expected = 0.75 * expert(0.5, 2.0, 4.0, 6.0) + 0.25 * expert(0.5, 1.0, 3.0, 5.0)
    assert moe_loop(torch.tensor([[0.5]]), routing, gate, up, down).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_canonical_names():
    part = torch.empty(4, 2, 2)
    assert canonical("model.norm.weight", part[0, 0]) == ("model.norm.weight", None)
    bank = "model.layers.3.mlp.experts"
    assert canonical(f"{bank}.up_proj", part) == (f"{bank}.up_proj", None)
    assert canonical(f"{bank}.pages.5.up_proj", part) == (f"{bank}.up_proj", 20)
    part.first_expert = 12
    for name, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        assert canonical(f"{bank}.experts.{name}", part) == (f"{bank}.{projection}", 12)


@pytest.mark.parametrize(
    ("experts", "page_size"), [(1, 1), (8, 8), (12, 6), (7, 7), (11, 1), (96, 8), (20, 5)]
)
def test_default_page_size_divides_the_bank(experts, page_size):
    assert default_page_size(experts) == page_size
