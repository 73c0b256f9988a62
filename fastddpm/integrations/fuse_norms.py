"""Replace the forward of a module's GroupNorms, and of the SiLU after them, with fastddpm's kernel, in place.

Modules keep their names, parameters and hooks. Only their class changes, to a subclass with another forward. Inputs that the
kernel does not support run as before: 2-D or float64 tensors, gapped or permuted memory, and tensors under CUDA's autocast.
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
SHOWN = 5  # skipped modules that a report names


class FusedNorms:
    """The report of a `fuse_norms` call. Print it for a summary; call `undo` to restore the modules.

    Attributes:
        swapped: The number of modules that the call fused, by kind.
        skipped: The reason for each module that has a GroupNorm but is not fused, by module name.
        before: The number of modules that were already fused, by an earlier call or as copies of fused modules.
    """

    def __init__(
        self, swapped: dict[str, int], skipped: dict[str, str], before: int, classes: list[tuple[nn.Module, type, type]]
    ) -> None:
        self.swapped, self.skipped, self.before, self._classes = swapped, skipped, before, classes

    def undo(self) -> None:
        """Restore the original class of all fused modules, those of earlier calls included, unless it has been changed since."""
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
    """Run the GroupNorms in `module` with `ops.group_norm_silu`, in place, and return a report.

    Three kinds of modules are fused:

    - diffusers' ResnetBlock2D with SiLU: each norm with its SiLU. The second norm's kernel also adds the timestep embedding, or
      scales and shifts by it.
    - A Sequential in which a SiLU follows a GroupNorm: the two together.
    - Any other GroupNorm, without a SiLU.

    Subclasses of these, modules with an overridden `forward`, and norms without a weight or bias are left unchanged. A pair or
    block with hooks on its members runs unfused. Names, parameters, state dicts and hooks do not change. Global module hooks
    and operation counters do not see the layers inside a fused kernel. A fused module is differentiable once. Its copies are
    fused, too, and unpickling it requires fastddpm.

    On a CPU convolutions take nearly all of the time, so fused norms alone gain almost nothing. There the convolutions of a
    ResnetBlock2D also compute their norms, by Winograd's method. This requires float32, no gradients, channel counts divisible
    by 32, and even heights and widths.

    Args:
        module: The module to change, of any class.

    Returns:
        A `FusedNorms`. Print it to see which modules were fused; call its `undo()` to restore them.

    Raises:
        TypeError: If `module` is not a torch.nn.Module.
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
        """Return whether the layer is of this kind; record it as skipped if user code has changed it."""
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
        moves = p.device.type == "cpu" and torch.cuda.is_available()  # the caller may move it to a GPU later
        if not moves and (reason := backend.emulated_reason(p.device, p.dtype)):
            warn_once(module, backend.slow_module_warning(reason))
            break
    return FusedNorms({kind: count for kind, count in swapped.items() if count}, skipped, before, classes)


def _norms_before_silu(layer: nn.Module) -> list[nn.GroupNorm]:
    """Return the norms in a Sequential that a SiLU follows."""
    pairs = itertools.pairwise(layer) if isinstance(layer, nn.Sequential) else ()
    return [norm for norm, activation in pairs if is_norm_silu_pair(norm, activation)]


def _resnet_block() -> type | None:
    """Return FusedResnetBlock2D, or None if diffusers has not been imported, as no module then has such a block."""
    if "diffusers.models.resnet" not in sys.modules:
        return None
    from .diffusers_resnet import FusedResnetBlock2D

    return FusedResnetBlock2D
