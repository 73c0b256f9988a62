"""Samplers as tables: the timesteps that a chain visits, with one row of step coefficients for each (see ops/ddpm_step.py).

abar is the schedule's alphas_cumprod at a row's timestep. abar_prev is that at the next row's timestep, and 1 after the last row.

    ddpm     the posterior mean and variance of the chain of these timesteps, whose beta is 1 - abar/abar_prev
             (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, section 4)
    ddim     sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma z (Song et al. 2021, eq. 12), with the eps of the
             clipped x0
    dpm++2m  the second-order multistep solver of Lu et al. 2022, algorithm 2, in lambda = log sqrt(abar/(1 - abar))

If the schedule's last beta is 1, abar is 0 in the first row, that of T - 1. Every coefficient there is the limit for abar -> 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..ops.ddpm_step import C2, LV_HI
from .schedule import Schedule, posterior_coefficients

PREDICTIONS = ("epsilon", "sample", "v_prediction", "mean")
VARIANCES = ("fixed_large", "fixed_small", "learned_range", "none")
SPACINGS = ("leading", "linspace", "trailing", "logsnr")
LEAST_LAMBDA = -5.1  # diffusers' lambda_min_clipped; the linear schedule ends at -5.06
DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpm++2m": 20}  # None: all timesteps
DEFAULT_SPACING = {"ddpm": "trailing", "ddim": "trailing", "dpm++2m": "logsnr"}


class Table(NamedTuple):
    timesteps: torch.Tensor  # int64 [S], in the order in which the chain visits them
    rows: torch.Tensor  # float64 [S, 9]

    @property
    def uses_x0_last(self) -> bool:
        return bool((self.rows[:, C2] != 0).any())

    @property
    def uses_learned_variance(self) -> bool:
        """Return whether any row reads the second half of an output with 2C channels."""
        return bool((self.rows[:, LV_HI] != 0).any())


class Columns(NamedTuple):
    """The columns of a table's rows, each [S], in the order of ops/ddpm_step.py. None means 0 in every row."""

    a: torch.Tensor
    b: torch.Tensor
    c0: torch.Tensor
    c1: torch.Tensor
    c2: torch.Tensor | None = None
    d: torch.Tensor | None = None
    sigma: torch.Tensor | None = None
    lv_lo: torch.Tensor | None = None
    lv_hi: torch.Tensor | None = None

    def rows(self) -> torch.Tensor:
        """Stack the columns into float64 [S, 9]."""
        return torch.stack([torch.zeros_like(self.a) if v is None else v.double() for v in self], dim=1)


def check_prediction(schedule: Schedule, prediction: str) -> None:
    """Raise ValueError if x0 cannot be computed from the output. From eps it is (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    if prediction == "epsilon" and float(schedule.alphas_cumprod[-1]) == 0:
        raise ValueError(
            "prediction: got 'epsilon' with a schedule whose alphas_cumprod is 0 at its last timestep (zero terminal SNR): x_t "
            "is pure noise there, and x0 cannot be recovered from eps, as it would be (x_t - eps) / 0; expected "
            "v_prediction, sample or mean, with a network that predicts it, or a schedule whose last beta is below 1"
        )


def x0_coefficients(abar: torch.Tensor, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, b) with x0 = a*x_t + b*o. The output o is eps (eq. 15 solved for x0), v (Salimans & Ho 2022) or x0."""
    if prediction == "epsilon":
        return abar.rsqrt(), -((1 - abar) / abar).sqrt()
    if prediction == "v_prediction":
        return abar.sqrt(), -(1 - abar).sqrt()
    return torch.zeros_like(abar), torch.ones_like(abar)


