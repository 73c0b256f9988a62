import math
import threading

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, LAYOUTS, like_on, misaligned, over_shapes, same_bits
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fastddpm import backend, errors, ops, parity

EPS = 1e-6


def randn(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(*shape).to(device, dtype)


def composed(x, groups, weight, bias, eps=EPS, *, add=None, scale=None, shift=None, silu=True):
    """Return what a network without the fused op computes, with torch's own group_norm."""

    def broadcast(v):
        return v.reshape(*v.shape, *[1] * (x.dim() - 2))

    h = x if add is None else x + broadcast(add)
    h = torch.group_norm(h, groups, weight, bias, eps)  # as F.group_norm, but for single elements too
    h = h if scale is None else h * (1 + broadcast(scale))
    h = h if shift is None else h + broadcast(shift)
    return F.silu(h) if silu else h


def double(v):
    # Contiguous, as torch's own channels_last group_norm takes E[x^2] - E[x]^2, which is poor even in float64.
    return v.detach().cpu().double().contiguous() if isinstance(v, torch.Tensor) else v


def in_float64(function, *arguments, **optional):
    return function(*map(double, arguments), **{k: double(v) for k, v in optional.items()})


def assert_close(got, x, groups, weight, bias, eps=EPS, **optional):
    truth = in_float64(composed, x, groups, weight, bias, eps, **optional)
    cpu = {k: v.cpu() for k, v in optional.items() if k in ("add", "scale") and v is not None}
    assert parity.share(got, truth, parity.norm_bound(truth, x.cpu(), groups, weight.cpu(), eps, **cpu)) <= 1


def inputs(shape, *, dtype=torch.float32, device="cpu", layout="contiguous", per_sample=True):
    """Return (x, weight, bias) and every optional input. The per-channel inputs are float32."""
    n, c = shape[:2]
    x = parity.arranged(randn(*shape, dtype=dtype, device=device), layout)
    vector = (n, c) if per_sample else (c,)
    optional = {name: randn(*vector, device=device) for name in ("add", "scale", "shift")}
    return x, 1 + 0.5 * randn(c, device=device), randn(c, device=device), optional


# -------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("names", [(), ("add",), ("scale",), ("shift",), ("add", "scale", "shift")])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_reference_is_torchs_group_norm(groups, silu, per_sample, names):
    x, weight, bias, optional = inputs((2, 12, 5, 7), per_sample=per_sample)
    optional = {name: optional[name] for name in names}
    got = in_float64(ops.group_norm_silu_ref, x, groups, weight, bias, EPS, silu=silu, **optional)
    expected = in_float64(composed, x, groups, weight, bias, silu=silu, **optional)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_default_eps_is_torchs():
    x, weight, bias = 1e-3 * randn(2, 4, 3, 3).double(), torch.ones(4).double(), torch.zeros(4).double()
    torch.testing.assert_close(
        ops.group_norm_silu(x, 2, weight, bias, silu=False), F.group_norm(x, 2, weight, bias), rtol=0, atol=1e-12
    )


def gradients(function, dy, x, groups, weight, bias, **optional):
    """Return the gradients of every floating input, in the order x, weight, bias, optional inputs."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, weight, bias, *optional.values())]
    y = function(leaves[0], groups, *leaves[1:3], EPS, **dict(zip(optional, leaves[3:], strict=True)))
    return torch.autograd.grad(y, leaves, dy)


def test_gradients_of_the_truth_are_torchs():
    """parity's sums over pixels are the gradients of torch's composition by shift, add and scale."""
    x, weight, bias, optional = inputs((2, 12, 5, 7))
    dy = randn(2, 12, 5, 7)
    truth, _ = parity.norm_gradients(dy, x, 3, weight, bias, EPS, **optional)
    dx, _, _, d_add, d_scale, d_shift = gradients(
        composed, dy.double(), *map(double, (x, 3, weight, bias)), **{k: double(v) for k, v in optional.items()}
    )
    sum_g, sum_gx, sum_dx = truth[1:]
    expected = (dx, d_shift, d_scale, d_add)
    got = (truth[0], sum_g, weight.double() * sum_gx + bias.double() * sum_g, sum_dx)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("names", [(), ("add", "scale", "shift")])
def test_gradcheck(names, per_sample, silu):
    x, weight, bias, optional = inputs((2, 4, 2, 3), per_sample=per_sample)
    leaves = [double(v).requires_grad_() for v in (x, weight, bias, *(optional[name] for name in names))]

    def f(x, weight, bias, *optional):
        return ops.group_norm_silu(x, 2, weight, bias, EPS, silu=silu, **dict(zip(names, optional, strict=True)))

    assert torch.autograd.gradcheck(f, leaves)


# ------------------------------------------------------------------------------- what the naive forms miss


def naive_variance(x, groups):
    """Return the result normalised by E[x^2] - E[x]^2 in float32."""
    h = x.reshape(len(x), groups, -1)
    mean, square = h.mean(-1, keepdim=True), h.square().mean(-1, keepdim=True)
    return ((h - mean) / (square - mean**2 + EPS).abs().sqrt()).reshape(x.shape)


@pytest.mark.parametrize("mean", [100.0, 1e3, 1e4])
def test_naive_variance_exceeds_the_bound(mean):
    x, weight, bias = mean + randn(2, 8, 16, 16), torch.ones(8), torch.zeros(8)
    truth = in_float64(composed, x, 2, weight, bias, silu=False)
    bound = parity.norm_bound(truth, x, 2, weight, EPS)
    assert parity.share(naive_variance(x, 2), truth, bound) > 10
    assert parity.share(ops.group_norm_silu(x, 2, weight, bias, EPS, silu=False), truth, bound) <= 1


# ----------------------------------------------------------------------------------------------- backends

SHAPES = [  # shape, groups
    ((3, 12, 5, 7), 3),  # odd sizes, groups of 4 channels
    ((1, 4, 8, 8), 2),  # batch 1
    ((2, 10, 9, 9), 1),  # one group
    ((2, 37, 11, 3), 37),  # group = channel, and no whole number of vectors in either layout
    ((2, 6, 1, 1), 3),  # one pixel: both layouts at once
    ((3, 24), 4),  # no spatial dimension
    ((2, 6, 41), 2),  # one
    ((2, 4, 3, 5, 7), 2),  # three
    ((2, 1, 9, 9), 1),  # one channel: both layouts at once
    ((2, 4, 1, 1), 4),  # one element in a group: its variance is 0
    ((1, 48, 3, 3), 32 // 2),  # groups of 3 channels that straddle the vectors
    ((2, 64, 40, 40), 32),  # several blocks of statistics, and enough work for every thread
    ((1, 4, 130, 130), 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@over_shapes(("shape", "groups"), SHAPES)
def test_close_to_float64(device, shape, groups, dtype, layout):
    x, weight, bias, optional = inputs(shape, dtype=dtype, device=device, layout=layout)
    for names in ((), ("add", "scale", "shift")):
        chosen = {name: optional[name] for name in names}
        for silu in (True, False):
            got = ops.group_norm_silu(x, groups, weight, bias, EPS, silu=silu, **chosen)
            assert got.dtype == dtype
            assert got.stride() == x.stride()
            assert_close(got, x, groups, weight, bias, silu=silu, **chosen)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("of_weight", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_parameters_in_either_dtype(dtype, of_weight, per_sample):
    """Each parameter may be in x's dtype or in float32, independently."""
    x, weight, bias, optional = inputs((3, 12, 5, 7), dtype=dtype, per_sample=per_sample)
    low, high = (weight, bias) if of_weight else (bias, weight)
    low = low.to(dtype)
    weight, bias = (low, high) if of_weight else (high, low)
    optional = {"add": optional["add"].to(dtype), "scale": optional["scale"], "shift": optional["shift"].to(dtype)}
    assert_close(ops.group_norm_silu(x, 3, weight, bias, EPS, **optional), x, 3, weight, bias, **optional)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [1e3, -1e4, 1e6])
