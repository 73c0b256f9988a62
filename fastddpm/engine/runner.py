"""Runners of a model in a loop: `Runner` calls it unmodified, `EngineRunner` runs a UNet's engine.

The engine has the same weights in a faster layout and dtype, and fused layers. It embeds the timesteps outside the loop.
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

# Upper bound on the memory of an engine's weights on a CPU, as a multiple of the model's. Both are counted in the wider of the
# model's dtype and that of the products. With all its buffers the engine then stays below 1.2 times the model's memory.
WEIGHT_GROWTH = 1.12
SAME_RESULTS = "Results are the same, only slower"


class Runner:
    """A runner of any model, called as model(x, t) or model(x, t, class_labels).

    Attributes:
        model: The callable.
        device: Device of x.
        dtype: dtype of x.
        memory_format: Memory format of x.
        warnings: Sentences for the caller on how the model runs.
        capturable: Whether steps may be captured as a CUDA graph.
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
        """Set the attributes. lock: the model's lock, which the running thread holds."""
        self.model, self.device, self.dtype = model, device, dtype
        self.warnings, self.capturable = tuple(warnings), capturable
        self._lock = lock

    def execution_context(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model is captured and runs. Only an engine changes the caller's settings."""
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
        """Return the time input of `predict` for each of timesteps [S], for n images: here t itself, int64 [S, n]."""
        return timesteps[:, None].expand(-1, n).contiguous()

    def time_inputs_per_image(self, t: torch.Tensor) -> torch.Tensor:
        """Return the time input of `predict` if each image has its own timestep, t int64 [N]: here t itself."""
        return t

    def predict(self, x: torch.Tensor, time_input: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Return the network's output for x. time_input: an entry of `time_inputs`, or `time_inputs_per_image`."""
        arguments = (x, time_input) if class_labels is None else (x, time_input, class_labels)
        return output_tensor(self.model(*arguments))


class CopyError(RuntimeError):
    """The model cannot be copied. The message gives the reason."""


class EngineRunner(Runner):
    """A runner of a UNet's copy with fused layers and channels_last weights, which embeds timesteps outside the loop.

    If all layers are unmodified, the copy shares the model's tensors that need no conversion. It never references the model's
    modules. On a device that does not multiply `dtype` in hardware, the weights are rounded to `dtype` and the network runs in
    float32.
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
        """Make the copy. Raise CopyError if that fails. capturable: ignored if the model has changed layers."""
        changed = changed_layers(model)
        # Layers of user code may write into their tensors, and therefore receive copies.
        shared = () if changed else (*model.parameters(), *model.buffers())
        try:
            # deepcopy and not state_dict: the module may carry hooks or replaced layers.
            network = copy.deepcopy(model, {id(v): v for v in shared}).eval()
        except RuntimeError as error:
            # A layer may hold a tensor computed from others, as torch's old weight_norm does.
            raise CopyError(str(error).partition("\n")[0]) from error
        # A body of user code may read weights that fused layers free, so that no layer is fused for it.
        self.runs_body = "" not in changed
        self.embeds_outside_loop = self.runs_body and model.config.num_classes is None
        unfused, warnings = [], list(warnings)

        def keep_dtype() -> list[nn.Module]:  # fusing replaces some of these
            return network.embedding_layers() if self.runs_body else []

        if reason := backend.emulated_reason(device, dtype):
            warnings.append(
                f"{reason}, so the network runs in float32, with weights rounded to {dtype_name(dtype)}. "
                "This is no faster than dtype=torch.float32"
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
        """Return the embeddings of all residual blocks, float32 [S, total width], unless they also depend on class labels."""
        if not self.embeds_outside_loop:
            return super().time_inputs(timesteps, n)
        parts = self.model.embed(timesteps)
        self._widths = [part.shape[1] for part in parts]  # the same in each call
        return torch.cat(parts, dim=1).float()

    def time_inputs_per_image(self, t: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of all residual blocks, float32 [N, total width], or t as in `time_inputs`."""
        return self.time_inputs(t, 1) if self.embeds_outside_loop else t

    def predict(self, x: torch.Tensor, time_input: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        if self.embeds_outside_loop:
            return self.model.body(x, time_input.split(self._widths, dim=-1))
        if self.runs_body:
            return self.model.body(x, [part.float() for part in self.model.embed(time_input, class_labels)])
        return super().predict(x, time_input, class_labels)


def _replace(module: nn.Module, converted: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace each parameter and buffer v of the module itself by converted(v).

    module.to would write into the caller's parameters.
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
    """Round the weights to `dtype`, and store them in float32. keep_dtype: modules whose weights are not rounded."""

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

    keep_dtype: modules whose dtype does not change, as they run only once for a whole chain.
    """

    def moved(v: torch.Tensor, keeps: bool) -> torch.Tensor:
        v = v.to(device, dtype if v.is_floating_point() and not keeps else v.dtype)
        if v.layout != torch.strided:
            return v
        return v.contiguous(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)

    kept = _parts(keep_dtype)
    for module in network.modules():
        if isinstance(module, Convolution):  # which chooses when to round its weight
            module.to_device(device, dtype)
        else:
            _replace(module, partial(moved, keeps=module in kept))


# ------------------------------------------------------------------------------- modified layers

KNOWN_LAYERS = {
    Attention, Downsample, GroupNormSiLU, Level, Middle, ResBlock, TimestepEmbedding, Upsample,
    nn.Conv2d, nn.Dropout, nn.Embedding, nn.Linear, nn.ModuleList,
}  # fmt: skip
METHODS = ("forward", "body", "embed", "embedding_layers", "resblocks")  # of a UNet, which the engine calls or replaces


def changed_layers(model: UNet) -> list[str]:
    """Return the names of modules that user code has modified or replaced. "" is the model itself."""

    def is_known(module: nn.Module) -> bool:
        if module is model:
            return all(getattr(type(model), name) is getattr(UNet, name) for name in METHODS)
        return type(module) in KNOWN_LAYERS

    return [name for name, module in model.named_modules() if not (is_known(module) and is_unmodified(module))]


def _change_warnings(model: UNet, layers: list[str]) -> list[str]:
    """Return the warnings for layers that run unfused. "" is the model itself."""
    if not layers:
        return []
    if "" in layers:
        name = type(model).__name__
        why = "has hooks, functions set on it, or overridden methods"
        return [f"the {name} {why}, so it runs unmodified. {SAME_RESULTS}"]
    names = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return [f"the network's {names}: not fastddpm's own layers, so they run unmodified. {SAME_RESULTS}"]
