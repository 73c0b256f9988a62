"""Adapters for a caller's model: diffusers' UNet2DModel as a `UNet` with the same parameters, wrappers taken off.

diffusers is never imported: holding an instance implies that the caller did.
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

# Attributes of a layer that have no part in what it computes at inference.
IGNORED_ATTRIBUTES = frozenset(
    {"training", "gradient_checkpointing", "_gradient_checkpointing_func", "_internal_dict", "_compiled_call_impl"}
)
SCALARS = (bool, int, float, str, type(None))
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


class _Conversion(NamedTuple):
    """A UNet2DModel's `UNet`, and what it was made for."""

    config: dict  # of the UNet2DModel
    layers: dict[str, tuple]  # signatures of the layers that diffusers makes for that config
    unet: UNet


_conversions: weakref.WeakKeyDictionary[nn.Module, _Conversion] = weakref.WeakKeyDictionary()


class UnsupportedError(ValueError):
    """A UNet2DModel has no equal `UNet`. The message says why."""


def is_diffusers(value: object, name: str) -> bool:
    """Whether the value is an instance of diffusers' class of this name, or of a subclass."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == "diffusers" for c in type(value).__mro__)


def unwrap(model: object) -> object:
    """The module in torch's wrappers: `torch.compile`, data parallelism, averages of weights.

    A wrapper with hooks, or with a forward of its own, is more than a wrapper and stays.
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
    """What a call of the model reaches: the module of a functools.partial, of a bound `forward`, of torch's wrappers."""
    while True:
        model = unwrap(model)
        if isinstance(model, functools.partial):
            model = model.func
        elif isinstance(model, types.MethodType) and model.__name__ in ("forward", "__call__", "_wrapped_call_impl"):
            model = model.__self__
        else:
            return model


def find_inside(model: object, wanted: Callable[[object], bool]) -> list[object]:
    """The objects in a callable that are `wanted`, each once, and none that another of them holds.

    Looks into modules, attributes of modules and objects (also in lists and dicts), the arguments of a functools.partial, and
    the owner of a bound method. A function cannot be looked into.
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
    """The UNet or UNet2DModel that a call reaches, whose channels and levels restrict x; None where something else computes."""
    network = callee(model)
    for kind in type(network).__mro__:
        if kind is UNet or (kind.__name__ == "UNet2DModel" and kind.__module__.partition(".")[0] == "diffusers"):
            same = all(getattr(type(network), f, None) is getattr(kind, f, None) for f in ("forward", "body"))
            return network if same and not has_own_forward(network) and not has_forward_hooks(network) else None
    return None


def as_unet(model: object) -> tuple[object, str | None]:
    """(`UNet` or the model itself, why the engine cannot run it or None).

    A UNet2DModel whose layers are as diffusers makes them becomes a `UNet` with its parameters, not copies, and without a
    schedule, as it does not say for which one it was trained. torch's wrappers are taken off either.

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
            reason = f"the {kind} is not one that fastddpm has a network for ({error})"
            return model, f"{reason}, so it runs as it is. Results are the same, only slower"
    return model, f"{kind} is not a fastddpm.UNet, so it runs as it is, without the engine"


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
    """Raise UnsupportedError, naming the layer and the attribute, unless the model's layers are as diffusers makes them."""
    layers, signatures = dict(model.named_modules()), _signatures(model)
    for name in expected | signatures:
        (wanted_kind, wanted_attributes), (kind, attributes) = (
            expected.get(name, (None, {})),
            signatures.get(name, (None, {})),
        )
        differs = f"{name or 'it'} is not as diffusers makes it"
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
    """(class, attributes) of each layer by its name; of tensors the shapes, of other objects the classes."""

    def is_hooks(attribute: str) -> bool:  # `_check_layers` looks at those that run with a call; others may be there
        return attribute.startswith("_") and "_hooks" in attribute

    def attributes(layer: nn.Module) -> dict[str, object]:
        return {k: _summary(k, v) for k, v in vars(layer).items() if k not in IGNORED_ATTRIBUTES and not is_hooks(k)}

    return {name: (_unfused_class(type(layer)), attributes(layer)) for name, layer in model.named_modules()}


def _unfused_class(kind: type) -> type:
    """A layer's class before `fuse_norms`."""
    return kind.__base__ if kind.__module__.startswith("fastddpm.") else kind


def _summary(attribute: str, value: object) -> object:
    if isinstance(value, SCALARS) or (isinstance(value, (tuple, list)) and all(isinstance(v, SCALARS) for v in value)):
        return value
    if attribute in ("_parameters", "_buffers"):
        return {k: None if v is None else v.shape for k, v in value.items()}
    return type(value)


def output_tensor(output: object) -> object:
    """A model's output; of diffusers' output classes, the tensor in it."""
    inside = None if isinstance(output, torch.Tensor) else getattr(output, "sample", None)
    return inside if isinstance(inside, torch.Tensor) else output
