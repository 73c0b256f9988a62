"""What every format is read into, and a network from that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..schedule import Schedule
from ..unet import UNet, UNetConfig

SHOWN = 3  # of the keys that differ


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: what is wrong, and with which file."""


@dataclasses.dataclass
class Read:
    """A checkpoint, whichever its format.

    path: of the weights, for messages. state: tensors by UNet's names, of any floating-point dtype. averaged: True where
    something says that the weights are averages over training (EMA). notes: what whoever loads it has to know.
    """

    format: str
    path: Path
    config: UNetConfig
    state: dict[str, torch.Tensor]
    schedule: Schedule
    prediction: str
    variance: str
    clip: bool | float
    averaged: bool | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def build(read: Read) -> UNet:
    """The network, in float32, in eval mode and on torch's default device, with tensors of its own: the file may change."""
    for name, value in read.state.items():
        if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
            raise CheckpointError(f"{read.path}: {name} isn't a plain tensor with memory of its own; save it as one")
    device = torch.empty(0).device
    with ThreadPoolExecutor(1) as reader:  # while the modules are made, which takes half as long
        reading = reader.submit(_copied, read.state, device)
        with _Unfilled():
            model = UNet(
                read.config, schedule=read.schedule, prediction=read.prediction, variance=read.variance, clip=read.clip
            )
        check(model.state_dict(), read.state, read.path)
        model.load_state_dict(reading.result(), assign=True)
    return model.eval()


def _copied(state: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Also of float32: a tensor that a file was mapped for reads the file when it is used, and lies at any address."""
    kind = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    return {name: value.to(device, **kind) for name, value in state.items()}


def multiples(widths: Iterable[int], channels: int) -> tuple[int | float, ...]:
    """UNetConfig.multipliers; ints where they are."""
    return tuple(width / channels if width % channels else width // channels for width in widths)


class _Unfilled(TorchFunctionMode):
    """Modules are made without memory, and nobody fills it: drawing initial weights takes ten times what reading does."""

    MAKE = (torch.empty, torch.ones, torch.zeros)
    FILL = (torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.zero_, nn.init.kaiming_uniform_,
            nn.init.uniform_, nn.init.normal_)  # fmt: skip

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FILL:
            return args[0] if args else kwargs["tensor"]
        if func in self.MAKE and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def check(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise CheckpointError unless `state` has the names and shapes of `own`: what differs, and the likely cause."""
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [
        f"{name} has shape {list(state[name].shape)}, and the network {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    dtypes = [f"{name} is {value.dtype}" for name, value in state.items() if not value.dtype.is_floating_point]
    faults = [
        f"{len(found)} {what} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"
        for found, what in (
            (sorted(missing), "missing"),
            (sorted(unknown), "unknown"),
            (shapes, "of another shape"),
            (dtypes, "not of floating point"),
        )
        if found
    ]
    if faults:
        cause = _cause(own, state, missing, unknown)
        raise CheckpointError(f"{path}: its tensors are not those of this network: {'; '.join(faults)}{cause}")


def _cause(own: Mapping, state: Mapping, missing: Iterable[str], unknown: Iterable[str]) -> str:
    last = "conv_out.weight"
    if not own.keys() & state.keys():
        return ". It is another network's checkpoint"
    if any("attn2" in name or "transformer_blocks" in name for name in unknown):
        return ". It attends to text or the like (UNet2DConditionModel), which this network doesn't"
    differing = [*missing, *unknown]
    if differing and all(".attentions." in name for name in differing):
        return ". Its attention is at other levels than the config says"
    if missing and not unknown:
        return ". A part of the network is not in the file: was it copied or saved whole?"
    if last in state and last in own and state[last].shape[0] == 2 * own[last].shape[0]:
        return f". It has {state[last].shape[0]} output channels, half of them for a learned variance"
    return ". Was the config written for other weights?"
