"""FID, KID and bits per dimension against closed forms and another library, and interrupted evaluations."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from conftest import randomised
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, cli
from fastddpm.errors import EvaluationError
from fastddpm.evaluation import api, identity, metrics
from fastddpm.evaluation import samples as sampling
from fastddpm.evaluation.distances import Statistics, frechet, kernel_distance, statistics
from fastddpm.evaluation.features import Features, checksum, inception
from fastddpm.evaluation.likelihood import likelihood, likelihood_of
from fastddpm.evaluation.shards import Shards
from fastddpm.inputs.resolve import resolve
from fastddpm.sampling.plan import resolve_for
from fastddpm.utils.files import write_if_missing

pytestmark = [  # what most of these tests' few images bring about
    pytest.mark.filterwarnings("ignore:.*every subset is all of them"),
    pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save"),
    pytest.mark.filterwarnings("ignore:FID. 40 reference images for 64 features"),
    pytest.mark.filterwarnings("ignore:.*fixed_small in place of the default"),
]

MINE = """
import torch
from torch import nn

def low(pixels):  # some of the pixels, as they are
    return pixels.double().flatten(1)[:, 16:40:3] / 255

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, pixels):
        return self.layers(pixels.float() / 255)

def flat(pixels):
    return pixels.float().mean()

def nan(pixels):
    return pixels.float().flatten(1) / 0

def needs(pixels, more):
    return pixels

class Wants(nn.Module):
    def __init__(self, width):
        super().__init__()

NUMBER = 3
"""


def network(classes=None, seed=0):
    config = UNetConfig(
        sample_size=8,
        in_channels=1,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=4,
        num_classes=classes,
    )
    model = randomised(config, seed)
    model.schedule = Schedule.linear(12, 1e-3, 0.8)
    return model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a model, 6x6 grey data, and a module of features."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    network().save_pretrained("model")
    random = np.random.default_rng(0)
    arrays = {"x_train": random.integers(0, 256, (40, 6, 6)), "x_test": random.integers(0, 256, (15, 6, 6))}
    np.savez(
        "x.npz",
        y_train=np.arange(40) % 3,
        y_test=np.arange(15) % 3,
        **{k: v.astype(np.uint8) for k, v in arrays.items()},
    )
    return tmp_path


def low(pixels):
    return pixels.double().flatten(1)[:, 16:40:3] / 255


class Counted:
    """Features that count the images they receive."""

    def __init__(self, function=low):
        self.function, self.images = function, 0

    def __call__(self, pixels):
        self.images += len(pixels)
        return self.function(pixels)


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastddpm", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def samples(folder, n, shape=(1, 8, 8)):
    return torch.from_numpy(Shards(folder / "samples", shape, np.uint8).load(range(n)))


# ------------------------------------------------------------------------------------------------ arithmetic

spectra = st.lists(st.sampled_from([0.0, 0.0, 1e-6, 0.3, 1.0, 7.0, 1e3]), min_size=6, max_size=6)


@given(spectra, spectra, st.integers(0, 99))
def test_frechet_of_covariances_with_one_basis(a, b, seed):
    """If S1 and S2 commute, the distance is |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, also for singular ones."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    m1, m2 = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    got = frechet(Statistics(9, m1, basis * a @ basis.T), Statistics(9, m2, basis * b @ basis.T))
    truth = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    # An eigenvalue of 0 comes out as a rounding of the largest, and the square root of that enters: 2^-26 for each.
    assert abs(got - truth) <= 6 * 4 * 2**-26 * float((a.max() * b.max()).sqrt()) + 1e-12 * (1 + truth)


