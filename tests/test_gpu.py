"""What only a GPU can show: graphs, streams, tensors beyond 2^31 elements, and chains that are the CPU's.

`make gpu-check` runs this file; `fastddpm.parity` and the ops' own tests hold every result against float64.
"""

import copy
import functools
import gc
import math

import pytest
import torch
from conftest import NO_GPU, chain_with, in_threads, misaligned, python, randomised, same_bits

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, backend, ops, parity
from fastddpm.diffusion import coefficients
from fastddpm.engine import cache, graphs
from fastddpm.engine import runner as engines
from fastddpm.inputs import adopt
from fastddpm.ops.philox_normal import normals_float64
from fastddpm.ops.rng import Stream, as_int64_bits
from fastddpm.sampling import loop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
KINDS = ("cuda", "triton")
EPS = 1e-6
SEED, FIRST = (1 << 63) + 5, (1 << 40) + 3


@pytest.fixture(params=KINDS)
def kind(request):
    """A backend's name, in use while the test runs."""
    reason = backend.unavailable_reason(request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    with backend.use(request.param):
        yield request.param


def randn(*shape, seed=0, dtype=torch.float32, layout="contiguous", device="cuda"):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return parity.arranged(x.to(dtype), layout).to(device)


def integers(n, below, seed=0, device="cuda"):
    return torch.randint(0, below, (n,), generator=torch.Generator().manual_seed(seed)).to(device)


def captured(call):
    """(the graph of a call, its results), without a call beforehand."""
    graph = torch.cuda.CUDAGraph()
    graphs._failed.append(graph)  # not to be destroyed
    with torch.cuda.graph(graph):
        results = call()
    graphs._failed.remove(graph)
    return graph, results


# ------------------------------------------------------------------------------------------------- every op

NORMS = {
    "on chip": ((4, 64, 16, 16), 32, torch.bfloat16, "channels_last"),
    "on chip, contiguous": ((4, 64, 16, 16), 32, torch.float16, "contiguous"),
    "few slices": ((1, 256, 32, 32), 32, torch.bfloat16, "channels_last"),  # for so many multiprocessors
    "three times a power of two": ((2, 384, 8, 8), 32, torch.float32, "channels_last"),
    "two-stage": ((1, 64, 256, 256), 32, torch.bfloat16, "channels_last"),
    "two-stage, contiguous": ((1, 32, 256, 256), 1, torch.float32, "contiguous"),
    "odd sizes": ((3, 12, 5, 7), 3, torch.float32, "channels_last"),
    "copied in and out": ((3, 12, 5, 7), 3, torch.float32, "permuted"),
}


def norm_inputs(name, seed, device="cuda"):
    """dy, x, weight, bias, add"""
    shape, _, dtype, layout = NORMS[name]
    c, given = shape[1], {"device": device}
    dy = randn(*shape, seed=seed + 1, dtype=dtype, layout=layout, **given)
    x = randn(*shape, seed=seed, dtype=dtype, layout=layout, **given)
    return (
        dy,
        x,
        randn(c, seed=seed + 2, **given),
        randn(c, seed=seed + 3, **given),
        randn(shape[0], c, seed=seed, **given),
    )


def norm(name):
    def call(dy, x, weight, bias, add):
        return [ops.group_norm_silu(x, NORMS[name][1], weight, bias, EPS, add=add)]

    return lambda seed, device="cuda": norm_inputs(name, seed, device), call


def norm_backward(name):
    def call(dy, x, weight, bias, add):
        return parity.norm_backward(dy, x, NORMS[name][1], weight, bias, EPS, add=add)

    return lambda seed, device="cuda": norm_inputs(name, seed, device), call


def noise(t, sample):
    by_tensors = ops.philox_normal((3, 3, 5, 7), seed=SEED, t=t, stream=Stream.FORWARD, sample=sample)
    by_numbers = ops.philox_normal((2, 5, 33), seed=7, t=9, stream=Stream.X_T, first=FIRST, device=t.device)
    return by_tensors, by_numbers


def step(x, o, x0_last):
    row = [1.1, -0.4, 0.7, 0.2, -0.3, 0.25, 0.4, 0, 0]
    return ops.ddpm_step(x, o, row, seed=SEED, t=321, first=FIRST, x0_last=x0_last, clip=0.8)


# name -> (inputs(seed, device) -> tensors, call(*tensors) -> tensors)
CALLS = {
    "philox_normal": (
        lambda seed, device="cuda": (integers(3, 1000, seed, device), integers(3, 1 << 56, seed, device)),
        noise,
    ),
    "timestep_embedding, int64": (
        lambda seed, device="cuda": (integers(9, 1000, seed, device),),
        lambda t: [ops.timestep_embedding(t, 75)],
    ),
    "timestep_embedding, float32": (
        lambda seed, device="cuda": (1000 * randn(9, seed=seed, device=device),),
        lambda t: [ops.timestep_embedding(t, 128, flip_sin_to_cos=True)],
    ),
    "ddpm_step": (
        lambda seed, device="cuda": (
            randn(3, 3, 9, 11, seed=seed, device=device),
            randn(3, 3, 9, 11, seed=seed + 1, dtype=torch.bfloat16, layout="channels_last", device=device),
            randn(3, 3, 9, 11, seed=seed + 2, device=device),
        ),
        step,
    ),
    **{f"group_norm_silu, {name}": norm(name) for name in NORMS},
    **{f"group_norm_silu_backward, {name}": norm_backward(name) for name in NORMS},
}


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, b.to(a.device))
        assert a.stride() == b.stride()


