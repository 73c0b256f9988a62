"""`fuse_norms` replaces norms by the kernel in place, computes the same function, skips unknown modules and can be undone."""

import copy
import pickle

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastddpm
from fastddpm import backend, fuse_norms
from fastddpm.inputs import adopt
from fastddpm.integrations import fused_layers
from fastddpm.integrations.fused_layers import FusedGroupNorm, FusedSequential

TINY = {
    "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
UNETS = {
    "default": {},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "resampled by blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "downsample_type": "resnet",
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "upsample_type": "resnet",
        "mid_block_scale_factor": 2.0,
    },
}  # fmt: skip


def perturbed(model):
    """Give the norms random parameters, because fresh norms multiply by 1 and add 0."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.GroupNorm) and layer.affine:
                layer.weight.add_(torch.randn_like(layer.weight) * 0.3)
                layer.bias.add_(torch.randn_like(layer.bias) * 0.3)
    return model


def unet2d(**options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return perturbed(diffusers.UNet2DModel(**{**TINY, **options})).eval()


@pytest.fixture
def calls(monkeypatch):
    """Record each call of the kernel, and whether it includes SiLU."""
    seen = []
    op = fused_layers.ops.group_norm_silu
    monkeypatch.setattr(
        fused_layers.ops,
        "group_norm_silu",
        lambda *args, **options: seen.append(options["silu"]) or op(*args, **options),
    )
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_a_unet2dmodel_is_the_same_function(options, layout, dtype, calls, kernels):
    model = unet2d(**options).to(memory_format=layout)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 17, 999])
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double(), t).sample
        model, x = model.to(dtype), x.to(dtype, memory_format=layout)
        plain = model(x, t).sample
        names, state = dict(model.named_modules()).keys(), {k: v.clone() for k, v in model.state_dict().items()}
        report = fuse_norms(model)
        got = model(x, t).sample
        if dtype == torch.float64:  # which the kernel doesn't serve
            assert same_bits(got, plain) and not calls
        else:
            blocks = sum(type(m).__name__ == "FusedResnetBlock2D" for m in model.modules())
            others = len([m for m in model.modules() if isinstance(m, nn.GroupNorm)]) - 2 * blocks
            assert calls.count(True) == 2 * blocks == 2 * report.swapped["ResnetBlock2D (2 norms with SiLU each)"]
            assert others == report.swapped["GroupNorm"]
            # All but the last are attention's, which has channels_last images as [N, C, H*W], and gives its result so.
            assert calls.count(False) == (1 if layout is torch.channels_last else 3)
        assert dict(model.named_modules()).keys() == names and not report.skipped
        assert all(same_bits(v, state[k]) for k, v in model.state_dict().items()) and len(model.state_dict()) == len(
            state
        )
        error, own = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
        assert error <= 2 * own + 1e-6 * truth.abs().max()
        report.undo()
        calls.clear()
        assert same_bits(model(x, t).sample, plain) and not calls
        report.undo()


def test_what_it_says():
    model = unet2d(act_fn="gelu")
    assert "ResnetBlock2D" not in fuse_norms(model).swapped
    model = unet2d()
    report = fuse_norms(model)
    assert str(report) == "8 ResnetBlock2D (2 norms with SiLU each), 5 GroupNorm"
    assert str(fuse_norms(model)) == "29 modules fused before"
    report.undo()
    assert str(fuse_norms(model)) == str(report)


@pytest.mark.parametrize("again", [lambda model: model, copy.deepcopy])
def test_undone_by_a_later_report(again):
    model = nn.Sequential(unet2d(), nn.GroupNorm(2, 4), nn.SiLU())
    classes = [type(m) for m in model.modules()]
    fuse_norms(model)
    model = again(model)
    assert [type(m) for m in model.modules()] != classes
    fuse_norms(model).undo()
    assert [type(m) for m in model.modules()] == classes


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def test_what_is_left():
    model = nn.Sequential(GroupNorm32(2, 4), nn.SiLU(), nn.GroupNorm(2, 4, affine=False), nn.SiLU(), nn.Conv2d(4, 4, 1))
    report = fuse_norms(model)
    assert type(model) is nn.Sequential and not report.swapped
    assert report.skipped == {"0": "GroupNorm32, a subclass of GroupNorm", "2": "a GroupNorm without weights or bias"}
    assert "nothing to fuse; skipped: 0 (GroupNorm32, a subclass of GroupNorm), 2 (" in str(report)
    with pytest.raises(TypeError, match="module: got function; expected a torch.nn.Module"):
        fuse_norms(lambda x: x)
    assert str(fuse_norms(fastddpm.UNet.from_preset("digits"))) == "nothing to fuse"  # it has layers of its own


def test_whose_own_code_is_left():
    resnet = pytest.importorskip("diffusers.models.resnet")

    class Block(resnet.ResnetBlock2D):
        pass

    class Stack(nn.Sequential):
        pass

    options = {"in_channels": 8, "temb_channels": 4, "groups": 2}
    model = nn.ModuleDict({
        "block": Block(**options), "stack": Stack(nn.GroupNorm(2, 4), nn.SiLU()),
        "patched": resnet.ResnetBlock2D(**options), "pair": nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()),
        "gelu": resnet.ResnetBlock2D(**options, non_linearity="gelu"), "hooked": resnet.ResnetBlock2D(**options),
    })  # fmt: skip
    for name in ("patched", "pair"):
        model[name].forward = model[name].forward  # as some libraries do
    model["hooked"].norm2.register_forward_hook(lambda *_: None)
    report = fuse_norms(model)
    assert report.skipped == {
        "block": "Block, a subclass of ResnetBlock2D", "stack": "Stack, a subclass of Sequential",
        "patched": "a ResnetBlock2D with a forward put into it", "pair": "a Sequential with a forward put into it",
        "gelu": "a ResnetBlock2D: its nonlinearity has hooks, or is no SiLU",
        "hooked": "a ResnetBlock2D: its norm2 has hooks, or is no GroupNorm with weights and a bias",
    }  # fmt: skip
    assert report.swapped == {"GroupNorm": 10} and report.before == 0


def test_a_block_that_is_given_no_timestep(calls, kernels):
    """Autoencoders have blocks without a time embedding, with any time_embedding_norm."""
    resnet = pytest.importorskip("diffusers.models.resnet")
    x = torch.randn(2, 8, 4, 4)
    for norm in ("default", "group"):
        torch.manual_seed(0)
        block = perturbed(resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=2, time_embedding_norm=norm))
        expected = block(x, None)
        assert str(fuse_norms(block)) == "1 ResnetBlock2D (2 norms with SiLU each)"
        calls.clear()
        torch.testing.assert_close(block(x, None), expected, rtol=0, atol=1e-5)
        assert calls == [True, True]


def test_one_image_of_channels_inner_keeps_torch_s_layout(kernels):
    norm = perturbed(nn.Sequential(nn.GroupNorm(2, 8)))
    x = torch.randn(4, 4, 8).permute(2, 0, 1)[None]
    expected = norm(x)
    fuse_norms(norm)
    assert norm(x).stride() == expected.stride()
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-5)


def own_forward(pair):
    forward = pair[0].forward
    pair[0].forward = lambda x: forward(x) + 1


def own_activation(pair):
    pair[1].forward = lambda x: x


def no_bias(pair):
    pair[0].bias = None


@pytest.mark.parametrize("change", [own_forward, own_activation, no_bias])
def test_user_code_put_in_is_kept(change, kernels):
    """User code may be put in before or after the norms are fused."""
    x = torch.randn(2, 4, 5, 5)
    for early in (True, False):
        pair = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
        twin = copy.deepcopy(pair)
        change(twin)
        if early:
            change(pair)
        report = fuse_norms(pair)
        assert ("0" in report.skipped) == (early and change is not own_activation)
        if not early:
            change(pair)
        torch.testing.assert_close(pair(x), twin(x), rtol=0, atol=1e-5)


def test_what_the_kernel_has_no_rule_for(kernels):
    """Unsupported calls: torch.func, forward-mode derivatives, a compiled call with gaps."""
    pair = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    x, v = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    gapped = torch.randn(2, 4, 6, 12)[..., ::2]
    expected = torch.func.jvp(pair, (x,), (v,))[1], torch.func.grad(lambda x: pair(x).sum())(x), pair(gapped)
    fuse_norms(pair)
    torch._dynamo.reset()
    with torch.autograd.forward_ad.dual_level():
        dual = pair(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    got = (
        torch.func.jvp(pair, (x,), (v,))[1], torch.func.grad(lambda x: pair(x).sum())(x),
        torch.compile(pair, backend="aot_eager")(gapped),
    )  # fmt: skip
    for a, b in zip((*got, tangent), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_undo_leaves_what_others_have_made_of_it(kernels):
    pair = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    x = torch.randn(2, 4, 5, 5)
    report = fuse_norms(pair)
    nn.utils.parametrize.register_parametrization(pair[0], "weight", nn.Identity())
    expected = pair(x)
    report.undo()
    assert type(pair) is nn.Sequential
    torch.testing.assert_close(pair(input=x), expected, rtol=0, atol=1e-5)


def test_many_images_and_a_skipped_activation(kernels):
    resnet = pytest.importorskip("diffusers.models.resnet")
    for options in ({"up": True}, {"down": True, "skip_time_act": True}, {"dropout": 0.5}):
        torch.manual_seed(0)
        block = perturbed(resnet.ResnetBlock2D(in_channels=4, temb_channels=8, groups=2, **options))
        x, temb = torch.randn(65, 4, 4, 4).to(memory_format=torch.channels_last), torch.randn(65, 8)
        for training in (False, True):
            results = []
            for fused in (False, True):
                block.train(training)
                report = fuse_norms(block) if fused else None
                torch.manual_seed(1)
                results.append(block(x, temb))
            report.undo()
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)


def test_more_rows_of_the_embedding_than_images(kernels):
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = perturbed(resnet.ResnetBlock2D(in_channels=4, temb_channels=8, groups=2))
    x, temb = torch.randn(1, 4, 4, 4), torch.randn(3, 8)
    expected = block(x, temb)
    fuse_norms(block)
    torch.testing.assert_close(block(x, temb), expected, rtol=0, atol=1e-5)


def test_the_module_itself(calls, kernels):
    norm, pair = perturbed(nn.GroupNorm(2, 4)), perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
    x = torch.randn(2, 4, 5, 5)
    for module, silu in ((norm, False), (pair, True)):
        expected = module(x)
        report = fuse_norms(module)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)
        assert calls == [silu]
        calls.clear()
        report.undo()
        assert type(module) in (nn.GroupNorm, nn.Sequential) and same_bits(module(x), expected)


def test_members_of_a_sequential_stay_what_they_are(calls, kernels):
    """guided-diffusion applies the norm, then scale and shift, then the remaining layers."""
    layers = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(4, 4, 3, padding=1)))
    x, scale, shift = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 1, 1), torch.randn(2, 4, 1, 1)

    def block():
        return layers[1:](layers[0](x) * (1 + scale) + shift), layers[:-1](x), layers(x)

    expected = block()
    fuse_norms(layers)
    for a, b in zip(block(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert calls == [False, True, True] and type(layers) is type(layers[:-1]) is FusedSequential


def test_hooks_are_called(calls, kernels):
    layers = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.GroupNorm(2, 4), nn.SiLU()))
    x, seen = torch.randn(2, 4, 5, 5), []
    expected = layers(x)
    fuse_norms(layers)
    handle = layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(layers(x), expected, rtol=0, atol=1e-5)
    assert len(seen) == 1 and calls == [False, True]
    handle.remove()
    layers(x)
    assert len(seen) == 1 and calls[2:] == [True, True]

    model = unet2d()
    fuse_norms(model)
    expected = model(torch.ones(1, 3, 8, 8), 5).sample
    model.mid_block.resnets[0].nonlinearity.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8), 5).sample, expected, rtol=0, atol=1e-5)
    assert len(seen) == 4  # both norms' and the embedding's


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 8),
        torch.randn(3, 8, 5, 7)[..., ::2],
        torch.randn(5, 7, 3, 8).permute(2, 3, 1, 0),
        torch.randn(3, 8, 5, 7, dtype=torch.float16),
        torch.randn(1, 8, 1, 1).expand(3, 8, 5, 7),
        torch.randn(3, 8, 5),
        torch.randn(3, 8, 2, 3, 2),
        torch.randn(0, 8, 5, 7),
    ],
    ids=lambda x: f"{list(x.shape)}, {x.stride()}, {x.dtype}",
)
def test_inputs_of_any_kind(x, kernels):
    norm = perturbed(nn.GroupNorm(4, 8)).to(x.dtype)
    pair = nn.Sequential(norm, nn.SiLU())
    exact = copy.deepcopy(pair).double()
    expected = exact[0](x.double()), exact(x.double())
    with torch.no_grad():
        fuse_norms(pair)
        for got, wanted in zip((norm(x), pair(x)), expected, strict=True):
            assert got.shape == wanted.shape and got.dtype == x.dtype
            rounding = 0 if x.dtype == torch.float32 else 2**-11  # once, to the nearest
            torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=1e-5)


def test_a_dtype_without_products_is_said_once(float32_alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)).bfloat16()
    with pytest.warns(
        UserWarning, match=r"no products of torch.bfloat16, so the module's convolutions .* cast it to float32"
    ) as said:
        fuse_norms(model)
        fuse_norms(model)
        fuse_norms(copy.deepcopy(model).float())
    assert len(said) == 1
    with pytest.warns(UserWarning, match="no products of torch.bfloat16"):  # on a meta device, where a GPU would be
        fuse_norms(nn.GroupNorm(2, 4, device="meta", dtype=torch.bfloat16))


@given(st.data())
def test_any_stack(data):
    layers, c = [], 4
    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(["norm", "silu", "conv", "inner", "relu"]))
        if kind == "inner":
            layers.append(nn.Sequential(nn.GroupNorm(data.draw(st.sampled_from([1, 2, 4])), c), nn.SiLU()))
        elif kind == "norm":
            layers.append(nn.GroupNorm(data.draw(st.sampled_from([1, 2, 4])), c))
        else:
            layers.append({"silu": nn.SiLU(), "relu": nn.ReLU(), "conv": nn.Conv2d(c, c, 3, padding=1)}[kind])
    model = perturbed(nn.Sequential(*layers))
    x = torch.randn(data.draw(st.integers(1, 3)), c, data.draw(st.integers(2, 5)), 4)
    with torch.no_grad():
        expected = model(x)
        report = fuse_norms(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert sum(report.swapped.values()) == norms == sum(type(m) is FusedGroupNorm for m in model.modules())


def test_gradients_agree():
    for options in UNETS.values():
        model = unet2d(**options).train()
        fused = copy.deepcopy(model)
        fuse_norms(fused)
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
        for network in (model, fused):
            network(x, t).sample.square().mean().backward()
        for (name, a), b in zip(model.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(
                b.grad, a.grad, rtol=1e-3, atol=1e-4 * float(a.grad.abs().max()) + 1e-7, msg=name
            )


def test_copied_pickled_compiled():
    model, x = unet2d(), torch.randn(2, 3, 8, 8)
    fuse_norms(model)
    with torch.no_grad():
        expected = model(x, 5).sample
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}
            assert same_bits(other(x, 5).sample, expected)
        torch._dynamo.reset()
        t = torch.tensor([5, 5])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t).sample, expected, rtol=0, atol=1e-5)


def test_a_fused_unet2dmodel_is_sampled_as_a_unet():
    diffusers = pytest.importorskip("diffusers")
    model, scheduler = unet2d(), diffusers.DDPMScheduler(num_train_timesteps=3)
    expected = fastddpm.sample(model, 2, schedule=scheduler, seed=0)
    fuse_norms(model)
    assert isinstance(adopt.as_unet(model)[0], fastddpm.UNet)
    assert same_bits(fastddpm.sample(model, 2, schedule=scheduler, seed=0), expected)


# --- a block's norms as its convolutions take them in


class Convolutions(TorchDispatchMode):
    """Count the convolutions that computed their norm."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.fastddpm.norm_silu_convolution.default
        return func(*args, **(kwargs or {}))


