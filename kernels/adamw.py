"""AdamW over rows, and what it needs around it: the optimizer of experts whose weights live in host memory.

A *row* is one expert: its weights as one flat vector. Beside the project's letters, P is the length of a row, a
multiple of Z = `BLOCK`, and L = P / Z its number of blocks. Arrays of rows are contiguous. This file is the
specification in plain PyTorch and what runs on a CPU; `kernels/adamw_triton.py` is the same arithmetic, with the
same random bits, as one kernel.

Numbers that must be stored in fewer bits than fp32 are rounded *stochastically*: up or down with probabilities
that make the mean exact, so that steps smaller than the spacing of the stored numbers add up instead of being
lost. The random bits are a hash of (seed, row, index), not a generator with state: the same call gives the same
result, on any device, in any order.

    stored as       rounding
    bf16 weights    stochastic; to nearest where a master copy keeps the exact value
    bf16 moments    stochastic: to nearest, a beta2 of 0.998 or more would never let exp_avg_sq fall, for 0.2%
                    less is less than half the spacing of bf16
    8 bit moments   stochastic: codes of the 4th and the 8th root, in blocks of 256 values with one fp32 scale, so
                    that it serves values of different magnitudes (docs/log.md has the errors of other roots)
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # values that share one scale
Rows = dict[str, Tensor]  # what is kept of R experts


class AdamW(NamedTuple):
    """Hyperparameters of an update, as in `torch.optim.AdamW`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def update_rows(rows: Rows, grad_RP: Tensor, factor_R: Tensor, rules: AdamW, seed: int) -> None:
    """One AdamW update of each row, in place, on the device of the tensors.

    rows: `weight` [R, P], fp32 or bf16; `updates` [R, 1] (int32), how often each row was updated, for the bias
    correction; the moments `exp_avg` and `exp_avg_sq` [R, P], both fp32, both bf16, or int8 and uint8 with fp32
    scales `exp_avg_scale` and `exp_avg_sq_scale` [R, L]; beside bf16 weights perhaps their fp32 copy `master`.
    grad_RP: fp32 or bf16. factor_R (fp32): what the gradient is multiplied by; a row whose factor is not above 0
    is left as it is, state and count included, and its gradient, which may be NaN, is not read.
    seed: any integer, another for each page of each step and each rank.

    Decoupled weight decay: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2, in the form of
    `torch.optim.AdamW`. All arithmetic is fp32, each product and each sum rounded by itself.
    """
    check_rows(grad_RP, *rows.values())
    if grad_RP.is_cuda:
        from kernels import adamw_triton  # triton is not everywhere, and slow to import

        return adamw_triton.update_rows(rows, grad_RP, factor_R, rules, seed)
    rows_R = (factor_R > 0).nonzero().flatten()  # from here on R counts the rows that are updated
    old = {name: array[rows_R] for name, array in rows.items()}
    eight_bit, moment_dtype = "exp_avg_scale" in rows, rows["exp_avg"].dtype
    rounds_weight = rows["weight"].dtype == torch.bfloat16 and "master" not in rows
    if rounds_weight or moment_dtype != torch.float32:
        bits_RP = random_bits(seed, rows_R, grad_RP.shape[1])
        moment_bits_RP = mix(bits_RP + GOLDEN)

    stored = ((old[name], old.get(f"{name}_scale")) for name in ("exp_avg", "exp_avg_sq"))
    exp_avg_RP, exp_avg_sq_RP = (x.float() if scale is None else decode(x, scale) for x, scale in stored)
    grad_RP = grad_RP[rows_R].float().mul_(factor_R[rows_R, None])
    exp_avg_RP.mul_(rules.beta1).add_(grad_RP * (1 - rules.beta1))
    exp_avg_sq_RP.mul_(rules.beta2).add_(grad_RP.square_().mul_(1 - rules.beta2))

    step_R1, inverse_root_R1 = bias_corrections(old["updates"], rules)
    denominator_RP = square_root(exp_avg_sq_RP).mul_(inverse_root_R1).add_(rules.eps)
    exact_RP = old.get("master", old["weight"]).float().mul_(1 - rules.lr * rules.weight_decay)
    exact_RP.sub_((exp_avg_RP / denominator_RP).mul_(step_R1))

    new = {"weight": exact_RP, "master": exact_RP, "exp_avg": exp_avg_RP, "exp_avg_sq": exp_avg_sq_RP}
    new["updates"] = old["updates"] + 1
    if rounds_weight:
        new["weight"] = round_to_bfloat16(exact_RP, bits_RP)
    if eight_bit:
        new["exp_avg"], new["exp_avg_scale"] = encode_exp_avg(exp_avg_RP, moment_bits_RP)
        new["exp_avg_sq"], new["exp_avg_sq_scale"] = encode_exp_avg_sq(exp_avg_sq_RP, moment_bits_RP >> 16)
    elif moment_dtype == torch.bfloat16:
        new["exp_avg"] = round_to_bfloat16(exp_avg_RP, moment_bits_RP)
        new["exp_avg_sq"] = round_to_bfloat16(exp_avg_sq_RP, moment_bits_RP >> 16)
    for name, array in rows.items():
        array[rows_R] = new[name].to(array.dtype)


