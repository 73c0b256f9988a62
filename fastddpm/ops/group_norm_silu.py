"""GroupNorm followed by SiLU, fused with a diffusion U-Net's additions before and after the norm.

    h    = x + add                                            (the projected time embedding)
    xhat = (h - mean_group(h)) / sqrt(var_group(h) + eps)
    y    = silu((xhat * weight + bias) * (1 + scale) + shift)

The statistics are computed relative to the group's first element and in two passes, never as E[h^2] - E[h]^2, which cancels.
"""

from __future__ import annotations

import math

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._operands import Norm
from ._register import checked_layout, forward_mode, register

# ---------------------------------------------------------------------------------------------- reference


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return v, [C] or [N, C], with a trailing dimension so that it broadcasts against [N, C, P]."""
    return v.to(dtype)[..., None]


def _flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x as [N, C, P]. P is computed, because -1 is ambiguous if x is empty."""
    return x.to(dtype).reshape(*x.shape[:2], math.prod(x.shape[2:]))


def _grouped(
    x: torch.Tensor, num_groups: int, add: torch.Tensor | None, mean: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x + add minus its group's first element, and minus `mean` [N, G] (relative to that element): [N, G, C/G * P]."""
    h = _flat(x, _compute_dtype(x))
    if add is not None:
        h = h + _per_channel(add, h.dtype)
    n, c, pixels = h.shape
    h = h.reshape(n, num_groups, c // num_groups * pixels)
    pivot = h[..., :1].detach()  # the norm is invariant to a shift, and so is its gradient
    return h - (pivot if mean is None else pivot + mean[..., None])


def _affine(xhat: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return z = (xhat * weight + bias) * (1 + scale) + shift for xhat [N, C, P]."""
    z = xhat * _per_channel(norm.weight, xhat.dtype) + _per_channel(norm.bias, xhat.dtype)
    if norm.scale is not None:
        z = z * (1 + _per_channel(norm.scale, xhat.dtype))
    if norm.shift is not None:
        z = z + _per_channel(norm.shift, xhat.dtype)
    return z


def _forward_reference(x: torch.Tensor, norm: Norm, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, mean, rstd): mean [N, G] is relative to the group's first element, rstd = 1/sqrt(var + eps)."""
    h = _grouped(x, norm.num_groups, norm.add)
    mean = h.mean(-1, keepdim=True)
    rstd = ((h - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = ((h - mean) * rstd).reshape(*x.shape[:2], math.prod(x.shape[2:]))
    z = _affine(xhat, norm)
    y = torch.nn.functional.silu(z) if norm.silu else z
    return y.reshape(x.shape).to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def _backward_reference(
    dy: torch.Tensor, x: torch.Tensor, norm: Norm, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, sum_p g, sum_p g*xhat, sum_p dx) with g = dL/dz; the sums are [N, C]."""
    h = _grouped(x, norm.num_groups, norm.add, mean)
    grouped = (h - h.mean(-1, keepdim=True)) * rstd[..., None]  # the saved mean was rounded, so centre again
    g = _flat(dy, grouped.dtype)
    xhat = grouped.reshape(g.shape)
    if norm.silu:
        z = _affine(xhat, norm)
        s = z.sigmoid()
        g = g * (s * (1 + z * (1 - s)))
    gain = _per_channel(norm.weight, xhat.dtype)
    if norm.scale is not None:
        gain = gain * (1 + _per_channel(norm.scale, xhat.dtype))
    dxhat = (g * gain).reshape(grouped.shape)
    mean_d = dxhat.mean(-1, keepdim=True)
    mean_dx = (dxhat * grouped).mean(-1, keepdim=True)
    dx = (rstd[..., None] * (dxhat - mean_d - grouped * mean_dx)).reshape(g.shape)
    return dx.reshape(x.shape).to(x.dtype), g.sum(-1), (g * xhat).sum(-1), dx.sum(-1)


# ------------------------------------------------------------------------------------------ registered op


def _in_kernel_layout(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return (x in a layout that the kernels support, whether it is channels_last). x is copied only if necessary."""
    kind = checked_layout(x, "x")
    return (x.contiguous(), False) if kind == "dense" else (x, kind == "channels_last")


def _workspace(kind: str, backward: bool, x: torch.Tensor, channels_last: bool, num_groups: int) -> torch.Tensor | None:
    """Allocate the CUDA kernels' workspace, or return None. torch allocates it, so that a graph's memory pool can hold it."""
    if kind != "cuda":
        return None
    index, _ = backend.launch_target(kind, x.device)
    n, c = x.shape[:2]
    size = backend.native.norm_workspace(
        backward, backend.buffer(x), channels_last, n, c, x[0, 0].numel(), num_groups, index
    )
    return torch.empty(size, dtype=torch.float32, device=x.device) if size else None


def _launch_forward(kind, x, y, channels_last, statistics, norm, eps):
    """Run the kernel. x and y have a layout that the kernels support. y and `statistics`, (mean, rstd), are outputs."""
    if kind == "triton":
        from ._triton import group_norm_silu as triton_kernels

        triton_kernels.forward(x, y, channels_last, statistics, norm, eps)
        return
    b, (n, c) = backend.buffer, x.shape[:2]
    num_groups, *vectors, silu = norm
    workspace = _workspace(kind, False, x, channels_last, num_groups)
    backend.native.group_norm_silu(
        b(x), b(y), channels_last, *map(b, statistics), *map(b, vectors),
        n, c, x[0, 0].numel(), num_groups, eps, silu,
        b(workspace), backend.launch_target(kind, x.device),
    )  # fmt: skip


def _launch_backward(kind, dy, x, dx, channels_last, statistics, norm, sums):
    """Run the backward kernel. dy, x and dx have a layout that the kernels support.

    `statistics` is the (mean, rstd) that the forward returned. dx and `sums` are outputs: the sums of g, g*xhat and dx, each
    [N, C].
    """
    if kind == "triton":
        from ._triton import group_norm_silu as triton_kernels

        triton_kernels.backward(dy, x, dx, channels_last, statistics, norm, sums)
        return
    b, (n, c) = backend.buffer, x.shape[:2]
    num_groups, *vectors, silu = norm
    workspace = _workspace(kind, True, x, channels_last, num_groups)
    backend.native.group_norm_silu_backward(
        b(dy), b(x), b(dx), channels_last, *map(b, statistics), *map(b, vectors), *map(b, sums),
        n, c, x[0, 0].numel(), num_groups, silu,
        b(workspace), backend.launch_target(kind, x.device),
    )  # fmt: skip


def _forward(x, num_groups, weight, bias, eps, add, scale, shift, silu):
    kind, norm = backend.select(x.device, x.dtype), Norm(num_groups, weight, bias, add, scale, shift, silu)
    if kind != "reference" and x.numel():
        x_in, channels_last = _in_kernel_layout(x)
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        y_out = y if x_in is x else torch.empty_like(x_in)
        mean = torch.empty(len(x), num_groups, dtype=torch.float32, device=x.device)
        rstd = torch.empty_like(mean)
        _launch_forward(kind, x_in, y_out, channels_last, (mean, rstd), norm, eps)
        if y_out is not y:
            y.copy_(y_out)
        return y, mean, rstd
    checked_layout(x, "x")
    result, mean, rstd = _forward_reference(x, norm, eps)
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return y.copy_(result), mean, rstd


def _forward_fake(x, num_groups, weight, bias, eps, add, scale, shift, silu):
    statistics = x.new_empty((x.shape[0], num_groups), dtype=_compute_dtype(x))
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return y, statistics, torch.empty_like(statistics)


def _backward(dy, x, weight, bias, add, scale, shift, mean, rstd, num_groups, silu, kind):
    norm = Norm(num_groups, weight, bias, add, scale, shift, silu)
    dx = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    if kind != "reference" and x.numel():
        x_in, channels_last = _in_kernel_layout(x)
        dx_out = dx if x_in is x else torch.empty_like(x_in)
        dy_in = dy if dy.stride() == x_in.stride() else torch.empty_like(x_in).copy_(dy)
        sum_g = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
        sums = sum_g, torch.empty_like(sum_g), torch.empty_like(sum_g)  # outputs must not alias
        _launch_backward(kind, dy_in, x_in, dx_out, channels_last, (mean, rstd), norm, sums)
        if dx_out is not dx:
            dx.copy_(dx_out)
        return dx, *sums
    result, *sums = _backward_reference(dy, x, norm, mean, rstd)
    return dx.copy_(result), *sums


def _backward_fake(dy, x, weight, bias, add, scale, shift, mean, rstd, num_groups, silu, kind):
    dx = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return dx, *(x.new_empty(x.shape[:2], dtype=_compute_dtype(x)) for _ in range(3))


register(
    "group_norm_silu(Tensor x, int num_groups, Tensor weight, Tensor bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "group_norm_silu_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor? add, Tensor? scale, "
    "Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool silu, str kind) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, add, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, add, scale, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.kind = backend.select(x.device, x.dtype)  # stored, because backward runs on another thread


def _autograd(ctx, dy, *_):
    x, weight, bias, add, scale, shift, mean, rstd = ctx.saved_tensors
    dx, sum_g, sum_gx, sum_dx = torch.ops.fastddpm.group_norm_silu_backward(
        dy, x, weight, bias, add, scale, shift, mean, rstd, ctx.num_groups, ctx.silu, ctx.kind
    )
    w, b = weight.to(sum_g.dtype), bias.to(sum_g.dtype)
    gain = 1 if scale is None else 1 + scale.to(sum_g.dtype)
    d_weight, d_bias = (sum_gx * gain).sum(0), (sum_g * gain).sum(0)
    d_scale = None if scale is None else w * sum_gx + b * sum_g

    def like(grad, v):  # sum [N, C] gradients to [C] if the input was [C]
        return None if v is None else (grad.sum(0) if v.dim() == 1 else grad).to(v.dtype)

    return (
        dx, None, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None,
        like(sum_dx, add), like(d_scale, scale), like(sum_g, shift), None,
    )  # fmt: skip


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "group_norm_silu: has no second derivative; use group_norm_silu_ref, which is differentiable any number of times"
    )


torch.library.register_autograd("fastddpm::group_norm_silu", _autograd, setup_context=_setup_context)
torch.library.register_autograd("fastddpm::group_norm_silu_backward", _no_second_derivative)


# ------------------------------------------------------------------------------------------------- public


def _check(x, num_groups, weight, bias, eps, add, scale, shift):
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"x: got {dtype_name(x.dtype)} {list(x.shape)}; expected a floating-point tensor [N, C, *spatial]"
        )
    n, c = x.shape[:2]
    if num_groups < 1 or c % num_groups != 0:
        raise ValueError(f"num_groups: {c} channels cannot be divided into {num_groups} groups")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}; expected a number >= 0")
    for name, v in (("weight", weight), ("bias", bias), ("add", add), ("scale", scale), ("shift", shift)):
        optional = name in ("add", "scale", "shift")
        if v is None and optional:
            continue
        # Compare with one shape only. Comparing with both would make torch 2.6's export exclude batches of size c.
        if list(v.shape) != ([n, c] if optional and v.dim() == 2 else [c]):
            shapes = f"[{c}] or [{n}, {c}]" if optional else f"[{c}]"
            raise ValueError(f"{name}: got shape {list(v.shape)}; expected {shapes}")
        if v.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: got {dtype_name(v.dtype)}; expected x's dtype {dtype_name(x.dtype)} or float32")
        if v.device != x.device:
            raise ValueError(f"{name}: is on {v.device}, x is on {x.device}; move one of them")


def _dense(v):
    return None if v is None else v.contiguous()


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """Return silu(group_norm(x + add) * (1 + scale) + shift), computed in one fused kernel.

        h    = x + add
        xhat = (h - mean_group(h)) / sqrt(var_group(h) + eps)
        y    = silu((xhat * weight + bias) * (1 + scale) + shift)

    mean_group and var_group are taken over a group's channels and all pixels of a sample. The op is differentiable once in
    reverse mode. In forward mode (torch.func.jvp) it runs the reference.

    Args:
        x: float32, bfloat16, float16 or float64, [N, C, *spatial]. float64 runs the reference. The kernels support contiguous
            and channels_last memory; other dense permutations are copied.
        num_groups: The number of groups G, a divisor of C.
        weight: The norm's weight [C], in x's dtype or float32.
        bias: The norm's bias [C], in x's dtype or float32.
        eps: Added to the variance, at least 0. The default is torch's; the paper's network uses 1e-6.
        add: Added to x before the norm, for example the projected time embedding: [C] or [N, C], in x's dtype or float32.
        scale: The norm's result is multiplied by 1 + scale: [C] or [N, C], in x's dtype or float32.
        shift: Added after the scale: [C] or [N, C], in x's dtype or float32.
        silu: Whether to apply SiLU. If False, the activation is the identity.

    Returns:
        A tensor with x's shape, dtype and exact strides.

    Raises:
        ValueError: If an argument has an unsupported shape, dtype, device or value, or if elements of x overlap or leave gaps
            in memory. The message names the argument.
        BackendError: If the backend requested by `backend.use` or FASTDDPM_BACKEND does not support x.
    """
    _check(x, num_groups, weight, bias, eps, add, scale, shift)
    if forward_mode("group_norm_silu"):
        checked_layout(x, "x")
        y = group_norm_silu_ref(x, num_groups, weight, bias, eps, add=add, scale=scale, shift=shift, silu=silu)
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        # In x's memory order.
        return y.permute(order).contiguous().permute(sorted(range(x.dim()), key=order.__getitem__))
    y, _, _ = torch.ops.fastddpm.group_norm_silu(
        x, num_groups, weight.contiguous(), bias.contiguous(), float(eps),
        _dense(add), _dense(scale), _dense(shift), silu,
    )  # fmt: skip
    return y


def group_norm_silu_ref(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """Return what `group_norm_silu` returns, computed in plain, differentiable PyTorch.

    The arithmetic is float32, or float64 for float64 x.

    Args:
        x: As in `group_norm_silu`, in any floating dtype and any memory layout.
        num_groups: As in `group_norm_silu`.
        weight: As in `group_norm_silu`.
        bias: As in `group_norm_silu`.
        eps: As in `group_norm_silu`.
        add: As in `group_norm_silu`.
        scale: As in `group_norm_silu`.
        shift: As in `group_norm_silu`.
        silu: As in `group_norm_silu`.

    Returns:
        A tensor with x's shape and dtype.

    Raises:
        ValueError: If an argument has an unsupported shape, dtype, device or value. The message names the argument.
    """
    _check(x, num_groups, weight, bias, eps, add, scale, shift)
    return _forward_reference(x, Norm(num_groups, weight, bias, add, scale, shift, silu), eps)[0]
