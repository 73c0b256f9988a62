"""The chain: exact statistics for Gaussian data, seeds, batching, every prediction type, captured steps, what is refused."""

import io
import itertools
import math
import warnings

import pytest
import torch
from conftest import chain_with
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, backend, ops
from fastddpm.diffusion import coefficients
from fastddpm.engine import cache, convolution, graphs
from fastddpm.engine.runner import EngineRunner, Runner
from fastddpm.errors import SamplingError
from fastddpm.ops.rng import Stream
from fastddpm.sampling import loop
from fastddpm.sampling.plan import ChainArguments, make_plan, resolve_for

SHAPE = (3, 4, 5)
SHORT = Schedule.linear(20, 1e-3, 0.3)
MEAN, STD = 0.3, 0.5


def ideal(schedule, prediction="epsilon", mean=MEAN, std=STD):
    """The best possible network for pixels ~ N(mean, std^2): only + and x, so that no element's place matters."""
    bar = schedule.alphas_cumprod
    gain = bar.sqrt() * std**2 / (bar * std**2 + 1 - bar)  # E[x0 | x_t] = mean + gain (x_t - sqrt(bar) mean)
    offset = mean * (1 - gain * bar.sqrt())
    if prediction == "epsilon":
        slope, shift = (1 - bar.sqrt() * gain) / (1 - bar).sqrt(), -bar.sqrt() * offset / (1 - bar).sqrt()
    elif prediction == "sample":
        slope, shift = gain, offset
    elif prediction == "v_prediction":
        slope, shift = (bar.sqrt() - gain) / (1 - bar).sqrt(), -offset / (1 - bar).sqrt()
    else:
        slope = schedule.posterior_mean_coef1 * gain + schedule.posterior_mean_coef2
        shift = schedule.posterior_mean_coef1 * offset

    def model(x, t):
        return slope[t].float()[:, None, None, None] * x + shift[t].float()[:, None, None, None]

    model.slope, model.shift = slope, shift
    return model


def exact_moments(schedule, variance):
    """Mean and variance of the chain's x_0, by carrying them through its affine steps in float64."""
    model, table = ideal(schedule), coefficients.table(schedule, variance=variance)
    m, v = 0.0, 1.0
    for t, (a, b, c0, c1, _, _, sigma, _, _) in zip(table.timesteps.tolist(), table.rows.tolist(), strict=True):
        slope, shift = float(model.slope[t]), float(model.shift[t])
        gain = c0 * (a + b * slope) + c1
        m, v = gain * m + c0 * b * shift, gain**2 * v + sigma**2
    return m, v


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "none"])
def test_gaussian_data_has_its_exact_mean_and_variance(variance):
    """The whole 1000-step chain with the ideal network, against what its distribution is known to be."""
    schedule = Schedule.linear()
    x = fastddpm.sample(
        ideal(schedule), 64, shape=(3, 32, 32), schedule=schedule, variance=variance, clip=False, seed=0, progress=False
    ).double()
    mean, var = exact_moments(schedule, variance)
    count = x.numel()
    assert abs(x.mean().item() - mean) <= 5 * math.sqrt(var / count) + 1e-5
    assert abs(x.var().item() - var) <= 5 * var * math.sqrt(2 / count) + 1e-6 * var + 1e-9
    if variance != "none":
        assert var == pytest.approx(STD**2, rel=0.02)  # the chain ends at the data's distribution
    else:
        assert var < 1e-4 * STD**2  # without fresh noise it collapses to an average


