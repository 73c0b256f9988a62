"""A sampler is a table: the timesteps it visits and one row of step coefficients for each (see ops/ddpm_step.py).

abar is the schedule's alphas_cumprod at a row's timestep, and abar_prev that at the next row's (1 after the last row):

    ddpm     the posterior mean and variance of the chain of these timesteps, whose beta is 1 - abar/abar_prev
             (Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, section 4)
    ddim     sqrt(abar_prev) x0 + sqrt(1 - abar_prev - sigma^2) eps + sigma z (Song et al. 2021, eq. 12), eps being that of the
             clipped x0
    dpm++2m  the second-order multistep solver of Lu et al. 2022, algorithm 2, in lambda = log sqrt(abar/(1 - abar))

Where the last beta is 1, abar is 0 on the row of T - 1, which is the first, and every coefficient is the limit for abar -> 0.
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
    timesteps: torch.Tensor  # int64 [S], in the order the chain visits them
    rows: torch.Tensor  # float64 [S, 9]

    @property
    def uses_x0_last(self) -> bool:
        return bool((self.rows[:, C2] != 0).any())

    @property
    def uses_learned_variance(self) -> bool:
        """Whether a row reads the second half of an output with 2C channels."""
        return bool((self.rows[:, LV_HI] != 0).any())


class Columns(NamedTuple):
    """The columns of a table's rows, each [S], in the order of ops/ddpm_step.py; None is 0 in every row."""

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
    """Raise ValueError where x0 does not follow from the output: from eps it is (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    if prediction == "epsilon" and float(schedule.alphas_cumprod[-1]) == 0:
        raise ValueError(
            "prediction: got 'epsilon' with a schedule whose alphas_cumprod is 0 at its last timestep (zero terminal SNR): x_t "
            "is noise alone there, and x0 cannot be recovered from eps, as it would be (x_t - eps) / 0; expected "
            "v_prediction, sample or mean, for a network that predicts this, or a schedule whose last beta is below 1"
        )


def x0_coefficients(abar: torch.Tensor, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, b) with x0 = a*x_t + b*o for an output o that is eps (eq. 15 solved for x0), v (Salimans & Ho 2022) or x0."""
    if prediction == "epsilon":
        return abar.rsqrt(), -((1 - abar) / abar).sqrt()
    if prediction == "v_prediction":
        return abar.sqrt(), -(1 - abar).sqrt()
    return torch.zeros_like(abar), torch.ones_like(abar)


def to_x0(schedule: Schedule, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, b), float64 [T], with x0 = a*x_t + b*o for an output o of this prediction type.

    Of "mean" it is eq. 7 solved for x0.
    """
    if prediction == "mean":
        c0, c1 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return -c1 / c0, 1 / c0
    return x0_coefficients(schedule.alphas_cumprod, prediction)


def select_timesteps(schedule: Schedule, steps: int, spacing: str, start: int | None = None) -> torch.Tensor:
    """Return the timesteps of 0..start (default T - 1) that a chain of `steps` steps visits: int64 [steps], falling.

    "leading", "linspace" and "trailing" follow Lin et al. 2023 (table 2) and diffusers: multiples of T // steps from 0 on, so
    that the chain begins below T - 1; evenly from T - 1 to 0; evenly from T - 1 on, with the step to x_0 as long as the others.
    "logsnr" is even in lambda from T - 1 on, but leaves out what lies below LEAST_LAMBDA, which is almost only noise: the cosine
    schedule's last timesteps would take half of the steps.
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
    """Return `steps` different timesteps, rising, as evenly spaced in lambda as there are."""
    T = len(abar)
    lam = _lambda(abar).clamp(min=-1e3)  # of abar > 0 it is above -373
    last = max(float(lam[-1]), min(LEAST_LAMBDA, float(lam[0])))
    wanted = torch.linspace(float(lam[0]), last, steps + 1, dtype=torch.float64, device="cpu")[1:]
    above = torch.searchsorted(-lam, -wanted).clamp(1, max(T - 1, 1)).clamp(max=T - 1)  # lambda falls with t
    below = (above - 1).clamp(min=0)
    t = torch.where(wanted - lam[above] < lam[below] - wanted, above, below).tolist()
    t[-1] = T - 1
    for i in range(1, steps):  # timesteps are wider apart in lambda towards 0, and each can be visited once
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
    """Return the chain through `timesteps` (int64, falling; default all).

    variance ("ddpm" alone): sigma^2 is beta ("fixed_large"), the posterior variance ("fixed_small"), between the two as the
    network predicts ("learned_range"), or 0 ("none", an ablation: the chain collapses towards averages). eta ("ddim" alone):
    sigma in units of the posterior's. sigma is 0 on the last row.
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
            # The output is the mean itself, and is not clipped; x0 is only reported.
            c0 = c1 = torch.zeros_like(abar)
            d = torch.ones_like(abar)
    if sigma is not None:
        sigma[-1] = 0
    a, b = (v[t] for v in to_x0(schedule, prediction))
    return Table(t, Columns(a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi).rows())


def ddpm_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, beta, posterior variance) of DDPM's step, whose posterior mean is c0*x0 + c1*x_t."""
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
        lv_lo[-1] = lv_lo[-2] if len(abar) > 1 else lv_hi[-1]  # log 0: of a row that adds no noise
        return torch.ones_like(beta), lv_lo, lv_hi
    # At abar = 0 beta is 1 however long the step, and nothing of x_t goes into x_prev: the posterior's 1 - abar_prev is all the
    # noise that x_prev has.
    large = torch.where(abar > 0, beta, posterior)
    return (large if variance == "fixed_large" else posterior).sqrt(), None, None


