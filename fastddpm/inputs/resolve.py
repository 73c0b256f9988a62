"""What a model was trained for: its own settings, a scheduler's, or the paper's."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..checkpoints import scheduler
from ..diffusion.coefficients import PREDICTIONS, VARIANCES, check_prediction
from ..diffusion.schedule import Schedule
from ..models.unet import UNet
from ..utils.validation import as_python_number, check_choice
from ..utils.warn import warn_once
from .adopt import called, inside, is_diffusers


def check_callable(model: object) -> None:
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}; expected a fastddpm.UNet or a callable model(x, t)")


class Trained(NamedTuple):
    """What a network was trained for, as far as a chain needs it."""

    schedule: Schedule
    prediction: str
    variance: str
    clip: bool | float


# What an attribute of these names has to be to say what its model was trained for, what it is where nothing says so, and what
# is expected of it in words.
PAPER = {
    "schedule": (Schedule, Schedule.linear(), "a fastddpm.Schedule"),
    "prediction": (str, "epsilon", f"one of {', '.join(PREDICTIONS)}"),
    "variance": (str, "fixed_large", f"one of {', '.join(VARIANCES)}"),
    "clip": ((bool, int, float), True, "True, False or a positive bound"),
}
MOST_LEFT = 0.01  # of a picture's variance in x_T; the paper's schedule leaves 4e-5, diffusers' scaled_linear 0.005


def _said(owner: object, name: str) -> object:
    """What the owner's attribute says; None where it has none, or one of another meaning: somebody's may be anything."""
    value = as_python_number(getattr(owner, name, None))
    if isinstance(owner, UNet) and value is not None and not isinstance(value, PAPER[name][0]):
        raise ValueError(f"model: its {name} is {value!r}; expected {PAPER[name][2]}")
    return value if isinstance(value, PAPER[name][0]) else None


def _speaks(owner: object) -> bool:
    """Whether it says what it was trained for. `variance` and `clip` alone don't: layers of other kinds have such attributes."""
    return _said(owner, "schedule") is not None or _said(owner, "prediction") in PREDICTIONS


def _name(model: object) -> str:
    if isinstance(model, (types.FunctionType, types.MethodType)):
        kind = "method" if isinstance(model, types.MethodType) else "function"
        return f"{kind} {model.__qualname__}"
    return type(model).__name__


def trained_for(
    model: object,
    schedule: object = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
    *,
    needs: Sequence[str] = Trained._fields,
    silent: bool = False,
) -> Trained:
    """Each as given; else as a diffusers scheduler given as the schedule has it; else the model's own; else that of the model
    inside of it; else the paper's.

    needs: which of them the caller takes: only these are looked for inside, and warned of. silent: don't warn, and take the
    first of several models inside, as another call for the same model refuses or warns.
    """
    check_callable(model)
    bare = called(model)
    scheduled = is_diffusers(schedule, "SchedulerMixin")
    if not scheduled and not (schedule is None or isinstance(schedule, Schedule)):
        raise ValueError(
            f"schedule: got {type(schedule).__name__}; expected a fastddpm.Schedule or one of diffusers' schedulers"
        )
    own = _scheduler_says(schedule) if scheduled else bare
    given = dict(
        zip(
            Trained._fields,
            (None if scheduled else schedule, prediction, variance, as_python_number(clip)),
            strict=True,
        )
    )
    found = {name: _said(own, name) if given[name] is None else given[name] for name in PAPER}
    missing = [name for name in needs if found[name] is None]
    held = inside(bare, lambda v: v is not bare and _speaks(v)) if missing else []
    differing = {}
    for name in missing:
        values = []
        for value in (_said(v, name) for v in held):
            if value is not None and value not in values:
                values.append(value)
        if len(values) > 1:
            differing[name] = " and ".join(map(repr, values))
        found[name] = values[0] if values else None
    if differing and not silent:
        raise ValueError(
            f"{', '.join(differing)}: the {_name(bare)} holds models that were trained for different ones "
            f"({'; '.join(f'{name} {values}' for name, values in differing.items())}); "
            f"pass {', '.join(f'{name}=' for name in differing)}"
        )
    taken = {name: found[name] for name in missing if found[name] is not None}
    # A UNet2DModel, and the UNet made of one, says nothing: what that has beside a schedule are defaults.
    mute = is_diffusers(bare, "UNet2DModel") or (isinstance(bare, UNet) and bare.schedule is None)
    unsaid = [name for name in needs if found[name] is None or (mute and not scheduled and given[name] is None)]
    trained = Trained(*(paper if found[name] is None else found[name] for name, (_, paper, _) in PAPER.items()))
    check_choice("prediction", trained.prediction, PREDICTIONS)
    if "prediction" in needs:
        check_prediction(trained.schedule, trained.prediction)
    if not silent:
        _tell_taken(model, held, taken)
        if "schedule" in unsaid or "prediction" in unsaid:
            # Beside a schedule the prediction alone, so that calls that differ in the rest don't warn once more.
            assumed = unsaid if "schedule" in unsaid else ["prediction"]
            _tell_assumed(model, mute, {name: getattr(trained, name) for name in assumed})
    return trained


