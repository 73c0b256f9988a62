"""Inversion, interpolation and the progressive film: closed forms for Gaussian data, seeds, what is refused."""

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from test_sampling import MEAN, SHAPE, SHORT, STD, ideal, small_unet

import fastddpm
from fastddpm import Schedule, ops
from fastddpm.diffusion import coefficients
from fastddpm.ops.rng import Stream

LINEAR = Schedule.linear()
pytestmark = pytest.mark.filterwarnings("ignore:fastddpm. variance")


def pictures(n=3, shape=SHAPE, seed=0):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -------------------------------------------------------------------------------------------------- encode


def factors(steps, spacing, std):
    """(encode's, decode's) factor on x - sqrt(abar) mean for data N(mean, std^2): the product over the chain of what one step
    of Song et al.'s eq. 13 does, written out."""

    def step(abar, to, seen):
        """From abar to `to`, with the eps that the ideal network gives for this x at `seen`."""
        eps = math.sqrt(1 - seen) / (seen * std**2 + 1 - seen)
        x0 = (1 - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return math.sqrt(to) * x0 + math.sqrt(1 - to) * eps

    up = LINEAR.alphas_cumprod[coefficients.select_timesteps(LINEAR, steps, spacing).flip(0)].tolist()
    there = math.prod(step(a, to, to) for a, to in zip([1.0, *up], up, strict=False))
    back = math.prod(step(a, to, a) for to, a in zip([1.0, *up], up, strict=False))
    return there, back


def round_trip(steps, spacing, prediction, std):
    """(x_T, x_0 again) of x_0 = 1 in float64, for data of mean 0."""
    model, t = ideal(LINEAR, prediction, 0.0, std), coefficients.select_timesteps(LINEAR, steps, spacing)
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    results = []
    for table in (
        coefficients.inversion(LINEAR, prediction=prediction, timesteps=t),
        coefficients.table(LINEAR, sampler="ddim", prediction=prediction, timesteps=t),
    ):
        for timestep, row in zip(table.timesteps.tolist(), table.rows, strict=True):
            x, _ = ops.ddpm_step_ref(x, model.slope[timestep] * x, row, clip=None)
        results.append(x.item())
    return results


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "logsnr"])
def test_the_round_trip_is_the_product_of_its_factors(prediction, spacing):
    for steps in (1, 2, 50):
        there, back = factors(steps, spacing, STD)
        got = round_trip(steps, spacing, prediction, STD)
        assert got[0] == pytest.approx(there, rel=1e-6) and got[1] == pytest.approx(there * back, rel=1e-6)


@pytest.mark.parametrize("std", [0.3, 0.5, 2.0])
def test_its_error_halves_when_steps_double(std):
    """At std = 1, where eps changes least, it even falls to a quarter."""
    errors = [abs(round_trip(steps, "trailing", "epsilon", std)[1] - 1) for steps in (100, 200, 400)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] / errors[2] == pytest.approx(2, rel=0.1)
    assert round_trip(1000, "trailing", "epsilon", std)[0] == pytest.approx(1 / std, rel=0.01)  # data become N(0, 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_encode_is_diffusers_inverse(spacing):
    """Step by step in float64, unclipped; its timesteps are the ones that a step goes to, too."""
    t = coefficients.select_timesteps(LINEAR, 50, spacing)
    table = coefficients.inversion(LINEAR, timesteps=t)
    theirs = DDIMInverseScheduler(clip_sample=False, timestep_spacing=spacing)
    theirs.set_timesteps(50)
    theirs.alphas_cumprod, theirs.initial_alpha_cumprod = LINEAR.alphas_cumprod, torch.ones((), dtype=torch.float64)
    x = pictures().double()
    for timestep, row in zip(table.timesteps.tolist(), table.rows, strict=True):
        o = torch.randn(x.shape, dtype=torch.float64)
        expected = theirs.step(o, timestep, x)
        x, x0 = ops.ddpm_step_ref(x, o, row, clip=None)
        for got, wanted in ((x, expected.prev_sample), (x0, expected.pred_original_sample)):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