@pytest.mark.parametrize("prediction", coefficients.PREDICTIONS)
def test_prediction_types_give_the_same_chain(prediction):
    expected = fastddpm.sample(ideal(SHORT), 2, shape=SHAPE, schedule=SHORT, clip=False, seed=3)
    got = fastddpm.sample(
        ideal(SHORT, prediction), 2, shape=SHAPE, schedule=SHORT, prediction=prediction, clip=False, seed=3
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


CHAINS = [
    {},
    {"variance": "fixed_small", "steps": 7},
    {"sampler": "ddim", "steps": 9, "eta": 0.5},
    {"sampler": "dpm++2m", "steps": 6, "clip": False},
]


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("kind", ["function", "unet"])
def test_sample_computes_what_sample_ref_does(kind, chain):
    """The fast loop, in batches, through the engine and by the kernels, against the dozen lines of algorithm 2."""
    model, shape = (ideal(SHORT), SHAPE) if kind == "function" else (small_unet(), (1, 8, 8))
    options = {"schedule": SHORT, "prediction": "epsilon", "clip": True, **chain}
    arguments = ChainArguments(**options)
    plan = make_plan(resolve_for(model, arguments), arguments)
    seed, first = (1 << 63) + 5, (1 << 40) + 3
    with torch.no_grad():
        clip = 1.0 if options["clip"] else None
        expected = loop.sample_ref(model, plan.table, (5, *shape), seed=seed, first=first, clip=clip)
    got = fastddpm.sample(model, 5, shape=shape, seed=seed, first=first, batch_size=2, **options)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_picture_in_x_T_is_said_once():
    """By whatever begins with noise or is trained for it, to the caller, once for each model and schedule, if it is much."""
    short, x0 = Schedule.linear(10, 1e-4, 0.02), torch.zeros(1, *SHAPE)
    calls = [
        lambda model, s: fastddpm.sample(model, 1, shape=SHAPE, seed=0, schedule=s, prediction="epsilon"),
        lambda model, s: fastddpm.progressive(model, 1, shape=SHAPE, seed=0, schedule=s, prediction="epsilon"),
        lambda model, s: fastddpm.training_loss(model, x0, schedule=s, prediction="epsilon"),
    ]
    for call in calls:
        model = lambda x, t: 0 * x  # noqa: E731
        with pytest.warns(
            UserWarning, match="schedule: .*T=10.* ends at alphas_cumprod 0.9, so that x_T keeps 95%"
        ) as caught:
            call(model, short), call(model, Schedule(short.betas))
        assert len(caught) == 1 and caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for again in calls:
                again(model, short)
            scaled = Schedule(
                torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            )  # Stable Diffusion's
            for usual in (Schedule.cosine(10), Schedule.linear(10, 0.01, 0.999), scaled):
                call(model, usual)
        with pytest.warns(UserWarning, match="ends at alphas_cumprod 0.36"):
            call(model, Schedule.linear(100, 1e-4, 0.02))


@pytest.mark.filterwarnings("ignore:fastddpm. Schedule.linear")  # tests/test_schedule.py looks for it
@pytest.mark.parametrize("T", [12, 120])
def test_linear_schedules_of_any_length_draw_the_data(T):
    """With the ideal network; with the paper's betas in 10 steps the mean was 0.1 and the spread 0.8."""
    schedule = Schedule.linear(T)
    x = fastddpm.sample(
        ideal(schedule, "sample"), 16, shape=(3, 32, 32), schedule=schedule, prediction="sample", clip=False, seed=0,
        variance="fixed_large",
    )  # fmt: skip
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, abs=0.1)


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("clip", [True, False, 0.4])
def test_equals_the_loop_written_out(variance, clip):
    """Algorithm 2 in float64 with the seed's noise."""
    model, s, n = ideal(SHORT, std=2.0), SHORT, 3
    x = ops.philox_normal((n, *SHAPE), seed=9, t=0, stream=Stream.X_T, first=4).double()
    for t in reversed(range(len(s))):
        eps = float(model.slope[t]) * x + float(model.shift[t])
        bar = s.alphas_cumprod[t]
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        if clip is not False:
            x0 = x0.clamp(-1.0 * clip, 1.0 * clip)
        mean = s.posterior_mean_coef1[t] * x0 + s.posterior_mean_coef2[t] * x
        sigma = (s.betas if variance == "fixed_large" else s.posterior_variance)[t].sqrt()
        z = ops.philox_normal((n, *SHAPE), seed=9, t=t, stream=Stream.REVERSE, first=4).double()
        x = mean + (sigma * z if t > 0 else 0)
    got = fastddpm.sample(model, n, shape=SHAPE, schedule=s, variance=variance, clip=clip, seed=9, first=4)
    assert (got - x).abs().max() <= 2e-5