@pytest.mark.parametrize("name", CALLS)
def test_a_replayed_graph_gives_the_bits_of_eager(kind, name):
    """For values that it has not seen when it was captured."""
    inputs, call = CALLS[name]
    static, fresh = inputs(seed=0), inputs(seed=10)
    graph, got = captured(lambda: call(*static))
    expected = call(*fresh)
    for _ in range(2):
        for v, new in zip(static, fresh, strict=True):
            v.copy_(new)
        for v in got:
            v.fill_(math.nan)
        graph.replay()
        assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_reruns_give_the_same_bits(kind, name):
    inputs, call = CALLS[name]
    expected = call(*inputs(seed=0))
    for _ in range(5):
        assert_same(call(*inputs(seed=0)), expected)


@pytest.mark.parametrize("name", CALLS)
def test_the_current_stream_is_used(kind, name):
    """On another stream the kernel would run before its input is there."""
    inputs, call = CALLS[name]
    expected, late, fresh = call(*inputs(seed=0)), inputs(seed=10), inputs(seed=0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles: some 30 ms
        for v, new in zip(late, fresh, strict=True):
            v.copy_(new)
        got = call(*late)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
def test_another_device_than_the_current_one(kind, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    inputs, call = CALLS[name]
    expected = call(*inputs(seed=0))
    got = call(*inputs(seed=0, device="cuda:1"))
    assert all(v.device == torch.device("cuda:1") for v in got)
    assert torch.cuda.current_device() == 0
    assert_same(got, expected)


FIRST_USE = """
import torch
from fastddpm import ops

torch.manual_seed(0)
x = torch.randn(2, 64, 16, 16, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
dy, weight, bias = torch.randn_like(x), torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
mean, rstd = torch.zeros(2, 32, device="cuda"), torch.ones(2, 32, device="cuda")
image, z, t = (torch.randn(2, 3, 9, 11, device="cuda") for _ in range(3))
row = torch.tensor([1.1, -0.4, 0.7, 0.2, 0, 0.25, 0.4, 0, 0])
rows, timesteps, t = row.cuda()[None], torch.tensor([5], device="cuda"), torch.arange(9, device="cuda")
start = torch.tensor([7, 0, 0, -1], device="cuda")
state, buffer = start.clone(), image.clone()

def in_place():
    state.copy_(start), buffer.copy_(image)
    ops.ddpm_step_(buffer, z, rows, timesteps, state)
    return buffer.clone()

backward = torch.ops.fastddpm.group_norm_silu_backward
calls = {
    "philox_normal": lambda: ops.philox_normal((2, 3, 5, 7), seed=1, t=2, stream=1, device="cuda"),
    "timestep_embedding": lambda: ops.timestep_embedding(t, 32),
    "ddpm_step": lambda: ops.ddpm_step(image, z, row, seed=7, t=5)[0],
    "ddpm_step_": in_place,
    "group_norm_silu": lambda: ops.group_norm_silu(x, 32, weight, bias),
    "group_norm_silu_backward": lambda: backward(
        dy, x, weight, bias, None, None, None, mean, rstd, 32, True, KIND
    )[0],
}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = calls[OP]()
graph.replay()
torch.cuda.synchronize()
got = got.clone()
expected = calls[OP]()
assert got.isfinite().all() and torch.equal(got, expected), (got - expected).abs().max()
print("the same")
"""
FIRST_OPS = (
    "philox_normal", "timestep_embedding", "ddpm_step", "ddpm_step_", "group_norm_silu", "group_norm_silu_backward"
)  # fmt: skip


@pytest.mark.parametrize("name", FIRST_OPS)
@pytest.mark.parametrize("backend_name", KINDS)
def test_a_process_may_begin_with_a_capture(tmp_path, backend_name, name):
    """Modules load, kernels compile and the self-test runs while the stream is being captured."""
    if backend.unavailable_reason(backend_name):
        pytest.skip(f"{backend_name}: {backend.unavailable_reason(backend_name)}")
    code = f"KIND, OP = {backend_name!r}, {name!r}\n{FIRST_USE}"
    result = python(code, tmp_path, FASTDDPM_BACKEND=backend_name)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["the", "same"]


# -------------------------------------------------------------------------------------- a chain in one graph


def test_one_graph_serves_every_row_seed_and_first(kind):
    """And records the first row whose o is not finite, as the call without a graph does."""
    table = coefficients.table(Schedule.linear())
    rows, timesteps = table.rows.float().cuda(), table.timesteps.cuda()
    shape = (4, 3, 33, 31)
    outputs = [randn(*shape, seed=i, dtype=torch.bfloat16, layout="channels_last") for i in range(4)]
    outputs[2][1, 2, 7, 5], outputs[3][0, 0, 0, 0] = math.nan, math.inf

    def buffers():
        x, o = torch.empty(shape, device="cuda"), torch.empty_like(outputs[0])
        return x, o, torch.zeros(4, dtype=torch.int64, device="cuda"), torch.empty_like(o)

    def once(x, o, state, next_input):
        ops.ddpm_step_(x, o, rows, timesteps, state, next_input=next_input)

    def chain(call, x, o, state, next_input, start, count):
        x.copy_(randn(*shape, seed=99))
        state.copy_(torch.tensor(start))
        for output in outputs[:count]:
            o.copy_(output)
            call()
        return x, next_input, state

    static = buffers()
    graph, _ = captured(functools.partial(once, *static))
    for seed, first, row, count, bad in (
        (0, 0, 0, 2, -1),
        (SEED, FIRST, 499, 2, -1),
        ((1 << 64) - 1, (1 << 56) - 4, 998, 2, -1),  # to the table's end
        (11, 3, 17, 4, 19),
    ):
        start, fresh = [as_int64_bits(seed), first, row, -1], buffers()
        got = chain(graph.replay, *static, start, count)
        expected = chain(functools.partial(once, *fresh), *fresh, start, count)
        assert_same(got, expected)
        assert got[2].tolist() == [*start[:2], row + count, bad]
        torch.testing.assert_close(got[1], got[0].bfloat16(), rtol=0, atol=0, equal_nan=True, check_stride=False)


# ---------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("seed", "t", "first", "stream"),
    [
        (0, 0, 0, Stream.X_T),
        (42, 999, 7, Stream.REVERSE),
        (SEED, 17, FIRST, Stream.FORWARD),
        ((1 << 64) - 1, (1 << 20) - 1, (1 << 56) - 5, Stream.DROPOUT),
    ],
)
def test_noise_is_the_cpus(kind, seed, t, first, stream):
    """From the same words: any other ones would be far further off than 4e-6 from the formula."""
    shape, names = (5, 3, 63, 65), {"seed": seed, "t": t, "first": first, "stream": stream}
    sample = torch.arange(first, first + 5)
    truth = normals_float64(math.prod(shape[1:]), sample, torch.tensor([t]), as_int64_bits(seed), stream).reshape(shape)
    got = ops.philox_normal(shape, device="cuda", **names)
    with backend.use(None):
        of_cpu = ops.philox_normal(shape, **names)
    assert parity.share(got, truth, parity.NOISE) <= 1
    assert parity.share(of_cpu, truth, parity.NOISE) <= 1


def test_noise_of_extreme_words_is_the_cpus(kind):
    sample = torch.tensor(parity.EXTREME_SAMPLES)
    shape, names = (len(sample), 4), {"seed": 0, "t": 0, "stream": Stream.REVERSE}
    truth = normals_float64(4, sample, torch.tensor([0]), 0, Stream.REVERSE)
    assert truth.abs().max() > 5.5  # they are extreme
    got = ops.philox_normal(shape, sample=sample.cuda(), **names)
    with backend.use(None):
        of_cpu = ops.philox_normal(shape, sample=sample, **names)
    assert parity.share(got, truth, parity.NOISE) <= 1
    assert parity.share(of_cpu, truth, parity.NOISE) <= 1


def test_the_steps_noise_is_the_ops(kind):
    x = torch.zeros(3, 3, 9, 11, device="cuda")
    x_prev, _ = ops.ddpm_step(x, x, [0, 0, 0, 0, 0, 0, 1, 0, 0], seed=SEED, t=321, first=FIRST)
    z = ops.philox_normal(x.shape, seed=SEED, t=321, first=FIRST, stream=Stream.REVERSE, device="cuda")
    assert same_bits(x_prev, z)


# -------------------------------------------------------------------------------------------------- chains


@pytest.fixture(scope="module")
def digits():
    """(the bundled network, twelve of its images as a CPU draws them)."""
    model = UNet.from_pretrained("digits")
    return model, fastddpm.sample(model, 12, seed=SEED, first=FIRST, progress=False)


def drawn(digits, n=12, **options):
    return fastddpm.sample(digits[0], n, seed=SEED, device="cuda", progress=False, **{"first": FIRST, **options}).cpu()


def test_a_chain_is_the_cpus(kind, digits):
    """1000 steps, and again with other batches: float32 within what every backend promises."""
    whole = drawn(digits)
    assert (whole - digits[1]).abs().max() <= 1e-3
    assert (drawn(digits, batch_size=5) - digits[1]).abs().max() <= 1e-3
    assert (drawn(digits, n=2, first=FIRST + 3) - digits[1][3:5]).abs().max() <= 1e-3
    assert same_bits(drawn(digits), whole)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpm++2m", 0.0)])
def test_other_samplers_are_the_cpus(kind, digits, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "steps": 20, "first": FIRST, "progress": False}
    expected = fastddpm.sample(digits[0], 12, seed=SEED, **options)
    assert (drawn(digits, **options) - expected).abs().max() <= 1e-3
    encoded = [fastddpm.encode(digits[0], digits[1], steps=20, device=device).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(encoded[1], encoded[0], rtol=0, atol=2e-3)


def test_the_bound_is_the_cpus(kind, digits):
    """The same draws; only the network's rounding differs."""
    options = {"subsample": 30, "seed": SEED, "quantize": True, "progress": False}
    cpu, gpu = (fastddpm.likelihood(digits[0], digits[1].clamp(-1, 1), device=d, **options) for d in ("cpu", "cuda"))
    torch.testing.assert_close(gpu.per_image, cpu.per_image, rtol=1e-3, atol=1e-3)


def test_a_low_precision_chain_stays_near(kind, digits):
    """The middle one of the images: now and then one becomes another digit, on a CPU too."""
    of_image = (drawn(digits, dtype=torch.bfloat16) - digits[1]).square().mean((1, 2, 3)).sqrt()
    assert of_image.median() <= 0.05


# -------------------------------------------------------------------------------------------------- the engine

SMALL = UNetConfig(sample_size=16, channels=32, channel_mult=(1, 2), attention_resolutions=(8,), norm_groups=8)


def small(seed=0, steps=43, device="cuda", **options):
    """A network with a chain of four graphs of ten steps and three of one."""
    model = randomised(UNetConfig(**{**vars(SMALL), **options}), seed).to(device)
    model.schedule = Schedule.linear(steps, 1e-3, 0.3)
    return model


@pytest.fixture
def untuned(monkeypatch):
    """Each thread has its own choice of cuDNN's algorithms: bits are only the same where none is timed."""
    monkeypatch.setenv("FASTDDPM_AUTOTUNE", "0")


def draw(model, n=3, **options):
    return fastddpm.sample(model, n, seed=SEED, progress=False, **options)


def eager(model, n=3, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "usable", lambda device: False)
        return draw(copy.deepcopy(model), n, **options)


def chain_of(model):
    return cache._caches[model].entry.chain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 9, 43, 130])
