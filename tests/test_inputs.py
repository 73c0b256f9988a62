"""What the functions that take a model ask of their arguments: what a model was trained for, wherever it says so; numbers of
every kind; sizes that a network can halve."""

import functools
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig
from fastddpm.evaluation import samples
from fastddpm.inputs import arguments, resolve

SHORT = Schedule.linear(3, 0.01, 0.5)
COSINE = {"schedule": Schedule.cosine(6), "prediction": "v_prediction", "variance": "fixed_small", "clip": 0.5}
TINY = {
    "sample_size": 8,
    "channels": 8,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
}


def unet(config=None, **trained):
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**TINY, "in_channels": 1, **(config or {})}), **{**COSINE, **trained}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def theirs(**options):
    torch.manual_seed(0)
    return UNet2DModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, **options,
        }
    ).eval()  # fmt: skip


def warned(call, *, only="fastddpm: "):
    """Return (the call's result, the messages of its warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if str(w.message).startswith(only)]


# ----------------------------------------------------------------------- what a model in another was trained for


class Average(nn.Module):
    """As EMA classes have it."""

    def __init__(self, model):
        super().__init__()
        self.ema_model = model

    def forward(self, *args):
        return self.ema_model(*args)


class Owner:
    """No module, but it has one."""

    def __init__(self, model):
        self.network = model

    def __call__(self, x, t):
        return self.network(x, t)

    def predict(self, x, t):
        return self.network(x, t)


class Pair(nn.Module):
    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x, t):
        return sum(model(x, t) for model in self.models) / len(self.models)


def hooked(model):
    model = nn.DataParallel(model)
    model.register_forward_hook(lambda module, args, output: output)
    return model


WRAPPERS = {
    "module": Average,
    "module in a module": lambda m: Average(Average(m)),
    "the same module twice": lambda m: Pair(m, m),
    "two that agree": lambda m: Pair(m, unet()),
    "torch's wrapper in one": lambda m: Average(torch.optim.swa_utils.AveragedModel(m)),
    "a hooked wrapper of torch's": hooked,
    "partial": lambda m: functools.partial(m),
    "partial of a partial of a wrapper": lambda m: functools.partial(functools.partial(Average(m))),
    "bound forward": lambda m: m.forward,
    "bound method of a wrapper": lambda m: Average(m).forward,
    "callable object": Owner,
    "method of an owner": lambda m: Owner(m).predict,
}
PICTURES = (torch.arange(4 * 64).reshape(4, 1, 8, 8) % 256 / 127.5 - 1).float()
CALLS = {
    "sample": lambda m: fastddpm.sample(m, 2, seed=0),
    "progressive": lambda m: fastddpm.progressive(m, 2, frames=2, seed=0),
    "encode": lambda m: fastddpm.encode(m, PICTURES, steps=3),
    "interpolate": lambda m: fastddpm.interpolate(m, PICTURES[:2], PICTURES[2:], weights=2, seed=0),
    "likelihood": lambda m: fastddpm.likelihood(m, PICTURES[:2], seed=0).per_image,
    "rate_distortion": lambda m: fastddpm.rate_distortion(m, PICTURES[:2], seed=0).rate,
    "training_loss": lambda m: fastddpm.training_loss(m, PICTURES, seed=0).detach(),
    "the bound": lambda m: fastddpm.training_loss(m, PICTURES, seed=0, objective="bound").detach(),
}


@pytest.mark.filterwarnings("ignore:fastddpm")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_is_read_through(wrap):
    model = unet()
    got = fastddpm.sample(WRAPPERS[wrap](model), 2, seed=0)  # its shape, too
    torch.testing.assert_close(got, fastddpm.sample(model, 2, seed=0), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:fastddpm")
@pytest.mark.parametrize("call", CALLS)
def test_every_function_reads_through_one(call):
    model = unet()
    expected = CALLS[call](model)
    torch.testing.assert_close(CALLS[call](Average(model)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(CALLS[call](Owner(model).predict), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_an_evaluation_draws_through_one(tmp_path):
    model = unet()
    drawn = [
        samples.draw(m, tmp_path / name, 2).load(range(2)).astype(int)
        for name, m in (("a", model), ("b", Average(model)), ("c", functools.partial(model)))
    ]
    assert all(abs(images - drawn[0]).max() <= 1 for images in drawn)  # of a grey level


def test_what_is_taken_from_inside_is_said_once_where_it_is_not_the_papers():
    model = Average(unet())
    said = "schedule, prediction, variance, clip: the Average is treated as the UNet inside it, with schedule="
    for calls in (2, 0):
        _, messages = warned(lambda calls=calls: [fastddpm.sample(model, 1, seed=i) for i in range(calls)])
        assert [said in message for message in messages if "treated" in message] == [True] * (calls > 0)
        assert not any("same, only slower" in message for message in messages)
    for quiet in (Average(unet()), Average(unet(schedule=Schedule.linear(), prediction="epsilon"))):
        options = COSINE if quiet.ema_model.prediction == "v_prediction" else {"variance": "fixed_small", "clip": 0.5}
        _, messages = warned(
            lambda quiet=quiet, o=options: fastddpm.sample(quiet, 1, steps=2, **{**o, "sampler": "ddpm"})
        )
        assert messages == ["fastddpm: Average is not a fastddpm.UNet, so it runs unmodified, without the engine"]
    for same in (functools.partial(unet()), unet().forward):  # which can answer only as the module does
        assert warned(lambda same=same: fastddpm.sample(same, 1, seed=0))[1] == []


def test_a_wrappers_own_attributes_win():
    wrapper = Average(unet())
    wrapper.prediction = "sample"
    found = resolve.resolve_settings(wrapper)
    assert found == (COSINE["schedule"], "sample", "fixed_small", 0.5)
    assert resolve.resolve_settings(wrapper, prediction="mean", clip=False) == (
        COSINE["schedule"],
        "mean",
        "fixed_small",
        False,
    )
    scheduler = DDPMScheduler(num_train_timesteps=4, beta_end=0.5)
    assert resolve.resolve_settings(Average(unet()), scheduler)[1:] == ("epsilon", "fixed_small", True)


@pytest.mark.parametrize("name", ["schedule", "prediction", "variance", "clip"])
def test_models_that_disagree_are_refused(name):
    other = {"schedule": SHORT, "prediction": "epsilon", "variance": "fixed_large", "clip": True}[name]
    pair = Pair(unet(), unet(**{name: other}))
    with pytest.raises(ValueError, match=f"{name}: the Pair holds models with different settings .*pass {name}="):
        fastddpm.sample(pair, 1)
    got, _ = warned(lambda: fastddpm.sample(pair, 1, seed=0, **{name: COSINE[name]}))
    assert got.shape == (1, 1, 8, 8)
    if name == "variance":  # which ddim and L_simple don't take
        warned(lambda: fastddpm.sample(pair, 1, sampler="ddim", steps=2))
        warned(lambda: fastddpm.training_loss(pair, PICTURES))
    else:
        with pytest.raises(ValueError, match=f"{name}: the Pair"):
            fastddpm.interpolate(pair, PICTURES, PICTURES)


def test_models_of_different_shapes():
    other = unet({"sample_size": 16})
    with pytest.raises(
        ValueError, match=r"shape: missing; the Pair holds models of different shapes \(\(1, 8, 8\), \(1, 16, 16\)\)"
    ):
        fastddpm.sample(Pair(unet(), other), 1)
    wants = Average(unet({"in_channels": 3, "out_channels": 1}))
    with pytest.raises(ValueError, match="shape: missing; the network in the Average takes 3 channels and returns 1"):
        fastddpm.sample(wants, 1)
    got, _ = warned(lambda: fastddpm.sample(Average(theirs()), 1, schedule=SHORT, seed=0))
    assert got.shape == (1, 3, 8, 8)


# ---------------------------------------------------------------------------------- what is assumed of a callable


class Silent(nn.Module):
    def forward(self, x, t):
        return x / 2


ASSUMED = (
    "does not specify what it was trained for; assumed the paper's linear schedule of 1000 steps, prediction='epsilon'"
)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda x, t: x / 2,
            "a function does not specify what its network was trained for; assumed the paper's linear",
        ),
        (functools.partial(lambda a, x, t: a * x, 0.5), "a function does not specify what its network was"),
        (Silent(), f"the Silent {ASSUMED}"),
        (Average(Silent()), f"the Average {ASSUMED}"),
        (Owner(Silent()).predict, f"the method Owner.predict {ASSUMED}"),
    ],
)
def test_what_is_assumed_is_said_once(model, says):
    options = {"shape": (1, 4, 4), "steps": 2, "seed": 0}
    got, messages = warned(lambda: [fastddpm.sample(model, 1, **options) for _ in range(2)])
    assert sum(says in m and "variance='fixed_large', clip=True; pass schedule=" in m for m in messages) == 1
    assert not any("only slower" in m for m in messages)
    for passed in (
        {"schedule": Schedule.linear(), "prediction": "epsilon"},
        {"schedule": DDPMScheduler(variance_type="fixed_large")},
    ):
        same, messages = warned(lambda o=passed: fastddpm.sample(model, 1, **o, **options))
        assert torch.equal(same, got[0]) and not any("assumed" in m for m in messages)


def test_a_prediction_that_is_assumed_is_said_also_beside_a_schedule():
    model = lambda x, t: x / 2  # noqa: E731
    _, messages = warned(
        lambda: [fastddpm.training_loss(model, PICTURES, schedule=Schedule.cosine(50)) for _ in range(2)]
    )
    [said] = [m for m in messages if "assumed" in m]
    assert (
        "prediction: a function does not specify what its network was trained for; assumed prediction='epsilon'; pass"
        in said
    )


@pytest.mark.parametrize(
    ("call", "listed"),
    [
        (
            lambda m: fastddpm.sample(m, 1, shape=(1, 4, 4), steps=1, prediction="sample"),
            "variance='fixed_large', clip=True",
        ),
        (lambda m: fastddpm.sample(m, 1, shape=(1, 4, 4), steps=1, variance="none", clip=2.0), "prediction='epsilon'"),
        (
            lambda m: fastddpm.sample(m, 1, shape=(1, 4, 4), sampler="ddim", steps=1),
            "prediction='epsilon', clip=True",
        ),
        (lambda m: fastddpm.encode(m, PICTURES, steps=1), "prediction='epsilon'"),
        (lambda m: fastddpm.training_loss(m, PICTURES), "prediction='epsilon'"),
        (
            lambda m: fastddpm.training_loss(m, PICTURES, objective="bound"),
            "prediction='epsilon', variance='fixed_large'",
        ),
        (
            lambda m: fastddpm.interpolate(m, PICTURES, PICTURES, steps=1, weights=1),
            "prediction='epsilon', variance='fixed_large', clip=True",
        ),
        (
            lambda m: fastddpm.likelihood(m, PICTURES[:1], subsample=1),
            "prediction='epsilon', variance='fixed_large', clip=True",
        ),
    ],
)
def test_only_what_was_not_passed_and_matters_is_named(call, listed):
    _, messages = warned(lambda: call(lambda x, t: x / 2), only="fastddpm: schedule")
    assert [f"assumed the paper's linear schedule of 1000 steps, {listed}; pass" in m for m in messages] == [True]


def test_settings_of_another_kind_are_refused_or_taken(tmp_path):
    for clip in (np.float32(0.5), torch.tensor(0.5)):
        model = unet(clip=clip)
        expected = fastddpm.sample(model, 1, steps=2, seed=0, clip=0.5)
        assert torch.equal(fastddpm.sample(model, 1, steps=2, seed=0), expected)
        for format in ("fastddpm", "diffusers"):
            model.save_pretrained(tmp_path / format, format=format)
            assert UNet.from_pretrained(tmp_path / format).clip == 0.5
    for name, value in (("prediction", 3), ("clip", "2"), ("schedule", [0.1])):
        model = unet()
        setattr(model, name, value)
        with pytest.raises(ValueError, match=f"model: its {name} is .*; expected"):
            fastddpm.sample(model, 1, steps=2)


def test_what_x_T_keeps_is_not_said_of_a_chain_that_begins_with_a_picture():
    model = unet(schedule=Schedule.linear(4, 0.01, 0.2))
    for call, said in (
        (lambda: fastddpm.interpolate(model, PICTURES, PICTURES, t=2, weights=1), False),
        (lambda: fastddpm.encode(model, PICTURES, steps=2), False),
        (lambda: fastddpm.sample(model, 1), True),
    ):
        assert any("x_T keeps" in m for m in warned(call)[1]) == said


def test_drawing_for_an_evaluation_says_it_once(tmp_path):
    _, messages = warned(lambda: samples.draw(lambda x, t: x / 2, tmp_path / "e", 5, shape=(1, 4, 4), steps=2, shard=2))
    assert sum("assumed" in m for m in messages) == 1


# ----------------------------------------------------------------------------------- conditions for each image


def test_images_split_unasked_are_told_of():
    side = 2048  # 16 GiB by the rule of `default_batch_size`
    fit = arguments.default_batch_size(1 << 40, (1, side, side), torch.device("cpu"))
    options = {"shape": (1, side, side), "schedule": Schedule([0.995]), "seed": 0}
    conditions = torch.linspace(-1, 1, fit + 1)

    def answer(x, t, index=None):
        index = torch.arange(len(x)) if index is None else index
        return conditions[index][:, None, None, None].expand(x.shape).contiguous()

    def draw(n, **given):
        return warned(lambda: fastddpm.sample(answer, n, prediction="sample", **options, **given))

    _, messages = draw(fit + 1)
    said = f"batch_size: the {fit + 1} images are drawn {fit} at a time, .* class_labels=torch.arange\\({fit + 1}\\)"
    assert len(messages) == 1 and re.search(said, messages[0])
    right, messages = draw(fit + 1, class_labels=torch.arange(fit + 1))
    assert not messages and torch.equal(right[:, 0, 0, 0], conditions)
    assert not draw(1)[1] and not draw(fit + 1, batch_size=1)[1]


def test_an_answer_of_another_batch_size_names_the_cause():
    conditions = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).expand(6, 1, 8, 8)
    options = {"schedule": SHORT, "seed": 0, "batch_size": 2}
    says = r"output has shape \[6, 1, 8, 8\]; expected \[2, 1, 8, 8\]. It was called with 2 images; .*torch.arange\(n\)"
    with pytest.raises(fastddpm.sampling.SamplingError, match=says):
        fastddpm.sample(lambda x, t: conditions, 6, shape=(1, 8, 8), **options)
    with pytest.raises(fastddpm.errors.LikelihoodError, match=says):
        fastddpm.likelihood(lambda x, t: conditions, PICTURES, **options)
    with pytest.raises(fastddpm.sampling.SamplingError, match=r"expected \[2, 1, 8, 8\]$"):
        fastddpm.sample(lambda x, t: conditions[:2, :, 1:], 6, shape=(1, 8, 8), **options)


# ------------------------------------------------------------------------------------------- numbers of every kind

INTEGERS = [np.int64, np.int32, np.uint8, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int32)]
FLOATS = [np.float32, np.float64, np.array, torch.tensor]


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_other_kinds(kind):
    model = unet({"num_classes": 4})
    shape = tuple(map(kind, model.shape))
    options = {"steps": kind(2), "seed": kind(5), "class_labels": kind(3)}
    plain = {"steps": 2, "seed": 5, "class_labels": 3}
    first = {"first": kind(1), "batch_size": kind(2)}
    calls = [
        (
            lambda n, **o: fastddpm.sample(model, n, **o),
            (kind(3), 3),
            {**options, **first, "shape": shape},
            {**plain, "first": 1},
        ),
        (
            lambda n, **o: fastddpm.progressive(model, n, **o),
            (kind(3), 3),
            {**options, "frames": kind(2)},
            {**plain, "frames": 2},
        ),
        (
            lambda w, **o: fastddpm.interpolate(model, PICTURES[:2], PICTURES[2:], weights=w, **o),
            (kind(2), 2),
            {**options, **first, "t": kind(3)},
            {**plain, "first": 1, "t": 3},
        ),
        (
            lambda label, **o: fastddpm.encode(model, PICTURES, class_labels=label, **o),
            (kind(1), 1),
            {"steps": kind(2), "batch_size": kind(2)},
            {"steps": 2},
        ),
        (
            lambda k, **o: fastddpm.likelihood(model, PICTURES, subsample=k, **o).per_image,
            (kind(2), 2),
            {"seed": kind(5), "class_labels": kind(3), **first},
            {"seed": 5, "class_labels": 3, "first": 1},
        ),
        (
            lambda label, **o: fastddpm.rate_distortion(model, PICTURES, class_labels=label, **o).rate,
            (kind(2), 2),
            {"seed": kind(5), **first},
            {"seed": 5, "first": 1},
        ),
        (
            lambda label, **o: fastddpm.training_loss(model, PICTURES, class_labels=label, **o).detach(),
            (kind(2), 2),
            {"seed": kind(5), "first": kind(1)},
            {"seed": 5, "first": 1},
        ),
    ]
    for call, (given_, usual), of_kind, as_usual in calls:
        torch.testing.assert_close(call(given_, **of_kind), call(usual, **as_usual), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_evaluation_takes_them_and_writes_the_same(kind, tmp_path):
    model = unet({"num_classes": 4})
    samples.draw(
        model, tmp_path / "e", kind(3), seed=kind(1), shard=kind(2), batch_size=kind(2), steps=kind(2), class_labels=kind(3),
        sampler="ddim", eta=np.float32(0.5), clip=torch.tensor(0.5),
    )  # fmt: skip
    same = {"seed": 1, "steps": 2, "class_labels": 3, "sampler": "ddim", "eta": 0.5, "clip": 0.5}
    shards = samples.draw(model, tmp_path / "e", 3, **same)  # refused where settings.json has another value
    assert len(shards.load(range(3))) == 3


@pytest.mark.parametrize(
    "labels",
    [
        [2, 0, 1, 3], (2, 0, 1, 3), range(4), np.arange(4), np.arange(4, dtype=np.uint8), torch.arange(4, dtype=torch.int32),
        torch.arange(4, dtype=torch.uint8), [np.int64(2), 0, 1, 3], list(torch.arange(4)),
    ],
    ids=lambda v: f"{type(v).__name__} of {getattr(v, 'dtype', type(v[0]).__name__)}",
)  # fmt: skip
def test_labels_of_other_kinds(labels):
    model, usual = unet({"num_classes": 4}), torch.tensor([int(v) for v in labels])
    for call in (
        lambda y: fastddpm.sample(model, 4, seed=0, class_labels=y),
        lambda y: fastddpm.progressive(model, 4, frames=1, seed=0, class_labels=y),
        lambda y: fastddpm.encode(model, PICTURES, steps=2, class_labels=y),
        lambda y: fastddpm.interpolate(model, PICTURES, PICTURES.flip(0), weights=1, seed=0, class_labels=y),
        lambda y: fastddpm.likelihood(model, PICTURES, seed=0, class_labels=y).per_image,
        lambda y: fastddpm.rate_distortion(model, PICTURES, seed=0, class_labels=y).rate,
        lambda y: fastddpm.training_loss(model, PICTURES, seed=0, class_labels=y).detach(),
    ):
        assert torch.equal(call(labels), call(usual))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0.0, 1.0], r"got torch.float32 \[2\]; expected an int or int64 \[2\]"),
        (np.array([0.5, 1]), r"got torch.float64 \[2\]"),
        (torch.tensor(1.0), r"got torch.float32 \[\]"),
        ([True, False], r"got torch.bool \[2\]"),
        (True, r"got torch.bool \[\]"),
        (np.True_, r"got torch.bool \[\]"),
        ([0, 1, 2], r"got torch.int64 \[3\]"),
        ([[0, 1]], r"got torch.int64 \[1, 2\]"),
        (["a", "b"], r"got \['a', 'b'\]; expected an int or int64 \[2\]"),
        ("ab", "got 'ab'"),
        (np.array(["a", "b"]), "got array"),
        ([0, 4], r"got values from 0 to 4; expected 0\.\.3"),
    ],
    ids=str,
)
def test_labels_that_are_refused(labels, says):
    with pytest.raises(ValueError, match=f"class_labels: {says}"):
        fastddpm.sample(unet({"num_classes": 4}), 2, class_labels=labels)


def test_no_labels_for_no_images():
    assert fastddpm.sample(unet({"num_classes": 4}), 0, class_labels=[]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_of_other_kinds(kind):
    model = unet()
    got = fastddpm.sample(model, 2, sampler="ddim", steps=3, eta=kind(0.5), clip=kind(0.25), seed=0)
    assert torch.equal(got, fastddpm.sample(model, 2, sampler="ddim", steps=3, eta=0.5, clip=0.25, seed=0))
    bound = fastddpm.likelihood(model, PICTURES, clip=kind(0.25), seed=0)
    assert torch.equal(bound.per_image, fastddpm.likelihood(model, PICTURES, clip=0.25, seed=0).per_image)
    mixed = fastddpm.interpolate(model, PICTURES, PICTURES.flip(0), weights=[kind(0.5)], seed=0)
    assert torch.equal(mixed, fastddpm.interpolate(model, PICTURES, PICTURES.flip(0), weights=[0.5], seed=0))


@pytest.mark.parametrize(
    "bad", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), torch.tensor(2.0), [2], torch.tensor([2])]
)
def test_booleans_floats_and_lists_are_no_integers(bad):
    model = unet()
    for call, says in (
        (lambda: fastddpm.sample(model, bad), "n: got"),
        (lambda: fastddpm.sample(model, 1, seed=bad), "seed: got"),
        (lambda: fastddpm.sample(model, 1, steps=bad), "steps: got"),
        (lambda: fastddpm.sample(model, 1, first=bad), "first: got"),
        (lambda: fastddpm.sample(model, 1, batch_size=bad), "batch_size: got"),
        (lambda: fastddpm.sample(model, 1, shape=(1, 8, bad)), "shape: got"),
        (lambda: fastddpm.likelihood(model, PICTURES, subsample=bad), "subsample: got"),
        (lambda: fastddpm.interpolate(model, PICTURES, PICTURES, t=bad), "t: got"),
        (lambda: fastddpm.progressive(model, 1, frames=bad), "frames: got"),
        (lambda: fastddpm.training_loss(model, PICTURES, seed=bad), "seed: got"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            call()


def test_the_ops_take_them_too():
    expected = fastddpm.ops.philox_normal((2, 3), seed=2**64 - 1, t=1, stream=0, first=4)
    given_ = {"seed": np.uint64(2**64 - 1), "first": np.int64(4)}
    for normals in (fastddpm.ops.philox_normal, fastddpm.ops.philox_normal_ref):
        torch.testing.assert_close(normals((2, 3), t=1, stream=0, **given_), expected, rtol=0, atol=4e-6)


# ------------------------------------------------------------------------------------------------- what fits a network


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_sides_that_the_levels_cannot_halve(height, width, levels, diffusers):
    multiple = 1 << levels - 1
    if diffusers:
        blocks = {"block_out_channels": (8,) * levels, "in_channels": 1, "out_channels": 1}
        kinds = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
        model = theirs(sample_size=16, **blocks, **kinds)
    else:
        model = unet({"sample_size": 16, "channel_mult": (1,) * levels})
    x = torch.zeros(1, 1, height, width)
    given_ = {"schedule": Schedule([0.5])}
    calls = {
        "shape": lambda m: fastddpm.sample(m, 1, shape=(1, height, width), variance="fixed_large", **given_),
        "images": lambda m: fastddpm.encode(m, x, **given_),
        "a": lambda m: fastddpm.interpolate(m, x, x, weights=1, **given_),
        "x0": lambda m: fastddpm.training_loss(m, x, **given_),
    }
    if height % multiple == width % multiple == 0:
        for call in calls.values():
            call(model)
        return
    sizes = [(s(height / multiple) * multiple, s(width / multiple) * multiple) for s in (np.floor, np.ceil)]
    fitting = " and ".join(f"{int(h)}x{int(w)}" for h, w in sizes if h and w)
    calls["images "] = lambda m: fastddpm.likelihood(m, torch.zeros(1, 1, height, width, dtype=torch.uint8), **given_)
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call(model)
        said = f"{name.strip()}: {height}x{width} cannot be halved {levels - 1} times, as the network does; "
        assert str(error.value).startswith(f"{said}the nearest that can: {fitting}")


def test_sizes_are_checked_of_a_network_with_a_backward_hook():
    """It takes no part in a call, so that the network's levels restrict x as before."""
    model = UNet(UNetConfig(**{**TINY, "in_channels": 1, "channel_mult": (1, 1)}), schedule=SHORT)
    model.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be halved"):
        fastddpm.sample(model, 1, shape=(1, 7, 7))


