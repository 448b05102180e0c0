"""The optimizer over rows: torch's AdamW where numbers are exact, unbiased and bounded where they are rounded."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.adamw import (
    BLOCK,
    AdamW,
    accumulate_rows,
    clip_factors,
    decode,
    encode_exp_avg,
    encode_exp_avg_sq,
    random_bits,
    round_to_bfloat16,
    sum_of_squares,
    update_rows,
)

settings.register_profile("adamw", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("adamw")

SETTINGS = AdamW(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
KINDS = ("fp32", "bf16", "8bit", "master")


def empty_rows(rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [rows, length] in a buffer of sevens, `BLOCK` of them before and after."""
    buffer = torch.full((2 * BLOCK + rows * length,), 7, dtype=dtype)
    return buffer[BLOCK : BLOCK + rows * length].zero_().view(rows, length)


def rows_from(weight_RP: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    """What is kept of rows, before their first update."""

    def zeros(dtype, values=weight_RP.shape[1]):
        return empty_rows(len(weight_RP), values, dtype)

    rows = {"weight": zeros(weight_RP.dtype).copy_(weight_RP), "updates": zeros(torch.int32, 1)}
    if kind == "8bit":
        rows |= {"exp_avg": zeros(torch.int8), "exp_avg_sq": zeros(torch.uint8)}
        scales = weight_RP.shape[1] // BLOCK
        return rows | {f"exp_avg{n}_scale": zeros(torch.float32, scales) for n in ("", "_sq")}
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    rows |= {"exp_avg": zeros(dtype), "exp_avg_sq": zeros(dtype)}
    return rows | ({"master": zeros(torch.float32).copy_(weight_RP)} if kind == "master" else {})


def heavy_tailed(rows: int, length: int, sigma: float = 1.15) -> torch.Tensor:
    """Sizes of gradients, three decades between the smallest and the largest of a few thousand."""
    return torch.randn(rows, length).mul(sigma).exp()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_equals_torch_where_rows_skip_steps(beta2):
    torch.manual_seed(0)
    rules = SETTINGS._replace(beta2=beta2)
    rows = rows_from(torch.randn(4, 2 * BLOCK), "fp32")
    expected = [torch.nn.Parameter(row.clone()) for row in rows["weight"]]
    optimizer = torch.optim.AdamW(
        expected, lr=rules.lr, betas=rules[1:3], eps=rules.eps, weight_decay=rules.weight_decay, foreach=False
    )
    for step in range(5):
        grad_RP = heavy_tailed(4, 2 * BLOCK) * torch.randn(4, 2 * BLOCK)
        factor_R = torch.tensor([1.0, 0.5 * (step != 1), 2.0 * (step > 2), 0.0])
        for row, parameter in enumerate(expected):
            parameter.grad = grad_RP[row] * factor_R[row] if factor_R[row] else None
        optimizer.step()
        update_rows(rows, grad_RP, factor_R, rules, step)
    torch.testing.assert_close(rows["weight"], torch.stack(list(expected)).detach(), rtol=1e-6, atol=1e-7)
    assert rows["updates"].flatten().tolist() == [5, 4, 2, 0]


@st.composite
def cases(draw):
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "shape": (rows, blocks * BLOCK),
        "grad_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "size": draw(st.sampled_from([0.0, 1e-44, 1e-20, 1e-6, 1.0, 1e12])),
        "skipped": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
        "seed": draw(st.integers(-(2**70), 2**70)),
    }