def counted(call):
    with torch.no_grad(), Convolutions() as mode:
        result = call()
    return result, mode.count


def wide_block(**options):
    resnet = pytest.importorskip("diffusers.models.resnet")
    torch.manual_seed(0)
    options = {"in_channels": 32, "out_channels": 64, "temb_channels": 8, "groups": 4, **options}
    return perturbed(resnet.ResnetBlock2D(**options)).eval()


@pytest.fixture
def convolving(kernels):
    if backend.native.cpu_variant() == "generic":
        pytest.skip("not faster on this processor")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_a_wide_unet2dmodel_is_the_same_function(options, layout, convolving):
    options = {**options, "block_out_channels": (32, 64), "sample_size": 16}
    model = unet2d(**options).to(memory_format=layout)
    x, t = torch.randn(4, 3, 16, 16).to(memory_format=layout), torch.tensor([0, 17, 500, 999])
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double(), t).sample
    plain, none = counted(lambda: model(x, t).sample)
    fuse_norms(model)
    got, count = counted(lambda: model(x, t).sample)
    assert none == 0 and count >= 8
    assert got.stride() == plain.stride()
    bound = 1e-6 * truth.abs().max()
    assert (got - truth).abs().max() <= max(2 * (plain - truth).abs().max(), bound)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_channels": 32},
        {"temb_channels": None},
        {"time_embedding_norm": "scale_shift"},
        {"output_scale_factor": 2.0, "skip_time_act": True},
        {"conv_shortcut_bias": False},
        {"dropout": 0.5},
        {"groups_out": 8, "eps": 1e-2},
    ],
    ids=str,
)
def test_wide_blocks(options, convolving):
    block = wide_block(**options)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, temb = torch.randn(3, 32, 12, 10).to(memory_format=layout), torch.randn(3, 8)
        temb = None if "temb_channels" in options else temb
        with torch.no_grad():
            expected = block(x, temb)
        before = x.clone()
        report = fuse_norms(block)
        got, count = counted(lambda x=x, temb=temb: block(x, temb))
        report.undo()
        assert count == 2 and got.stride() == expected.stride()
        assert torch.equal(x, before)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_weights_may_change_between_calls(convolving):
    """Weights may be changed in any way, because nothing derived from them is cached."""
    block, x, temb = wide_block(), torch.randn(2, 32, 16, 16), torch.randn(2, 8)
    fuse_norms(block)
    first, _ = counted(lambda: block(x, temb))
    for layer in (block.conv1, block.conv2, block.norm2):
        layer.weight.data.mul_(-0.5)
    twin = wide_block()
    twin.load_state_dict(block.state_dict())
    got, count = counted(lambda: block(x, temb))
    with torch.no_grad():
        torch.testing.assert_close(got, twin(x, temb), rtol=0, atol=2e-5)
    assert count == 2 and not torch.allclose(got, first)