def _scheduler_says(schedule: Any) -> Trained:
    kind = type(schedule).__name__
    own = Trained(*scheduler.read({**schedule.config, "_class_name": kind}, f"schedule: the {kind}'s"))
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


def tell_left(model: object, schedule: Schedule) -> None:
    """Say once where a chain from noise, and a training for it, begin elsewhere than the schedule ends."""
    left = float(schedule.alphas_cumprod[-1])
    if left > MOST_LEFT:
        warn_once(
            model,
            f"schedule: {schedule!r} ends at alphas_cumprod {left:.2g}, so that x_T keeps {left**0.5:.0%} of the picture, "
            f"and chains begin with noise alone: expect images that are off in brightness and contrast. Up to {MOST_LEFT} is "
            "little enough; Schedule.linear(T) without start and end has betas for its T",
        )


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _tell_taken(model: object, held: list[object], taken: dict[str, object]) -> None:
    """Name what is not the paper's, as a wrapper may answer otherwise than the model in it."""
    differing = {name: value for name, value in taken.items() if value != PAPER[name][1]}
    if differing:
        inner = ", ".join(dict.fromkeys(map(_name, held)))
        warn_once(
            model,
            f"{', '.join(differing)}: the {_name(called(model))} is taken to answer as the {inner} in it does, with "
            f"{_listed(differing)}; where it answers otherwise, pass {', '.join(f'{name}=' for name in differing)}",
        )


def _tell_assumed(model: object, mute: bool, assumed: dict[str, object]) -> None:
    bare = called(model)
    if mute:
        who, way = "a UNet2DModel doesn't say what it was", "its scheduler, e.g. schedule=pipeline.scheduler"
    elif isinstance(bare, (types.FunctionType, types.BuiltinFunctionType)):
        who = "a function doesn't say what its network was"
        way = "schedule= and what else differs, e.g. schedule=model.schedule, prediction=model.prediction"
    else:
        who = f"the {_name(bare)} doesn't say what it was"
        way = "schedule= and what else differs, or give it attributes of these names"
    linear = ["the paper's linear schedule of 1000 steps"] if "schedule" in assumed else []
    rest = {name: value for name, value in assumed.items() if name != "schedule"}
    listed = ", ".join([*linear, *([_listed(rest)] if rest else [])])
    first = next(iter(assumed))
    warn_once(
        model,
        f"{first}: {who} trained for; assumed {listed}; pass {way if linear else f'{first}= and what else differs'}",
    )


def schedule_of(model: object, schedule: object) -> Schedule:
    """What `trained_for` finds, without its warnings: for who makes a `sampling.plan` of the same arguments, too."""
    return trained_for(model, schedule, needs=("schedule",), silent=True).schedule
