"""`kernels/adamw.py` as Triton kernels: one pass over the operands, the same arithmetic and random bits.

bf16 is passed as int16 and converted by hand: exact to the bit everywhere, the interpreter of Triton included.
Products and sums are not fused and roots and quotients are rounded correctly, so that a CPU and a GPU agree.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw import BLOCK, AdamW, Rows, bias_corrections, fold

TILE = {"BLOCKS": 4, "BLOCK": BLOCK}  # of one program: a warp has one block, 8 values a thread
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
GOLDEN = tl.constexpr(0x9E3779B9)


def update_rows(rows: Rows, grad_RP: Tensor, factor_R: Tensor, rules: AdamW, seed: int) -> None:
    """`kernels.adamw.update_rows` on CUDA; no copy from or to the host, so it runs ahead and can be captured."""
    names = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "master")
    arrays = (rows["weight"], grad_RP, *map(rows.get, names))
    corrections, (lr, beta1, beta2, eps, weight_decay) = bias_corrections(rows["updates"], rules), rules
    rates = (beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay)
    launch(update_kernel, arrays, factor_R, *corrections, *rates, fold(seed))
    rows["updates"] += (factor_R > 0)[:, None]


def accumulate_rows(accumulator_RP: Tensor, grad_RP: Tensor, seed: int) -> None:
    """`kernels.adamw.accumulate_rows` with stochastic rounding to bf16, on CUDA."""
    launch(accumulate_kernel, (accumulator_RP, grad_RP), fold(seed))


def launch(kernel, arrays: tuple[Tensor | None, ...], *numbers: Tensor | float) -> None:
    """A program for each tile of each row. bf16 is passed as int16."""
    rows, length = arrays[0].shape
    arrays = (a.view(torch.int16) if a is not None and a.dtype == torch.bfloat16 else a for a in arrays)
    grid = triton.cdiv(length, TILE["BLOCKS"] * BLOCK), rows
    kernel[grid](*arrays, *numbers, length, **TILE, **LAUNCH)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    weight, grad, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, master,
    factor_R, step_R, inverse_root_R, beta1, rest1, beta2, rest2, eps, decay, seed, P,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates BLOCKS blocks of one row. rest is 1 − beta, decay 1 − lr · weight decay."""
    factor = tl.load(factor_R + tl.program_id(1))
    if not (factor > 0):
        return
    row, block, place, inside, bits = tile(seed, P, BLOCKS, BLOCK)
    moment_bits = mix(bits + GOLDEN)

    gradient = load(grad + place, inside) * factor
    m = load(exp_avg + place, inside)
    v = load(exp_avg_sq + place, inside)
    if exp_avg_scale is not None:
        in_row = block < P // BLOCK
        block += row * (P // BLOCK)
        fourth = fourth_power(m * tl.load(exp_avg_scale + block, in_row, 0.0)[:, None])
        m = tl.where(m < 0, -fourth, fourth)
        fourth = fourth_power(v * tl.load(exp_avg_sq_scale + block, in_row, 0.0)[:, None])
        v = fourth * fourth
    m = m * beta1 + gradient * rest1
    v = v * beta2 + gradient * gradient * rest2

    exact = weight if master is None else master
    denominator = tl.sqrt_rn(v) * tl.load(inverse_root_R + row) + eps
    value = load(exact + place, inside) * decay - tl.div_rn(m, denominator) * tl.load(step_R + row)
    store(weight + place, value, bits, inside, master is None)
    if master is not None:
        tl.store(master + place, value, inside)

    if exp_avg_scale is not None:
        root, scale = scaled(tl.sqrt_rn(tl.sqrt_rn(tl.abs(m))), 127.0)
        code = tl.floor(root)
        low = fourth_power(code)
        dice = (moment_bits & 0xFFFF).to(tl.float32) * (1 / 65536)
        up = dice * (fourth_power(code + 1) - low) < fourth_power(root) - low
        code = tl.minimum(code + up.to(tl.float32), 127.0)
        tl.store(exp_avg + place, tl.where(m < 0, -code, code).to(tl.int8), inside)
        tl.store(exp_avg_scale + block, scale, in_row)

        root, scale = scaled(tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(v))), 255.0)
        code = tl.minimum(tl.floor(root + (moment_bits >> 16).to(tl.float32) * (1 / 65536)), 255.0)
        code = tl.maximum(code, (v > 0).to(tl.float32))
        tl.store(exp_avg_sq + place, code.to(tl.uint8), inside)
        tl.store(exp_avg_sq_scale + block, scale, in_row)
    else:
        store(exp_avg + place, m, moment_bits, inside, True)
        store(exp_avg_sq + place, v, moment_bits >> 16, inside, True)


@triton.jit(do_not_specialize=["seed"])
def accumulate_kernel(accumulator, grad, seed, P, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One program adds BLOCKS blocks of one row."""
    _, _, place, inside, bits = tile(seed, P, BLOCKS, BLOCK)
    value = load(accumulator + place, inside) + load(grad + place, inside)
    store(accumulator + place, value, bits, inside, True)


@triton.jit
def tile(seed, P, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, its blocks in the row [BLOCKS], and of their values [BLOCKS, BLOCK] the places in an
    array of rows, whether they exist, and random bits."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    key = mix(row.to(tl.uint32) + seed.to(tl.uint32))
    bits = mix(mix(place.to(tl.uint32) ^ key) + key)
    return row, block, row * P + place, place < P, bits


@triton.jit
def load(pointer, inside):
    """fp32 values; int16 are the bits of bf16."""
    value = tl.load(pointer, inside, 0)
    if pointer.dtype.element_ty == tl.int16:
        return (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def store(pointer, value, dice, inside, STOCHASTIC: tl.constexpr):
    """fp32, or the bits of bf16: rounded with the 16 low bits of dice, or to nearest, ties to even."""
    if pointer.dtype.element_ty == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        carry = (dice & 0xFFFF) if STOCHASTIC else 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, bits + carry, 0x7FC00000)  # a NaN could carry through its sign
        tl.store(pointer, (bits >> 16).to(tl.int16), inside)
    else:
        tl.store(pointer, value, inside)


@triton.jit
def scaled(root, largest):
    scale = tl.div_rn(tl.max(root, 1), largest)
    return tl.div_rn(root, tl.where(scale == 0, 1.0, scale)[:, None]), scale


@triton.jit
def fourth_power(x):
    return (x * x) * (x * x)


@triton.jit
def mix(bits):
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    bits ^= bits >> 16
    return bits