def hooked(block):
    block.conv1.register_forward_hook(lambda module, given, result: result + 1)


def dilated(block):
    block.conv2 = nn.Conv2d(64, 64, 3, padding=2, dilation=2)


def reflected(block):
    block.conv2.padding_mode, block.conv2._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


def circular(block):
    """Users replace the padding to generate images that can be tiled."""
    for conv in (block.conv1, block.conv2):
        conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
            nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
        )


def grouped(block):
    block.conv2 = nn.Conv2d(64, 64, 3, padding=1, groups=2)


def named_padding(block):
    block.conv1.padding, block.conv1._reversed_padding_repeated_twice = "same", [1, 1, 1, 1]


def own_convolution(block):
    class Shifted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    block.conv2 = Shifted(64, 64, 3, padding=1)


def own_shortcut(block):
    block.conv_shortcut.forward = lambda x: x.repeat(1, 2, 1, 1)


def narrow_shortcut(block):
    block.conv_shortcut = nn.Conv2d(32, 1, 1)  # which is added to all channels


def own_dropout(block):
    block.dropout = nn.Softshrink(0.1)


def training_with_dropout(block):
    block.dropout.p = 0.5
    block.train()


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        dilated,
        reflected,
        circular,
        grouped,
        named_padding,
        own_convolution,
        own_shortcut,
        narrow_shortcut,
        own_dropout,
        training_with_dropout,
    ],
)
def test_blocks_whose_convolutions_are_torchs(change, convolving):
    x, temb, results = torch.randn(2, 32, 16, 16), torch.randn(2, 8), []
    for fused in (False, True):
        block = wide_block()
        torch.manual_seed(1)
        change(block)
        if fused:
            fuse_norms(block)
        torch.manual_seed(2)
        result, count = counted(lambda block=block: block(x, temb))
        assert count == 0
        results.append(result)
    torch.testing.assert_close(*results, rtol=0, atol=2e-5)