def test_a_forward_that_pads_is_not_asked():
    class Padded(UNet):
        def forward(self, x, t, class_labels=None):
            height, width = x.shape[2:]
            padded = nn.functional.pad(x, (0, -width % 2, 0, -height % 2))
            return super().forward(padded, t, class_labels)[:, :, :height, :width].contiguous()

    torch.manual_seed(0)
    model = Padded(UNetConfig(**{**TINY, "in_channels": 1, "channel_mult": (1, 1)}), schedule=SHORT)
    assert warned(lambda: fastddpm.sample(model, 1, shape=(1, 7, 5)))[0].shape == (1, 1, 7, 5)


def test_a_picture_of_other_channels():
    with pytest.raises(ValueError, match="x0: 2 channels; the network takes 1"):
        fastddpm.training_loss(unet(), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="shape: 1 channels; the network takes 3"):
        fastddpm.sample(theirs(act_fn="gelu"), 1, shape=(1, 8, 8), schedule=SHORT)  # which runs unmodified


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (theirs(in_channels=6), "unet(torch.cat((x, condition), 1), t).sample"),
        (theirs(in_channels=6, act_fn="gelu"), "unet(torch.cat((x, condition), 1), t).sample"),
        (unet({"in_channels": 6, "out_channels": 3}), "unet(torch.cat((x, condition), 1), t)"),
    ],
)
def test_a_network_that_wants_a_condition(model, call):
    x, condition = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    given_ = {"schedule": SHORT}
    for refused in (
        lambda: fastddpm.sample(model, 2, **given_),
        lambda: fastddpm.sample(model, 2, shape=(3, 8, 8), **given_),
        lambda: fastddpm.encode(model, x, **given_),
        lambda: fastddpm.training_loss(model, x, **given_),
        lambda: fastddpm.likelihood(model, x, quantize=True, **given_),
    ):
        with pytest.raises(
            ValueError, match="model: the network takes 6 channels and returns 3: it requires a condition"
        ) as error:
            refused()
        assert f"lambda x, t: {call}, with shape=(3, 8, 8)" in str(error.value)
    way = eval(f"lambda x, t: {call}", {"unet": model, "torch": torch, "condition": condition})
    assert fastddpm.sample(way, 2, shape=(3, 8, 8), **given_).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("shape", [(7, 16), (16,), (1, 8, 8, 8), np.array([2, 3])])