def test_replayed_chains_give_the_bits_of_eager_ones(kind, untuned, steps, dtype):
    """And serve other seeds, images and tables."""
    model = small(steps=steps)
    assert same_bits(draw(model, dtype=dtype), eager(model, dtype=dtype))
    chain = chain_of(model)
    assert set(chain.graphs) == {1, 10}
    for options in (
        {"first": 9},
        {"variance": "fixed_small"},
        {"noise": randn(3, 3, 16, 16)},
        {"schedule": Schedule.linear(steps, 1e-2, 0.2)},
    ):
        assert same_bits(draw(model, dtype=dtype, **options), eager(model, dtype=dtype, **options))
        assert chain_of(model) is chain
    assert same_bits(draw(model, 5, batch_size=3, dtype=dtype), eager(model, 5, batch_size=3, dtype=dtype))
    assert chain_of(model) is chain


@pytest.mark.parametrize("autotune", ["0", "1"])
@pytest.mark.parametrize("n", [1, 16])
def test_chains_are_the_same_bit_for_bit_as_torch_is(kind, monkeypatch, n, autotune):
    """Not in torch's deterministic mode, in which all other tests run. Its first choice in float32 for doubling 256 channels of
    4x4 adds with atomics on an H200."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("FASTDDPM_AUTOTUNE", autotune)
    model = small(sample_size=16, channels=128, channel_mult=(1, 2, 2))
    expected = draw(model, n)
    for _ in range(5):
        assert same_bits(draw(model, n), expected)
    if autotune == "0":  # where algorithms are timed, other ones may be chosen for a new engine
        assert same_bits(draw(copy.deepcopy(model), n), expected)
        assert same_bits(eager(model, n), expected)


def test_replayed_chains_of_other_samplers(kind, untuned):
    """dpm++2m's graphs read the last x0."""
    model = small()
    for options in ({"sampler": "ddim", "eta": 0.5}, {"sampler": "dpm++2m", "steps": 23}, {"steps": 12}):
        assert same_bits(draw(model, 5, batch_size=3, **options), eager(model, 5, batch_size=3, **options))
        assert set(chain_of(model).graphs) == {1, 10}


