"""Winograd's convolution against float64; where it is used; what it refuses. test_parity.py has it on every CPU variant."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised, same_bits
from hypothesis import given
from hypothesis import strategies as st

from fastddpm import UNetConfig, backend, ops
from fastddpm.engine import convolution
from fastddpm.engine.layers import assign_winograd, fuse_layers
from fastddpm.ops import winograd

pytestmark = pytest.mark.usefixtures("kernels")

# rms error / rms of the sums. float32: direct sums come to as much. bfloat16: patches, weights and the result are
# rounded (2^-9 / sqrt(3) = 1.1e-3 each), the first two in a domain that makes 5/3 of it; with few pixels more than twice that.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
LAST = torch.channels_last
CPU = torch.device("cpu")
served = pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _served(request):
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if dtype == torch.bfloat16 and not backend.native.winograd_serves("bfloat16"):
        pytest.skip("this processor has no bfloat16 products")


def problem(dtype=torch.float32, n=2, c=32, k=64, height=8, width=6, seed=0):
    """x, weight, bias, residual; all but bias with values that dtype has."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator)
        for shape in [(n, c, height, width), (k, c, 3, 3), (k,), (n, k, height, width)]
    )
    return x.to(dtype, memory_format=LAST), weight, bias, residual.to(dtype, memory_format=LAST)


def convolve(x, weight, bias, residual=None, out=None, upsample=False):
    return winograd.convolve(x, winograd.pack(weight, x.dtype, upsample), bias, residual, out, upsample=upsample)


def direct(x, weight, bias, residual=None, upsample=False):
    x = F.interpolate(x, scale_factor=2.0) if upsample else x
    y = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    return y if residual is None else y + residual.double()


def error(x, weight, bias, residual=None, upsample=False):
    truth = direct(x, weight, bias, residual, upsample)
    return float((convolve(x, weight, bias, residual, upsample=upsample).double() - truth).norm() / truth.norm())


