"""A UNet as a PyTorch module: compiled, exported, saved, copied, pickled, moved, hooked."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import randomised
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig

CONFIGS = {
    "the paper's": UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, num_res_blocks=1
    ),
    "guided diffusion's": UNetConfig(
        sample_size=8, out_channels=6, channels=16, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4,
        num_res_blocks=1, num_classes=3, num_head_channels=4, scale_shift=True, resample="resnet", flip_sin_to_cos=True,
        freq_shift=0, time_scale=0.25,
    ),
}  # fmt: skip
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)  # which compiles C++


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    return randomised(request.param)


def inputs(model, n=3):
    torch.manual_seed(1)
    labels = () if model.config.num_classes is None else (torch.arange(n) % model.config.num_classes,)
    return torch.randn(n, *model.shape), torch.tensor([5, 999, 0, 17])[:n], *labels


def same(a, b, atol=0.0):
    with torch.no_grad():
        torch.testing.assert_close(a(*inputs(b)), b(*inputs(b)), rtol=0, atol=atol)


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_compiles_without_a_graph_break(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    same(compiled, model, 1e-5)
    x, *rest = inputs(model)
    gradients = []
    for network in (compiled, model):
        model.zero_grad()
        network(x, *rest).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(
            gradients[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()) + 1e-7
        )


def test_a_compiled_one_samples(model):
    torch._dynamo.reset()
    options = {"schedule": Schedule.linear(3, 0.5, 0.99), "seed": 0, "variance": "none"}
    if model.config.num_classes is not None:
        options["class_labels"] = 1
    expected = fastddpm.sample(model, 2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the engine takes its place
        assert torch.equal(fastddpm.sample(torch.compile(model, backend="eager"), 2, **options), expected)
        model.compile(backend="eager")  # in place
        assert torch.equal(fastddpm.sample(model, 2, **options), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_in_torch_s_wrappers_it_is_the_same_network(wrap):
    model = randomised(CONFIGS["the paper's"])
    model.schedule, model.prediction, model.variance, model.clip = (
        Schedule.cosine(5),
        "v_prediction",
        "fixed_small",
        2.0,
    )
    wrapped = wrap(model)
    assert torch.equal(fastddpm.sample(wrapped, 2, seed=0), fastddpm.sample(model, 2, seed=0))
    x0 = torch.rand(4, *model.shape)
    if wrap is not torch.compile:
        loss = fastddpm.training_loss(wrapped, x0, seed=1)
        torch.testing.assert_close(loss, fastddpm.training_loss(model, x0, seed=1), rtol=1e-5, atol=0)


class Halved(torch.optim.swa_utils.AveragedModel):
    def forward(self, *args):
        return 0.5 * super().forward(*args)


class Halving(nn.Module):
    """Which answers for what is inside."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, *args):
        return 0.5 * self.inside(*args)


def hooked(wrap):
    def wrapped(model):
        wrapper = wrap(model)
        wrapper.register_forward_hook(lambda module, args, output: 0.5 * output)
        return wrapper

    return wrapped


def patched(model):
    wrapper = nn.DataParallel(model)
    wrapper.forward = lambda *args: 0.5 * model(*args)
    return wrapper


@pytest.mark.parametrize(
    "wrap",
    [
        Halved, lambda model: Halving(torch.compile(model, backend="eager")), patched, hooked(nn.DataParallel),
        hooked(lambda model: torch.compile(model, backend="eager")),
    ],
    ids=["subclass", "answering", "patched", "hooked", "hooked compiled"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fastddpm")
def test_what_is_more_than_a_wrapper_runs_as_it_is(wrap):
    torch._dynamo.reset()
    model, options = (
        randomised(CONFIGS["the paper's"]),
        {"schedule": Schedule.linear(3, 0.5, 0.99), "seed": 0, "shape": (3, 8, 8)},
    )
    got = fastddpm.sample(wrap(model), 2, **options)
    torch.testing.assert_close(got, fastddpm.sample(lambda x, t: 0.5 * model(x, t), 2, **options), rtol=0, atol=1e-4)
    assert (got - fastddpm.sample(model, 2, **options)).abs().max() > 0.01


def test_exports_for_any_batch_size(model, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs(model))
    torch.export.save(torch.export.export(model, inputs(model), dynamic_shapes=shapes), tmp_path / "unet.pt2")
    exported = torch.export.load(tmp_path / "unet.pt2").module()
    for n in (1, 4):
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs(model, n)), model(*inputs(model, n)), rtol=0, atol=1e-5)


