"""3x3 convolutions by Winograd's F(2x2, 3x3) on a CPU, with 16 multiplications instead of 36 (csrc/cpu/winograd.cpp).

The result is that of a direct convolution. In float32 its rounding errors are smaller than those of direct sums. Transformed
weights are 16/9 as large.
"""

from __future__ import annotations

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._register import register

GROWTH = 16 / 9  # size of the transformed weights / size of the weights


def shaped(weight: torch.Tensor, stride: list[int], padding: list[int]) -> bool:
    """Return whether `convolve` supports a convolution with this weight [K, C, 3, 3], stride and padding."""
    k, c, *size = weight.shape
    return (size, stride, padding) == ([3, 3], [1, 1], [1, 1]) and c % 32 == k % 32 == 0


def suits(x: torch.Tensor, dtype: torch.dtype, upsample: bool = False) -> bool:
    """Return whether `convolve` supports x [N, C, H, W] with products in dtype on this processor, and is faster."""
    return (
        (upsample or x.shape[2] % 2 == x.shape[3] % 2 == 0)
        and x.dtype in (dtype, torch.float32)
        and dtype in backend.DTYPES
        and backend.select(x.device, dtype) == "cpu"
        and backend.native.cpu_variant() != "generic"  # the generic kernels are not faster
        and backend.native.winograd_serves(dtype_name(dtype))
    )


def pack(weight: torch.Tensor, dtype: torch.dtype, upsample: bool = False) -> torch.Tensor:
    """Return weight [K, C, 3, 3] transformed, rounded to dtype and in the kernel's order: [16 K C], or [9 K C] to upsample."""
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
    """Return (h, a, b), float32 [3, N, C], with group_norm_silu(x, num_groups, weight, bias, eps, ...) = silu((x + h) * a + b).

    x is [N, C, H, W], channels_last. The other arguments are those of group_norm_silu.
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
    """Return w * x [+ bias] [+ residual], [N, K, H, W], channels_last.

    Args:
        x: [N, C, H, W] with even H and W, or [N, C, H/2, W/2] with `upsample`; in packed's dtype or float32. C and K are
            divisible by 32.
        packed: The transformed weights, `pack(w)`.
        bias: float32 [K].
        residual: Like the result.
        out: Memory for the result, used if it is channels_last. May be `residual`.
        coefficients: `norm_coefficients(x)`. The convolution is then that of x's GroupNorm and SiLU, which are never stored.
        upsample: Whether x is upsampled by 2 (nearest neighbour) first.
        dtype: The result's dtype: packed's, which is the default, or float32.
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
    """Return kernel * group_norm_silu(x, num_groups, weight, bias, eps, add, scale, shift) [+ offset] [+ residual].

    Every call transforms kernel [K, C, 3, 3], so the weights may change between calls. The transformation costs as much as
    the convolution of about a hundred pixels. x is [N, C, H, W] with even H and W; C and K are divisible by 32. All tensors are
    float32. The result is channels_last.
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


# Registered as an op, so that tracing and dispatch modes see it.
register(
    "norm_silu_convolution(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, Tensor kernel, Tensor? offset, Tensor? residual) -> Tensor",
    norm_silu_convolution,
    _norm_silu_convolution_fake,
)
torch.library.register_autograd("fastddpm::norm_silu_convolution", _no_gradient)
