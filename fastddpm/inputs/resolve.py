"""A call's model, resolved once: what runs, whether the engine can run it, its sizes, and what it was trained for."""

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
    """What a network was trained for, as far as a chain needs it."""

    schedule: Schedule
    prediction: str
    variance: str
    clip: bool | float


# Of an attribute of this name: the accepted type, the paper's value, and what is expected, in words.
SETTINGS = {
    "schedule": (Schedule, Schedule.linear(), "a fastddpm.Schedule"),
    "prediction": (str, "epsilon", f"one of {', '.join(PREDICTIONS)}"),
    "variance": (str, "fixed_large", f"one of {', '.join(VARIANCES)}"),
    "clip": ((bool, int, float), True, "True, False or a positive bound"),
}

MAX_SIGNAL_LEFT = (
    0.01  # of an image's variance in x_T; the paper's schedule leaves 4e-5, diffusers' scaled_linear 0.005
)


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedModel:
    """A model as the samplers, the engine and the likelihood take it.

    Attributes:
        network: what runs, a `UNet` or any callable.
        unsupported_reason: why the engine cannot run the network, a sentence; None where it can.
        sized_network: the UNet or UNet2DModel whose channels and levels restrict x, or None.
        settings: what it was trained for.
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
        """Whether no module is known to run: a function, which may hold anything."""
        return not isinstance(callee(self.network), nn.Module)

    def warn(self, message: str) -> None:
        """Warn at the caller's line, once for each model and message."""
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
    """Resolve a caller's model with the settings that the caller passed. See `resolve_settings`."""
    network, unsupported = as_unet(model)
    settings = resolve_settings(network, schedule, prediction, variance, clip, needs=needs)
    return ResolvedModel(network, unsupported, sized_network(network), settings)


def num_classes_of(network: object) -> int | None:
    """The number of a UNet's classes; None without classes, and for any other network."""
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
    """What the model was trained for. Warn where it is assumed.

    Each setting is the argument's; else that of a diffusers scheduler passed as the schedule; else the model's own; else that
    of the model inside of it; else the paper's.

    needs: the settings that the caller uses. Only these are looked for inside the model, and warned of.
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
    # A UNet2DModel, and the UNet made of one, has no settings of its own: beside a schedule these are defaults.
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
        # Beside a schedule the prediction alone, so that calls that differ in the rest don't warn once more.
        assumed = unspecified if "schedule" in unspecified else ["prediction"]
        _warn_assumed(model, bare, unspecific, {name: getattr(settings, name) for name in assumed})
    return settings


def _attribute(owner: object, name: str) -> object:
    """The owner's setting of this name; None where it has none, or where the attribute means something else."""
    value = as_python_number(getattr(owner, name, None))
    accepted, _, expected = SETTINGS[name]
    if isinstance(owner, UNet) and value is not None and not isinstance(value, accepted):
        raise ValueError(f"model: its {name} is {value!r}; expected {expected}")
    return value if isinstance(value, accepted) else None


def has_settings(owner: object) -> bool:
    """Whether it specifies what it was trained for. `variance` and `clip` alone don't: other layers have such attributes."""
    return _attribute(owner, "schedule") is not None or _attribute(owner, "prediction") in PREDICTIONS


def name_of(model: object) -> str:
    """The model in a message: a function's or method's name, an object's class."""
    if isinstance(model, (types.FunctionType, types.MethodType)):
        kind = "method" if isinstance(model, types.MethodType) else "function"
        return f"{kind} {model.__qualname__}"
    return type(model).__name__


def _agreed(bare: object, inner: list[object], names: list[str]) -> dict[str, object]:
    """The settings of these names that the models inside have. Raise ValueError where two of them differ."""
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
            f"{', '.join(differing)}: the {name_of(bare)} holds models that were trained for different ones "
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
    rounding = 1e-5 if schedule.config.get("rescale_betas_zero_snr") else 1e-8  # differences, taken in float32
    if betas.shape != own.schedule.betas.shape or not torch.allclose(
        betas.double().cpu(), own.schedule.betas, rtol=1e-3, atol=rounding
    ):
        raise ValueError(
            f"schedule: the {kind}'s betas are not those of its config; pass schedule=fastddpm.Schedule(betas) and what else "
            "it was trained for"
        )
    return own


def warn_signal_left(model: object, schedule: Schedule) -> None:
    """Warn once where x_T is not noise alone: there a chain from noise, and its training, begin in different places."""
    left = float(schedule.alphas_cumprod[-1])
    if left > MAX_SIGNAL_LEFT:
        warn_once(
            model,
            f"schedule: {schedule!r} ends at alphas_cumprod {left:.2g}, so that x_T keeps {left**0.5:.0%} of the picture, "
            f"and chains begin with noise alone: expect images that are off in brightness and contrast. Up to {MAX_SIGNAL_LEFT} "
            "is little enough; Schedule.linear(T) without start and end has betas for its T",
        )


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _warn_inherited(model: object, bare: object, inner: list[object], inherited: dict[str, object]) -> None:
    """Name the settings that are not the paper's: a wrapper may answer otherwise than the model in it."""
    differing = {name: value for name, value in inherited.items() if value != SETTINGS[name][1]}
    if differing:
        names = ", ".join(dict.fromkeys(map(name_of, inner)))
        warn_once(
            model,
            f"{', '.join(differing)}: the {name_of(bare)} is taken to answer as the {names} in it does, with "
            f"{_listed(differing)}; where it answers otherwise, pass {', '.join(f'{name}=' for name in differing)}",
        )


def _warn_assumed(model: object, bare: object, unspecific: bool, assumed: dict[str, object]) -> None:
    if unspecific:
        who, way = "a UNet2DModel doesn't say what it was", "its scheduler, e.g. schedule=pipeline.scheduler"
    elif isinstance(bare, (types.FunctionType, types.BuiltinFunctionType)):
        who = "a function doesn't say what its network was"
        way = "schedule= and what else differs, e.g. schedule=model.schedule, prediction=model.prediction"
    else:
        who = f"the {name_of(bare)} doesn't say what it was"
        way = "schedule= and what else differs, or give it attributes of these names"
    linear = ["the paper's linear schedule of 1000 steps"] if "schedule" in assumed else []
    rest = {name: value for name, value in assumed.items() if name != "schedule"}
    listed = ", ".join([*linear, *([_listed(rest)] if rest else [])])
    first = next(iter(assumed))
    warn_once(
        model,
        f"{first}: {who} trained for; assumed {listed}; pass {way if linear else f'{first}= and what else differs'}",
    )
