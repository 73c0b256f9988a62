"""The fused schedulers against diffusers' own: step by step on the same inputs and noise, and inside its pipelines."""

import copy
import importlib.util
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import same_bits
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from torch.utils._python_dispatch import TorchDispatchMode

import fastddpm
from fastddpm import ops
from fastddpm.integrations import diffusers as integration
from fastddpm.integrations.diffusers import FusedDDIMScheduler, FusedDDPMScheduler

logging.set_verbosity_error()
logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:__array__")  # diffusers with NumPy 2
PAIRS = {DDPMScheduler: FusedDDPMScheduler, DDIMScheduler: FusedDDIMScheduler}
PREDICTIONS = ("epsilon", "sample", "v_prediction")
CHAINS = [(1000, "leading"), (50, "leading"), (50, "trailing"), (7, "linspace"), (7, "trailing"), (1, "trailing")]
SHAPE = (2, 3, 4, 4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def pair(parent, **options):
    return parent(**options), PAIRS[parent](**options)


def close(got, expected, bound=1e-5, largest=1.0):
    """Assert that errors are within bound of the largest finite number, and that NaN and infinity agree."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    largest = max(largest, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=bound * largest, equal_nan=True)


def close_x0(got, expected, x, o, scheduler, t):
    """With eps prediction, x0 is a difference of terms of 157 times x at t = 999. The bound is four roundings of them."""
    if scheduler.config.prediction_type == "epsilon":
        root = math.sqrt(scheduler.alphas_cumprod[t])
        largest = (x.abs().max() + o.abs().max()).item() / root if root else 0.0  # all is clipped where root is 0
        close(got, expected, 2.0**-22, largest)
    else:
        close(got, expected, 1e-6)


def teacher_forced(theirs, ours, *, channels=3, generators=None, **arguments):
    """Both on diffusers' x at every step; on the long chains only in some of them, and all of the last, the worst conditioned."""
    generators = generators or (generator(), generator())
    x, count = randn(*SHAPE, seed=1), len(theirs.timesteps)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    for i, (t, same_t) in enumerate(zip(theirs.timesteps, ours.timesteps, strict=True)):
        if count > 100 and i % 53 and i < count - 12:
            continue
        o = randn(SHAPE[0], channels, *SHAPE[2:], seed=i)
        expected = theirs.step(o, t, x, generator=generators[0], **arguments)
        before = x.clone()
        got = ours.step(o, same_t, x, generator=generators[1], **arguments)
        assert type(got) is type(expected) and torch.equal(x, before)
        close(got.prev_sample, expected.prev_sample)
        close_x0(got.pred_original_sample, expected.pred_original_sample, x, o[:, :3], theirs, t)
        x = expected.prev_sample
    for a, b in zip(*([g] if isinstance(g, torch.Generator) else g for g in generators), strict=True):
        assert torch.equal(a.get_state(), b.get_state())


# ----------------------------------------------------------------------------------------- step by step


@pytest.mark.parametrize("clip", [1.0, 0.6, None])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_steps_are_diffusers(prediction, variance, clip):
    options = {"prediction_type": prediction, "variance_type": variance, "clip_sample": clip is not None}
    options |= {"clip_sample_range": clip or 1.0}
    for steps, spacing in [*CHAINS, ([900, 500, 499, 30, 3], "leading"), (None, "leading")]:
        theirs, ours = pair(DDPMScheduler, timestep_spacing=spacing, **options)
        for scheduler in (theirs, ours):
            if isinstance(steps, list):
                scheduler.set_timesteps(timesteps=steps)
            elif steps is not None:
                scheduler.set_timesteps(steps)
        teacher_forced(theirs, ours, channels=6 if variance == "learned_range" else 3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_steps_are_diffusers(prediction, clip, eta):
    for options in (
        {},
        {"set_alpha_to_one": False},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
    ):
        if prediction == "epsilon" and not clip and "rescale_betas_zero_snr" in options:
            continue  # diffusers divides by 0
        for steps, spacing in CHAINS:
            for clipped in (None, True):
                theirs, ours = pair(
                    DDIMScheduler, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing, **options
                )
                theirs.set_timesteps(steps), ours.set_timesteps(steps)
                teacher_forced(theirs, ours, eta=eta, use_clipped_model_output=clipped)


@pytest.mark.parametrize("parent", PAIRS)
def test_float64_is_diffusers_to_the_last_digits(parent):
    """Coefficients are rounded where diffusers rounds them. Exact ones would differ by 1e-4 in the last steps."""
    for prediction in PREDICTIONS:
        theirs, ours = pair(parent, prediction_type=prediction)
        theirs.set_timesteps(1000), ours.set_timesteps(1000)
        arguments = {"eta": 0.7} if parent is DDIMScheduler else {}
        for i in (0, 1, 500, 990, 997, 998, 999):
            t = int(theirs.timesteps[i])
            x, o = (randn(*SHAPE, seed=seed, dtype=torch.float64) for seed in (1, 2))
            expected = theirs.step(o, t, x, generator=generator(), **arguments)
            got = ours.step(o, t, x, generator=generator(), **arguments)
            close(got.prev_sample, expected.prev_sample, 1e-13)
            close_largest = (x.abs().max() + o.abs().max()).item() * 160
            close(got.pred_original_sample, expected.pred_original_sample, 1e-15, close_largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_float32_rounded_once(dtype):
    theirs, ours = pair(DDIMScheduler)
    theirs.set_timesteps(50), ours.set_timesteps(50)
    for t in (980, 500, 0):
        x, o = randn(*SHAPE, seed=1).to(dtype), randn(*SHAPE, seed=2).to(dtype)
        expected = theirs.step(o.float(), t, x.float())
        got = ours.step(o, t, x)
        for a, b in zip(got.to_tuple(), expected.to_tuple(), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.float(), b, rtol=torch.finfo(dtype).eps / 2 + 1e-4, atol=1e-4)


@pytest.mark.parametrize("parent", PAIRS)
@pytest.mark.parametrize(
    ("of_sample", "of_output"),
    [
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float64", "float32"),
    ],
)
def test_dtypes_and_draws_are_diffusers(parent, of_sample, of_output):
    """Noise is drawn in the output's dtype. Diffusers rounds every operation, hence the bound: a few of the coarser's ulps."""
    theirs, ours = pair(parent)
    theirs.set_timesteps(20), ours.set_timesteps(20)
    x, o = (
        randn(*SHAPE, seed=1, dtype=getattr(torch, of_sample)),
        randn(*SHAPE, seed=2, dtype=getattr(torch, of_output)),
    )
    arguments = {"eta": 1.0} if parent is DDIMScheduler else {}
    generators = generator(), generator()
    expected = theirs.step(o, 400, x, generator=generators[0], **arguments)
    got = ours.step(o, 400, x, generator=generators[1], **arguments)
    close(got.prev_sample, expected.prev_sample, 4 * max(torch.finfo(v.dtype).eps for v in (x, o)))
    assert got.pred_original_sample.dtype == expected.pred_original_sample.dtype
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_any_timestep_is_what_diffusers_makes_of_it():
    theirs, ours = pair(DDPMScheduler)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    for t in (500, np.int64(500), torch.tensor(500), torch.tensor([500]), torch.tensor(500, dtype=torch.int32)):
        got, expected = (scheduler.step(o, t, x, generator(), return_dict=False) for scheduler in (ours, theirs))
        assert type(got) is type(expected) is tuple
        close(got[0], expected[0]), close(got[1], expected[1])
    for scheduler in (theirs, ours):
        with pytest.raises(IndexError):
            scheduler.step(o, 501, x)
        with pytest.raises(IndexError):
            scheduler.step(o, torch.tensor(501), x)
    theirs, ours = pair(DDPMScheduler)
    for scheduler in (theirs, ours):
        scheduler.timesteps = torch.tensor([800, 500, 100])  # and set_timesteps was never called
    for t in (500, 400):
        close(ours.step(o, t, x, generator()).prev_sample, theirs.step(o, t, x, generator()).prev_sample)
    theirs, ours = pair(DDIMScheduler)
    for scheduler in (theirs, ours):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(o, 500, x)
        scheduler.set_timesteps(10)
        with pytest.raises(IndexError):
            scheduler.step(o, 1000, x)
    for t in (501, 999, 3):  # beside the chain, which DDIM doesn't mind
        got, expected = (scheduler.step(o, t, x, return_dict=False) for scheduler in (ours, theirs))
        assert type(got) is type(expected) is tuple
        close(got[0], expected[0])
    for t in (1.5, torch.tensor(1.5)):
        with pytest.raises(TypeError, match="integer"):
            ours.step(o, t, x)


def test_elements_of_the_timesteps_are_known_by_their_place():
    ours = FusedDDPMScheduler()
    ours.set_timesteps(7)
    chain = ours._current()
    listed = ours.timesteps.tolist()
    assert [chain.timestep(t) for t in ours.timesteps] == listed
    assert [chain.timestep(t) for t in ours.timesteps[2:]] == listed[2:]
    assert [chain.timestep(t) for t in ours.timesteps.clone()] == listed
    for other in (
        ours.timesteps.to(torch.int32),
        torch.arange(7),
        torch.stack((ours.timesteps, ours.timesteps + 1))[1],
    ):
        assert [chain.timestep(t) for t in other] == other.tolist()
    with pytest.raises(TypeError):
        chain.timestep(ours.timesteps.view(torch.float64)[2])
    every = torch.arange(20).flip(0)
    ours.timesteps = every[::3]
    chain = ours._current()
    assert [chain.timestep(t) for t in every] == every.tolist()


@pytest.mark.parametrize("parent", PAIRS)
def test_what_is_replaced_is_read_anew(parent):
    theirs, ours = pair(parent)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)

    def compare(t):
        got, expected = (s.step(o, t, x, generator=generator()) for s in (ours, theirs))
        close(got.prev_sample, expected.prev_sample)

    changes = [
        lambda s: s.set_timesteps(10),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
        lambda s: s.register_to_config(clip_sample=False),
        lambda s: setattr(s, "timesteps", torch.tensor([800, 500, 100])),
        lambda s: s.set_timesteps(20),
    ]
    for change in changes:
        change(theirs), change(ours)
        compare(500)
    ours.register_to_config(thresholding=True)
    with pytest.raises(ValueError, match="thresholding"):
        ours.step(o, 500, x)


@pytest.mark.parametrize("parent", PAIRS)
def test_a_chain_that_ends_below_0(parent):
    """Diffusers' "trailing" makes one timestep too many of some numbers of steps: -1, where it takes the last alpha."""
    theirs, ours = pair(parent, timestep_spacing="trailing")
    seeded = PAIRS[parent](timestep_spacing="trailing", noise_seed=1)
    for scheduler in (theirs, ours, seeded):
        scheduler.set_timesteps(121)
    assert theirs.timesteps[-1] == -1
    teacher_forced(theirs, ours)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    close(seeded.step(o, -1, x).prev_sample, theirs.step(o, -1, x).prev_sample)


def test_variance_noise():
    theirs, ours = pair(DDIMScheduler)
    seeded = FusedDDIMScheduler(noise_seed=1)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for scheduler in (theirs, ours, seeded):
        scheduler.set_timesteps(10)
    for noise in (randn(*SHAPE, seed=3), randn(1, *SHAPE[1:], seed=3)):
        expected = theirs.step(o, 500, x, eta=0.5, variance_noise=noise)
        for scheduler in (ours, seeded):
            close(scheduler.step(o, 500, x, eta=0.5, variance_noise=noise).prev_sample, expected.prev_sample)
    for scheduler in (theirs, ours):
        with pytest.raises(ValueError, match="both"):
            scheduler.step(o, 500, x, eta=0.5, variance_noise=noise, generator=generator())
    got = ours.step(o, 500, x, variance_noise=torch.ones(7), generator=generator())  # eta is 0: neither is looked at
    close(got.prev_sample, theirs.step(o, 500, x).prev_sample)


def test_memory_layouts_and_shapes():
    """Inputs: channels_last, slices of tensors with more channels, points in a plane, other dimensions, and an empty batch."""
    theirs, ours = pair(DDPMScheduler)
    theirs.set_timesteps(10), ours.set_timesteps(10)
    x, o = randn(*SHAPE, seed=1), randn(2, 6, 4, 4, seed=2)[:, :3]
    expected = theirs.step(o, 500, x, generator())
    for arranged in (x, x.to(memory_format=torch.channels_last), torch.cat((x, x), 1)[:, 3:]):
        got = ours.step(o, 500, arranged, generator())
        close(got.prev_sample, expected.prev_sample), close(got.pred_original_sample, expected.pred_original_sample)
    for shape in ((5, 2), (5, 2, 3), (2, 3, 4, 4, 4), (0, 3, 4, 4)):
        x, o = randn(*shape, seed=1), randn(*shape, seed=2)
        got, expected = (scheduler.step(o, 500, x, generator()).prev_sample for scheduler in (ours, theirs))
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_gradients_are_left_to_diffusers():
    theirs, ours = pair(DDPMScheduler)
    theirs.set_timesteps(10), ours.set_timesteps(10)
    o, gradients = randn(*SHAPE, seed=2), []
    for scheduler in (theirs, ours):
        x = randn(*SHAPE, seed=1).requires_grad_()
        scheduler.step(o, 500, x, generator()).prev_sample.square().sum().backward()
        gradients.append(x.grad)
    assert same_bits(*gradients)
    seeded = FusedDDPMScheduler(noise_seed=0)
    with pytest.raises(ValueError, match="noise_seed: is 0, and model_output or sample requires grad"):
        seeded.step(o, 500, x)
    with torch.no_grad():
        close(ours.step(o, 500, x, generator()).prev_sample, theirs.step(o, 500, x, generator()).prev_sample)
    ddim, fused = pair(DDIMScheduler)
    ddim.set_timesteps(10), fused.set_timesteps(10)
    got, expected = (s.step(o, 500, x, 0.5, True, None, o, False)[0] for s in (fused, ddim))
    assert same_bits(got.detach(), expected.detach()) and got.requires_grad


# ------------------------------------------------------------------------------------------------ noise


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheduler", [FusedDDPMScheduler(noise_seed=1), FusedDDIMScheduler(noise_seed=1)])
def test_a_seeded_step_is_one_operation(scheduler):
    """On a GPU this corresponds to one kernel launch without synchronization."""
    scheduler.set_timesteps(10)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    first, second, *_ = scheduler.timesteps
    arguments = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    scheduler.step(o, first, x, **arguments)
    with Calls() as calls:
        scheduler.step(o, second, x, **arguments)
    assert calls.names == ["fastddpm.ddpm_step.default"]
    with Calls() as calls:
        scheduler.step(o, second.clone(), x, **arguments)
    assert "aten._local_scalar_dense.default" in calls.names  # this is what a wait looks like here


@pytest.mark.parametrize("parent", PAIRS)
def test_a_dtype_without_products_is_said_once(parent, float32_alone):
    scheduler = PAIRS[parent]()
    scheduler.set_timesteps(10)
    x = randn(*SHAPE, seed=0)
    with pytest.warns(UserWarning, match=r"no products of torch.bfloat16, so the model's convolutions") as said:
        for t in scheduler.timesteps[:3]:
            scheduler.step(x.bfloat16(), t, x)
            scheduler.step(x, t, x)
    assert len(said) == 1


def test_seeded_noise_is_that_of_the_sequence():
    """With x = o = 0 the result of a step is sigma*z."""
    zero = torch.zeros(3, 3, 4, 5)
    seed = (1 << 64) - 3
    ddpm, ddim = FusedDDPMScheduler(noise_seed=seed), FusedDDIMScheduler(noise_seed=seed)
    ddim.set_timesteps(10)
    for first in (0, 5, 1 << 40):
        ddpm.noise_first = ddim.noise_first = first
        z = ops.philox_normal(zero.shape, seed=seed, t=700, stream=1, first=first)
        sigma = ddpm._get_variance(700) ** 0.5
        close(ddpm.step(zero, 700, zero, generator=generator()).prev_sample, sigma * z, 5e-6 * sigma.item(), 1)
        sigma = 0.5 * ddim._get_variance(700, 600) ** 0.5
        close(ddim.step(zero, 700, zero, eta=0.5).prev_sample, sigma * z, 5e-6 * sigma.item(), 1)
    assert ddpm.noise_first == 1 << 40
    ddpm.noise_first = -1
    with pytest.raises(ValueError, match=r"noise_first: got -1; expected an int in \[0, 2\^56\)"):
        ddpm.step(zero, 700, zero)


def gaussian(x, t):
    """A model that predicts the eps of normally distributed images with variance 1/4."""
    abar = fastddpm.Schedule.linear().alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
    return x * (1 - abar).sqrt() / (abar / 4 + 1 - abar)


@pytest.mark.parametrize("kind", [FusedDDPMScheduler, FusedDDIMScheduler])
def test_seeded_chains_are_those_of_sample(kind):
    """The difference is that of diffusers' float32 alphas_cumprod. With other noise it would be as large as the images."""
    x = x_T = randn(4, 3, 8, 8, seed=5)
    scheduler = kind(noise_seed=9)
    scheduler.noise_first = 2
    scheduler.set_timesteps(50)
    if kind is FusedDDIMScheduler:
        arguments, sampler = {"eta": 1.0, "use_clipped_model_output": True}, {"sampler": "ddim", "eta": 1.0}
    else:
        arguments, sampler = {}, {"variance": "fixed_small"}
    for t in scheduler.timesteps:
        x = scheduler.step(gaussian(x, t.expand(4)), t, x, **arguments).prev_sample
    images = fastddpm.sample(
        gaussian, 4, shape=(3, 8, 8), seed=9, first=2, noise=x_T, steps=50, spacing="leading", progress=False, **sampler
    )
    assert (x - images).abs().max() < 1e-3 < 0.2 < images.std()
    assert scheduler.noise_first == 6


# -------------------------------------------------------------------------------------------- pipelines


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def pipeline(unet, scheduler):
    """DDIMPipeline converts its scheduler to a DDIMScheduler, so the fused one is assigned afterwards, as documented."""
    kind = DDIMPipeline if isinstance(scheduler, DDIMScheduler) else DDPMPipeline
    pipe = kind(unet, scheduler)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, n, seeds, **arguments):
    if isinstance(pipe, DDIMPipeline):
        arguments = {"eta": 0.8, **arguments}
    generators = [generator(seed) for seed in seeds] if isinstance(seeds, (list, range)) else generator(seeds)
    return torch.from_numpy(pipe(n, generators, num_inference_steps=20, output_type="np", **arguments).images)


@pytest.mark.parametrize("seeds", [3, [3, 4]])
@pytest.mark.parametrize("parent", PAIRS)
def test_pipelines_make_the_same_pictures(parent, seeds, unet):
    """Steps agree within 1e-5. Images agree within 1e-4, because this network does not amplify differences."""
    theirs, ours = pair(parent)
    expected = images(pipeline(unet, theirs), 2, seeds)

    replay = PAIRS[parent]()  # beside diffusers' in its own pipeline, with the noise that is drawn there
    replay.set_timesteps(20)
    worst, taken, step = [], theirs.step, theirs.step

    def both(o, t, x, generator=None, **arguments):
        again = [torch.Generator() for _ in seeds] if isinstance(seeds, list) else [torch.Generator()]
        for g, source in zip(again, generator if isinstance(seeds, list) else [generator], strict=True):
            g.set_state(source.get_state())
        result = step(o, t, x, generator=generator, **arguments)
        got = replay.step(o, t, x, generator=again if isinstance(seeds, list) else again[0], **arguments)
        close(got.prev_sample, result.prev_sample), close(got.pred_original_sample, result.pred_original_sample)
        worst.append(t)
        return result

    theirs.step = both
    assert torch.equal(images(pipeline(unet, theirs), 2, seeds), expected) and len(worst) == 20
    del taken, theirs.step
    pipe = pipeline(unet, ours)
    assert type(pipe.scheduler) is PAIRS[parent]
    assert (images(pipe, 2, seeds) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize("parent", PAIRS)
def test_seeded_pipelines_go_on_where_they_stopped(parent, unet):
    """Two calls for 4 images equal one call for 8. The pipeline draws x_T with one generator per image."""
    whole, parts = (pipeline(unet, PAIRS[parent](noise_seed=7)) for _ in range(2))
    expected = images(whole, 8, range(8))
    got = torch.cat((images(parts, 4, range(4)), images(parts, 4, range(4, 8))))
    assert (got - expected).abs().max() < 1e-4
    assert whole.scheduler.noise_first == parts.scheduler.noise_first == 8
    again = pipeline(unet, PAIRS[parent](noise_seed=7))
    again.scheduler.noise_first = 4
    assert torch.equal(images(again, 4, range(4, 8)), got[4:])
    other = pipeline(unet, PAIRS[parent](noise_seed=8))
    assert (images(other, 8, range(8)) - expected).abs().mean() > 0.05


@pytest.mark.parametrize("parent", PAIRS)
def test_a_chain_broken_off_takes_no_numbers(parent, unet):
    scheduler = PAIRS[parent](noise_seed=7)
    pipe = pipeline(unet, scheduler)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps[:-1]:
        scheduler.step(torch.zeros(SHAPE), t, torch.zeros(SHAPE))
    assert scheduler.noise_first == 0
    images(pipe, 3, 0)
    assert scheduler.noise_first == 3


def test_saved_pipelines(tmp_path, unet):
    pipe = pipeline(unet, FusedDDPMScheduler(variance_type="fixed_large", noise_seed=(1 << 64) - 1))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "fastddpm.integrations.diffusers",
        "FusedDDPMScheduler",
    ]
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FusedDDPMScheduler and isinstance(loaded.scheduler, DDPMScheduler)
    assert loaded.scheduler.noise_seed == (1 << 64) - 1 and loaded.scheduler.config.variance_type == "fixed_large"
    assert torch.equal(images(loaded, 2, 0), images(pipe, 2, 0))

    ddim = DDIMPipeline(unet, FusedDDIMScheduler(noise_seed=5))
    assert type(ddim.scheduler) is DDIMScheduler  # what the documentation warns of
    ddim.scheduler = FusedDDIMScheduler.from_config(ddim.scheduler.config)
    assert ddim.scheduler.noise_seed == 5
    ddim.save_pretrained(tmp_path / "ddim")
    assert type(DDIMPipeline.from_pretrained(tmp_path / "ddim").scheduler) is DDIMScheduler


# ---------------------------------------------------------------------------------- options and configs


@pytest.mark.parametrize("parent", PAIRS)
def test_configs_go_round(parent, tmp_path, caplog):
    fused = PAIRS[parent]
    theirs = parent(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample_range=2.0)
    ours = fused.from_config(theirs.config)
    assert isinstance(ours, parent) and ours.noise_seed is None
    logger = logging.get_logger("diffusers.configuration_utils")
    logger.propagate = True
    try:
        logging.set_verbosity_warning()
        back = parent.from_config(ours.config)
        ours.save_config(tmp_path)
        saved = parent.from_pretrained(tmp_path)
    finally:
        logging.set_verbosity_error()
        logger.propagate = False
    assert caplog.text == ""  # as there is nothing in it that diffusers doesn't know
    for scheduler in (back, saved, fused.from_pretrained(tmp_path), fused.from_config(back.config)):
        for name in ("beta_schedule", "timestep_spacing", "clip_sample_range", "steps_offset"):
            assert scheduler.config[name] == theirs.config[name]
        assert torch.equal(scheduler.alphas_cumprod, theirs.alphas_cumprod)

    seeded = fused.from_config(theirs.config, noise_seed=7)
    assert seeded.noise_seed == seeded.config.noise_seed == 7
    seeded.save_pretrained(tmp_path)
    assert fused.from_pretrained(tmp_path).noise_seed == fused.from_config(seeded.config).noise_seed == 7
    assert fused.from_config(seeded.config, noise_seed=8).noise_seed == 8
    assert fused.from_config(seeded.config, noise_seed=None).noise_seed is None
    for other in PAIRS.values():
        assert other.from_config(seeded.config).noise_seed == 7
        assert other.from_config(parent.from_config(seeded.config).config).noise_seed == 7


@pytest.mark.parametrize("kind", [FusedDDPMScheduler, FusedDDIMScheduler])
def test_the_rest_is_diffusers(kind):
    parent = kind.__mro__[2]
    theirs, ours = pair(parent)
    x, z, t = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2), torch.tensor([3, 900])
    assert torch.equal(ours.add_noise(x, z, t), theirs.add_noise(x, z, t))
    assert torch.equal(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t))
    assert ours.scale_model_input(x) is x and len(ours) == 1000 and ours.init_noise_sigma == 1
    assert ours.compatibles and kind(500, 0.001, noise_seed=3).betas[0] == np.float32(0.001)


