"""A sampler is a table: the timesteps it visits and one row of step coefficients for each (see ops/ddpm_step.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .schedule import Schedule

PREDICTIONS = ("epsilon", "sample", "v_prediction", "mean")
SAMPLERS = ("ddpm",)
VARIANCES = ("fixed_large", "fixed_small", "none")


class Table(NamedTuple):
    timesteps: torch.Tensor  # int64 [S], in the order the chain visits them
    rows: torch.Tensor  # float64 [S, 9]


def _to_x0(prediction: str, abar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) with x0 = a*x_t + b*o; epsilon is eq. 15 solved for x0, v is Salimans & Ho 2022."""
    if prediction == "epsilon":
        return abar.rsqrt(), -((1 - abar) / abar).sqrt()
    if prediction == "v_prediction":
        return abar.sqrt(), -(1 - abar).sqrt()
    return torch.zeros_like(abar), torch.ones_like(abar)


def ddpm(schedule: Schedule, *, prediction: str = "epsilon", variance: str = "fixed_large") -> Table:
    """Ancestral sampling over all T steps (Ho et al. 2020, algorithm 2).

    x_prev = posterior mean(x_t, x0) + sigma z, with sigma^2 = beta ("fixed_large"), the posterior variance ("fixed_small") or 0
    ("none", an ablation: the chain collapses towards averages). sigma is 0 on the last row.
    """
    t = torch.arange(len(schedule)).flip(0)
    c0, c1 = schedule.posterior_mean_coef1[t], schedule.posterior_mean_coef2[t]
    a, b = _to_x0(prediction, schedule.alphas_cumprod[t])
    sigma = {
        "fixed_large": schedule.betas.sqrt(),
        "fixed_small": schedule.posterior_variance.sqrt(),
        "none": torch.zeros_like(schedule.betas),
    }[variance][t]
    sigma[-1] = 0
    zero = torch.zeros_like(c0)
    if prediction == "mean":  # the output is the mean; x0 is only reported
        rows = [-c1 / c0, 1 / c0, zero, zero, zero, zero + 1, sigma, zero, zero]
    else:
        rows = [a, b, c0, c1, zero, zero, sigma, zero, zero]
    return Table(t, torch.stack(rows, dim=1))
