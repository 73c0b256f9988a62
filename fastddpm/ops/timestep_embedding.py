"""Sinusoidal timestep embedding (Ho et al. 2020, after Vaswani et al. 2017).

    half = dim // 2,   f_k = exp(-ln(max_period) k / (half - freq_shift)),   [sin(t f), cos(t f)], zero-padded for odd dim

The paper uses max_period 10000, freq_shift 1 and sines first. Later codebases use other values.
"""

from __future__ import annotations

import math

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._register import forward_mode, register


def _rate(dim: int, max_period: float, freq_shift: float) -> float:
    """Return the rate in f_k = exp(-rate k)."""
    return math.log(max_period) / (dim // 2 - freq_shift)


def _out_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _reference(t: torch.Tensor, dim: int, max_period: float, flip_sin_to_cos: bool, freq_shift: float) -> torch.Tensor:
    k = torch.arange(dim // 2, dtype=torch.float64, device=t.device)
    angles = t.double()[:, None] * torch.exp(-_rate(dim, max_period, freq_shift) * k)
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return torch.nn.functional.pad(torch.cat(parts, dim=1), (0, dim % 2)).to(_out_dtype(t))


def _implementation(t, dim, max_period, flip_sin_to_cos, freq_shift):
    kind = backend.select(t.device, _out_dtype(t))
    if kind == "reference":
        return _reference(t, dim, max_period, flip_sin_to_cos, freq_shift)
    out = torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)
    rate = _rate(dim, max_period, freq_shift)
    if kind == "triton":
        from ._triton import timestep_embedding as triton_kernels

        triton_kernels.timestep_embedding(out, t, rate, flip_sin_to_cos)
    else:
        b, where = backend.buffer, backend.launch_target(kind, t.device)
        backend.native.timestep_embedding(b(out), b(t), t.shape[0], dim, rate, flip_sin_to_cos, where)
    return out


def _fake(t, dim, max_period, flip_sin_to_cos, freq_shift):
    return t.new_empty((t.shape[0], dim), dtype=_out_dtype(t))


register(
    "timestep_embedding(Tensor t, int dim, float max_period, bool flip_sin_to_cos, float freq_shift) -> Tensor",
    _implementation,
    _fake,
)


def _check(t: torch.Tensor, dim: int, max_period: float, freq_shift: float) -> None:
    if t.dim() != 1 or t.dtype not in (torch.int64, torch.float32, torch.float64):
        raise ValueError(f"t: got {dtype_name(t.dtype)} {list(t.shape)}; expected int64 or float32 [N]")
    if dim < 2 or dim // 2 == freq_shift:
        raise ValueError(f"dim: got {dim} with freq_shift {freq_shift}; expected dim >= 2 and dim // 2 != freq_shift")
    if not max_period > 0:
        raise ValueError(f"max_period: got {max_period}; expected a positive number")


def timestep_embedding(
    t: torch.Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip_sin_to_cos: bool = False,
    freq_shift: float = 1,
) -> torch.Tensor:
    """Return the sinusoidal embedding of timesteps (Ho et al. 2020, after Vaswani et al. 2017).

        half = dim // 2,    f_k = exp(-ln(max_period) k / (half - freq_shift)),    k = 0..half - 1
        out  = [sin(t f), cos(t f)], padded with a zero if dim is odd

    Args:
        t: The timesteps, int64 or float32 [N] with |t| <= 10^6, or float64 [N], which runs the reference.
        dim: The number of columns, at least 2.
        max_period: The period of the slowest frequency is 2 pi max_period if freq_shift is 1. Positive; the paper uses 10000.
        flip_sin_to_cos: Whether the cosines come first.
        freq_shift: Subtracted from dim // 2 in the frequencies, so it must differ from dim // 2. The paper uses 1.

    Returns:
        float32 [N, dim], within 2e-6 of the formula in float64; float64 [N, dim] for float64 t.

    Raises:
        ValueError: If t has another shape or dtype, dim < 2, dim // 2 == freq_shift (a division by 0) or max_period <= 0.
        BackendError: If the requested backend does not support t's device.
    """
    _check(t, dim, max_period, freq_shift)
    if t.is_floating_point() and forward_mode("timestep_embedding"):
        return _reference(t, dim, float(max_period), flip_sin_to_cos, float(freq_shift))
    return torch.ops.fastddpm.timestep_embedding(
        t.contiguous(), dim, float(max_period), flip_sin_to_cos, float(freq_shift)
    )


def timestep_embedding_ref(
    t: torch.Tensor,
    dim: int,
    *,
    max_period: float = 10000.0,
    flip_sin_to_cos: bool = False,
    freq_shift: float = 1,
) -> torch.Tensor:
    """Return what `timestep_embedding` returns, computed in plain PyTorch: in float64, rounded once to the result's dtype.

    Args:
        t: As in `timestep_embedding`.
        dim: As in `timestep_embedding`.
        max_period: As in `timestep_embedding`.
        flip_sin_to_cos: As in `timestep_embedding`.
        freq_shift: As in `timestep_embedding`.

    Returns:
        float32 [N, dim], or float64 [N, dim] for float64 t.

    Raises:
        ValueError: If t has another shape or dtype, dim < 2, dim // 2 == freq_shift or max_period <= 0.
    """
    _check(t, dim, max_period, freq_shift)
    return _reference(t, dim, float(max_period), flip_sin_to_cos, float(freq_shift))