def to_x0(schedule: Schedule, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, b), float64 [T], with x0 = a*x_t + b*o for an output o of this prediction type.

    For "mean" this is eq. 7 solved for x0.
    """
    if prediction == "mean":
        c0, c1 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return -c1 / c0, 1 / c0
    return x0_coefficients(schedule.alphas_cumprod, prediction)


def select_timesteps(schedule: Schedule, steps: int, spacing: str, start: int | None = None) -> torch.Tensor:
    """Return the timesteps in 0..start (default T - 1) that a chain of `steps` steps visits: int64 [steps], decreasing.

    "leading", "linspace" and "trailing" follow Lin et al. 2023 (table 2) and diffusers. "leading" takes the multiples of
    T // steps from 0, so that the chain begins below T - 1. "linspace" is even from T - 1 to 0. "trailing" is even from T - 1,
    and the step to x_0 is as long as every other step. "logsnr" is even in lambda from T - 1, but skips the range below
    LEAST_LAMBDA, which is almost pure noise. Without that limit the cosine schedule's last timesteps would use half of the steps.
    """
    T = len(schedule) if start is None else start + 1
    if spacing == "leading":
        t = [i * (T // steps) for i in range(steps)]
    elif spacing == "linspace":
        t = [round(i * (T - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [T - 1]
    elif spacing == "trailing":
        t = [round(i * T / steps) - 1 for i in range(1, steps + 1)]
    else:
        t = _even_in_lambda(schedule.alphas_cumprod[:T], steps)
    return torch.tensor(t[::-1], dtype=torch.int64, device="cpu")


def _even_in_lambda(abar: torch.Tensor, steps: int) -> list[int]:
    """Return `steps` distinct timesteps, increasing, spaced as evenly in lambda as possible."""
    T = len(abar)
    lam = _lambda(abar).clamp(min=-1e3)  # for abar > 0 lambda is above -373
    last = max(float(lam[-1]), min(LEAST_LAMBDA, float(lam[0])))
    wanted = torch.linspace(float(lam[0]), last, steps + 1, dtype=torch.float64, device="cpu")[1:]
    above = torch.searchsorted(-lam, -wanted).clamp(1, max(T - 1, 1)).clamp(max=T - 1)  # lambda decreases with t
    below = (above - 1).clamp(min=0)
    t = torch.where(wanted - lam[above] < lam[below] - wanted, above, below).tolist()
    t[-1] = T - 1
    for i in range(1, steps):  # the spacing in lambda grows towards t = 0, and each timestep is visited at most once
        t[i] = max(t[i], t[i - 1] + 1)
    for i in range(1, steps + 1):
        t[-i] = min(t[-i], T - i)
    return t


def _lambda(abar: torch.Tensor) -> torch.Tensor:
    return (abar.log() - (-abar).log1p()) / 2


def table(
    schedule: Schedule,
    *,
    sampler: str = "ddpm",
    prediction: str = "epsilon",
    variance: str = "fixed_large",
    eta: float = 0.0,
    timesteps: torch.Tensor | None = None,
) -> Table:
    """Return the sampler's table for the chain through `timesteps` (int64, decreasing; default all).

    `variance`, for "ddpm" only, determines sigma^2: beta ("fixed_large"), the posterior variance ("fixed_small"), a value between
    the two that the network predicts ("learned_range"), or 0 ("none", an ablation in which the chain collapses towards averages).
    `eta`, for "ddim" only, is sigma in units of the posterior's. sigma is 0 in the last row.
    """
    t = torch.arange(len(schedule), device="cpu").flip(0) if timesteps is None else timesteps
    abar = schedule.alphas_cumprod[t]
    abar_prev = torch.cat((abar[1:], abar.new_ones(1)))
    c2 = d = sigma = lv_lo = lv_hi = None
    if sampler == "dpm++2m":
        c0, c1, c2 = dpm_solver_coefficients(abar, abar_prev)
    elif sampler == "ddim":
        c0, c1, sigma = ddim_coefficients(abar, abar_prev, eta)
    else:
        c0, c1, beta, posterior = ddpm_coefficients(abar, abar_prev)
        sigma, lv_lo, lv_hi = _ddpm_noise(variance, abar, beta, posterior)
        if prediction == "mean" and int(t[0]) + 1 == len(t):
            # The output is the mean itself, so x_prev needs no x0 and is not clipped. x0 is only reported.
            c0 = c1 = torch.zeros_like(abar)
            d = torch.ones_like(abar)
    if sigma is not None:
        sigma[-1] = 0
    a, b = (v[t] for v in to_x0(schedule, prediction))
    return Table(t, Columns(a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi).rows())


def ddpm_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, beta, posterior variance) of DDPM's step. Its posterior mean is c0*x0 + c1*x_t."""
    alpha = abar / abar_prev
    beta = 1 - alpha
    variance, c0, c1 = posterior_coefficients(abar, abar_prev, alpha, beta)
    return c0, c1, beta, variance


