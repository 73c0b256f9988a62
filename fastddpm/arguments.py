"""What `sample`, `likelihood` and their kin ask of the arguments that they share, in the words of whoever gave them."""

from __future__ import annotations

import math
import os
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .checkpoints import scheduler
from .foreign import as_made, called, inside, is_diffusers
from .notices import warn_once
from .ops._library import check_seed, plain
from .samplers import PREDICTIONS, VARIANCES, check_prediction
from .schedule import Schedule
from .unet import UNet


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> int:
    value = plain(value)
    if not is_int(value) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")
    return value


def check_callable(model: object) -> None:
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}; expected a fastddpm.UNet or a callable model(x, t)")


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(choices)}")
    return value


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
    value = plain(getattr(owner, name, None))
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
        zip(Trained._fields, (None if scheduled else schedule, prediction, variance, plain(clip)), strict=True)
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
    choice("prediction", trained.prediction, PREDICTIONS)
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


def random_seed() -> int:
    """64 bits from torch's default CPU generator, so that torch.manual_seed governs them."""
    high, low = torch.randint(0, 1 << 32, (2,)).tolist()
    return high << 32 | low


def bound_of(clip: bool | float) -> float | None:
    clip = plain(clip)
    if clip is True:
        return 1.0
    if clip is False:
        return None
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: got {clip!r}; expected True, False or a positive bound")
    return float(clip)


def seed_of(seed: int | torch.Generator | None) -> int:
    if seed is None:
        return random_seed()
    if isinstance(seed, torch.Generator):
        high, low = torch.randint(0, 1 << 32, (2,), generator=seed, device=seed.device).tolist()
        return high << 32 | low
    return check_seed(seed)


def shape_of(model: object, shape: Sequence[int] | None) -> tuple[int, int, int]:
    """The shape as given, else the model's own, else that of the model inside of it; ValueError where it can't be drawn."""
    check_callable(model)
    if shape is None:
        shape = _shape_inside(model)
        check_fits("shape", model, shape)
        return shape
    try:
        shape = tuple(plain(side) for side in shape)
    except TypeError:
        raise ValueError(f"shape: got {shape!r}; expected (C, H, W), each an int >= 1") from None
    if len(shape) != 3 or not all(is_int(side) and side >= 1 for side in shape):
        said = f"shape: got {shape}; expected (C, H, W), each an int >= 1"
        if shape and all(is_int(side) and side >= 1 for side in shape):
            flat = shape[0], 1, math.prod(shape[1:])
            within = ", ".join(map(str, shape))
            said += (
                f". Data of other dimensions can be drawn as images of as many elements: shape={flat} and "
                f"lambda x, t: model(x.reshape(-1, {within}), t).reshape(x.shape)"
            )
        raise ValueError(said)
    check_fits("shape", model, shape)
    return shape


def _own_shape(model: object) -> tuple[int, int, int] | None:
    own = getattr(model, "shape", None)
    if isinstance(own, tuple) and len(own) == 3 and all(isinstance(v, int) and v > 0 for v in own):
        return own
    side = model.config.sample_size if is_diffusers(model, "UNet2DModel") else None
    return None if side is None else (model.config.in_channels, *((side, side) if isinstance(side, int) else side))


def _shape_inside(model: object) -> tuple[int, int, int]:
    bare = called(model)
    own = _own_shape(bare)
    if own is not None:
        return own
    held = inside(bare, lambda v: is_diffusers(v, "UNet2DModel") or (_speaks(v) and _own_shape(v) is not None))
    shapes = list(dict.fromkeys(_own_shape(v) for v in held))
    why = "a model that is not a fastddpm.UNet needs shape=(C, H, W)"
    if len(shapes) > 1:
        why = f"the {_name(bare)} holds models of different ones ({', '.join(map(str, shapes))}): pass shape=(C, H, W)"
    elif shapes and shapes[0] is not None:
        lacking = [v.config for v in held if as_made(v) is not None and v.config.in_channels > v.config.out_channels]
        if not lacking:
            return shapes[0]
        why = (
            f"the network in the {_name(bare)} takes {lacking[0].in_channels} channels and answers with "
            f"{lacking[0].out_channels}, so that not all of them are x: pass shape=(C, H, W) of x"
        )
    raise ValueError(f"shape: missing; {why}")


