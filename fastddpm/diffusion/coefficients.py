"""A sampler is a table: the timesteps it visits and one row of step coefficients for each (see ops/ddpm_step.py).

With abar the schedule's alphas_cumprod at a row's timestep and abar_prev that of the next one (1 behind the last row):

    ddpm     the posterior mean and variance of the chain that is left, whose beta is 1 - abar/abar_prev
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
from .schedule import Schedule

PREDICTIONS = ("epsilon", "sample", "v_prediction", "mean")
VARIANCES = ("fixed_large", "fixed_small", "learned_range", "none")
SPACINGS = ("leading", "linspace", "trailing", "logsnr")
LEAST_LAMBDA = -5.1  # diffusers' lambda_min_clipped; the linear schedule ends at -5.06
STEPS = {"ddpm": None, "ddim": 50, "dpm++2m": 20}  # how many a sampler takes unless told otherwise; None: all
SPACING = {"ddpm": "trailing", "ddim": "trailing", "dpm++2m": "logsnr"}


class Table(NamedTuple):
    timesteps: torch.Tensor  # int64 [S], in the order the chain visits them
    rows: torch.Tensor  # float64 [S, 9]

    @property
    def multistep(self) -> bool:
        """Whether a row reads the x0 of the row before."""
        return bool((self.rows[:, C2] != 0).any())

    @property
    def learned(self) -> bool:
        """Whether a row reads the second half of an output with 2C channels."""
        return bool((self.rows[:, LV_HI] != 0).any())


def check_prediction(schedule: Schedule, prediction: str) -> None:
    """Raise ValueError where x0 does not follow from the output: from eps it is (x_t - sqrt(1 - abar) eps) / sqrt(abar)."""
    if prediction == "epsilon" and float(schedule.alphas_cumprod[-1]) == 0:
        raise ValueError(
            "prediction: got 'epsilon' with a schedule whose alphas_cumprod is 0 at its last timestep (zero terminal SNR): x_t "
            "is noise alone there, and x0 cannot be recovered from eps, as it would be (x_t - eps) / 0; expected "
            "v_prediction, sample or mean, for a network that predicts this, or a schedule whose last beta is below 1"
        )


def to_x0(schedule: Schedule, prediction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b), float64 [T], with x0 = a*x_t + b*o for an output o of this kind.

    Epsilon is eq. 15 solved for x0, v is Salimans & Ho 2022, and the mean is eq. 7 solved for x0.
    """
    abar = schedule.alphas_cumprod
    if prediction == "epsilon":
        return abar.rsqrt(), -((1 - abar) / abar).sqrt()
    if prediction == "v_prediction":
        return abar.sqrt(), -(1 - abar).sqrt()
    if prediction == "mean":
        c0, c1 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return -c1 / c0, 1 / c0
    return torch.zeros_like(abar), torch.ones_like(abar)


