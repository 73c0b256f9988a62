"""A model ready for a loop: called as it is (`Runner`), or as a UNet's engine (`EngineRunner`).

The engine has the same weights in a faster layout and dtype, fused layers, and the timestep's part computed outside the loop.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn

from .. import backend
from ..inputs.adopt import output_tensor
from ..models.unet import (
    Attention,
    Downsample,
    GroupNormSiLU,
    Level,
    Middle,
    ResBlock,
    TimestepEmbedding,
    UNet,
    Upsample,
)
from ..utils.modules import is_unmodified
from ..utils.validation import dtype_name
from . import graphs
from .convolution import Convolution
from .layers import assign_winograd, fuse_layers

# On a CPU an engine's weights take at most so many times the memory of the model's, both in the wider of the model's dtype and
# that of the products. With all its buffers the engine then stays below 1.2.
WEIGHT_GROWTH = 1.12
SAME_RESULTS = "Results are the same, only slower"


class Runner:
    """Any model, called as model(x, t) or model(x, t, class_labels).

    Attributes:
        model: the callable.
        device, dtype, memory_format: of x.
        warnings: what the user should know about how the model runs, a sentence each.
        capturable: whether its steps may become a CUDA graph.
    """

    memory_format = torch.contiguous_format

    def __init__(
        self,
        model: Callable,
        device: torch.device,
        dtype: torch.dtype,
        *,
        warnings: Iterable[str] = (),
        lock: threading.RLock | None = None,
        capturable: bool = False,
    ) -> None:
        """lock: held by the thread that runs the model."""
        self.model, self.device, self.dtype = model, device, dtype
        self.warnings, self.capturable = tuple(warnings), capturable
        self._lock = lock

    def execution_context(self) -> contextlib.AbstractContextManager:
        """What must hold while the model is captured or runs. A model that isn't the engine's runs with the caller's settings."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Release the model's lock while a callback runs, so that two threads sampling each other's models cannot deadlock."""
        if self._lock is None:
            yield
            return
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def time_inputs(self, timesteps: torch.Tensor, n: int) -> torch.Tensor:
        """What `predict` takes for each of timesteps [S] and n images: here t itself, int64 [S, n]."""
        return timesteps[:, None].expand(-1, n).contiguous()

    def time_inputs_per_image(self, t: torch.Tensor) -> torch.Tensor:
        """What `predict` takes for images with a timestep each, t int64 [N]: here t itself."""
        return t

    def predict(self, x: torch.Tensor, time_input: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """The network's output for x. time_input: an entry of `time_inputs`, or `time_inputs_per_image`."""
        arguments = (x, time_input) if class_labels is None else (x, time_input, class_labels)
        return output_tensor(self.model(*arguments))


class CopyError(RuntimeError):
    """The model cannot be copied; the message says why."""


class EngineRunner(Runner):
    """A copy of a UNet with fused layers and channels_last weights, its timestep embedding computed outside the loop.

    Where all layers are this package's own, tensors that need no other layout, dtype or device are the model's own memory.
    No module of the model is referred to. On a device that does not multiply `dtype` in hardware, the weights are rounded to
    `dtype` and the network runs in float32.
    """

    memory_format = torch.channels_last

    def __init__(
        self,
        model: UNet,
        device: torch.device,
        dtype: torch.dtype,
        *,
        warnings: Iterable[str] = (),
        lock: threading.RLock | None = None,
        capturable: bool = True,
    ) -> None:
        """Raises CopyError where the model cannot be copied. capturable: unless the model has changed layers."""
        changed = changed_layers(model)
        # Layers that are not this package's own may write into their tensors, so that they get copies.
        shared = () if changed else (*model.parameters(), *model.buffers())
        try:
            # deepcopy and not state_dict: the module may carry hooks or replaced layers.
            network = copy.deepcopy(model, {id(v): v for v in shared}).eval()
        except RuntimeError as error:
            # Of a layer that holds a tensor computed from others, as torch's old weight_norm leaves it.
            raise CopyError(str(error).partition("\n")[0]) from error
        # A body that is not the package's may read what fused layers don't keep, so that nothing is fused for it.
        self.runs_body = "" not in changed
        self.embeds_outside_loop = self.runs_body and model.config.num_classes is None
        unfused, warnings = [], list(warnings)

        def keep_dtype() -> list[nn.Module]:  # fusing replaces some of these
            return network.embedding_layers() if self.runs_body else []

        if reason := backend.emulated_reason(device, dtype):
            warnings.append(
                f"{reason}, so the network runs in float32, with weights rounded to {dtype_name(dtype)}. "
                "It is as fast as in float32, and not faster"
            )
            _round(network, dtype, keep_dtype())
            dtype = torch.float32
        if self.runs_body:
            unfused = fuse_layers(network)
            if device.type == "cpu":
                weights = sum(p.numel() * max(p.element_size(), dtype.itemsize) for p in model.parameters())
                assign_winograd(network, dtype, WEIGHT_GROWTH * weights)
        _to_device(network, device, dtype, keep_dtype())
        warnings += _change_warnings(model, unfused or changed)
        super().__init__(network, device, dtype, warnings=warnings, lock=lock, capturable=capturable and not changed)

    def execution_context(self) -> contextlib.AbstractContextManager:
        return graphs.cudnn_for(self.device)

    def time_inputs(self, timesteps: torch.Tensor, n: int) -> torch.Tensor:
        """What all residual blocks add, float32 [S, their widths together], where that depends on t alone."""
        if not self.embeds_outside_loop:
            return super().time_inputs(timesteps, n)
        parts = self.model.embed(timesteps)
        self._widths = [part.shape[1] for part in parts]  # the same in each call
        return torch.cat(parts, dim=1).float()

    def time_inputs_per_image(self, t: torch.Tensor) -> torch.Tensor:
        """Likewise, float32 [N, their widths together]."""
        return self.time_inputs(t, 1) if self.embeds_outside_loop else t

    def predict(self, x: torch.Tensor, time_input: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        if self.embeds_outside_loop:
            return self.model.body(x, time_input.split(self._widths, dim=-1))
        if self.runs_body:
            return self.model.body(x, [part.float() for part in self.model.embed(time_input, class_labels)])
        return super().predict(x, time_input, class_labels)


def _replace(module: nn.Module, converted: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put converted(v) in place of each parameter and buffer v of the module itself.

    module.to would write into parameters that are the caller's.
    """
    for name, v in module._parameters.items():
        if v is not None:
            module._parameters[name] = nn.Parameter(converted(v.detach()), requires_grad=False)
    for name, v in module._buffers.items():
        if v is not None:
            module._buffers[name] = converted(v.detach())


def _parts(modules: Iterable[nn.Module]) -> set[nn.Module]:
    return {part for module in modules for part in module.modules()}


def _round(network: nn.Module, dtype: torch.dtype, keep_dtype: Iterable[nn.Module]) -> None:
    """Round the weights to `dtype`, and store them in float32. keep_dtype: modules whose weights keep all of their bits."""

    def rounded(v: torch.Tensor, keeps: bool) -> torch.Tensor:
        if not v.is_floating_point():
            return v
        v = v if keeps else v.to(dtype)
        return v if v.dtype == torch.float64 else v.float()

    kept = _parts(keep_dtype)
    for module in network.modules():
        _replace(module, partial(rounded, keeps=module in kept))


def _to_device(network: nn.Module, device: torch.device, dtype: torch.dtype, keep_dtype: Iterable[nn.Module]) -> None:
    """Move and cast the weights, and make them channels_last.

    keep_dtype: modules whose dtype stays as it is; what they compute is needed once for a whole chain.
    """

    def moved(v: torch.Tensor, keeps: bool) -> torch.Tensor:
        v = v.to(device, dtype if v.is_floating_point() and not keeps else v.dtype)
        if v.layout != torch.strided:
            return v
        return v.contiguous(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)

    kept = _parts(keep_dtype)
    for module in network.modules():
        if isinstance(module, Convolution):  # which knows when its weight is best rounded
            module.to_device(device, dtype)
        else:
            _replace(module, partial(moved, keeps=module in kept))


# ------------------------------------------------------------------------------- what an engine is made from

KNOWN_LAYERS = {
    Attention, Downsample, GroupNormSiLU, Level, Middle, ResBlock, TimestepEmbedding, Upsample,
    nn.Conv2d, nn.Dropout, nn.Embedding, nn.Linear, nn.ModuleList,
}  # fmt: skip
METHODS = ("forward", "body", "embed", "embedding_layers", "resblocks")  # of a UNet, which the engine calls or replaces


def changed_layers(model: UNet) -> list[str]:
    """The names of modules whose code is not this package's own; "" is the model itself."""

    def is_known(module: nn.Module) -> bool:
        if module is model:
            return all(getattr(type(model), name) is getattr(UNet, name) for name in METHODS)
        return type(module) in KNOWN_LAYERS

    return [name for name, module in model.named_modules() if not (is_known(module) and is_unmodified(module))]


def _change_warnings(model: UNet, layers: list[str]) -> list[str]:
    """A warning for layers that run unfused; "" is the model itself."""
    if not layers:
        return []
    if "" in layers:
        name = type(model).__name__
        why = "has hooks or functions put into it, or a forward of its own"
        return [f"the {name} {why}, so it runs as it is. {SAME_RESULTS}"]
    names = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return [f"the network's {names}: not as fastddpm makes such layers, so they run as they are. {SAME_RESULTS}"]
