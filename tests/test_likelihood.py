"""The bound: closed forms for Gaussian images, seeds and batches, estimates from drawn timesteps, invalid arguments."""

import itertools
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_ndtr
from scipy.stats import norm
from torch import nn

import fastddpm
from fastddpm import Schedule, UNetConfig, ops
from fastddpm.diffusion import coefficients
from fastddpm.diffusion.bound import Bound
from fastddpm.engine.cache import acquire_runner
from fastddpm.errors import LikelihoodError
from fastddpm.evaluation.likelihood import likelihood, rate_distortion, strata
from fastddpm.inputs.resolve import resolve
from fastddpm.ops.philox_normal import first_words
from fastddpm.ops.rng import Stream

SHAPE = (3, 8, 8)
SHORT = Schedule.linear(50, 1e-3, 0.2)
ZERO = Schedule([*SHORT.betas[:-1], 1.0])  # zero terminal SNR
MEAN, STD = 0.1, 0.15  # both ends of the grid are six standard deviations away, and a step of it is a nineteenth of one
VAR = STD**2 + (2 / 255) ** 2 / 12  # of the rounded pixels
GRID = torch.arange(256, dtype=torch.float64) / 127.5 - 1
MASS = torch.from_numpy(norm.cdf((GRID + 1 / 255 - MEAN) / STD) - norm.cdf((GRID - 1 / 255 - MEAN) / STD))
ENTROPY = float(-(MASS * MASS.clamp(min=1e-300).log2()).sum())  # the best possible bits per dimension


def gaussian(n, seed=0, shape=SHAPE):
    """Return normal pixels rounded to the grid, uint8."""
    z = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((MEAN + STD * z + 1) * 127.5).round().to(torch.uint8)


def gain_of(schedule):
    """E[x0 | x_t] = MEAN + gain (x_t - sqrt(bar) MEAN), and its mean squared error."""
    bar = schedule.alphas_cumprod
    gain = bar.sqrt() * VAR / (bar * VAR + 1 - bar)
    return gain, VAR * (1 - bar) / (bar * VAR + 1 - bar)


def ideal(schedule, prediction="epsilon", v=None):
    """The ideal network, which computes E[x0 | x_t] in float64 and returns v (float64 [T]) for the variance."""
    gain, _ = gain_of(schedule)
    a, b = coefficients.to_x0(schedule, prediction)
    offset = MEAN * (1 - gain * schedule.alphas_cumprod.sqrt())

    def model(x, t):
        column = t[:, None, None, None]
        o = ((gain - a)[column] * x.double() + offset[column]) / b[column]
        return o if v is None else torch.cat((o, v[column].expand_as(o)), dim=1)

    return model


def log_variance(schedule, variance, v=None):
    low, high = schedule.posterior_variance.log(), schedule.betas.log()
    low[0] = low[1]
    if variance == "learned_range":
        return (v + 1) / 2 * high + (1 - v) / 2 * low
    high = torch.where(schedule.alphas_cumprod > 0, high, low)  # as the chain's first step
    return low if variance == "fixed_small" else torch.cat((low[:1], high[1:]))


def spread(log_ratio):
    return (log_ratio + (-log_ratio).exp() - 1) / 2


def expected(schedule, variance, v=None):
    """(L_T, L_t [T]) in bits of the ideal network over all Gaussian images: only second moments count for t >= 1."""
    bar, lv = schedule.alphas_cumprod, log_variance(schedule, variance, v)
    _, mse = gain_of(schedule)
    ratio = lv - schedule.posterior_variance.log()
    nats = spread(ratio) + schedule.posterior_mean_coef1**2 * mse / (2 * lv.exp())
    nats[0] = decoder_cost(schedule, lv)
    last = float(bar[-1])
    prior = (last * (VAR + MEAN**2) - math.log1p(-last) - last) / 2
    return prior / math.log(2), nats / math.log(2)