def spaced(schedule: Schedule, steps: int, spacing: str, start: int | None = None) -> torch.Tensor:
    """int64 [steps], falling: which of the timesteps 0..start (default T - 1) a chain of so many steps visits.

    "leading", "linspace" and "trailing" as Lin et al. 2023 (table 2) and diffusers have them: multiples of T // steps from 0 on,
    so that the chain begins below T - 1; evenly from T - 1 to 0; and evenly from T - 1 on with the step to x_0 as long as the
    others. "logsnr": evenly in lambda from T - 1 on, likewise, but for what lies below LEAST_LAMBDA, where there is next to
    nothing but noise: the cosine schedule's last timesteps would take half of the steps.
    """
    T = len(schedule) if start is None else start + 1
    if spacing == "leading":
        t = [i * (T // steps) for i in range(steps)]
    elif spacing == "linspace":
        t = [round(i * (T - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [T - 1]
    elif spacing == "trailing":
        t = [round(i * T / steps) - 1 for i in range(1, steps + 1)]
    else:
        lam = _lambda(schedule.alphas_cumprod[:T]).clamp(min=-1e3)  # of abar > 0 it is above -373
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
    return torch.tensor(t[::-1], dtype=torch.int64, device="cpu")


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
    """The chain through `timesteps` (int64, falling; default all).

    variance ("ddpm" alone): sigma^2 = beta ("fixed_large"), the posterior variance ("fixed_small"), between them as the
    network says ("learned_range"), or 0 ("none", an ablation: the chain collapses towards averages). eta ("ddim" alone): sigma in
    units of the posterior's. sigma is 0 on the last row.
    """
    t = torch.arange(len(schedule), device="cpu").flip(0) if timesteps is None else timesteps
    abar = schedule.alphas_cumprod[t]
    prev = torch.cat((abar[1:], abar.new_ones(1)))
    a, b = (v[t] for v in to_x0(schedule, prediction))
    zero = torch.zeros_like(abar)
    c2, d, sigma, lv_lo, lv_hi = zero, zero, zero, zero, zero
    if sampler == "dpm++2m":
        c0, c1, c2 = _multistep(abar, prev)
    elif sampler == "ddim":
        sigma = eta * ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt()
        c1 = ((1 - prev - sigma**2).clamp(min=0) / (1 - abar)).sqrt()
        c0 = prev.sqrt() - c1 * abar.sqrt()
    else:
        alpha = abar / prev
        beta = 1 - alpha
        posterior = beta * (1 - prev) / (1 - abar)
        c0, c1 = prev.sqrt() * beta / (1 - abar), alpha.sqrt() * (1 - prev) / (1 - abar)
        if prediction == "mean" and int(t[0]) + 1 == len(t):
            # The output is the mean itself, and is not clipped; x0 is only reported.
            c0, c1, d = zero, zero, zero + 1
        if variance == "learned_range":
            lv_hi, lv_lo = beta.log(), posterior.log()
            lv_lo[-1] = lv_lo[-2] if len(t) > 1 else lv_hi[-1]  # log 0: of a row that adds no noise
            sigma = torch.ones_like(beta)
        elif variance != "none":
            # At abar = 0 beta is 1 however long the step, and nothing of x_t goes into x_prev: the posterior's 1 - prev is all
            # the noise that x_prev has.
            large = torch.where(abar > 0, beta, posterior)
            sigma = (large if variance == "fixed_large" else posterior).sqrt()
        sigma = torch.cat((sigma[:-1], zero[:1]))
    return Table(t, torch.stack([a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi], dim=1))


def inversion(schedule: Schedule, *, prediction: str = "epsilon", timesteps: torch.Tensor) -> Table:
    """DDIM backwards (Song et al. 2021, section 4.3): from a clean image, at abar = 1, up through `timesteps` (int64, falling).

    The step from abar to abar_next takes the eps that the network gives for this x at the timestep it goes to, which is the
    one that the step down came from: it undoes that better than the timestep of x, which a clean image doesn't have.
    Raises ValueError for a single step to abar = 0, which would have nothing of the image.
    """
    t = timesteps.flip(0)
    above = schedule.alphas_cumprod[t]
    abar = torch.cat((above.new_ones(1), above[:-1]))
    a, b = (v[t] for v in to_x0(schedule, prediction))
    # eps = (x - sqrt(above) (a x + b o)) / sqrt(1 - above) = of_x x + of_o o
    of_x, of_o = (1 - above.sqrt() * a) / (1 - above).sqrt(), -(above / (1 - above)).sqrt() * b
    if prediction == "epsilon":
        of_x.zero_()  # but for rounding it is
    noise = (1 - abar).sqrt()
    zero = torch.zeros_like(abar)
    rows = [
        (1 - noise * of_x) / abar.sqrt(), -noise * of_o / abar.sqrt(), above.sqrt(), (1 - above).sqrt() * of_x, zero,
        (1 - above).sqrt() * of_o, zero, zero, zero,
    ]  # fmt: skip
    rows = torch.stack(rows, dim=1)
    if float(above[-1]) == 0:
        if len(t) == 1:
            raise ValueError(
                "steps: got 1; expected at least 2: the schedule's alphas_cumprod is 0 at its last timestep, and a single step "
                "from an image to there leaves nothing of it"
            )
        # There x is its own eps, whatever the network says. The step down, x = sqrt(abar) x0 + sqrt(1 - abar) x_T, takes the
        # network's x0 and is solved for x_T.
        signal, noise = abar[-1].sqrt(), (1 - abar[-1]).sqrt()
        rows[-1] = torch.stack([a[-1], b[-1], -signal / noise, 1 / noise, *zero[-1].expand(5)])
    return Table(t, rows)


def _multistep(abar: torch.Tensor, prev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c0, c1, c2) of DPM-Solver++(2M): x_prev = (sigma_prev/sigma) x - sqrt(abar_prev) (e^-h - 1) D, where
    D = x0 + (x0 - x0_last) / (2 r), h = lambda_prev - lambda and r = h_last / h. Without D's difference on the first
    row, which has none, and on the last, where h is infinite and x_prev = x0. From abar = 0 h is infinite too: x_prev is then
    ddim's, and the row behind has r = infinity, which takes the difference away."""
    lam = torch.cat((_lambda(abar), abar.new_full((1,), math.inf)))
    h = lam.diff()
    c0 = -prev.sqrt() * torch.expm1(-h)
    c1 = ((1 - prev) / (1 - abar)).sqrt()
    c2 = torch.zeros_like(c0)
    inner = slice(1, max(len(h) - 1, 1))
    half = h[inner] / h[: len(h[inner])] / 2  # 1 / (2 r)
    c2[inner] = -c0[inner] * half
    c0[inner] = c0[inner] * (1 + half)
    return c0, c1, c2
