"""Adapters for a caller's model: remove wrappers, and convert diffusers' UNet2DModel to a `UNet` with the same parameters.

This module never imports diffusers: a caller that has an instance has imported it.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoints import diffusers_options
from ..checkpoints.base import set_parameters
from ..models.unet import UNet
from ..utils.modules import has_forward_hooks, has_hooks, has_own_forward

# Attributes of a layer that do not affect its output at inference.
IGNORED_ATTRIBUTES = frozenset(
    {"training", "gradient_checkpointing", "_gradient_checkpointing_func", "_internal_dict", "_compiled_call_impl"}
)
SCALARS = (bool, int, float, str, type(None))
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


class _Conversion(NamedTuple):
    """The `UNet` converted from a UNet2DModel, and what the conversion assumed."""

    config: dict  # of the UNet2DModel
    layers: dict[str, tuple]  # signatures of the layers that diffusers makes for that config
    unet: UNet


_conversions: weakref.WeakKeyDictionary[nn.Module, _Conversion] = weakref.WeakKeyDictionary()


class UnsupportedError(ValueError):
    """No `UNet` is equivalent to the UNet2DModel. The message gives the reason."""


def is_diffusers(value: object, name: str) -> bool:
    """Return whether the value is an instance of the diffusers class with this name, or of a subclass."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == "diffusers" for c in type(value).__mro__)


def unwrap(model: object) -> object:
    """Return the module inside torch's wrappers: torch.compile, data parallelism, averages of weights.

    A wrapper with hooks or an overridden forward is not removed, as it may change the output.
    """
    while isinstance(model, nn.Module) and not has_forward_hooks(model):
        if type(model) in WRAPPERS and not has_own_forward(model):
            model = model.module
        elif type(model).__module__.startswith("torch._dynamo"):  # OptimizedModule, without importing it
            model = model._orig_mod
        else:
            break
    return model


def callee(model: object) -> object:
    """Return the object that a call of the model reaches, through functools.partial, bound `forward`s and torch's wrappers."""
    while True:
        model = unwrap(model)
        if isinstance(model, functools.partial):
            model = model.func
        elif isinstance(model, types.MethodType) and model.__name__ in ("forward", "__call__", "_wrapped_call_impl"):
            model = model.__self__
        else:
            return model


def find_inside(model: object, wanted: Callable[[object], bool]) -> list[object]:
    """Return the objects inside a callable for which `wanted` is true, each once. The search does not continue inside these.

    It covers submodules, attributes of modules and objects (also in lists and dicts), the arguments of a functools.partial, and
    the owner of a bound method. It cannot inspect functions.
    """
    found, seen = [], set()

    def look(value: object) -> None:
        parts = list(value.args) + list(value.keywords.values()) if isinstance(value, functools.partial) else []
        value = callee(value)
        if id(value) in seen:
            return
        seen.add(id(value))
        if wanted(value):
            found.append(value)
            return
        if isinstance(value, types.MethodType):
            look(value.__self__)
        elif isinstance(value, nn.Module):
            parts += value.children()
        if not isinstance(value, (types.FunctionType, type)):
            parts += getattr(value, "__dict__", {}).values()
        for part in parts:
            for v in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else (part,):
                if isinstance(v, (nn.Module, functools.partial, types.MethodType)):
                    look(v)

    look(model)
    return found


def sized_network(model: object) -> nn.Module | None:
    """Return the UNet or UNet2DModel that a call reaches, whose channels and levels restrict x. None if other code runs."""
    network = callee(model)
    for kind in type(network).__mro__:
        if kind is UNet or (kind.__name__ == "UNet2DModel" and kind.__module__.partition(".")[0] == "diffusers"):
            same = all(getattr(type(network), f, None) is getattr(kind, f, None) for f in ("forward", "body"))
            return network if same and not has_own_forward(network) and not has_forward_hooks(network) else None
    return None