def test_frechet_of_covariances_that_do_not_commute():
    """2 x 2: tr (S1 S2)^(1/2) = sqrt(tr S1 S2 + 2 sqrt(det S1 S2))."""
    s1 = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)
    s2 = torch.tensor([[0.5, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    cross = ((s1 @ s2).trace() + 2 * (s1.det() * s2.det()).sqrt()).sqrt()
    mean = torch.zeros(2, dtype=torch.float64)
    truth = float(9 * 2 + s1.trace() + s2.trace() - 2 * cross)
    assert frechet(Statistics(9, mean, s1), Statistics(9, mean + 3, s2)) == pytest.approx(truth, rel=1e-14)


class AsGiven(nn.Module):
    """The library's network, which receives features and returns them unchanged."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, x):
        return x


def features_like_a_network(n, width, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    mix = torch.randn(rank, width, generator=generator, dtype=torch.float64)
    return (x @ mix + seed).relu() if rank == width else x @ mix + seed  # positive, or of a lower rank


@pytest.mark.parametrize(
    ("n", "m", "width", "rank"),
    [(400, 300, 24, 24), (400, 300, 24, 5), (20, 300, 24, 24), (10, 12, 24, 24)],
    ids=["full", "low rank", "fewer samples than features", "fewer of both"],
)
def test_frechet_is_the_librarys(n, m, width, rank):
    p, q = features_like_a_network(n, width, rank, 1), features_like_a_network(m, width, rank, 2) * 1.2
    library = FrechetInceptionDistance(AsGiven(width))
    library.update(p, real=True)
    library.update(q, real=False)
    got = frechet(statistics(p.split(7)), statistics(q.split(64)))
    # Both take square roots of what should be 0, so of a rounding of the largest eigenvalue: see above.
    scale = float((p.T.cov().trace() * q.T.cov().trace()).sqrt())
    assert got == pytest.approx(float(library.compute()), abs=width * 4 * 2**-26 * scale)
    assert got > 1


def test_kernel_distance_is_the_librarys():
    p, q = features_like_a_network(150, 24, 24, 1), features_like_a_network(90, 24, 24, 2)
    library = KernelInceptionDistance(AsGiven(24), subsets=20, subset_size=60)
    library.update(p, real=True)
    library.update(q, real=False)
    torch.manual_seed(5)  # it draws its subsets from torch's generator, those of the real ones first
    mean, deviation = library.compute()
    got = kernel_distance(p, q, subsets=20, size=60, seed=5)
    assert got == pytest.approx((float(mean), float(deviation)), rel=1e-10)
    assert got[1] > 0 and got == kernel_distance(p, q, subsets=20, size=60, seed=5)


def test_kernel_distance_has_the_mean_it_should():
    """For N(0, 1) and N(m, 1) in one dimension, from the moments: unbiased, so 0 where m is 0."""
    x = torch.randn(20_000, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for m in (0.0, 0.5):
        mean, deviation = kernel_distance(x[:, 0], x[:, 1] + m, subsets=400, size=50)
        own, apart = 1 + 3 * m**2 + 3 * (1 + m**2) ** 2 + (m**3 + 3 * m) ** 2, 1 + 3 * (1 + m**2)
        assert abs(mean - (4 + own - 2 * apart)) < 4 * deviation / 400**0.5


@given(st.lists(st.integers(1, 39), max_size=6), st.sampled_from([0.0, 1.0, 1e5]))
def test_statistics_do_not_depend_on_the_split(cuts, offset):
    x = features_like_a_network(40, 5, 5, 3) + offset
    edges = [0, *sorted(cuts), 40]  # empty batches too
    got = statistics(x[a:b] for a, b in itertools.pairwise(edges))
    centred = x - offset  # exact to 2^-52 of the offset
    assert got.count == 40
    # A mean's error is a few roundings of the mean, whatever the split; the covariance loses nothing to the offset:
    # E[x^2] - E[x]^2 would be off by 1e10 * 2^-53.
    assert torch.allclose(got.mean - offset, centred.mean(0), rtol=1e-12, atol=offset * 2**-50)
    assert torch.allclose(got.covariance, centred.T.cov(), rtol=1e-12, atol=1e-12 + offset * 2**-48)


def test_statistics_of_too_few():
    with pytest.raises(ValueError, match="got 1 images; a covariance needs at least 2"):
        statistics([torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="got 1 and 5 images"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))


# --------------------------------------------------------------------------------------------------- samples


def test_shards_are_cut_as_in_an_unbroken_run(tmp_path):
    shards = Shards(tmp_path / "s", (2,), np.uint8)
    assert shards.missing(7, 3) == [range(0, 3), range(3, 6), range(6, 7)] and not (tmp_path / "s").exists()
    rows = np.arange(20, dtype=np.uint8).reshape(10, 2)
    shards.write(range(3, 5), rows[3:5])
    assert shards.missing(10, 4) == [range(0, 3), range(5, 8), range(8, 10)]
    assert shards.missing(4, 4) == [range(0, 3)]
    shards.fill(10, 4, lambda span: rows[span.start : span.stop], False, "rows")
    again = Shards(tmp_path / "s", (2,), np.uint8)
    assert again.missing(10, 3) == [] and np.array_equal(again.load(range(10)), rows)
    assert np.array_equal(again.load(range(2, 9)), rows[2:9])


def test_draw_is_the_sequence_of_the_seed(tmp_path):
    model = network()
    shards = sampling.draw(model, tmp_path / "e", 10, seed=3, shard=4, progress=False)
    assert sorted(p.name for p in (tmp_path / "e" / "samples").iterdir()) == [
        "00000000-00000003.npy",
        "00000004-00000007.npy",
        "00000008-00000009.npy",
    ]
    whole = fastddpm.to_uint8(fastddpm.sample(model, 10, seed=3, progress=False))
    # With other batch sizes, images agree to the tolerance of test_sampling.py, 1e-3, so at most a grey level off.
    assert np.abs(shards.load(range(10)).astype(int) - whole.numpy()).max() <= 1
    assert len(np.unique(whole.reshape(10, -1), axis=0)) == 10
    alike = sampling.draw(model, tmp_path / "f", 10, seed=3, progress=False)  # as sample does it: to the bit
    assert np.array_equal(alike.load(range(10)), whole.numpy())


def test_an_interrupted_drawing_goes_on_and_draws_nothing_twice(tmp_path, monkeypatch):
    model, spans, drawn = network(), [], sampling.run

    def run(plan, n, options):
        spans.append(range(options.first, options.first + n))
        return drawn(plan, n, options)

    def interrupted(*arguments):
        if len(spans) == 2:
            raise KeyboardInterrupt
        return run(*arguments)

    unbroken = sampling.draw(model, tmp_path / "a", 23, shard=5, progress=False).load(range(23))
    monkeypatch.setattr(sampling, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampling.draw(model, tmp_path / "b", 23, shard=5, progress=False)
    (tmp_path / "b" / "samples" / ".00000010-00000014.77.npy").write_bytes(b"half")  # as a killed process leaves it
    monkeypatch.setattr(sampling, "run", run)
    resumed = sampling.draw(model, tmp_path / "b", 23, shard=5, progress=False)
    assert sorted(i for span in spans for i in span) == list(range(23))
    assert np.array_equal(resumed.load(range(23)), unbroken)
    spans.clear()
    more = sampling.draw(model, tmp_path / "b", 31, shard=5, progress=False)  # n may grow, and shrink
    assert spans == [range(23, 25), range(25, 30), range(30, 31)]
    assert np.array_equal(more.load(range(23)), unbroken) and len(np.unique(more.load(range(31)), axis=0)) == 31
    assert len(sampling.draw(model, tmp_path / "b", 4, progress=False).load(range(4))) == 4


def test_a_folder_holds_one_set_of_samples(tmp_path):
    model, folder = network(), tmp_path / "e"
    draw = {"shard": 4, "progress": False}
    deeper = UNet(dataclasses.replace(model.config, attention_resolutions=(4,)), schedule=model.schedule)
    sampling.draw(model, folder, 4, **draw)
    before = (folder / "settings.json").read_text()
    for options, says in (
        ({"seed": 1}, "seed 0, now 1"),
        ({"sampler": "ddim"}, "sampler ddpm, now ddim"),
        ({"steps": 6}, "steps 12, now 6"),
        ({"variance": "fixed_small"}, "variance fixed_large, now fixed_small"),
        ({"clip": False}, "clip 1.0, now None"),
        ({"dtype": torch.bfloat16}, "dtype float32, now bfloat16"),
        ({"schedule": Schedule.linear(12, 1e-3, 0.81)}, "chain "),
        ({"model": deeper}, r"config.attention \[\], now \[4\]"),
    ):
        with pytest.raises(EvaluationError, match=f"settings .*{says}.*pass another folder, or delete this"):
            sampling.draw(options.pop("model", model), folder, 4, **options, **draw)
    with pytest.raises(EvaluationError, match="weights [0-9a-f]{12}, now "):
        sampling.draw(network(seed=1), folder, 4, **draw)
    sampling.draw(model, folder, 4, sampler="ddpm", steps=12, variance="fixed_large", eta=0.0, clip=1.0,
                    dtype=torch.float32, batch_size=2, **draw)  # the same in words  # fmt: skip
    assert (folder / "settings.json").read_text() == before
    with pytest.raises(TypeError, match="noise: no such option"):
        sampling.draw(model, folder, 4, noise=torch.zeros(4, 1, 8, 8), **draw)


def test_settings_keep_the_old_names_of_the_networks_options(tmp_path):
    """These settings identify folders, and their hash names folders, so they must not change."""
    config = dataclasses.replace(network(classes=3).config, num_heads=2, downsample_padding="both")
    sampling.draw(UNet(config, schedule=Schedule.linear(2, 1e-3, 0.8)), tmp_path, 1, progress=False)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert {name: value for name, value in settings.items() if name.startswith("config.")} == {
        "config.sample_size": 8, "config.in_channels": 1, "config.out_channels": 1, "config.channels": 8,
        "config.multipliers": [1, 2], "config.blocks": 1, "config.attention": [], "config.dropout": 0.0, "config.groups": 4,
        "config.classes": 3, "config.heads": 2, "config.pad": "both",
    }  # fmt: skip


def test_a_broken_or_foreign_file_is_an_error_and_stays(tmp_path):
    model, folder = network(), tmp_path / "e"
    sampling.draw(model, folder, 8, shard=4, progress=False)
    second = folder / "samples" / "00000004-00000007.npy"
    good = second.read_bytes()

    def refused(says, path=second):
        content = path.read_bytes()
        with pytest.raises(EvaluationError, match=says):
            sampling.draw(model, folder, 12, shard=4, progress=False)
        assert path.read_bytes() == content and len(list((folder / "samples").iterdir())) <= 3

    for content in (good[:-1], good[:90], b""):
        second.write_bytes(content)
        refused("00000004-00000007.npy: not a complete .npy file .*delete it")
    for array in (np.zeros((3, 1, 8, 8), np.uint8), np.zeros((4, 1, 8, 8)), np.zeros((4, 8, 8), np.uint8)):
        np.save(second, array)
        refused(r"00000004-00000007.npy: holds .*; expected uint8 \[4, 1, 8, 8\]")
    np.save(second, np.array([{}]), allow_pickle=True)
    refused("not a complete .npy file")
    np.savez(folder / "x.npz", good=np.zeros(4))
    archive = (folder / "x.npz").read_bytes()
    for content in (archive, archive[:-30]):
        second.write_bytes(content)
        refused("00000004-00000007.npy: not a complete .npy file .*delete it")
    second.write_bytes(good)
    for name, says in (("notes.txt", "not written by an evaluation"), ("00000003-00000006.npy", "item 3 is also in 0")):
        foreign = folder / "samples" / name
        foreign.write_bytes(good)
        refused(says, foreign)
        foreign.unlink()
    second.unlink()
    sampling.draw(model, folder, 8, shard=4, progress=False)
    assert second.read_bytes() == good
    for content in ("[]", "{", "[[1, 2]]"):
        (folder / "settings.json").write_text(content)
        refused("e: its settings.json is not a JSON object; pass another folder, or delete this")
    (folder / "settings.json").unlink()
    refused("contains samples, but no settings.json")


def test_classes_are_drawn_in_turn(tmp_path):
    model = network(classes=3)
    shards = sampling.draw(model, tmp_path / "e", 7, shard=4, batch_size=4, progress=False)
    labels = torch.arange(7) % 3
    truth = fastddpm.sample(model, 7, seed=0, class_labels=labels, batch_size=4, progress=False)
    assert np.abs(shards.load(range(7)).astype(int) - fastddpm.to_uint8(truth).numpy()).max() <= 1
    with pytest.raises(EvaluationError, match="class_labels each in turn, now 1"):
        sampling.draw(model, tmp_path / "e", 7, class_labels=1, progress=False)


def test_a_bare_callable(tmp_path):
    def model(x, t):
        return x * 0.5

    options = {"shape": (1, 4, 4), "schedule": Schedule.linear(5, 0.1, 0.4), "progress": False}
    shards = sampling.draw(model, tmp_path / "e", 3, **options)
    assert shards.load(range(3)).shape == (3, 1, 4, 4)
    assert json.loads((tmp_path / "e" / "settings.json").read_text())["weights"] is None


class Scaled(nn.Module):
    """A model with an attribute that is not a parameter."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x, t):
        return self.model(x, t) * self.scale


@pytest.mark.filterwarnings("ignore:Fréchet distance .low features", "ignore:fastddpm. Scaled is not")
@pytest.mark.parametrize("metric", ["fid", "bpd"])
def test_a_model_is_told_by_what_it_answers_too(metric, here):
    """The probe distinguishes callables, and modules that differ only in an attribute."""
    options = {"metrics": [metric], "n": 4, "features": Features(low, "low"), "shape": (1, 8, 8)}
    options |= {"likelihood_images": 4, "schedule": Schedule.linear(4, 0.1, 0.4)}
    network8 = network()
    pairs = {
        "callable": (lambda x, t: x * 0.5, lambda x, t: x * 0.6),
        "module": (Scaled(network8, 1.0), Scaled(network8, 1.1)),
        "later": (lambda x, t: x, lambda x, t: x + (t > 0).view(-1, 1, 1, 1) * 0.2),
    }
    for name, (model, other) in pairs.items():
        first = evaluated(here, name, model=model, **options)
        with pytest.raises(EvaluationError, match="another model.*another folder"):
            evaluated(here, name, model=other, **options)
        assert str(evaluated(here, name, model=model, **options)) == str(first)
    # The probe ignores rounding differences of other machines, and those of bfloat16.
    evaluated(here, "callable", model=lambda x, t: (x * 0.5).bfloat16().float(), **options)
    evaluated(here, "module", model=Scaled(network8, 1.005), **options)
    network8.train()
    evaluated(here, "module", model=Scaled(network8, 1.0), **options)


def test_the_probe_lets_bfloat16_pass():
    """bfloat16 outputs of the bundled network agree with float32 to the tolerance; machines differ by less."""
    model = fastddpm.UNet.from_pretrained("digits")
    exact, rounded = (identity.probe_outputs(resolve(model), model.shape, None, d) for d in (None, torch.bfloat16))
    assert exact.shape == (8 * 32 * 32, 2) and not np.array_equal(exact, rounded)
    assert (np.abs(exact - rounded).max(0) < identity.PROBE_TOLERANCE / 2 * np.abs(exact).max(0)).all()


def test_a_model_that_answers_wrongly_is_refused_before_anything_is_written(tmp_path):
    options = {"shape": (1, 4, 4), "progress": False}
    for model, says in (
        (lambda x, t: x[:, :, 1:], r"output has shape \[8, 1, 3, 4\]"),
        (lambda x, t: 3, "returned int"),
    ):
        with pytest.raises(EvaluationError, match=f"model: it.* {says}"):
            sampling.draw(model, tmp_path / "e", 3, **options)
    for bad, says in (
        ({"clip": -1}, "clip: got -1"),
        ({"clip": "yes"}, "clip: got 'yes'"),
        ({"model": network(classes=3), "class_labels": 3}, "class_labels: got values from 3 to 3; expected 0..2"),
        ({"model": network(), "class_labels": 0}, "class_labels: given, but the network has no classes"),
    ):
        with pytest.raises(ValueError, match=says):
            sampling.draw(bad.pop("model", network()), tmp_path / "e", 3, progress=False, **bad)
    assert not (tmp_path / "e").exists()


def test_an_unknown_sampler_is_refused_whatever_the_metrics_are(here):
    options = {"n": 2, "sampler": "euler", "features": Features(low, "low")}
    for chain in ({}, {"steps": 3, "spacing": "linspace"}):
        with pytest.raises(ValueError, match="sampler: got 'euler'"):
            fastddpm.evaluation.evaluate(network(), "x.npz", here / "e", **options, **chain)


def test_of_two_processes_in_one_folder_the_later_finds_the_first(tmp_path):
    """Both calls check the folder before either draws."""
    model = network()

    def drawing(model=model, folder="e", **changed):
        options = {
            "n": 9,
            "seed": 0,
            "shard": 3,
            "batch_size": None,
            "device": None,
            "dtype": None,
            "chain_options": {},
        }
        options = sampling.DrawingOptions(**{**options, **changed})
        resolved = resolve_for(model, sampling.chain_arguments(options.chain_options))
        return sampling.Drawing(resolved, tmp_path / folder, options)

    first, equal, other, further = drawing(), drawing(), drawing(seed=1), drawing(seed=1, n=12)
    drawn = first.run(False).load(range(9))
    settings = (tmp_path / "e" / "settings.json").read_bytes()
    equal.plan = None  # all is there, and nothing drawn again
    assert np.array_equal(equal.run(False).load(range(9)), drawn)
    for later in (other, further):
        with pytest.raises(EvaluationError, match="settings .seed 0, now 1"):
            later.run(False)
    assert (tmp_path / "e" / "settings.json").read_bytes() == settings
    assert np.array_equal(samples(tmp_path / "e", 9).numpy(), drawn) and len(list((tmp_path / "e").iterdir())) == 3

    options = {"shape": (1, 4, 4), "schedule": Schedule.linear(5, 0.1, 0.4)}
    half, less = (drawing(lambda x, t, by=by: x * by, "f", chain_options=options) for by in (0.5, 0.4))
    half.run(False)
    with pytest.raises(EvaluationError, match="f: its samples are another model's"):
        drawing(less.plan.model.network, "f", chain_options=options)  # before anything is run
    with pytest.raises(EvaluationError, match="f: its samples are another model's; pass another folder, or delete"):
        less.run(False)


def test_settings_are_written_by_one_process(tmp_path, monkeypatch):
    """The file appears between the check and the write, on disks with and without hard links."""
    path = tmp_path / "s.json"

    def late(temporary):
        temporary.write_text("mine")
        path.write_text("theirs")

    write_if_missing(path, late)
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
    path.unlink()

    def refused(*paths):
        raise PermissionError("no links here")

    for link in (os.link, refused):
        monkeypatch.setattr(os, "link", link)
        write_if_missing(path, lambda temporary: temporary.write_text("mine"))
        assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
        path.unlink()
    mine, theirs = (identity.Probe(tmp_path, np.full((2, 2), value), "another") for value in (1.0, 2.0))
    theirs.save()
    with pytest.raises(EvaluationError, match="another"):
        mine.save()


def test_equal_processes_share_the_work(tmp_path):
    rows, made = np.arange(12, dtype=np.uint8).reshape(12, 1), []
    mine, theirs = (Shards(tmp_path / "s", (1,), np.uint8) for _ in range(2))

    def make(span):
        made.append(span)
        if span.start == 0:
            theirs.write(range(4, 8), rows[4:8] + 100)
        return rows[span.start : span.stop]

    mine.fill(12, 4, make, False, "rows")
    assert made == [range(0, 4), range(8, 12)]
    assert np.array_equal(mine.load(range(12))[4:8], rows[4:8] + 100)  # as it was written


# ------------------------------------------------------------------------------------------------- evaluate


def test_the_command_from_end_to_end(here, capsys, monkeypatch):
    arguments = ("model", "--data", "x.npz", "--out", "e", "-n", 30, "--features", "mine:low", "--shard", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 0 and "30 samples: every subset is all of them" in err and "Warning" not in err, err
    result = json.loads((here / "e" / "result.json").read_text())
    by_name = {row["metric"]: row for row in result["metrics"]}
    assert list(by_name) == [
        "Fréchet distance (mine:low features)",
        "kernel distance (mine:low features)",
        "bits per dimension",
    ]
    for row in by_name.values():
        assert row["metric"] in out and f"{row['value']:.5g}" in out and row["protocol"] in out

    drawn = samples(here / "e", 30)
    truth = fastddpm.to_uint8(fastddpm.sample(network(), 30, seed=0, progress=False))
    assert (drawn.int() - truth.int()).abs().max() <= 1
    with np.load("x.npz") as arrays:
        train, test = (np.pad(arrays[name], ((0, 0), (1, 1), (1, 1)))[:, None] for name in ("x_train", "x_test"))
    real, fake = low(torch.from_numpy(train)), low(drawn)
    library = FrechetInceptionDistance(AsGiven(8))
    library.update(real, real=True)
    library.update(fake, real=False)
    assert by_name["Fréchet distance (mine:low features)"]["value"] == pytest.approx(float(library.compute()), rel=1e-6)
    mean, deviation = kernel_distance(real, fake)
    row = by_name["kernel distance (mine:low features)"]
    assert (row["value"], row["uncertainty"]) == pytest.approx((mean, deviation), rel=1e-9)
    assert row["meaning"] == "s.d. over 100 subsets of 30"
    for part in (
        "30 samples (ddpm, 12 steps, fixed_large, seed 0)",
        "40 training images of x.npz",
        "8 features of mine:low",
    ):
        assert part in row["protocol"]
    bound = likelihood(network(), torch.from_numpy(test), seed=0, progress=False)
    row = by_name["bits per dimension"]
    assert row["value"] == pytest.approx(bound.bits_per_dim, rel=1e-5)
    assert row["uncertainty"] == pytest.approx(list(bound.interval), rel=1e-5)
    assert "15 images: the x_test of x.npz, padded from 6x6 to 8x8; all timesteps" in row["protocol"]
    assert result["samples"]["n"] == 30 and result["features"] == {"name": "mine:low", "dim": 8, "sha256": None}
    assert result["reference"]["source"] == "x.npz, padded from 6x6 to 8x8"
    bound = result["likelihood"]
    assert bound["n"] == 15 and bound["weights"] == result["samples"]["weights"] and bound["seed"] == 0
    assert bound["config.channels"] == 8 and bound["variance"] == "fixed_large" and bound["dtype"] == "float32"
    assert "FID" not in out and "KID" not in out

    mine = sys.modules["mine"]
    monkeypatch.setattr(mine, "low", Counted())
    monkeypatch.setattr(sampling, "run", None)  # nothing is drawn, and no bound computed, again
    monkeypatch.setattr(metrics, "likelihood_of", None)
    code, again, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0 and again == out and mine.low.images == 8  # the probe alone


def test_ctrl_c_says_how_to_go_on(here, capsys, monkeypatch):
    arguments = ("model", "--data", "x.npz", "--out", "e", "-n", 6, "--features", "mine:low", "--metrics", "kid")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "run", interrupted)
        code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 130 and err.endswith("e: stopped; the same command continues\n")
    code, out, _ = run(capsys, monkeypatch, *arguments, "--sampler", "ddpm", "--variance", "fixed_large")
    assert code == 0 and "kernel distance (mine:low features)" in out


def test_a_killed_command_goes_on(here, capsys, monkeypatch):
    """After a process is killed, its images are kept, and the result is that of an uninterrupted one."""
    options = ["--data", "x.npz", "-n", "40", "--shard", "2", "--features", "mine:Pooled", "--metrics", "fid,bpd"]
    command = [sys.executable, "-m", "fastddpm", "evaluate", "model", "--out", "killed", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 120
        while len(kept := sorted((here / "killed" / "samples").glob("0*.npy"))) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in kept}
    assert len(kept) < 20 and not (here / "killed" / "result.json").exists()
    for out in ("killed", "unbroken"):
        assert run(capsys, monkeypatch, "model", "--out", out, *options)[0] == 0
    assert torch.equal(samples(here / "killed", 40), samples(here / "unbroken", 40))
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    metrics = [json.loads((here / out / "result.json").read_text())["metrics"] for out in ("killed", "unbroken")]
    assert metrics[0] == metrics[1]


def evaluated(here, out="e", n=30, metrics=("fid",), model=None, **options):
    return api.evaluate(
        network() if model is None else model,
        here / "x.npz",
        here / out,
        n=n,
        metrics=metrics,
        progress=False,
        **options,
    )


def test_features_are_taken_once(here):
    counted = Counted()
    evaluated(here, features=Features(counted, "low"))
    assert counted.images == 8 + 40 + 30  # the probe, the reference, the samples
    for names, n, more in ((("fid", "kid"), 30, 0), (("fid",), 35, 5)):
        counted.images = 0
        evaluated(here, n=n, metrics=names, features=Features(counted, "low"))
        assert counted.images == 8 + more
    counted.images = 0
    first = evaluated(here, "other", features=Features(counted, "low"))
    assert counted.images == 8 + 30  # another folder's samples, the same reference
    folder = here / "evaluation-cache" / "low-1x8x8-callable"
    for path in folder.glob("reference-*/*"):
        path.unlink()
    counted.images = 0
    assert str(evaluated(here, "other", features=Features(counted, "low"))) == str(first)
    assert counted.images == 8  # the statistics suffice for fid


def test_features_that_changed_are_noticed(here):
    # One feature is larger than the rest, and one is always 0.
    scale = torch.tensor([1e4, 1, 1, 1, 1, 1, 1, 0], dtype=torch.float64)

    def scaled(changes=None):
        return Features(lambda p: low(p) * scale * (1 if changes is None else torch.tensor(changes)), "low")

    evaluated(here, features=scaled())
    for changed in (scaled([1.1] * 8), scaled([1] * 3 + [1.1] + [1] * 4), Features(lambda p: low(p)[:, :3], "low")):
        with pytest.raises(EvaluationError, match="evaluation-cache.*of another low; delete it, or pass another cache"):
            evaluated(here, features=changed)
        with pytest.raises(EvaluationError, match="e/features.*of another low; delete it, or pass another folder"):
            evaluated(here, features=changed, cache="other")
    # Rounding differences, as of another machine, are accepted.
    evaluated(here, features=Features(lambda p: low(p) * scale * (1 + 1e-5) + 1e-5, "low"))


def test_features_of_samples_that_went_are_not_used(here):
    """The features of deleted samples, whose settings are deleted too, are not used for other samples."""
    counted = Counted()
    evaluated(here, features=Features(counted, "low"))
    counted.images = 0
    for name in ("samples", "probe.npy", "settings.json"):
        path = here / "e" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = evaluated(here, seed=1, features=Features(counted, "low"))
    assert counted.images == 8 + 30
    assert str(evaluated(here, "f", seed=1, features=Features(counted, "low"))) == str(result)


def test_a_module_is_known_by_its_weights(here):
    counts = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        net = Weighted().eval()
        evaluated(here, features=Features(net, "net"))
        counts.append(net.images)
    assert counts == [8 + 40 + 30, 8 + 40 + 30, 8]
    (kept,) = (here / "evaluation-cache").glob(f"net-1x8x8-{checksum(net)[:12]}/reference-*.npz")
    good = kept.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"mean.npy") + 400] ^= 1  # in a member, which is read later
    np.savez(here / "other.npz", count=40)
    np.save(here / "array.npy", np.zeros(3))
    damaged = (b"cut", b"", good[:-30], bytes(flipped))
    for content in (*damaged, (here / "other.npz").read_bytes(), (here / "array.npy").read_bytes()):
        kept.write_bytes(content)
        with pytest.raises(EvaluationError, match="npz: not readable .*delete it"):
            evaluated(here, features=Features(net, "net"))
    kept.write_bytes(good)
    probe = kept.parent / "probe.npy"
    for content in (probe.read_bytes()[:-1], good):
        probe.write_bytes(content)
        with pytest.raises(EvaluationError, match="probe.npy: not readable .*delete it"):
            evaluated(here, features=Features(net, "net"))


def test_a_checksum_of_extra_state():
    class Extra(nn.Linear):
        def __init__(self, state):
            super().__init__(1, 1)
            nn.init.ones_(self.weight), nn.init.ones_(self.bias)
            self.state = state

        def get_extra_state(self):
            return self.state

    class Thing:
        pass

    one, two = checksum(Extra({"scale": 1})), checksum(Extra({"scale": 2}))
    assert one == checksum(Extra({"scale": 1})) != two
    assert checksum(Extra(Thing())) == checksum(Extra(Thing()))  # wherever they are


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.images = nn.Linear(64, 3), 0

    def forward(self, pixels):
        self.images += len(pixels)
        return self.layer(pixels.float().flatten(1) / 255)


def test_too_few_images_for_the_features_are_warned_of(here):
    """With as many images as features, or fewer, the covariance is singular; one more is enough."""
    of = {
        width: Features(lambda p, width=width: p.double().flatten(1)[:, :width], f"w{width}") for width in (29, 30, 40)
    }
    with pytest.warns(UserWarning) as said:
        evaluated(here, features=of[40])
    assert [str(w.message)[:60] for w in said if "singular" in str(w.message)] == [
        "Fréchet distance (w40 features): 30 samples for 40 features:",
        "Fréchet distance (w40 features): 40 reference images for 40 ",
    ]
    with pytest.warns(UserWarning, match="30 samples for 30 features: their covariance is singular"):
        evaluated(here, features=of[30])
    with warnings.catch_warnings(action="error"):
        evaluated(here, features=of[29])


def test_bits_per_dimension_resume_and_say_what_they_are_of(here, monkeypatch):
    monkeypatch.setattr(sampling, "CPU_SHARD_SIZE", 4)
    calls = []

    def stopping(model, images, options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options.first)
        return likelihood_of(model, images, options)

    monkeypatch.setattr(metrics, "likelihood_of", stopping)
    options = {"metrics": ["bpd"], "subsample": 3, "seed": 5, "dtype": None}
    with pytest.raises(KeyboardInterrupt):
        evaluated(here, **options)
    calls[:] = ["", *calls]
    (row,) = evaluated(here, likelihood_images=4, **options).metrics
    assert (
        "4 images: the x_test of x.npz, padded from 6x6 to 8x8; 3 timesteps drawn for each" in row.protocol
        and len(calls) == 3
    )
    monkeypatch.setattr(metrics, "likelihood_of", lambda *a: calls.append(a[2].first) or likelihood_of(*a))
    (row,) = evaluated(here, **options).metrics
    assert calls == ["", 0, 4, 8, 12]
    test = fastddpm.data.load_test(here / "x.npz").pad_to(8).pixels
    truth = likelihood(network(), test, subsample=3, seed=5, progress=False)
    assert row.value == pytest.approx(truth.bits_per_dim, rel=1e-5)  # each image its own noise, however they are cut
    assert row.uncertainty == pytest.approx(truth.interval, rel=1e-5)
    assert not (here / "e" / "samples").exists()
    for changed in ({"subsample": 2}, {"seed": 6}, {"model": network(seed=1)}, {"variance": "fixed_small"}):
        calls.clear()
        evaluated(here, **{**options, **changed})
        assert calls == [0, 4, 8, 12]
        evaluated(here, **{**options, **changed, "batch_size": 3, "dtype": torch.float32})  # the same bounds
        assert len(calls) == 4

    with np.load("x.npz") as arrays:
        np.savez("x.npz", x_train=arrays["x_train"][:5])
    (row,) = evaluated(here, **options).metrics
    assert "5 images: the training images of x.npz, padded" in row.protocol
    (row,) = evaluated(here, likelihood_images=1, **options).metrics
    assert row.uncertainty is None


def test_bits_per_dimension_of_a_network_with_classes(here):
    model = network(classes=3)
    (row,) = evaluated(here, metrics=["bpd"], model=model).metrics
    test = fastddpm.data.load_test(here / "x.npz").pad_to(8).pixels
    truth = likelihood(model, test, seed=0, class_labels=torch.arange(15) % 3, progress=False)
    assert row.value == pytest.approx(truth.bits_per_dim, rel=1e-5)
    with np.load("x.npz") as arrays:
        changed = {**arrays, "y_test": (arrays["y_test"] + 1) % 3}
    del changed["y_train"]  # which the held-out images don't need
    np.savez("x.npz", **changed)
    (row,) = evaluated(here, metrics=["bpd"], model=model).metrics
    truth = likelihood(model, test, seed=0, class_labels=(torch.arange(15) + 1) % 3, progress=False)
    assert row.value == pytest.approx(truth.bits_per_dim, rel=1e-5)
    del changed["x_test"]
    np.savez("x.npz", **changed)
    with pytest.raises(ValueError, match="expected one of y_train"):
        evaluated(here, metrics=["bpd"], model=model)


def test_options_reach_the_bound(here, monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "likelihood_of", lambda *a: seen.append(a[2].batch_size) or likelihood_of(*a))
    evaluated(here, metrics=["bpd"], batch_size=7, clip=None, variance=None)
    assert seen == [7]
    with pytest.raises(TypeError, match="clipp, noise: no such option; expected some of schedule"):
        evaluated(here, metrics=["bpd"], clipp=True, noise=None)


def test_images_of_the_models_size_are_not_padded(here):
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8))
    (row,) = api.evaluate(network(), "x.npy", here / "e", metrics=["bpd"], progress=False).metrics
    assert "4 images: the training images of x.npy; all timesteps" in row.protocol