def test_large_mean(device, mean, layout):
    x, weight, bias, optional = inputs((2, 8, 17, 19), device=device, layout=layout)
    x += mean
    for chosen in ({}, {"add": optional["add"]}):
        assert_close(ops.group_norm_silu(x, 2, weight, bias, EPS, **chosen), x, 2, weight, bias, **chosen)


def test_large_add(device):
    """The time embedding may be far larger than x, and differ between the channels of a group."""
    x, weight, bias, optional = inputs((2, 8, 17, 19), device=device)
    add = 1e3 * optional["add"]
    assert_close(ops.group_norm_silu(x, 2, weight, bias, EPS, add=add), x, 2, weight, bias, add=add)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_add_that_cancels(device, layout):
    """x + add is small and exact in float32, but add's differences within a group need more digits than float32 has."""
    x, weight, bias, optional = inputs((2, 8, 17, 19), device=device)
    add = optional["add"] * torch.tensor([1.0, 1e4], device=device).repeat(4)
    x = parity.arranged(x - add[..., None, None], layout)
    assert_close(ops.group_norm_silu(x, 2, weight, bias, EPS, add=add), x, 2, weight, bias, add=add)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [(0, 0, 0), (3, 5, 7), (7, 39, 40)])  # a group's first element, inside, the last
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_hot_pixel(device, value, where, dtype, layout):
    """One element is far from all other elements. The worst case is the element that the statistics start from."""
    x, weight, bias, _ = inputs((1, 8, 40, 41), dtype=dtype, device=device, layout=layout)
    x[(0, *where)] = value
    assert_close(ops.group_norm_silu(x, 2, weight, bias, EPS), x, 2, weight, bias)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 3.3, -1e4, 1e30])