def test_replayed_chains_with_classes(kind, untuned):
    model = small(num_classes=4)
    for labels in (1, torch.tensor([3, 0, 2])):
        assert same_bits(draw(model, class_labels=labels), eager(model, class_labels=labels))


GUIDED = {
    "scale_shift": True, "resample": "resnet", "num_head_channels": 16, "downsample_padding": "both", "freq_shift": 0,
    "flip_sin_to_cos": True, "norm_eps": 1e-5, "time_scale": 0.5,
}  # fmt: skip


def test_replayed_chains_of_guided_diffusion_s_network(kind, untuned):
    model = small(**GUIDED)
    for dtype in (torch.float32, torch.bfloat16):
        assert same_bits(draw(model, dtype=dtype), eager(model, dtype=dtype))
        assert set(chain_of(model).graphs) == {1, 10}
    with backend.use(None):
        expected = draw(copy.deepcopy(model).cpu())
    assert (draw(model, dtype=torch.float32).cpu() - expected).abs().max() <= 5e-3


def unet2d():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval().cuda()  # fmt: skip


def test_a_live_unet2dmodel_is_replayed(kind, untuned):
    """And is as fast as a UNet for that reason: it is one, with its parameters."""
    model = unet2d()
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=43)
    got = draw(model, schedule=scheduler)
    assert set(chain_of(adopt.as_unet(model)[0]).graphs) == {1, 10}
    expected = draw(lambda x, t: model(x, t).sample, shape=(3, 16, 16), schedule=scheduler, device="cuda")
    assert (got - expected).abs().max() <= 5e-3


