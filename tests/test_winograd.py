"""Winograd's convolution against float64, on every CPU variant; where it is used; what it refuses."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import on_variant, randomised
from hypothesis import given
from hypothesis import strategies as st

from fastddpm import UNetConfig, backend, merged, winograd
from fastddpm.engine import Engine

pytestmark = pytest.mark.usefixtures("kernels")

BOUND = 2e-6  # rms error / rms of the sums; direct float32 sums come to a third of it
LAST = torch.channels_last


def problem(n=2, c=32, k=16, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator)
        for shape in [(n, c, height, width), (k, c, 3, 3), (k,), (n, k, height, width)]
    )
    return x.contiguous(memory_format=LAST), weight, bias, residual.contiguous(memory_format=LAST)


def convolve(x, weight, *rest):
    return winograd.convolve(x, lambda v: F.conv2d(v, winograd.weights(weight), groups=36), *rest)


def error(x, weight, bias, residual=None):
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    got = convolve(x, weight, bias, residual).double() - (0 if residual is None else residual.double())
    return float((got - truth).norm() / truth.norm())


@given(
    n=st.integers(1, 3),
    c=st.sampled_from([16, 32, 48, 80]),
    k=st.sampled_from([16, 32, 144]),
    height=st.sampled_from([4, 8, 20]),
    width=st.sampled_from([4, 12, 16]),
    with_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_float64(n, c, k, height, width, with_residual, seed):
    x, weight, bias, residual = problem(n, c, k, height, width, seed)
    assert error(x, weight, bias, residual if with_residual else None) <= BOUND


def test_one_pixel_reaches_its_neighbours_and_nobody_else():
    weight = torch.randn(16, 16, 3, 3)
    for row, column in [(0, 0), (3, 4), (7, 7), (4, 3)]:
        x = torch.zeros(1, 16, 8, 8).contiguous(memory_format=LAST)
        x[:, :, row, column] = torch.randn(16)
        y = convolve(x, weight, torch.zeros(16))
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1), rtol=0, atol=2e-5)


def test_result_in_the_residual_s_place():
    x, weight, bias, residual = problem()
    expected = convolve(x, weight, bias, residual)
    assert torch.equal(convolve(x, weight, bias, residual, residual), expected) and torch.equal(residual, expected)


def test_other_layouts():
    x, weight, bias, residual = problem()
    expected = convolve(x, weight, bias, residual)
    x, residual = x.contiguous(), residual.contiguous()
    assert torch.equal(convolve(x, weight, bias, residual), expected)
    assert torch.equal(convolve(x, weight, bias, residual, residual), expected)


def test_pieces_make_no_difference(monkeypatch):
    x, weight, bias, residual = problem(n=6)
    whole = convolve(x, weight, bias, residual)
    assert winograd.patches_shape(x.shape) == (1, 36 * 32, 6 * 6, 1)
    monkeypatch.setattr(winograd, "PIECE", 36 * 32 * 6 * 4)  # four images fit, three divide six
    assert winograd.patches_shape(x.shape) == (1, 36 * 32, 3 * 6, 1)
    torch.testing.assert_close(convolve(x, weight, bias, residual), whole, rtol=0, atol=1e-4)
    monkeypatch.setattr(winograd, "PIECE", 1)
    assert winograd.patches_shape(x.shape) == (1, 36 * 32, 6, 1)


def test_where_it_is_used(monkeypatch):
    x, weight = torch.zeros(4, 32, 16, 16), torch.zeros(48, 32, 3, 3)
    one = [1, 1]
    assert winograd.suits(x, weight, one, one)
    assert not winograd.suits(x[:3], weight, one, one)  # too few tiles
    assert not winograd.suits(x.bfloat16(), weight, one, one)
    assert not winograd.suits(x, weight, [2, 2], one) and not winograd.suits(x, weight, one, [0, 0])
    assert not winograd.suits(x, torch.zeros(48, 32, 1, 1), one, one)
    for c, k in [(40, 48), (32, 40), (16, 48), (32, 16)]:
        assert not winograd.suits(torch.zeros(4, c, 16, 16), torch.zeros(k, c, 3, 3), one, one)
    assert not winograd.suits(torch.zeros(9, 32, 18, 16), weight, one, one)
    with backend.use("reference"):
        assert not winograd.suits(x, weight, one, one)
    monkeypatch.setattr(backend.native, "cpu_variant", lambda: "generic")  # which is not faster this way
    assert not winograd.suits(x, weight, one, one)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_engine_goes_this_way():
    model = randomised(UNetConfig(sample_size=32, channels=32, multipliers=(1, 2), attention=(), groups=4))
    engine = Engine(model, torch.device("cpu"), torch.float32)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    with torch.inference_mode():
        got = engine(x.contiguous(memory_format=LAST), t, None)
        with backend.use("reference"):
            expected = model.double()(x.double(), t)
    assert (got - expected).norm() <= 2e-5 * expected.norm()
    used = [m.winograd for m in engine.model.modules() if isinstance(m, merged.Convolution)]
    assert sum(used) == 10 and not all(used)


SCRIPT = """
import json
from fastddpm import backend
from test_winograd import error, problem
print(json.dumps([backend.describe()["cpu_variant"], error(*problem())]))
"""


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512"])
def test_every_cpu_variant(tmp_path, variant):
    used, largest = json.loads(on_variant(variant, SCRIPT, tmp_path))
    assert used == variant and largest <= BOUND


def test_the_bindings_check_sizes():
    b, image, products, bias = backend.buffer, torch.zeros(2048), torch.zeros(36 * 128), torch.zeros(16)
    good = [b(image), b(products), 1, 8, 16, 16, 1]
    backend.native.winograd_input(*good)
    for place, value, says in [
        (0, b(image[1:]), "image has"),
        (1, b(bias), "transformed has"),
        (3, 6, "divisible"),
        (5, 8, "divisible"),
    ]:
        with pytest.raises(ValueError, match=says):
            backend.native.winograd_input(*good[:place], value, *good[place + 1 :])
    with pytest.raises(ValueError, match="bias has"):
        backend.native.winograd_output(b(products), b(bias[1:]), None, b(image), *good[2:])
    with pytest.raises(TypeError, match="must be float32"):
        backend.native.winograd_input(b(image.bfloat16()), *good[1:])