@served
@given(
    n=st.integers(1, 3),
    c=st.sampled_from([32, 64, 160]),
    k=st.sampled_from([32, 96]),
    height=st.sampled_from([2, 4, 10, 14]),  # 1 to 147 tiles: every number of rows that a product has
    width=st.sampled_from([2, 6, 14]),
    with_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_float64(dtype, n, c, k, height, width, with_residual, seed):
    x, weight, bias, residual = problem(dtype, n, c, k, height, width, seed)
    assert error(x, weight, bias, residual if with_residual else None) <= BOUNDS[dtype]


@served
@given(
    n=st.integers(1, 3),
    c=st.sampled_from([32, 96]),
    height=st.sampled_from([1, 2, 5]),
    width=st.sampled_from([1, 4, 7]),
    seed=st.integers(0, 1000),
)
def test_behind_upsampling(dtype, n, c, height, width, seed):
    x, weight, bias, _ = problem(dtype, n, c, 64, height, width, seed)
    assert error(x, weight, bias, upsample=True) <= BOUNDS[dtype]


def test_float32_is_as_exact_as_direct_sums():
    x, weight, bias, _ = problem(n=2, c=128, k=128, height=16, width=16)
    truth = direct(x, weight, bias)
    assert error(x, weight, bias) <= float((F.conv2d(x, weight, bias, padding=1) - truth).norm() / truth.norm())


@pytest.mark.parametrize("upsample", [False, True])
def test_one_pixel_reaches_its_neighbours_and_nobody_else(upsample):
    weight, bias = torch.randn(32, 32, 3, 3), torch.zeros(32)
    for row, column in [(0, 0), (3, 4), (7, 7), (4, 3)]:
        x = torch.zeros(1, 32, 8, 8).contiguous(memory_format=LAST)
        x[:, :, row, column] = torch.randn(32)
        y = convolve(x, weight, bias, upsample=upsample)
        torch.testing.assert_close(y.double(), direct(x, weight, bias, upsample=upsample), rtol=0, atol=2e-5)


@served
@pytest.mark.parametrize("upsample", [False, True])
def test_an_image_is_the_same_in_any_batch_on_any_number_of_threads(dtype, upsample, with_threads):
    """Also where there are fewer blocks of tiles than threads, which then share the outputs."""
    x, weight, bias, _ = problem(dtype, n=5, c=32, k=160, height=6, width=10)
    expected = convolve(x, weight, bias, upsample=upsample)
    assert same_bits(expected[3:4], convolve(x[3:4], weight, bias, upsample=upsample))
    for threads in (1, 2, 3, 40):
        assert same_bits(expected, with_threads(threads, lambda: convolve(x, weight, bias, upsample=upsample)))


@served
def test_result_in_the_residual_s_place(dtype):
    x, weight, bias, residual = problem(dtype)
    expected = convolve(x, weight, bias, residual)
    assert torch.equal(convolve(x, weight, bias, residual, residual), expected) and torch.equal(residual, expected)


@served
def test_other_layouts(dtype):
    x, weight, bias, residual = problem(dtype)
    expected = convolve(x, weight, bias, residual)
    x, residual = x.contiguous(), residual.contiguous()
    assert torch.equal(convolve(x, weight.to(memory_format=LAST), bias, residual), expected)
    assert torch.equal(convolve(x, weight, bias, residual, residual), expected)


@served
@given(
    n=st.integers(1, 3),
    c=st.sampled_from([32, 96]),
    height=st.sampled_from([2, 6, 14]),
    width=st.sampled_from([2, 6, 14]),
    with_add=st.sampled_from([None, "channel", "sample"]),
    threads=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 1000),
)
def test_behind_a_norm(dtype, n, c, height, width, with_add, threads, seed):
    """float32: the very bits of the norm first and the convolution then. bfloat16: one rounding less."""
    x, weight, bias, residual = problem(dtype, n, c, 64, height, width, seed)
    add = {None: None, "channel": 3 * torch.randn(c), "sample": 3 * torch.randn(n, c)}[with_add]
    norm = 16, torch.randn(c).to(dtype), torch.randn(c).to(dtype), 1e-6
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        coefficients = winograd.norm_coefficients(x, *norm, add)
        packed = winograd.pack(weight, dtype)
        got = winograd.convolve(x, packed, bias, residual, coefficients=coefficients)
    finally:
        torch.set_num_threads(before)
    if dtype == torch.float32:
        assert same_bits(got, convolve(ops.group_norm_silu(x, *norm, add=add), weight, bias, residual))
    h = ops.group_norm_silu_ref(
        x.double(), norm[0], *(v.double() for v in norm[1:3]), norm[3], add=None if add is None else add.double()
    )
    truth = direct(h, weight, bias, residual)
    assert (got.double() - truth).norm() <= BOUNDS[dtype] * truth.norm()


def test_a_norm_s_vectors_may_have_gaps():
    x, *_ = problem()
    dense = [torch.randn(32) for _ in range(3)]
    gapped = [torch.stack((v, torch.full_like(v, torch.nan)), dim=1)[:, 0] for v in dense]
    expected, got = (winograd.norm_coefficients(x, 4, weight, bias, 1e-6, add) for weight, bias, add in (dense, gapped))
    assert same_bits(got, expected)


@pytest.mark.parametrize("upsample", [False, True])
def test_float32_in_and_out_of_bfloat16_products(upsample):
    if not backend.native.winograd_serves("bfloat16"):
        pytest.skip("this processor has no bfloat16 products")
    x, weight, bias, _ = problem(torch.bfloat16)
    packed = winograd.pack(weight, torch.bfloat16, upsample)
    narrow = winograd.convolve(x, packed, bias, upsample=upsample)
    wide = winograd.convolve(x.float(), packed, bias, upsample=upsample, dtype=torch.float32)
    assert wide.dtype == torch.float32 and same_bits(wide.bfloat16(), narrow) and not torch.equal(wide, narrow.float())
    residual = torch.randn_like(wide)
    got = winograd.convolve(x, packed, bias, residual, upsample=upsample, dtype=torch.float32)
    torch.testing.assert_close(got, wide + residual, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 400])