def test_callbacks_of_a_replayed_chain(kind, untuned):
    model, seen, expected = small(), [], []
    x = draw(model, callback=seen.append)
    assert set(chain_of(model).graphs) == {1}
    assert same_bits(x, eager(model, callback=expected.append)) and len(seen) == 43
    for a, b in zip(seen, expected, strict=True):
        assert (a.step, a.timestep) == (b.step, b.timestep) and same_bits(a.x, b.x) and same_bits(a.x0, b.x0)


def test_weights_that_change_between_replays(kind, untuned):
    """Those that graphs read in place, and those that were converted to another layout."""
    model = small()
    previous = draw(model)
    for name in ("mid_block.resnets.0.norm1.bias", "mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.bias"):
        model.get_parameter(name).data[0] += 1  # which leaves its version as it was
        x = draw(model)
        assert same_bits(x, eager(model)) and not same_bits(x, previous)
        previous = x
    chain = chain_of(model)
    assert same_bits(draw(model), previous) and chain_of(model) is chain


def test_the_checksum_is_that_of_a_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for v in (randn(70, 33).to(dtype), randn(3, 8, 5, 7).to(dtype, memory_format=torch.channels_last)):
            assert int(cache._device_checksum(v)) == int(cache._device_checksum(v.cpu()))


