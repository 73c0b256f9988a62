"""out[i, :] = [sin(t_i f), cos(t_i f), 0 if dim is odd], cos first if flipped, with f_k = exp(-rate k).

The turns t f / (2 pi) need more digits than a float32 has. They are computed in float64, and their nearest multiple of a quarter
turn is subtracted. The remainder, at most an eighth of a turn, is passed to the float32 polynomials of philox.py.

Work: a program processes ROWS timesteps and BLOCK frequencies. It computes each frequency once. Bytes: out is written once.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from .launch import OPTIONS, cdiv, on, power_of_2
from .philox import sine_cosine

ROWS = 16


@triton.jit(do_not_specialize=["count", "dim"])
def timestep_embedding_kernel(
    out, t, count, dim, rate, rate_rest, FLIP: tl.constexpr, ODD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    half = dim // 2
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A float64 argument would reach the kernel as a float32, so the rate is passed in two parts.
    exact_rate = tl.cast(rate, tl.float64) + tl.cast(rate_rest, tl.float64)
    turns_per_t = tl.exp(k.to(tl.float64) * -exact_rate) * 0.15915494309189535

    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    turns = tl.load(t + i, mask=i < count, other=0).to(tl.float64)[:, None] * turns_per_t[None, :]
    # Adding 1.5 2^50 rounds to quarters and leaves their number in the low bits.
    shifted = turns + 1688849860263936.0
    rest = (turns - (shifted - 1688849860263936.0)) * 6.283185307179586
    quarters = shifted.to(tl.int64, bitcast=True).to(tl.uint32)
    sine, cosine = sine_cosine(rest.to(tl.float32), quarters << 30)

    row = out + i.to(tl.int64)[:, None] * dim
    inside = (i < count)[:, None] & (k < half)[None, :]
    tl.store(row + (half if FLIP else 0) + k[None, :], sine, mask=inside)
    tl.store(row + (0 if FLIP else half) + k[None, :], cosine, mask=inside)
    if ODD:
        tl.store(out + i.to(tl.int64) * dim + dim - 1, tl.zeros((ROWS,), tl.float32), mask=i < count)


def timestep_embedding(out: torch.Tensor, t: torch.Tensor, rate: float, flip_sin_to_cos: bool) -> None:
    """Fill out, float32 [N, dim], for t, int64 or float32 [N]. Both are contiguous."""
    count, dim = out.shape
    if count == 0:
        return
    block = min(power_of_2(dim // 2), 256)
    high = float(np.float32(rate))
    with on(out.device):
        timestep_embedding_kernel[(cdiv(count, ROWS), cdiv(dim // 2, block))](
            out, t, count, dim, high, rate - high,
            FLIP=flip_sin_to_cos, ODD=dim % 2 == 1, ROWS=ROWS, BLOCK=block, num_warps=4, **OPTIONS,
        )  # fmt: skip
