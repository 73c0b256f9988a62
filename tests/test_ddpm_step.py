import math

import hypothesis
import numpy as np
import pytest
import torch
from conftest import DTYPES, LAYOUTS, like_on, misaligned, on_variant, over_shapes, same_bits
from hypothesis import strategies as st

from fastddpm import Schedule, backend, errors, ops, parity
from fastddpm.diffusion import coefficients
from fastddpm.ops.ddpm_step import C1, C2, LV_HI, LV_LO, SIGMA, A, B, D
from fastddpm.ops.rng import Stream

SCHEDULE = Schedule.linear()
ROWS = coefficients.table(SCHEDULE).rows  # t = 999 first
EVERY_TERM = torch.tensor([1.1, -0.4, 0.7, 0.2, -0.3, 0.25, 0.4, 0, 0], dtype=torch.float64)  # but a learned variance
LEARNED = torch.tensor([1.1, -0.4, 0.7, 0.2, 0, 0, 1, -4.0, -3.0], dtype=torch.float64)
SEED, FIRST, T = (1 << 63) + 5, (1 << 40) + 3, 321
DRAW = {"seed": SEED, "t": T, "first": FIRST}


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype)


def learned_row(t):
    """The row of a "learned_range" network: the log-variance lies between posterior variance and beta."""
    row = ROWS[999 - t].clone()
    row[SIGMA] = float(t > 0)
    row[LV_HI], row[LV_LO] = SCHEDULE.betas[t].log(), SCHEDULE.posterior_variance[max(t, 1)].log()
    return row


def drawn(shape, device="cpu"):
    return ops.philox_normal(shape, seed=SEED, t=T, first=FIRST, stream=Stream.REVERSE, device=device)


def in_place(x, o, rows, *, timesteps=None, index=0, x0=None, next_input=None, noise=None, clip=1.0, state=None):
    """Return (x_prev, state) of ddpm_step_ on a copy of x."""
    x, rows = x.clone(), rows.reshape(-1, 9).float().to(x.device)
    timesteps = torch.full((len(rows),), T) if timesteps is None else timesteps
    state = torch.tensor([SEED - (1 << 64), FIRST, index, -1]) if state is None else state
    state = state.to(x.device)
    ops.ddpm_step_(x, o, rows, timesteps.to(x.device), state, x0=x0, next_input=next_input, noise=noise, clip=clip)
    return x, state.tolist()


def assert_close(got, x, o, row, z, x0_last=None, *, clip=1.0, is_drawn=False):
    """Assert that got = (x_prev, x0) is within the bounds of the float64 step with the same float32 row and the same z."""
    operands = (x.cpu().double(), o.cpu().double(), row.float().double())
    z, last = z.cpu().double(), None if x0_last is None else x0_last.cpu().double()
    truth = ops.ddpm_step_ref(*operands, noise=z, x0_last=last, clip=clip)
    bounds = parity.step_bound(*operands, z, last, drawn=is_drawn)
    for v, expected, bound in zip(got, truth, bounds, strict=True):
        assert parity.share(v, expected, bound) <= 1


# -------------------------------------------------------------------------------------------------- truth