def test_bits_do_not_depend_on_the_batch(with_threads):
    def draw(n, **options):
        return fastddpm.sample(ideal(SHORT), n, shape=SHAPE, schedule=SHORT, seed=1, **options)

    whole = draw(7)
    for batch_size in (1, 3, 7, 100):
        assert torch.equal(draw(7, batch_size=batch_size), whole)
    assert torch.equal(draw(3, first=4), whole[4:])
    assert torch.equal(draw(1, first=6, batch_size=5), whole[6:])
    for threads in (1, 3):
        assert torch.equal(with_threads(threads, lambda: draw(7)), whole)


def test_seeds():
    def draw(seed):
        return fastddpm.sample(ideal(SHORT), 1, shape=SHAPE, schedule=SHORT, seed=seed)

    assert torch.equal(draw(2**64 - 1), draw(2**64 - 1))
    assert not torch.equal(draw(0), draw(2**63))
    before = torch.get_rng_state()
    draw(5)
    assert torch.equal(torch.get_rng_state(), before)  # an int touches no global state
    torch.manual_seed(1)
    x, y = draw(None), draw(None)
    torch.manual_seed(1)
    assert torch.equal(draw(None), x) and not torch.equal(x, y)
    assert torch.equal(draw(torch.Generator().manual_seed(4)), draw(torch.Generator().manual_seed(4)))


def small_unet(**options):
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        attention_resolutions=(4,),
        norm_groups=4,
        **options,
    )
    model = UNet(config, schedule=SHORT).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_unet_chain_equals_the_plain_callable():
    """The engine's copy (channels_last, timestep part out of the loop) draws what model(x, t) in a plain loop draws."""
    model = small_unet().eval()
    got = fastddpm.sample(model, 3, seed=0, batch_size=2)
    plain = fastddpm.sample(lambda x, t: model(x, t), 3, shape=(1, 8, 8), schedule=SHORT, seed=0)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)
    with backend.use("reference"):
        torch.testing.assert_close(fastddpm.sample(model, 3, seed=0), plain, rtol=0, atol=1e-4)


def test_unet_low_precision_stays_near():
    model = small_unet().eval()
    x, y = (fastddpm.sample(model, 4, seed=0, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert y.dtype == torch.float32 and (x - y).square().mean().sqrt() <= 0.05


def test_the_callers_module_is_left_alone():
    model = small_unet(dropout=0.5).train()
    weights = {k: (v.clone(), v.stride()) for k, v in model.state_dict().items()}
    x = fastddpm.sample(model, 2, seed=0, dtype=torch.bfloat16)
    assert model.training and all(m.training for m in model.modules())
    assert torch.equal(x, fastddpm.sample(model, 2, seed=0, dtype=torch.bfloat16))  # dropout was off
    for k, v in model.state_dict().items():
        assert torch.equal(v, weights[k][0]) and v.stride() == weights[k][1] and v.dtype == torch.float32
    assert not x.is_inference() and not x.requires_grad


def test_any_module_works_and_gets_its_dtype():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.5))
            self.seen = set()

        def forward(self, x, t):
            assert not self.training and t.dtype == torch.int64 and t.shape == x.shape[:1]
            self.seen.add(x.dtype)
            return x * self.scale

    model = Half()
    fastddpm.sample(model, 1, shape=SHAPE, schedule=SHORT, seed=0)
    assert model.seen == {torch.float32} and model.training
    fastddpm.sample(model.bfloat16(), 1, shape=SHAPE, schedule=SHORT, seed=0)
    assert torch.bfloat16 in model.seen