@pytest.mark.parametrize("kind", [FusedDDPMScheduler, FusedDDIMScheduler])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies(kind, copied):
    scheduler = kind(noise_seed=7)
    scheduler.set_timesteps(10)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    scheduler.step(o, 900, x)
    scheduler.noise_first = 3
    again = copied(scheduler)
    assert again.noise_first == 3 and again.config == scheduler.config
    for t, same_t in zip(scheduler.timesteps, again.timesteps, strict=True):
        assert same_bits(again.step(o, same_t, x).prev_sample, scheduler.step(o, t, x).prev_sample)
    assert again.noise_first == 5


def test_the_default_device_is_not_meant():
    scheduler = FusedDDPMScheduler(noise_seed=7)
    x, o = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    expected = scheduler.step(o, 500, x).prev_sample
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()  # so it is read again
    with torch.device("meta"):
        assert same_bits(scheduler.step(o, 500, x).prev_sample, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"thresholding": True},
            "thresholding: got True; .* clip_sample=True",
        ),
        ({"prediction_type": "flow"}, "prediction_type: got 'flow'; expected one of epsilon, sample, v_prediction"),
        ({"clip_sample_range": 0.0}, "clip_sample_range: got 0.0; expected a positive bound"),
        ({"noise_seed": -1}, r"noise_seed: got -1; expected an int in \[0, 2\^64\)"),
        ({"noise_seed": 1 << 64}, "noise_seed: got 18446744073709551616"),
        ({"noise_seed": True}, "noise_seed: got True"),
        ({"noise_seed": 1.0}, r"noise_seed: got 1\.0"),
    ],
)
def test_what_is_refused(options, message):
    for kind in PAIRS.values():
        with pytest.raises(ValueError, match=message):
            kind(**options)
        with pytest.raises(ValueError, match=message):
            kind.from_config(kind().config, **options)


