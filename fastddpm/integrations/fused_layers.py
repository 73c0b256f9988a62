"""Layers that compute GroupNorm, with or without SiLU, with fastddpm's kernel instead of torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .. import backend, ops
from ..utils.modules import forward_is_unmodified


def norm_silu(
    norm: nn.GroupNorm,
    x: torch.Tensor,
    *,
    silu: bool = True,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return silu(norm(x + add) * (1 + scale) + shift), without SiLU if silu=False. Conditions are [N, C] or [1, C]."""
    conditions = {"add": add, "scale": scale, "shift": shift}
    if can_fuse(norm, x) and conditions_broadcast(x, conditions):
        return ops.group_norm_silu(
            x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, **expand_conditions(x, conditions)
        )
    add, scale, shift = (None if v is None else v.reshape(*v.shape, *[1] * (x.dim() - 2)) for v in conditions.values())
    x = x if add is None else x + add
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    y = y if scale is None else y * (1 + scale) + shift
    return F.silu(y) if silu else y


def conditions_broadcast(x: torch.Tensor, conditions: dict[str, torch.Tensor | None]) -> bool:
    """Return whether each condition has one row or one per sample. With more, torch's layers return one sample per row."""
    return all(v is None or len(v) in (1, len(x)) for v in conditions.values())


def expand_conditions(x: torch.Tensor, conditions: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """Return the conditions with one row per sample."""
    return {name: None if v is None else v.expand(len(x), -1) for name, v in conditions.items()}


def can_fuse(norm: nn.GroupNorm, x: torch.Tensor) -> bool:
    """Return whether the kernel computes what torch's group_norm does for this x, and is faster."""
    return (
        has_affine(norm)
        and x.dim() > 2
        and x.dtype != torch.float64
        and norm.weight.dtype in (x.dtype, torch.float32)
        and backend.select(x.device, x.dtype) != "reference"
        and not (x.device.type == "cuda" and torch.is_autocast_enabled("cuda"))
        and _keeps_layout(x)
        and (torch.compiler.is_compiling() or not _transformed())
    )


def _keeps_layout(x: torch.Tensor) -> bool:
    """Return whether torch's group_norm preserves x's strides, as the kernel does. If not, a caller's .view might fail."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (
        x.dim() in formats
        and x.is_contiguous(memory_format=formats[x.dim()])
        and x.stride(0) == x[0].numel()  # is_contiguous ignores this stride of a single image, but group_norm does not
    )


def _transformed() -> bool:
    """Return whether torch.func transforms or forward-mode differentiation are active; the kernel supports neither."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def has_affine(norm: nn.GroupNorm) -> bool:
    return norm.weight is not None and norm.bias is not None


def computes(layer: nn.Module, kind: type) -> bool:
    """Return whether calling the layer computes what `kind` computes and runs no hooks."""
    return type(layer) in (kind, FUSED.get(kind)) and forward_is_unmodified(layer)


class FusedGroupNorm(nn.GroupNorm):
    """A GroupNorm computed by `ops.group_norm_silu`, without SiLU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return norm_silu(self, input, silu=False)


class FusedSequential(nn.Sequential):
    """A Sequential that computes each GroupNorm and the SiLU after it in one kernel.

    Its members are unmodified, so a member or a slice computes what its class computes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, layers = input, list(self)
        while layers:
            layer = layers.pop(0)
            if layers and is_norm_silu_pair(layer, layers[0]):
                layers.pop(0)
                x = norm_silu(layer, x)
            else:
                x = layer(x)
        return x


FUSED = {nn.GroupNorm: FusedGroupNorm, nn.Sequential: FusedSequential}


def is_norm_silu_pair(norm: nn.Module, activation: nn.Module) -> bool:
    return computes(norm, nn.GroupNorm) and has_affine(norm) and computes(activation, nn.SiLU)