def test_a_constant_gives_the_bias_exactly(device, value, dtype, layout):
    """The result is exact even if sums of the constant are rounded, and with the smallest eps."""
    x = parity.arranged(torch.full((2, 12, 11, 13), value, dtype=dtype, device=device), layout)
    weight, bias = randn(12, device=device), randn(12, device=device, dtype=dtype)
    expected = bias[:, None, None].expand(2, 12, 11, 13)
    for eps in (EPS, 1e-30):
        assert same_bits(ops.group_norm_silu(x, 3, weight, bias, eps, silu=False), expected)
    got = ops.group_norm_silu(x, 3, weight, bias, EPS)
    assert same_bits(got, got[:1, :, :1, :1].expand_as(got))
    truth = F.silu(bias.cpu().double())
    assert parity.share(got[0, :, 0, 0], truth, 4 * parity.ulp(truth, dtype)) <= 1


def test_silu_far_out(device):
    """Outside the range of exp in float32, SiLU is 0 on one side and x itself on the other."""
    x = torch.tensor([-1.0, 1.0], device=device).repeat(2, 2, 8)
    weight = torch.tensor([1000.0, 88.5], device=device)
    got = ops.group_norm_silu(x, 1, weight, torch.zeros(2, device=device), EPS)
    expected = torch.tensor([[0.0, 1000.0], [0.0, 88.5]], device=device).repeat(2, 1, 8)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-20)
    for v in parity.norm_backward(torch.ones_like(x), x, 1, weight, torch.zeros(2, device=device), EPS):
        assert v.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nan_stays_in_its_group(device, layout):
    x, weight, bias, _ = inputs((2, 8, 5, 7), device=device, layout=layout)
    clean = ops.group_norm_silu(x, 4, weight, bias, EPS)
    x[1, 2, 4, 6] = math.nan
    got = ops.group_norm_silu(x, 4, weight, bias, EPS)
    assert got[1, 2:4].isnan().all()
    got[1, 2:4] = clean[1, 2:4]
    assert same_bits(got, clean)


