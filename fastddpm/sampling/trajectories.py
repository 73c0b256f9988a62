"""What else a chain can do: go from an image to its noise, mix two images, show what it sees in the noise on its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..diffusion import coefficients
from ..diffusion.schedule import Schedule
from ..inputs.adopt import adopted
from ..inputs.arguments import check_fits, device_of, labels_of
from ..inputs.resolve import schedule_of, tell_left
from ..ops.rng import Stream, check_first, seed_of
from ..utils.validation import as_python_number, check_int, is_int
from .api import run
from .loop import StepState
from .plan import PLANNED, plan

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
    """The x_T, float32 [N, C, H, W], from which ddim comes back to `images`: its deterministic chain run backwards
    (Song et al. 2021, section 4.3), unclipped, from abar = 1.

    images: floating point [N, C, H, W] in [-1, 1]. steps: default 50, as for ddim. The others are `sample`'s; the way back is

        sample(model, len(images), sampler="ddim", steps=steps, spacing=spacing, clip=False, noise=x_T)

    Both ways are first-order solutions of one differential equation, so that the round trip's error falls as steps grow.
    """
    model = adopted(model)
    images = _images("images", images, model)
    # The chain's own arguments are checked by sample's plan; its timesteps, upwards, are the ones to visit.
    chosen = plan(model, schedule, prediction, "ddim", steps, spacing, clip=False)
    table = coefficients.inversion(chosen.schedule, prediction=chosen.prediction, timesteps=chosen.table.timesteps)
    return run(
        model, len(images), table, shape=tuple(images.shape[1:]), clip=False, class_labels=class_labels, noise=images,
        seed=0, batch_size=batch_size, device=device, dtype=dtype, progress=progress,
    )  # fmt: skip


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
    """Images between a and b, float32 [W, N, C, H, W] (Ho et al. 2020, section 4.4 and figures 8 and 9).

    x_t ~ q(x_t | a) and x'_t ~ q(x_t | b) are drawn once; (1 - w) x_t + w x'_t goes through the reverse process for each w,
    with the same noise. The w are taken one after another, the pairs in batches.

    a, b: floating point [N, C, H, W] in [-1, 1]. t: in 0..T-1, how far up; default T // 2 - 1, the paper's 500 of 1000. The
        larger, the less of a's and b's detail survives. weights: the w, or how many, evenly inside (0, 1), as there.
    first: pair i is image first + i of the seed's sequence, whatever other pairs and w there are. steps: how many of
        the t + 1 timesteps that are to go, default as for `sample`. Others: as in `sample`.
    """
    model = adopted(model)
    a, b = _images("a", a, model), _images("b", b, model)
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"b: got {list(b.shape)} on {b.device}; expected a's shape and device, {list(a.shape)} on {a.device}"
        )
    weights = as_python_number(weights)
    if isinstance(weights, int):
        weights = check_int("weights", weights, 1)
        weights = [(i + 1) / (weights + 1) for i in range(weights)]
    weights = [as_python_number(w) for w in weights]
    if not weights or not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
        raise ValueError(f"weights: got {weights}; expected a number of them, or finite numbers")
    q = schedule_of(model, schedule)
    t = max(len(q) // 2 - 1, 0) if t is None else as_python_number(t)
    if not is_int(t) or not 0 <= t < len(q):
        raise ValueError(f"t: got {t!r}; expected an int in 0..{len(q) - 1}")
    chosen = plan(model, schedule, prediction, sampler, steps, spacing, eta, variance, clip, start=t)
    seed, first, device = seed_of(seed), check_first(first), device_of(model, device)
    if first >= 1 << 54:
        raise ValueError(f"first: got {first}; expected less than 2^54 here, where each pair has two draws")
    labels = labels_of(class_labels, len(a), model)

    a, b = a.to(device), b.to(device)
    index = first + torch.arange(len(a), device=device)
    noise = [ops.philox_normal(a.shape, seed=seed, t=t, stream=Stream.FORWARD, sample=2 * index + i) for i in (0, 1)]
    x_a, x_b = q.add_noise(a, noise[0], t), q.add_noise(b, noise[1], t)
    drawn = [
        run(
            model, len(a), chosen.table, shape=tuple(a.shape[1:]), clip=chosen.clip, class_labels=labels,
            noise=(1 - w) * x_a + w * x_b, seed=seed, first=first, batch_size=batch_size, device=device, dtype=dtype,
            progress=progress,
        )
        for w in weights
    ]  # fmt: skip
    with torch.inference_mode(False):
        return torch.stack(drawn)


def progressive(model: nn.Module | Callable, n: int, *, frames: int | None = None, **options: object) -> torch.Tensor:
    """What the chain takes x_0 to be on its way, float32 [n, frames, C, H, W], evenly over its steps and the last one being
    the images themselves (Ho et al. 2020, section 4.3 and figure 6).

    frames: default 10, or as many as there are steps. options: `sample`'s, but callback.
    """
    if options.get("callback") is not None:
        raise ValueError("callback: not here, where the frames are taken by one; give it to sample itself")
    model = adopted(model)
    chosen = plan(model, **{name: options.pop(name) for name in PLANNED if name in options})
    tell_left(model, chosen.schedule)
    steps = len(chosen.table.timesteps)
    frames = min(10, steps) if frames is None else as_python_number(frames)
    kept = Frames(steps, frames, lambda state: state.x0)
    x = run(model, n, chosen.table, clip=chosen.clip, **{**options, "callback": kept})
    with torch.inference_mode(False):
        if n == 0:
            return torch.empty(0, frames, *x.shape[1:], dtype=torch.float32, device=x.device)
        return torch.stack([*kept.frames[:-1], x], dim=1)


class Frames:
    """A callback that keeps what `see` takes from the state after `count` of the steps, evenly, the last one among them."""

    def __init__(self, steps: int, count: int, see: Callable[[StepState], torch.Tensor]) -> None:
        if not is_int(count) or not 1 <= count <= steps:
            raise ValueError(f"frames: got {count!r}; expected an int in 1..{steps}, the number of steps")
        self.see, self.kept = see, {round(steps * (i + 1) / count) - 1: [] for i in range(count)}

    def __call__(self, state: StepState) -> None:
        if state.step in self.kept:
            self.kept[state.step].append(self.see(state))

    @property
    def frames(self) -> list[torch.Tensor]:
        """One tensor [n, C, H, W] for each step, of all batches."""
        return [torch.cat(parts) for parts in self.kept.values()]


def _images(name: str, images: torch.Tensor, model: object) -> torch.Tensor:
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{name}: got {got}; expected floating-point images [N, C, H, W] in [-1, 1]")
    if images.numel() and not float(images.abs().max()) <= 1:
        raise ValueError(f"{name}: values reach {float(images.abs().max()):.4g}; expected images in [-1, 1]")
    check_fits(name, model, images.shape[1:])
    return images.detach().float()
