"""The forward process q(x_t | x_0), the variational bound and the training objectives (Ho et al. 2020, eqs. 4, 5 and 14)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import ops
from .arguments import as_labels, check_fits, check_labels, check_range, choice, random_seed, tell_left, trained_for
from .foreign import tensor_of
from .ops._library import check_first, check_seed
from .ops.philox_normal import Stream, first_words
from .samplers import VARIANCES, to_x0
from .schedule import Schedule
from .unet import UNet

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


class Bound:
    """The terms of the variational bound L = L_T + ... + L_1 + L_0 (eq. 5), in bits per dimension: [N], means over an image.

    t counts from 0: L_t with t >= 1 is the KL of q(x_{t-1} | x_t, x_0) and the model's step from x_t, L_0 the decoder's part
    (eq. 13). The model's mean is the posterior's with x0_hat for x_0, so that all take error = x_0 - x0_hat.

    log_variance: float64 [T], the model's log sigma^2 if it is fixed; None for "learned_range". The posterior's variance is 0
    at t = 0; there that of t = 1 takes its place, and beta's (as in the paper's code for CIFAR-10). With T = 1 beta stays.
    At alphas_cumprod = 0 "fixed_large" is the posterior's too, as the chain's step is; L_T is 0 then.
    """

    def __init__(self, schedule: Schedule, variance: str, device: torch.device | str = "cpu") -> None:
        """variance: "fixed_large", "fixed_small" or "learned_range"; "none" has no density: ValueError."""
        if variance not in VARIANCES or variance == "none":
            raise ValueError(
                f"variance: got {variance!r}; the variational bound needs a density: expected one of "
                f"{', '.join(v for v in VARIANCES if v != 'none')}"
            )
        self.last = float(schedule.alphas_cumprod[-1])
        log_beta, log_posterior = schedule.betas.log(), schedule.posterior_variance.log()
        log_posterior[0] = log_posterior[1] if len(schedule) > 1 else log_beta[0]
        large = torch.where(schedule.alphas_cumprod > 0, log_beta, log_posterior)
        fixed = {"fixed_large": torch.cat((log_posterior[:1], large[1:])), "fixed_small": log_posterior}
        self.log_beta, self.log_posterior = log_beta.to(device), log_posterior.to(device)
        self.log_variance = fixed[variance].to(device) if variance in fixed else None
        self.coefficient = schedule.posterior_mean_coef1.to(device)

    def prior(self, x0: torch.Tensor) -> torch.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, 1)) for x0 [N, ...], in x0's dtype."""
        return _bits((x0.square() * self.last - math.log1p(-self.last) - self.last) / 2)

    def kl(self, t: torch.Tensor, error: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """L_t for t int64 [N], each >= 1 (for 0 a finite number that means nothing); error [N, ...] gives the dtype.

        v: like error, the second half of the output of a model with "learned_range".
        """
        gap = self.coefficient[t].square() / 2
        if self.log_variance is not None:  # a constant, and a multiple of the squared error
            log_variance = self.log_variance[t]
            constant = self._spread(log_variance - self.log_posterior[t]) / math.log(2)
            return constant.to(error.dtype) + (gap * (-log_variance).exp()).to(error.dtype) * _bits(error.square())
        log_variance = self._log_variance(t, v)
        spread = self._spread(log_variance - _like(self.log_posterior[t], v))
        return _bits(spread + _like(gap, error) * error.square() * (-log_variance).exp())

    def decoder(self, x0: torch.Tensor, error: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """L_0: minus the log mass of N(x0 - error, sigma^2) between x0 - 1/255 and x0 + 1/255, float64 [N] (eq. 13).

        The interval of x0 = -1 is open below, that of x0 = 1 above. x0, error, v: [N, ...], of any floating-point dtype.
        """
        x0, error = x0.double(), error.double()
        if self.log_variance is None:
            log_variance = self._log_variance(torch.zeros(len(x0), dtype=torch.int64, device=x0.device), v.double())
        else:
            log_variance = self.log_variance[0]
        scale = (-log_variance / 2).exp()
        centre, half = error * scale, scale / 255
        # By symmetry the interval lies to the left, where log_ndtr keeps all its digits.
        upper, lower = torch.special.log_ndtr(half - centre.abs()), torch.special.log_ndtr(-half - centre.abs())
        inside = upper + (-torch.expm1(lower - upper)).log()
        edge = torch.special.log_ndtr(half - x0 * centre)  # x0 is -1 or 1 where this counts
        return _bits(-torch.where(x0.abs() > 0.999, edge, inside))

    def _log_variance(self, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """log sigma^2 between log beta and the posterior's, as v in [-1, 1] says (Nichol & Dhariwal 2021, eq. 15)."""
        fraction = (v + 1) / 2
        return fraction * _like(self.log_beta[t], v) + (1 - fraction) * _like(self.log_posterior[t], v)

    @staticmethod
    def _spread(log_ratio: torch.Tensor) -> torch.Tensor:
        """KL of two normals with one mean, in nats, from the log of (second variance / first)."""
        return (log_ratio + torch.expm1(-log_ratio)) / 2


def _bits(nats: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> [N], bits per dimension."""
    return nats.flatten(1).mean(1) / math.log(2)


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """values [N] in x's dtype, shaped to broadcast over it."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


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
    choice("objective", objective, OBJECTIVES)
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
