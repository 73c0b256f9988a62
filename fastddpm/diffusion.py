"""The forward process q(x_t | x_0) and the training objective (Ho et al. 2020, eqs. 4 and 14)."""

from __future__ import annotations

import torch
from torch import nn

from . import ops
from .ops._library import check_first, check_seed
from .ops.philox_normal import Stream, first_words
from .samplers import PREDICTIONS
from .schedule import Schedule

__all__ = ["training_loss"]


def draw_timesteps(n: int, T: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform timesteps int64 [n] in 0..T-1 for draws first..first+n-1: t = (w0 T) >> 32 of stream 3."""
    sample = torch.arange(first, first + n, device=device)
    return (first_words(sample, seed=seed, stream=Stream.TIMESTEP) * T) >> 32


def draw_noise(x0: torch.Tensor, t: torch.Tensor, *, seed: int, first: int = 0) -> torch.Tensor:
    """eps of stream 2 for draws first.. at timesteps t [N], float32 like x0."""
    return ops.philox_normal(x0.shape, seed=seed, t=t, stream=Stream.FORWARD, first=first, device=x0.device)


def target(
    prediction: str, schedule: Schedule, x0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
):
    """What the network should answer at (x_t, t)."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    shape = (-1, *[1] * (x0.dim() - 1))

    def at_t(values: torch.Tensor) -> torch.Tensor:
        return values.to(x0.device)[t].to(x0.dtype).reshape(shape)

    if prediction == "v_prediction":
        return at_t(schedule.alphas_cumprod.sqrt()) * noise - at_t((1 - schedule.alphas_cumprod).sqrt()) * x0
    return at_t(schedule.posterior_mean_coef1) * x0 + at_t(schedule.posterior_mean_coef2) * x_t  # "mean", eq. 7


def random_seed() -> int:
    """64 bits from torch's default CPU generator, so that torch.manual_seed governs them."""
    high, low = torch.randint(0, 1 << 32, (2,)).tolist()
    return high << 32 | low


def training_loss(
    model: nn.Module,
    x0: torch.Tensor,
    *,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    t: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    class_labels: torch.Tensor | None = None,
    seed: int | None = None,
    first: int = 0,
) -> torch.Tensor:
    """L_simple (eq. 14): the mean squared error of the prediction at uniform t, a 0-d float32 tensor with a graph.

    model: a `UNet`, or any callable model(x_t, t). x0: [N, C, H, W] in [-1, 1]. schedule, prediction: default the model's
    own, else the paper's linear schedule and "epsilon". t (int64 [N]) and noise (like x0) replace what would be drawn for
    (seed, first + i); give `first` the running count of drawn examples, so that no example meets the same noise twice.
    seed: in [0, 2^64); None draws one from torch's default generator. Raises ValueError on what does not fit.
    """
    schedule = schedule or getattr(model, "schedule", None) or Schedule.linear()
    prediction = prediction or getattr(model, "prediction", None) or "epsilon"
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: got {prediction!r}; expected one of {', '.join(PREDICTIONS)}")
    if x0.dim() < 2 or not x0.is_floating_point():
        raise ValueError(f"x0: got {x0.dtype} {list(x0.shape)}; expected floating-point images [N, C, H, W] in [-1, 1]")
    seed = random_seed() if seed is None else check_seed(seed)
    n, first = x0.shape[0], check_first(first)
    if t is None:
        t = draw_timesteps(n, len(schedule), seed=seed, first=first, device=x0.device)
    if noise is None:
        noise = draw_noise(x0, t, seed=seed, first=first).to(x0.dtype)
    x_t = schedule.add_noise(x0, noise, t)
    o = model(x_t, t) if class_labels is None else model(x_t, t, class_labels)
    wanted = target(prediction, schedule, x0, x_t, noise, t)
    if o.shape != wanted.shape:
        raise ValueError(f"model: its output has shape {list(o.shape)}; expected {list(wanted.shape)}")
    return (o.float() - wanted.float()).square().mean()