@hypothesis.given(
    n=st.integers(1, 3),
    groups=st.integers(1, 6),
    width=st.integers(1, 6),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    dtype=st.sampled_from(parity.DTYPES),
    layout=st.sampled_from(LAYOUTS),
    names=st.sets(st.sampled_from(["add", "scale", "shift"])),
    per_sample=st.booleans(),
    silu=st.booleans(),
    offset=st.sampled_from([0.0, 5.0, -300.0]),
    seed=st.integers(0, 1000),
)
def test_any_arguments(n, groups, width, spatial, dtype, layout, names, per_sample, silu, offset, seed):
    torch.manual_seed(seed)
    shape = (n, groups * width, *spatial)
    x, weight, bias, optional = inputs(shape, dtype=dtype, layout=layout, per_sample=per_sample)
    x += offset
    optional = {name: optional[name] for name in sorted(names)}
    got = ops.group_norm_silu(x, groups, weight, bias, EPS, silu=silu, **optional)
    assert got.stride() == x.stride()
    assert_close(got, x, groups, weight, bias, silu=silu, **optional)
    # In groups of few elements dx is all but 0, a difference that float32 cannot tell; nor can the reference make up for
    # x + add being rounded where both are large.
    if width * math.prod(spatial) >= 16 and "add" not in names:
        dy = parity.arranged(randn(*shape, dtype=dtype), layout)
        truth, bound = parity.norm_gradients(dy, x, groups, weight, bias, EPS, silu=silu, **optional)
        got = parity.norm_backward(dy, x, groups, weight, bias, EPS, silu=silu, **optional)
        assert max(map(parity.share, got, truth, bound)) <= 1


# ----------------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [True, False])
@over_shapes(("shape", "groups"), [((3, 12, 5, 7), 3), ((2, 37, 11, 3), 37), ((2, 64, 40, 40), 32)])
def test_gradients(device, shape, groups, per_sample, dtype, layout):
    """Gradients of every input through autograd, against torch's composition in float64."""
    x, weight, bias, optional = inputs(shape, dtype=dtype, device=device, layout=layout, per_sample=per_sample)
    dy = randn(*shape, dtype=dtype, device=device)
    got = gradients(ops.group_norm_silu, dy, x, groups, weight, bias, **optional)
    expected = gradients(
        composed, double(dy), *map(double, (x, groups, weight, bias)), **{k: double(v) for k, v in optional.items()}
    )
    assert got[0].stride() == x.stride()
    for name, value, truth in zip(("x", "weight", "bias", *optional), got, expected, strict=True):
        # A gradient gathers the same few roundings as parity's sums. That of add sums dx, to 0 where group = channel.
        size = expected[0].flatten(2).abs().sum(-1) if name == "add" else truth.abs()
        bound = 4 * parity.GRADIENT * size.max()
        if value.dtype == torch.bfloat16:
            bound = bound + parity.ulp(truth, dtype)
        assert parity.share(value, truth, bound) <= 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("make", ["large mean", "hot first", "hot last", "constant"])
def test_hard_gradients(device, make, layout):
    x, weight, bias, optional = inputs((2, 8, 17, 19), device=device, layout=layout)
    if make == "large mean":
        x += 1e4
    elif make == "constant":
        x.fill_(3.3)
    else:
        x[(0, 0, 0, 0) if make == "hot first" else (-1, -1, -1, -1)] = 1e4
    dy, parameters = torch.randn_like(x), (2, weight, bias, EPS)
    got = parity.norm_backward(dy, x, *parameters, scale=optional["scale"])
    truth, bound = parity.norm_gradients(
        dy.cpu(), x.cpu(), 2, weight.cpu(), bias.cpu(), EPS, scale=optional["scale"].cpu()
    )
    assert max(map(parity.share, got, truth, bound)) <= 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_saved_mean_counts_from_the_first_element(device, layout):
    """The saved mean has the digits of x + add itself, on every backend. Relative to 0, a large mean would lose more."""
    x, weight, bias, optional = inputs((2, 8, 17, 19), device=device, layout=layout)
    x += 1e5
    add = optional["add"]
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, 2, weight, bias, EPS, add, None, None, True)
    h = (double(x) + double(add)[..., None, None]).reshape(2, 2, -1)
    torch.testing.assert_close(double(mean), (h - h[..., :1]).mean(-1), rtol=0, atol=0.02)
    torch.testing.assert_close(double(rstd), 1 / h.var(-1, correction=0).sqrt(), rtol=5e-3, atol=0)


