"""The Triton kernels equal their plain PyTorch twin to the bit: in Triton's interpreter and on a GPU.

Run as a program with TRITON_INTERPRET=1 this file compares every case in the interpreter.
"""

import pytest
import torch

triton = pytest.importorskip("triton")


from kernels import adamw_triton  # noqa: E402
from kernels.adamw import BLOCK, accumulate_rows_reference, update_rows_reference  # noqa: E402
from tests.kernels.gpu_code import SHARED, assert_fits, interpreted  # noqa: E402
from tests.kernels.test_adamw import (  # noqa: E402
    KINDS,
    SETTINGS,
    empty_rows,
    empty_state,
    heavy_tailed,
)

CASES = [(kind, stochastic) for kind in KINDS for stochastic in (False, True)]
ROWS, LENGTH, GAP = 3, 9 * BLOCK, 8  # two full tiles of four blocks and a rest


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def compare_update(kind: str, stochastic: bool, device: str) -> None:
    """Four steps with the twin on the CPU; one row rests in one step and its gradient is then NaN."""
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    start_RP, size_RP = torch.randn(ROWS, LENGTH), heavy_tailed(ROWS, LENGTH)
    size_RP[0, :BLOCK] = 0  # a block without gradient

    def operands(where):
        weight_RP = empty_rows(ROWS, LENGTH, dtype, GAP).copy_(start_RP)
        state = empty_state(kind, ROWS, LENGTH, GAP)
        if state.master_RP is not None:
            state.master_RP.copy_(start_RP)
        counts_R = torch.arange(ROWS, dtype=torch.int32)

        def place(x):  # `.to` would drop the space between rows
            return x if where == "cpu" or x is None else empty_rows(*x.shape, x.dtype, GAP).to(where).copy_(x)

        return place(weight_RP), type(state)(*map(place, state)), counts_R.to(where)

    expected, actual = operands("cpu"), operands(device)
    for step in range(4):
        grad_RP = (size_RP * torch.randn(ROWS, LENGTH)).to(dtype)
        factor_R = torch.tensor([0.5, float(step != 1), 2.0])
        grad_RP[factor_R == 0] = torch.nan
        for update, (weight, state, counts), where in (
            (update_rows_reference, expected, "cpu"),
            (adamw_triton.update_rows, actual, device),
        ):
            grad, factor = grad_RP.to(where), factor_R.to(where)
            update(weight, grad, state, counts, factor, SETTINGS, step - 2, stochastic)
        for old, new in zip(
            (expected[0], *expected[1], expected[2]), (actual[0], *actual[1], actual[2]), strict=True
        ):
            if old is not None:
                assert_same(new, old)


def compare_accumulate(device: str) -> None:
    torch.manual_seed(0)
    start_RP, grad_RP = torch.randn(ROWS, LENGTH).bfloat16(), torch.randn(ROWS, LENGTH)
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    grad_RP[1, 5], grad_RP[1, 6], grad_RP[2, 7] = nan, torch.inf, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        expected = start_RP.clone()
        actual = empty_rows(ROWS, LENGTH, torch.bfloat16, GAP).to(device)
        actual.copy_(start_RP)
        accumulate_rows_reference(expected, grad_RP.to(dtype), 5)
        adamw_triton.accumulate_rows(actual, grad_RP.to(dtype).to(device), 5)
        assert_same(actual, expected)
        assert actual[1, 5].isnan()


@pytest.mark.slow
def test_interpreter():
    assert interpreted(__file__) == ["compared", str(len(CASES))]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "stochastic"), CASES)
def test_update_on_a_gpu(kind, stochastic):
    compare_update(kind, stochastic, "cuda")


@pytest.mark.gpu
def test_accumulation_on_a_gpu():
    compare_accumulate("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_repeats_are_equal_on_a_gpu(kind):
    torch.manual_seed(0)
    start_RP = torch.randn(4, 64 * BLOCK, device="cuda").bfloat16()
    grad_RP, factor_R = torch.randn_like(start_RP), torch.ones(4, device="cuda")
    first = None
    for _ in range(50):
        weight_RP = start_RP.clone()
        cpu_state = empty_state(kind, 4, 64 * BLOCK)
        state = type(cpu_state)(*(None if x is None else x.cuda() for x in cpu_state))
        counts_R = torch.zeros(4, dtype=torch.int32, device="cuda")
        for seed in range(2):
            adamw_triton.update_rows(weight_RP, grad_RP, state, counts_R, factor_R, SETTINGS, seed, True)
        result = [x for x in (weight_RP, *state) if x is not None]
        first = first or result
        assert all(torch.equal(old, new) for old, new in zip(first, result, strict=True))


@pytest.mark.gpu
def test_rows_beyond_2_to_31_values_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 5 * 2**30:
        pytest.skip("needs 5 GB of free GPU memory")
    far_RP = torch.empty(2**31 + BLOCK, dtype=torch.bfloat16, device="cuda").as_strided(
        (2, BLOCK), (2**31, 1)
    )
    near_RP = torch.randn(2, BLOCK, device="cuda").bfloat16()
    far_RP.copy_(near_RP)
    for weight_RP in (far_RP, near_RP):
        state = empty_state("bf16", 2, BLOCK)
        state = type(state)(*(None if x is None else x.cuda() for x in state))
        ones_R, counts_R = torch.ones(2, device="cuda"), torch.zeros(2, dtype=torch.int32, device="cuda")
        grad_RP = torch.ones(2, BLOCK, device="cuda")
        adamw_triton.update_rows(weight_RP, grad_RP, state, counts_R, ones_R, SETTINGS, 0, True)
    assert torch.equal(far_RP, near_RP)


# Types of the pointers, by what is updated; a pointer that is not named is None.
POINTERS = {
    "fp32": {"weight": "*fp32", "grad": "*fp32", "exp_avg": "*fp32", "exp_avg_sq": "*fp32"},
    "bf16": {"weight": "*i16", "grad": "*i16", "exp_avg": "*i16", "exp_avg_sq": "*i16"},
    "master": {"weight": "*i16", "grad": "*i16", "exp_avg": "*i16", "exp_avg_sq": "*i16", "master": "*fp32"},
    "8bit": {
        "weight": "*i16", "grad": "*i16", "exp_avg": "*i8", "exp_avg_sq": "*u8",
        "exp_avg_scale": "*fp32", "exp_avg_sq_scale": "*fp32",
    },
    "accumulate": {"accumulator": "*i16", "grad": "*i16"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", POINTERS)
@pytest.mark.parametrize("capability", SHARED)
def test_compiles_for(capability, kind, tmp_path):
    kernel = adamw_triton.accumulate_kernel if kind == "accumulate" else adamw_triton.update_kernel
    types = {"exp_avg_scale": None, "exp_avg_sq_scale": None, "master": None, **POINTERS[kind]}
    types |= {"STOCHASTIC": True, **adamw_triton.TILE}
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_R")}
    types |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "decay"), "fp32")
    aligned = [name for name in kernel.arg_names if name.endswith("stride") or name == "P"]
    ptx = assert_fits(kernel, types, adamw_triton.LAUNCH, capability, tmp_path, 255, aligned)
    assert "ld.global.v4.b32" in ptx  # 16 bytes a thread at a time
    assert "fma" not in ptx and "sqrt.approx" not in ptx and "div.full" not in ptx  # rounds as the twin


if __name__ == "__main__":
    for case in CASES:
        compare_update(*case, "cpu")
    compare_accumulate("cpu")
    print("compared", len(CASES))