def test_lines_longer_than_a_block(width):
    x, weight, bias, _ = problem(n=2, c=160, k=32, height=4, width=width)
    assert error(x, weight, bias) <= BOUNDS[torch.float32]
    assert error(x[..., : width // 2], weight, bias, upsample=True) <= BOUNDS[torch.float32]


def test_an_empty_batch():
    x, weight, bias, _ = problem(n=0)
    assert convolve(x, weight, bias).shape == (0, 64, 8, 6)


def test_where_it_is_used(monkeypatch):
    x, one = torch.zeros(1, 32, 4, 4), [1, 1]
    assert winograd.suits(x, x.dtype)
    odd = torch.zeros(1, 32, 3, 4)
    assert not winograd.suits(odd, odd.dtype) and winograd.suits(odd, odd.dtype, upsample=True)
    assert not winograd.suits(x.double(), torch.float64) and not winograd.suits(x.half(), torch.float16)
    assert not winograd.suits(x.bfloat16(), torch.float32)
    for v in (x, x.bfloat16()):
        assert winograd.suits(v, torch.bfloat16) == backend.native.winograd_serves("bfloat16")
    assert not backend.native.winograd_serves("float16")
    assert winograd.shaped(torch.zeros(32, 64, 3, 3), one, one)
    for weight, stride, padding in [
        (torch.zeros(32, 64, 3, 3), [2, 2], one),
        (torch.zeros(32, 64, 3, 3), one, [0, 0]),
        (torch.zeros(32, 64, 1, 1), one, one),
        (torch.zeros(48, 64, 3, 3), one, one),
        (torch.zeros(32, 48, 3, 3), one, one),
    ]:
        assert not winograd.shaped(weight, stride, padding)
    with backend.use("reference"):
        assert not winograd.suits(x, x.dtype)
    monkeypatch.setattr(backend.native, "cpu_variant", lambda: "generic")  # which is not faster this way
    assert not winograd.suits(x, x.dtype)


@pytest.fixture
def network():
    model = randomised(
        UNetConfig(sample_size=16, channels=32, channel_mult=(1, 2, 2), attention_resolutions=(), norm_groups=4)
    )
    fuse_layers(model)
    return model


def bytes_of(model):
    return sum(m.weight.numel() * 4 for m in model.modules() if isinstance(m, convolution.Convolution))


def test_weights_grow_where_they_gain_most_and_no_further(network):
    """The largest images come first: each level has its convolutions before any of a smaller one."""
    plain = bytes_of(network)
    for allowance in (0, plain, 1.1 * plain, 1.3 * plain, 2 * plain):
        layers = [m for m in network.modules() if isinstance(m, convolution.Convolution)]
        for layer in layers:
            layer.may_cache_winograd = False
        assign_winograd(network, torch.float32, allowance)
        grown = sum((16 / 9 - 1) * m.weight.numel() * 4 for m in layers if m.may_cache_winograd and not m.upsample)
        assert plain + grown <= max(allowance, plain)
        levels = [[*network.down_blocks[i].modules(), *network.up_blocks[-1 - i].modules()] for i in range(3)]
        levels[2] += network.mid_block.modules()
        able = [
            [
                m
                for m in level
                if isinstance(m, convolution.Convolution) and winograd.shaped(m.weight, m.stride, m.padding)
            ]
            for level in levels
        ]
        started = [any(m.may_cache_winograd and not m.upsample for m in level) for level in able]
        complete = [all(m.may_cache_winograd for m in level) for level in able]
        assert all(complete[i] or not started[i + 1] for i in range(2)), allowance
        assert all(complete) == (allowance == 2 * plain)


def test_the_bindings_check_sizes():
    b, f = backend.buffer, lambda size: torch.zeros(size)
    x, y, packed, bias, small = f(2 * 4 * 6 * 32), f(2 * 4 * 6 * 64), f(16 * 32 * 64), f(64), f(2 * 2 * 3 * 32)
    good = [b(x), None, b(packed), b(bias), None, b(y), False, 2, 4, 6, 32, 64, 1]
    backend.native.winograd(*good)
    for place, value, says in [
        (0, b(x[1:]), "x has"),
        (0, b(small), "x has"),
        (1, b(bias), "coefficients has"),
        (2, b(packed[1:]), "weights has"),
        (3, b(bias[1:]), "bias has"),
        (4, b(x), "residual has"),
        (5, b(x), "y has"),
        (6, True, "x has"),
        (8, 5, "even"),
        (9, 0, "even"),
        (10, 0, "divisible"),
        (10, 33, "divisible"),
        (11, 48, "divisible"),
        (12, 0, "threads"),
    ]:
        with pytest.raises(ValueError, match=says):
            backend.native.winograd(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError, match="in that dtype"):
        backend.native.winograd(*good[:2], b(packed.half()), *good[3:])
    with pytest.raises(TypeError, match="x must be float32"):
        backend.native.winograd(b(x.bfloat16()), *good[1:])
    with pytest.raises(TypeError, match="residual must be float32"):
        backend.native.winograd(*good[:4], b(y.bfloat16()), *good[5:])
    weight = f(64 * 32 * 9)
    backend.native.winograd_weights(b(weight), b(packed), False, 64, 32, 1)
    with pytest.raises(ValueError, match="packed has"):
        backend.native.winograd_weights(b(weight), b(packed), True, 64, 32, 1)
    with pytest.raises(ValueError, match="weight has"):
        backend.native.winograd_weights(b(weight[1:]), b(packed), False, 64, 32, 1)


def norm_problem():
    x, kernel, offset, residual = problem(n=2, c=32, k=64)
    vectors = torch.randn(3, 2, 32)
    weight, bias = torch.randn(2, 32)
    return x, weight, bias, *vectors, kernel, offset, residual


def test_a_norm_in_front():
    """The op that takes weights as they are, against float64; as torch wants its ops to be."""
    x, weight, bias, add, scale, shift, kernel, offset, residual = norm_problem()
    op = torch.ops.fastddpm.norm_silu_convolution
    for parts in ((add, scale, shift, offset, residual), (None,) * 5, (add, None, None, None, residual)):
        add, scale, shift, offset, residual = parts
        given = (x, 4, weight, bias, 1e-5, add, scale, shift, kernel, offset, residual)
        wide = {k: None if v is None else v.double() for k, v in {"add": add, "scale": scale, "shift": shift}.items()}
        h = ops.group_norm_silu_ref(x.double(), 4, weight.double(), bias.double(), 1e-5, **wide)
        truth = F.conv2d(h, kernel.double(), None if offset is None else offset.double(), padding=1)
        truth = truth if residual is None else truth + residual.double()
        assert float((op(*given).double() - truth).norm() / truth.norm()) <= BOUNDS[torch.float32]
        plain = (x.contiguous(), *given[1:-1], None if residual is None else residual.contiguous())
        assert same_bits(op(*plain), op(*given)) and op(*plain).is_contiguous(memory_format=LAST)
        torch.library.opcheck(op, given)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (8, torch.randn(64, 32, 3, 3, dtype=torch.float64), "kernel: got float64; expected float32"),
        (8, torch.randn(32, 64, 3, 3), r"kernel: got shape \[32, 64, 3, 3\]; expected \[32, 32, 3, 3\]"),
        (8, torch.randn(64, 32, 1, 9), r"kernel: got shape \[64, 32, 1, 9\]; expected \[64, 32, 3, 3\]"),
        (5, torch.randn(32, 2), r"add: got shape \[32, 2\]; expected \[2, 32\]"),
        (5, torch.randn(2, 32, device="meta"), "add: is on meta, x is on cpu"),
        (9, torch.randn(64).double(), "offset: got float64; expected float32"),
        (10, torch.randn(2, 64, 6, 8), r"residual: got shape \[2, 64, 6, 8\]; expected \[2, 64, 8, 6\]"),
        (2, torch.randn(32, device="meta"), "weight: is on meta, x is on cpu"),
        (8, torch.randn(64, 32, 3, 3, device="meta"), "kernel: is on meta, x is on cpu"),
        (10, torch.randn(2, 64, 8, 6, device="meta"), "residual: is on meta, x is on cpu"),
        (10, torch.randn(2, 32, 8, 6), "residual"),
        (3, torch.randn(16), "bias"),
        (1, 5, "groups"),
    ],
)
def test_a_norm_in_front_refuses(place, value, says):
    x, weight, bias, add, scale, shift, kernel, offset, residual = norm_problem()
    given = [x, 4, weight, bias, 1e-5, add, scale, shift, kernel, offset, residual]
    given[place] = value
    with pytest.raises(ValueError, match=says):
        winograd.norm_silu_convolution(*given)
