"""Every sampler's table, step by step against diffusers and the papers in float64, and its effect on Gaussian data."""

import itertools
import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.utils import logging
from hypothesis import given
from test_sampling import MEAN, SHAPE, SHORT, STD, ideal, small_unet

import fastddpm
from fastddpm import Schedule, ops
from fastddpm.diffusion import coefficients
from fastddpm.errors import SamplingError
from fastddpm.ops.rng import Stream

logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore:fastddpm. variance"),  # test_fixed_large_is_not_respaced_unasked looks for it
    pytest.mark.filterwarnings("ignore:__array__"),  # diffusers with NumPy 2
]
LINEAR = Schedule.linear()
ZERO = Schedule(rescale_zero_terminal_snr(LINEAR.betas))
SPACINGS = ("leading", "linspace", "trailing", "logsnr")
KINDS = ("epsilon", "sample", "v_prediction")  # "mean" is not known to diffusers


def torch_double(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def exact(scheduler, schedule=LINEAR):
    """Its float32 products, off by up to 5.5e-5, replaced by float64 ones, and its last alpha-bar by 1."""
    scheduler.alphas_cumprod = schedule.alphas_cumprod
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


def walk(table, clip, channels=3, seed=0):
    """(row number, timestep, x, o, z, x_prev, x0) of each step, in float64, with made-up outputs that x0 is clipped by."""
    x, x0 = torch_double(2, 3, 4, 4, seed=seed), None
    for i, (t, row) in enumerate(zip(table.timesteps.tolist(), table.rows, strict=True)):
        o = torch_double(2, channels, 4, 4, seed=1000 + i)
        z = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        x_prev, x0_new = ops.ddpm_step_ref(x, o, row, noise=z, x0_last=x0, clip=clip)
        yield i, t, x, o, z, x_prev, x0_new
        x, x0 = x_prev, x0_new


def close(got, expected, relative):
    """Assert that the error is within `relative` of the largest intermediate number."""
    assert (got - expected).abs().max() <= relative * max(1.0, expected.abs().max().item()), (
        (got - expected).abs().max()
    )


# ------------------------------------------------------------------------------------------------ spacing


@pytest.mark.parametrize("spacing", SPACINGS)
@given(data=st.data())
def test_spacing_falls_through_distinct_timesteps(spacing, data):
    T = data.draw(st.integers(1, 300))
    schedule = data.draw(st.sampled_from([Schedule.linear(T, 1e-4, 0.05), Schedule.cosine(T)]))
    start = data.draw(st.one_of(st.none(), st.integers(0, T - 1)))
    top = T if start is None else start + 1
    steps = data.draw(st.integers(1, top))
    t = coefficients.select_timesteps(schedule, steps, spacing, start)
    assert t.dtype == torch.int64 and t.shape == (steps,) and (t.diff() < 0).all()
    assert 0 <= t[-1] and t[0] <= top - 1
    if spacing != "leading":
        assert t[0] == top - 1  # where pure noise is
    if steps == top:
        assert t.tolist() == list(range(top))[::-1]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_spacing_is_that_of_diffusers(spacing, kind):
    """But for one step (numpy's linspace of one point is t = 0, where no noise is), where its arange makes one too many
    ("trailing" of 121 steps), and where what is rounded lies in the middle and its floats lie beside it."""
    compared = 0
    for steps in range(2, 1001, 7):
        theirs = kind(timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        if len(theirs.timesteps) == steps:
            ours = coefficients.select_timesteps(LINEAR, steps, spacing)
            far = (ours - theirs.timesteps).abs()
            numerator = 999 * torch.arange(steps) if spacing == "linspace" else 1000 * torch.arange(1, steps + 1)
            tie = (2 * numerator % (steps - (spacing == "linspace")) == 0).flip(0)
            assert (far <= tie).all() and far.sum() < 0.1 * steps, steps
            compared += 1
    assert compared > 130


def test_logsnr_is_the_nearest_there_is():
    """Beside the whole table of distances; and the cosine schedule's last timesteps, of next to nothing but noise, get few."""
    bar = LINEAR.alphas_cumprod
    lam = (bar / (1 - bar)).log() / 2
    for steps in range(1, 120):
        wanted = torch.linspace(float(lam[0]), float(lam[-1]), steps + 1, dtype=torch.float64)[1:]
        t = (lam[:, None] - wanted).abs().argmin(0).flip(0)
        if (t.diff() < 0).all():
            assert torch.equal(coefficients.select_timesteps(LINEAR, steps, "logsnr"), t)
    assert (
        coefficients.select_timesteps(Schedule.cosine(1000), 20, "logsnr") > 985
    ).sum() == 3  # evenly down to T - 1: 8


def test_tables_whatever_the_default_device_is():
    with torch.device("meta"):
        for sampler, spacing in itertools.product(coefficients.DEFAULT_STEPS, coefficients.SPACINGS):
            t = coefficients.select_timesteps(LINEAR, 7, spacing)
            table = coefficients.table(LINEAR, sampler=sampler, timesteps=t)
            assert table.rows.device.type == coefficients.inversion(LINEAR, timesteps=t).rows.device.type == "cpu"


def test_logsnr_is_even_in_lambda():
    t = coefficients.select_timesteps(LINEAR, 20, "logsnr")
    bar = LINEAR.alphas_cumprod[t]
    h = (bar / (1 - bar)).sqrt().log().diff()
    assert h[:-4].max() / h[:-4].min() < 1.05  # as far as timesteps are dense enough to choose from


# ------------------------------------------------------------------------------- step by step, diffusers


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize(
    ("steps", "spacing"), [(1000, "leading"), (50, "leading"), (7, "linspace"), (10, "trailing"), (2, "linspace")]
)
def test_ddpm_is_diffusers(variance, prediction, steps, spacing):
    """1e-12 on every row but one: diffusers adds noise on a last row with t > 0, where nothing is left to be noisy."""
    table = coefficients.table(
        LINEAR,
        prediction=prediction,
        variance=variance,
        timesteps=coefficients.select_timesteps(LINEAR, steps, spacing),
    )
    theirs = exact(DDPMScheduler(variance_type=variance, prediction_type=prediction))
    if steps < 1000:
        theirs.set_timesteps(timesteps=table.timesteps.tolist())
    for i, t, x, o, _, x_prev, x0 in walk(table, 1.0, channels=6 if table.uses_learned_variance else 3):
        if steps == 1000 and i % 37 and i < 995:
            continue
        result = theirs.step(o, t, x, generator=torch.Generator().manual_seed(i))
        close(x0, result.pred_original_sample, 1e-12)
        if i + 1 == steps and t > 0:
            close(x_prev, x0, 1e-12)
            if variance == "fixed_large":
                assert (result.prev_sample - x0).abs().max() > 0.1
        else:
            close(x_prev, result.prev_sample, 1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize(("steps", "spacing"), [(1000, "leading"), (50, "leading"), (20, "trailing"), (10, "leading")])
def test_ddim_is_diffusers(eta, prediction, steps, spacing):
    table = coefficients.table(
        LINEAR,
        sampler="ddim",
        prediction=prediction,
        eta=eta,
        timesteps=coefficients.select_timesteps(LINEAR, steps, spacing),
    )
    theirs = exact(DDIMScheduler(prediction_type=prediction))
    theirs.set_timesteps(steps)
    theirs.timesteps = table.timesteps
    for i, t, x, o, z, x_prev, x0 in walk(table, 1.0):
        if steps == 1000 and i % 37 and i < 995:
            continue
        result = theirs.step(o, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta else None)
        close(x0, result.pred_original_sample, 1e-12)
        close(x_prev, result.prev_sample, 1e-12)


@pytest.mark.parametrize(("steps", "spacing"), [(7, "linspace"), (30, "trailing"), (13, "logsnr")])
def test_ddim_where_diffusers_goes_wrong(steps, spacing):
    """diffusers' DDIM takes t - T // steps for the next timestep, whatever the spacing (its issue 12633): here the paper's
    eq. 12 is the truth, written out."""
    table = coefficients.table(
        LINEAR, sampler="ddim", eta=0.7, timesteps=coefficients.select_timesteps(LINEAR, steps, spacing)
    )
    theirs = exact(DDIMScheduler())
    theirs.set_timesteps(steps)
    theirs.timesteps = table.timesteps
    wrong = 0
    for i, t, x, o, z, x_prev, _ in walk(table, 1.0):
        bar = LINEAR.alphas_cumprod[t]
        prev = LINEAR.alphas_cumprod[table.timesteps[i + 1]] if i + 1 < steps else torch.ones(())
        x0 = ((x - (1 - bar).sqrt() * o) / bar.sqrt()).clamp(-1, 1)
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        sigma = 0.7 * ((1 - prev) / (1 - bar)).sqrt() * (1 - bar / prev).sqrt()
        close(x_prev, prev.sqrt() * x0 + (1 - prev - sigma**2).sqrt() * eps + sigma * z, 1e-12)
        result = theirs.step(o, t, x, eta=0.7, use_clipped_model_output=True, variance_noise=z)
        wrong += (result.prev_sample - x_prev).abs().max().item() > 1e-3
    assert wrong  # else the bug is gone, and these belong to the test above


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100])
@pytest.mark.parametrize("spacing", ["logsnr", "trailing"])
def test_dpm_is_diffusers(prediction, steps, spacing):
    """The bound is 1e-5, because diffusers' sigmas and step are float32."""
    table = coefficients.table(
        LINEAR,
        sampler="dpm++2m",
        prediction=prediction,
        timesteps=coefficients.select_timesteps(LINEAR, steps, spacing),
    )
    theirs = DPMSolverMultistepScheduler(prediction_type=prediction, thresholding=True, sample_max_value=1.0)
    theirs.alphas_cumprod = LINEAR.alphas_cumprod
    theirs.set_timesteps(timesteps=table.timesteps.tolist())
    for _, t, x, o, _, x_prev, _ in walk(table, 1.0):
        close(x_prev, theirs.step(o, t, x).prev_sample, 1e-5)


@pytest.mark.parametrize("sampler", coefficients.DEFAULT_STEPS)
def test_the_mean_is_a_prediction_like_others(sampler):
    """The mean that a network would predict for some x0 (eq. 7) gives the step for this x0, without clipping."""
    for steps in (50, 1000):
        timesteps = coefficients.select_timesteps(LINEAR, steps, "trailing")
        by_x0, by_mean = (
            coefficients.table(LINEAR, sampler=sampler, prediction=kind, timesteps=timesteps)
            for kind in ("sample", "mean")
        )
        last = None
        for i, t in enumerate(timesteps.tolist()):
            x, x0, z = (torch_double(1, 1, 4, 4, seed=3 * i + k) for k in range(3))
            mean = LINEAR.posterior_mean_coef1[t] * x0 + LINEAR.posterior_mean_coef2[t] * x
            expected = ops.ddpm_step_ref(x, x0, by_x0.rows[i], noise=z, x0_last=last, clip=None)
            got = ops.ddpm_step_ref(x, mean, by_mean.rows[i], noise=z, x0_last=last, clip=None)
            for a, b in zip(got, expected, strict=True):
                close(a, b, 1e-9)  # 1/c0 reaches 1e4
            last = x0


def test_the_whole_chain_is_the_papers():
    """With all T steps the coefficients are those of Ho et al., computed from the schedule."""
    rows, t = coefficients.table(LINEAR).rows, torch.arange(1000).flip(0)
    for column, expected in [
        (2, LINEAR.posterior_mean_coef1), (3, LINEAR.posterior_mean_coef2), (6, LINEAR.betas.sqrt()),
    ]:  # fmt: skip
        torch.testing.assert_close(rows[:-1, column], expected[t][:-1], rtol=1e-11, atol=0)
    assert rows[-1, 6] == 0 and rows[-1, 2] == pytest.approx(1) and rows[-1, 3] == 0
    torch.testing.assert_close(
        coefficients.table(LINEAR, variance="fixed_small").rows[:-1, 6],
        LINEAR.posterior_variance.sqrt()[t][:-1],
        rtol=1e-11,
        atol=0,
    )


# ------------------------------------------------------------------------------------------ Gaussian data


def moments(sampler, timesteps, variance, eta, mean=MEAN, std=STD, schedule=LINEAR):
    """(mean, variance) of x_0 of the chain with the ideal network, carried through the papers' updates, no table in sight.

    Every update is x_prev = p x0_hat + q x + r x0_hat_last + sigma z, and x0_hat = gain x + offset.
    """
    bar = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    lam = [math.log(b / (1 - b)) / 2 if 0 < b < 1 else math.copysign(math.inf, b - 0.5) for b in bar]
    m, cov = [0.0, 0.0], np.array([[1.0, 0.0], [0.0, 0.0]])  # of (x, x0_hat_last)
    for i, (ab, prev) in enumerate(itertools.pairwise(bar)):
        gain = math.sqrt(ab) * std**2 / (ab * std**2 + 1 - ab)
        offset = mean * (1 - gain * math.sqrt(ab))
        r = sigma = 0.0
        if sampler == "ddpm":
            beta = 1 - ab / prev
            p, q = math.sqrt(prev) * beta / (1 - ab), math.sqrt(ab / prev) * (1 - prev) / (1 - ab)
            small = beta * (1 - prev) / (1 - ab)
            sigma = {"fixed_large": beta if ab else small, "fixed_small": small, "none": 0}[variance] ** 0.5
        elif sampler == "ddim":
            sigma = eta * math.sqrt((1 - prev) / (1 - ab) * (1 - ab / prev))
            q = math.sqrt(max(1 - prev - sigma**2, 0) / (1 - ab))
            p = math.sqrt(prev) - q * math.sqrt(ab)
        else:
            h = lam[i + 1] - lam[i]
            q, p = math.sqrt((1 - prev) / (1 - ab)), math.sqrt(prev) * (1 - math.exp(-h))
            if 0 < i < len(timesteps) - 1:
                r0 = (lam[i] - lam[i - 1]) / h
                p, r = p * (1 + 1 / (2 * r0)), -p / (2 * r0)
        if i == len(timesteps) - 1:
            sigma = 0.0
        step = np.array([[p * gain + q, r], [gain, 0.0]])
        m = step @ m + np.array([p * offset, offset])
        cov = step @ cov @ step.T + np.diag([sigma**2, 0.0])
    return m[0], cov[0, 0]


@pytest.mark.parametrize(
    ("sampler", "steps", "variance", "eta"),
    [
        ("ddpm", 1000, "none", 0.0),
        ("ddpm", 50, "fixed_small", 0.0),
        ("ddpm", 50, "fixed_large", 0.0),
        ("ddim", 50, None, 0.0),
        ("ddim", 50, None, 0.5),
        ("ddim", 10, None, 1.0),
        ("dpm++2m", 20, None, 0.0),
        ("dpm++2m", 5, None, 0.0),
    ],
)
def test_gaussian_data_after_every_sampler(sampler, steps, variance, eta):
    x = fastddpm.sample(
        ideal(LINEAR), 64, shape=(3, 32, 32), schedule=LINEAR, sampler=sampler, steps=steps, eta=eta, variance=variance,
        clip=False, seed=0, progress=False,
    ).double()  # fmt: skip
    timesteps = coefficients.select_timesteps(LINEAR, steps, coefficients.DEFAULT_SPACING[sampler])
    mean, var = moments(sampler, timesteps, variance, eta)
    assert abs(x.mean().item() - mean) <= 5 * math.sqrt(var / x.numel()) + 1e-5
    assert abs(x.var().item() - var) <= 5 * var * math.sqrt(2 / x.numel()) + 1e-6 * var + 1e-9
    if variance == "none":
        assert var / STD**2 < 3e-5  # the collapse to averages
    elif (sampler, eta) != ("ddim", 1.0) and steps > 5 and variance != "fixed_large":
        assert var == pytest.approx(STD**2, rel=0.25)


def end_error(sampler, steps):
    """How far a chain of the ideal network is, at the last grid point, from the exact solution of the ODE that it solves."""
    t = coefficients.select_timesteps(LINEAR, steps, "logsnr")
    rows = coefficients.table(LINEAR, sampler=sampler, timesteps=t).rows
    model, bar = ideal(LINEAR), LINEAR.alphas_cumprod[t]
    spread = (bar * STD**2 + 1 - bar).sqrt()
    x, last = torch.tensor([[[0.7]]], dtype=torch.float64), None
    begin = x.clone()
    for i in range(steps - 1):
        x, last = ops.ddpm_step_ref(x, model.slope[t[i]] * x + model.shift[t[i]], rows[i], x0_last=last, clip=None)
    exactly = bar[-1].sqrt() * MEAN + spread[-1] / spread[0] * (begin - bar[0].sqrt() * MEAN)
    return abs(x - exactly).item()


def test_orders():
    assert end_error("dpm++2m", 20) >= 3 * end_error("dpm++2m", 40)
    assert end_error("ddim", 20) == pytest.approx(2 * end_error("ddim", 40), rel=0.2)
    assert end_error("dpm++2m", 20) < end_error("ddim", 20) / 5


def test_prediction_types_give_the_same_images_with_every_sampler():
    for sampler, steps in [("ddpm", 7), ("ddim", 7), ("dpm++2m", 7), ("dpm++2m", 20)]:
        drawn = [
            fastddpm.sample(
                ideal(SHORT, kind),
                2,
                shape=SHAPE,
                schedule=SHORT,
                prediction=kind,
                sampler=sampler,
                steps=steps,
                seed=3,
            )
            for kind in coefficients.PREDICTIONS
        ]
        for x in drawn[1:]:
            torch.testing.assert_close(x, drawn[0], rtol=0, atol=5e-5)


# ------------------------------------------------------------------------------------ zero terminal SNR


@given(data=st.data())
def test_tables_of_zero_snr_are_finite(data):
    T = data.draw(st.integers(1, 60))
    betas = data.draw(st.lists(st.floats(1e-6, 0.9), min_size=T - 1, max_size=T - 1))
    schedule = Schedule([*betas, 1.0])
    assert all(v.isfinite().all() for v in vars(schedule).values())
    sampler = data.draw(st.sampled_from(sorted(coefficients.DEFAULT_STEPS)))
    options = {"prediction": data.draw(st.sampled_from(["sample", "v_prediction", "mean"]))}
    if sampler == "ddpm":
        options["variance"] = data.draw(st.sampled_from(coefficients.VARIANCES))
    elif sampler == "ddim":
        options["eta"] = data.draw(st.floats(0, 1))
    t = coefficients.select_timesteps(schedule, data.draw(st.integers(1, T)), data.draw(st.sampled_from(SPACINGS)))
    assert (t.diff() < 0).all()
    table = coefficients.table(schedule, sampler=sampler, timesteps=t, **options)
    assert table.rows.isfinite().all() and table.rows.float().isfinite().all()
    if t[0] == T - 1:
        assert table.rows[0, 0] == 0  # x_T says nothing of x_0


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize(("steps", "spacing"), [(50, "trailing"), (7, "linspace"), (2, "trailing"), (1, "trailing")])
def test_ddpm_with_zero_snr_is_diffusers(variance, prediction, steps, spacing):
    """But for the first step of fixed_large, whose noise is 1 with diffusers and the posterior's here, and the last's."""
    table = coefficients.table(
        ZERO, prediction=prediction, variance=variance, timesteps=coefficients.select_timesteps(ZERO, steps, spacing)
    )
    theirs = exact(DDPMScheduler(variance_type=variance, prediction_type=prediction, rescale_betas_zero_snr=True), ZERO)
    theirs.set_timesteps(timesteps=table.timesteps.tolist())
    for i, t, x, o, z, x_prev, x0 in walk(table, 1.0, channels=6 if variance == "learned_range" else 3):
        result = theirs.step(o, t, x, generator=torch.Generator().manual_seed(i))
        close(x0, result.pred_original_sample, 1e-12)
        if i + 1 == steps:
            close(x_prev, x0 if t else result.prev_sample, 1e-12)
        elif i == 0 and variance == "fixed_large":
            prev = ZERO.alphas_cumprod[table.timesteps[1]]
            close(x_prev, prev.sqrt() * x0 + (1 - prev).sqrt() * z, 1e-12)
            close(result.prev_sample, prev.sqrt() * x0 + z, 1e-12)
        else:
            close(x_prev, result.prev_sample, 1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("steps", [50, 10, 2, 1])
def test_ddim_with_zero_snr_is_diffusers(eta, prediction, steps):
    table = coefficients.table(
        ZERO,
        sampler="ddim",
        prediction=prediction,
        eta=eta,
        timesteps=coefficients.select_timesteps(ZERO, steps, "trailing"),
    )
    theirs = exact(
        DDIMScheduler(prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing"), ZERO
    )
    theirs.set_timesteps(steps)
    assert torch.equal(theirs.timesteps, table.timesteps)
    for _, t, x, o, z, x_prev, x0 in walk(table, 1.0):
        result = theirs.step(o, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta else None)
        close(x0, result.pred_original_sample, 1e-12)
        close(x_prev, result.prev_sample, 1e-12)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_sample_with_diffusers_zero_snr_scheduler(kind, prediction):
    """Every step of the chain that `sample` runs, given the scheduler as it is, within 1e-5 of the scheduler's own."""
    theirs = kind(rescale_betas_zero_snr=True, prediction_type=prediction, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    outputs, states, options = [], [], {}
    if kind is DDIMScheduler:
        options["sampler"], arguments = "ddim", {"use_clipped_model_output": True}
    else:
        options["seed"], arguments = 3, {}

    def model(x, t):
        outputs.append(0.7 * x.roll(1, 3) + 0.1)
        return outputs[-1]

    noise = torch_double(2, *SHAPE).float()
    fastddpm.sample(
        model,
        2,
        shape=SHAPE,
        schedule=theirs,
        steps=20,
        spacing="trailing",
        noise=noise,
        callback=states.append,
        **options,
    )
    x = noise
    for i, (o, state) in enumerate(zip(outputs, states, strict=True)):
        expected = theirs.step(o, state.timestep, x, **arguments, generator=torch.Generator().manual_seed(0))
        got = state.x
        if kind is DDPMScheduler:
            sigma = 0.0 if i == 19 else theirs._get_variance(state.timestep).sqrt()
            z = ops.philox_normal(x.shape, seed=3, t=state.timestep, stream=Stream.REVERSE)
            got = got - sigma * z
            expected.prev_sample -= theirs._get_variance(state.timestep).sqrt() * torch.randn(
                x.shape, generator=torch.Generator().manual_seed(0)
            )
        close(state.x0, expected.pred_original_sample, 1e-5)
        close(got, expected.prev_sample, 1e-5)
        x = state.x


@pytest.mark.parametrize("prediction", ["sample", "v_prediction", "mean"])
@pytest.mark.parametrize(
    ("sampler", "steps", "variance", "eta"),
    [
        ("ddpm", 1000, "fixed_large", 0.0),
        ("ddpm", 50, "fixed_small", 0.0),
        ("ddpm", 10, "fixed_large", 0.0),
        ("ddim", 50, None, 0.0),
        ("ddim", 10, None, 1.0),
        ("dpm++2m", 20, None, 0.0),
        ("dpm++2m", 2, None, 0.0),
    ],
)
def test_gaussian_data_with_zero_snr(sampler, steps, variance, eta, prediction):
    x = fastddpm.sample(
        ideal(ZERO, prediction), 16, shape=(3, 32, 32), schedule=ZERO, sampler=sampler, prediction=prediction, steps=steps,
        eta=eta, variance=variance, clip=False, seed=0, progress=False,
    ).double()  # fmt: skip
    timesteps = coefficients.select_timesteps(ZERO, steps, coefficients.DEFAULT_SPACING[sampler])
    mean, var = moments(sampler, timesteps, variance, eta, schedule=ZERO)
    assert abs(x.mean().item() - mean) <= 5 * math.sqrt(var / x.numel()) + 1e-5
    assert abs(x.var().item() - var) <= 5 * var * math.sqrt(2 / x.numel()) + 1e-5
    if steps >= 20:
        assert mean == pytest.approx(MEAN, rel=0.01) and var == pytest.approx(STD**2, rel=0.25)


def test_epsilon_with_zero_snr_is_refused():
    """By everything that takes a model, with the reason; what the network is said to predict wins over the scheduler's word."""
    model, x0 = (lambda x, t: pytest.fail("called")), torch.zeros(1, *SHAPE)
    theirs = DDIMScheduler(rescale_betas_zero_snr=True)
    for call in (
        lambda: fastddpm.sample(model, 1, shape=SHAPE, schedule=ZERO),
        lambda: fastddpm.sample(model, 1, shape=SHAPE, schedule=theirs),
        lambda: fastddpm.training_loss(model, x0, schedule=ZERO),
        lambda: fastddpm.encode(model, x0, schedule=ZERO),
        lambda: fastddpm.likelihood(model, x0.byte(), schedule=ZERO),
    ):
        with pytest.raises(ValueError, match="prediction: got 'epsilon' .* x0 cannot be recovered from eps"):
            call()
    drawn = fastddpm.sample(lambda x, t: 0 * x, 1, shape=SHAPE, schedule=theirs, prediction="sample", seed=0)
    assert (drawn == 0).all()


# ------------------------------------------------------------------------------- through sample, as used


def test_eta_one_is_ddpm():
    """DDIM with the posterior's variance equals DDPM if nothing is clipped (Song et al., section 4.1)."""
    options = {"shape": SHAPE, "schedule": SHORT, "clip": False, "seed": 5}
    for steps in (6, 20):
        a = fastddpm.sample(ideal(SHORT), 3, steps=steps, variance="fixed_small", **options)
        b = fastddpm.sample(ideal(SHORT), 3, steps=steps, sampler="ddim", eta=1.0, **options)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_bits_do_not_depend_on_the_batch(sampler):
    def draw(n, **options):
        model = ideal(SHORT, std=2.0)
        return fastddpm.sample(model, n, shape=SHAPE, schedule=SHORT, seed=1, sampler=sampler, steps=8, **options)

    whole = draw(7, batch_size=7)
    assert torch.equal(draw(7, batch_size=2), whole) and torch.equal(draw(3, first=4), whole[4:])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m"])
def test_a_network_draws_what_its_plain_callable_does(sampler):
    """The chain runs through the engine, with the previous x0 and with classes."""
    model = small_unet(num_classes=3)
    labels = torch.tensor([0, 2, 1])
    options = {"sampler": sampler, "steps": 6, "seed": 0, "class_labels": labels}
    got = fastddpm.sample(model, 3, batch_size=2, **options)
    plain = fastddpm.sample(lambda x, t, y: model(x, t, y), 3, shape=(1, 8, 8), schedule=SHORT, **options)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)


def test_learned_range():
    """v = 1 is the large variance, v = -1 the small one. Other samplers do not read v, and another width is refused."""
    assert (
        coefficients.table(SHORT, variance="learned_range").rows.isfinite().all()
    )  # the posterior's log 0 is replaced

    def with_v(v):
        model = ideal(SHORT)

        def both(x, t):
            o = model(x, t)
            return torch.cat((o, torch.full_like(o, v)), dim=1)

        return both

    options = {"shape": SHAPE, "schedule": SHORT, "seed": 2}
    for v, fixed in ((1.0, "fixed_large"), (-1.0, "fixed_small")):
        got = fastddpm.sample(with_v(v), 2, variance="learned_range", **options)
        torch.testing.assert_close(got, fastddpm.sample(ideal(SHORT), 2, variance=fixed, **options), rtol=0, atol=2e-5)
    a, b = (fastddpm.sample(with_v(v), 2, sampler="ddim", steps=5, **options) for v in (0.3, float("nan")))
    assert torch.equal(a, b)
    with pytest.raises(SamplingError, match=r"expected \[2, 6, 4, 5\], with the learned variance"):
        fastddpm.sample(ideal(SHORT), 2, variance="learned_range", **options)
    with pytest.raises(ValueError, match="learned_range needs a network with 2 output channels; this one has 1"):
        fastddpm.sample(small_unet(), 1, variance="learned_range")
    model = small_unet(out_channels=2)
    model.variance = "learned_range"
    plain = {"shape": (1, 8, 8), "schedule": SHORT, "variance": "learned_range", "steps": 5, "seed": 0}
    expected = fastddpm.sample(lambda x, t: model(x, t), 2, **plain)
    torch.testing.assert_close(fastddpm.sample(model, 2, steps=5, seed=0), expected, rtol=0, atol=1e-4)


def test_fixed_large_is_not_respaced_unasked():
    model = ideal(SHORT)
    options = {"shape": SHAPE, "schedule": SHORT, "prediction": "epsilon", "seed": 0}
    with pytest.warns(UserWarning, match=r"fixed_small in place of the default fixed_large, which ruins images"):
        x = fastddpm.sample(model, 2, steps=5, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once; and nothing to say about these
        assert torch.equal(fastddpm.sample(model, 2, steps=5, **options), x)
        assert torch.equal(fastddpm.sample(model, 2, steps=5, variance="fixed_small", **options), x)
        fastddpm.sample(model, 1, **options)
        fastddpm.sample(model, 1, steps=6, **options)
        fastddpm.sample(model, 1, sampler="ddim", steps=5, **options)
    with pytest.warns(UserWarning, match="consider fixed_small"):
        assert not torch.equal(fastddpm.sample(model, 2, steps=5, variance="fixed_large", **options), x)


def test_a_predicted_mean_is_not_clipped():
    options = {"shape": SHAPE, "schedule": SHORT, "prediction": "mean", "seed": 0}
    model = lambda x, t: torch.full_like(x, 3)  # noqa: E731
    assert (fastddpm.sample(model, 1, **options) == 3).all()
    assert fastddpm.sample(model, 1, steps=19, **options).abs().max() <= 1  # by way of x0


def test_default_steps():
    seen = []

    def model(x, t):
        seen.append(int(t[0]))
        return x

    for sampler, steps in (("ddpm", 100), ("ddim", 50), ("dpm++2m", 20)):
        seen.clear()
        fastddpm.sample(model, 1, shape=SHAPE, schedule=Schedule.cosine(100), sampler=sampler)
        assert len(seen) == steps and seen[0] == 99
    seen.clear()
    fastddpm.sample(model, 1, shape=SHAPE, schedule=SHORT, sampler="ddim")
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, r"steps: got 0; expected an int in 1\.\.20"),
        ({"steps": 21}, r"steps: got 21; expected an int in 1\.\.20"),
        ({"steps": 5.0}, r"steps: got 5\.0"),
        ({"steps": True}, "steps: got True"),
        ({"sampler": "ddim", "eta": -0.1}, r"eta: got -0\.1; expected a number in \[0, 1\]"),
        ({"sampler": "ddim", "eta": 1.1}, r"eta: got 1\.1"),
        ({"sampler": "ddim", "eta": float("nan")}, "eta: got nan"),
        ({"eta": 0.5}, 'eta: got 0.5, which only sampler="ddim" has'),
        ({"sampler": "dpm++2m", "eta": 0.5}, "eta: got 0.5, which only"),
        ({"sampler": "ddim", "variance": "fixed_small"}, "ddim's noise is eta"),
        ({"sampler": "dpm++2m", "variance": "none"}, "adds no noise"),
        ({"spacing": "quadratic"}, "spacing: got 'quadratic'; expected one of leading, linspace, trailing, logsnr"),
        ({"sampler": "dpm"}, "sampler: got 'dpm'; expected one of ddpm, ddim, dpm\\+\\+2m"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        fastddpm.sample(lambda x, t: pytest.fail("drawn"), 1, shape=SHAPE, schedule=SHORT, **options)
