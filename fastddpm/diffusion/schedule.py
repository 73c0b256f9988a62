"""The forward process: the betas and all coefficients derived from them, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..utils.validation import as_int, check_int, dtype_name
from ..utils.warn import warn_once

__all__ = ["Schedule"]


class Schedule:
    """A variance schedule beta_1..beta_T (Ho et al. 2020, section 2) and the coefficients derived from it.

    Timesteps are 0-based: t = 0 is the paper's t = 1.

    Args:
        betas: T numbers in (0, 1), with T from 1 to 2^20 - 1. The last may be 1, so that x_T contains nothing of x_0 (zero
            terminal SNR, Lin et al. 2023). The network must then predict x_0, v or the mean.

    Attributes:
        betas: The variances of the forward steps, float64 [T] on the CPU, as all attributes.
        alphas: 1 - betas.
        alphas_cumprod: The paper's alpha-bar, the cumulative product of alphas.
        alphas_cumprod_prev: alphas_cumprod shifted by one; the first entry is 1.
        posterior_variance: The variance of the posterior q(x_{t-1} | x_t, x_0) (eq. 7).
        posterior_mean_coef1: The coefficient of x_0 in the posterior's mean (eq. 7).
        posterior_mean_coef2: The coefficient of x_t in the posterior's mean (eq. 7).

    Raises:
        ValueError: If betas has another shape or a value outside (0, 1), or if alphas_cumprod underflows to 0 before the last
            timestep.
    """

    def __init__(self, betas: torch.Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if betas.dim() != 1 or not 1 <= betas.numel() < 1 << 20:
            raise ValueError(f"betas: got shape {list(betas.shape)}; expected [T] with T from 1 to 2^20 - 1")
        outside = ~((betas > 0) & (betas < 1))  # also true for NaN
        outside[-1] &= betas[-1] != 1
        if outside.any():
            t = int(outside.nonzero()[0])
            raise ValueError(f"betas: betas[{t}] = {float(betas[t])}; expected every beta in (0, 1); the last may be 1")
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        if (self.alphas_cumprod[:-1] == 0).any():
            t = int((self.alphas_cumprod == 0).nonzero()[0])
            raise ValueError(
                f"betas: alphas_cumprod underflows float64 to 0 at t = {t}; expected betas for which it is positive before the "
                "last timestep: pass fewer or smaller ones"
            )
        self.alphas_cumprod_prev = torch.cat(
            (torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1])
        )
        self.posterior_variance, self.posterior_mean_coef1, self.posterior_mean_coef2 = posterior_coefficients(
            self.alphas_cumprod, self.alphas_cumprod_prev, self.alphas, betas
        )

    @classmethod
    def linear(cls, T: int = 1000, start: float | None = None, end: float | None = None) -> Schedule:
        """Return the paper's schedule: T evenly spaced betas from `start` to `end`.

        If T is not 1000 and start or end is None, a warning reports the betas that are used.

        Args:
            T: The number of timesteps, from 1 to 2^20 - 1.
            start: The first beta. Default: the paper's 1e-4 times 1000/T, at most 0.999.
            end: The last beta. Default: the paper's 0.02 times 1000/T, at most 0.999. With these defaults x_T is as noisy as
                after the paper's 1000 steps (Nichol & Dhariwal 2021).

        Returns:
            A `Schedule` of T timesteps.

        Raises:
            ValueError: If T is out of range or a beta is outside (0, 1).
        """
        T = _count(T)
        ends = [min(1000 / T * e, 0.999) if value is None else value for e, value in ((1e-4, start), (0.02, end))]
        if T == 1:
            ends[0] = ends[1]  # the single step must remove the whole image
        schedule = cls(torch.linspace(*ends, T, dtype=torch.float64, device="cpu"))
        if T != 1000 and (start is None or end is None):
            first, last = schedule.betas[[0, -1]].tolist()
            warn_once(
                cls,
                f"Schedule.linear({T}): uses betas from {first:.4g} to {last:.4g}; the default of start or end is the paper's "
                "1e-4 or 0.02 times 1000/T, at most 0.999. Pass both to specify the betas that a network was trained with",
            )
        return schedule

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """Return the cosine schedule of Nichol & Dhariwal 2021, eq. 17, with betas of at most 0.999.

            alpha-bar(t) = cos^2((t/T + 0.008)/1.008 * pi/2)

        Args:
            T: The number of timesteps, from 1 to 2^20 - 1.

        Returns:
            A `Schedule` of T timesteps.

        Raises:
            ValueError: If T is out of range.
        """
        T = _count(T)
        bar = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return cls([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(T)])

    def __len__(self) -> int:
        """Return T, the number of timesteps."""
        return self.betas.numel()

    def __repr__(self) -> str:
        return f"Schedule(T={len(self)}, betas {float(self.betas[0]):.3g} to {float(self.betas[-1]):.3g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(self.betas, other.betas)

    __hash__ = None

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """Return x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps (eq. 4).

        Args:
            x0: The images x_0, [N, ...], in a floating dtype.
            noise: The noise eps, with x0's shape.
            t: The timestep: an int in 0..T-1, or int64 [N] with one for each image.

        Returns:
            x_t, with x0's shape. The coefficients are computed in float64 and rounded once to x0's dtype.

        Raises:
            ValueError: If noise or t has another shape, or t is out of range (not checked for a t on a GPU).
        """
        if noise.shape != x0.shape:
            raise ValueError(f"noise: got shape {list(noise.shape)}; expected x0's {list(x0.shape)}")
        signal = _extract(self.alphas_cumprod.sqrt(), t, x0)
        return signal * x0 + _extract((1 - self.alphas_cumprod).sqrt(), t, x0) * noise


def posterior_coefficients(
    abar: torch.Tensor, abar_prev: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the variance of q(x_prev | x_t, x_0) and the coefficients of x_0 and x_t in its mean (eqs. 6 and 7)."""
    variance = beta * (1 - abar_prev) / (1 - abar)
    return variance, abar_prev.sqrt() * beta / (1 - abar), alpha.sqrt() * (1 - abar_prev) / (1 - abar)


def _count(T: object) -> int:
    return check_int("T", T, 1, 1 << 20, "a number of timesteps from 1 to 2^20 - 1")


def _extract(values: torch.Tensor, t: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return values[t] in the dtype and on the device of `like`, shaped to broadcast over [N, ...]."""
    steps = len(values)
    if (number := as_int(t)) is not None:
        if not 0 <= number < steps:
            raise ValueError(f"t: got {number}; expected 0..{steps - 1}")
        return values[number].to(like)
    if not isinstance(t, torch.Tensor):
        raise ValueError(f"t: got {t!r}; expected an int in 0..{steps - 1}, or int64 [{like.shape[0]}]")
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise ValueError(f"t: got {dtype_name(t.dtype)} {list(t.shape)}; expected int64 [{like.shape[0]}]")
    if t.device.type == "cpu" and t.numel() and not (0 <= int(t.min()) and int(t.max()) < steps):
        raise ValueError(f"t: got values from {int(t.min())} to {int(t.max())}; expected 0..{steps - 1}")
    chosen = values.to(like.device)[t.to(like.device)].to(like.dtype)
    return chosen.reshape(-1, *[1] * (like.dim() - 1))