def test_the_host_does_not_wait_for_a_segment(kind):
    """Neither for launches one by one nor for graphs."""
    model = small()
    engine = engines.EngineRunner(model, next(model.parameters()).device, torch.bfloat16)
    with torch.no_grad():
        chain = chain_with(engine, coefficients.table(model.schedule), (2, 3, 16, 16))
        for graphs_of_chain in (chain.graphs, {}):
            chain.graphs = graphs_of_chain
            chain.state.zero_()
            torch.cuda.set_sync_debug_mode("error")
            try:
                chain._launch(0, 23)
                chain._copy_state_async(0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert int(chain.state[2]) == 23


def test_a_bad_output_in_a_replayed_chain(kind):
    model = small(steps=130)
    draw(model)
    with torch.no_grad():
        model.conv_out.bias[0] = math.nan
    for _ in range(2):
        with pytest.raises(fastddpm.sampling.SamplingError, match=r"at step 0 \(timestep 129\)"):
            draw(model)
    with torch.no_grad():
        model.conv_out.bias[0] = 0
    assert same_bits(draw(model), draw(model)) and draw(model).isfinite().all()


def test_a_failed_capture_falls_back(kind, untuned, monkeypatch):
    """It says why, the images are the same, and what comes later can be captured again."""
    model, step = small(), ops.ddpm_step_

    def that_waits(x, o, rows, timesteps, state, **options):
        step(x, o, rows, timesteps, state, **options)
        state.tolist()

    with monkeypatch.context() as patch:
        patch.setattr(loop.ops, "ddpm_step_", that_waits)
        with pytest.warns(UserWarning, match="could not be captured as a CUDA graph"):
            x = draw(model)
        assert not chain_of(model).graphs
    assert same_bits(x, eager(model)) and same_bits(x, draw(model))
    assert torch.randn(5, device="cuda").isfinite().all()  # the generator has left the capture
    other = small(1)
    assert same_bits(draw(other), eager(other)) and chain_of(other).graphs


def on_a_stream_of_its_own(call):
    with torch.cuda.stream(torch.cuda.Stream()):
        return call()


def test_threads_with_one_model_and_with_two(kind, untuned):
    models = small(0), small(1), small(0)
    expected = [eager(model) for model in models]
    for _ in range(3):  # captures beside captures, replays beside replays
        calls = [functools.partial(draw, model) for model in (*models, *models)]
        got = in_threads(*(functools.partial(on_a_stream_of_its_own, call) for call in calls))
        for x, y in zip(got, expected + expected, strict=True):
            assert same_bits(x, y)


def test_another_stream_for_each_call(kind, untuned):
    model = small()
    expected = eager(model)
    for _ in range(4):
        x = on_a_stream_of_its_own(lambda: draw(model))
        assert same_bits(x, expected)


def test_two_devices(kind, untuned):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    models = [small(device=f"cuda:{i}") for i in (0, 1)]
    expected = eager(models[0])
    for x in in_threads(*(functools.partial(draw, model) for model in models)):
        assert same_bits(x.cpu(), expected.cpu())
    moved = draw(models[0], device="cuda:1")
    assert moved.device == torch.device("cuda:1") and same_bits(moved.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0


def test_the_graphs_go_with_their_model(kind):
    draw(small())  # what stays with the process: modules, workspaces
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = small(channels=64)
    draw(model, 16)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


def test_a_gpu_without_products_multiplies_in_float32(kind, untuned, monkeypatch):
    """As one before Ampere does: images are those of the rounded weights."""
    model = small()
    draw(model)  # Triton asks once which GPU this is, which has to be before
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(
        UserWarning, match="multiplies float16 in hardware and not bfloat16, so the network runs in float32"
    ):
        x = draw(model, dtype=torch.bfloat16)
    assert same_bits(x, eager(model, dtype=torch.bfloat16)) and not same_bits(x, draw(model, dtype=torch.float32))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_the_engine_is_the_network(kind, dtype, bound):
    """Under the settings that the user has, TF32 in cuDNN among them, which are theirs again afterwards."""
    model, device = small(steps=1000), torch.device("cuda", 0)
    cudnn = torch.backends.cudnn
    usual = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    engine = engines.EngineRunner(model, device, dtype)
    with torch.no_grad(), engine.execution_context():
        chain = chain_with(engine, coefficients.table(model.schedule), (2, 3, 16, 16))
        for step in range(0, 1000, 50):
            x = randn(2, 3, 16, 16, seed=step)
            chain.input.copy_(x)
            t = torch.full((2,), int(chain.timesteps[step]))
            with backend.use(None):
                truth = copy.deepcopy(model).cpu().double()(x.cpu().double(), t)
            error = chain.predict(step).cpu().double() - truth
            assert error.norm() <= bound * truth.norm()
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == usual


# -------------------------------------------------------------------------------------- diffusers' users


def launches(call):
    """The kernels and copies of a call, by name."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type.name == "CUDA" and not e.is_user_annotation]


@pytest.mark.parametrize("name", ["FusedDDPMScheduler", "FusedDDIMScheduler"])
def test_a_scheduler_s_step_with_a_seed_is_one_launch(kind, name):
    pytest.importorskip("diffusers")
    from fastddpm.integrations import diffusers as fused

    x, o = randn(4, 3, 32, 32, seed=1), randn(4, 3, 32, 32, seed=2)
    steps = []
    for device in ("cuda", "cpu"):
        scheduler = getattr(fused, name)(noise_seed=7)
        scheduler.set_timesteps(50, device=device)
        eta = {"eta": 1.0} if "DDIM" in name else {}
        given = o.to(device), scheduler.timesteps[3], x.to(device)
        with backend.use(kind if device == "cuda" else None):
            steps.append(scheduler.step(*given, **eta).prev_sample.cpu())
            if device == "cuda":
                found = launches(lambda given=given, scheduler=scheduler, eta=eta: scheduler.step(*given, **eta))
                assert len(found) == 1, found
    assert (steps[0] - steps[1]).abs().max() <= 1e-5


def test_fused_norms_on_a_gpu(kind):
    model = unet2d()
    x, t = randn(2, 3, 16, 16), integers(2, 1000)
    with torch.no_grad():
        expected, before = model(x, t).sample, launches(lambda: model(x, t))
        report = fastddpm.fuse_norms(model)
        got, after = model(x, t).sample, launches(lambda: model(x, t))
        assert (got - expected).abs().max() <= 1e-3 * expected.abs().max() and len(after) < len(before)
        with torch.autocast("cuda", torch.bfloat16):
            fused = model(x, t).sample
            report.undo()
            assert same_bits(
                fused, model(x, t).sample
            )  # where torch computes norms in float32, so that they are left to it


# --------------------------------------------------------------------------------------------- large tensors


def needs_memory(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"{free:.0f} GiB of GPU memory are free, {gib} are needed")


LARGE = [
    ((66000, 128, 16, 16), 32),  # on chip; more samples than a grid has in its second dimension
    ((520, 64, 256, 256), 32),  # two-stage
]


def large(shape, layout, seed):
    torch.manual_seed(seed)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format).normal_(0.5, 2)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("shape", "groups"), LARGE)
def test_more_than_2_to_the_31_elements(kind, shape, groups, layout):
    needs_memory(16)
    assert math.prod(shape) > 1 << 31
    x, weight, bias = large(shape, layout, 0), randn(shape[1], seed=1), randn(shape[1], seed=2)
    y = ops.group_norm_silu(x, groups, weight, bias, EPS)
    assert not any(part.isnan().any() for part in y.split(len(y) // 8))  # all was written
    for i in (0, len(x) // 2, len(x) - 1):
        one = x[i : i + 1].cpu()
        truth = ops.group_norm_silu_ref(one.double(), groups, weight.cpu().double(), bias.cpu().double(), EPS)
        bound = parity.norm_bound(truth, one, groups, weight.cpu(), EPS)
        assert parity.share(y[i : i + 1], truth, bound) <= 1


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("shape", "groups"), LARGE)
def test_gradients_of_more_than_2_to_the_31_elements(kind, shape, groups, layout):
    needs_memory(24)
    dy, x, weight, bias = large(shape, layout, 1), large(shape, layout, 0), randn(shape[1], seed=1), randn(shape[1])
    got = parity.norm_backward(dy, x, groups, weight, bias, EPS)
    for i in (0, len(x) // 2, len(x) - 1):
        one = dy[i : i + 1].cpu(), x[i : i + 1].cpu()
        truth, bounds = parity.norm_gradients(*one, groups, weight.cpu(), bias.cpu(), EPS)
        for v, exact, bound in zip(got, truth, bounds, strict=True):
            assert parity.share(v[i : i + 1], exact, bound) <= 1


def test_a_step_of_more_than_2_to_the_31_elements(kind):
    """The last image is what it is by itself: an element's noise and arithmetic don't depend on the batch."""
    needs_memory(24)
    n, shape = 2800, (3, 512, 512)
    x, o = torch.zeros(n, *shape, device="cuda"), torch.zeros(n, *shape, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 1 << 31
    x[-1], o[-1] = randn(*shape, seed=1), randn(*shape, seed=2)
    row = coefficients.table(Schedule.linear()).rows[500:501].float().cuda()

    def in_place(x, o, first):
        next_input = torch.empty_like(o)
        state = torch.tensor([as_int64_bits(SEED), first, 0, -1], device="cuda")
        ops.ddpm_step_(x, o, row, torch.tensor([499], device="cuda"), state, next_input=next_input)
        assert state.tolist()[2:] == [1, -1]
        return x[-1], next_input[-1]

    alone = in_place(x[-1:].clone(), o[-1:].clone(), FIRST + n - 1)
    assert_same(in_place(x, o, FIRST), alone)


def test_noise_of_more_than_2_to_the_31_elements(kind):
    needs_memory(12)
    names = {"seed": SEED, "t": 3, "stream": Stream.X_T, "device": "cuda"}
    z = ops.philox_normal((700, 3, 1024, 1024), **names)
    assert z.numel() > 1 << 31
    for i in (0, 350, 699):
        assert same_bits(z[i], ops.philox_normal((1, 3, 1024, 1024), first=i, **names)[0])


# ------------------------------------------------------------------------------------------- within PyTorch


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", parity.DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (2, 12, 7, 9)])
def test_misaligned_memory(kind, shape, dtype, layout):
    """Vectors are only as wide as the addresses allow."""
    groups, c = 4, shape[1]
    dy, x = (randn(*shape, seed=i, dtype=dtype, layout=layout) for i in range(2))
    weight, bias = randn(c, seed=2), randn(c, seed=3)
    y = ops.group_norm_silu(misaligned(x), groups, misaligned(weight), misaligned(bias), EPS)
    of_cpu = x.cpu(), groups, weight.cpu(), bias.cpu(), EPS
    truth = ops.group_norm_silu_ref(*(v.double() if isinstance(v, torch.Tensor) else v for v in of_cpu))
    assert parity.share(y, truth, parity.norm_bound(truth, x.cpu(), groups, weight.cpu(), EPS)) <= 1
    got = parity.norm_backward(misaligned(dy), misaligned(x), groups, misaligned(weight), misaligned(bias), EPS)
    for v, exact, bound in zip(got, *parity.norm_gradients(dy.cpu(), *of_cpu), strict=True):
        assert parity.share(v, exact, bound) <= 1
    image, o, last = (
        randn(3, 3, 9, 11),
        randn(3, 3, 9, 11, seed=1, dtype=dtype, layout=layout),
        randn(3, 3, 9, 11, seed=2),
    )
    assert_same(step(misaligned(image), misaligned(o), misaligned(last)), step(image, o, last))


def test_opcheck(kind):
    of = torch.ops.fastddpm
    check = torch.library.opcheck
    check(of.philox_normal.default, ((2, 3, 5), 7, 1, 3, None, 0, None, torch.device("cuda")))
    check(of.timestep_embedding.default, (integers(5, 1000), 33, 10000.0, True, 0.0))
    x, o = randn(2, 3, 4, 5), randn(2, 6, 4, 5, dtype=torch.bfloat16, layout="channels_last")
    row = torch.tensor([1.1, -0.4, 0.7, 0.2, 0, 0, 1, -4.0, -3.0], dtype=torch.float64)
    check(of.ddpm_step.default, (x, o, row, None, -5, 3, 7, None, 1.0))
    state, t = torch.tensor([7, 0, 0, -1], device="cuda"), torch.tensor([3], device="cuda")
    check(of.ddpm_step_.default, (x, o, row.float().cuda()[None], t, state), {"x0": x.clone(), "next_input": x.half()})
    dy, x, weight, bias, add = norm_inputs("odd sizes", 0)
    leaves = [v.requires_grad_() for v in (x, weight, bias, add)]
    check(of.group_norm_silu.default, (*leaves[:1], 3, *leaves[1:3], EPS, add, None, None, True))
    x, weight, bias, add = (v.detach() for v in leaves)
    _, mean, rstd = of.group_norm_silu(x, 3, weight, bias, EPS, add, None, None, True)
    check(of.group_norm_silu_backward.default, (dy, x, weight, bias, add, None, None, mean, rstd, 3, True, kind))


def test_compiles_with_inductor(kind):
    """All ops in one graph of torch.compile, and the norm's gradient."""
    _, x, weight, bias, _ = norm_inputs("odd sizes", 0)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]

    def norm_of(x, weight, bias):
        return 2 * ops.group_norm_silu(x + 1, 3, weight, bias, EPS)

    compiled = torch.compile(norm_of, fullgraph=True)
    gradients = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, norm_of)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    def f(x, t):
        z = ops.philox_normal(x.shape, seed=0, t=0, stream=0, device="cuda")
        o = ops.group_norm_silu(x + z, 3, weight, bias, add=ops.timestep_embedding(t, 12))
        return ops.ddpm_step(x, o, [1, 0.5, 0.3, 0.2, 0, 0, 0.1, 0, 0], seed=0, t=3)[0]

    with torch.no_grad():
        x, t = x.detach(), integers(3, 1000)
        torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, t), f(x, t), rtol=0, atol=1e-5)
