"""Other uses of a chain: encoding images as noise, interpolating between images, and recording predictions of x0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..diffusion import coefficients
from ..diffusion.schedule import Schedule
from ..inputs.arguments import check_image_shape, class_labels_of, device_of
from ..inputs.resolve import warn_signal_left
from ..ops.rng import Stream, check_first, seed_of
from ..utils.validation import as_python_number, check_int, is_int
from .api import RunOptions, run
from .loop import StepState
from .plan import ChainArguments, make_plan, resolve_for

__all__ = ["encode", "interpolate", "progressive"]


def encode(
    model: nn.Module | Callable,
    images: torch.Tensor,
    *,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    steps: int | None = None,
    spacing: str | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> torch.Tensor:
    """Encode images as the noise x_T from which ddim reconstructs them (Song et al. 2021, section 4.3).

    This runs ddim's deterministic chain from x_0 (abar = 1) up to x_T, without clipping. The inverse is

        sample(model, len(images), sampler="ddim", steps=steps, spacing=spacing, clip=False, noise=x_T)

    Both directions are first-order solutions of the same differential equation, so the round-trip error falls as the number of
    steps grows.

    Args:
        model: The network, as in `sample`.
        images: Floating point [N, C, H, W], in [-1, 1].
        schedule: As in `sample`.
        prediction: As in `sample`.
        steps: Network calls per image, in 1..T. Default: min(50, T).
        spacing: As in `sample`. Default: "trailing".
        class_labels: As in `sample`.
        batch_size: As in `sample`.
        device: As in `sample`.
        dtype: As in `sample`.
        progress: As in `sample`.

    Returns:
        x_T, float32 [N, C, H, W] on the model's device (or `device`).

    Raises:
        ValueError: An argument is invalid. The message names the argument.
        SamplingError: The model's output has the wrong shape, or holds a NaN or an infinity.
    """
    images = _checked_images("images", images)
    arguments = ChainArguments(schedule, prediction, sampler="ddim", steps=steps, spacing=spacing, clip=False)
    resolved = resolve_for(model, arguments)
    check_image_shape("images", resolved.sized_network, images.shape[1:])
    plan = make_plan(resolved, arguments)
    settings = resolved.settings
    # The encoder visits the chain's timesteps in ascending order.
    table = coefficients.inversion(settings.schedule, prediction=settings.prediction, timesteps=plan.table.timesteps)
    options = RunOptions(
        shape=tuple(images.shape[1:]),
        class_labels=class_labels,
        noise=images,
        seed=0,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return run(plan._replace(table=table), len(images), options)


def interpolate(
    model: nn.Module | Callable,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    t: int | None = None,
    weights: int | Sequence[float] = 9,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str | None = None,
    clip: bool | float | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> torch.Tensor:
    """Interpolate between the images a and b (Ho et al. 2020, section 4.4, figures 8 and 9).

    x_t ~ q(x_t | a) and x'_t ~ q(x_t | b) are drawn once. For each weight w, the reverse process starts at

        (1 - w) x_t + w x'_t

    and adds the same noise. The weights are processed one after another, and the pairs in batches.

    Args:
        model: The network, as in `sample`.
        a: Floating point [N, C, H, W], in [-1, 1].
        b: Like `a`, with the same shape and device.
        t: Timestep in 0..T-1 to which a and b are diffused. A larger t preserves less of their detail. Default: T // 2 - 1,
            the paper's 500 of 1000 steps.
        weights: The weights w, finite numbers, or their number W, spaced evenly inside (0, 1) as in the paper.
        schedule: As in `sample`.
        prediction: As in `sample`.
        sampler: As in `sample`.
        steps: Network calls per image and weight, in 1..t+1. Default: as in `sample`, with t + 1 in place of T.
        spacing: As in `sample`.
        eta: As in `sample`.
        variance: As in `sample`. If steps < t + 1, "fixed_small" replaces a default of "fixed_large".
        clip: As in `sample`.
        class_labels: As in `sample`, one for each pair.
        seed: As in `sample`.
        first: Number of the first pair in the seed's sequence, an int in [0, 2^54). The noise of pair i depends only on
            (seed, first + i, timestep), and not on the other pairs and weights.
        batch_size: As in `sample`.
        device: As in `sample`.
        dtype: As in `sample`.
        progress: As in `sample`.

    Returns:
        The images, float32 [W, N, C, H, W], with the weights in the order of `weights`.

    Raises:
        ValueError: An argument is invalid. The message names the argument.
        SamplingError: The model's output has the wrong shape, or holds a NaN or an infinity.
    """
    a, b = _checked_images("a", a), _checked_images("b", b)
    arguments = ChainArguments(schedule, prediction, sampler, steps, spacing, eta, variance, clip)
    resolved = resolve_for(model, arguments)
    check_image_shape("a", resolved.sized_network, a.shape[1:])
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"b: got {list(b.shape)} on {b.device}; expected a's shape and device, {list(a.shape)} on {a.device}"
        )
    weights, schedule = _checked_weights(weights), resolved.settings.schedule
    t = max(len(schedule) // 2 - 1, 0) if t is None else as_python_number(t)
    if not is_int(t) or not 0 <= t < len(schedule):
        raise ValueError(f"t: got {t!r}; expected an int in 0..{len(schedule) - 1}")
    plan = make_plan(resolved, arguments, start=t)
    seed, first, device = seed_of(seed), check_first(first), device_of(resolved.network, device)
    if first >= 1 << 54:
        raise ValueError(f"first: got {first}; expected less than 2^54, as each pair has two draws")
    labels = class_labels_of(resolved, class_labels, len(a))

    a, b = a.to(device), b.to(device)
    index = first + torch.arange(len(a), device=device)
    noise = [ops.philox_normal(a.shape, seed=seed, t=t, stream=Stream.FORWARD, sample=2 * index + i) for i in (0, 1)]
    x_a, x_b = schedule.add_noise(a, noise[0], t), schedule.add_noise(b, noise[1], t)

    def drawn(w: float) -> torch.Tensor:
        x_t = (1 - w) * x_a + w * x_b
        options = RunOptions(
            shape=tuple(a.shape[1:]), class_labels=labels, noise=x_t, seed=seed, first=first, batch_size=batch_size,
            device=device, dtype=dtype, progress=progress,
        )  # fmt: skip
        return run(plan, len(a), options)

    with torch.inference_mode(False):
        return torch.stack([drawn(w) for w in weights])


def _checked_weights(weights: int | Sequence[float]) -> list[float]:
    weights = as_python_number(weights)
    if isinstance(weights, int):
        weights = check_int("weights", weights, 1)
        weights = [(i + 1) / (weights + 1) for i in range(weights)]
    weights = [as_python_number(w) for w in weights]
    if not weights or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise ValueError(f"weights: got {weights}; expected the number of weights, or a sequence of finite numbers")
    return weights


def progressive(model: nn.Module | Callable, n: int, *, frames: int | None = None, **options: object) -> torch.Tensor:
    """Draw n images and return the chain's predictions of x_0 along the way (Ho et al. 2020, section 4.3, figure 6).

    Args:
        model: The network, as in `sample`.
        n: Number of images, an int >= 0.
        frames: Number of frames, in 1..steps, spaced evenly over the steps. Default: min(10, steps).
        **options: The keyword arguments of `sample`, except `callback`.

    Returns:
        The predictions, float32 [n, frames, C, H, W]. The last frame holds the images that `sample` returns.

    Raises:
        ValueError: An argument is invalid. The message names the argument.
        SamplingError: The model's output has the wrong shape, or holds a NaN or an infinity.
    """
    if options.get("callback") is not None:
        raise ValueError(
            "callback: expected None, as progressive records the frames with its callback; pass yours to fastddpm.sample"
        )
    arguments = ChainArguments(**{name: options.pop(name) for name in ChainArguments._fields if name in options})
    plan = make_plan(resolve_for(model, arguments), arguments)
    warn_signal_left(plan.model.network, plan.model.settings.schedule)
    steps = len(plan.table.timesteps)
    frames = min(10, steps) if frames is None else as_python_number(frames)
    recorder = FrameRecorder(steps, frames, lambda state: state.x0)
    x = run(plan, n, RunOptions(**{**options, "callback": recorder}))
    with torch.inference_mode(False):
        if n == 0:
            return torch.empty(0, frames, *x.shape[1:], dtype=torch.float32, device=x.device)
        return torch.stack([*recorder.frames[:-1], x], dim=1)


class FrameRecorder:
    """A callback that records extract(state) after `count` evenly spaced steps, including the last."""

    def __init__(self, steps: int, count: int, extract: Callable[[StepState], torch.Tensor]) -> None:
        if not is_int(count) or not 1 <= count <= steps:
            raise ValueError(f"frames: got {count!r}; expected an int in 1..{steps}, the number of steps")
        self.extract, self.by_step = extract, {round(steps * (i + 1) / count) - 1: [] for i in range(count)}

    def __call__(self, state: StepState) -> None:
        if state.step in self.by_step:
            self.by_step[state.step].append(self.extract(state))

    @property
    def frames(self) -> list[torch.Tensor]:
        """One tensor [n, C, H, W] for each recorded step, with the images of all batches."""
        return [torch.cat(parts) for parts in self.by_step.values()]


def _checked_images(name: str, images: torch.Tensor) -> torch.Tensor:
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name}: got {got}; expected floating-point images [N, C, H, W] in [-1, 1]")
    if images.numel() and not float(images.abs().max()) <= 1:
        raise ValueError(f"{name}: values reach {float(images.abs().max()):.4g}; expected images in [-1, 1]")
    return images.detach().float()
