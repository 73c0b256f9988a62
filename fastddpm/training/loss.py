"""The training objectives (Ho et al. 2020, algorithm 1, eqs. 12 and 14), and the timesteps and noise drawn for them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..diffusion.bound import Bound, broadcast_like
from ..diffusion.coefficients import to_x0
from ..diffusion.schedule import Schedule
from ..inputs.adopt import callee, output_tensor, sized_network
from ..inputs.arguments import as_labels, check_image_shape, check_labels
from ..inputs.resolve import num_classes_of, resolve_settings, warn_signal_left
from ..ops.philox_normal import first_words
from ..ops.rng import Stream, check_first, check_seed, random_seed
from ..utils.validation import check_choice, check_range

__all__ = ["training_loss"]
OBJECTIVES = ("simple", "bound")


def draw_timesteps(n: int, T: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return uniform timesteps, int64 [n] in 0..T-1, of examples first..first+n-1: t = (w0 T) >> 32, w0 of stream 3."""
    examples = torch.arange(first, first + n, device=device)
    return (first_words(examples, seed=seed, stream=Stream.TIMESTEP) * T) >> 32


def draw_noise(x0: torch.Tensor, t: torch.Tensor, *, seed: int, first: int = 0) -> torch.Tensor:
    """Return eps of stream 2 for examples first, first + 1, ... at timesteps t [N], float32 of x0's shape."""
    return ops.philox_normal(x0.shape, seed=seed, t=t, stream=Stream.FORWARD, first=first, device=x0.device)


def target(
    prediction: str, schedule: Schedule, x0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
):
    """Return the correct prediction of the network at (x_t, t)."""
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0

    def at_t(values: torch.Tensor) -> torch.Tensor:
        return broadcast_like(values.to(x0.device)[t], x0)

    if prediction == "v_prediction":
        return at_t(schedule.alphas_cumprod.sqrt()) * noise - at_t((1 - schedule.alphas_cumprod).sqrt()) * x0
    return at_t(schedule.posterior_mean_coef1) * x0 + at_t(schedule.posterior_mean_coef2) * x_t  # "mean", eq. 7


_checked_models: weakref.WeakSet[object] = weakref.WeakSet()


