"""GroupNorm, and GroupNorm with SiLU, by this package's kernel, in place of torch's layers."""

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
    """silu(norm(x + add) * (1 + scale) + shift) with add, scale and shift [N, C] or [1, C]; silu=False leaves that out."""
    given = {"add": add, "scale": scale, "shift": shift}
    if serves(norm, x) and rows_fit(x, given):
        return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, **as_rows(x, given))
    add, scale, shift = (None if v is None else v.reshape(*v.shape, *[1] * (x.dim() - 2)) for v in given.values())
    x = x if add is None else x + add
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    y = y if scale is None else y * (1 + scale) + shift
    return F.silu(y) if silu else y


def rows_fit(x: torch.Tensor, given: dict[str, torch.Tensor | None]) -> bool:
    """Where there are more rows than samples, the result has as many samples as rows: torch's way to call a block."""
    return all(v is None or len(v) in (1, len(x)) for v in given.values())


def as_rows(x: torch.Tensor, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
    """One for each sample."""
    return {name: None if v is None else v.expand(len(x), -1) for name, v in given.items()}


def serves(norm: nn.GroupNorm, x: torch.Tensor) -> bool:
    """Whether the kernel is what torch's group_norm is for this x, and the faster one."""
    return (
        weighted(norm)
        and x.dim() > 2
        and x.dtype != torch.float64
        and norm.weight.dtype in (x.dtype, torch.float32)
        and backend.select(x.device, x.dtype) != "reference"
        and not (x.device.type == "cuda" and torch.is_autocast_enabled("cuda"))
        and _keeps_layout(x)
        and (torch.compiler.is_compiling() or not _transformed())
    )


def _keeps_layout(x: torch.Tensor) -> bool:
    """Whether torch's group_norm gives its result x's strides, as the kernel does: elsewhere a caller's .view might fail."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.is_contiguous() or (
        x.dim() in formats
        and x.is_contiguous(memory_format=formats[x.dim()])
        and x.stride(0) == x[0].numel()  # of a single image is_contiguous doesn't ask it, but group_norm does
    )


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, for which the kernel has no rules."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def weighted(norm: nn.GroupNorm) -> bool:
    return norm.weight is not None and norm.bias is not None


def computes(layer: nn.Module, kind: type) -> bool:
    """Return whether a call of the layer computes what `kind` computes, and runs no hooks."""
    return type(layer) in (kind, FUSED.get(kind)) and forward_is_unmodified(layer)


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm by `ops.group_norm_silu`, without a SiLU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return norm_silu(self, input, silu=False)


class FusedSequential(nn.Sequential):
    """Sequential that runs a GroupNorm and the SiLU behind it at once.

    Its members stay as they are: whoever takes one of them, or a slice, gets what it says.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, layers = input, list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _pair(layer, layers[0]):
                layers.pop(0)
                x = norm_silu(layer, x)
            else:
                x = layer(x)
        return x


FUSED = {nn.GroupNorm: FusedGroupNorm, nn.Sequential: FusedSequential}


def _pair(norm: nn.Module, activation: nn.Module) -> bool:
    return computes(norm, nn.GroupNorm) and weighted(norm) and computes(activation, nn.SiLU)
