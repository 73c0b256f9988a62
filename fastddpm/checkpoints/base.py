"""The `Checkpoint` that every format is read into, and the network built from it."""

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

MAX_KEYS_SHOWN = 3  # maximum number of differing names in a message


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint of any format.

    Attributes:
        format: name of the format.
        path: file of the weights, for messages.
        config: configuration of the network.
        state: tensors of any floating-point dtype, by UNet's names.
        schedule: noise schedule that the network was trained with.
        prediction: what the network predicts.
        variance: variance of the reverse steps.
        clip: bound on x0_hat.
        averaged: True if a name or an entry shows that the weights are averages over training (EMA), False if nothing
            does in a format of another library, None if unknown.
        notes: warnings for the caller.
        read_tensors: function that reads the tensors of `state` from the file. All threads that call it share the work.
            None if the tensors have been read, possibly into memory that is mapped from the file.
        class_names: names of the classes, or None.
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
    read_tensors: Callable[[], None] | None = None
    class_names: list[str] | None = None


def build_unet(checkpoint: Checkpoint) -> UNet:
    """Return the network in eval mode, in float32 on torch's default device. No tensor shares memory with the file."""
    try:
        check_prediction(checkpoint.schedule, checkpoint.prediction)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error}. If the network predicts something else, correct the entry in its config (diffusers' "
            "prediction_type)"
        ) from error
    device = torch.empty(0).device
    with ThreadPoolExecutor(1) as executor, garbage_collector_disabled():
        if checkpoint.read_tensors is None:
            state = {name: _own_copy(name, value, checkpoint.path) for name, value in checkpoint.state.items()}
        else:
            state, reading = checkpoint.state, executor.submit(checkpoint.read_tensors)
        with torch.device("meta"):
            model = UNet(
                checkpoint.config,
                schedule=checkpoint.schedule,
                prediction=checkpoint.prediction,
                variance=checkpoint.variance,
                clip=checkpoint.clip,
                class_names=checkpoint.class_names,
            ).eval()
        check_state_dict(dict(model.named_parameters()), state, checkpoint.path)
        set_parameters(model, {name: nn.Parameter(value) for name, value in state.items()})
        if checkpoint.read_tensors is not None:
            checkpoint.read_tensors()  # the tensors that the other thread has not begun
            reading.result()
    same = device.type == "cpu" and all(value.dtype == torch.float32 for value in state.values())
    return model if same else model.to(device, torch.float32)


def set_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace the model's parameters by name; load_state_dict(assign=True) takes five times as long."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameters[f"{prefix}.{name}" if prefix else name]


def _own_copy(name: str, value: torch.Tensor, path: Path) -> torch.Tensor:
    """Copy a tensor out of the mapped file: mapped tensors read the file on use, and may be unaligned."""
    if value.layout != torch.strided or value.is_meta or value.untyped_storage().nbytes() < value.nbytes:
        raise CheckpointError(f"{path}: {name} isn't a dense tensor with its own memory; save it as one")
    return value.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def garbage_collector_disabled() -> Iterator[None]:
    """Disable the garbage collector: building a network triggers collections that can take longer than the reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def channel_multipliers(widths: Iterable[int], channels: int) -> tuple[int | float, ...]:
    """Return UNetConfig.channel_mult for levels of these widths, as ints where possible."""
    return tuple(width / channels if width % channels else width // channels for width in widths)


def check_state_dict(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise CheckpointError, with the differences and the likely cause, if `state` has other names or shapes."""
    missing, unknown = expected.keys() - state.keys(), state.keys() - expected.keys()
    shapes = [
        f"{name} has shape {list(state[name].shape)}, expected {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    dtypes = [f"{name} is {value.dtype}" for name, value in state.items() if not value.dtype.is_floating_point]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:MAX_KEYS_SHOWN])}{', ...' if len(names) > MAX_KEYS_SHOWN else ''})"
        for names, what in (
            (sorted(missing), "missing"),
            (sorted(unknown), "unknown"),
            (shapes, "of another shape"),
            (dtypes, "not of floating point"),
        )
        if names
    ]
    if faults:
        cause = _likely_cause(expected, state, missing, unknown)
        raise CheckpointError(f"{path}: its tensors do not fit this network: {'; '.join(faults)}{cause}")


def _likely_cause(expected: Mapping, state: Mapping, missing: Iterable[str], unknown: Iterable[str]) -> str:
    last = "conv_out.weight"
    if not expected.keys() & state.keys():
        return ". It is the checkpoint of another network"
    if any("attn2" in name or "transformer_blocks" in name for name in unknown):
        return ". It has cross-attention to text or other conditions (UNet2DConditionModel), which UNet doesn't support"
    differing = [*missing, *unknown]
    if differing and all(".attentions." in name for name in differing):
        return ". Its attention is at other levels than the config specifies"
    if missing and not unknown and all(state[name].shape == expected[name].shape for name in state):
        return ". A part of the network is not in the file; check that it was copied and saved completely"
    if last in state and last in expected and state[last].shape[0] == 2 * expected[last].shape[0]:
        return f". It has {state[last].shape[0]} output channels, half of them for a learned variance"
    return ". Check that its config or flags belong to these weights"