@pytest.mark.parametrize("metric", ["fid", "kid"])
def test_the_reference_is_looked_at_before_hours_of_sampling(metric, here, monkeypatch):
    """A network that fails on real images fails before the first image is drawn."""
    monkeypatch.setattr(sampling, "run", None)
    with np.load("x.npz") as arrays:
        black = {**arrays, "x_train": np.zeros_like(arrays["x_train"])}
    np.savez("x.npz", **black)
    light = Counted(lambda pixels: pixels.double().flatten(1).sum(1, keepdim=True).log())  # -inf where all is black
    with pytest.raises(ValueError, match="features: light returned a NaN or an infinity"):
        evaluated(here, metrics=[metric], features=Features(light, "light"))
    assert light.images > 8  # the probe did not show it


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("model", "--metrics", "fid,is"), "metrics: got is; expected some of fid, kid, bpd"),
        (("model", "--metrics", ","), "metrics: got none; expected some of"),
        (("nothing",), "neither a folder nor a bundled model"),
        (("model", "--data", "none.npz"), "none.npz: no such file"),
        (("model", "--data", "big.npy"), "data: big.npy: 4 images of 1x9x9; expected the model's 1x8x8"),
        (("model", "--data", "rgb.npy"), "data: rgb.npy: 4 images of 3x8x8; expected the model's 1x8x8"),
        (("model", "--data", "one.npy"), "reference images: got 1; a distance needs at least 2"),
        (("model", "-n", "1"), "samples: got 1"),
        (("model", "-n", "0"), "n: got 0"),
        (("model", "--shard", "0"), "shard: got 0"),
        (("model", "--seed", "-1"), "seed: got -1"),
        (("model", "--batch-size", "0"), "batch_size: got 0"),
        (("model", "--steps", "13"), "steps: got 13"),
        (("model", "--eta", "0.5"), "eta: got 0.5"),
        (("model", "--device", "abacus"), "device: got 'abacus'"),
        (("model", "--features", "mine"), "features: got 'mine'; expected PACKAGE.MODULE:NAME"),
        (
            ("model", "--features", "yours:low"),
            "features: yours cannot be imported from here (No module named 'yours')",
        ),
        (("model", "--features", "mine:lower"), "features: mine has no lower"),
        (("model", "--features", "mine:NUMBER"), "features: got 3; expected a callable"),
        (("model", "--features", "mine:Wants"), "mine:Wants cannot be constructed without arguments"),
        (
            ("model", "--features", "mine:flat"),
            "flat returned torch.float32 [] for uint8 [8, 1, 8, 8]; expected floats [8, D]",
        ),
        (("model", "--features", "mine:nan"), "features: mine:nan returned a NaN or an infinity"),
        (("model", "--likelihood-images", "0"), "likelihood_images: got 0"),
        (("model", "--subsample", "12"), "subsample: got 12"),
        (("model", "--variance", "none"), "the variational bound needs a density"),
        (("model", "--inception-weights", "x.npz"), "features, inception_weights: got both"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, says, here, capsys, monkeypatch):
    np.save("big.npy", np.zeros((4, 9, 9), np.uint8))
    np.save("rgb.npy", np.zeros((4, 8, 8, 3), np.uint8))
    np.save("one.npy", np.zeros((1, 8, 8), np.uint8))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(p for p in here.rglob("*"))
    arguments = [*arguments, *([] if "--data" in arguments else ["--data", "x.npz"]), "--out", "e"]
    arguments += [] if "--features" in arguments else ["--features", "mine:low"]
    arguments += [] if "-n" in arguments else ["-n", 1200]
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 1 and says in err and "Traceback" not in err
    assert err.count("\n") == 1 and sorted(p for p in here.rglob("*")) == before


