"""`fuse_norms`: a module of anybody's with its GroupNorms, and the SiLU behind them, in this package's kernel.

Modules keep their place, parameters and hooks; only their class changes, to a subclass with another forward. What the kernel
doesn't serve (2-D or float64 inputs, gapped or otherwise permuted memory, CUDA's autocast) goes on as before.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from . import backend, ops
from .notices import warn_once

__all__ = ["FusedNorms", "fuse_norms"]

SHOWN = 5  # of the modules that were left


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
        and backend.choose(x.device, x.dtype) != "reference"
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


def plain(layer: nn.Module, kind: type) -> bool:
    """Whether its code is that of `kind`, and nobody looks into it by hooks."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) in (kind, FUSED.get(kind)) and not _overridden(layer) and not any(hooks)


def _overridden(layer: nn.Module) -> bool:
    return "forward" in layer.__dict__  # not vars(layer), which torch 2.6 doesn't compile


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
    return plain(norm, nn.GroupNorm) and weighted(norm) and plain(activation, nn.SiLU)


class FusedNorms:
    """What `fuse_norms` did: print it, or `undo` it.

    swapped: how many of each kind. left: what has a GroupNorm of another kind, and why it was left, by the module's name.
    before: how many modules an earlier call had fused, of this module or of the one that it is a copy of.
    """

    def __init__(
        self, swapped: dict[str, int], left: dict[str, str], before: int, classes: list[tuple[nn.Module, type, type]]
    ) -> None:
        self.swapped, self.left, self.before, self._classes = swapped, left, before, classes

    def undo(self) -> None:
        """Give all modules torch's or diffusers' class back, those of earlier calls too; not what has got another one since."""
        for module, kind, fused in self._classes:
            if type(module) is fused:
                module.__class__ = kind

    def __str__(self) -> str:
        done = [f"{count} {kind}" for kind, count in self.swapped.items()]
        done += [f"{self.before} modules fused before"] if self.before else []
        said = ", ".join(done) or "nothing to fuse"
        if not self.left:
            return said
        named = [f"{name or 'the module'} ({why})" for name, why in self.left.items()]
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        return f"{said}; left: {', '.join(named[:SHOWN])}{more}"

    def __repr__(self) -> str:
        return f"<FusedNorms: {self}>"


def fuse_norms(module: nn.Module) -> FusedNorms:
    """Let the GroupNorms in `module` run by `ops.group_norm_silu`, in place, and say which.

    diffusers' ResnetBlock2D with SiLU as a whole: both norms with the SiLU behind them, and the timestep's embedding added, or
    scaled and shifted by, in the second one's pass. A Sequential with a GroupNorm and a SiLU behind it: those two at once.
    Other GroupNorms without a SiLU. Subclasses of these, and what has a forward put into it, are somebody's own code and stay, as
    do norms without weights or bias; a pair or block with hooks on its members runs unfused. Names, parameters, state dicts
    and hooks are as before; but hooks for all modules at once, and what counts operations, miss what runs as one kernel. It is
    differentiable once; copies stay fused, and who loads a pickle of one needs fastddpm.

    Returns a `FusedNorms`: print it to see what was swapped, and call its `undo()` to have it all back.
    On a CPU, where convolutions take nearly all of the time, norms alone gain next to nothing. There a ResnetBlock2D's
    convolutions take their norms with them as well, by Winograd's method: in float32, without gradients, with widths divisible
    by 32 and even sides. Raises TypeError for what is not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}; expected a torch.nn.Module")
    block = _resnet_block()
    ours = (FusedGroupNorm, FusedSequential, block)
    classes = [(layer, type(layer).__base__, type(layer)) for layer in module.modules() if type(layer) in ours]
    swapped, left, before, inside = Counter(), {}, len(classes), set()

    def swap(layer: nn.Module, fused: type) -> None:
        classes.append((layer, type(layer), fused))
        layer.__class__ = fused

    def taken(name: str, layer: nn.Module, kind: type) -> bool:
        """Whether it is of this kind; what is somebody's own variant of it is left."""
        if not isinstance(layer, kind) or type(layer) in ours:
            return False
        if type(layer) is not kind:
            left[name] = f"{type(layer).__name__}, a subclass of {kind.__name__}"
        elif _overridden(layer):
            left[name] = f"a {kind.__name__} with a forward put into it"
        return name not in left

    for name, layer in module.named_modules():
        if block is not None and taken(name, layer, block.__base__):
            if why := block.why_not(layer):
                left[name] = f"a ResnetBlock2D: {why}"
                continue
            swapped["ResnetBlock2D (2 norms with SiLU each)"] += 1
            inside |= {layer.norm1, layer.norm2}
            swap(layer, block)
        elif (pairs := _pairs(layer)) and taken(name, layer, nn.Sequential):
            swapped["GroupNorm with SiLU"] += len(set(pairs) - inside)
            inside |= set(pairs)
            swap(layer, FusedSequential)
    for name, layer in module.named_modules():
        if taken(name, layer, nn.GroupNorm):
            if not weighted(layer):
                left[name] = "a GroupNorm without weights or bias"
                continue
            swapped["GroupNorm"] += layer not in inside
            swap(layer, FusedGroupNorm)
    for p in module.parameters():
        moves = p.device.type == "cpu" and torch.cuda.is_available()  # it may be on its way to a GPU
        if not moves and (reason := backend.no_products(p.device, p.dtype)):
            warn_once(module, backend.slow_module(reason))
            break
    return FusedNorms({kind: count for kind, count in swapped.items() if count}, left, before, classes)


def _pairs(layer: nn.Module) -> list[nn.GroupNorm]:
    """The norms in a Sequential that have a SiLU behind them."""
    return [a for a, b in itertools.pairwise(layer) if _pair(a, b)] if isinstance(layer, nn.Sequential) else []


def _resnet_block() -> type | None:
    """FusedResnetBlock2D, where diffusers has been imported: else nobody has such a block."""
    if "diffusers.models.resnet" not in sys.modules:
        return None
    from .integrations.resnet_block import FusedResnetBlock2D

    return FusedResnetBlock2D
