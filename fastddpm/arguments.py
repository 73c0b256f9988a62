"""What `sample`, `likelihood` and their kin ask of the arguments that they share, in the words of whoever gave them."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import nn

from .checkpoints import scheduler
from .foreign import is_diffusers, unwrapped
from .notices import warn_once
from .ops._library import check_seed
from .samplers import PREDICTIONS, check_prediction
from .schedule import Schedule
from .unet import UNet


def check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")


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


# What an attribute of these names has to be to say what its model was trained for, and what it is where nothing says so.
PAPER = {
    "schedule": (Schedule, Schedule.linear()),
    "prediction": (str, "epsilon"),
    "variance": (str, "fixed_large"),
    "clip": ((bool, int, float), True),
}

MOST_LEFT = 0.01  # of a picture's variance in x_T; the paper's schedule leaves 4e-5, diffusers' scaled_linear 0.005


def trained_for(
    model: object,
    schedule: object = None,
    prediction: str | None = None,
    variance: str | None = None,
    clip: bool | float | None = None,
) -> Trained:
    """Each as given; else as a diffusers scheduler given as the schedule has it; else the model's own; else the paper's."""
    bare = unwrapped(model)
    if is_diffusers(schedule, "SchedulerMixin"):
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
    elif schedule is None or isinstance(schedule, Schedule):
        own = bare
    else:
        raise ValueError(
            f"schedule: got {type(schedule).__name__}; expected a fastddpm.Schedule or one of diffusers' schedulers"
        )
    table = schedule if isinstance(schedule, Schedule) else None
    given = dict(zip(Trained._fields, (table, prediction, variance, clip), strict=True))
    found = []
    for name, (kind, paper) in PAPER.items():
        said = getattr(own, name, None)  # of somebody's module it may be anything
        found.append(next(v for v in (given[name], said if isinstance(said, kind) else None, paper) if v is not None))
    found = Trained(*found)
    choice("prediction", found.prediction, PREDICTIONS)
    check_prediction(found.schedule, found.prediction)
    left = float(found.schedule.alphas_cumprod[-1])
    if left > MOST_LEFT:
        warn_once(
            model,
            f"schedule: {found.schedule!r} ends at alphas_cumprod {left:.2g}, so that x_T keeps {left**0.5:.0%} of the picture, "
            f"and chains begin with noise alone: expect images that are off in brightness and contrast. Up to {MOST_LEFT} is "
            "little enough; Schedule.linear(T) without start and end has betas for its T",
        )
    silent = is_diffusers(bare, "UNet2DModel") or (isinstance(bare, UNet) and bare.schedule is None)
    if schedule is None and silent:
        rest = "".join(f", {getattr(found, name)}" for name in ("prediction", "variance") if given[name] is None)
        warn_once(
            model,
            "schedule: a UNet2DModel doesn't say what it was trained for; assumed the paper's linear schedule of 1000 steps"
            f"{rest}; pass its scheduler, e.g. schedule=pipeline.scheduler",
        )
    return found


def random_seed() -> int:
    """64 bits from torch's default CPU generator, so that torch.manual_seed governs them."""
    high, low = torch.randint(0, 1 << 32, (2,)).tolist()
    return high << 32 | low


def bound_of(clip: bool | float) -> float | None:
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


def shape_of(model: object, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    if not callable(model):
        raise ValueError(f"model: got {type(model).__name__}; expected a fastddpm.UNet or a callable model(x, t)")
    if shape is None:
        model = unwrapped(model)
        own = getattr(model, "shape", None)
        if isinstance(own, tuple) and len(own) == 3 and all(isinstance(v, int) and v > 0 for v in own):
            return own
        side = model.config.sample_size if is_diffusers(model, "UNet2DModel") else None
        if side is None:
            raise ValueError("shape: missing; a model that is not a fastddpm.UNet needs shape=(C, H, W)")
        return (model.config.in_channels, *((side, side) if isinstance(side, int) else side))
    shape = tuple(shape)
    if len(shape) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in shape):
        raise ValueError(f"shape: got {shape}; expected (C, H, W), each an int >= 1")
    if isinstance(model, UNet) and shape[0] != model.config.in_channels:
        raise ValueError(f"shape: got {shape}; the network takes {model.config.in_channels} channels")
    return shape


def device_of(model: object, device: torch.device | str | None) -> torch.device:
    if device is not None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def labels_of(labels: torch.Tensor | int | None, n: int, model: object) -> torch.Tensor | None:
    classes = model.config.classes if isinstance(model, UNet) else None
    if labels is None:
        if classes is not None:
            raise ValueError(f"class_labels: missing; the network has {classes} classes: pass an int or int64 [{n}]")
        return None
    if isinstance(model, UNet) and classes is None:
        raise ValueError("class_labels: given, but the network has no classes")
    if isinstance(labels, int):
        labels = torch.full((n,), labels)
    if labels.dtype != torch.int64 or tuple(labels.shape) != (n,):
        raise ValueError(f"class_labels: got {labels.dtype} {list(labels.shape)}; expected an int or int64 [{n}]")
    if classes is not None and n and not (0 <= int(labels.min()) and int(labels.max()) < classes):
        raise ValueError(
            f"class_labels: got values from {int(labels.min())} to {int(labels.max())}; expected 0..{classes - 1}"
        )
    return labels


def fitting_batch(n: int, shape: tuple[int, int, int], device: torch.device) -> int:
    """min(n, what fits): a quarter of the device's memory at 4 KiB a pixel, about what the paper's networks take in float32."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return max(1, min(n, memory // 4 // (shape[1] * shape[2] * 4096)))


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
    return f"its output has shape {list(o.shape)}; expected {expected}"