def test_reference_is_the_formula():
    x, o, z, last = (randn(2, 3, 4, 5).double() for _ in range(4))
    v = randn(2, 3, 4, 5).double()
    row = EVERY_TERM.clone()
    row[LV_LO], row[LV_HI] = -4.0, -3.0
    a, b, c0, c1, c2, d, sigma, low, high = row.tolist()
    x0 = np.clip(a * x.numpy() + b * o.numpy(), -0.8, 0.8)
    f = (v.numpy() + 1) / 2
    spread = sigma * np.exp((f * high + (1 - f) * low) / 2)
    x_prev = c0 * x0 + c1 * x.numpy() + c2 * last.numpy() + d * o.numpy() + spread * z.numpy()
    got = ops.ddpm_step_ref(x, torch.cat((o, v), dim=1), row, noise=z, x0_last=last, clip=0.8)
    torch.testing.assert_close(got, (torch.from_numpy(x_prev), torch.from_numpy(x0)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
@pytest.mark.parametrize("clip", [1.0, 0.6, None])
@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_reference_is_diffusers(monkeypatch, prediction, variance, clip, t):
    """Return the result of DDPMScheduler.step for the same output and noise, with its schedule in float64."""
    scheduling_ddpm = pytest.importorskip("diffusers.schedulers.scheduling_ddpm")
    x, o, z = (randn(2, 3, 4, 5).double() for _ in range(3))
    if variance == "learned_range":
        o = torch.cat((o, randn(2, 3, 4, 5).double()), dim=1)
        row = coefficients.table(SCHEDULE, prediction=prediction).rows[999 - t].clone()
        row[SIGMA:] = learned_row(t)[SIGMA:]
    else:
        row = coefficients.table(SCHEDULE, prediction=prediction, variance=variance).rows[999 - t]

    peer = scheduling_ddpm.DDPMScheduler(
        prediction_type=prediction, variance_type=variance, clip_sample=clip is not None, clip_sample_range=clip or 1.0
    )
    peer.betas, peer.alphas, peer.alphas_cumprod = SCHEDULE.betas, SCHEDULE.alphas, SCHEDULE.alphas_cumprod
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: z)
    expected = peer.step(o, t, x, return_dict=False)
    got = ops.ddpm_step_ref(x, o, row, noise=z, clip=clip)
    torch.testing.assert_close(got, tuple(expected), rtol=0, atol=1e-10)


def test_mean_prediction_reports_x0():
    """The output is the mean itself. x0 is the value with this posterior mean."""
    x, x0, z = (randn(2, 3, 4, 5).double() for _ in range(3))
    for t in (999, 500, 1):
        row = coefficients.table(SCHEDULE, prediction="mean").rows[999 - t]
        mean = SCHEDULE.posterior_mean_coef1[t] * x0 + SCHEDULE.posterior_mean_coef2[t] * x
        got = ops.ddpm_step_ref(x, mean, row, noise=z, clip=None)
        expected = mean + SCHEDULE.betas[t].sqrt() * z, x0
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)  # 1/c0 is up to 4e4


def test_drawn_noise_is_stream_1():
    x, o = randn(3, 3, 5, 7).double(), randn(3, 3, 5, 7).double()
    z = parity.normals_float64(105, FIRST + torch.arange(3), torch.tensor([T]), SEED - (1 << 64), 1).reshape(x.shape)
    expected = ops.ddpm_step_ref(x, o, EVERY_TERM, noise=z, x0_last=x)
    assert torch.equal(ops.ddpm_step_ref(x, o, EVERY_TERM, x0_last=x, **DRAW)[0], expected[0])


# ----------------------------------------------------------------------------------------------- backends

