"""The forward process: betas and every coefficient that follows from them, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Schedule"]


class Schedule:
    """A variance schedule beta_1..beta_T (Ho et al. 2020, section 2), everything derived from it in float64 on the CPU.

    betas: T numbers in (0, 1), T at most 2^20. Timesteps are 0-based: t = 0 is the paper's t = 1.

    Attributes, float64 [T]: `betas`; `alphas` = 1 - betas; `alphas_cumprod` (the paper's alpha-bar); `alphas_cumprod_prev`
    (shifted by one, first entry 1); the posterior q(x_{t-1} | x_t, x_0) of eqs. 6 and 7: `posterior_variance`,
    `posterior_mean_coef1` (of x_0), `posterior_mean_coef2` (of x_t).
    """

    def __init__(self, betas: torch.Tensor | Sequence[float]) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").clone()
        if betas.dim() != 1 or not 1 <= betas.numel() < 1 << 20:
            raise ValueError(f"betas: got shape {list(betas.shape)}; expected [T] with T from 1 to 2^20 - 1")
        outside = ~((betas > 0) & (betas < 1))  # also true for NaN
        if outside.any():
            t = int(outside.nonzero()[0])
            raise ValueError(f"betas: betas[{t}] = {float(betas[t])}; expected every beta in (0, 1)")
        self.betas = betas
        self.alphas = 1 - betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat(
            (torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod[:-1])
        )
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef1 = self.alphas_cumprod_prev.sqrt() * betas / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = self.alphas.sqrt() * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @classmethod
    def linear(cls, T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Schedule:
        """The paper's schedule: betas from `start` to `end` in T equal steps."""
        _check_count(T)
        return cls(torch.linspace(start, end, T, dtype=torch.float64, device="cpu"))

    @classmethod
    def cosine(cls, T: int = 1000) -> Schedule:
        """Nichol & Dhariwal 2021, eq. 17: alpha-bar(t) = cos^2((t/T + 0.008)/1.008 * pi/2), betas capped at 0.999."""
        _check_count(T)
        bar = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
        return cls([min(1 - bar[t + 1] / bar[t], 0.999) for t in range(T)])

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return self.betas.numel()

    def __repr__(self) -> str:
        return f"Schedule(T={len(self)}, betas {float(self.betas[0]):.3g} to {float(self.betas[-1]):.3g})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and torch.equal(self.betas, other.betas)

    __hash__ = None

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps (eq. 4).

        x0, noise: [N, ...] of one shape. t: int, or int64 [N], in 0..T-1. Coefficients are taken in float64 and rounded once.
        """
        if noise.shape != x0.shape:
            raise ValueError(f"noise: got shape {list(noise.shape)}; expected x0's {list(x0.shape)}")
        signal = _extract(self.alphas_cumprod.sqrt(), t, x0)
        return signal * x0 + _extract((1 - self.alphas_cumprod).sqrt(), t, x0) * noise


def _check_count(T: int) -> None:
    if isinstance(T, bool) or not isinstance(T, int) or not 1 <= T < 1 << 20:
        raise ValueError(f"T: got {T!r}; expected a number of timesteps from 1 to 2^20 - 1")


def _extract(values: torch.Tensor, t: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """values[t] in the dtype and on the device of `like`, shaped to broadcast over [N, ...]."""
    steps = len(values)
    if isinstance(t, int):
        if not 0 <= t < steps:
            raise ValueError(f"t: got {t}; expected 0..{steps - 1}")
        return values[t].to(like)
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise ValueError(
            f"t: got {str(t.dtype).removeprefix('torch.')} {list(t.shape)}; expected int64 [{like.shape[0]}]"
        )
    if t.device.type == "cpu" and t.numel() and not (0 <= int(t.min()) and int(t.max()) < steps):
        raise ValueError(f"t: got values from {int(t.min())} to {int(t.max())}; expected 0..{steps - 1}")
    chosen = values.to(like.device)[t.to(like.device)].to(like.dtype)
    return chosen.reshape(-1, *[1] * (like.dim() - 1))
