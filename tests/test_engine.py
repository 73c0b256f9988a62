"""The engine's copy of a network against the network: merged layers are the same function, changed layers stay as they are."""

import types

import pytest
import torch
from conftest import randomised
from torch import nn

from fastddpm import UNetConfig, merged
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


class Adapted(nn.Module):
    """A linear layer with something learned beside it, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.beside = base, nn.Linear(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.beside(x)


def adapt(model):
    attention = model.mid_block.attentions[0]
    attention.to_q = Adapted(attention.to_q)


def hook(model):
    model.mid_block.attentions[0].to_out[0].register_forward_hook(lambda module, args, output: 2 * output)


def hook_before(model):
    model.up_blocks[0].upsamplers[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def patch(model):
    upsample = model.up_blocks[0].upsamplers[0]
    upsample.forward = types.MethodType(
        lambda self, x: self.conv(nn.functional.interpolate(x, scale_factor=2.0)) + 1, upsample
    )


def tile(model):
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular"


@pytest.mark.parametrize("change", [adapt, hook, hook_before, patch, tile])
def test_changed_layers_are_kept(change):
    model = randomised(CONFIGS["two levels"]).double()
    change(model)
    model.double()
    expected, got = both(model, torch.float64)
    assert (got - expected).norm() <= 1e-12 * expected.norm()