SHAPES = [
    (2, 3, 43, 49),  # a channel is more than one tile of the kernel, and no multiple of it
    (1, 1, 1),  # a single element
    (1, 3, 32, 32),  # batch 1
    (3, 3, 5, 7),  # odd sizes
    (2, 1, 9, 9),  # one channel: both layouts at once
    (2, 37, 1, 1),  # one pixel: both layouts at once
    (2, 5, 33),  # one spatial dimension
    (2, 2, 3, 4, 5),  # three
    (1, 70, 6, 7),  # many channels
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@over_shapes("shape", SHAPES)
def test_close_to_float64(device, shape, dtype, layout):
    x, o, z, last = (randn(*shape, device=device) for _ in range(4))
    o = o.to(dtype)
    xs, zs = parity.arranged(x, layout), parity.arranged(z, layout)
    got = ops.ddpm_step(xs, o, EVERY_TERM, noise=zs, x0_last=last, clip=0.8)
    assert_close(got, x, o, EVERY_TERM, z, last, clip=0.8)
    assert got[0].stride() == got[1].stride() == xs.stride()
    got = ops.ddpm_step(xs, o, ROWS[300], **DRAW)
    assert_close(got, x, o, ROWS[300], drawn(shape, device), is_drawn=True)


@pytest.mark.parametrize("t", [999, 300, 1, 0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_learned_variance(device, dtype, t):
    """v is inside and outside [-1, 1]. The last row does not use the second half."""
    x, z = randn(2, 3, 9, 11, device=device), randn(2, 3, 9, 11, device=device)
    o = randn(2, 6, 9, 11, device=device, dtype=dtype)
    row = learned_row(t)
    assert_close(ops.ddpm_step(x, o, row, noise=z), x, o, row, z)
    assert_close(ops.ddpm_step(x, o, row, **DRAW), x, o, row, drawn(x.shape, device), is_drawn=True)


def test_learned_variance_at_its_ends(device):
    """v = 1 is log-variance lv_hi, v = -1 is lv_lo."""
    x, eps = randn(2, 3, 4, 5, device=device), randn(2, 3, 4, 5, device=device)
    z = torch.ones_like(x)
    for v, log_variance in ((1.0, LEARNED[LV_HI]), (-1.0, LEARNED[LV_LO])):
        row = LEARNED.clone()
        row[SIGMA], row[LV_LO], row[LV_HI] = (log_variance / 2).exp(), 0, 0
        expected = ops.ddpm_step(x, eps, row, noise=z)[0]
        got = ops.ddpm_step(x, torch.cat((eps, torch.full_like(x, v)), dim=1), LEARNED, noise=z)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_float16_output(device):
    x, o, z = (randn(2, 3, 4, 5, dtype=dtype, device=device) for dtype in (torch.float32, torch.float16, torch.float32))
    assert_close(ops.ddpm_step(x, o, ROWS[0], noise=z), x, o, ROWS[0], z)
    half = torch.empty_like(o)
    got, _ = in_place(x, o.float(), ROWS[0], noise=z, next_input=half)
    assert same_bits(half, got.half())


def conversions(dtype):
    """Every value of a 16-bit dtype is read exactly, and float32 is rounded to it as torch rounds."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.zeros(1, 1, len(every))
    read, _ = in_place(x, every.view(1, 1, -1), torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0, 0]), clip=None)
    torch.testing.assert_close(read.flatten(), every.float(), rtol=0, atol=0, equal_nan=True)
    # The halfway points between neighbours, the float32 values beside these, and any others, NaNs among them.
    ordered = every[every.isfinite()].double().sort().values
    halfway = ((ordered[1:] + ordered[:-1]) / 2).float()
    beyond = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 1e-45, math.inf, -math.inf, math.nan])
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    below, above = (torch.nextafter(halfway, torch.tensor(end)) for end in (-math.inf, math.inf))
    x = torch.cat((halfway, below, above, beyond, -beyond, bits)).view(1, 1, -1)
    rounded = torch.empty_like(x, dtype=dtype)
    in_place(x, torch.zeros_like(x), torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0, 0]), clip=None, next_input=rounded)
    torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512"])
def test_16_bit_values_are_read_exactly_and_rounded_to_the_nearest(variant, tmp_path):
    code = (
        "import torch, test_ddpm_step as t; t.conversions(torch.bfloat16); t.conversions(torch.float16); print('done')"
    )
    assert on_variant(variant, code, tmp_path) == "done\n"


def test_float64_is_the_reference():
    x, o, z = (randn(2, 3, 4, 5).double() for _ in range(3))
    got, expected = ops.ddpm_step(x, o, ROWS[0], noise=z), ops.ddpm_step_ref(x, o, ROWS[0], noise=z)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("make", [list, tuple, torch.Tensor.float, torch.Tensor.double])
def test_row_in_any_form(device, make):
    x, o, z = (randn(2, 3, 4, 5, device=device) for _ in range(3))
    row = make(EVERY_TERM) if isinstance(make(EVERY_TERM), torch.Tensor) else make(EVERY_TERM.tolist())
    got = ops.ddpm_step(x, o, row, noise=z, x0_last=x)
    assert_close(got, x, o, EVERY_TERM, z, x)


element = st.sampled_from([0.0, 1.0, -0.7, 0.3, 12.5])


@hypothesis.given(
    shape=st.tuples(*[st.integers(0, 6)] * 3, st.integers(0, 19)),
    row=st.lists(element, min_size=7, max_size=7),
    variances=st.sampled_from([(0.0, 0.0), (-9.0, -4.0), (-2.0, 0.0)]),
    dtype=st.sampled_from(parity.DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    clip=st.sampled_from([None, 1.0, 0.25]),
    learned=st.booleans(),
    is_drawn=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_arguments(shape, row, variances, dtype, layouts, clip, learned, is_drawn, seed):
    torch.manual_seed(seed)
    n, c, *spatial = shape
    row = torch.tensor([*row, *variances], dtype=torch.float64)
    row[SIGMA] = row[SIGMA].abs()
    x, z, last = (randn(*shape) for _ in range(3))
    o = randn(n, 2 * c if learned else c, *spatial, dtype=dtype)
    z = drawn(shape) if is_drawn else z
    noise = DRAW if is_drawn else {"noise": z}
    x, o = parity.arranged(x, layouts[0]), parity.arranged(o, layouts[1])
    got = ops.ddpm_step(x, o, row, x0_last=last, clip=clip, **noise)
    assert_close(got, x, o, row, z, last, clip=clip, is_drawn=is_drawn)
    assert got[0].stride() == x.stride()


# ----------------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("next_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [True, False])
def test_in_place_gives_the_same_bits(device, given, dtype, layout, next_layout):
    """next_input is also x_prev, rounded to the network's dtype, in the network's layout."""
    x, z, last = (parity.arranged(randn(3, 5, 9, 7, device=device), layout) for _ in range(3))
    o = parity.arranged(randn(3, 5, 9, 7, device=device, dtype=dtype), next_layout)
    draw = {"noise": z} if given else DRAW
    x_prev, x0 = ops.ddpm_step(x, o, EVERY_TERM, x0_last=last, clip=0.8, **draw)
    next_input = torch.empty_like(o)
    got, state = in_place(x, o, EVERY_TERM, x0=last, next_input=next_input, noise=z if given else None, clip=0.8)
    assert same_bits(got, x_prev)
    assert same_bits(last, x0)  # x0 held the last one and has received the new one
    assert same_bits(next_input, x_prev.to(dtype))
    assert got.stride() == x.stride()
    assert next_input.stride() == o.stride()
    assert state == [SEED - (1 << 64), FIRST, 1, -1]


def test_a_table_is_walked_row_by_row(device):
    """Each step uses its own row and timestep, and the index advances by one."""
    x, rows, timesteps = randn(2, 3, 5, 7, device=device), ROWS[[0, 500, 998, 999]], torch.tensor([999, 499, 1, 0])
    expected = x
    for index, (row, t) in enumerate(zip(rows, timesteps.tolist(), strict=True)):
        o = randn(2, 3, 5, 7, device=device)
        expected, _ = ops.ddpm_step(expected, o, row, seed=SEED, t=t, first=FIRST)
        x, state = in_place(x, o, rows, timesteps=timesteps, index=index)
        assert same_bits(x, expected)
        assert state[2:] == [index + 1, -1]


def test_nothing_outside_is_written(device):
    """No byte before or after x changes, for sizes that end at any position in a vector."""
    for pixels in range(1, 70):
        buffers = [
            torch.full((64 + 3 * pixels,), 7.0, dtype=dtype, device=device) for dtype in (torch.float32, *DTYPES)
        ]
        x, x0, next_input = (buffer[32 : 32 + 3 * pixels].view(1, 3, pixels) for buffer in buffers)
        next_input = buffers[2][32 : 32 + 3 * pixels].view(1, 3, pixels)
        state = torch.tensor([0, 0, 0, -1], device=device)
        rows = EVERY_TERM.float().reshape(1, 9).to(device)
        timesteps = torch.tensor([T], device=device)
        ops.ddpm_step_(x, torch.ones_like(x), rows, timesteps, state, x0=x0, next_input=next_input)
        for buffer in (buffers[0], buffers[1], buffers[2]):
            assert (buffer[:32] == 7).all()
            assert (buffer[32 + 3 * pixels :] == 7).all()
            assert (buffer[32 : 32 + 3 * pixels] != 7).all()


def untakeable(device, row, table=ROWS[:1], **optional):
    """The step raises on the host. On a device, whose state the host does not read, it records the row. x does not change."""
    x = randn(2, 3, 4, 5, device=device)
    kept = x.clone()
    state = torch.tensor([0, 0, row, -1], device=device)
    arguments = x, x, table.float().to(device), torch.tensor([T], device=device), state
    if device == "cpu" and backend.select(x.device) in ("cpu", "reference"):
        with pytest.raises(ValueError) as error:
            ops.ddpm_step_(*arguments, **optional)
        assert state.tolist() == [0, 0, row, -1]
    else:
        error = None
        ops.ddpm_step_(*arguments, **optional)
        assert state.tolist() == [0, 0, row + 1, row]
    assert torch.equal(x, kept)
    return error


def test_a_row_outside_the_table(device):
    error = untakeable(device, 1)
    assert error is None or "state points at row 1 of a table of 1" in str(error.value)


def test_a_row_that_wants_the_last_x0(device):
    error = untakeable(device, 0, EVERY_TERM[None], noise=torch.zeros(2, 3, 4, 5, device=device))
    assert error is None or "c2 is not 0, so x0_last is required" in str(error.value)


# ------------------------------------------------------------------------------- what is not read, and NaN


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_terms_with_a_zero_coefficient_are_not_read(device, layout):
    """NaN in them has no effect and is not recorded."""
    shape = (2, 3, 5, 7)
    x, o, z, last = (parity.arranged(randn(*shape, device=device), layout) for _ in range(4))
    v = randn(*shape, device=device)
    nan = torch.full_like(x, math.nan)

    def row(**zeros):
        changed = EVERY_TERM.clone()
        for name in zeros.get("without", ()):
            changed[name] = 0
        return changed

    def both(row, x, o, z, last):
        x_prev, x0 = ops.ddpm_step(x, o, row, noise=z, x0_last=last)
        kept = last.clone()
        got, state = in_place(x, o, row, noise=z, x0=kept)
        assert same_bits(got, x_prev)
        assert same_bits(kept, x0)
        assert state[3] == -1
        return x_prev, x0

    for without, poisoned in (
        ((A, C1), (nan, o, z, last)),
        ((B, D), (x, nan, z, last)),
        ((C2,), (x, o, z, nan)),
        ((SIGMA,), (x, o, nan, last)),
        ((LV_LO, LV_HI), (x, torch.cat((o, nan), dim=1), z, last)),
        ((SIGMA,), (x, torch.cat((o, nan), dim=1), nan, last)),
    ):
        clean = both(row(without=without), x, torch.cat((o, v), dim=1) if poisoned[1].shape[1] == 6 else o, z, last)
        got = both(row(without=without), *poisoned)
        assert same_bits(got[0], clean[0])
        assert same_bits(got[1], clean[1])
        assert not got[0].isnan().any()
    # x0 is only reported: with c0 = 0 its NaN stays out of x_prev, and with b = 0 that of o stays out of x0.
    raw = torch.tensor([math.inf, 0, 0, 0.5, 0, 1, 0, 0, 0], dtype=torch.float64)
    assert not ops.ddpm_step(torch.zeros_like(x), o, raw, clip=None)[0].isnan().any()
    raw[A] = 1
    assert not ops.ddpm_step(x, nan, raw)[1].isnan().any()


def test_last_step_needs_no_noise(device):
    """With sigma = 0 neither a seed nor noise is required, and a noise argument is not read."""
    x, o = randn(2, 3, 5, 7, device=device), randn(2, 3, 5, 7, device=device)
    expected = ops.ddpm_step(x, o, ROWS[-1])
    assert_close(expected, x, o, ROWS[-1], torch.zeros_like(x))
    got = ops.ddpm_step(x, o, ROWS[-1], noise=torch.full_like(x, math.nan))
    assert same_bits(got[0], expected[0])
    assert same_bits(expected[0], expected[1])  # on the last row, x_prev is the clipped x0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [(0, 0, 0, 0), (1, 2, 4, 6), (1, 1, 2, 3)])  # first, last (in a tail), inside
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_not_finite_is_recorded(device, value, where, dtype, layout):
    """A NaN passes through the clamp to its own element only. state[3] records the row, and keeps the first one."""
    x = parity.arranged(randn(2, 3, 5, 7, device=device), layout)
    o = randn(2, 3, 5, 7, device=device, dtype=dtype)
    clean = ops.ddpm_step(x, o, ROWS[500], **DRAW)
    o[where] = value
    got = ops.ddpm_step(x, o, ROWS[500], **DRAW)
    for bad, good in zip(got, clean, strict=True):
        assert torch.equal(bad[where].isnan(), torch.tensor(math.isnan(value), device=device))
        bad[where] = good[where]
        assert same_bits(bad, good)
    rows, timesteps = ROWS[498:503], torch.arange(501, 496, -1)
    _, state = in_place(x, o, rows, timesteps=timesteps, index=2)
    assert state[2:] == [3, 2]
    _, state = in_place(x, o, rows, timesteps=timesteps, state=torch.tensor([0, 0, 2, 1]))
    assert state[2:] == [3, 1]  # an earlier bad row stays


def test_a_bad_variance_is_recorded(device):
    x, o = randn(2, 3, 5, 7, device=device), randn(2, 6, 5, 7, device=device)
    o[1, 5, 4, 6] = math.nan
    got, state = in_place(x, o, learned_row(500))
    assert state[3] == 0
    assert got.isnan().nonzero().tolist() == [[1, 2, 4, 6]]
    assert in_place(x, o, learned_row(0))[1][3] == -1  # not read there


def test_a_nan_in_x_stays(device):
    x, o = randn(2, 3, 5, 7, device=device), randn(2, 3, 5, 7, device=device)
    x[1, 2, 4, 6] = math.nan
    x_prev, x0 = ops.ddpm_step(x, o, ROWS[500], **DRAW)
    assert x_prev.isnan().nonzero().tolist() == x0.isnan().nonzero().tolist() == [[1, 2, 4, 6]]


# ------------------------------------------------------------------------------ what a result depends on


def step(x, o, **changes):
    return ops.ddpm_step(x, o, learned_row(500) if o.shape[1] > x.shape[1] else ROWS[500], **{**DRAW, **changes})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 6])
def test_layouts_give_the_same_bits(device, channels, dtype):
    """All layouts of x and o: noise depends on an element's index, arithmetic on its value."""
    x, o = randn(3, 3, 45, 47, device=device), randn(3, channels, 45, 47, device=device, dtype=dtype)
    expected = step(x, o)
    for x_layout in LAYOUTS:
        for o_layout in LAYOUTS:
            got = step(parity.arranged(x, x_layout), parity.arranged(o, o_layout))
            assert same_bits(got[0], expected[0])
            assert same_bits(got[1], expected[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_batch_split_does_not_matter(device, layout):
    x, o = (parity.arranged(randn(7, 3, 9, 11, device=device), layout) for _ in range(2))
    whole = step(x, o)
    for at, n in ((0, 1), (1, 3), (4, 3)):
        part = step(x[at : at + n], o[at : at + n], first=FIRST + at)
        assert same_bits(part[0], whole[0][at : at + n])
        assert same_bits(part[1], whole[1][at : at + n])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_reruns_give_the_same_bits(kernels, with_threads, dtype, layout):
    x, o = parity.arranged(randn(5, 3, 97, 99), layout), randn(5, 6, 97, 99, dtype=dtype)
    results = [with_threads(n, lambda: step(x, o)[0]) for n in (1, 2, 3, 3)]
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory(device, dtype, layout):
    x, z = (parity.arranged(randn(2, 3, 9, 11, device=device), layout) for _ in range(2))
    o = parity.arranged(randn(2, 3, 9, 11, device=device, dtype=dtype), layout)
    got = step(misaligned(x), misaligned(o), noise=misaligned(z))
    assert same_bits(got[0], step(x, o, noise=z)[0])
    x0, next_input = misaligned(x), misaligned(o)
    in_place(misaligned(x), misaligned(o), ROWS[500], x0=x0, next_input=next_input, noise=misaligned(z))
    assert same_bits(x0, got[1])
    assert same_bits(next_input, got[0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_elements_place_does_not_matter(kernels, dtype):
    """Tails use the same arithmetic: the result of a shorter sample is the beginning of a longer one's."""
    x, o = randn(1, 1, 150), randn(1, 2, 150, dtype=dtype)
    whole = step(x, o)
    for pixels in range(1, 150):
        got = step(x[..., :pixels].contiguous(), o[..., :pixels].contiguous())
        assert same_bits(got[0], whole[0][..., :pixels])
        assert same_bits(got[1], whole[1][..., :pixels])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device)
    got = ops.ddpm_step(x, x, ROWS[500], **DRAW)
    assert got[0].shape == got[1].shape == shape
    assert in_place(x, x, ROWS[500])[1][2:] == [1, -1]


# ----------------------------------------------------------------------------------------- within PyTorch


@pytest.mark.parametrize("layout", ["channels_last", "permuted"])
def test_opcheck(device, layout):
    x, z = (parity.arranged(randn(2, 3, 4, 5, device=device), layout) for _ in range(2))
    o = randn(2, 6, 4, 5, device=device, dtype=torch.bfloat16)
    ddpm_step = torch.ops.fastddpm.ddpm_step.default
    torch.library.opcheck(ddpm_step, (x, o, EVERY_TERM, z, None, None, 0, x, 1.0))
    torch.library.opcheck(ddpm_step, (x, o, LEARNED, None, -5, 3, 7, None, None))


def test_opcheck_in_place(device):
    x, x0, z = (parity.arranged(randn(2, 3, 4, 5, device=device), "channels_last") for _ in range(3))
    o = randn(2, 6, 4, 5, device=device, dtype=torch.bfloat16)
    rows, timesteps = LEARNED.float().reshape(1, 9).to(device), torch.tensor([3], device=device)
    state = torch.tensor([7, 0, 0, -1], device=device)
    arguments = (x, o, rows, timesteps, state)
    ddpm_step_ = torch.ops.fastddpm.ddpm_step_.default
    torch.library.opcheck(ddpm_step_, arguments)
    torch.library.opcheck(ddpm_step_, arguments, {"x0": x0, "next_input": x.bfloat16(), "noise": z, "clip": None})


def test_compiles_without_a_graph_break():
    """torch.compile compiles once for all seeds, timesteps and values of first."""
    x, o = randn(2, 3, 4, 5), randn(2, 3, 4, 5)

    def f(x, o, seed, t, first):
        return 2 * ops.ddpm_step(x, o, [1, 0.5, 0.3, 0.2, 0, 0, 0.1, 0, 0], seed=seed, t=t, first=first)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for k in range(12):
        assert torch.equal(compiled(x, o, 77 * k, k, 3 * k), f(x, o, 77 * k, k, 3 * k))
    assert torch.equal(compiled(x, o, SEED, 3, FIRST), f(x, o, SEED, 3, FIRST))


def test_in_place_compiles_without_a_graph_break():
    def f(x, o, rows, timesteps, state, x0, next_input):
        ops.ddpm_step_(x, o, rows, timesteps, state, x0=x0, next_input=next_input)
        ops.ddpm_step_(x, next_input, rows, timesteps, state, x0=x0, next_input=next_input)
        return 2 * x

    x, o = randn(2, 3, 4, 5), randn(2, 3, 4, 5)
    first, second = (
        (x.clone(), o, ROWS.float(), SCHEDULE.betas.long(), torch.tensor([7, 0, 3, -1]), x.clone(), x.bfloat16())
        for _ in range(2)
    )
    result = torch.compile(f, backend="aot_eager", fullgraph=True)(*first)
    assert torch.equal(result, f(*second))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------- bad input

X = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.bfloat16()}, r"x: got bfloat16 \[2, 3, 4, 6\]; expected float32 \[N, C, \*spatial\]"),
        ({"x": X[0, 0]}, r"x: got float32 \[4, 6\]; expected float32 \[N, C"),
        ({"x": X[..., ::2], "o": X[..., ::2]}, r"x: shape \(2, 3, 4, 3\) with strides .* overlaps or leaves gaps"),
        ({"x": X[:, :1].expand(2, 3, 4, 6)}, "x: .* overlaps or leaves gaps; pass x.contiguous()"),
        ({"o": X[:, :, :1].expand(2, 3, 4, 6)}, "o: .* overlaps or leaves gaps; pass o.contiguous()"),
        ({"o": X.long()}, "o: got int64; expected float32, bfloat16 or float16"),
        ({"o": X.double()}, "o: got float64"),
        ({"o": X[:1]}, r"o: got shape \[1, 3, 4, 6\]; expected \[2, 3, 4, 6\], or \[2, 6, 4, 6\] with a learned"),
        ({"o": X.to("meta")}, "o: is on meta, x is on cpu"),
        ({"x": X.clone().requires_grad_()}, "x, o: require grad"),
        ({"o": X.clone().requires_grad_()}, "require grad"),
        ({"noise": X[:1]}, r"noise: got float32 \[1, 3, 4, 6\] on cpu; expected float32 \[2, 3, 4, 6\]"),
        ({"noise": X.bfloat16()}, r"noise: got bfloat16"),
        ({"noise": X.to("meta")}, "noise: got .* on meta; expected .* on cpu"),
        ({"clip": 0.0}, "clip: got 0.0; expected a positive bound or None"),
        ({"clip": math.nan}, "clip: got nan"),
    ],
)
def test_bad_input(device, arguments, message):
    arguments = {"x": X, "o": X, "noise": X, **arguments}
    arguments = {k: like_on(v, device) for k, v in arguments.items()}
    x, o = arguments.pop("x"), arguments.pop("o")
    message = message.replace("cpu", str(x.device))
    for function in (ops.ddpm_step, ops.ddpm_step_ref):
        with pytest.raises(ValueError, match=message):
            function(x, o, ROWS[500], **arguments)
    state = torch.tensor([0, 0, 0, -1], device=device)
    with pytest.raises(ValueError, match=message):
        ops.ddpm_step_(x, o, ROWS[:1].float().to(device), state[:1], state, **arguments)
    assert state.tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize("name", ["x", "o", "noise"])
def test_forward_derivatives_are_the_references(name):
    given, u = {"x": X, "o": X, "noise": X}, torch.randn_like(X)

    def derivative(op):
        return torch.func.jvp(lambda v: op(row=ROWS[500], clip=None, **given | {name: v})[0], (X,), (u,))[1]

    got, expected = derivative(ops.ddpm_step), derivative(ops.ddpm_step_ref)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected)
    with torch.autograd.forward_ad.dual_level():  # the step in place has none
        given |= {name: torch.autograd.forward_ad.make_dual(X, u)}
        with pytest.raises(ValueError, match="x, o, noise: carry tangents"):
            ops.ddpm_step_(
                **given, rows=ROWS[:1].float(), timesteps=torch.tensor([0]), state=torch.tensor([0, 0, 0, -1])
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"row": [1.0] * 8}, r"row: got shape \[8\] on cpu; expected 9 coefficients on the CPU"),
        ({"row": ROWS[:1]}, r"row: got shape \[1, 9\]"),
        ({"row": ROWS[0].to("meta")}, r"row: got shape \[9\] on meta"),
        ({}, "noise: missing"),
        ({"seed": 3}, r"t: got None; expected .* \[0, 2\^20\)"),
        ({"seed": 3, "t": 1 << 20}, "t: got 1048576"),
        ({"seed": -3, "t": 1}, r"seed: got -3; expected an int in \[0, 2\^64\)"),
        ({"seed": 3, "t": 1, "first": 1 << 56}, r"first: got 72057594037927936; expected an int in \[0, 2\^56\)"),
        ({"noise": X, "x0_last": X[:1]}, r"x0_last: got float32 \[1, 3, 4, 6\]"),
        ({"noise": X, "row": EVERY_TERM}, "x0_last: missing, and the row's coefficient c2 is not 0"),
    ],
)
@pytest.mark.parametrize("function", [ops.ddpm_step, ops.ddpm_step_ref])
def test_bad_input_of_the_function(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(X, X, **{"row": ROWS[500], **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.transpose(0, 1).contiguous().transpose(0, 1)}, "x: strides .*; expected contiguous or channels_last"),
        ({"x": X.double(), "o": X.double()}, "x: got float64; expected float32"),
        ({"x0": X[:1]}, r"x0: got float32 \[1, 3, 4, 6\]"),
        ({"x0": parity.arranged(X, "channels_last")}, "x0: strides .*; expected x's memory layout"),
        ({"next_input": X[:1]}, r"next_input: got float32 \[1, 3, 4, 6\] on cpu; expected \[2, 3, 4, 6\] in float32"),
        ({"next_input": X.double()}, "next_input: got float64"),
        ({"next_input": X.to("meta")}, "next_input: got .* on meta; expected .* on cpu"),
        ({"next_input": X[:1].expand(2, 3, 4, 6)}, "next_input: .* overlaps or leaves gaps"),
        ({"rows": ROWS[:2]}, r"rows: got float64 \[2, 9\] on cpu; expected contiguous float32 \[2, 9\] on cpu"),
        ({"rows": ROWS[:3].float()}, r"rows: got float32 \[3, 9\] on cpu; expected contiguous float32 \[2, 9\]"),
        ({"rows": ROWS[:4].float()[::2]}, r"rows: got float32 \[2, 9\] on cpu; expected contiguous"),
        ({"timesteps": torch.zeros(2)}, r"timesteps: got float32 \[2\] on cpu; expected contiguous int64 \[2\]"),
        (
            {"state": torch.zeros(3, dtype=torch.int64)},
            r"state: got int64 \[3\] on cpu; expected contiguous int64 \[4\]",
        ),
        ({"state": torch.zeros(4, dtype=torch.int64, device="meta")}, r"state: got int64 \[4\] on meta"),
    ],
)
def test_bad_input_in_place(arguments, message):
    given = {
        "x": X.clone(),
        "o": X,
        "rows": ROWS[:2].float(),
        "timesteps": torch.tensor([1, 0]),
        "state": torch.tensor([0, 0, 0, -1]),
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        ops.ddpm_step_(*[given.pop(name) for name in ("x", "o", "rows", "timesteps", "state")], **given)


def test_an_explicit_backend_that_cannot_serve(kernels):
    with pytest.raises(errors.BackendError, match="backend 'cpu' was requested, .* this tensor is float64"):
        ops.ddpm_step(X.double(), X.double(), ROWS[0], seed=0, t=0)
