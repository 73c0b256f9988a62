"""The network: parameter counts, diffusers' UNet2DModel with the same weights, initialisation, body(x, embed(t))."""

import dataclasses
import inspect
import math

import pytest
import torch
from conftest import randomised

from fastddpm import Schedule, UNet, UNetConfig, backend
from fastddpm.models.config import OLD_NAMES
from fastddpm.models.unet import GroupNormSiLU

SMALL = UNetConfig(sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)


def as_diffusers(config: UNetConfig):
    diffusers = pytest.importorskip("diffusers")
    sides = [config.sample_size >> i for i in range(len(config.channel_mult))]
    return diffusers.UNet2DModel(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(config.channels * m for m in config.channel_mult),
        down_block_types=tuple(
            "AttnDownBlock2D" if s in config.attention_resolutions else "DownBlock2D" for s in sides
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if s in config.attention_resolutions else "UpBlock2D" for s in reversed(sides)
        ),
        layers_per_block=config.num_res_blocks,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_num_groups=config.norm_groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        num_class_embeds=config.num_classes,
    ).eval()


def embedding_float64(timesteps, dim, **_):
    k = torch.arange(dim // 2, dtype=torch.float64)
    angles = timesteps.double()[:, None] * torch.exp(-math.log(10000) * k / (dim // 2 - 1))
    return torch.cat((angles.sin(), angles.cos()), dim=1)


@pytest.mark.parametrize(("preset", "count"), [("cifar10", 35_746_307), ("lsun256", 113_673_219)])
def test_parameter_count(preset, count):
    with torch.device("meta"):
        model = UNet.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(
            SMALL, num_res_blocks=1, attention_resolutions=(), in_channels=1, out_channels=2
        ),  # a learned variance
        dataclasses.replace(SMALL, channel_mult=(1, 1, 2), attention_resolutions=(8, 2)),
        dataclasses.replace(SMALL, num_classes=5),
    ],
)
def test_equals_diffusers_in_float64(config, monkeypatch):
    peer = as_diffusers(config).double()
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding_float64)
    model = randomised(config).double()
    peer.load_state_dict(model.state_dict())  # strict: the names and shapes are diffusers' own
    x = torch.randn(3, config.in_channels, config.sample_size, config.sample_size, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2]) if config.num_classes else None
    for t in ([0, 1, 2], [17, 500, 999]):
        t = torch.tensor(t)
        with torch.no_grad():
            ours, theirs = model(x, t, labels), peer(x, t, class_labels=labels).sample
        assert (ours - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@pytest.mark.slow
def test_cifar10_equals_diffusers_at_every_t(monkeypatch):
    """The embedding at all 1000 timesteps, and the whole 35.7M network at a few."""
    config = dataclasses.replace(UNet.from_preset("cifar10").config, dropout=0.0)
    peer = as_diffusers(config).double()
    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding_float64)
    model = randomised(config).double()
    peer.load_state_dict(model.state_dict())
    t = torch.arange(1000)
    with torch.no_grad():
        assert (model.time_embedding(t) - peer.time_embedding(peer.time_proj(t))).abs().max() <= 1e-10
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        for t in ([0, 1, 2, 3], [250, 500, 998, 999]):
            theirs = peer(x, torch.tensor(t)).sample
            assert (model(x, torch.tensor(t)) - theirs).abs().max() <= 1e-10 * max(1, theirs.abs().max())


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_with_float64(name, dtype):
    if backend.unavailable_reason(name):
        pytest.skip(backend.unavailable_reason(name))
    model, x, t = randomised(SMALL), torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    with torch.no_grad():
        truth = model.double()(x.double(), t)
        model = model.to(dtype)
        with backend.use(name):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                got = model(x.to(dtype).contiguous(memory_format=memory_format), t)
                bound = 1e-5 if dtype == torch.float32 else 0.1
                assert (got.double() - truth).abs().max() <= bound * truth.abs().max()


def test_gradients_agree_with_float64():
    model, x, t = randomised(SMALL), torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    model(x, t).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.double()(x.double(), t).square().sum().backward()
    for name, p in model.named_parameters():
        assert (got[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-5, name


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = UNet.from_preset("digits")
    for name, module in model.named_modules():
        if isinstance(module, GroupNormSiLU):
            assert (module.weight == 1).all() and not module.bias.any(), name
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert type(module) in (torch.nn.Conv2d, torch.nn.Linear), name  # what quantisers and the like look for
            fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))  # Xavier uniform
            if name.endswith(("conv2", "conv_out", "to_out.0")):
                bound *= 1e-5
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
            assert not module.bias.any(), name


def test_made_without_memory():
    with torch.device("meta"):
        model = UNet(dataclasses.replace(SMALL, num_classes=3), schedule=Schedule.linear())
    assert all(p.is_meta for p in model.parameters())
    like = randomised(dataclasses.replace(SMALL, num_classes=3))
    model.to_empty(device="cpu").load_state_dict(like.state_dict())
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 999]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(model.eval()(x, t, labels), like(x, t, labels))


def test_body_takes_a_row_of_the_table():
    """What the sampling loop relies on: embed(all t)[i] as [width] does what embed(t_i) as [N, width] does."""
    model, x = randomised(SMALL), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        table = model.embed(torch.tensor([5, 700]))
        torch.testing.assert_close(model.body(x, [v[1] for v in table]), model(x, torch.tensor([700, 700])))


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="preset: unknown name 'x'"):
        UNet.from_preset("x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm_groups": 5}, "norm_groups: 8 channels cannot be divided into 5 groups"),
        ({"sample_size": 9}, "sample_size: 9 cannot be halved"),
        ({"dropout": 1.5}, "dropout: got 1.5"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"num_classes": 0}, "num_classes"),
        ({"channels": 0}, "channels: got 0"),
    ],
)
def test_bad_config(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SMALL, **change)


def test_old_names_of_options_are_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning) as caught:
        config = UNetConfig(sample_size=8, channels=8, multipliers=(1, 2), attention=(4,), groups=4)
    assert config == SMALL
    (warning,) = caught
    assert warning.filename == __file__ and str(warning.message) == (
        "fastddpm: UNetConfig: multipliers is now channel_mult, attention is now attention_resolutions, groups is now norm_groups"
    )
    with pytest.warns(DeprecationWarning, match="classes is now num_classes") as caught:
        assert dataclasses.replace(SMALL, classes=3).num_classes == 3
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="multipliers is now channel_mult") as caught:
        assert SMALL.multipliers == (1, 2)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="'UNetConfig' object has no attribute 'width'"):
        SMALL.width  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'width'"):
        UNetConfig(width=3)
    fields = [field.name for field in dataclasses.fields(UNetConfig)]
    assert list(inspect.signature(UNetConfig).parameters) == fields and set(OLD_NAMES.values()) < set(fields)


def test_bad_inputs():
    model = UNet(SMALL)
    with pytest.raises(ValueError, match=r"x: got shape \[1, 1, 8, 8\]"):
        model(torch.zeros(1, 1, 8, 8), torch.tensor([0]))
    with pytest.raises(ValueError, match="class_labels: .* no classes"):
        model(torch.zeros(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))