def check_fits(name: str, model: object, shape: Sequence[int]) -> None:
    """Raise ValueError, naming the argument, where images of `shape` (C, H, W) are none for a UNet or UNet2DModel."""
    network = as_made(model)
    if network is None:
        return
    config, (channels, height, width) = network.config, shape
    if config.in_channels > config.out_channels:
        theirs = ".sample" if not isinstance(network, UNet) or network.schedule is None else ""
        raise ValueError(
            f"model: the network takes {config.in_channels} channels and answers with {config.out_channels}: it wants a "
            f"condition of {config.in_channels - config.out_channels} channels beside x. Pass a callable that appends it, e.g. "
            f"lambda x, t: unet(torch.cat((x, condition), 1), t){theirs}, with shape=({config.out_channels}, {height}, {width})"
        )
    if channels != config.in_channels:
        raise ValueError(f"{name}: {channels} channels; the network takes {config.in_channels}")
    halvings = len(config.multipliers if isinstance(network, UNet) else config.block_out_channels) - 1
    if height % (1 << halvings) == 0 == width % (1 << halvings):
        return
    floor, ceiling = (
        [(side + add) >> halvings << halvings for side in (height, width)] for add in (0, (1 << halvings) - 1)
    )
    fitting = " and ".join(f"{h}x{w}" for h, w in (floor, ceiling) if h and w)
    made = None if name == "shape" else _own_shape(network)
    way = "" if made is None else f"; it was made for {made[1]}x{made[2]}: pad them, as for its training"
    raise ValueError(
        f"{name}: {height}x{width} cannot be halved {halvings} times, as the network does; the nearest that can: {fitting}{way}"
    )


def device_of(model: object, device: torch.device | str | None) -> torch.device:
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def labels_of(labels: Any, n: int, model: object) -> torch.Tensor | None:
    classes = model.config.classes if isinstance(model, UNet) else None
    if labels is None:
        if classes is not None:
            raise ValueError(f"class_labels: missing; the network has {classes} classes: pass an int or int64 [{n}]")
        return None
    if isinstance(model, UNet) and classes is None:
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
    """int64 [n] of an int, or of n integers of any kind: a list, an array, a tensor."""
    labels = plain(labels)
    if is_int(labels):
        return torch.full((n,), labels)
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"class_labels: got {labels!r}; expected an int or int64 [{n}]") from None
    if isinstance(labels, (list, tuple)) and not labels:
        given = given.long()
    no_integers = given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
    if no_integers or tuple(given.shape) != (n,):
        raise ValueError(f"class_labels: got {given.dtype} {list(given.shape)}; expected an int or int64 [{n}]")
    return given.long()


def fitting_batch(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """min(n, what fits): a quarter of the device's memory at 4 KiB a pixel, about what the paper's networks take in float32."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return max(1, min(n, memory // 4 // (shape[1] * shape[2] * 4096)))


LEAST_BYTE = 16  # images in 0..255 have a larger pixel; images in [-1, 1], and standardised ones of both signs, don't


def check_range(name: str, x: torch.Tensor) -> None:
    """Raise ValueError where x cannot be images in [-1, 1] because they are in 0..255."""
    if x.numel() and float(x.min()) >= 0 and float(x.max()) > LEAST_BYTE:
        raise ValueError(
            f"{name}: values from {float(x.min()):g} to {float(x.max()):g}; expected images in [-1, 1]: write x / 127.5 - 1"
        )


def output_fault(o: object, shape: list[int], learned: bool) -> str | None:
    """What is wrong with a model's output for x of `shape` [N, C, ...]; None: nothing. learned: it must hold a variance, which
    it may hold all the same where it needn't."""
    if not isinstance(o, torch.Tensor):
        return f"it returned {type(o).__name__}; expected a tensor. Wrap it, e.g. lambda x, t: model(x, t).sample"
    n, c, *spatial = shape
    doubled = [n, 2 * c, *spatial]
    if list(o.shape) == doubled or (not learned and list(o.shape) == shape):
        return None
    expected = f"{doubled}, with the learned variance" if learned else shape
    said = f"its output has shape {list(o.shape)}; expected {expected}"
    if list(o.shape[1:]) in (shape[1:], doubled[1:]):
        said += (
            f". It was called with {n} images; if it holds a condition for each image, pass class_labels=torch.arange(n): it is "
            "then called as model(x, t, index), with the index of each image in x"
        )
    return said
