"""3x3 convolutions with a quarter of the products: Winograd's F(4x4, 3x3), for float32 on a CPU.

Each 4x4 tile of y = w * x (stride 1, padding 1) comes from the 6x6 patch d of x around it as
  A^T [sum over channels of (G w G^T) . (B^T d B)] A
csrc/cpu/winograd.cpp has the transforms of d and of the sums; the sums themselves are 36 products of matrices, or a 1x1
convolution in 36 groups. It is the same function of x: rounding errors are about twice those of the direct sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import backend

POINTS = (0.0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5))  # and infinity; csrc/cpu/winograd.cpp says why these
GROUPS = 36  # numbers in a patch
WIDTH = 32  # channels in and out; with fewer the transforms take longer than the products that they save
TILES = 64  # fewer do not pay for transformed weights, which are four times as large
PIECE = 8 << 20  # elements of transformed patches at once


def suits(x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether `convolve` can do this convolution, and is the faster way. weight: [K, C, 3, 3]."""
    n, c, height, width = x.shape
    return (
        (tuple(weight.shape[2:]), stride, padding) == ((3, 3), [1, 1], [1, 1])
        and c % 16 == weight.shape[0] % 16 == 0
        and min(c, weight.shape[0]) >= WIDTH
        and height % 4 == width % 4 == 0
        and n * height * width >= 16 * TILES
        and x.dtype == torch.float32
        and backend.choose(x.device) == "cpu"
        and backend.native.cpu_variant() != "generic"
    )


def weights(weight: torch.Tensor) -> torch.Tensor:
    """G w G^T as the weights of a 1x1 convolution in 36 groups: [K, C, 3, 3] -> [36 K, C, 1, 1]."""
    rows = [[p**j / math.prod(p - q for q in POINTS if q != p) for j in range(3)] for p in POINTS]
    g = torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)
    transformed = torch.einsum("ia,kcab,jb->ijkc", g, weight.double(), g)
    return transformed.reshape(GROUPS * weight.shape[0], weight.shape[1], 1, 1).to(weight.dtype)


def patches_shape(shape: torch.Size) -> tuple[int, int, int, int]:
    """[1, 36 C, tiles, 1] of the transformed patches of x [N, C, H, W], or of an equal part of its images."""
    n, c, height, width = shape
    tiles = height * width // 16
    images = max(i for i in range(1, n + 1) if n % i == 0 and (i == 1 or i * tiles * GROUPS * c <= PIECE))
    return 1, GROUPS * c, images * tiles, 1


def convolve(
    x: torch.Tensor,
    products: Callable[[torch.Tensor], torch.Tensor],
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """w * x + bias [+ residual], float32 [N, K, H, W] channels_last.

    x: float32 [N, C, H, W]; C and K divisible by 16, H and W by 4. products: the convolution with `weights(w)` in 36 groups,
    [1, 36 C, tiles, 1] -> [1, 36 K, tiles, 1], both channels_last. out: where the result may go; may be the residual.
    """
    n, c, height, width = x.shape
    k = bias.numel()
    last = torch.channels_last
    x = x.contiguous(memory_format=last)
    if residual is not None:
        residual = residual.contiguous(memory_format=last)
    if out is None or not out.is_contiguous(memory_format=last):
        out = torch.empty((n, k, height, width), memory_format=last)
    patches = torch.empty(patches_shape(x.shape), memory_format=last)
    piece = patches.shape[2] * 16 // (height * width)
    b, size, threads = backend.buffer, (piece, height, width), torch.get_num_threads()
    for i in range(0, n, piece):
        part = slice(i, i + piece)
        backend.native.winograd_input(b(x[part]), b(patches), *size, c, threads)
        sums = products(patches).contiguous(memory_format=last)
        rest = None if residual is None else b(residual[part])
        backend.native.winograd_output(b(sums), b(bias), rest, b(out[part]), *size, k, threads)
    return out