def _is_first_call(model: object) -> bool:
    """Return whether this is the first call with the model; always True for callables without weak references."""
    try:
        first = model not in _checked_models
        _checked_models.add(model)
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
    """Return the training objective at uniform timesteps (Ho et al. 2020, algorithm 1).

    Draws t uniformly and eps ~ N(0, I), and evaluates the model at

        x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps

    With objective "simple", the loss is L_simple (eq. 14), the mean of (eps - model(x_t, t))^2. If `prediction` is not
    "epsilon", its target replaces eps.

    With objective "bound", the loss is the mean of L_t in bits per dimension: eq. 12's weighted error for t >= 1, and
    the discretized decoder (eq. 13) for t = 0. T times its expectation, plus the constant L_T, is the variational bound
    L (eq. 5). x0 must be on the 8-bit grid k / 127.5 - 1, which is not checked. Predictions are not clipped.

    Args:
        model: a `UNet`, a diffusers UNet2DModel, or any callable model(x_t, t).
        x0: floating-point images [N, C, H, W] in [-1, 1], N >= 1.
        schedule: noise schedule, as for `sample`. Default: the model's own, else the paper's linear schedule.
        prediction: what the model predicts: "epsilon", "sample", "v_prediction" or "mean". Default: the model's own,
            else "epsilon".
        t: timesteps, int64 [N]. Default: drawn from (seed, first + i) for example i.
        noise: eps, of x0's shape. Default: drawn from (seed, first + i, t) for example i.
        class_labels: an int, or N integers (a tensor, a list or an array), for a network with classes.
        seed: seed of timesteps and noise, in [0, 2^64). Default: drawn from torch's default generator.
        first: number of the first example. Pass the number of examples drawn so far, so that no two examples have the
            same noise.
        objective: "simple" or "bound".
        variance: variance of the reverse steps, used by "bound": "fixed_large", "fixed_small" or "learned_range" (the
            output has 2C channels). Default: the model's own, else "fixed_large".

    Returns:
        The loss, a 0-d float32 tensor with a graph. With "bound" it is float64 if the model's output is.

    Raises:
        ValueError: an argument is invalid, or the model's output has the wrong shape. The message names the argument.
    """
    check_choice("objective", objective, OBJECTIVES)
    needs = ("schedule", "prediction", *(["variance"] if objective == "bound" else []))
    schedule, prediction, variance, _ = resolve_settings(model, schedule, prediction, variance, needs=needs)
    bound = Bound(schedule, variance, x0.device) if objective == "bound" else None
    if x0.dim() < 2 or not x0.is_floating_point():
        raise ValueError(f"x0: got {x0.dtype} {list(x0.shape)}; expected floating-point images [N, C, H, W] in [-1, 1]")
    if len(x0) == 0:
        raise ValueError(f"x0: got shape {list(x0.shape)}, no images; expected at least one")
    warn_signal_left(model, schedule)
    if x0.dim() == 4:
        check_image_shape("x0", sized_network(model), x0.shape[1:])
    seed = random_seed() if seed is None else check_seed(seed)
    n, first = x0.shape[0], check_first(first)
    if class_labels is not None:
        class_labels = as_labels(class_labels, n).to(x0.device)
    if x0.device.type == "cpu" or _is_first_call(model):  # on a GPU, checking values waits for the device
        check_range("x0", x0)
        if class_labels is not None:
            check_labels(class_labels, num_classes_of(callee(model)))
    if t is None:
        t = draw_timesteps(n, len(schedule), seed=seed, first=first, device=x0.device)
    if noise is None:
        noise = draw_noise(x0, t, seed=seed, first=first).to(x0.dtype)
    x_t = schedule.add_noise(x0, noise, t)
    # Called before the model runs: nonzero() waits for the GPU, which has little queued work here.
    at_zero = None if bound is None else (t == 0).nonzero()[:, 0]
    o = output_tensor(model(x_t, t) if class_labels is None else model(x_t, t, class_labels))
    expected = target(prediction, schedule, x0, x_t, noise, t)
    expected_shape = list(expected.shape)
    if bound is not None and bound.log_variance is None:
        expected_shape[1] *= 2
    if list(o.shape) != expected_shape:
        raise ValueError(f"model: its output has shape {list(o.shape)}; expected {expected_shape}")
    if bound is None:
        return (o.float() - expected.float()).square().mean()
    b = to_x0(schedule, prediction)[1].to(x0.device)[t]
    return _mean_bound(bound, x0, t, at_zero, o, expected, b)


def _mean_bound(
    bound: Bound,
    x0: torch.Tensor,
    t: torch.Tensor,
    at_zero: torch.Tensor,
    o: torch.Tensor,
    expected: torch.Tensor,
    b: torch.Tensor,
) -> torch.Tensor:
    """Return the mean of L_t in bits per dimension.

    Args:
        bound: the terms of the bound.
        x0: images [N, C, H, W].
        t: timesteps [N].
        at_zero: positions with t = 0.
        o: the network's output.
        expected: the correct prediction.
        b: [N], the coefficient in x0 = a x_t + b expected.
    """
    o = o.to(torch.promote_types(o.dtype, torch.float32))
    o, v = o.chunk(2, dim=1) if bound.log_variance is None else (o, None)
    # x0 - x0_hat, computed without subtracting two large numbers.
    error = broadcast_like(b, o) * (expected.to(o.dtype) - o)
    terms = bound.kl(t, error, v)
    decoded = bound.decoder(x0[at_zero], error[at_zero], None if v is None else v[at_zero])
    return terms.index_copy(0, at_zero, decoded.to(terms.dtype)).mean()
