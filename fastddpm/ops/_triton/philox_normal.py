"""out[i, e] = the e-th standard normal of (seed, stream, t_i, sample_i); see philox.py.

Layout: [samples, elements], contiguous. Work: a program draws up to BLOCK quads of four elements of one sample.
Bytes: out is written once.
"""

import math

import torch
import triton
import triton.language as tl

from .launch import OPTIONS, cdiv, needs_int64, on
from .philox import normals

BLOCK = 256  # quads


@triton.jit(do_not_specialize=["elements", "seed", "stream", "t_all", "first"])
def philox_normal_kernel(
    out,
    t,
    sample,
    elements,
    seed: tl.int64,
    stream: tl.int64,
    t_all: tl.int64,
    first: tl.int64,
    ALIGNED: tl.constexpr,  # every sample starts at a multiple of 16 bytes
    LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if LARGE:
        elements = elements.to(tl.int64)
    blocks = tl.cdiv(elements, 4 * BLOCK)
    i = tl.program_id(0) // blocks
    if ALIGNED:
        elements = elements // 4 * 4  # shows the compiler that elements is a multiple of 4
    begin = (tl.program_id(0) % blocks).to(elements.dtype) * BLOCK
    time = t_all if t is None else tl.load(t + i)
    name = first.to(tl.int64) + i if sample is None else tl.load(sample + i)
    z0, z1, z2, z3 = normals(seed, begin + tl.arange(0, BLOCK), time, name, stream)
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    e = 4 * begin + tl.arange(0, 4 * BLOCK)
    tl.store(out + i.to(tl.int64) * elements + e, z, mask=e < elements)


def philox_normal(
    out: torch.Tensor,
    seed: int,
    stream: int,
    t: torch.Tensor | None,
    t_all: int,
    sample: torch.Tensor | None,
    first: int,
) -> None:
    """Fill out, contiguous float32 [N, ...]. seed is its int64 bits. t and sample are int64 [N]; None: t_all, first + i."""
    if out.numel() == 0:
        return
    n, elements = out.shape[0], math.prod(out.shape[1:])
    with on(out.device):
        philox_normal_kernel[(n * cdiv(elements, 4 * BLOCK),)](
            out, t, sample, elements, seed, stream, t_all, first,
            ALIGNED=elements % 4 == 0, LARGE=needs_int64(elements + 4 * BLOCK), BLOCK=BLOCK, num_warps=4, **OPTIONS,
        )  # fmt: skip