def test_gradients_of_what_needs_none(device):
    """A frozen norm, and x without a gradient."""
    x, weight, bias, _ = inputs((2, 4, 3, 3), device=device)
    x.requires_grad_()
    ops.group_norm_silu(x, 2, weight, bias).sum().backward()  # dy is one number, expanded
    assert x.grad.isfinite().all()
    assert weight.grad is None
    weight.requires_grad_()
    ops.group_norm_silu(x.detach(), 2, weight, bias).sum().backward()
    assert weight.grad.isfinite().all()


def test_backward_keeps_the_forwards_backend(kernels):
    """Autograd runs the backward later, on its own thread, when another backend may be in use."""
    x, weight, bias, optional = inputs((2, 12, 5, 7), dtype=torch.bfloat16)
    expected = gradients(ops.group_norm_silu, x, x, 3, weight, bias, **optional)
    with backend.use("reference"):
        other = gradients(ops.group_norm_silu, x, x, 3, weight, bias, **optional)
    assert not same_bits(expected[1], other[1])  # else this test shows nothing
    leaf = weight.clone().requires_grad_()
    y = ops.group_norm_silu(x, 3, leaf, bias, EPS, **optional)
    with backend.use("reference"):
        thread = threading.Thread(target=y.backward, args=(x,))
        thread.start()
        thread.join()
    assert same_bits(leaf.grad, expected[1])


def test_no_second_derivative(device):
    x, weight, bias, _ = inputs((2, 4, 3, 3), device=device)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.group_norm_silu(x, 2, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu: has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "add"])
def test_forward_derivatives_are_the_references(name):
    """The kernels have no rule for tangents, and torch would drop them silently, also those of an outer level."""
    x, weight, bias, _ = inputs((2, 4, 3, 3))
    given = {"x": x, "weight": weight, "bias": bias, "add": torch.ones(2, 4)}
    v, one = given[name], torch.ones(())
    u, weights = torch.randn_like(v), torch.randn_like(x)

    def derivatives(op):
        def f(v):
            return op(num_groups=2, **given | {name: v})

        def inner(v):
            return torch.func.jvp(lambda s: (f(v) * weights * s).sum(), (one,), (one,))[1]

        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(v, u))).tangent
        return tangent, torch.func.jvp(f, (v,), (u,))[1], torch.func.jacfwd(f)(v), torch.func.jvp(inner, (v,), (u,))[1]

    for got, expected in zip(derivatives(ops.group_norm_silu), derivatives(ops.group_norm_silu_ref), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_forward_derivative_lies_as_x_does(layout):
    x, weight, bias, _ = inputs((2, 4, 3, 5))
    x = {"channels_last": x.to(memory_format=torch.channels_last), "permuted": x.mT.contiguous().mT}.get(layout, x)
    y, tangent = torch.func.jvp(lambda x: ops.group_norm_silu(x, 2, weight, bias), (x,), (torch.randn_like(x),))
    assert y.stride() == tangent.stride() == ops.group_norm_silu(x, 2, weight, bias).stride()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="x: .* leaves gaps"):
        ops.group_norm_silu(x.repeat(1, 1, 1, 2)[..., ::2], 2, weight, bias)


def test_a_backend_that_was_asked_for_has_no_forward_derivative(kernels):
    x, weight, bias, _ = inputs((2, 4, 3, 3))
    with pytest.raises(
        errors.BackendError, match="group_norm_silu: backend 'cpu' was requested, but only the reference"
    ):
        torch.func.jvp(lambda x: ops.group_norm_silu(x, 2, weight, bias), (x,), (x,))
    ops.group_norm_silu(x, 2, weight, bias)


# ------------------------------------------------------------------------------ what a result depends on


def everything(x, groups, weight, bias, optional, dy):
    """Forward and backward: y, dx and the sums."""
    y = ops.group_norm_silu(x, groups, weight, bias, EPS, **optional)
    return y, *parity.norm_backward(dy, x, groups, weight, bias, EPS, **optional)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spatial", [(5, 7), (37, 41)])  # on one thread, and on all
