"""The network as the machine wants it, for inference: same weights, another layout and dtype, t taken out of the loop."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .merged import merge
from .unet import UNet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Plain:
    """Any model called as model(x, t) or model(x, t, class_labels)."""

    memory_format = torch.contiguous_format

    def __init__(self, model: Callable, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype

    def __call__(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        return self.model(x, t) if class_labels is None else self.model(x, t, class_labels)


class Engine(Plain):
    """A copy of a UNet with merged layers and channels_last weights, its timestep part computed for all steps at once."""

    memory_format = torch.channels_last

    def __init__(self, model: UNet, device: torch.device, dtype: torch.dtype) -> None:
        # deepcopy and not state_dict: the module may carry hooks or replaced layers of its owner.
        network = copy.deepcopy(model).eval()
        if type(network).body is UNet.body:  # another body may read what merged layers don't keep
            merge(network)
        network.to(device, dtype, memory_format=torch.channels_last)
        super().__init__(network, dtype)

    def body(self, x: torch.Tensor, embedding: list[torch.Tensor]) -> torch.Tensor:
        return self.model.body(x, embedding)


def table_embedding(net: Plain, timesteps: torch.Tensor) -> list[torch.Tensor] | None:
    """What every residual block adds at every step, [S, width] each, where that depends on t alone; else None."""
    if not isinstance(net, Engine) or net.model.config.classes is not None:
        return None
    return [part.float() for part in net.model.embed(timesteps)]


@contextlib.contextmanager
def network(model: nn.Module | Callable, device: torch.device, dtype: torch.dtype | None) -> Iterator[Plain]:
    """The model ready for the loop on `device` in `dtype`; the caller's module is never changed, its mode restored."""
    if not isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(
                f"dtype: {dtype} was asked for, but a bare callable cannot be cast; cast it yourself and leave dtype"
            )
        yield Plain(model, torch.float32)
        return
    parameter = next(model.parameters(), None)
    own = torch.float32 if parameter is None else parameter.dtype
    dtype = own if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; expected float32, bfloat16 or float16")
    if isinstance(model, UNet):
        yield Engine(model, device, dtype)
        return
    moved = dtype != own or (parameter is not None and parameter.device.type != device.type)
    used = copy.deepcopy(model).to(device, dtype) if moved else model
    modes = [(module, module.training) for module in used.modules()]
    used.eval()
    try:
        yield Plain(used, dtype)
    finally:
        for module, training in modes:
            module.training = training
