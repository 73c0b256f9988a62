"""What every format is read into, and a network from that."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from ..diffusion.coefficients import check_prediction
from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from ..models.unet import UNet

SHOWN = 3  # of the keys that differ


@dataclasses.dataclass
class Read:
    """A checkpoint, whichever its format.

    path: of the weights, for messages. state: tensors by UNet's names, of any floating-point dtype. averaged: True where
    something says that the weights are averages over training (EMA). notes: what whoever loads it has to know. fill: where
    the tensors are still to be read, what reads them, together with other threads that call it; None: they are there, in memory
    that may be the file's.
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
    fill: Callable[[], None] | None = None
    class_names: list[str] | None = None


def build(read: Read) -> UNet:
    """The network, in float32, in eval mode and on torch's default device, with tensors of its own: the file may change."""
    try:
        check_prediction(read.schedule, read.prediction)
    except ValueError as error:
        raise CheckpointError(
            f"{read.path}: {error}. If its network predicts this, correct the entry in its config (diffusers' prediction_type)"
        ) from error
    device = torch.empty(0).device
    with ThreadPoolExecutor(1) as beside, _uncollected():
        if read.fill is None:
            state = {name: _copied(name, value, read.path) for name, value in read.state.items()}
        else:
            state, filling = read.state, beside.submit(read.fill)
        with torch.device("meta"):
            model = UNet(
                read.config, schedule=read.schedule, prediction=read.prediction, variance=read.variance, clip=read.clip,
                class_names=read.class_names,
            ).eval()  # fmt: skip
        check(dict(model.named_parameters()), state, read.path)
        assign(model, {name: nn.Parameter(value) for name, value in state.items()})
        if read.fill is not None:
            read.fill()  # what the other thread has left
            filling.result()
    same = device.type == "cpu" and all(value.dtype == torch.float32 for value in state.values())
    return model if same else model.to(device, torch.float32)


def assign(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give the model these as its own, by their names; load_state_dict(assign=True) takes five times as long."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameters[f"{prefix}.{name}" if prefix else name]


def _copied(name: str, value: torch.Tensor, path: Path) -> torch.Tensor:
    """A tensor that a file was mapped for reads the file when it is used, and lies at any address."""
    if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
        raise CheckpointError(f"{path}: {name} isn't a plain tensor with memory of its own; save it as one")
    return value.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cycles, which the many small objects of a network set off: it may take longer than reading."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def multiples(widths: Iterable[int], channels: int) -> tuple[int | float, ...]:
    """UNetConfig.channel_mult; ints where they are."""
    return tuple(width / channels if width % channels else width // channels for width in widths)


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
    if missing and not unknown and all(state[name].shape == own[name].shape for name in state):
        return ". A part of the network is not in the file: was it copied or saved whole?"
    if last in state and last in own and state[last].shape[0] == 2 * own[last].shape[0]:
        return f". It has {state[last].shape[0]} output channels, half of them for a learned variance"
    return ". Does its config, or do its flags, belong to other weights?"