def test_differentiated_forwards(model):
    """As flow and consistency models ask for: along x, and along t where that is not a whole number."""
    x, t, *rest = inputs(model)
    v, t = torch.randn_like(x), t.double() + 0.5
    double = copy.deepcopy(model).double()

    def along(network, dtype):
        given = (x.to(dtype), t.to(dtype)), (v.to(dtype), torch.full_like(t, 0.1, dtype=dtype))
        with sdpa_kernel(SDPBackend.MATH):  # torch's attention for CPUs has no forward derivative
            return torch.func.jvp(lambda x, t: network(x, t, *rest), *given)[1].detach()

    got, exact, h = along(model, torch.float32), along(double, torch.float64), 1e-5
    with torch.no_grad():
        plus, minus = (double(x.double() + s * v, t + 0.1 * s, *rest) for s in (h, -h))
    torch.testing.assert_close(exact, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-4 * float(exact.abs().max()))


def test_saved_by_torch(model):
    whole, weights = io.BytesIO(), io.BytesIO()
    torch.save(model, whole)
    torch.save(model.state_dict(), weights)
    whole.seek(0), weights.seek(0)
    loaded = torch.load(whole, weights_only=False)
    assert loaded.config == model.config and loaded.schedule == model.schedule
    same(loaded, model)
    fresh = UNet(model.config).eval()
    fresh.load_state_dict(torch.load(weights, weights_only=True))
    same(fresh, model)


def test_copied_and_pickled(model):
    model.schedule, model.clip = Schedule.cosine(5), 2.0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (other.config, other.schedule, other.clip) == (model.config, model.schedule, 2.0)
        same(other, model)
        with torch.no_grad():
            other.conv_out.bias += 1
        assert not torch.equal(other.conv_out.bias, model.conv_out.bias)


def test_moved_and_cast(model):
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(inputs(model)[0].double(), *inputs(model)[1:])
        scale = expected.abs().max()
        for cast, bound in ((nn.Module.double, 1e-12), (nn.Module.half, 0.03), (nn.Module.bfloat16, 0.2)):
            network = cast(copy.deepcopy(model))
            assert {p.dtype for p in network.parameters()} == {next(network.parameters()).dtype}
            x, *rest = inputs(model)
            got = network(x.to(next(network.parameters()).dtype), *rest)
            assert got.dtype == next(network.parameters()).dtype
            assert (got.double() - expected).abs().max() <= bound * scale
        same(copy.deepcopy(model).to(memory_format=torch.channels_last), model, 1e-5)
    meta = copy.deepcopy(model).to("meta")
    assert meta(*(v.to("meta") for v in inputs(model))).shape == (3, model.config.out_channels, 8, 8)
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    same(meta, model)


def test_state_dicts_and_their_hooks(model):
    seen = []
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(len(state)))
    model.mid_block.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append(prefix))
    state = model.state_dict()
    assert seen == ["mid_block.", len(state)] and set(state) == {name for name, _ in model.named_parameters()}

    fresh = UNet(model.config).eval()
    fresh.register_load_state_dict_pre_hook(
        lambda module, state, *_: state.update({k.removeprefix("module."): state.pop(k) for k in list(state)})
    )
    fresh.register_load_state_dict_post_hook(lambda module, keys: seen.append(keys.missing_keys))
    fresh.load_state_dict({f"module.{name}": v for name, v in state.items()})
    assert seen[-1] == []
    same(fresh, model)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_out\.bias"):
        UNet(model.config).load_state_dict({k: v for k, v in state.items() if k != "conv_out.bias"})
    assigned = UNet(model.config)
    assigned.load_state_dict(state, assign=True)
    assert assigned.conv_in.weight.data_ptr() == model.conv_in.weight.data_ptr()


def test_forward_hooks_and_functional_calls(model):
    shapes = []
    handle = model.conv_in.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    expected = model(*inputs(model))
    handle.remove()
    assert shapes == [(3, model.config.stem_width, 8, 8)]
    doubled = {name: 2 * p.detach() if name.startswith("conv_out") else p for name, p in model.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(model, doubled, inputs(model))
        torch.testing.assert_close(got, 2 * expected, rtol=0, atol=1e-5)