def test_class_labels_reach_the_network():
    model = small_unet(num_classes=3)
    x = fastddpm.sample(model, 3, seed=0, class_labels=torch.tensor([0, 1, 2]), batch_size=2)
    assert torch.allclose(x[1:2], fastddpm.sample(model, 1, seed=0, first=1, class_labels=1), atol=1e-5)
    assert not torch.allclose(x[1:2], fastddpm.sample(model, 1, seed=0, first=1, class_labels=2), atol=1e-3)
    for labels, says in [(None, "missing"), (3, "expected 0..2"), (torch.zeros(2), "class_labels: got")]:
        with pytest.raises(ValueError, match=says):
            fastddpm.sample(model, 3, class_labels=labels)


def test_noise_replaces_x_T():
    noise = ops.philox_normal((3, *SHAPE), seed=8, t=0, stream=Stream.X_T)
    expected = fastddpm.sample(ideal(SHORT), 3, shape=SHAPE, schedule=SHORT, seed=8)
    got = fastddpm.sample(ideal(SHORT), 3, shape=SHAPE, schedule=SHORT, seed=8, noise=noise, batch_size=2)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="noise: got"):
        fastddpm.sample(ideal(SHORT), 2, shape=SHAPE, noise=noise)


def test_callback_sees_every_step():
    seen = []
    x = fastddpm.sample(
        ideal(SHORT), 3, shape=SHAPE, schedule=SHORT, seed=0, batch_size=2, first=10, callback=seen.append
    )
    assert [s.step for s in seen] == 2 * list(range(20)) and [s.timestep for s in seen] == 2 * list(range(19, -1, -1))
    assert list(seen[0].indices) == [10, 11] and list(seen[-1].indices) == [12]
    assert torch.equal(torch.cat((seen[19].x, seen[39].x)), x)
    assert torch.equal(seen[19].x, seen[19].x0)  # the last step returns its x0
    assert seen[0].x0.abs().max() <= 1


def test_empty():
    x = fastddpm.sample(ideal(SHORT), 0, shape=SHAPE)
    assert x.shape == (0, *SHAPE) and x.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": -1}, "n: got -1"),
        ({"n": 1.5}, "n: got 1.5"),
        ({"shape": None}, "shape: missing"),
        ({"shape": (3, 4)}, r"shape: got \(3, 4\)"),
        ({"sampler": "euler"}, "sampler: got 'euler'; expected one of ddpm"),
        ({"prediction": "noise"}, "prediction: got 'noise'; expected one of epsilon"),
        ({"variance": "big"}, "variance: got 'big'"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"seed": 1.0}, "seed: got 1.0"),
        ({"first": -1}, "first: got -1"),
        ({"first": 2**56}, "first: got"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"clip": -1.0}, "clip: got -1.0"),
        ({"dtype": torch.bfloat16}, "dtype: .* bare callable"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, "class_labels: got"),
    ],
)
def test_bad_arguments(options, says):
    arguments = {"n": 2, "shape": SHAPE, "schedule": SHORT, "seed": 0, **options}
    called = []
    model = ideal(SHORT)

    def counted(x, t):
        called.append(1)
        return model(x, t)

    with pytest.raises(ValueError, match=says):
        fastddpm.sample(counted, arguments.pop("n"), **arguments)
    assert not called  # refused before anything was drawn


def test_bad_models():
    with pytest.raises(ValueError, match="model: got int"):
        fastddpm.sample(3, 1)
    with pytest.raises(SamplingError, match=r"step 0 \(timestep 19\) its output has shape \[1, 1, 4, 5\]"):
        fastddpm.sample(lambda x, t: x[:, :1], 1, shape=SHAPE, schedule=SHORT)

    def at_step_7(x, t):
        return torch.where(t[:, None, None, None] == 12, float("nan"), x)

    with pytest.raises(SamplingError, match=r"step 7 \(timestep 12\) holds a NaN"):
        fastddpm.sample(at_step_7, 1, shape=SHAPE, schedule=SHORT)
    with backend.use("reference"), pytest.raises(SamplingError, match=r"step 7 \(timestep 12\)"):
        fastddpm.sample(at_step_7, 1, shape=SHAPE, schedule=SHORT)


