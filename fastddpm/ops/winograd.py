"""3x3 convolutions with 16 multiplications for 36: Winograd's F(2x2, 3x3) on a CPU, as csrc/cpu/winograd.cpp does it.

The same function of x; in float32 its rounding errors are below those of direct sums. Transformed weights have 16/9 of
the size.
"""

from __future__ import annotations

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._register import register

GROWTH = 16 / 9  # of the weights


def shaped(weight: torch.Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether `convolve` can do this convolution. weight: [K, C, 3, 3]."""
    k, c, *size = weight.shape
    return (size, stride, padding) == ([3, 3], [1, 1], [1, 1]) and c % 32 == k % 32 == 0


def suits(x: torch.Tensor, dtype: torch.dtype, upsample: bool = False) -> bool:
    """Whether it can do so for x [N, C, H, W] with products in dtype on this processor, and is the faster way."""
    return (
        (upsample or x.shape[2] % 2 == x.shape[3] % 2 == 0)
        and x.dtype in (dtype, torch.float32)
        and dtype in backend.DTYPES
        and backend.select(x.device, dtype) == "cpu"
        and backend.native.cpu_variant() != "generic"  # which is not faster this way
        and backend.native.winograd_serves(dtype_name(dtype))
    )


def pack(weight: torch.Tensor, dtype: torch.dtype, upsample: bool = False) -> torch.Tensor:
    """[K, C, 3, 3], transformed and then rounded to dtype, in the kernel's order: [16 K C], or [9 K C] to upsample."""
    outputs, channels = weight.shape[:2]
    weight = weight.float().contiguous()
    packed = torch.empty((9 if upsample else 16) * outputs * channels, dtype=dtype, device=weight.device)
    b = backend.buffer
    backend.native.winograd_weights(b(weight), b(packed), upsample, outputs, channels, torch.get_num_threads())
    return packed


def norm_coefficients(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """(h, a, b), float32 [3, N, C], with group_norm_silu(x, num_groups, weight, bias, eps, ...) = silu((x + h) * a + b).

    x: [N, C, H, W] channels_last; weight, bias, add, scale, shift as there.
    """
    n, c, height, width = x.shape
    coefficients = torch.empty(3, n, c, dtype=torch.float32, device=x.device)
    weight, bias, add, scale, shift = (None if v is None else v.contiguous() for v in (weight, bias, add, scale, shift))
    b = backend.buffer
    backend.native.group_norm_coefficients(
        b(x), b(coefficients), b(weight), b(bias), b(add), b(scale), b(shift),
        n, c, height * width, num_groups, eps, torch.get_num_threads(),
    )  # fmt: skip
    return coefficients


def convolve(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    coefficients: torch.Tensor | None = None,
    upsample: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """w * x [+ bias] [+ residual], [N, K, H, W] channels_last, in dtype: packed's, which is the default, or float32.

    x: [N, C, H, W], H and W even; or, to be upsampled first, [N, C, H/2, W/2]; C and K divisible by 32; in packed's dtype
    or float32. packed: `pack(w)`. bias: float32 [K]. residual: in the result's dtype. out: where the result may go; may be
    the residual. coefficients: `norm_coefficients(x)`; x then stands for its GroupNorm and SiLU, which never go to memory.
    """
    n, c, height, width = x.shape
    if upsample:
        height, width = 2 * height, 2 * width
    k = packed.numel() // ((9 if upsample else 16) * c)
    last = torch.channels_last
    x = x.contiguous(memory_format=last)
    if residual is not None:
        residual = residual.contiguous(memory_format=last)
    if out is None or not out.is_contiguous(memory_format=last):
        out = torch.empty((n, k, height, width), dtype=dtype or packed.dtype, device=x.device, memory_format=last)
    b = backend.buffer
    backend.native.winograd(
        b(x), b(coefficients), b(packed), b(bias), b(residual), b(out),
        upsample, n, height, width, c, k, torch.get_num_threads(),
    )  # fmt: skip
    return out


def norm_silu_convolution(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    kernel: torch.Tensor,
    offset: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """kernel * group_norm_silu(x, num_groups, weight, bias, eps, add, scale, shift) [+ offset] [+ residual], channels_last.

    For weights that may change between calls: kernel [K, C, 3, 3] is transformed in each, which costs as much as the
    convolution of about a hundred pixels. All in float32; x: [N, C, H, W], H and W even; C and K divisible by 32.
    """
    (n, c, height, width), k = x.shape, kernel.shape[0]
    for name, v, shape in (
        ("weight", weight, (c,)), ("bias", bias, (c,)), ("add", add, (n, c)), ("scale", scale, (n, c)), ("shift", shift, (n, c)),
        ("kernel", kernel, (k, c, 3, 3)), ("offset", offset, (k,)), ("residual", residual, (n, k, height, width)),
    ):  # fmt: skip
        if v is None:
            continue
        if v.device != x.device:
            raise ValueError(f"{name}: is on {v.device}, x is on {x.device}; move one of them")
        if v.shape != shape:
            raise ValueError(f"{name}: got shape {list(v.shape)}; expected {list(shape)}")
    for name, v in (("x", x), ("kernel", kernel), ("offset", offset), ("residual", residual)):
        if v is not None and v.dtype != torch.float32:
            raise ValueError(f"{name}: got {dtype_name(v.dtype)}; expected float32")
    x = x.contiguous(memory_format=torch.channels_last)
    coefficients = norm_coefficients(x, num_groups, weight, bias, eps, add, scale, shift)
    offset = None if offset is None else offset.contiguous()
    return convolve(x, pack(kernel, torch.float32), offset, residual, coefficients=coefficients)


def _norm_silu_convolution_fake(x, num_groups, weight, bias, eps, add, scale, shift, kernel, offset, residual):
    shape = x.shape[0], kernel.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _no_gradient(ctx, *_):
    raise RuntimeError("norm_silu_convolution: has no gradient; trace the block that calls it with gradients enabled")


# An op, so that tracing and dispatch modes see it.
register(
    "norm_silu_convolution(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, Tensor kernel, Tensor? offset, Tensor? residual) -> Tensor",
    norm_silu_convolution,
    _norm_silu_convolution_fake,
)
torch.library.register_autograd("fastddpm::norm_silu_convolution", _no_gradient)