def decoder_cost(schedule, lv):
    """L_0 in nats: minus the log mass of the pixel, summed over the grid and integrated over eps."""
    bar, std = float(schedule.alphas_cumprod[0]), math.exp(float(lv[0]) / 2)
    gain = float(gain_of(schedule)[0][0])
    eps = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weight = torch.exp(-(eps**2) / 2)
    weight = weight / weight.sum()
    kept = MASS > 1e-14
    error = (1 - gain * bar**0.5) * (GRID[kept] - MEAN)[:, None] - gain * (1 - bar) ** 0.5 * eps
    # By symmetry in the left tail, as differences of log_ndtr; the ends of the grid have no mass here.
    low, high = (torch.from_numpy(log_ndtr(((h - error.abs()) / std).numpy())) for h in (-1 / 255, 1 / 255))
    nll = -(high + torch.log1p(-torch.exp(low - high)))
    return float((MASS[kept][:, None] * weight * nll).sum() / MASS[kept].sum())


def known_v(schedule):
    return torch.linspace(-0.8, 0.9, len(schedule), dtype=torch.float64)


CASES = [
    (Schedule.linear(), "fixed_large"),
    (Schedule.linear(200, 5e-4, 0.1), "fixed_small"),
    (Schedule.cosine(100), "fixed_small"),
    (SHORT, "fixed_large"),
    (SHORT, "learned_range"),
    (ZERO, "fixed_large"),
    (ZERO, "learned_range"),
]


@pytest.mark.parametrize(("schedule", "variance"), CASES)
def test_every_term_has_its_closed_form(schedule, variance):
    """5 standard errors of a mean of squares of normals; plus a few hundred rounding errors of the network."""
    v = known_v(schedule) if variance == "learned_range" else None
    n, T = 40, len(schedule)
    prediction = "v_prediction" if schedule is ZERO else "epsilon"
    result = likelihood(
        ideal(schedule, prediction, v), gaussian(n), schedule=schedule, prediction=prediction, variance=variance, seed=1
    )
    prior, terms = expected(schedule, variance, v)
    elements = n * math.prod(SHAPE)
    assert result.evaluations == n * T and result.terms.shape == result.mse.shape == result.terms_error.shape == (T,)
    assert result.terms.dtype == result.per_image.dtype == torch.float64 and result.per_image.shape == (n,)
    _, mse = gain_of(schedule)
    relative = 5 * math.sqrt(2 / elements)
    assert ((result.mse - mse).abs() <= relative * mse).all()
    weight = schedule.posterior_mean_coef1**2 / (2 * log_variance(schedule, variance, v).exp()) / math.log(2)
    assert ((result.terms - terms).abs() <= relative * weight * mse + 1e-9)[1:].all()
    assert abs(float(result.terms[0] - terms[0])) <= 5 * float(result.terms_error[0])
    assert abs(result.prior - prior) <= 0.2 * prior + 1e-12
    assert result.bits_per_dim == pytest.approx(result.prior + float(result.terms.sum()), rel=1e-12)
    assert float(result.per_image.mean()) == pytest.approx(result.bits_per_dim, rel=1e-12)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
