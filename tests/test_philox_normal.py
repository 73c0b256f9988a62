import math

import hypothesis
import numpy as np
import pytest
import torch
from conftest import over_shapes, same_bits
from hypothesis import strategies as st

from fastddpm import ops, parity
from fastddpm.ops.philox_normal import first_words, normals_float64, philox_words_ref
from fastddpm.ops.rng import Stream

KNOWN_WORDS = [  # Random123's known answers: counter, key, words
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
KNOWN_NORMALS = [  # seed, t, sample, first element, stream, normals
    (0, 0, 0, 0, 0, [0.991137680, -0.924662588, -0.617608959, -0.482068587]),
    (42, 999, 7, 12, 1, [-0.328298307, 1.280636249, -1.044864454, 0.740232202]),
    ((1 << 63) + 5, 17, (1 << 40) + 3, 764, 1, [-1.042369716, 1.175289941, -0.973194223, -2.361091276]),
]
SEED = (1 << 63) + 12345  # a seed that doesn't fit an int64
FIRST = (1 << 40) + 7  # a sample index of more than 32 bits


def hexes(text):
    return [int(word, 16) for word in text.split()]


def words_in_python(counter, key):
    """Philox4x32-10 as in the paper's figure, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def words_of(quad, *, seed, t, sample, stream):
    """Return the words of elements 4*quad..4*quad + 3, computed from the documented counter and key."""
    counter = (quad, t, sample & 0xFFFFFFFF, (sample >> 32) ^ (stream << 24))
    return words_in_python(counter, (seed & 0xFFFFFFFF, seed >> 32))


def normals_in_numpy(elements, *, seed, t, sample, stream):
    """Return one sample's normals in float64, without code of the package."""
    quads = [words_of(q, seed=seed, t=t, sample=sample, stream=stream) for q in range((elements + 3) // 4)]
    u = (np.array(quads, dtype=np.float64).reshape(-1, 2, 2) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    return torch.from_numpy(np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1)[:elements])


# -------------------------------------------------------------------------------------------------- truth


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_known_words(counter, key, words):
    low, high = hexes(key)
    seed = low + (high << 32)
    got = philox_words_ref(hexes(counter), seed - (1 << 64) if seed >> 63 else seed)
    assert [int(w) for w in got] == hexes(words) == words_in_python(hexes(counter), (low, high))


word = st.integers(0, 0xFFFFFFFF)


@hypothesis.given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_words_of_any_counter(counter, key):
    seed = key[0] + (key[1] << 32)
    got = philox_words_ref(counter, seed - (1 << 64) if seed >> 63 else seed)
    assert [int(w) for w in got] == words_in_python(counter, key)


def test_first_words():
    """Timesteps, flips and dropout seeds are computed from these words."""
    sample = torch.tensor([0, 5, FIRST])
    got = first_words(sample, seed=SEED, stream=Stream.TIMESTEP, t=3)
    assert got.tolist() == [words_of(0, seed=SEED, t=3, sample=s, stream=3)[0] for s in sample.tolist()]


def test_float64_normals_are_the_formula():
    sample, t = torch.tensor([0, FIRST, (1 << 56) - 1]), torch.tensor([0, 17, (1 << 20) - 1])
    got = normals_float64(30, sample, t, SEED - (1 << 64), Stream.FORWARD)
    for row, s, time in zip(got, sample.tolist(), t.tolist(), strict=True):
        torch.testing.assert_close(
            row, normals_in_numpy(30, seed=SEED, t=time, sample=s, stream=2), rtol=1e-13, atol=1e-13
        )


# ----------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize(("seed", "t", "sample", "element", "stream", "normals"), KNOWN_NORMALS)
def test_known_normals(device, seed, t, sample, element, stream, normals):
    got = ops.philox_normal((1, element + 4), seed=seed, t=t, first=sample, stream=stream, device=device)
    assert got.dtype == torch.float32
    assert got.device.type == device
    assert parity.share(got[0, element:], torch.tensor(normals, dtype=torch.float64), parity.NOISE) <= 1


@over_shapes(
    "shape",
    [
        (1, 2, 64, 65),  # more than one chunk, more than one vector
        (5,),  # no dimension but the samples'
        (2, 1),  # one element of a quad
        (3, 3, 5, 7),  # odd sizes: the last quad is cut
        (64, 3),  # many small samples
    ],
)
def test_close_to_float64(device, shape):
    elements = math.prod(shape[1:])
    got = ops.philox_normal(shape, seed=SEED, t=999, stream=Stream.REVERSE, first=FIRST, device=device)
    truth = [normals_in_numpy(elements, seed=SEED, t=999, sample=FIRST + i, stream=1) for i in range(shape[0])]
    assert parity.share(got, torch.stack(truth).reshape(shape), parity.NOISE) <= 1


def test_extreme_words(device):
    """u is near 0 and near 1, and angles are near multiples of pi."""
    sample = torch.tensor(parity.EXTREME_SAMPLES)
    words = [words_of(0, seed=0, t=0, sample=s, stream=1) for s in sample.tolist()]
    radii = [w for row in words for w in row[::2]]
    assert min(radii) == 1
    assert max(radii) == 0xFFFFFFFF
    got = ops.philox_normal((len(sample), 4), seed=0, t=0, stream=1, sample=sample.to(device), device=device)
    truth = [normals_in_numpy(4, seed=0, t=0, sample=s, stream=1) for s in sample.tolist()]
    assert parity.share(got, torch.stack(truth), parity.NOISE) <= 1


def test_naive_float32_exceeds_the_bound():
    sample = torch.tensor(parity.EXTREME_SAMPLES)
    words = torch.tensor([words_of(0, seed=0, t=0, sample=s, stream=1) for s in sample.tolist()])
    u = (words.float() + 0.5) * 2.0**-32
    radius, angle = (-2 * u[:, ::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    naive = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    truth = normals_float64(4, sample, torch.tensor([0]), 0, Stream.REVERSE)
    assert parity.share(naive, truth, parity.NOISE) > 10


@hypothesis.given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    seed=st.integers(0, (1 << 64) - 1),
    t=st.integers(0, (1 << 20) - 1),
    first=st.integers(0, (1 << 56) - 10),
    stream=st.integers(0, 255),
)
def test_any_arguments(shape, seed, t, first, stream):
    got = ops.philox_normal(shape, seed=seed, t=t, first=first, stream=stream)
    elements = math.prod(shape[1:])
    truth = [normals_in_numpy(elements, seed=seed, t=t, sample=first + i, stream=stream) for i in range(shape[0])]
    assert parity.share(got, torch.stack(truth).reshape(shape) if truth else got.double(), parity.NOISE) <= 1


# --------------------------------------------------------------------------------- what a draw depends on


def draw(n, elements, device="cpu", **changes):
    return ops.philox_normal(
        (n, elements), **{"seed": SEED, "t": 5, "first": FIRST, "stream": 1, "device": device, **changes}
    )


def test_the_batch_split_does_not_matter(device):
    whole = draw(7, 45, device)
    parts = [draw(n, 45, device, first=FIRST + at) for at, n in ((0, 1), (1, 3), (4, 3))]
    assert same_bits(torch.cat(parts), whole)


def test_sample_replaces_first(device):
    order = torch.tensor([3, 0, 6, 3])
    got = draw(4, 45, device, first=0, sample=(FIRST + order).to(device))
    assert same_bits(got, draw(7, 45, device)[order.to(device)])


def test_t_per_sample(device):
    t = torch.tensor([9, 0, 9, 999])
    got = draw(4, 45, device, t=t.to(device))
    for i, value in enumerate(t.tolist()):
        assert same_bits(got[i : i + 1], draw(1, 45, device, t=value, first=FIRST + i))


def test_an_elements_place_does_not_matter(kernels):
    """Tails use the same arithmetic: a shorter sample is the beginning of a longer one, for every length of the last vector."""
    whole = draw(2, 150)
    for elements in range(151):
        assert same_bits(draw(2, elements), whole[:, :elements])


def test_threads_and_reruns_give_the_same_bits(kernels, with_threads):
    """Enough elements for every thread, in one sample and in many."""
    for n, elements in ((1, 200_003), (300, 777)):
        one = with_threads(1, lambda n=n, elements=elements: draw(n, elements))
        assert same_bits(one, with_threads(2, lambda n=n, elements=elements: draw(n, elements)))
        assert same_bits(one, with_threads(3, lambda n=n, elements=elements: draw(n, elements)))
        assert same_bits(one, with_threads(3, lambda n=n, elements=elements: draw(n, elements)))


def test_draws_differ_where_any_of_their_names_does():
    names = [{}, {"seed": SEED - 1}, {"seed": SEED ^ (1 << 40)}, {"t": 6}, {"t": 5 + (1 << 19)}, {"stream": 2}]
    names += [{"first": FIRST + 1}, {"first": FIRST - (1 << 40)}, {"first": FIRST + (1 << 55)}]
    draws = torch.cat([draw(1, 64, **changes) for changes in names])
    assert torch.pdist(draws).min() > 1


def test_torchs_own_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(4, 45)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0), (2, 3, 0, 4)])
def test_empty(device, shape):
    assert ops.philox_normal(shape, seed=0, t=0, stream=0, device=device).shape == shape


def test_device_is_that_of_its_tensors(device):
    assert ops.philox_normal((2, 3), seed=0, t=torch.tensor([1, 2], device=device), stream=0).device.type == device


def test_reference_function():
    got = ops.philox_normal_ref((2, 3, 5), seed=SEED, t=4, stream=2, first=FIRST)
    truth = normals_float64(15, torch.tensor([FIRST, FIRST + 1]), torch.tensor([4]), SEED - (1 << 64), 2)
    assert torch.equal(got, truth.float().reshape(2, 3, 5))


# ----------------------------------------------------------------------------------------- within PyTorch


def test_opcheck(device):
    sample, t = torch.tensor([5, 1], device=device), torch.tensor([3, 4], device=device)
    for arguments in (((2, 3, 5), -7, 1, 9, None, 4, None, device), ((2, 3), 7, 1, 0, t, 0, sample, device)):
        torch.library.opcheck(torch.ops.fastddpm.philox_normal.default, arguments)


def test_compiles_without_a_graph_break():
    """torch.compile compiles once for all seeds, timesteps and counts. There are more of them than torch's recompile limit."""

    def f(n, seed, t, first):
        return 2 * ops.philox_normal((n, 3, 5), seed=seed, t=t, stream=1, first=first)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for k in range(2, 14):
        assert torch.equal(compiled(k, 77 * k, k, 3 * k), f(k, 77 * k, k, 3 * k))
    assert torch.equal(compiled(2, SEED, 3, FIRST), f(2, SEED, 3, FIRST))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, r"shape: got \(\); expected \[N, ...\] with sizes >= 0"),
        ({"shape": (2, -1)}, r"shape: got \(2, -1\)"),
        ({"seed": -1}, r"seed: got -1; expected an int in \[0, 2\^64\)"),
        ({"seed": 1 << 64}, r"seed: got 18446744073709551616"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"t": -1}, r"t: got -1; expected an int in \[0, 2\^20\)"),
        ({"t": 1 << 20}, "t: got 1048576"),
        ({"t": torch.tensor([1, 2, 3])}, r"t: got int64 \[3\]; expected int64 \[2\]"),
        ({"t": torch.tensor([1.0, 2.0])}, r"t: got float32 \[2\]; expected int64 \[2\]"),
        ({"t": torch.tensor([1, 2]), "device": "meta"}, "t: is on cpu, the noise is requested on meta"),
        ({"first": -1}, r"first: got -1; expected an int in \[0, 2\^56\)"),
        ({"first": 1 << 56}, "first: got 72057594037927936"),
        ({"sample": torch.tensor([1])}, r"sample: got int64 \[1\]; expected int64 \[2\]"),
        ({"stream": 256}, r"stream: got 256; expected an int in \[0, 256\)"),
        ({"stream": -1}, "stream: got -1"),
    ],
)
@pytest.mark.parametrize("function", [ops.philox_normal, ops.philox_normal_ref])
def test_bad_input(function, arguments, message):
    arguments = {"shape": (2, 3), "seed": 0, "t": 0, "stream": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        function(arguments.pop("shape"), **arguments)