def test_calls_whose_convolutions_are_torchs(convolving):
    """Gradients, autocast, another dtype, few or odd pixels, other rows."""
    block, temb = wide_block(), torch.randn(2, 8)
    fuse_norms(block)
    twin = wide_block()
    for size, rows, served in ((16, 2, 2), (16, 1, 2), (10, 2, 0), (15, 2, 0), (16, 3, None)):
        x, given = torch.randn(2, 32, size, size), torch.randn(rows, 8)
        if served is None:  # three rows for two images don't fit
            with pytest.raises(RuntimeError), torch.no_grad():
                block(x, given)
            continue
        got, count = counted(lambda x=x, given=given: block(x, given))
        assert count == served, (size, rows)
        with torch.no_grad():
            torch.testing.assert_close(got, twin(x, given), rtol=0, atol=2e-5)
    x, given = torch.randn(1, 32, 16, 16), torch.randn(3, 8)
    got, count = counted(lambda: block(x, given))  # but one image has as many results as there are rows
    with torch.no_grad():
        torch.testing.assert_close(got, twin(x, given), rtol=0, atol=2e-5)
    assert count == 0 and len(got) == 3
    x = torch.randn(16, 2, 32, 16).permute(1, 2, 0, 3)  # [2, 32, 16, 16]
    got, count = counted(lambda: block(x, temb))
    with torch.no_grad():
        torch.testing.assert_close(got, twin(x, temb), rtol=0, atol=2e-5)
        assert count == 0 and got.stride() == twin(x, temb).stride()
        images = torch.randn(3, 2, 32, 16, 16)
        each = torch.func.vmap(lambda x: block(x, temb))(images)
        torch.testing.assert_close(each, torch.stack([twin(x, temb) for x in images]), rtol=0, atol=2e-5)
    x = torch.randn(2, 32, 16, 16)
    with Convolutions() as mode:
        block(x, temb).sum().backward()
        assert block.conv1.weight.grad is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            block(x, temb)
        with torch.no_grad():
            block.double()(x.double(), temb.double())
            block.bfloat16()(x.bfloat16(), temb.bfloat16())
            with pytest.raises(RuntimeError):
                block(x, temb)  # its weights are of another dtype
    assert mode.count == 0
    for layer in (block.norm1, block.norm2, block.time_emb_proj, block.conv_shortcut):
        layer.float()
    with pytest.raises(RuntimeError, match="same"), torch.no_grad():  # so are its convolutions', as torch says it
        block(x, temb)


