"""Resolve a caller's model: what runs, whether the engine can run it, its sizes, and what it was trained for."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints import scheduler
from ..diffusion.coefficients import PREDICTIONS, VARIANCES, check_prediction
from ..diffusion.schedule import Schedule
from ..models.unet import UNet
from ..utils.validation import as_python_number, check_choice
from ..utils.warn import warn_once
from .adopt import as_unet, callee, find_inside, is_diffusers, sized_network


class TrainingSettings(NamedTuple):
    """The settings of a network's training that a chain uses."""

    schedule: Schedule
    prediction: str
    variance: str
    clip: bool | float


# Name of a model's attribute -> (accepted type, default from the paper, description of what is expected).
SETTINGS = {
    "schedule": (Schedule, Schedule.linear(), "a fastddpm.Schedule"),
    "prediction": (str, "epsilon", f"one of {', '.join(PREDICTIONS)}"),
    "variance": (str, "fixed_large", f"one of {', '.join(VARIANCES)}"),
    "clip": ((bool, int, float), True, "True, False or a positive bound"),
}

# Fraction of an image's variance left in x_T. The paper's schedule leaves 4e-5, diffusers' scaled_linear 0.005.
MAX_SIGNAL_LEFT = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedModel:
    """A caller's model in the form that the samplers, the engine and the likelihood use.

    Attributes:
        network: The `UNet` or callable that runs.
        unsupported_reason: A sentence on why the engine cannot run the network, or None.
        sized_network: The UNet or UNet2DModel whose channels and levels restrict x, or None.
        settings: What the network was trained for.
    """

    network: Callable
    unsupported_reason: str | None
    sized_network: nn.Module | None
    settings: TrainingSettings

    @property
    def unet(self) -> UNet | None:
        return self.network if isinstance(self.network, UNet) else None

    @property
    def num_classes(self) -> int | None:
        return num_classes_of(self.unet)

    @property
    def is_function(self) -> bool:
        """Return whether the network is a function rather than a module. A function may hold anything."""
        return not isinstance(callee(self.network), nn.Module)

    def warn(self, message: str) -> None:
        """Warn at the caller's line, once per model and message."""
        warn_once(self.network, message)


def resolve(
    model: object,
    schedule: object = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
    *,
    needs: Sequence[str] = TrainingSettings._fields,
) -> ResolvedModel:
    """Resolve the caller's model and the settings passed with it. See `resolve_settings`."""
    network, unsupported = as_unet(model)
    settings = resolve_settings(network, schedule, prediction, variance, clip, needs=needs)
    return ResolvedModel(network, unsupported, sized_network(network), settings)


def num_classes_of(network: object) -> int | None:
    """Return the number of a UNet's classes. None for a UNet without classes, and for any other network."""
    return network.config.num_classes if isinstance(network, UNet) else None


def check_callable(model: object) -> None:
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}; expected a fastddpm.UNet or a callable model(x, t)")


def resolve_settings(
    model: object,
    schedule: object = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
    *,
    needs: Sequence[str] = TrainingSettings._fields,
) -> TrainingSettings:
    """Return what the model was trained for. Warn about settings that are assumed.

    The first of these that specifies a setting has precedence: the argument; a diffusers scheduler passed as the schedule; the
    model itself; the model inside it; the paper.

    Args:
        model: The caller's model.
        schedule: A `Schedule`, a diffusers scheduler, or None.
        prediction: As passed by the caller.
        variance: As passed by the caller.
        clip: As passed by the caller.
        needs: The settings that the caller uses. Only these are searched for inside the model, and warned about.

    Raises:
        ValueError: A setting is invalid, or the models inside disagree about it.
    """
    check_callable(model)
    bare = callee(model)
    scheduled = is_diffusers(schedule, "SchedulerMixin")
    if not scheduled and not (schedule is None or isinstance(schedule, Schedule)):
        raise ValueError(
            f"schedule: got {type(schedule).__name__}; expected a fastddpm.Schedule or one of diffusers' schedulers"
        )
    owner = _scheduler_settings(schedule) if scheduled else bare
    arguments = (None if scheduled else schedule, prediction, variance, as_python_number(clip))
    passed = dict(zip(SETTINGS, arguments, strict=True))
    values = {name: _attribute(owner, name) if passed[name] is None else passed[name] for name in SETTINGS}
    missing = [name for name in needs if values[name] is None]
    inner = find_inside(bare, lambda v: v is not bare and has_settings(v)) if missing else []
    inherited = _agreed(bare, inner, missing)
    values |= inherited
    # A UNet2DModel, and a UNet converted from one, has no settings of its own. Unless a scheduler is passed, they are assumed.
    unspecific = is_diffusers(bare, "UNet2DModel") or (isinstance(bare, UNet) and bare.schedule is None)
    unspecified = [n for n in needs if values[n] is None or (unspecific and not scheduled and passed[n] is None)]
    settings = TrainingSettings(
        *(default if values[n] is None else values[n] for n, (_, default, _) in SETTINGS.items())
    )
    check_choice("prediction", settings.prediction, PREDICTIONS)
    if "prediction" in needs:
        check_prediction(settings.schedule, settings.prediction)
    _warn_inherited(model, bare, inner, inherited)
    if "schedule" in unspecified or "prediction" in unspecified:
        # With a schedule passed, name only the prediction, so that calls with other arguments do not warn again.
        assumed = unspecified if "schedule" in unspecified else ["prediction"]
        _warn_assumed(model, bare, unspecific, {name: getattr(settings, name) for name in assumed})
    return settings