@given(cases())
def test_any_rows(case):
    """Skipped rows and what lies around the rows keep their bits, and nothing explodes."""
    count, length = case["shape"]
    torch.manual_seed(case["seed"] % 2**32)
    skipped_R = torch.tensor(case["skipped"])
    start_RP, grad_RP = torch.randn(count, length), torch.randn(count, length) * case["size"]
    grad_RP[skipped_R, ::2] = torch.nan
    dtype = torch.float32 if case["kind"] == "fp32" else torch.bfloat16

    rows = rows_from(start_RP.to(dtype), case["kind"])
    grads_RP = grad_RP.to(case["grad_dtype"])
    for factor_R in (torch.ones(count), (~skipped_R).float()):  # the first call makes a state to be kept
        before = [array.clone() for array in rows.values()]
        grads = grads_RP.nan_to_num(0.0) if factor_R.all() else grads_RP
        update_rows(rows, grads, factor_R, SETTINGS, case["seed"])
    for old, new in zip(before, rows.values(), strict=True):
        assert torch.equal(old[skipped_R], new[skipped_R])
        assert new.isfinite().all()
        sevens = [new.as_strided((BLOCK,), (1,), start) for start in (0, BLOCK + new.numel())]
        assert (torch.cat(sevens) == 7).all()
    assert rows["updates"].flatten().tolist() == [1 if skip else 2 for skip in case["skipped"]]
    moved = (rows["weight"].float() - start_RP.to(dtype).float()).abs()
    assert (moved <= 2.5 * SETTINGS.lr + 0.02 * start_RP.abs()).all()  # a step of Adam is near lr