def _ddpm_noise(
    variance: str, abar: torch.Tensor, beta: torch.Tensor, posterior: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return (sigma, lv_lo, lv_hi) of DDPM's steps for this kind of variance."""
    if variance == "none":
        return None, None, None
    if variance == "learned_range":
        lv_hi, lv_lo = beta.log(), posterior.log()
        lv_lo[-1] = lv_lo[-2] if len(abar) > 1 else lv_hi[-1]  # it is log 0, and the row adds no noise
        return torch.ones_like(beta), lv_lo, lv_hi
    # At abar = 0 beta is 1 for a step of any length, and x_prev contains nothing of x_t. The posterior's variance, 1 - abar_prev,
    # is then the variance of all noise in x_prev.
    large = torch.where(abar > 0, beta, posterior)
    return (large if variance == "fixed_large" else posterior).sqrt(), None, None


def ddim_variance(abar: torch.Tensor, abar_prev: torch.Tensor) -> torch.Tensor:
    """Return sigma^2 of DDIM's step at eta = 1, which is DDPM's posterior variance, in diffusers' order of operations."""
    return (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)


def ddim_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, sigma) of DDIM's step. Its eps is that of the clipped x0, (x_t - sqrt(abar) x0) / sqrt(1 - abar)."""
    sigma = eta * ddim_variance(abar, abar_prev).sqrt()
    c1 = ((1 - abar_prev - sigma**2).clamp(min=0) / (1 - abar)).sqrt()
    return abar_prev.sqrt() - c1 * abar.sqrt(), c1, sigma


def dpm_solver_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, c2) of the steps of DPM-Solver++(2M), for a whole chain.

    x_prev = (sigma_prev/sigma) x - sqrt(abar_prev) (e^-h - 1) D with D = x0 + (x0 - x0_last) / (2 r), h = lambda_prev - lambda
    and r = h_last / h. D is x0 in the first row, which has no x0_last, and in the last row. There h is infinite and x_prev = x0.
    In a row with abar = 0, h is infinite, too, and x_prev is DDIM's. The next row then has r = infinity, so D = x0.
    """
    lam = torch.cat((_lambda(abar), abar.new_full((1,), math.inf)))
    h = lam.diff()
    c0 = -abar_prev.sqrt() * torch.expm1(-h)
    c1 = ((1 - abar_prev) / (1 - abar)).sqrt()
    c2 = torch.zeros_like(c0)
    inner = slice(1, max(len(h) - 1, 1))
    half = h[inner] / h[: len(h[inner])] / 2  # 1 / (2 r)
    c2[inner] = -c0[inner] * half
    c0[inner] = c0[inner] * (1 + half)
    return c0, c1, c2


def inversion(schedule: Schedule, *, prediction: str = "epsilon", timesteps: torch.Tensor) -> Table:
    """Return the table of DDIM's reversed chain (Song et al. 2021, section 4.3), from a clean image to noise.

    `timesteps` is int64 and decreasing; the chain visits them in reverse. The step from abar to abar_next uses the eps that the
    network predicts for the current x at the timestep of abar_next, from which the corresponding sampling step starts. This
    inverts that step better than the timestep of x, which does not exist for a clean image.
    Raises ValueError for a single step to abar = 0, whose result would contain nothing of the image.
    """
    t = timesteps.flip(0)
    abar_next = schedule.alphas_cumprod[t]
    abar = torch.cat((abar_next.new_ones(1), abar_next[:-1]))
    a, b = (v[t] for v in to_x0(schedule, prediction))
    # eps = (x - sqrt(abar_next) (a x + b o)) / sqrt(1 - abar_next) = eps_from_x x + eps_from_output o
    eps_from_x = (1 - abar_next.sqrt() * a) / (1 - abar_next).sqrt()
    eps_from_output = -(abar_next / (1 - abar_next)).sqrt() * b
    if prediction == "epsilon":
        eps_from_x.zero_()  # exactly 0; the formula leaves a rounding error
    noise, noise_next = (1 - abar).sqrt(), (1 - abar_next).sqrt()
    rows = Columns(
        a=(1 - noise * eps_from_x) / abar.sqrt(),
        b=-noise * eps_from_output / abar.sqrt(),
        c0=abar_next.sqrt(),
        c1=noise_next * eps_from_x,
        d=noise_next * eps_from_output,
    ).rows()
    if float(abar_next[-1]) == 0:
        if len(t) == 1:
            raise ValueError(
                "steps: got 1; expected at least 2: the schedule's alphas_cumprod is 0 at its last timestep, so the result of a "
                "single step contains nothing of the image"
            )
        # At abar_next = 0, x is its own eps, independent of the network. So the sampling step from there,
        # x = sqrt(abar) x0 + sqrt(1 - abar) x_T with the network's x0, is solved for x_T.
        signal, noise = abar[-1:].sqrt(), noise[-1:]
        rows[-1:] = Columns(a[-1:], b[-1:], -signal / noise, 1 / noise).rows()
    return Table(t, rows)
