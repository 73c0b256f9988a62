"""The training objectives (Ho et al. 2020, algorithm 1, eqs. 12 and 14) and the draws that they take."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..diffusion.bound import Bound, _like
from ..diffusion.coefficients import to_x0
from ..diffusion.schedule import Schedule
from ..inputs.adopt import tensor_of
from ..inputs.arguments import as_labels, check_fits, check_labels
from ..inputs.resolve import tell_left, trained_for
from ..models.unet import UNet
from ..ops.philox_normal import first_words
from ..ops.rng import Stream, check_first, check_seed, random_seed
from ..utils.validation import check_choice, check_range

__all__ = ["training_loss"]
OBJECTIVES = ("simple", "bound")


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


_seen: weakref.WeakSet[object] = weakref.WeakSet()


def _first_time(model: object) -> bool:
    """Whether the model has not been asked for before; always True for callables that cannot be remembered."""
    try:
        first = model not in _seen
        _seen.add(model)
    except TypeError:
        return True
    return first


def training_loss(
    model: nn.Module,
    x0: torch.Tensor,
    *,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    t: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    seed: int | None = None,
    first: int = 0,
    objective: str = "simple",
    variance: str | None = None,
) -> torch.Tensor:
    """The objective at uniform t, a 0-d float32 tensor with a graph (with "bound", float64 where the model's output is).

    objective: "simple", L_simple (eq. 14), the mean squared error of the prediction; or "bound", the mean of L_t in bits per
        dimension, so that T times its expectation, plus the constant L_T, is the variational bound L (eq. 5): eq. 12's weighted
        error for t >= 1 and the decoder for t = 0, for images on the 8-bit grid (not checked). Nothing is clipped.
    variance: the model's, which "bound" needs: "fixed_large", "fixed_small" or "learned_range" (an output of 2C channels);
        default the model's own, else "fixed_large".
    model: a `UNet`, a diffusers UNet2DModel, or any callable model(x_t, t). x0: [N, C, H, W] in [-1, 1].
    schedule, prediction: as for `sample`, default the model's own, else the paper's linear schedule and "epsilon".
    t (int64 [N]) and noise (like x0) replace what would be drawn for (seed, first + i); give `first` the running count of drawn
    examples, so that no example meets the same noise twice.
    class_labels: an int, or N integers (a tensor, a list, an array), for a network with classes.
    seed: in [0, 2^64); None draws one from torch's default generator. Raises ValueError on what does not fit.
    """
    check_choice("objective", objective, OBJECTIVES)
    needs = ("schedule", "prediction", *(["variance"] if objective == "bound" else []))
    schedule, prediction, variance, _ = trained_for(model, schedule, prediction, variance, needs=needs)
    bound = None
    if objective == "bound":
        bound = Bound(schedule, variance, x0.device)
    if x0.dim() < 2 or not x0.is_floating_point():
        raise ValueError(f"x0: got {x0.dtype} {list(x0.shape)}; expected floating-point images [N, C, H, W] in [-1, 1]")
    if len(x0) == 0:
        raise ValueError(f"x0: got shape {list(x0.shape)}, no images; expected at least one")
    tell_left(model, schedule)
    if x0.dim() == 4:
        check_fits("x0", model, x0.shape[1:])
    seed = random_seed() if seed is None else check_seed(seed)
    n, first = x0.shape[0], check_first(first)
    if class_labels is not None:
        class_labels = as_labels(class_labels, n).to(x0.device)
    if x0.device.type == "cpu" or _first_time(model):  # each look at values on a GPU waits for it
        check_range("x0", x0)
        if class_labels is not None and isinstance(model, UNet):
            check_labels(class_labels, model.config.classes)
    if t is None:
        t = draw_timesteps(n, len(schedule), seed=seed, first=first, device=x0.device)
    if noise is None:
        noise = draw_noise(x0, t, seed=seed, first=first).to(x0.dtype)
    x_t = schedule.add_noise(x0, noise, t)
    at_zero = None if bound is None else (t == 0).nonzero()[:, 0]  # here, where a GPU has nothing to be waited for
    o = tensor_of(model(x_t, t) if class_labels is None else model(x_t, t, class_labels))
    wanted = target(prediction, schedule, x0, x_t, noise, t)
    expected = list(wanted.shape)
    if bound is not None and bound.log_variance is None:
        expected[1] *= 2
    if list(o.shape) != expected:
        raise ValueError(f"model: its output has shape {list(o.shape)}; expected {expected}")
    if bound is None:
        return (o.float() - wanted.float()).square().mean()
    o = o.to(torch.promote_types(o.dtype, torch.float32))
    o, v = o.chunk(2, dim=1) if bound.log_variance is None else (o, None)
    # x0 = a x_t + b wanted, so that this is x0 - x0_hat without the cancellation of two large numbers.
    b = to_x0(schedule, prediction)[1].to(x0.device)[t]
    error = _like(b, o) * (wanted.to(o.dtype) - o)
    terms = bound.kl(t, error, v)
    decoded = bound.decoder(x0[at_zero], error[at_zero], None if v is None else v[at_zero])
    return terms.index_copy(0, at_zero, decoded.to(terms.dtype)).mean()