@pytest.mark.parametrize("length", [BLOCK, BLOCK // 2])
def test_rows_that_are_apart_or_end_in_a_block_are_refused(length):
    wrong_RP = torch.zeros(2, 2 * BLOCK)[:, :length]
    rows = rows_from(wrong_RP, "fp32")
    with pytest.raises(AssertionError):
        update_rows(rows, wrong_RP, torch.ones(2), SETTINGS, 0)
    with pytest.raises(AssertionError):
        update_rows(rows | {"weight": wrong_RP}, wrong_RP.clone(), torch.ones(2), SETTINGS, 0)
    with pytest.raises(AssertionError):
        accumulate_rows(wrong_RP, wrong_RP, 0)


def test_stochastic_rounding_is_unbiased():
    values_P = torch.tensor([1 + 2**-10, -1 - 2**-9, 3e-20, 1e30, 2**-133 * 1.37]).repeat(40_000)
    rounded_P = round_to_bfloat16(values_P, random_bits(1, torch.arange(1), len(values_P))[0])
    assert torch.equal(rounded_P, rounded_P.bfloat16().float())
    for value, rounded in zip(values_P[:5].double(), rounded_P.view(-1, 5).double().T, strict=True):
        low, high = rounded.min(), rounded.max()
        assert low < value < high  # both neighbours, and no others
        assert len(rounded.unique()) == 2
        error = (value - low) * (high - value) / len(rounded)  # variance of the mean
        assert (rounded.mean() - value).abs() < 4 * error.sqrt()


def test_rounding_keeps_what_bfloat16_holds():
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max, 1e-40]
    values_P = torch.cat([torch.randn(1000), torch.tensor(special)]).bfloat16().float()
    bits_P = random_bits(1, torch.arange(1), len(values_P))[0]
    assert torch.equal(round_to_bfloat16(values_P, bits_P).view(torch.int32), values_P.view(torch.int32))
    nan_P = torch.full((1000,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a GPU's NaN
    assert round_to_bfloat16(nan_P, bits_P[:1000]).isnan().all()


def test_random_bits_are_fair_and_unrelated():
    places = torch.arange(32, dtype=torch.int32)
    streams = torch.cat([random_bits(seed, torch.arange(4), 2**14) for seed in (0, 1, -1, 2**32, 2**63 + 1)])
    assert len(streams.unique()) > 0.99995 * streams.numel()
    coins = ((streams[:, :, None] >> places) & 1).double() * 2 - 1  # [20, 2^14, 32] of ±1
    limit = 5.5 / 2**7  # standard errors of a mean of 2^14
    assert coins.mean(1).abs().max() < limit
    for lag in (0, 1, 256):  # row against row, and against its own later places
        first, second = coins[:, : 2**14 - 256, 0], coins[:, lag : 2**14 - 256 + lag, 0]
        related = first @ second.T / first.shape[1]
        assert (related - torch.eye(20) * (lag == 0)).abs().max() < limit
    across = coins[0].T @ coins[0] / 2**14  # bit against bit
    assert (across - torch.eye(32)).abs().max() < limit


def dice(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return random_bits(seed, torch.arange(rows), length) & 0xFFFF


def test_mean_of_8_bit_exp_avg_is_exact():
    torch.manual_seed(0)
    value_P = heavy_tailed(1, BLOCK) * torch.randn(1, BLOCK)
    decoded = decode(*encode_exp_avg(value_P.expand(4000, BLOCK), dice(4000, BLOCK))).double()
    error = decoded.std(0) / 4000**0.5
    assert ((decoded.mean(0) - value_P[0]).abs() <= 4.5 * error + 1e-5 * value_P[0].abs()).all()


@given(st.sampled_from([0.0, 1e-10, 1.0, 1e15]), st.floats(0, 3), st.integers(0, 2**31))
def test_codes_are_bounded(size, sigma, seed):
    torch.manual_seed(seed)
    value_RP = heavy_tailed(2, 3 * BLOCK, sigma) * torch.randn(2, 3 * BLOCK) * size
    value_RP[0, :BLOCK] = 0
    code_RP, scale_RL = encode_exp_avg(value_RP, dice(2, 3 * BLOCK, seed))
    decoded_RP = decode(code_RP, scale_RL)
    assert not decoded_RP[0, :BLOCK].any() and scale_RL[0, 0] == 0
    assert (decoded_RP * value_RP >= 0).all()
    root_RP, scale_RP = value_RP.abs() ** 0.25, scale_RL.repeat_interleave(BLOCK, 1)
    assert ((decoded_RP.abs() ** 0.25 - root_RP).abs() <= 1.001 * scale_RP).all()

    square_RP = value_RP.square().clamp(max=1e30)
    code_RP, scale_RL = encode_exp_avg_sq(square_RP, dice(2, 3 * BLOCK, seed))
    decoded_RP = decode(code_RP, scale_RL)
    assert torch.equal(code_RP > 0, square_RP > 0)
    scale_RP = scale_RL.repeat_interleave(BLOCK, 1)
    assert ((decoded_RP**0.125 - square_RP**0.125).abs() <= 1.001 * scale_RP).all()


def test_no_second_moment_above_zero_becomes_zero():
    value = torch.full((1, BLOCK), 1e-30)
    value[0, 0], value[0, 1] = 1.0, 0.0
    code, _ = encode_exp_avg_sq(value, torch.full((1, BLOCK), 2**15, dtype=torch.int32))
    assert code.tolist() == [[255, 0] + [1] * (BLOCK - 2)]


@pytest.mark.parametrize(("kind", "allowed"), [("bf16", 0.015), ("8bit", 0.12)])
def test_rounded_moments_give_nearly_the_same_updates(kind, allowed):
    """Root mean square error of an update against fp32 moments, and no update far above the largest of these."""
    torch.manual_seed(0)
    size_RP, drift_RP = heavy_tailed(4, 8 * BLOCK), 0.2 * torch.randn(4, 8 * BLOCK)
    rules = SETTINGS._replace(lr=1.0, weight_decay=0.0)
    exact, rounded = (rows_from(torch.zeros(4, 8 * BLOCK), k) for k in ("fp32", kind))
    error = norm = 0.0
    for step in range(60):
        grad_RP = size_RP * (drift_RP + torch.randn_like(size_RP))
        moved = []
        for rows in (exact, rounded):
            rows["weight"] = torch.zeros_like(size_RP)  # fp32 and from 0, so that it ends as the update
            update_rows(rows, grad_RP, torch.ones(4), rules, step)
            moved.append(rows["weight"])
        error += (moved[0] - moved[1]).square().sum()
        norm += moved[0].square().sum()
        assert moved[1].abs().max() < 2.5
    assert 1e-4 < (error / norm).sqrt() < allowed


def test_stochastic_bfloat16_moments_can_fall():
    """A beta2 of 0.999 takes off 0.1% a step; rounding to nearest would lose every one of these steps."""
    rules, zeros = SETTINGS._replace(beta2=0.999), torch.zeros(1, 16 * BLOCK)
    rows = rows_from(zeros, "bf16")
    rows["exp_avg_sq"].fill_(1.0)
    assert torch.equal((rows["exp_avg_sq"].float() * 0.999).bfloat16(), rows["exp_avg_sq"])
    for step in range(300):
        update_rows(rows, zeros, torch.ones(1), rules, step)
    assert rows["exp_avg_sq"].float().mean() == pytest.approx(0.999**300, rel=2e-3)


def test_small_updates_of_bfloat16_weights_add_up():
    """Steps of 1e-4 from 1.0, where bf16 has a spacing of 2^-8 below and 2^-7 above."""
    rules = AdamW(lr=1e-4, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0)
    grad = torch.ones(1, 16 * BLOCK)
    rows = rows_from(grad.bfloat16(), "fp32")
    for step in range(100):
        update_rows(rows, grad, torch.ones(1), rules, step)
    mean = rows["weight"].float().mean().item()
    assert mean == pytest.approx(0.99, abs=4 * (0.01 * 2**-8 / (16 * BLOCK)) ** 0.5)


def test_master_copy_is_exact_and_weights_its_nearest():
    torch.manual_seed(0)
    start_RP = torch.randn(2, BLOCK)
    rows, exact = rows_from(start_RP.bfloat16(), "master"), rows_from(start_RP, "bf16")
    rows["master"].copy_(start_RP)
    for step in range(3):
        grad_RP = torch.randn(2, BLOCK)
        for kept in (rows, exact):
            update_rows(kept, grad_RP, torch.ones(2), SETTINGS, step)
        assert torch.equal(rows["master"], exact["weight"])
        assert torch.equal(rows["weight"], exact["weight"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_that_of_torch_row_by_row(dtype):
    torch.manual_seed(0)
    grad_RP = (torch.randn(5, BLOCK) * torch.tensor([[1e-3], [0.05], [1.0], [1e4], [0.0]])).to(dtype)
    halves = [sum_of_squares(part) for part in (grad_RP[:, :100], grad_RP[:, 100:])]
    torch.testing.assert_close(halves[0] + halves[1], sum_of_squares(grad_RP))
    factor_R = clip_factors(sum_of_squares(grad_RP), 1.0, 0.25)
    assert factor_R.dtype == torch.float32
    for row in range(4):
        parameter = torch.nn.Parameter(torch.zeros(BLOCK))
        parameter.grad = grad_RP[row].float() * 0.25
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(grad_RP[row].float() * factor_R[row], parameter.grad)
    assert factor_R[4] == 0
    assert clip_factors(sum_of_squares(grad_RP), 0.0, 0.25).tolist() == [0.25] * 4 + [0.0]


def test_gradients_that_are_refused():
    grad_RP = torch.ones(5, BLOCK)
    grad_RP[0] = 1e15  # finite, as are its squares
    grad_RP[1, 3], grad_RP[2, 3], grad_RP[3, 3] = torch.nan, -torch.inf, 1e20  # 1e40 is beyond fp32
    squares_R = sum_of_squares(grad_RP)
    torch.testing.assert_close(clip_factors(squares_R, 2.0), torch.tensor([2 / 16e15, 0, 0, 0, 2 / 16]))
    assert clip_factors(squares_R, 0.0, 0.5).tolist() == [0.5, 0, 0, 0, 0.5]


def test_accumulation():
    fp32, stochastic = torch.ones(2, 16 * BLOCK), torch.ones(2, 16 * BLOCK).bfloat16()
    for seed in range(100):
        for accumulator in (fp32, stochastic):
            accumulate_rows(accumulator, torch.full_like(accumulator, 1e-4), seed)
    torch.testing.assert_close(fp32, torch.full_like(fp32, 1.01))
    assert stochastic.float().mean(1) == pytest.approx(
        [1.01, 1.01], abs=4 * (0.01 * 2**-7 / (16 * BLOCK)) ** 0.5
    )
    assert not torch.equal(stochastic[0], stochastic[1])
    accumulate_rows(stochastic, torch.full((2, 16 * BLOCK), torch.nan), 0)
    assert stochastic.isnan().all()


def test_a_cpu_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; from tests.kernels.test_adamw import *; test_accumulation()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
