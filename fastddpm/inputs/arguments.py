"""Defaults and checks of the arguments that `sample`, `likelihood` and the other public functions share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models.unet import UNet
from ..utils.validation import as_python_number, is_int
from .adopt import callee, find_inside, is_diffusers, sized_network
from .resolve import ResolvedModel, has_settings, name_of

ANY_SHAPE = "expected (C, H, W), each an int >= 1"


def image_shape(model: ResolvedModel, shape: Sequence[int] | None) -> tuple[int, int, int]:
    """Return the shape passed, else the model's own, else that of the model inside it. Raise ValueError if it is invalid."""
    if shape is None:
        shape = _found_shape(model.network)
        check_image_shape("shape", model.sized_network, shape)
        return shape
    try:
        shape = tuple(as_python_number(side) for side in shape)
    except TypeError:
        raise ValueError(f"shape: got {shape!r}; {ANY_SHAPE}") from None
    positive = all(is_int(side) and side >= 1 for side in shape)
    if len(shape) != 3 or not positive:
        message = f"shape: got {shape}; {ANY_SHAPE}"
        if shape and positive:
            flat = shape[0], 1, math.prod(shape[1:])
            within = ", ".join(map(str, shape))
            message += (
                f". Data of other dimensions can be drawn as images with as many elements: shape={flat} and "
                f"lambda x, t: model(x.reshape(-1, {within}), t).reshape(x.shape)"
            )
        raise ValueError(message)
    check_image_shape("shape", model.sized_network, shape)
    return shape


def _own_shape(model: object) -> tuple[int, int, int] | None:
    own = getattr(model, "shape", None)
    if isinstance(own, tuple) and len(own) == 3 and all(isinstance(v, int) and v > 0 for v in own):
        return own
    side = model.config.sample_size if is_diffusers(model, "UNet2DModel") else None
    return None if side is None else (model.config.in_channels, *((side, side) if isinstance(side, int) else side))


def _found_shape(model: object) -> tuple[int, int, int]:
    bare = callee(model)
    own = _own_shape(bare)
    if own is not None:
        return own
    inner = find_inside(
        bare, lambda v: is_diffusers(v, "UNet2DModel") or (has_settings(v) and _own_shape(v) is not None)
    )
    shapes = list(dict.fromkeys(_own_shape(v) for v in inner))
    why = "a model that is not a fastddpm.UNet needs shape=(C, H, W)"
    if len(shapes) > 1:
        why = f"the {name_of(bare)} holds models of different shapes ({', '.join(map(str, shapes))}): pass shape=(C, H, W)"
    elif shapes and shapes[0] is not None:
        conditioned = [v.config for v in inner if sized_network(v) and v.config.in_channels > v.config.out_channels]
        if not conditioned:
            return shapes[0]
        why = (
            f"the network in the {name_of(bare)} takes {conditioned[0].in_channels} channels and returns "
            f"{conditioned[0].out_channels}, so that only some of them are x: pass shape=(C, H, W) of x"
        )
    raise ValueError(f"shape: missing; {why}")


def check_image_shape(name: str, network: nn.Module | None, shape: Sequence[int]) -> None:
    """Raise ValueError, naming the argument, if a UNet or UNet2DModel does not accept images of `shape` (C, H, W)."""
    if network is None:
        return
    config, (channels, height, width) = network.config, shape
    if config.in_channels > config.out_channels:
        sample = ".sample" if not isinstance(network, UNet) or network.schedule is None else ""
        raise ValueError(
            f"model: the network takes {config.in_channels} channels and returns {config.out_channels}: it requires a "
            f"condition of {config.in_channels - config.out_channels} channels beside x. Pass a callable that appends it, e.g. "
            f"lambda x, t: unet(torch.cat((x, condition), 1), t){sample}, with shape=({config.out_channels}, {height}, {width})"
        )
    if channels != config.in_channels:
        raise ValueError(f"{name}: {channels} channels; the network takes {config.in_channels}")
    halvings = len(config.channel_mult if isinstance(network, UNet) else config.block_out_channels) - 1
    if height % (1 << halvings) == 0 == width % (1 << halvings):
        return
    floor, ceiling = (
        [(side + add) >> halvings << halvings for side in (height, width)] for add in (0, (1 << halvings) - 1)
    )
    fitting = " and ".join(f"{h}x{w}" for h, w in (floor, ceiling) if h and w)
    own = None if name == "shape" else _own_shape(network)
    way = "" if own is None else f"; it was made for {own[1]}x{own[2]}: pad them, as for its training"
    raise ValueError(
        f"{name}: {height}x{width} cannot be halved {halvings} times, as the network does; the nearest that can: {fitting}{way}"
    )


def device_of(model: object, device: torch.device | str | None) -> torch.device:
    """Return the device passed, else that of the model's parameters, else the CPU."""
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def class_labels_of(model: ResolvedModel, labels: Any, n: int) -> torch.Tensor | None:
    """Return the labels, int64 [n], or None for a model without classes. Raise ValueError if the model does not fit them."""
    classes = model.num_classes
    if labels is None:
        if classes is not None:
            raise ValueError(f"class_labels: missing; the network has {classes} classes: pass an int or int64 [{n}]")
        return None
    if model.unet is not None and classes is None:
        raise ValueError("class_labels: given, but the network has no classes")
    labels = as_labels(labels, n)
    check_labels(labels, classes)
    return labels


def check_labels(labels: torch.Tensor, classes: int | None) -> None:
    if classes is not None and len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"class_labels: got values from {int(labels.min())} to {int(labels.max())}; expected 0..{classes - 1}"
        )


def as_labels(labels: Any, n: int) -> torch.Tensor:
    """Return the labels, int64 [n], from an int or n integers (a list, an array or a tensor)."""
    labels = as_python_number(labels)
    if is_int(labels):
        return torch.full((n,), labels)
    try:
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"class_labels: got {labels!r}; expected an int or int64 [{n}]") from None
    if isinstance(labels, (list, tuple)) and not labels:
        tensor = tensor.long()
    no_integers = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    if no_integers or tuple(tensor.shape) != (n,):
        raise ValueError(f"class_labels: got {tensor.dtype} {list(tensor.shape)}; expected an int or int64 [{n}]")
    return tensor.long()


def default_batch_size(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """Return min(n, the number of images that fit in a quarter of the device's memory).

    The estimate is 4 KiB per pixel, about the use of the paper's networks in float32.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return max(1, min(n, memory // 4 // (shape[1] * shape[2] * 4096)))


def output_fault(o: object, shape: list[int], learned: bool) -> str | None:
    """Return what is wrong with a model's output for x of `shape` [N, C, ...], or None.

    learned: whether 2C channels, with a learned variance, are required. They are always allowed.
    """
    if not isinstance(o, torch.Tensor):
        return f"it returned {type(o).__name__}; expected a tensor. Wrap it, e.g. lambda x, t: model(x, t).sample"
    n, c, *spatial = shape
    doubled = [n, 2 * c, *spatial]
    if list(o.shape) == doubled or (not learned and list(o.shape) == shape):
        return None
    expected = f"{doubled}, with the learned variance" if learned else shape
    fault = f"its output has shape {list(o.shape)}; expected {expected}"
    if list(o.shape[1:]) in (shape[1:], doubled[1:]):
        fault += (
            f". It was called with {n} images; if it holds one condition per image, pass class_labels=torch.arange(n): it is "
            "then called as model(x, t, index), with the index of each image in x"
        )
    return fault