# ------------------------------------------------------------------------------- steps that can be captured

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "lift_fresh",
    "record_stream",
}


class Capturing(TorchDispatchMode):
    """Refuses what a CUDA graph would: values read or given by the host, and copies to another device."""

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func._schema.name.removeprefix("aten::") not in WAITS, func
        assert kwargs.get("device") is None or func._schema.name != "aten::_to_copy", func
        return func(*args, **kwargs)


def started(chain):
    """The chain at its first step, with noise that is the same each time."""
    chain.x.copy_(ops.philox_normal(chain.x.shape, seed=0, t=0, stream=Stream.X_T))
    chain.input.copy_(chain.x)
    chain.state.copy_(torch.tensor([3, 5, 0, -1]))
    return chain


@torch.no_grad()
@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_may_know_the_step_alone(monkeypatch, dtype, classes):
    """As a graph has it: the same bits as with the step's number from the host, and nothing that waits for the device."""
    monkeypatch.setattr(convolution, "_onednn_accepts", lambda x: False)  # there is no packing on a GPU either
    monkeypatch.setattr(graphs, "usable", lambda device: True)
    monkeypatch.setattr(graphs, "capture", lambda step, counts, device: {})
    engine = EngineRunner(small_unet(num_classes=classes), torch.device("cpu"), dtype)
    chain = chain_with(
        engine, coefficients.table(SHORT), (3, 1, 8, 8), has_labels=classes is not None, has_callback=True
    )
    if classes:
        chain.labels.copy_(torch.arange(3))
    results = []
    for device_knows in (False, True):
        started(chain)
        for step in range(len(SHORT)):
            if device_knows:
                with Capturing():
                    chain.captured_step()
            else:
                chain.step(step)
        results.append([v.clone() for v in (chain.x, chain.x0, chain.input, chain.state)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][3].tolist() == [3, 5, len(SHORT), -1]


def test_a_chain_is_kept_only_where_it_is_captured():
    """Its buffers would stay allocated for as long as the model lives."""
    model = small_unet()
    fastddpm.sample(model, 1, seed=0)
    assert cache._caches[model].entry.chain is None


class ByHand:
    """Stands for graphs on a CPU: a replay calls the steps."""

    def __init__(self, monkeypatch):
        self.captures, self.replays, self.failure = [], [], None
        monkeypatch.setattr(graphs, "usable", lambda device: True)
        monkeypatch.setattr(graphs, "capture", self.capture)

    def capture(self, step, counts, device):
        step()
        if self.failure:
            raise graphs.CaptureError(self.failure)
        self.captures.append(counts)
        return {count: self.graph(step, count) for count in counts}

    def graph(self, step, count):
        class Graph:
            @staticmethod
            def replay():
                self.replays.append(count)
                for _ in range(count):
                    step()

        return Graph


@pytest.fixture
def by_hand(monkeypatch):
    return ByHand(monkeypatch)


def eager(model, n, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "usable", lambda device: False)
        return fastddpm.sample(copied(model), n, **options)


def copied(model):
    fresh = UNet(model.config, schedule=model.schedule)
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("steps", [1, 9, 10, 23, pytest.param(120, marks=pytest.mark.thorough)])
def test_chains_of_replayed_steps(by_hand, steps):
    """Of every length: as many steps as there are, in tens as far as they go."""
    model = small_unet()
    model.schedule = Schedule.linear(steps, 1e-3, 0.3)
    assert torch.equal(fastddpm.sample(model, 3, seed=0, batch_size=2), eager(model, 3, seed=0, batch_size=2))
    assert by_hand.captures == [(10, 1)]
    assert by_hand.replays == 2 * (steps // 10 * [10] + steps % 10 * [1])


@pytest.mark.thorough
def test_what_is_captured_serves_later_calls(by_hand):
    """Whatever is only in the buffers: seed, first, noise, table, labels. What is in the graphs makes new ones."""
    model = small_unet(num_classes=3)
    model.schedule = Schedule.linear(11, 1e-3, 0.3)
    noise = torch.randn(2, 1, 8, 8)
    other = Schedule.linear(11, 1e-2, 0.2)
    same = [
        {"seed": 0}, {"seed": 2**64 - 1, "first": 7}, {"noise": noise}, {"variance": "fixed_small"},
        {"schedule": other, "prediction": "sample"}, {"class_labels": 2}, {"class_labels": torch.tensor([0, 2])},
        {"sampler": "ddim"},
    ]  # fmt: skip
    for options in same:
        options = {"seed": 1, "class_labels": 1, **options}
        assert torch.equal(fastddpm.sample(model, 2, **options), eager(model, 2, **options))
    assert len(by_hand.captures) == 1
    recaptured = [
        {"clip": False}, {"schedule": Schedule.cosine(7)}, {"steps": 9, "sampler": "ddim"}, {"sampler": "dpm++2m"},
        {"dtype": torch.bfloat16}, {"batch_size": 1},
    ]  # fmt: skip
    for count, options in enumerate(recaptured, 2):
        options = {"seed": 1, "class_labels": 1, **options}
        assert torch.equal(fastddpm.sample(model, 2, **options), eager(model, 2, **options))
        assert len(by_hand.captures) == count, options
    with torch.no_grad():
        model.conv_in.bias.add_(1)
    assert torch.equal(fastddpm.sample(model, 2, **options), eager(model, 2, **options))
    assert len(by_hand.captures) == count + 1


def test_a_callback_gets_graphs_of_one_step(by_hand):
    model, seen, expected = small_unet(), [], []
    x = fastddpm.sample(model, 2, seed=0, callback=seen.append)
    assert torch.equal(x, eager(model, 2, seed=0, callback=expected.append)) and by_hand.captures == [(1,)]
    for a, b in zip(seen, expected, strict=True):
        assert (a.step, a.timestep) == (b.step, b.timestep) and torch.equal(a.x, b.x) and torch.equal(a.x0, b.x0)


def test_a_callback_may_sample_with_graphs_too(by_hand):
    """From the same network, whose buffers are in use."""
    model, inner = small_unet(), []
    expected = eager(model, 2, seed=0), eager(model, 2, seed=1)

    def sample_again(state):
        if state.step < 2:
            inner.append(fastddpm.sample(model, 2, seed=1, callback=lambda state: None))

    assert torch.equal(fastddpm.sample(model, 2, seed=0, callback=sample_again), expected[0])
    assert all(torch.equal(x, expected[1]) for x in inner)


def test_a_failed_capture_is_told_once_and_leaves_no_trace(by_hand):
    model, by_hand.failure = small_unet(), "some kernel waits"
    with pytest.warns(UserWarning, match=r"captured as a CUDA graph \(some kernel waits\). Results are the same"):
        x = fastddpm.sample(model, 2, seed=0)
    assert torch.equal(x, eager(model, 2, seed=0))
    by_hand.failure = "not again"
    assert torch.equal(fastddpm.sample(model, 2, seed=0), x) and not by_hand.replays


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_a_capture_without_memory_is_tried_again_with_the_buffers_that_there_are(by_hand, monkeypatch):
    model, chains, init = small_unet(), [], loop.Chain.__init__

    def counted(self, *arguments, **options):
        chains.append(self)
        init(self, *arguments, **options)

    monkeypatch.setattr(loop.Chain, "__init__", counted)
    capture, by_hand.failure = graphs.capture, None

    def out_of_memory(*arguments):
        raise graphs.CaptureError("CUDA out of memory") from torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs, "capture", out_of_memory)
    x = fastddpm.sample(model, 2, seed=0)
    assert len(chains) == 1 and cache._caches[model].entry.chain is None
    monkeypatch.setattr(graphs, "capture", capture)
    assert torch.equal(fastddpm.sample(model, 2, seed=0), x) and by_hand.replays


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_only_layers_of_our_own_are_captured(by_hand):
    model = small_unet()
    model.conv_in.register_forward_hook(lambda module, args, output: output)
    fastddpm.sample(model, 1, seed=0)
    assert not EngineRunner(model, torch.device("cpu"), torch.float32).capturable
    with torch.autocast("cpu", torch.bfloat16):
        fastddpm.sample(small_unet(), 1, seed=0)
    assert not by_hand.captures


def test_autocast_is_told_where_it_costs_the_graphs(by_hand):
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="as torch.autocast is on"):
        fastddpm.sample(small_unet(), 1, seed=0)


