"""Others' live objects in this package's terms: diffusers' UNet2DModel as a `UNet` with the same parameters, its output as a
tensor, and what is inside of torch's wrappers and of people's own.

diffusers itself is not imported: whoever has such an object has done so.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoints import diffusers
from ..checkpoints.base import set_parameters
from ..models.unet import UNet

# Attributes of a layer that say nothing about what it computes at inference.
INERT = {"training", "gradient_checkpointing", "_gradient_checkpointing_func", "_internal_dict", "_compiled_call_impl"}
SIMPLE = (bool, int, float, str, type(None))
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


class _Twin(NamedTuple):
    config: dict  # of the UNet2DModel that it was made for
    layers: dict[str, tuple]  # what diffusers makes of that config
    network: UNet


_twins: weakref.WeakKeyDictionary[nn.Module, _Twin] = weakref.WeakKeyDictionary()


class UnlikeError(ValueError):
    """Why a UNet2DModel has no `UNet` of its kind."""


def is_diffusers(value: object, name: str) -> bool:
    """Whether it is an instance of diffusers' class of this name, or of a subclass."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == "diffusers" for c in type(value).__mro__)


def unwrapped(model: object) -> object:
    """What is inside of torch's wrappers: the copy of `torch.compile`, data parallelism, averages of weights.

    Not of one that its owner has hooked or given a forward: there it is more than a wrapper.
    """
    while isinstance(model, nn.Module) and not (model._forward_hooks or model._forward_pre_hooks):
        if type(model) in WRAPPERS and "forward" not in vars(model):
            model = model.module
        elif type(model).__module__.startswith("torch._dynamo"):  # OptimizedModule, without importing that
            model = model._orig_mod
        else:
            break
    return model


def called(model: object) -> object:
    """What a call of the model comes to: the module of a functools.partial, of a bound `forward`, of torch's wrappers."""
    while True:
        model = unwrapped(model)
        if isinstance(model, functools.partial):
            model = model.func
        elif isinstance(model, types.MethodType) and model.__name__ in ("forward", "__call__", "_wrapped_call_impl"):
            model = model.__self__
        else:
            return model


def inside(model: object, wanted: Callable[[object], bool]) -> list[object]:
    """The objects in a callable that are `wanted`, each once, but none that another of them holds.

    They are looked for in modules, in what a module or an object has as attributes (also in lists and dicts), in the arguments of
    a functools.partial, and in the owner of a bound method. Nobody can look into a function.
    """
    found, seen = [], set()

    def look(value: object) -> None:
        held = list(value.args) + list(value.keywords.values()) if isinstance(value, functools.partial) else []
        value = called(value)
        if id(value) in seen:
            return
        seen.add(id(value))
        if wanted(value):
            found.append(value)
            return
        if isinstance(value, types.MethodType):
            look(value.__self__)
        elif isinstance(value, nn.Module):
            held += value.children()
        if not isinstance(value, (types.FunctionType, type)):
            held += getattr(value, "__dict__", {}).values()
        for part in held:
            for v in part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else (part,):
                if isinstance(v, (nn.Module, functools.partial, types.MethodType)):
                    look(v)

    look(model)
    return found


def as_made(model: object) -> object | None:
    """The UNet or UNet2DModel that a call comes to, as long as nothing stands between it and what its class computes."""
    network = called(model)
    for kind in type(network).__mro__:
        if kind is UNet or (kind.__name__ == "UNet2DModel" and kind.__module__.partition(".")[0] == "diffusers"):
            same = all(getattr(type(network), f, None) is getattr(kind, f, None) for f in ("forward", "body"))
            own = same and "forward" not in vars(network) and not network._forward_hooks
            return network if own and not network._forward_pre_hooks else None
    return None


def adopted(model: object) -> object:
    """A `UNet` with the parameters, not copies, of a diffusers UNet2DModel that is as diffusers makes it; else model itself.

    Either also out of torch's wrappers. The UNet of a UNet2DModel has no schedule (None), as that doesn't say for which one it
    was trained. Raises ValueError for a pipeline.
    """
    inside = unwrapped(model)
    if is_diffusers(inside, "DiffusionPipeline"):
        raise ValueError(
            f"model: got a {type(inside).__name__}; pass its network, and its scheduler as schedule: "
            "sample(pipeline.unet, n, schedule=pipeline.scheduler)"
        )
    if isinstance(inside, UNet):
        return inside
    try:
        return _twin(inside) if is_diffusers(inside, "UNet2DModel") else model
    except UnlikeError:
        return model


def why_not(model: object) -> str | None:
    """Why `adopted` leaves a UNet2DModel as it is; None where it doesn't, and for anything else."""
    model = unwrapped(model)
    try:
        if is_diffusers(model, "UNet2DModel"):
            _twin(model)
    except UnlikeError as error:
        return f"the {type(model).__name__} is not one that fastddpm has a network for ({error})"
    return None


def _twin(model: nn.Module) -> UNet:
    kept, config = _twins.get(model), dict(model.config)
    if kept is None or kept.config != config:
        try:
            architecture = diffusers.unet_config(config)
        except ValueError as error:
            raise UnlikeError(str(error)) from error
        with torch.device("meta"):
            made = next(c for c in type(model).__mro__ if c.__name__ == "UNet2DModel").from_config(config)
            network = UNet(architecture)
        network.schedule = None
        if architecture.out_channels == 2 * architecture.in_channels:
            network.variance = "learned_range"
        kept = _twins[model] = _Twin(config, _described(made), network)
    _compare(kept.layers, _described(model))
    set_parameters(kept.network, dict(model.named_parameters(remove_duplicate=False)))
    return kept.network.train(model.training)


def _compare(made: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise UnlikeError, naming the layer and what of it is another, unless they are the same."""
    for name in made | found:
        (kind, wanted), (own, given) = made.get(name, (None, {})), found.get(name, (None, {}))
        said = f"{name or 'it'} is not as diffusers makes it"
        if kind is not own:
            raise UnlikeError(said)
        if own.forward.__module__.partition(".")[0] not in ("torch", "diffusers", "fastddpm"):
            raise UnlikeError(f"{said}: the forward of {own.__name__}")
        for k in wanted | given:  # a number or a word that diffusers doesn't have is a note of the owner's
            if wanted.get(k) != given.get(k) and not (k not in wanted and isinstance(given[k], SIMPLE)):
                raise UnlikeError(f"{said}: its {k}")


def _described(model: nn.Module) -> dict[str, tuple]:
    """What each layer is, but for the values of its tensors."""
    return {
        name: (_unfused(type(layer)), {k: _brief(k, v) for k, v in vars(layer).items() if k not in INERT})
        for name, layer in model.named_modules()
    }


def _unfused(kind: type) -> type:
    """A layer's class, as it was before `fuse_norms`."""
    return kind.__base__ if kind.__module__.startswith("fastddpm.") else kind


def _brief(name: str, value: object) -> object:
    if isinstance(value, SIMPLE) or (isinstance(value, (tuple, list)) and all(isinstance(v, SIMPLE) for v in value)):
        return value
    if name in ("_parameters", "_buffers"):
        return {k: None if v is None else v.shape for k, v in value.items()}
    if name.startswith("_") and "_hooks" in name:
        return len(value)
    return type(value)


def tensor_of(output: object) -> object:
    """A model's output; of diffusers' output classes, the tensor in it."""
    inside = None if isinstance(output, torch.Tensor) else getattr(output, "sample", None)
    return inside if isinstance(inside, torch.Tensor) else output