def _attribute(owner: object, name: str) -> object:
    """Return the owner's setting of this name. None if it has none, or if the attribute has another type."""
    value = as_python_number(getattr(owner, name, None))
    accepted, _, expected = SETTINGS[name]
    if isinstance(owner, UNet) and value is not None and not isinstance(value, accepted):
        raise ValueError(f"model: its {name} is {value!r}; expected {expected}")
    return value if isinstance(value, accepted) else None


def has_settings(owner: object) -> bool:
    """Return whether the owner has a schedule or a prediction. Layers may have a `variance` or `clip` of another meaning."""
    return _attribute(owner, "schedule") is not None or _attribute(owner, "prediction") in PREDICTIONS


def name_of(model: object) -> str:
    """Return the model's name for messages: that of a function or method, otherwise that of the class."""
    if isinstance(model, (types.FunctionType, types.MethodType)):
        kind = "method" if isinstance(model, types.MethodType) else "function"
        return f"{kind} {model.__qualname__}"
    return type(model).__name__


def _agreed(bare: object, inner: list[object], names: list[str]) -> dict[str, object]:
    """Return the settings with these names of the models inside. Raise ValueError if two models differ in one."""
    agreed, differing = {}, {}
    for name in names:
        values = []
        for value in (_attribute(v, name) for v in inner):
            if value is not None and value not in values:
                values.append(value)
        if len(values) > 1:
            differing[name] = " and ".join(map(repr, values))
        elif values:
            agreed[name] = values[0]
    if differing:
        raise ValueError(
            f"{', '.join(differing)}: the {name_of(bare)} holds models with different settings "
            f"({'; '.join(f'{name} {values}' for name, values in differing.items())}); "
            f"pass {', '.join(f'{name}=' for name in differing)}"
        )
    return agreed


def _scheduler_settings(schedule: Any) -> TrainingSettings:
    kind = type(schedule).__name__
    own = TrainingSettings(
        *scheduler.settings_from_config({**schedule.config, "_class_name": kind}, f"schedule: the {kind}'s")
    )
    betas = getattr(schedule, "betas", own.schedule.betas)
    rounding = 1e-5 if schedule.config.get("rescale_betas_zero_snr") else 1e-8  # of differences computed in float32
    if betas.shape != own.schedule.betas.shape or not torch.allclose(
        betas.double().cpu(), own.schedule.betas, rtol=1e-3, atol=rounding
    ):
        raise ValueError(
            f"schedule: the {kind}'s betas are not those of its config; pass schedule=fastddpm.Schedule(betas) and the other "
            "settings that the model was trained for"
        )
    return own


def warn_signal_left(model: object, schedule: Schedule) -> None:
    """Warn once if the schedule leaves signal in x_T: a chain starts with noise alone, which training has not seen there."""
    left = float(schedule.alphas_cumprod[-1])
    if left > MAX_SIGNAL_LEFT:
        warn_once(
            model,
            f"schedule: {schedule!r} ends at alphas_cumprod {left:.2g}, so that x_T keeps {left**0.5:.0%} of the image, "
            "but sampling starts with noise alone: expect wrong brightness and contrast. Use a schedule that ends at "
            f"{MAX_SIGNAL_LEFT} or less; Schedule.linear(T) without start and end scales its betas to T",
        )


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _warn_inherited(model: object, bare: object, inner: list[object], inherited: dict[str, object]) -> None:
    """Warn about inherited settings that are not the paper's: a wrapper's output may differ from that of the model in it."""
    differing = {name: value for name, value in inherited.items() if value != SETTINGS[name][1]}
    if differing:
        names = ", ".join(dict.fromkeys(map(name_of, inner)))
        warn_once(
            model,
            f"{', '.join(differing)}: the {name_of(bare)} is treated as the {names} inside it, with "
            f"{_listed(differing)}; if its output differs, pass {', '.join(f'{name}=' for name in differing)}",
        )


def _warn_assumed(model: object, bare: object, unspecific: bool, assumed: dict[str, object]) -> None:
    if unspecific:
        who, way = "a UNet2DModel does not specify what it was", "its scheduler, e.g. schedule=pipeline.scheduler"
    elif isinstance(bare, (types.FunctionType, types.BuiltinFunctionType)):
        who = "a function does not specify what its network was"
        way = (
            "schedule= and every other setting that differs, e.g. schedule=model.schedule, prediction=model.prediction"
        )
    else:
        who = f"the {name_of(bare)} does not specify what it was"
        way = "schedule= and every other setting that differs, or give it attributes of these names"
    linear = ["the paper's linear schedule of 1000 steps"] if "schedule" in assumed else []
    rest = {name: value for name, value in assumed.items() if name != "schedule"}
    listed = ", ".join([*linear, *([_listed(rest)] if rest else [])])
    first = next(iter(assumed))
    warn_once(
        model,
        f"{first}: {who} trained for; assumed {listed}; "
        f"pass {way if linear else f'{first}= and every other setting that differs'}",
    )