def as_unet(model: object) -> tuple[object, str | None]:
    """Return (the model as a `UNet`, None), or (the model, why the engine cannot run it).

    A UNet2DModel with unmodified layers becomes a `UNet` that shares its parameters. This `UNet` has no schedule, as a
    UNet2DModel does not specify the one that it was trained with. torch's wrappers are removed from a supported network.

    Raises:
        ValueError: the model is a diffusers pipeline.
    """
    network = unwrap(model)
    if is_diffusers(network, "DiffusionPipeline"):
        raise ValueError(
            f"model: got a {type(network).__name__}; pass its network, and its scheduler as schedule: "
            "sample(pipeline.unet, n, schedule=pipeline.scheduler)"
        )
    if isinstance(network, UNet):
        return network, None
    kind = type(network).__name__
    if is_diffusers(network, "UNet2DModel"):
        try:
            return _converted(network), None
        except UnsupportedError as error:
            reason = f"fastddpm.UNet cannot represent this {kind} ({error})"
            return model, f"{reason}, so it runs unmodified. Results are the same, only slower"
    return model, f"{kind} is not a fastddpm.UNet, so it runs unmodified, without the engine"


def _converted(model: nn.Module) -> UNet:
    conversion, config = _conversions.get(model), dict(model.config)
    if conversion is None or conversion.config != config:
        try:
            architecture = diffusers_options.unet_config(config)
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        with torch.device("meta"):
            fresh = next(c for c in type(model).__mro__ if c.__name__ == "UNet2DModel").from_config(config)
            unet = UNet(architecture)
        unet.schedule = None
        if architecture.out_channels == 2 * architecture.in_channels:
            unet.variance = "learned_range"
        conversion = _conversions[model] = _Conversion(config, _signatures(fresh), unet)
    _check_layers(conversion.layers, model)
    set_parameters(conversion.unet, dict(model.named_parameters(remove_duplicate=False)))
    return conversion.unet.train(model.training)


def _check_layers(expected: dict[str, tuple], model: nn.Module) -> None:
    """Raise UnsupportedError, naming the layer and the attribute, if a layer differs from the one that diffusers makes."""
    layers, signatures = dict(model.named_modules()), _signatures(model)
    for name in expected | signatures:
        (wanted_kind, wanted_attributes), (kind, attributes) = (
            expected.get(name, (None, {})),
            signatures.get(name, (None, {})),
        )
        differs = f"{name or 'the model'} differs from diffusers' own"
        if wanted_kind is not kind:
            raise UnsupportedError(differs)
        if kind.forward.__module__.partition(".")[0] not in ("torch", "diffusers", "fastddpm"):
            raise UnsupportedError(f"{differs}: the forward of {kind.__name__}")
        for attribute in wanted_attributes | attributes:
            # A scalar that diffusers' layers don't have is a user's note, and cannot change the forward.
            is_note = attribute not in wanted_attributes and isinstance(attributes[attribute], SCALARS)
            if wanted_attributes.get(attribute) != attributes.get(attribute) and not is_note:
                raise UnsupportedError(f"{differs}: its {attribute}")
        if has_hooks(layers[name]):
            raise UnsupportedError(f"{differs}: it has hooks")


def _signatures(model: nn.Module) -> dict[str, tuple]:
    """Return {name: (class, attributes)} of the layers, with tensors as shapes and other objects as classes."""

    def is_hooks(attribute: str) -> bool:  # `_check_layers` checks the hooks that run in a call; others are allowed
        return attribute.startswith("_") and "_hooks" in attribute

    def attributes(layer: nn.Module) -> dict[str, object]:
        return {k: _summary(k, v) for k, v in vars(layer).items() if k not in IGNORED_ATTRIBUTES and not is_hooks(k)}

    return {name: (_unfused_class(type(layer)), attributes(layer)) for name, layer in model.named_modules()}


def _unfused_class(kind: type) -> type:
    """Return the class that a layer had before `fuse_norms`."""
    return kind.__base__ if kind.__module__.startswith("fastddpm.") else kind


def _summary(attribute: str, value: object) -> object:
    if isinstance(value, SCALARS) or (isinstance(value, (tuple, list)) and all(isinstance(v, SCALARS) for v in value)):
        return value
    if attribute in ("_parameters", "_buffers"):
        return {k: None if v is None else v.shape for k, v in value.items()}
    return type(value)


def output_tensor(output: object) -> object:
    """Return a model's output; for diffusers' output classes, the tensor inside."""
    inside = None if isinstance(output, torch.Tensor) else getattr(output, "sample", None)
    return inside if isinstance(inside, torch.Tensor) else output