def test_the_bound_is_the_true_code_length_and_its_gap(variance):
    """The gap equals the KL between the forward and the reverse path, computed step by step without eq. 5."""
    schedule = Schedule.linear(200, 5e-4, 0.1)
    bar, lv = schedule.alphas_cumprod, log_variance(schedule, variance)
    _, mse = gain_of(schedule)
    # q(x_{t-1} | x_t) is normal, with the model's mean and this variance.
    true = schedule.posterior_variance + schedule.posterior_mean_coef1**2 * mse
    path = float(spread(lv - true.log())[1:].sum())
    m, var = float(bar[-1].sqrt()) * MEAN, float(bar[-1] * VAR + 1 - bar[-1])
    start = (var + m**2 - 1 - math.log(var)) / 2
    # The last step: H(x_0 | x_1) by summing over x_1 in steps of a tenth of its spread.
    std = float((1 - bar[0]).sqrt())
    x1 = torch.arange(-1.2, 1.4, std / 10, dtype=torch.float64)
    joint = MASS * torch.exp(-((x1[:, None] - float(bar[0].sqrt()) * GRID) ** 2) / (2 * std**2))
    joint = joint / joint.sum()
    posterior = joint / joint.sum(1, keepdim=True).clamp(min=1e-300)
    entropy = float(-(joint * posterior.clamp(min=1e-300).log()).sum())
    gap = (start + path + decoder_cost(schedule, lv) - entropy) / math.log(2)

    prior, terms = expected(schedule, variance)
    assert prior + float(terms.sum()) - ENTROPY == pytest.approx(gap, abs=2e-4)  # two ways to say it
    assert 0 < gap < 2
    result = likelihood(ideal(schedule), gaussian(60), schedule=schedule, variance=variance, seed=2)
    assert abs(result.bits_per_dim - ENTROPY - gap) <= 5 * result.standard_error
    assert result.standard_error < 0.15 * gap


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
def test_prediction_types_give_the_same_numbers(prediction, variance):
    v = known_v(SHORT) if variance == "learned_range" else None
    options = {"schedule": SHORT, "variance": variance, "seed": 3}
    reference = likelihood(ideal(SHORT, v=v), gaussian(3), **options)
    result = likelihood(ideal(SHORT, prediction, v), gaussian(3), prediction=prediction, **options)
    # x reaches the network as float32, and what multiplies it differs by up to 1/sqrt(bar) = 13
    torch.testing.assert_close(result.terms, reference.terms, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.mse, reference.mse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
@pytest.mark.parametrize("clip", [True, False, 0.3, 1.5])
def test_equals_the_terms_written_out(prediction, clip):
    """Each pair is evaluated alone with the seed's noise. An x0_hat far outside [-1, 1] shows where it is clipped."""
    s, images = SHORT, torch.randint(0, 256, (2, 2, 3, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    a, b = coefficients.to_x0(s, prediction)

    def model(x, t):
        return (2 * x.double() + 0.5 - a[t][:, None, None, None] * x) / b[t][:, None, None, None]  # x0_hat = 2x + 0.5

    result = rate_distortion(
        model, images, schedule=s, prediction=prediction, variance="fixed_small", clip=clip, seed=5, first=7
    )
    bound = Bound(s, "fixed_small")
    x0 = images.double() / 127.5 - 1
    limit = {True: 1.0, False: math.inf}.get(clip, clip)
    for t in range(len(s)):
        eps = ops.philox_normal(x0.shape, seed=5, t=t, stream=Stream.FORWARD, first=7).double()
        x = s.add_noise(x0, eps, t)
        hat = 2 * x + 0.5
        clipped = hat if prediction == "mean" else hat.clamp(-limit, limit)
        if t == 0:
            term = bound.decoder(x0, x0 - clipped)
        else:
            gap = s.posterior_mean_coef1[t] * (x0 - clipped)
            term = (gap**2 / (2 * s.posterior_variance[t])).flatten(1).mean(1) / math.log(2)
        assert float(result.likelihood.terms[t]) == pytest.approx(float(term.mean()), rel=1e-5), t
        inside = (hat if prediction == "mean" else clipped).clamp(-1, 1)
        assert float(result.likelihood.mse[t]) == pytest.approx(float((x0 - inside).square().mean()), rel=1e-5), t


def test_training_on_the_bound_is_this_bound():
    """T times the loss's expectation, plus L_T, is the bound with the same noise and without clipping."""
    images, T = gaussian(3), len(SHORT)
    result = likelihood(ideal(SHORT), images, schedule=SHORT, clip=False, seed=6)
    t = torch.arange(T)
    for i in range(3):
        sample = torch.full((T,), i)
        eps = ops.philox_normal((T, *SHAPE), seed=6, t=t, stream=Stream.FORWARD, sample=sample)
        x0 = (images[i].double() / 127.5 - 1).expand(T, -1, -1, -1)
        loss = fastddpm.training_loss(
            ideal(SHORT), x0, schedule=SHORT, t=t, noise=eps.double(), objective="bound", variance="fixed_large"
        )
        prior = Bound(SHORT, "fixed_large").prior(x0[:1])
        assert float(T * loss + prior) == pytest.approx(float(result.per_image[i]), rel=1e-5)


# ------------------------------------------------------------------------------------ seeds, batches, drawn timesteps


@pytest.mark.parametrize("subsample", [None, 4])
def test_an_image_has_its_own_noise_whatever_the_batch(subsample):
    images = gaussian(5)

    def measure(which=slice(None), **options):
        return likelihood(
            ideal(SHORT),
            images[which],
            schedule=SHORT,
            seed=8,
            subsample=subsample,
            **{"first": which.start or 0, **options},
        )

    whole = measure()
    for batch_size in (1, 7, 64, 1000):  # some end inside an image, and 7 doesn't divide the pairs
        other = measure(batch_size=batch_size)
        assert torch.equal(other.per_image, whole.per_image)
        torch.testing.assert_close(other.terms, whole.terms, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(measure(slice(3, 5)).per_image, whole.per_image[3:])
    assert torch.equal(measure(slice(4, 5), batch_size=3).per_image, whole.per_image[4:])
    assert not torch.equal(measure(slice(3, 5), first=0).per_image, whole.per_image[3:])
    if subsample is None:  # means and errors are those over images measured alone
        alone = torch.stack([measure(slice(i, i + 1)).terms for i in range(5)])
        torch.testing.assert_close(whole.terms, alone.mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(whole.terms_error, alone.std(0) / math.sqrt(5), rtol=1e-9, atol=0)
        assert whole.standard_error == pytest.approx(float(whole.per_image.std()) / math.sqrt(5), rel=1e-12)


def test_seeds():
    def draw(seed):
        return likelihood(ideal(SHORT), gaussian(1), schedule=SHORT, seed=seed).bits_per_dim

    assert draw(2**64 - 1) == draw(2**64 - 1) != draw(0)
    torch.manual_seed(1)
    x, y = draw(None), draw(None)
    torch.manual_seed(1)
    assert draw(None) == x != y


def test_drawn_timesteps_follow_the_contract():
    """One timestep in each of K parts: t_j = lo_j + (w0 size_j >> 32), w0 of stream 3 at t = j."""
    seen, n, K = [], 30, 4

    def model(x, t):
        seen.extend(t.tolist())
        return x

    result = likelihood(model, gaussian(n), schedule=SHORT, subsample=K, seed=9, first=2**40, batch_size=n * (K + 1))
    drawn = torch.tensor(seen).reshape(n, K + 1)
    edges = [1, 3, 7, 19, 50]  # 50^(j/4)
    assert (drawn[:, 0] == 0).all()
    index = torch.arange(2**40, 2**40 + n)
    for j in range(K):
        words = first_words(index, seed=9, stream=Stream.TIMESTEP, t=j)
        assert torch.equal(drawn[:, j + 1], edges[j] + (words * (edges[j + 1] - edges[j]) >> 32))
    count = torch.bincount(drawn.flatten(), minlength=50)
    assert (count == 0).any() and result.evaluations == n * (K + 1)
    assert torch.equal(result.terms.isnan(), count == 0) and torch.equal(result.mse.isnan(), count == 0)
    assert torch.equal(result.terms_error.isnan(), count < 2)


@given(st.integers(2, 1200), st.data())
def test_strata_cover_each_timestep_once(T, data):
    parts = data.draw(st.integers(1, T - 1))
    edges = strata(T, parts)
    assert len(edges) == parts + 1 and edges[0] == 1 and edges[-1] == T
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    assert min(sizes) >= 1
    if parts == T - 1:
        assert max(sizes) == 1


def test_all_timesteps_drawn_are_the_bound():
    """With K = T - 1 each part is a single timestep."""
    whole = likelihood(ideal(SHORT), gaussian(2), schedule=SHORT, seed=1)
    drawn = likelihood(ideal(SHORT), gaussian(2), schedule=SHORT, seed=1, subsample=len(SHORT) - 1)
    torch.testing.assert_close(drawn.per_image, whole.per_image, rtol=1e-13, atol=0)
    torch.testing.assert_close(drawn.terms, whole.terms, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("subsample", "n"), [(None, 32), (12, 100)])
def test_estimates_are_unbiased_and_their_intervals_cover(subsample, n):
    """400 estimates from small images, each with its own images, noise and timesteps."""
    runs, shape = 400, (3, 2, 2)
    prior, terms = expected(SHORT, "fixed_large")
    truth = prior + float(terms.sum())
    options = {"schedule": SHORT, "variance": "fixed_large", "subsample": subsample, "seed": 4}
    images = gaussian(runs * n, seed=6, shape=shape).split(n)
    results = [likelihood(ideal(SHORT), x, first=i * n, **options) for i, x in enumerate(images)]
    estimates = torch.tensor([r.bits_per_dim for r in results], dtype=torch.float64)
    error = float(estimates.std()) / math.sqrt(runs)
    assert abs(float(estimates.mean()) - truth) <= 4 * error
    assert error < 0.003 * truth
    reported = math.sqrt(sum(r.standard_error**2 for r in results) / runs)
    assert reported == pytest.approx(float(estimates.std()), rel=0.12)  # the estimates' own spread is known to 3.5 %
    covered = sum(r.interval[0] <= truth <= r.interval[1] for r in results) / runs
    assert 0.90 <= covered <= 0.98  # 95 % but for few images' skewed errors, give or take 1.1 % in 400 runs


# --------------------------------------------------------------------------------------------------------- networks


def unet(**options):
    config = UNetConfig(
        sample_size=8,
        in_channels=3,
        channels=8,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        norm_groups=4,
        num_res_blocks=1,
        **options,
    )
    model = randomised(config)
    model.schedule = SHORT
    return model


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x + t[:, None, None, None].to(x.dtype) / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["unet", "classes", "changed layer", "module"])
def test_each_image_of_a_batch_may_have_its_own_timestep(kind, dtype):
    """The engine's `at` and `predict` against the network called as model(x, t)."""
    model = Foreign() if kind == "module" else unet(num_classes=5 if kind == "classes" else None)
    if kind == "changed layer":
        model.conv_norm_out.register_forward_hook(lambda *_: None)
    x, t = torch.randn(4, *SHAPE), torch.tensor([0, 49, 7, 7])
    labels = torch.tensor([1, 4, 0, 2]) if kind == "classes" else None
    with torch.no_grad(), acquire_runner(resolve(model), torch.device("cpu"), dtype, x.shape) as entry:
        net = entry.runner
        got = net.predict(x.to(net.dtype, memory_format=net.memory_format), net.time_inputs_per_image(t), labels)
        reference = model.to(torch.float64)(x.double(), t, *([] if labels is None else [labels]))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert got.dtype == net.dtype
    assert (got.double() - reference).abs().max() <= tolerance * reference.abs().max()


def test_a_unet_goes_through_its_engine():
    """The numbers are those of the bare callable in float32, and nearly so in bfloat16. The model is not changed."""
    model, images = unet().train(), gaussian(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = likelihood(model, images, seed=1)
    assert model.training and not result.terms.is_inference()
    model.eval()
    plain = likelihood(lambda x, t: model(x, t), images, schedule=SHORT, seed=1)
    torch.testing.assert_close(result.terms, plain.terms, rtol=1e-4, atol=0)
    half = likelihood(model, images, seed=1, dtype=torch.bfloat16)
    torch.testing.assert_close(half.terms, plain.terms, rtol=0.1, atol=0)
    with torch.inference_mode():
        again = likelihood(model, images, seed=1)
    assert torch.equal(again.terms, result.terms) and not again.terms.is_inference()
    hooked = unet()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks.* so it runs unmodified. Results are the same, only slower"):
        slow = likelihood(hooked, images, seed=1)
    torch.testing.assert_close(slow.terms, plain.terms, rtol=1e-4, atol=0)


def test_a_model_brings_its_schedule_prediction_and_variance():
    model = unet()
    model.prediction, model.variance = "v_prediction", "fixed_small"
    asked = {"schedule": SHORT, "prediction": "v_prediction", "variance": "fixed_small"}
    assert torch.equal(
        likelihood(model, gaussian(2), seed=1).terms, likelihood(model, gaussian(2), seed=1, **asked).terms
    )
    learned = unet(out_channels=6)
    learned.variance = "learned_range"
    same = likelihood(lambda x, t: learned(x, t), gaussian(2), schedule=SHORT, variance="learned_range", seed=1)
    torch.testing.assert_close(likelihood(learned, gaussian(2), seed=1).terms, same.terms, rtol=1e-4, atol=0)
    # The output may have a variance that is not used.
    extra = likelihood(ideal(SHORT, v=known_v(SHORT)), gaussian(2), schedule=SHORT, variance="fixed_small", seed=1)
    plain = likelihood(ideal(SHORT), gaussian(2), schedule=SHORT, variance="fixed_small", seed=1)
    assert torch.equal(extra.terms, plain.terms)


def test_labels_go_with_their_images():
    images, labels = gaussian(4), torch.tensor([0, 3, 1, 3])

    def model(x, t, y):
        return (0.2 * y + 0.1)[:, None, None, None] * x

    whole = likelihood(model, images, class_labels=labels, schedule=SHORT, seed=2, batch_size=7)
    for i in range(4):
        one = likelihood(model, images[i : i + 1], class_labels=int(labels[i]), schedule=SHORT, seed=2, first=i)
        assert torch.equal(one.per_image, whole.per_image[i : i + 1])


def test_a_single_timestep_and_a_single_image():
    """With T = 1 the bound is the decoder's term and L_T. One image has no spread."""
    result = likelihood(lambda x, t: x * 0, gaussian(1), schedule=Schedule([0.01]), seed=0)
    assert result.terms.shape == (1,) and result.terms[0] > 0
    assert result.bits_per_dim == pytest.approx(result.prior + float(result.terms[0]))
    assert math.isnan(result.standard_error) and all(math.isnan(v) for v in result.interval)
    assert "no interval from a single image" in str(result)
    curve = rate_distortion(lambda x, t: x * 0, gaussian(1), schedule=Schedule([0.01]), seed=0)
    assert float(curve.rate[0]) == curve.likelihood.prior and curve.rate_error.isnan().all() and "1  " in str(curve)
    with pytest.raises(ValueError, match="subsample"):
        likelihood(lambda x, t: x, gaussian(1), schedule=Schedule([0.01]), subsample=1)


def test_what_is_printed():
    text = str(likelihood(ideal(SHORT), gaussian(3), schedule=SHORT, seed=0))
    result = likelihood(ideal(SHORT), gaussian(3), schedule=SHORT, seed=0)
    assert text.startswith(f"{result.bits_per_dim:.4f} bits/dim (95 % interval {result.interval[0]:.4f} to ")
    assert "3 images, 150 evaluations" in text
    between = float(result.terms[1:].sum())
    assert text.endswith(f"= L_T {result.prior:.3g} + L_1..L_49 {between:.4f} + L_0 {float(result.terms[0]):.4f}")


# -------------------------------------------------------------------------------------------------- rate, distortion


def test_rate_and_distortion():
    n = 40
    curve = rate_distortion(ideal(SHORT), gaussian(n), schedule=SHORT, variance="fixed_small", seed=3)
    bound = curve.likelihood
    assert torch.equal(
        bound.terms, likelihood(ideal(SHORT), gaussian(n), schedule=SHORT, variance="fixed_small", seed=3).terms
    )
    assert all(v.shape == (50,) and v.dtype == torch.float64 for v in (curve.rate, curve.distortion, curve.rate_error))
    assert float(curve.rate[0]) == pytest.approx(bound.prior, rel=1e-12)
    for k in (2, 17, 50):
        assert float(curve.rate[k - 1]) == pytest.approx(
            bound.prior + float(bound.terms[50 - k + 1 :].sum()), rel=1e-12
        )
        assert float(curve.distortion[k - 1]) == pytest.approx(127.5 * float(bound.mse[50 - k]) ** 0.5, rel=1e-12)
    assert float(curve.rate[-1] + bound.terms[0]) == pytest.approx(bound.bits_per_dim, rel=1e-12)
    assert (curve.rate.diff() >= 0).all()
    # The ideal network's distortion is known; its squares are of normals, so that the error is too.
    truth = 127.5 * gain_of(SHORT)[1].flip(0).sqrt()
    assert ((curve.distortion - truth).abs() <= 5 * truth / math.sqrt(2 * n * math.prod(SHAPE))).all()
    reported = (curve.distortion_error / truth).median()
    assert reported == pytest.approx(1 / math.sqrt(2 * n * math.prod(SHAPE)), rel=0.15)
    prior, terms = expected(SHORT, "fixed_small")
    assert abs(float(curve.rate[-1]) - prior - float(terms[1:].sum())) <= 5 * float(curve.rate_error[-1])
    rows = str(curve).splitlines()
    assert len(rows) == 11 and [int(row.split()[0]) for row in rows[1:]] == list(range(50, 0, -5))
    assert [float(v) for v in rows[2].split()] == pytest.approx(
        [45, float(curve.rate[44]), float(curve.distortion[44])], abs=1e-5
    )


def test_plot_writes_a_whole_file(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot")
    curve = rate_distortion(ideal(SHORT), gaussian(2), schedule=SHORT, seed=3)
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve.plot(str(tmp_path / "curve.svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "curve.svg"]
    before = (tmp_path / "curve.png").read_bytes()
    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):

        def fails(self, path, **options):
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        broken.setattr("matplotlib.figure.Figure.savefig", fails)
        curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'the plot needs matplotlib: pip install "fastddpm\[plot\]"'):
        curve.plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


def test_images_on_the_grid_in_any_form():
    pixels = gaussian(2)
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = 0, 255
    options = {"schedule": SHORT, "seed": 1}
    reference = likelihood(ideal(SHORT), pixels, **options)
    for images in (
        pixels.float() / 127.5 - 1,
        (pixels.float() / 255 - 0.5) / 0.5,
        pixels.double() / 255 * 2 - 1,
        (pixels / 127.5 - 1).to(memory_format=torch.channels_last),
    ):
        assert torch.equal(likelihood(ideal(SHORT), images, **options).per_image, reference.per_image)
    moved = pixels / 127.5 - 1 + 0.003 * torch.where(pixels > 128, -1, 1)  # less than half a grey level, inwards
    with pytest.raises(ValueError, match=r"images: not on the 8-bit grid .*off by up to 0\.38 .*quantize=True"):
        likelihood(ideal(SHORT), moved, **options)
    assert torch.equal(likelihood(ideal(SHORT), moved, quantize=True, **options).per_image, reference.per_image)
    for outside in (1.01, -1.01, math.nan, math.inf):
        wrong = pixels / 127.5 - 1
        wrong[0, 0, 0, 0] = outside
        for quantize in (False, True):
            with pytest.raises(ValueError, match=r"images: got values from .* expected \[-1, 1\], or uint8"):
                likelihood(ideal(SHORT), wrong, quantize=quantize, **options)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8), r"images: got float32 \[2, 3, 8\]; expected uint8, or floating point in \[-1, 1\], "),
        (torch.zeros(0, 3, 8, 8), "with at least one image"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "images: got int64"),
        ([[0.0]], "images: got list; expected a tensor"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        likelihood(ideal(SHORT), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "none"}, "variance: got 'none'; the variational bound needs a density"),
        ({"variance": "learned"}, "variance: got 'learned'"),
        ({"prediction": "score"}, "prediction: got 'score'; expected one of"),
        ({"clip": -1}, "clip: got -1"),
        ({"subsample": 0}, r"subsample: got 0; expected None or an int in 1\.\.49"),
        ({"subsample": 50}, "subsample: got 50"),
        ({"subsample": True}, "subsample: got True"),
        ({"seed": -1}, "seed: got -1"),
        ({"first": -1}, "first: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, r"class_labels: got .*\[3\]"),
        ({"dtype": torch.bfloat16}, "dtype: .*bare callable"),
    ],
)
def test_bad_arguments(options, message):
    def never(x, t):
        raise AssertionError("the network ran")

    with pytest.raises(ValueError, match=message):
        likelihood(never, gaussian(2), **{"schedule": SHORT, **options})


def test_images_that_the_network_cannot_take():
    with pytest.raises(ValueError, match="images: 1 channels; the network takes 3"):
        likelihood(unet(), torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images: 7x8 cannot be halved 1 times, .* made for 8x8: pad them"):
        likelihood(unet(), torch.zeros(1, 3, 7, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="class_labels: missing"):
        likelihood(unet(num_classes=2), gaussian(1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_not_finite_is_an_error(value):
    """The error names image and timestep, also for an infinity, which clipping would hide."""

    def model(x, t):
        o = ideal(SHORT)(x, t)
        o[t == 7, -1, -1, -1] = value
        return o

    for batch_size in (3, 1000):
        with pytest.raises(
            LikelihoodError, match="model: its output for image 0 at timestep 7 contains a NaN or an infinity"
        ):
            likelihood(model, gaussian(2), schedule=SHORT, batch_size=batch_size)
    likelihood(model, gaussian(2), schedule=Schedule.cosine(7))  # never asked for


def test_an_output_of_another_kind_is_an_error():
    with pytest.raises(
        LikelihoodError, match=r"model: its output has shape \[100, 1, 8, 8\]; expected \[100, 3, 8, 8\]"
    ):
        likelihood(lambda x, t: x[:, :1], gaussian(2), schedule=SHORT)
    with pytest.raises(LikelihoodError, match=r"expected \[100, 6, 8, 8\], with the learned variance"):
        likelihood(lambda x, t: x, gaussian(2), schedule=SHORT, variance="learned_range")
    with pytest.raises(LikelihoodError, match="model: it returned tuple; expected a tensor"):
        likelihood(lambda x, t: (x,), gaussian(2), schedule=SHORT)
    with pytest.raises(LikelihoodError, match="contains a NaN or an infinity, or leads to one"):  # e^10000
        far = lambda x, t: torch.cat((x, torch.full_like(x, -1e4)), dim=1)  # noqa: E731
        likelihood(far, gaussian(2), schedule=SHORT, variance="learned_range")


def test_progress(capsys):
    likelihood(ideal(SHORT), gaussian(2), schedule=SHORT, progress=True)
    assert "100/100" in capsys.readouterr().err
    likelihood(ideal(SHORT), gaussian(2), schedule=SHORT, progress=False)
    assert capsys.readouterr().err == ""
