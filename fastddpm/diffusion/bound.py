"""The terms of the variational bound (Ho et al. 2020, eqs. 5 and 13)."""

from __future__ import annotations

import math

import torch

from .coefficients import VARIANCES
from .schedule import Schedule


class Bound:
    """The terms of the variational bound L = L_T + ... + L_1 + L_0 (eq. 5).

    Each term is [N], in bits per dimension, averaged over the dimensions of an image. t counts from 0. For t >= 1, L_t is
    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). L_0 is the decoder's term (eq. 13). The model's mean is the posterior's with
    x0_hat instead of x_0, so these terms depend on the model only through error = x_0 - x0_hat and its variance.

    Attributes:
        log_variance: The model's log sigma^2 if it is fixed, float64 [T]; None for "learned_range". At t = 0 the posterior's
            variance is 0, so its value at t = 1 replaces it, and beta too (as in the paper's code for CIFAR-10). With T = 1
            beta is used. Where alphas_cumprod is 0, "fixed_large" is the posterior's variance, as in the chain's step, and L_T
            is 0.
    """

    def __init__(self, schedule: Schedule, variance: str, device: torch.device | str = "cpu") -> None:
        """Raise ValueError unless `variance` is "fixed_large", "fixed_small" or "learned_range": "none" has no density."""
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
        """Return L_T = KL(q(x_T | x_0) || N(0, 1)) for x0 [N, ...], in x0's dtype."""
        return bits_per_dim((x0.square() * self.last - math.log1p(-self.last) - self.last) / 2)

    def kl(self, t: torch.Tensor, error: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """Return L_t for t int64 [N], in the dtype of error [N, ...]. Each t must be >= 1; for t = 0 the value is meaningless.

        `v`, like error, is the second half of the output of a model with "learned_range".
        """
        gap = self.coefficient[t].square() / 2
        if self.log_variance is not None:  # L_t is a constant plus a multiple of the squared error
            log_variance = self.log_variance[t]
            constant = self._spread(log_variance - self.log_posterior[t]) / math.log(2)
            return constant.to(error.dtype) + (gap * (-log_variance).exp()).to(error.dtype) * bits_per_dim(
                error.square()
            )
        log_variance = self._log_variance(t, v)
        spread = self._spread(log_variance - broadcast_like(self.log_posterior[t], v))
        return bits_per_dim(spread + broadcast_like(gap, error) * error.square() * (-log_variance).exp())

    def decoder(self, x0: torch.Tensor, error: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """Return L_0, float64 [N]: minus the log mass of N(x0 - error, sigma^2) from x0 - 1/255 to x0 + 1/255 (eq. 13).

        The interval of x0 = -1 extends to -infinity, that of x0 = 1 to infinity. x0, error and v are [N, ...], in any floating
        dtype.
        """
        x0, error = x0.double(), error.double()
        if self.log_variance is None:
            log_variance = self._log_variance(torch.zeros(len(x0), dtype=torch.int64, device=x0.device), v.double())
        else:
            log_variance = self.log_variance[0]
        scale = (-log_variance / 2).exp()
        centre, half = error * scale, scale / 255
        # By symmetry the interval can be mirrored to the left, where log_ndtr has full precision.
        upper, lower = torch.special.log_ndtr(half - centre.abs()), torch.special.log_ndtr(-half - centre.abs())
        inside = upper + (-torch.expm1(lower - upper)).log()
        edge = torch.special.log_ndtr(half - x0 * centre)  # used only for x0 = -1 or 1
        return bits_per_dim(-torch.where(x0.abs() > 0.999, edge, inside))

    def _log_variance(self, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return log sigma^2: v in [-1, 1] interpolates log beta and the posterior's (Nichol & Dhariwal 2021, eq. 15)."""
        fraction = (v + 1) / 2
        return fraction * broadcast_like(self.log_beta[t], v) + (1 - fraction) * broadcast_like(
            self.log_posterior[t], v
        )

    @staticmethod
    def _spread(log_ratio: torch.Tensor) -> torch.Tensor:
        """Return the KL divergence of two normals with equal means, in nats, from the log of (second variance / first)."""
        return (log_ratio + torch.expm1(-log_ratio)) / 2


def bits_per_dim(nats: torch.Tensor) -> torch.Tensor:
    """Return the mean over each row of [N, ...], converted from nats to bits: [N]."""
    return nats.flatten(1).mean(1) / math.log(2)


def broadcast_like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return values [N] in x's dtype, shaped to broadcast over x."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