def test_another_number_of_dimensions_has_a_way_out(shape):
    seen = []

    def model(x, t):
        seen.append(tuple(x.shape))
        return x / 2

    with pytest.raises(
        ValueError, match=r"shape: got \(.*\); expected \(C, H, W\), each an int >= 1\. Data of other"
    ) as error:
        fastddpm.sample(model, 2, shape=shape, schedule=SHORT)
    arguments_ = (
        str(error.value).partition("as many elements: ")[2].replace(" and lambda x, t:", ", model=lambda x, t:")
    )
    way = eval(f"dict({arguments_})", {"model": model})
    x = fastddpm.sample(way["model"], 2, shape=way["shape"], schedule=SHORT)
    assert x.numel() == 2 * np.prod(shape) and set(seen) == {(2, *(int(v) for v in shape))}


@pytest.mark.parametrize("bad", [8, None, "8x8", (0, 8), (3, 8.5), (3, 8, -1), ()])
def test_shapes_that_are_none(bad):
    with pytest.raises(ValueError, match="^shape: ") as error:
        fastddpm.sample(Silent(), 1, shape=bad, schedule=SHORT)
    assert "other dimensions" not in str(error.value)


def test_a_sample_size_that_is_no_int():
    for size in ((24, 80), [8, 8], 8.0, None):
        with pytest.raises(
            ValueError, match=r"sample_size: got .*; expected an int, the side of a square image\. .*shape=\(C, H, W\)"
        ):
            UNetConfig(sample_size=size)


def test_every_function_names_what_is_no_model():
    for call in CALLS.values():
        with pytest.raises(ValueError, match="model: got int; expected a fastddpm.UNet or a callable"):
            call(3)