def test_encode_and_back_through_the_kernels(prediction):
    """float32, with a mean: each pixel's distance from the mean has the factors of above."""
    x = pictures()
    model, same = ideal(LINEAR, prediction), {"schedule": LINEAR, "prediction": prediction, "steps": 50}
    x_T = fastddpm.encode(model, x, batch_size=2, **same)
    there, back = factors(50, "trailing", STD)
    # In float32 the mean's way back through 1/c0 of up to 1e4 is worth 1e-3.
    tolerance = 2e-2 if prediction == "mean" else 2e-4
    fixed = fastddpm.encode(model, torch.full_like(x, MEAN), **same)
    torch.testing.assert_close(x_T - fixed, there * (x - MEAN), rtol=0, atol=tolerance)
    assert (fixed - fixed.mean()).abs().max() < tolerance
    again = fastddpm.sample(model, 3, shape=SHAPE, sampler="ddim", clip=False, noise=x_T, **same)
    both = fastddpm.sample(model, 3, shape=SHAPE, sampler="ddim", clip=False, noise=fixed, **same)
    torch.testing.assert_close(again - both, there * back * (x - MEAN), rtol=0, atol=tolerance)


def test_encode_does_not_clip():
    """x0 as the network sees it leaves [-1, 1] here."""
    x, t = pictures(), coefficients.select_timesteps(SHORT, 20, "trailing")
    x_T = fastddpm.encode(lambda x, t: 2 * x, x, schedule=SHORT, steps=20)
    table, expected, far = coefficients.inversion(SHORT, timesteps=t), x.double(), 0.0
    for row in table.rows:
        expected, x0 = ops.ddpm_step_ref(expected, 2 * expected, row, clip=None)
        far = max(far, float(x0.abs().max()))
    assert far > 1.2 and (x_T - expected).abs().max() < 1e-5


