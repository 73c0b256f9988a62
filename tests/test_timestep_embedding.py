import inspect
import math

import hypothesis
import numpy as np
import pytest
import torch
from conftest import misaligned, over_shapes, same_bits
from hypothesis import strategies as st

from fastddpm import ops, parity

EVERY_T = torch.arange(1000)
CONVENTIONS = [
    {},  # Ho et al.
    {"flip_sin_to_cos": True, "freq_shift": 0},  # diffusers' text-to-image networks
    {"freq_shift": 0},
    {"max_period": 300.0, "flip_sin_to_cos": True},
    {"freq_shift": 0.5},
]
DIMS = [
    38,  # half = 19: neither a whole number of vectors nor of half vectors
    4,  # two frequencies, the least that Ho's formula takes
    5,  # odd: a column of zeros
    128,
    321,
]


def in_numpy(t, dim, max_period=10000.0, flip_sin_to_cos=False, freq_shift=1):
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / (half - freq_shift))
    angles = np.asarray(t, dtype=np.float64)[:, None] * frequencies
    parts = (np.cos(angles), np.sin(angles)) if flip_sin_to_cos else (np.sin(angles), np.cos(angles))
    return torch.from_numpy(np.concatenate((*parts, np.zeros((len(t), dim % 2))), axis=1))


