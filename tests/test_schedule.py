"""The schedule against the paper's formulas in numpy, and its errors."""

import numpy as np
import pytest
import torch

from fastddpm import Schedule


def test_linear_is_the_papers():
    schedule = Schedule.linear()
    betas = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - betas)
    previous = np.append(1.0, bar[:-1])
    assert len(schedule) == 1000
    for got, expected in [
        (schedule.betas, betas),
        (schedule.alphas_cumprod, bar),
        (schedule.posterior_variance, betas * (1 - previous) / (1 - bar)),
        (schedule.posterior_mean_coef1, np.sqrt(previous) * betas / (1 - bar)),
        (schedule.posterior_mean_coef2, np.sqrt(1 - betas) * (1 - previous) / (1 - bar)),
    ]:
        assert got.dtype == torch.float64
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)


def test_cosine_follows_its_formula():
    schedule = Schedule.cosine(50)
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1].numpy(), (f / f[0])[1:-1], rtol=1e-12)
    assert float(schedule.betas[-1]) == 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_add_noise_is_equation_4(dtype):
    schedule = Schedule.linear()
    x0, noise = torch.randn(5, 1, 4, 3).to(dtype), torch.randn(5, 1, 4, 3).to(dtype)
    t = torch.tensor([0, 1, 500, 998, 999])
    bar = schedule.alphas_cumprod[t][:, None, None, None]
    expected = bar.sqrt() * x0.double() + (1 - bar).sqrt() * noise.double()
    got = schedule.add_noise(x0, noise, t)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(schedule.add_noise(x0, noise, 500)[2], got[2])


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) by multiplying Gaussians directly: precisions add."""
    s = Schedule.linear(20, 1e-3, 0.3)
    t, x0, xt = 7, 0.3, -0.8
    bar = float(s.alphas_cumprod_prev[t])
    prior_mean, prior_var = bar**0.5 * x0, 1 - bar
    a, beta = float(s.alphas[t]), float(s.betas[t])
    precision = 1 / prior_var + a / beta
    mean = (prior_mean / prior_var + a**0.5 * xt / beta) / precision
    assert float(s.posterior_variance[t]) == pytest.approx(1 / precision, rel=1e-12)
    got = float(s.posterior_mean_coef1[t]) * x0 + float(s.posterior_mean_coef2[t]) * xt
    assert got == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("betas", "says"),
    [
        ([], "shape"),
        ([[0.1]], "shape"),
        ([0.1, 0.0], r"betas\[1\] = 0.0"),
        ([1.0], r"betas\[0\] = 1.0"),
        ([0.1, float("nan")], "nan"),
        ([0.5, -0.1], "-0.1"),
    ],
)
def test_bad_betas(betas, says):
    with pytest.raises(ValueError, match=f"betas: .*{says}"):
        Schedule(betas)


def test_bad_arguments():
    s, x = Schedule.linear(10), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="T: got 0"):
        Schedule.linear(0)
    with pytest.raises(ValueError, match="t: got 10; expected 0..9"):
        s.add_noise(x, x, 10)
    with pytest.raises(ValueError, match="t: got values from 0 to 10"):
        s.add_noise(x, x, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"t: got float32 \[2\]; expected int64 \[2\]"):
        s.add_noise(x, x, torch.zeros(2))
    with pytest.raises(ValueError, match="noise: got shape"):
        s.add_noise(x, x[:1], 0)