def test_results_are_ordinary_tensors():
    """In inference mode, and whatever the default dtype is."""
    options, x = {"schedule": SHORT, "steps": 2}, pictures(1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            results = [
                fastddpm.encode(ideal(SHORT), x, **options),
                fastddpm.interpolate(ideal(SHORT), x, x, t=5, weights=1, **options),
                fastddpm.progressive(ideal(SHORT), 1, shape=SHAPE, **options),
                fastddpm.progressive(ideal(SHORT), 0, shape=SHAPE, **options),
                fastddpm.sample(ideal(SHORT), 0, shape=SHAPE, **options),
                fastddpm.sample(ideal(SHORT), 1, shape=SHAPE, **options),
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(v.is_inference() for v in results) and {v.dtype for v in results} == {torch.float32}


def test_encode_a_network_with_classes():
    model = small_unet(num_classes=3)
    x, labels = pictures(3, (1, 8, 8)), torch.tensor([2, 0, 1])
    x_T = fastddpm.encode(model, x, steps=20, class_labels=labels, batch_size=2)
    plain = fastddpm.encode(lambda x, t, y: model(x, t, y), x, schedule=SHORT, steps=20, class_labels=labels)
    torch.testing.assert_close(x_T, plain, rtol=0, atol=1e-4)
    assert x_T.shape == x.shape and x_T.dtype == torch.float32
    assert fastddpm.encode(model, x[:0], class_labels=labels[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "mean"])
def test_there_and_back_with_zero_snr(prediction):
    """To noise of variance 1 for Gaussian data, and back, with errors that halve; a single step there would lose the image."""
    zero = Schedule(rescale_zero_terminal_snr(LINEAR.betas))
    x = (MEAN + STD * torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    model, errors = ideal(zero, prediction), []
    for steps in (25, 50, 100):
        options = {"schedule": zero, "prediction": prediction, "steps": steps}
        x_T = fastddpm.encode(model, x, **options)
        again = fastddpm.sample(model, 4, shape=x.shape[1:], sampler="ddim", clip=False, noise=x_T, **options)
        errors.append((again - x).square().mean().sqrt().item())
    assert x_T.std().item() == pytest.approx(x.std().item() / STD, rel=0.05) and abs(x_T.mean().item()) < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)
    assert fastddpm.interpolate(model, x, x, t=998, schedule=zero, prediction=prediction, seed=0).isfinite().all()
    few = Schedule(
        [0.05, 0.3, 1.0]
    )  # whose last step loses much: up it undoes the step down, where they see the same x0
    t = torch.tensor([2, 1])
    up = coefficients.inversion(few, prediction=prediction, timesteps=t).rows[-1]
    down = coefficients.table(few, sampler="ddim", prediction=prediction, timesteps=t).rows[0]
    o, begin = (torch.randn(1, 1, 4, 4, dtype=torch.float64) for _ in range(2))
    there = ops.ddpm_step_ref(begin, o, up, clip=None)[0]
    torch.testing.assert_close(ops.ddpm_step_ref(there, o, down, clip=None)[0], begin, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="steps: got 1; expected at least 2: the schedule's alphas_cumprod is 0"):
        fastddpm.encode(model, x, schedule=zero, prediction=prediction, steps=1)


# --------------------------------------------------------------------------------------------- interpolate


@pytest.mark.parametrize(("clip", "bound"), [(True, 1.0), (0.4, 0.4), (False, math.inf)])
def test_interpolate_is_the_papers(clip, bound):
    """x_t of both by q, mixed, and back by algorithm 2 from t on."""
    a, b, t, w = pictures(2), pictures(2, seed=1), 12, 0.3
    model, schedule = ideal(SHORT, std=2.0), SHORT
    got = fastddpm.interpolate(model, a, b, t=t, weights=[w, 0.9], schedule=schedule, seed=4, first=3, clip=clip)
    assert got.shape == (2, 2, *SHAPE)
    sample = torch.tensor([6, 7, 8, 9])  # two draws a pair, of pairs 3 and 4
    eps = ops.philox_normal((4, *SHAPE), seed=4, t=t, stream=Stream.FORWARD, sample=sample).double()
    bar = schedule.alphas_cumprod
    for number, weight in enumerate((w, 0.9)):
        x = (1 - weight) * (bar[t].sqrt() * a + (1 - bar[t]).sqrt() * eps[0::2])
        x = x + weight * (bar[t].sqrt() * b + (1 - bar[t]).sqrt() * eps[1::2])
        for s in range(t, -1, -1):
            x0 = ((x - (1 - bar[s]).sqrt() * (model.slope[s] * x + model.shift[s])) / bar[s].sqrt()).clamp(
                -bound, bound
            )
            x = schedule.posterior_mean_coef1[s] * x0 + schedule.posterior_mean_coef2[s] * x
            if s:
                z = ops.philox_normal((2, *SHAPE), seed=4, t=s, stream=Stream.REVERSE, first=3).double()
                x = x + schedule.betas[s].sqrt() * z
        assert (got[number] - x).abs().max() <= 2e-5


def test_interpolate_ends_and_options():
    a, b = pictures(2), pictures(2, seed=1)
    options = {"schedule": SHORT, "seed": 4}
    # At weight 0 with no noise to speak of the way back leads to a.
    near = fastddpm.interpolate(ideal(SHORT), a, b, t=0, weights=[0.0, 1.0], **options)
    torch.testing.assert_close(near, torch.stack((a, b)), rtol=0, atol=0.2)
    assert fastddpm.interpolate(ideal(SHORT), a, b, **options).shape == (9, 2, *SHAPE)
    seen = []

    def model(x, t):
        seen.append(int(t[0]))
        return 0.5 * x

    fastddpm.interpolate(model, a, b, weights=1, schedule=LINEAR, sampler="dpm++2m", steps=5)
    assert len(seen) == 5 and seen[0] == 499  # the paper's 500
    whole = fastddpm.interpolate(ideal(SHORT), a, b, weights=[0.2, 0.7], **options)
    one = fastddpm.interpolate(ideal(SHORT), a[1:], b[1:], weights=[0.7], first=1, batch_size=1, **options)
    assert torch.equal(one[0], whole[1, 1:])  # all noise is the pair's, whatever else is asked for
    model = small_unet(num_classes=3)
    x, y, labels = pictures(2, (1, 8, 8)), pictures(2, (1, 8, 8), seed=1), torch.tensor([0, 2])
    mixed = fastddpm.interpolate(model, x, y, weights=2, seed=0, class_labels=labels)
    for i in range(2):
        alone = fastddpm.interpolate(
            model, x[i:][:1], y[i:][:1], weights=2, seed=0, first=i, class_labels=int(labels[i])
        )
        torch.testing.assert_close(mixed[:, i], alone[:, 0], rtol=0, atol=1e-4)
        other = fastddpm.interpolate(model, x[i:][:1], y[i:][:1], weights=2, seed=0, first=i, class_labels=1)
        assert (mixed[:, i] - other[:, 0]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------- progressive


def test_progressive_shows_x0_on_its_way():
    options = {"shape": SHAPE, "schedule": SHORT, "seed": 7}
    states = []
    x = fastddpm.sample(ideal(SHORT), 3, callback=states.append, **options)
    film = fastddpm.progressive(ideal(SHORT), 3, frames=4, batch_size=2, **options)
    assert film.shape == (3, 4, *SHAPE) and torch.equal(film[:, -1], x)
    for i, step in enumerate((4, 9, 14, 19)):
        assert torch.equal(film[:, i], states[step].x0)
    assert fastddpm.progressive(ideal(SHORT), 0, frames=4, **options).shape == (0, 4, *SHAPE)
    few = fastddpm.progressive(ideal(SHORT), 1, sampler="dpm++2m", steps=5, **options)
    assert few.shape == (1, 5, *SHAPE)
    whole = fastddpm.progressive(lambda x, t: torch.full_like(x, 3), 1, prediction="mean", **options)
    assert (whole[:, -1] == 3).all() and whole[:, :-1].abs().max() <= 1  # a mean is not clipped


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, x: fastddpm.encode(m, x * 2), r"images: values reach .*expected images in \[-1, 1\]"),
        (lambda m, x: fastddpm.encode(m, x[0]), r"images: got torch.float32 \[3, 4, 5\]"),
        (lambda m, x: fastddpm.encode(m, x * math.nan), "images: values reach nan"),
        (lambda m, x: fastddpm.encode(m, "x"), "images: got str"),
        (lambda m, x: fastddpm.encode(m, x, steps=1001), "steps: got 1001"),
        (lambda m, x: fastddpm.interpolate(m, x, x[:1]), r"b: got \[1, 3, 4, 5\]"),
        (lambda m, x: fastddpm.interpolate(m, x, x, t=1000), r"t: got 1000; expected an int in 0\.\.999"),
        (lambda m, x: fastddpm.interpolate(m, x, x, weights=0), "weights: got 0"),
        (lambda m, x: fastddpm.interpolate(m, x, x, t=10, steps=12), r"steps: got 12; expected an int in 1\.\.11"),
        (lambda m, x: fastddpm.interpolate(m, x, 3 * x), "b: values reach"),
        (
            lambda m, x: fastddpm.progressive(m, 1, frames=0, shape=SHAPE),
            r"frames: got 0; expected an int in 1\.\.1000",
        ),
        (lambda m, x: fastddpm.progressive(m, 1, frames=6, steps=5, shape=SHAPE), r"frames: got 6; expected .* 1\.\.5"),
        (lambda m, x: fastddpm.progressive(m, -1, shape=SHAPE), "n: got -1"),
        (lambda m, x: fastddpm.progressive(m, 2.5, shape=SHAPE), "n: got 2.5"),
        (lambda m, x: fastddpm.interpolate(m, x, x, weights=[]), r"weights: got \[\]"),
        (lambda m, x: fastddpm.interpolate(m, x, x, weights=[math.nan]), r"weights: got \[nan\]"),
        (lambda m, x: fastddpm.interpolate(m, x, x, first=2**55), r"first: got 36028797018963968; .* less than 2\^54"),
        (lambda m, x: fastddpm.interpolate(m, x, x, class_labels=torch.zeros(3).long()), r"got .*\[3\]; .*int64 \[2\]"),
        (lambda m, x: fastddpm.encode(small_unet(), x), "images: 3 channels; the network takes 1"),
        (lambda m, x: fastddpm.encode(None, x), "model: got NoneType"),
        (lambda m, x: fastddpm.sample(m, 2, shape=SHAPE, noise="x"), "noise: got str"),
        (lambda m, x: fastddpm.progressive(m, 1, shape=SHAPE, callback=print), "callback: expected None"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(lambda x, t: pytest.fail("called"), pictures(2))