def test_a_wide_block_traced_and_compiled(convolving):
    block, x, temb = wide_block(), torch.randn(2, 32, 16, 16), torch.randn(2, 8)
    with torch.no_grad():
        expected = block(x, temb)
        fuse_norms(block)
        torch._dynamo.reset()
        graph = torch.fx.experimental.proxy_tensor.make_fx(block)(x, temb)
        assert "norm_silu_convolution" in graph.code
        for call in (
            graph,
            torch.compile(block, backend="aot_eager", fullgraph=True),
            torch.jit.trace(block, (x, temb)),
        ):
            torch.testing.assert_close(call(2 * x, temb), block(2 * x, temb), rtol=0, atol=2e-5)
            torch.testing.assert_close(call(x, temb), expected, rtol=0, atol=2e-5)
    with pytest.raises(RuntimeError, match="norm_silu_convolution: has no gradient"):
        graph(x.requires_grad_(), temb).sum().backward()


def test_a_trace_goes_on_to_other_sizes_and_gradients(convolving):
    block, temb = wide_block(), torch.randn(2, 8)
    fuse_norms(block)
    with torch.no_grad():
        traced = torch.jit.trace(block, (torch.randn(2, 32, 16, 16), temb))
    x = torch.randn(2, 32, 15, 15)
    torch.testing.assert_close(traced(x, temb), wide_block()(x, temb), rtol=0, atol=2e-5)
    traced(x, temb).sum().backward()
    assert block.conv1.weight.grad.abs().sum() > 0


def wide_shortcut(block):
    block.conv_shortcut = nn.Conv2d(32, 256, 1, stride=2)


def double_norm(block):
    block.norm2.double()


def double_bias(block):
    block.conv1.bias = nn.Parameter(block.conv1.bias.double())


def far_embedding(block):
    block.time_emb_proj.to("meta")


@pytest.mark.parametrize("change", [wide_shortcut, double_norm, double_bias, far_embedding])
def test_what_torch_refuses_is_refused(change, convolving):
    block, x, temb = wide_block(), torch.randn(2, 32, 16, 16), torch.randn(2, 8)
    change(block)
    fuse_norms(block)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        block(x, temb)


def test_an_image_without_a_batch(convolving):
    """The block fails as torch's does: the norm reads the image as [N, C, length], and a later layer raises."""
    block, x = wide_block(), torch.randn(32, 32, 16)
    fuse_norms(block)
    with torch.no_grad(), pytest.raises(RuntimeError):
        block(x, torch.randn(32, 8))
