"""The torch.library namespace "fastddpm" and the tensor checks that every op shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.autograd import forward_ad

from .. import backend

library = torch.library.Library("fastddpm", "DEF")

UINT64 = 1 << 64


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define fastddpm::<op> for every device: the backend is chosen inside the implementation."""
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastddpm::{name}", fake, lib=library)


def forward_mode(op: str) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, jacfwd, dual tensors) is at work, so that the reference has to serve.

    Kernels have no rule for it, and torch would drop the tangents without a word. A backend that was asked for refuses.
    """
    if forward_ad._current_level < 0:
        return False
    if backend.chosen() not in (None, "reference"):
        raise backend.BackendError(
            f"{op}: backend {backend.chosen()!r} was asked for, but only the reference has forward-mode derivatives "
            "(torch.func.jvp, jacfwd); choose that, or none"
        )
    return True


def has_tangent(v: torch.Tensor | None) -> bool:
    return v is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(v).tangent is not None


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_int64_bits(seed: int) -> int:
    """A seed in [0, 2^64) as the int64 with the same bits, as it crosses op schemas."""
    return seed - UINT64 if seed >= UINT64 // 2 else seed


def plain(value: object) -> object:
    """A number of NumPy's, or a tensor or array of no dimensions, as Python's own number; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    return value


def check_seed(seed: object, name: str = "seed") -> int:
    seed = plain(seed)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < UINT64:
        raise ValueError(f"{name}: got {seed!r}; expected an int in [0, 2^64)")
    return seed


def check_first(first: object, name: str = "first") -> int:
    first = plain(first)
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < 1 << 56:
        raise ValueError(f"{name}: got {first!r}; expected an int in [0, 2^56)")
    return first


def layout(x: torch.Tensor) -> str:
    """The memory layout of x [N, C, *spatial], judged by strides, ignoring size-1 dimensions.

    "outer": channels outer (contiguous); "inner": channels inner (channels_last); "dense": another permutation
    without gaps; "gapped": elements overlap or leave gaps. Where both native layouts fit, "outer".
    """
    if x.is_contiguous():
        return "outer"
    if x.numel() == 0:
        return "outer"
    if _is_dense_in_order(x, (0, *range(2, x.dim()), 1)):
        return "inner"
    by_stride = sorted((d for d in range(x.dim()) if x.shape[d] != 1), key=lambda d: -x.stride(d))
    return "dense" if _is_dense_in_order(x, tuple(by_stride)) else "gapped"


def _is_dense_in_order(x: torch.Tensor, order: tuple[int, ...]) -> bool:
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1:
            if x.stride(d) != expected:
                return False
            expected *= x.shape[d]
    return True


def native_layout(x: torch.Tensor, name: str) -> str:
    """layout(x), with an error where elements overlap or leave gaps."""
    kind = layout(x)
    if kind == "gapped":
        raise ValueError(
            f"{name}: shape {tuple(x.shape)} with strides {x.stride()} overlaps or leaves gaps; "
            f"pass {name}.contiguous() or {name}.contiguous(memory_format=torch.channels_last)"
        )
    return kind