def diffusers_in_float64():
    """Return diffusers' get_timestep_embedding with its two float32 tensors in float64."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    source = inspect.getsource(embeddings.get_timestep_embedding)
    assert source.count("torch.float32") == 1
    assert source.count(".float()") == 1
    scope = dict(vars(embeddings))
    exec(source.replace("torch.float32", "torch.float64").replace(".float()", ".double()"), scope)
    return scope["get_timestep_embedding"]


# -------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize("convention", CONVENTIONS)
@over_shapes("dim", DIMS)
def test_float64_is_the_formula_and_diffusers(dim, convention):
    got = ops.timestep_embedding_ref(EVERY_T.double(), dim, **convention)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, in_numpy(EVERY_T, dim, **convention), rtol=0, atol=1e-12)
    names = {"freq_shift": "downscale_freq_shift"}
    peer = diffusers_in_float64()(EVERY_T, dim, **{names.get(k, k): v for k, v in convention.items()})
    torch.testing.assert_close(got, peer, rtol=0, atol=1e-12)


def test_naive_float32_exceeds_the_bound():
    truth = in_numpy(EVERY_T, 128)
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    assert parity.share(embeddings.get_timestep_embedding(EVERY_T, 128), truth, parity.EMBEDDING) > 10
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(64, dtype=torch.float64) / 63).float()
    angles = EVERY_T.float()[:, None] * frequencies  # even with the best float32 frequencies
    assert parity.share(torch.cat((angles.sin(), angles.cos()), dim=1), truth, parity.EMBEDDING) > 10


# ----------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("convention", CONVENTIONS)
@over_shapes("dim", DIMS)
def test_close_to_float64_at_every_t(device, dim, convention):
    got = ops.timestep_embedding(EVERY_T.to(device), dim, **convention)
    assert got.dtype == torch.float32
    assert got.device.type == device
    assert parity.share(got, in_numpy(EVERY_T, dim, **convention), parity.EMBEDDING) <= 1


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([10**6, -(10**6), 123_456, -1]),  # the ends of the promised range
        torch.tensor([1e6, -1e6, 999.9999, 0.1, -0.0]),
        torch.linspace(0, 1000, 777),  # continuous time
        torch.tensor([7]),
    ],
)
def test_close_to_float64_over_the_range(device, t):
    got = ops.timestep_embedding(t.to(device), 130)
    assert parity.share(got, in_numpy(t, 130), parity.EMBEDDING) <= 1


@hypothesis.given(
    t=st.lists(st.floats(-1e6, 1e6, width=32), max_size=5),
    dim=st.integers(2, 150),
    flip=st.booleans(),
    shift=st.sampled_from([0, 0.5, 1]),
    period=st.floats(1.0, 1e6),
)
def test_any_arguments(t, dim, flip, shift, period):
    hypothesis.assume(dim // 2 != shift)
    convention = {"flip_sin_to_cos": flip, "freq_shift": shift, "max_period": period}
    got = ops.timestep_embedding(torch.tensor(t), dim, **convention)
    assert parity.share(got, in_numpy(t, dim, **convention), parity.EMBEDDING) <= 1


def test_exact_values(device):
    """t = 0 gives 0 and 1, an odd dim gives a column of zeros, and an integer gives the same as that number in float32."""
    t = EVERY_T.to(device)
    got = ops.timestep_embedding(t, 75)
    assert got[0].tolist() == [0.0] * 37 + [1.0] * 37 + [0.0]
    assert not got[:, -1].any()
    assert same_bits(got, ops.timestep_embedding(t.float(), 75))


def test_flipped_is_the_same_numbers(device):
    t = EVERY_T.to(device)
    sines, cosines = ops.timestep_embedding(t, 74).chunk(2, dim=1)
    assert same_bits(ops.timestep_embedding(t, 74, flip_sin_to_cos=True), torch.cat((cosines, sines), dim=1))


def test_a_row_depends_on_its_t_alone(device):
    whole = ops.timestep_embedding(EVERY_T.to(device), 75)
    for t in (0, 1, 500, 999):
        assert same_bits(ops.timestep_embedding(torch.tensor([t], device=device), 75), whole[t : t + 1])
    order = torch.randperm(1000).to(device)
    assert same_bits(ops.timestep_embedding(order, 75), whole[order])


def test_strided_and_misaligned_t(device):
    t = EVERY_T.to(device)
    assert same_bits(ops.timestep_embedding(t[1::3], 75), ops.timestep_embedding(t[1::3].contiguous(), 75))
    assert same_bits(ops.timestep_embedding(misaligned(t), 75), ops.timestep_embedding(t, 75))


def test_threads_and_reruns_give_the_same_bits(kernels, with_threads):
    t = torch.arange(3001)
    results = [with_threads(n, lambda: ops.timestep_embedding(t, 131)) for n in (1, 2, 3, 3)]
    assert all(same_bits(result, results[0]) for result in results)


def test_empty(device):
    assert ops.timestep_embedding(torch.empty(0, dtype=torch.int64, device=device), 75).shape == (0, 75)


def test_whole_timesteps_have_no_derivative(kernels):
    with torch.autograd.forward_ad.dual_level():
        ops.timestep_embedding(torch.tensor([3]), 8)


def test_forward_derivatives_are_the_references():
    t = torch.tensor([3.0, 700.0])
    got, tangent = torch.func.jvp(lambda t: ops.timestep_embedding(t, 8), (t,), (torch.ones(2),))
    frequencies = torch.exp(-math.log(10000) * torch.arange(4) / 3)
    sines, cosines = got.chunk(2, dim=1)
    torch.testing.assert_close(tangent, torch.cat((frequencies * cosines, -frequencies * sines), dim=1))


def test_reference_function():
    assert torch.equal(ops.timestep_embedding_ref(EVERY_T, 75), in_numpy(EVERY_T, 75).float())


# ----------------------------------------------------------------------------------------- within PyTorch


@pytest.mark.parametrize("t", [torch.tensor([5, 1, 999]), torch.tensor([0.5])])
def test_opcheck(device, t):
    torch.library.opcheck(torch.ops.fastddpm.timestep_embedding.default, (t.to(device), 33, 10000.0, True, 0.0))


def test_compiles_without_a_graph_break():
    def f(t):
        return 2 * ops.timestep_embedding(t, 32)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for n in range(1, 12):
        t = torch.arange(n)
        assert torch.equal(compiled(t), f(t))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": torch.zeros(2, 2)}, r"t: got float32 \[2, 2\]; expected int64 or float32 \[N\]"),
        ({"t": torch.zeros(2, dtype=torch.int32)}, r"t: got int32 \[2\]"),
        ({"t": torch.zeros(2, dtype=torch.bfloat16)}, r"t: got bfloat16 \[2\]"),
        ({"dim": 1}, "dim: got 1 .*; expected dim >= 2"),
        ({"dim": 2}, "dim: got 2 with freq_shift 1; .* dim // 2 != freq_shift"),
        ({"dim": 3}, "dim: got 3 with freq_shift 1"),
        ({"dim": 8, "freq_shift": 4}, "dim: got 8 with freq_shift 4"),
        ({"max_period": 0.0}, "max_period: got 0.0; expected a positive number"),
        ({"max_period": math.nan}, "max_period: got nan"),
    ],
)
@pytest.mark.parametrize("function", [ops.timestep_embedding, ops.timestep_embedding_ref])
def test_bad_input(function, arguments, message):
    arguments = {"t": torch.zeros(2), "dim": 32, **arguments}
    with pytest.raises(ValueError, match=message):
        function(arguments.pop("t"), arguments.pop("dim"), **arguments)