def square_root(value_RP: Tensor) -> Tensor:
    """fp32, correctly rounded: `torch.sqrt` on a CPU may call MKL, whose last bit is wrong now and then."""
    return value_RP.double().sqrt_().float()


def bias_corrections(updates_R1: Tensor, rules: AdamW) -> tuple[Tensor, Tensor]:
    """lr / (1 − β1ⁿ) and 1 / √(1 − β2ⁿ) in fp32, n = updates + 1; in fp64 first, for 1 − βⁿ loses digits."""
    count_R1 = (updates_R1 + 1).double()
    step_R1 = rules.lr / (1 - rules.beta1**count_R1)
    return step_R1.float(), (1 - rules.beta2**count_R1).rsqrt().float()


def accumulate_rows(accumulator_RP: Tensor, grad_RP: Tensor, seed: int) -> None:
    """accumulator += gradient, in place; both fp32 or bf16. The sum is fp32, rounded stochastically to a bf16
    accumulator. NaN and infinity stay what they are."""
    check_rows(accumulator_RP, grad_RP)
    if accumulator_RP.dtype == torch.float32:
        accumulator_RP.add_(grad_RP)
    elif accumulator_RP.is_cuda:
        from kernels import adamw_triton

        adamw_triton.accumulate_rows(accumulator_RP, grad_RP, seed)
    else:
        bits_RP = random_bits(seed, torch.arange(len(grad_RP)), grad_RP.shape[1])
        accumulator_RP.copy_(round_to_bfloat16(accumulator_RP.float().add_(grad_RP), bits_RP))


def sum_of_squares(grad_RP: Tensor) -> Tensor:
    """Σ g² of each row, fp32 [R], without a copy of the gradient. Ranks that hold parts of a row add theirs up."""
    return torch.linalg.vector_norm(grad_RP, dim=1, dtype=torch.float32).square_()


def clip_factors(sum_squares_R: Tensor, max_norm: float, scale: float = 1.0) -> Tensor:
    """What `update_rows` multiplies each row's gradient by.

    The gradient is to count as scale · g and, clipped row by row as by `torch.nn.utils.clip_grad_norm_`, to have
    a norm of at most max_norm (0: any). factor_R (fp32): scale · min(1, max_norm / (norm + 1e-6)), and 0 where the
    sum of squares is 0 or not finite, which includes finite gradients whose squares pass the range of fp32 (a norm
    of 1.8e19 before scaling; 4e15 in every place of 20 M values).
    """
    if max_norm > 0:  # infinity makes it 0
        factor_R = (max_norm / (sum_squares_R.sqrt() + 1e-6 / scale)).clamp_(max=scale)
    else:
        factor_R = (sum_squares_R < torch.inf) * scale
    return torch.where(sum_squares_R > 0, factor_R, 0.0)


def round_to_bfloat16(value_RP: Tensor, bits_RP: Tensor) -> Tensor:
    """fp32 values rounded to numbers that bf16 holds, with the 16 low bits of bits_RP (int32).

    bf16 is the upper half of fp32: random bits are added below it, and what they carry over stays.
    """
    rounded_RP = (value_RP.view(torch.int32) + (bits_RP & 0xFFFF)).bitwise_and_(~0xFFFF).view(torch.float32)
    return torch.where(value_RP.isnan(), value_RP, rounded_RP)  # the carry could run through a NaN's sign