def ddim_variance(abar: torch.Tensor, abar_prev: torch.Tensor) -> torch.Tensor:
    """Return sigma^2 of DDIM's step at eta = 1, which is DDPM's posterior variance, in diffusers' order of operations."""
    return (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)


def ddim_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor, eta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, sigma) of DDIM's step, with the eps of the clipped x0: (x_t - sqrt(abar) x0) / sqrt(1 - abar)."""
    sigma = eta * ddim_variance(abar, abar_prev).sqrt()
    c1 = ((1 - abar_prev - sigma**2).clamp(min=0) / (1 - abar)).sqrt()
    return abar_prev.sqrt() - c1 * abar.sqrt(), c1, sigma


def dpm_solver_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (c0, c1, c2) of DPM-Solver++(2M)'s steps, over a whole chain.

    x_prev = (sigma_prev/sigma) x - sqrt(abar_prev) (e^-h - 1) D, where D = x0 + (x0 - x0_last) / (2 r), h = lambda_prev - lambda
    and r = h_last / h. D is x0 alone on the first row, which has no x0_last, and on the last, where h is infinite: x_prev = x0.
    From abar = 0 h is infinite too: x_prev is then DDIM's, and the next row has r = infinity, which leaves D = x0.
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
    """Return DDIM's chain backwards (Song et al. 2021, section 4.3), from a clean image up through `timesteps` (int64, falling).

    The step from abar to abar_next takes the eps that the network predicts for this x at the timestep of abar_next, which the
    step down would start from: it undoes that step better than the timestep of x, which a clean image doesn't have.
    Raises ValueError for a single step to abar = 0, which would have nothing of the image.
    """
    t = timesteps.flip(0)
    abar_next = schedule.alphas_cumprod[t]
    abar = torch.cat((abar_next.new_ones(1), abar_next[:-1]))
    a, b = (v[t] for v in to_x0(schedule, prediction))
    # eps = (x - sqrt(abar_next) (a x + b o)) / sqrt(1 - abar_next) = eps_from_x x + eps_from_output o
    eps_from_x = (1 - abar_next.sqrt() * a) / (1 - abar_next).sqrt()
    eps_from_output = -(abar_next / (1 - abar_next)).sqrt() * b
    if prediction == "epsilon":
        eps_from_x.zero_()  # it is 0, but for rounding
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
                "steps: got 1; expected at least 2: the schedule's alphas_cumprod is 0 at its last timestep, and a single step "
                "from an image to there leaves nothing of it"
            )
        # There x is its own eps, whatever the network predicts. The step down, x = sqrt(abar) x0 + sqrt(1 - abar) x_T, takes the
        # network's x0 and is solved for x_T.
        signal, noise = abar[-1:].sqrt(), noise[-1:]
        rows[-1:] = Columns(a[-1:], b[-1:], -signal / noise, 1 / noise).rows()
    return Table(t, rows)