def test_the_batch_split_does_not_matter(kernels, with_threads, spatial, dtype, layout):
    shape = (5, 24, *spatial)
    x, weight, bias, optional = inputs(shape, dtype=dtype, layout=layout)
    dy = torch.randn_like(x)

    def on_all(part):
        given = x[part], 4, weight, bias, {k: v[part] for k, v in optional.items()}, dy[part]
        return with_threads(3, lambda: everything(*given))

    whole = on_all(slice(None))
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        for a, b in zip(on_all(part), whole, strict=True):
            assert same_bits(a, b[part])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3])
def test_threads_and_reruns_give_the_same_bits(kernels, with_threads, n, dtype, layout):
    x, weight, bias, optional = inputs((n, 96, 37, 41), dtype=dtype, layout=layout)
    dy = torch.randn_like(x)
    results = [with_threads(k, lambda: everything(x, 8, weight, bias, optional, dy)) for k in (1, 2, 3, 3)]
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_memory(device, dtype, layout):
    x, weight, bias, optional = inputs((2, 12, 9, 11), dtype=dtype, device=device, layout=layout)
    dy = torch.randn_like(x)
    expected = everything(x, 3, weight, bias, optional, dy)
    elsewhere = {k: misaligned(v) for k, v in optional.items()}
    moved, parameters = misaligned(x), (3, misaligned(weight), misaligned(bias))
    got = everything(moved, *parameters, elsewhere, misaligned(dy))
    if backend.select(x.device) in ("cpu", "reference"):
        assert all(map(same_bits, got, expected))
    else:  # elements come in other vectors there, and sums in another order
        assert_close(got[0], moved, *parameters, **elsewhere)
        for a, b in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=0.01 if a.dtype == torch.bfloat16 else 0, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channels_place_does_not_matter(kernels, dtype, layout):
    """Tails use the same arithmetic: channels that are their own groups may be permuted."""
    x, weight, bias, optional = inputs((2, 45, 9, 11), dtype=dtype, layout=layout)
    dy, order = torch.randn_like(x), torch.randperm(45)

    def moved(v):
        return parity.arranged(
            v.index_select(-1 if v.dim() < 4 else 1, order), layout if v.dim() == 4 else "contiguous"
        )

    expected = everything(x, 45, weight, bias, optional, dy)
    got = everything(moved(x), 45, moved(weight), moved(bias), {k: moved(v) for k, v in optional.items()}, moved(dy))
    for a, b in zip(got, expected, strict=True):
        assert same_bits(a, moved(b))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (0, 4), (2, 4, 0, 3), (2, 0, 3, 3)])
def test_empty(device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    y = ops.group_norm_silu(x, 2, weight, weight, add=torch.ones(shape[:2], device=device))
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 1, 5), (2, 1, 4, 5), (1, 6, 4, 5), (2, 6, 4, 1, 5)])
def test_strides_are_kept_where_a_size_is_1(device, shape, layout):
    """The strides of empty tensors have no meaning, but torch.compile relies on them."""
    x = parity.arranged(randn(*shape, device=device), layout).requires_grad_()
    weight = torch.ones(shape[1], device=device)
    y = ops.group_norm_silu(x, 1, weight, weight)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


# ----------------------------------------------------------------------------------------- within PyTorch


@pytest.mark.parametrize("layout", ["channels_last", "permuted"])
def test_opcheck(device, layout):
    x, weight, bias, optional = inputs((2, 4, 3, 5), device=device, layout=layout)
    for v in (x, weight, bias, *optional.values()):
        v.requires_grad_()
    arguments = (x, 2, weight, bias, EPS, *optional.values(), True)
    torch.library.opcheck(torch.ops.fastddpm.group_norm_silu.default, arguments)


@pytest.mark.parametrize("layout", ["channels_last", "permuted"])
def test_opcheck_backward(device, layout):
    x, weight, bias, optional = inputs((2, 4, 3, 5), dtype=torch.bfloat16, device=device, layout=layout)
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, 2, weight, bias, EPS, *optional.values(), True)
    kind = backend.select(x.device, x.dtype)
    arguments = (torch.randn_like(x), x, weight, bias, *optional.values(), mean, rstd, 2, True, kind)
    torch.library.opcheck(torch.ops.fastddpm.group_norm_silu_backward.default, arguments)