def encode_exp_avg(value_RP: Tensor, bits_RP: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes, fp32 scales [R, L]: |value| ≈ (|code| · scale)⁴, scale = max |value|^(1/4) / 127 over a block.

    The 16 low bits of bits_RP choose between the two codes around a value, so that its mean is exact when decoded.
    """
    root_RP, scale_RL = scaled(square_root(square_root(value_RP.abs())), 127)
    code_RP = root_RP.floor()
    low_RP = code_RP.square().square_()
    gap_RP = (code_RP + 1).square_().square_().sub_(low_RP)
    code_RP += (bits_RP & 0xFFFF) * 2.0**-16 * gap_RP < root_RP.square_().square_().sub_(low_RP)
    return code_RP.clamp_(max=127).copysign_(value_RP).to(torch.int8), scale_RL


def encode_exp_avg_sq(value_RP: Tensor, bits_RP: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes, fp32 scales [R, L]: value ≈ (code · scale)⁸, scale = max value^(1/8) / 255 over a block.

    The mean of the root is exact. A value above 0 has a code of at least 1: decoded as 0 it would let the next
    update divide by eps alone.
    """
    code_RP, scale_RL = scaled(square_root(square_root(square_root(value_RP))), 255)
    code_RP = code_RP.add_((bits_RP & 0xFFFF) * 2.0**-16).floor_().clamp_(max=255)
    return torch.maximum(code_RP, value_RP > 0).to(torch.uint8), scale_RL


def decode(code_RP: Tensor, scale_RL: Tensor) -> Tensor:
    """fp32 values of int8 codes, which have a sign and the 4th root, or of uint8 codes, which have the 8th."""
    root_RP = (code_RP.unflatten(1, (-1, BLOCK)) * scale_RL[:, :, None]).flatten(1)
    fourth_RP = root_RP.square_().square_()
    return fourth_RP.copysign_(code_RP) if code_RP.dtype == torch.int8 else fourth_RP.square_()


def scaled(root_RP: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Each block divided by its scale, which makes its maximum `largest`; a block of zeros has scale 0."""
    root_RLZ = root_RP.unflatten(1, (-1, BLOCK))
    scale_RL = root_RLZ.amax(2) / largest
    return (root_RLZ / scale_RL.masked_fill(scale_RL == 0, 1.0)[:, :, None]).flatten(1), scale_RL


GOLDEN = 0x9E3779B9 - 2**32  # 2^32 divided by the golden ratio, as a signed number


def random_bits(seed: int, rows_R: Tensor, length: int) -> Tensor:
    """32 random bits for each of the first `length` places of the given rows: int32 [R, length]."""
    key_R1 = mix(rows_R.to(torch.int32) + fold(seed))[:, None]
    index_P = torch.arange(length, dtype=torch.int32, device=rows_R.device)
    return mix(mix(index_P ^ key_R1) + key_R1)


def mix(bits: Tensor) -> Tensor:
    """A bijection of 32 bit integers (int32, wrapping) that spreads each bit over all.

    `lowbias32` of C. Wellons' hash-prospector (public domain, https://nullprogram.com/blog/2018/07/31/).
    """
    bits = bits ^ ((bits >> 16) & 0xFFFF)  # the mask makes the shift of a signed number fill with zeros
    bits.mul_(0x7FEB352D)
    bits ^= (bits >> 15) & 0x1FFFF
    bits.mul_(0x846CA68B - 2**32)
    bits ^= (bits >> 16) & 0xFFFF
    return bits


def fold(seed: int) -> int:
    """Any integer as 32 mixed bits, a signed number (the finaliser of splitmix64)."""
    bits = (seed + 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return (bits ^ bits >> 31) % 2**32 - 2**31


def check_rows(*arrays: Tensor | None) -> None:
    """Rows of whole blocks, one after the other."""
    assert arrays[0].shape[1] % BLOCK == 0
    assert all(array.is_contiguous() for array in arrays if array is not None)
