"""`fuse_norms`: replace the forwards of any module's GroupNorms, and of the SiLU after them, with this package's kernel.

Modules keep their place, parameters and hooks; only their class changes, to a subclass with another forward. Inputs that the
kernel doesn't support (2-D or float64, gapped or otherwise permuted memory, CUDA's autocast) run as before.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter

import torch
from torch import nn

from .. import backend
from ..utils.modules import has_own_forward
from ..utils.warn import warn_once
from .fused_layers import FusedGroupNorm, FusedSequential, has_affine, is_norm_silu_pair

__all__ = ["FusedNorms", "fuse_norms"]
SHOWN = 5  # of the modules that were skipped


class FusedNorms:
    """What `fuse_norms` did: print it, or `undo` it.

    swapped: how many of each kind. skipped: the names of modules that have a GroupNorm and are not fused, and why.
    before: how many modules an earlier call had fused, of this module or of the one that it is a copy of.
    """

    def __init__(
        self, swapped: dict[str, int], skipped: dict[str, str], before: int, classes: list[tuple[nn.Module, type, type]]
    ) -> None:
        self.swapped, self.skipped, self.before, self._classes = swapped, skipped, before, classes

    def undo(self) -> None:
        """Give all modules torch's or diffusers' class back, those of earlier calls too, unless their class has changed since."""
        for module, kind, fused in self._classes:
            if type(module) is fused:
                module.__class__ = kind

    def __str__(self) -> str:
        done = [f"{count} {kind}" for kind, count in self.swapped.items()]
        done += [f"{self.before} modules fused before"] if self.before else []
        summary = ", ".join(done) or "nothing to fuse"
        if not self.skipped:
            return summary
        named = [f"{name or 'the module'} ({why})" for name, why in self.skipped.items()]
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        return f"{summary}; skipped: {', '.join(named[:SHOWN])}{more}"

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
    swapped, skipped, before, inside = Counter(), {}, len(classes), set()

    def swap(layer: nn.Module, fused: type) -> None:
        classes.append((layer, type(layer), fused))
        layer.__class__ = fused

    def accepts(name: str, layer: nn.Module, kind: type) -> bool:
        """Return whether the layer is of this kind; skip one that user code has changed."""
        if not isinstance(layer, kind) or type(layer) in ours:
            return False
        if type(layer) is not kind:
            skipped[name] = f"{type(layer).__name__}, a subclass of {kind.__name__}"
        elif has_own_forward(layer):
            skipped[name] = f"a {kind.__name__} with a forward put into it"
        return name not in skipped

    for name, layer in module.named_modules():
        if block is not None and accepts(name, layer, block.__base__):
            if why := block.unsupported_reason(layer):
                skipped[name] = f"a ResnetBlock2D: {why}"
                continue
            swapped["ResnetBlock2D (2 norms with SiLU each)"] += 1
            inside |= {layer.norm1, layer.norm2}
            swap(layer, block)
        elif (pairs := _norms_before_silu(layer)) and accepts(name, layer, nn.Sequential):
            swapped["GroupNorm with SiLU"] += len(set(pairs) - inside)
            inside |= set(pairs)
            swap(layer, FusedSequential)
    for name, layer in module.named_modules():
        if accepts(name, layer, nn.GroupNorm):
            if not has_affine(layer):
                skipped[name] = "a GroupNorm without weights or bias"
                continue
            swapped["GroupNorm"] += layer not in inside
            swap(layer, FusedGroupNorm)
    for p in module.parameters():
        moves = p.device.type == "cpu" and torch.cuda.is_available()  # it may be on its way to a GPU
        if not moves and (reason := backend.emulated_reason(p.device, p.dtype)):
            warn_once(module, backend.slow_module_warning(reason))
            break
    return FusedNorms({kind: count for kind, count in swapped.items() if count}, skipped, before, classes)


def _norms_before_silu(layer: nn.Module) -> list[nn.GroupNorm]:
    """Return the norms in a Sequential that have a SiLU after them."""
    pairs = itertools.pairwise(layer) if isinstance(layer, nn.Sequential) else ()
    return [norm for norm, activation in pairs if is_norm_silu_pair(norm, activation)]


def _resnet_block() -> type | None:
    """Return FusedResnetBlock2D if diffusers has been imported: without it no module has such a block."""
    if "diffusers.models.resnet" not in sys.modules:
        return None
    from .diffusers_resnet import FusedResnetBlock2D

    return FusedResnetBlock2D