def test_variances_that_are_refused():
    for variance, message in (
        ("learned", "diffusers' own DDPMScheduler"),
        ("fixed_large_log", "NaN: use fixed_large"),
        ("large", "expected one of fixed_small, fixed_small_log, fixed_large, learned_range$"),
    ):
        with pytest.raises(ValueError, match=f"variance_type: got '{variance}'.*{message}"):
            FusedDDPMScheduler(variance_type=variance)
    theirs = DDPMScheduler(variance_type="fixed_large_log")
    x = torch.zeros(SHAPE)
    assert theirs.step(x, 500, x).prev_sample.isnan().all()  # why it is refused


@pytest.mark.parametrize(
    "scheduler", [FusedDDPMScheduler(), FusedDDPMScheduler(variance_type="learned_range"), FusedDDIMScheduler()]
)
def test_samples_without_channels_are_refused(scheduler):
    scheduler.set_timesteps(10)
    for x in (torch.zeros(4), torch.zeros(())):
        with pytest.raises(ValueError, match=r"^sample: got shape \[4?\]; expected \[N, C, \*spatial\]"):
            scheduler.step(x, 900, x)


def test_outputs_that_do_not_fit():
    x, o = randn(*SHAPE, seed=1), randn(2, 6, 4, 4, seed=2)
    with pytest.raises(ValueError, match=r"model_output: got shape \[2, 6, 4, 4\]; expected \[2, 3, 4, 4\], as sample"):
        FusedDDPMScheduler().step(o, 500, x)
    with pytest.raises(
        ValueError, match=r"model_output: got shape \[2, 3, 4, 4\]; expected \[2, 6, 4, 4\], with the learned"
    ):
        FusedDDPMScheduler(variance_type="learned_range").step(x, 500, x)


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (None, ImportError, "missing: pip install diffusers"),
        ("__version__ = '0.31.0'", ImportError, "requires diffusers 0.32 or newer, and this is 0.31.0"),
        ("import what_it_needs", ModuleNotFoundError, "what_it_needs"),
    ],
)
def test_without_a_diffusers_that_serves(monkeypatch, tmp_path, found, error, message):
    if found is None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    else:
        (tmp_path / "diffusers.py").write_text(found)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "diffusers")
    spec = importlib.util.spec_from_file_location("fastddpm.integrations.probe", integration.__file__)
    with pytest.raises(error, match=message):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
