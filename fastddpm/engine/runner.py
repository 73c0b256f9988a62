"""The network as the machine wants it, for inference: same weights, another layout and dtype, t taken out of the loop.

A UNet's engine is kept from one call of `sample` to the next, as long as nothing that it was made from has changed.
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
from ..inputs.adopt import tensor_of
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
from .layers import merge, spend

# On a CPU an engine's weights take at most so many times the memory of the model's, both in the wider of the model's dtype and
# that of the products. With all its buffers the engine then stays below 1.2.
GROWTH = 1.12


class Plain:
    """Any model called as model(x, t) or model(x, t, class_labels)."""

    memory_format = torch.contiguous_format
    captured = False  # whether its steps may become a CUDA graph
    chain = None  # for the loop to keep what it has captured
    lock: threading.RLock | None = None  # held by the thread that uses it

    def __init__(self, model: Callable, device: torch.device, dtype: torch.dtype, *notices: str) -> None:
        """dtype: of x. notices: what the user should know about how the model runs, a sentence each."""
        self.model, self.device, self.dtype, self.notices = model, device, dtype, list(notices)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        return tensor_of(self.model(x, t) if class_labels is None else self.model(x, t, class_labels))

    def settings(self) -> contextlib.AbstractContextManager:
        """What must hold while it is captured or runs: a foreign model runs as its owner has set things."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def let_go(self) -> Iterator[None]:
        """Inside the block, where somebody else's code runs, other threads may use the model: nobody waits for both."""
        if self.lock is None:
            yield
            return
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()

    def per_step(self, timesteps: torch.Tensor, n: int) -> torch.Tensor:
        """What a step of n images needs of its timestep, one row for each of timesteps [S]: here t itself, [S, n]."""
        return timesteps[:, None].expand(-1, n).contiguous()

    def at(self, t: torch.Tensor) -> torch.Tensor:
        """What images with a timestep each, t int64 [N], need of them, to be given to `predict`: here t itself."""
        return t

    def predict(self, x: torch.Tensor, row: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """The network's output for x, with its timestep's row of `per_step` or its timesteps' `at`."""
        return self(x, row, class_labels)


class CopyError(RuntimeError):
    """The model cannot be copied; the message says why."""


class Engine(Plain):
    """A copy of a UNet with merged layers and channels_last weights, its timestep part computed outside the loop.

    Where all layers are this package's own, tensors that need no other layout, dtype or device are the model's own memory.
    No module of the model is referred to. On a device that does not multiply `dtype` in hardware, the weights are rounded to
    `dtype` and the network runs in float32. Raises CopyError.
    """

    memory_format = torch.channels_last

    def __init__(self, model: UNet, device: torch.device, dtype: torch.dtype) -> None:
        changed = changed_layers(model)
        # Foreign layers may write into their tensors, so that they get copies.
        shared = () if changed else (*model.parameters(), *model.buffers())
        try:
            # deepcopy and not state_dict: the module may carry hooks or replaced layers of its owner.
            network = copy.deepcopy(model, {id(v): v for v in shared}).eval()
        except RuntimeError as error:
            # Of a layer that holds a tensor computed from others, as torch's old weight_norm leaves it.
            raise CopyError(str(error).partition("\n")[0]) from error
        self.whole = "" not in changed
        left, notices = [], []

        def exact() -> list[nn.Module]:  # merging makes other ones of them
            return network.embedding_layers() if self.whole else []

        if reason := backend.emulated_reason(device, dtype):
            name = dtype_name(dtype)
            notices.append(
                f"{reason}, so the network runs in float32, with weights rounded to {name}. It is as fast as in float32, and not "
                "faster"
            )
            _round(network, dtype, exact())
            dtype = torch.float32
        if self.whole:  # else another body may read what merged layers don't keep
            left = merge(network)
            if device.type == "cpu":
                weights = sum(p.numel() * max(p.element_size(), dtype.itemsize) for p in model.parameters())
                spend(network, dtype, GROWTH * weights)
        _place(network, device, dtype, exact())
        super().__init__(network, device, dtype, *notices, *_notices(model, left or changed))
        self.captured = not changed
        self.hoisted = self.whole and model.config.classes is None

    def settings(self) -> contextlib.AbstractContextManager:
        return graphs.cudnn_for(self.device)

    def per_step(self, timesteps: torch.Tensor, n: int) -> torch.Tensor:
        """What all residual blocks add, float32 [S, their widths together], where that depends on t alone."""
        if not self.hoisted:
            return super().per_step(timesteps, n)
        parts = self.model.embed(timesteps)
        self.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1).float()

    def at(self, t: torch.Tensor) -> torch.Tensor:
        """Rows as `per_step` has them, one for each image: float32 [N, their widths together]."""
        return self.per_step(t, 1) if self.hoisted else t

    def predict(self, x: torch.Tensor, row: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        if self.hoisted:
            return self.model.body(x, row.split(self.widths, dim=-1))
        if self.whole:
            return self.model.body(x, [part.float() for part in self.model.embed(row, class_labels)])
        return super().predict(x, row, class_labels)


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


def _round(network: nn.Module, dtype: torch.dtype, exact: Iterable[nn.Module]) -> None:
    """Round the weights to `dtype`, and store them in float32. exact: modules whose weights keep all of their bits."""

    def rounded(v: torch.Tensor, stays: bool) -> torch.Tensor:
        if not v.is_floating_point():
            return v
        v = v if stays else v.to(dtype)
        return v if v.dtype == torch.float64 else v.float()

    stay = _parts(exact)
    for module in network.modules():
        _replace(module, partial(rounded, stays=module in stay))


def _place(network: nn.Module, device: torch.device, dtype: torch.dtype, exact: Iterable[nn.Module]) -> None:
    """Move and cast the weights, and make them channels_last.

    exact: modules whose dtype stays as it is; what they compute is needed once for a whole chain.
    """

    def placed(v: torch.Tensor, stays: bool) -> torch.Tensor:
        v = v.to(device, dtype if v.is_floating_point() and not stays else v.dtype)
        if v.layout != torch.strided:
            return v
        return v.contiguous(memory_format=torch.channels_last if v.dim() == 4 else torch.contiguous_format)

    stay = _parts(exact)
    for module in network.modules():
        if isinstance(module, Convolution):  # which knows when its weight is best rounded
            module.place(device, dtype)
        else:
            _replace(module, partial(placed, stays=module in stay))


# ------------------------------------------------------------------------------- what an engine is made from
OURS = {
    Attention, Downsample, GroupNormSiLU, Level, Middle, ResBlock, TimestepEmbedding, Upsample,
    nn.Conv2d, nn.Dropout, nn.Embedding, nn.Linear, nn.ModuleList,
}  # fmt: skip
METHODS = ("forward", "body", "embed", "embedding_layers", "resblocks")  # of a UNet, which the engine calls or replaces


def changed_layers(model: UNet) -> list[str]:
    """The names of modules whose code is not this package's own; "" is the model itself."""

    def ours(module: nn.Module) -> bool:
        if module is model:
            return all(getattr(type(model), name) is getattr(UNet, name) for name in METHODS)
        return type(module) in OURS

    return [name for name, module in model.named_modules() if not (ours(module) and is_unmodified(module))]


SLOWER = "Results are the same, only slower"


def _notices(model: UNet, layers: list[str]) -> list[str]:
    if not layers:
        return []
    if "" in layers:
        name = type(model).__name__
        why = "has hooks or functions put into it, or a forward of its own"
        return [f"the {name} {why}, so it runs as it is. {SLOWER}"]
    names = ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
    return [f"the network's {names}: not as fastddpm makes such layers, so they run as they are. {SLOWER}"]


# ---------------------------------------------------------------------------------------------- one per model