@pytest.mark.parametrize("bad", [0, 49, 50, 99, 119, None])
def test_two_segments_on_their_way(bad):
    """As on a GPU, where the host looks at a segment when the next is launched: all is seen, and counted, none the less."""
    schedule = Schedule.linear(120, 1e-3, 0.1)

    def model(x, t):
        return torch.where(t[:, None, None, None] == 119 - (-1 if bad is None else bad), float("nan"), 0.5 * x)

    net = Runner(model, torch.device("cpu"), torch.float32)
    chain = chain_with(net, coefficients.table(schedule), (2, *SHAPE))
    chain.max_in_flight = 2
    out, bar = torch.empty(1, *SHAPE), tqdm(total=120, file=io.StringIO())
    if bad is None:
        chain.run(loop.Batch(out, 0, 0, None, None), bar, None)
        assert torch.equal(out, fastddpm.sample(model, 1, shape=SHAPE, schedule=schedule, seed=0)) and bar.n == 120
    else:
        with pytest.raises(SamplingError, match=rf"at step {bad} \(timestep {119 - bad}\)"):
            chain.run(loop.Batch(out, 0, 0, None, None), bar, None)
        assert bar.n == bad // 50 * 50


def test_cudnn_is_put_back_by_the_last_chain(monkeypatch):
    """Chains on several threads begin and end in any order."""
    cudnn, gpu = torch.backends.cudnn, torch.device("cuda", 0)
    state = lambda: (cudnn.benchmark, cudnn.allow_tf32, cudnn.deterministic)  # noqa: E731
    for before in itertools.product((False, True), repeat=3):
        for name, value in zip(("benchmark", "allow_tf32", "deterministic"), before, strict=True):
            monkeypatch.setattr(cudnn, name, value)
        usual = state()
        a, b = graphs.cudnn_for(gpu), graphs.cudnn_for(gpu)
        a.__enter__(), b.__enter__()
        assert state() == (True, False, True)
        a.__exit__(None, None, None)
        assert state() == (True, False, True)
        b.__exit__(None, None, None)
        assert state() == usual
    monkeypatch.setenv("FASTDDPM_AUTOTUNE", "0")
    with graphs.cudnn_for(gpu):
        assert not cudnn.benchmark
    with graphs.cudnn_for(torch.device("cpu")):
        assert state() == usual


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one switch for TF32")
def test_cudnn_where_the_old_and_the_new_switch_are_mixed():
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        conv.fp32_precision, rnn.fp32_precision = "ieee", "tf32"
        with pytest.raises(RuntimeError, match="mix"):
            assert torch.backends.cudnn.allow_tf32
        conv.fp32_precision, rnn.fp32_precision = "tf32", "ieee"
        with graphs.cudnn_for(torch.device("cuda", 0)):
            assert conv.fp32_precision == "ieee"
        assert (conv.fp32_precision, rnn.fp32_precision) == ("tf32", "ieee")
    finally:
        conv.fp32_precision, rnn.fp32_precision = before