def test_a_network_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"features: net is in training mode; call its eval\(\) first"):
        Features(nn.Linear(3, 3), "net")
    with pytest.raises(ValueError, match="expected a callable"):
        Features(nn.Linear, "net")


# ------------------------------------------------------------------------------------------------- Inception

STAND_IN = """
import torch
from torch import nn
URL_INCEPTION_V3 = "https://example.org/weights.pth"
DOWNLOAD = None

class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.layer = nn.Linear(3, 64)  # the real one has 2048, and takes seconds
        if feature_extractor_weights_path is None:
            import urllib.error
            raise DOWNLOAD if DOWNLOAD else urllib.error.URLError("no network")
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (self.layer(x.float().mean((2, 3))),)
"""


def library(tmp_path, monkeypatch, code):
    """Install this code as torch_fidelity for the test."""
    (tmp_path / "torch_fidelity").mkdir(exist_ok=True)
    (tmp_path / "torch_fidelity" / "__init__.py").write_text("")
    (tmp_path / "torch_fidelity" / "feature_extractor_inceptionv3.py").write_text(code)
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what is imported now goes after the test
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)


def test_inception_is_called_so_and_sees_three_channels(here, monkeypatch):
    library(here, monkeypatch, STAND_IN)
    torch.save(nn.ModuleDict({"layer": nn.Linear(3, 64)}).state_dict(), "w.pth")
    features = inception(here / "w.pth")
    grey = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(features(grey), features(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="features: got images of 2 channels"):
        features(grey.expand(-1, 2, -1, -1))
    with pytest.warns(UserWarning, match="FID: 30 samples for 64 features"):
        result = evaluated(here, metrics=("fid", "kid"), features=features)
    assert [row.metric for row in result.metrics] == ["FID", "KID"]
    assert "64 features of Inception" in result.metrics[0].protocol


def test_inception_that_cannot_be_had_is_one_line(here, monkeypatch, capsys):
    def said(*arguments):
        code, _, err = run(capsys, monkeypatch, "model", "--data", "x.npz", "--out", "e", *arguments)
        assert code == 1 and not (here / "e").exists() and err.count("\n") == 1
        return err

    library(here, monkeypatch, STAND_IN)
    err = said()
    assert (
        "could not be downloaded" in err and "https://example.org/weights.pth" in err and "--inception-weights" in err
    )
    for error in ("RuntimeError('PytorchStreamReader failed\\nmore')", "EOFError()"):  # a download that was cut short
        library(here, monkeypatch, STAND_IN.replace("DOWNLOAD = None", f"DOWNLOAD = {error}"))
        err = said()
        assert f"inception weights: {torch.hub.get_dir()}/checkpoints/weights.pth: damaged (" in err
        assert "); delete it; the next call downloads it again from https://example.org/weights.pth" in err
    library(here, monkeypatch, STAND_IN)
    assert "no.pth: not readable" in said("--inception-weights", "no.pth")
    assert "x.npz: not a file of weights; expected https://example.org" in said("--inception-weights", "x.npz")
    torch.save(nn.Linear(1, 1), "pickled.pth")
    assert "pickled.pth: not a file of weights" in said("--inception-weights", "pickled.pth")
    torch.save(nn.Linear(1, 1).state_dict(), "other.pth")
    assert "other.pth: not this network's" in said("--inception-weights", "other.pth")
    library(here, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    assert "torchvision, which torch-fidelity needs, doesn't fit this torch" in said()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert 'pip install "fastddpm[evaluate]"' in said()


def test_the_librarys_inception(tmp_path, monkeypatch):
    """The real network with random weights, if torch-fidelity is installed; it needs torchvision, which the tests don't."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as library
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity: {error}")
    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "w.pth")
    features = inception(tmp_path / "w.pth")
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(features(pixels), network(pixels.repeat(1, 3, 1, 1))[0])
    p, q = features_like_a_network(90, 24, 24, 1), features_like_a_network(80, 24, 24, 2)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(p), fid_features_to_statistics(q), False)
    assert frechet(statistics([p]), statistics([q])) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-8)
