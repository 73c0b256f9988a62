"""The schedule against the paper's formulas in numpy, and its errors."""

import warnings

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


@pytest.mark.parametrize("T", [2, 10, 19, 21, 100, 999, 1001, 2000])
def test_linear_of_other_lengths_is_as_noisy(T):
    """The betas are guided-diffusion's if those are below 1. x_T is almost pure noise. One warning names the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = [Schedule.linear(T) for _ in range(2)]
        half = Schedule.linear(T, end=0.5)
        Schedule.linear(T, 1e-4, 0.02), Schedule.linear(), Schedule.linear(1000, end=0.03)
    ends = min(0.1 / T, 0.999), min(20 / T, 0.999)
    betas = np.linspace(*ends, T)
    assert drawn[0] == drawn[1]
    np.testing.assert_allclose(drawn[0].betas.numpy(), betas, rtol=1e-12)
    np.testing.assert_allclose(half.betas.numpy(), np.linspace(ends[0], 0.5, T), rtol=1e-12)
    assert drawn[0].alphas_cumprod[-1] < 1e-3
    says = [f"fastddpm: Schedule.linear({T}): uses betas from {ends[0]:.4g} to {end:.4g}" for end in (ends[1], 0.5)]
    assert [str(w.message).split(";")[0] for w in caught] == says
    assert all(w.filename == __file__ for w in caught)


def test_linear_of_1000_steps_is_what_it_was():
    assert torch.equal(Schedule.linear().betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    assert Schedule.linear() == Schedule.linear(1000, 1e-4, 0.02)


def test_numbers_of_timesteps_and_timesteps_are_of_any_kind():
    x = torch.ones(2, 1, 2, 2)
    for kind in (np.int64, np.int32, np.array, torch.tensor):
        assert Schedule.cosine(kind(10)) == Schedule.cosine(10)
        assert Schedule.linear(kind(10), 0.1, 0.5) == Schedule.linear(10, 0.1, 0.5)
        assert torch.equal(Schedule.cosine(10).add_noise(x, x, kind(3)), Schedule.cosine(10).add_noise(x, x, 3))
    for bad in (
        True,
        np.True_,
        torch.tensor(True),
        10.0,
        np.float64(10),
        torch.tensor(10.0),
        torch.tensor([10]),
        "10",
        None,
        1 << 20,
    ):
        for make in (Schedule.cosine, Schedule.linear):
            with pytest.raises(ValueError, match="^T: got .*; expected a number of timesteps from 1 to"):
                make(bad)


def test_the_last_beta_may_be_1():
    """x_T then contains nothing of x_0, and the posterior is that of x_{t-1} given only x_0."""
    s = Schedule([0.1, 0.3, 1.0])
    previous = 0.9 * 0.7
    assert s.alphas_cumprod[-1] == 0 and s.posterior_mean_coef2[-1] == 0
    assert float(s.posterior_variance[-1]) == pytest.approx(1 - previous, rel=1e-12)
    assert float(s.posterior_mean_coef1[-1]) == pytest.approx(previous**0.5, rel=1e-12)
    x0, noise = torch.full((1, 1, 2, 2), 1e30), torch.randn(1, 1, 2, 2)
    assert torch.equal(s.add_noise(x0, noise, 2), noise)


def test_a_single_step_takes_the_whole_picture():
    assert Schedule.linear(1).alphas_cumprod.tolist() == pytest.approx([0.001])
    assert Schedule.linear(1, 0.1, 0.2).betas.tolist() == [0.2]


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
        ([1.0, 0.5], r"betas\[0\] = 1.0; expected every beta in \(0, 1\)"),
        ([0.5, 1.0000001], r"betas\[1\] = 1.0000001"),
        ([0.9] * 400, "alphas_cumprod underflows .* at t = 32[0-9];"),
        ([0.1, float("nan")], "nan"),
        ([0.5, -0.1], "-0.1"),
    ],
)
def test_bad_betas(betas, says):
    with pytest.raises(ValueError, match=f"betas: .*{says}"):
        Schedule(betas)


def test_bad_arguments():
    s, x = Schedule.cosine(10), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="T: got 0"):
        Schedule.linear(0)
    with pytest.raises(ValueError, match="t: got 10; expected 0..9"):
        s.add_noise(x, x, 10)
    with pytest.raises(ValueError, match="t: got values from 0 to 10"):
        s.add_noise(x, x, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match=r"t: got float32 \[2\]; expected int64 \[2\]"):
        s.add_noise(x, x, torch.zeros(2))
    for bad in (True, 1.5, None, [0, 1]):
        with pytest.raises(ValueError, match=r"t: got .*; expected an int in 0\.\.9, or int64 \[2\]"):
            s.add_noise(x, x, bad)
    with pytest.raises(ValueError, match="noise: got shape"):
        s.add_noise(x, x[:1], 0)
