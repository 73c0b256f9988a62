"""The torch.library namespace "fastddpm" and the tensor checks that every op shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .. import backend

library = torch.library.Library("fastddpm", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define fastddpm::<op> for every device. The implementation itself chooses the backend."""
    name = schema.split("(", 1)[0]
    library.define(schema)
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastddpm::{name}", fake, lib=library)


def forward_mode(op: str) -> bool:
    """Return whether forward-mode differentiation (torch.func.jvp, jacfwd, dual tensors) is active.

    The op must then run its reference: the kernels have no forward-mode rule, and torch would drop the tangents silently.
    Raises BackendError if the user requested any other backend.
    """
    if forward_ad._current_level < 0:
        return False
    if backend.requested_backend() not in (None, "reference"):
        raise backend.BackendError(
            f"{op}: backend {backend.requested_backend()!r} was requested, but only the reference has forward-mode derivatives "
            "(torch.func.jvp, jacfwd); choose backend 'reference' or None"
        )
    return True


def has_tangent(v: torch.Tensor | None) -> bool:
    return v is not None and forward_ad._current_level >= 0 and forward_ad.unpack_dual(v).tangent is not None


def layout(x: torch.Tensor) -> str:
    """Return the memory layout of x [N, C, *spatial]. Dimensions of size 1 are ignored.

    "contiguous" and "channels_last" are the layouts that the kernels support; a tensor that has both is "contiguous".
    "dense" is any other permutation without gaps. "gapped" means that elements overlap or leave gaps.
    """
    if x.is_contiguous():
        return "contiguous"
    if x.numel() == 0:
        return "contiguous"
    if _is_dense_in_order(x, (0, *range(2, x.dim()), 1)):
        return "channels_last"
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


def checked_layout(x: torch.Tensor, name: str) -> str:
    """Return layout(x); raise ValueError if elements overlap or leave gaps."""
    kind = layout(x)
    if kind == "gapped":
        raise ValueError(
            f"{name}: shape {tuple(x.shape)} with strides {x.stride()} overlaps or leaves gaps; "
            f"pass {name}.contiguous() or {name}.contiguous(memory_format=torch.channels_last)"
        )
    return kind
