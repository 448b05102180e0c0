"""The Triton kernels equal their plain PyTorch twin to the bit: in Triton's interpreter and on a GPU.

Run as a program with TRITON_INTERPRET=1 this file compares every case in the interpreter.
"""

import pytest
import torch

triton = pytest.importorskip("triton")


from kernels import adamw_triton  # noqa: E402
from kernels.adamw import BLOCK, accumulate_rows, update_rows  # noqa: E402
from tests.kernels.gpu_code import SHARED, assert_fits, interpreted  # noqa: E402
from tests.kernels.test_adamw import (  # noqa: E402
    KINDS,
    SETTINGS,
    heavy_tailed,
    rows_from,
)

ROWS, LENGTH = 3, 9 * BLOCK  # two full tiles of four blocks and a rest


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def compare_update(kind: str, device: str) -> None:
    """Four steps with the twin on the CPU; one row rests in one step and its gradient is then NaN."""
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    start_RP, size_RP = torch.randn(ROWS, LENGTH), heavy_tailed(ROWS, LENGTH)
    size_RP[0, :BLOCK] = 0  # a block without gradient

    expected = rows_from(start_RP.to(dtype), kind)
    expected["updates"].copy_(torch.arange(ROWS)[:, None])
    actual = {name: array.to(device, copy=True) for name, array in expected.items()}
    for step in range(4):
        grad_RP = (size_RP * torch.randn(ROWS, LENGTH)).to(dtype)
        factor_R = torch.tensor([0.5, float(step != 1), 2.0])
        grad_RP[factor_R == 0] = torch.nan
        update_rows(expected, grad_RP, factor_R, SETTINGS, step - 2)
        adamw_triton.update_rows(actual, grad_RP.to(device), factor_R.to(device), SETTINGS, step - 2)
        for name, array in expected.items():
            assert_same(actual[name], array)


def compare_accumulate(device: str) -> None:
    torch.manual_seed(0)
    start_RP, grad_RP = torch.randn(ROWS, LENGTH).bfloat16(), torch.randn(ROWS, LENGTH)
    nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    grad_RP[1, 5], grad_RP[1, 6], grad_RP[2, 7] = nan, torch.inf, -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        expected = start_RP.clone()
        actual = start_RP.to(device, copy=True)
        accumulate_rows(expected, grad_RP.to(dtype), 5)
        adamw_triton.accumulate_rows(actual, grad_RP.to(dtype).to(device), 5)
        assert_same(actual, expected)
        assert actual[1, 5].isnan()


@pytest.mark.slow
def test_interpreter():
    assert interpreted(__file__) == ["compared", str(len(KINDS))]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_update_on_a_gpu(kind):
    compare_update(kind, "cuda")


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
        rows = {name: array.cuda() for name, array in rows_from(start_RP.cpu(), kind).items()}
        for seed in range(2):
            adamw_triton.update_rows(rows, grad_RP, factor_R, SETTINGS, seed)
        first = first or rows
        assert all(torch.equal(first[name], array) for name, array in rows.items())


@pytest.mark.gpu
def test_rows_beyond_2_to_31_values_on_a_gpu():
    """The last of so many short rows as the last of as many that are shorter: bits hang on (seed, row, place)."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GB of free GPU memory")
    rows, start = 2**16 - 1, torch.randn(BLOCK, device="cuda")
    factor_R = torch.zeros(rows, device="cuda")
    factor_R[-1] = 1
    ends = []
    for length in (BLOCK, 129 * BLOCK):
        kept = {"updates": torch.zeros(rows, 1, dtype=torch.int32, device="cuda")}
        for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
            kept[name] = torch.zeros(rows, length, dtype=dtype, device="cuda")
            kept[f"{name}_scale"] = torch.zeros(rows, length // BLOCK, device="cuda")
        kept["weight"], grad_RP = torch.zeros(2, rows, length, dtype=torch.bfloat16, device="cuda")
        kept["weight"][-1, :BLOCK] = grad_RP[-1, :BLOCK] = start
        update_rows(kept, grad_RP, factor_R, SETTINGS, 0)
        accumulate_rows(grad_RP, kept["weight"], 0)
        arrays = (grad_RP, *kept.values())
        assert not any(array[:-1].any() for array in arrays)
        ends.append([array[-1, :BLOCK] if array.shape[1] == length else array[-1, :1] for array in arrays])
    assert grad_RP.numel() > 2**31 and not torch.equal(kept["weight"][-1, :BLOCK], start.bfloat16())
    assert all(torch.equal(short, long) for short, long in zip(*ends, strict=True))


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
    types |= adamw_triton.TILE
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_R")}
    types |= dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps", "decay"), "fp32")
    aligned = [name for name in kernel.arg_names if name == "P"]
    ptx = assert_fits(kernel, types, adamw_triton.LAUNCH, capability, tmp_path, 255, aligned)
    assert "ld.global.v4.b32" in ptx  # 16 bytes a thread at a time
    assert "fma" not in ptx and "sqrt.approx" not in ptx and "div.full" not in ptx  # rounds as the twin


if __name__ == "__main__":
    for kind in KINDS:
        compare_update(kind, "cpu")
    compare_accumulate("cpu")
    print("compared", len(KINDS))