def test_compiles_without_a_graph_break():
    """Forward and backward, for shapes that change."""

    def f(x, weight, bias, add):
        return 2 * ops.group_norm_silu(x, 2, weight, bias, EPS, add=add)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for n in (2, 3, 4):
        x, weight, bias, optional = inputs((n, 4, n + 2, 5), layout="channels_last")
        leaves = [v.requires_grad_() for v in (x, weight, bias, optional["add"])]
        got, expected = compiled(*leaves), f(*leaves)
        assert torch.equal(got, expected)
        dy = torch.randn_like(x)
        for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_compiles_with_inductor():
    x, weight, bias, optional = inputs((2, 4, 6, 6))

    def f(x, t):
        embedding = ops.timestep_embedding(t, 4)
        noise = ops.philox_normal((2, 4, 6, 6), seed=0, t=0, stream=0)
        o = ops.group_norm_silu(x + noise, 2, weight, bias, add=embedding, scale=optional["scale"])
        return ops.ddpm_step(x, o, [1, 0.5, 0.3, 0.2, 0, 0, 0.1, 0, 0], seed=0, t=3)[0]

    t = torch.tensor([3, 4])
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, t), f(x, t), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- bad input

X, ONES = torch.zeros(2, 6, 4, 6), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.long()}, r"x: got int64 \[2, 6, 4, 6\]; expected a floating-point tensor \[N, C, \*spatial\]"),
        ({"x": ONES}, r"x: got float32 \[6\]"),
        ({"x": X[..., ::2]}, r"x: shape \(2, 6, 4, 3\) with strides .* overlaps or leaves gaps; pass x.contiguous"),
        ({"x": X[:, :, :1].expand(2, 6, 4, 6)}, "x: .* overlaps or leaves gaps"),
        ({"x": X[:, :, :, 0]}, "x: .* overlaps or leaves gaps"),
        ({"num_groups": 4}, "num_groups: 6 channels cannot be divided into 4 groups"),
        ({"num_groups": 0}, "num_groups: 6 channels cannot be divided into 0 groups"),
        ({"num_groups": -2}, "num_groups: 6 channels cannot be divided into -2 groups"),
        ({"eps": -1e-6}, "eps: got -1e-06; expected a number >= 0"),
        ({"eps": math.nan}, "eps: got nan"),
        ({"weight": ONES[:5]}, r"weight: got shape \[5\]; expected \[6\]"),
        ({"bias": torch.ones(2, 6)}, r"bias: got shape \[2, 6\]; expected \[6\]"),
        ({"weight": ONES.double()}, "weight: got float64; expected x's dtype float32 or float32"),
        ({"bias": ONES.bfloat16()}, "bias: got bfloat16; expected x's dtype float32 or float32"),
        ({"weight": ONES.to("meta")}, "weight: is on meta, x is on cpu"),
        ({"add": torch.ones(3, 6)}, r"add: got shape \[3, 6\]; expected \[6\] or \[2, 6\]"),
        ({"scale": torch.ones(2, 6, 1, 1)}, r"scale: got shape \[2, 6, 1, 1\]; expected \[6\] or \[2, 6\]"),
        ({"shift": torch.ones(1)}, r"shift: got shape \[1\]"),
        ({"add": ONES.half()}, "add: got float16"),
        ({"shift": ONES.to("meta")}, "shift: is on meta, x is on cpu"),
    ],
)
def test_bad_input(device, arguments, message):
    given = {"x": X, "num_groups": 2, "weight": ONES, "bias": ONES, **arguments}
    given = {k: like_on(v, device) for k, v in given.items()}
    with pytest.raises(ValueError, match=message.replace("cpu", str(given["x"].device))):
        ops.group_norm_silu(**given)


def test_an_explicit_backend_that_cannot_serve(kernels):
    message = "backend 'cpu' was requested, .* this tensor is float64"
    with pytest.raises(errors.BackendError, match=message):
        ops.group_norm_silu(X.double(), 2, ONES.double(), ONES.double())
