"""The engine's copy of a network against the network: merged layers are the same function, changed layers stay as they are."""

import copy
import types

import pytest
import torch
from conftest import randomised
from torch import nn

from fastddpm import UNet, UNetConfig, merged
from fastddpm.engine import Engine
from fastddpm.unet import Upsample

CPU = torch.device("cpu")
CONFIGS = {
    "two levels": UNetConfig(sample_size=8, channels=8, multipliers=(1, 2), attention=(4,), groups=4),
    "three levels, two attentions": UNetConfig(
        sample_size=12, in_channels=1, channels=8, multipliers=(1, 1, 3), attention=(12, 6), groups=8, blocks=1
    ),
    "classes": UNetConfig(
        sample_size=8, in_channels=2, out_channels=4, channels=8, multipliers=(2, 2), groups=2, classes=3
    ),
}


def both(model, dtype, n=3):
    """The network's answer in float64 and the engine's in dtype, float64 again, to the same noise."""
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    t = torch.arange(n) * 300
    labels = None if model.config.classes is None else torch.arange(n) % model.config.classes
    engine = Engine(model, CPU, dtype)
    with torch.inference_mode():
        for _ in range(2):  # the first call packs the weights
            got = engine(x.to(dtype, memory_format=torch.channels_last), t, labels)
        return model.double()(x, t, labels), got.double()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_engine_is_the_network(config, dtype, bound):
    model = randomised(config)
    expected, got = both(model.to(dtype), dtype)
    assert (got - expected).norm() <= bound * expected.norm()


def test_every_layer_that_can_be_merged_is():
    model = randomised(CONFIGS["two levels"])
    kinds = [type(m) for m in Engine(model, CPU, torch.float32).model.modules()]
    assert kinds.count(merged.MergedAttention) == 6 and kinds.count(merged.MergedResBlock) == len(model.resblocks())
    assert nn.Conv2d not in kinds and Upsample not in kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn(monkeypatch, dtype):
    monkeypatch.setattr(merged, "_onednn_takes", lambda x: False)
    model = randomised(CONFIGS["two levels"]).to(dtype)
    expected, got = both(model, dtype)
    assert (got - expected).norm() <= (2e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_weights_are_packed_once():
    """And serve any batch size; the unpacked ones are let go."""
    model = randomised(CONFIGS["two levels"])
    engine = Engine(model, CPU, torch.float32)
    layers = [m for m in engine.model.modules() if isinstance(m, merged.Convolution)]
    packed = []
    for n in (2, 5):
        x, t = torch.randn(n, *model.shape), torch.arange(n)
        with torch.inference_mode():
            torch.testing.assert_close(engine(x, t, None), model(x, t), rtol=0, atol=2e-5)
        packed.append([layer.packed for layer in layers])
        assert all(layer.weight is None for layer in layers)
    assert all(a is b and a is not None for a, b in zip(*packed, strict=True))


def test_onednn_switched_off():
    model = randomised(CONFIGS["two levels"])
    with torch.backends.mkldnn.flags(enabled=False):
        engine = Engine(model, CPU, torch.float32)
        with torch.inference_mode():
            engine(torch.randn(1, *model.shape), torch.arange(1), None)
    assert all(m.packed is None for m in engine.model.modules() if isinstance(m, merged.Convolution))


class Adapted(nn.Module):
    """A layer with something learned beside it that reads the layer's weight, as DoRA does."""

    def __init__(self, base):
        super().__init__()
        self.base, self.beside = base, copy.deepcopy(base)

    def forward(self, x):
        return self.base(x) + self.beside(x) / self.base.weight.norm()


def adapt_linear(model):
    attention = model.mid_block.attentions[0]
    attention.to_q = Adapted(attention.to_q)


def adapt_convolution(model):
    model.mid_block.resnets[0].conv1 = Adapted(model.mid_block.resnets[0].conv1)


def hook(model):
    model.mid_block.attentions[0].to_out[0].register_forward_hook(lambda module, args, output: 2 * output)


def hook_before(model):
    model.up_blocks[0].upsamplers[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_that_reads(model):
    model.mid_block.resnets[1].register_forward_pre_hook(
        lambda module, args: tuple(v.to(module.conv1.weight.dtype) for v in args)
    )


def patch(model):
    upsample = model.up_blocks[0].upsamplers[0]
    upsample.forward = types.MethodType(
        lambda self, x: self.conv(nn.functional.interpolate(x, scale_factor=2.0)) + 1, upsample
    )


def hook_a_container(model):
    model.down_blocks[0].downsamplers[0].register_forward_pre_hook(
        lambda module, args: tuple(v.to(module.conv.weight.dtype) for v in args)
    )


def tile(model):
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"


def dilate(model):
    model.mid_block.resnets[0].conv1.dilation = (2, 2)
    model.mid_block.resnets[0].conv1.padding = (2, 2)


def pad_by_name(model):
    model.conv_in.padding = "same"


def another_kernel(model):
    width = model.up_blocks[0].upsamplers[0].conv.in_channels
    model.up_blocks[0].upsamplers[0].conv = nn.Conv2d(width, width, 1)
    model.conv_in = nn.Conv2d(3, model.conv_in.out_channels, (3, 1), padding=(1, 0))


def groups(model):
    width = model.mid_block.resnets[0].conv1.in_channels
    model.mid_block.resnets[0].conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)


def narrow_attention(model):
    attention = model.mid_block.attentions[0]
    for name in ("to_q", "to_k"):
        setattr(attention, name, nn.Linear(attention.to_q.in_features, 4))


def no_bias(model):
    model.mid_block.resnets[0].conv2.bias = model.mid_block.attentions[0].to_v.bias = None


CHANGES = [
    adapt_linear, adapt_convolution, hook, hook_before, hook_that_reads, patch, hook_a_container, tile, dilate,
    pad_by_name, another_kernel, groups, narrow_attention, no_bias,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_kept(change, dtype):
    model = randomised(CONFIGS["two levels"])
    change(model)
    model.to(dtype)
    expected, got = both(model, dtype)
    assert (got - expected).norm() <= (1e-12 if dtype == torch.float64 else 2e-5) * expected.norm()


def test_another_body_is_kept():
    class Reads(UNet):
        def body(self, x, embedding):
            return super().body(x.to(self.conv_in.weight.dtype), embedding)

    model = Reads(CONFIGS["two levels"]).eval()
    engine, x, t = Engine(model, CPU, torch.float32), torch.randn(2, *model.shape), torch.arange(2)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(engine(x, t, None), model(x, t), rtol=0, atol=2e-5)


def test_under_autocast():
    model = randomised(CONFIGS["classes"])
    x, t, labels = torch.randn(2, *model.shape), torch.arange(2), torch.arange(2)
    with torch.inference_mode():
        truth = model(x, t, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = Engine(model, CPU, torch.float32)(x, t, labels)
    assert got.dtype == torch.bfloat16 and (got - truth).norm() <= 5e-2 * truth.norm()
