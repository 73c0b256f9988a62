"""`fuse_norms`: the same function in place, with the kernel; whatever it doesn't know stays; everything can be undone."""

import copy
import pickle

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastddpm
from fastddpm import foreign, fuse_norms, fused_norms
from fastddpm.fused_norms import FusedGroupNorm, FusedSequential

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
    """Norms that matter: fresh ones multiply by 1 and add 0."""
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
    """How often the kernel is called, and whether with a SiLU."""
    seen = []
    op = fused_norms.ops.group_norm_silu
    monkeypatch.setattr(
        fused_norms.ops,
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
            assert (
                others == report.swapped["GroupNorm"] and 1 <= calls.count(False) <= others
            )  # attention's may be transposed
        assert dict(model.named_modules()).keys() == names and not report.left
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
    assert str(fuse_norms(model)) == "nothing to fuse"
    report.undo()
    assert str(fuse_norms(model)) == str(report)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def test_what_is_left():
    model = nn.Sequential(GroupNorm32(2, 4), nn.SiLU(), nn.GroupNorm(2, 4, affine=False), nn.SiLU(), nn.Conv2d(4, 4, 1))
    report = fuse_norms(model)
    assert type(model) is nn.Sequential and not report.swapped
    assert report.left == {"0": "GroupNorm32, a subclass of GroupNorm", "2": "a GroupNorm without weights or bias"}
    assert "nothing to fuse; left: 0 (GroupNorm32, a subclass of GroupNorm), 2 (" in str(report)
    with pytest.raises(TypeError, match="module: got function; expected a torch.nn.Module"):
        fuse_norms(lambda x: x)
    assert str(fuse_norms(fastddpm.UNet.from_preset("digits"))) == "nothing to fuse"  # it has layers of its own


def own_forward(pair):
    forward = pair[0].forward
    pair[0].forward = lambda x: forward(x) + 1


def own_activation(pair):
    pair[1].forward = lambda x: x


def no_bias(pair):
    pair[0].bias = None


@pytest.mark.parametrize("change", [own_forward, own_activation, no_bias])
def test_what_somebody_put_in_is_kept(change, kernels):
    """Before or after the norms are fused."""
    x = torch.randn(2, 4, 5, 5)
    for early in (True, False):
        pair = perturbed(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()))
        twin = copy.deepcopy(pair)
        change(twin)
        if early:
            change(pair)
        report = fuse_norms(pair)
        assert ("0" in report.left) == (early and change is not own_activation)
        if not early:
            change(pair)
        torch.testing.assert_close(pair(x), twin(x), rtol=0, atol=1e-5)


def test_what_the_kernel_has_no_rule_for(kernels):
    """torch.func, forward-mode derivatives, a compiled call with gaps."""
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
    """As guided-diffusion has it: the norm, then scale and shift, then the rest."""
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
    with torch.no_grad():
        expected = norm(x), pair(x)
        fuse_norms(pair)
        for got, wanted in zip((norm(x), pair(x)), expected, strict=True):
            assert got.shape == wanted.shape and got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if x.dtype == torch.float32 else 2e-3)


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
    assert isinstance(foreign.adopted(model), fastddpm.UNet)
    assert same_bits(fastddpm.sample(model, 2, schedule=scheduler, seed=0), expected)
