"""The engine's copy of a network against the network: fused layers are the same function, changed layers stay unmodified.

And from call to call: kept while the model is what it was, never stale, and gone with it.
"""

import contextlib
import copy
import dataclasses
import gc
import itertools
import math
import platform
import threading
import time
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import in_threads, python, randomised
from test_unet import as_diffusers
from torch import nn

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig, backend
from fastddpm.engine import cache, convolution, graphs, layers
from fastddpm.engine import runner as engines
from fastddpm.engine.runner import EngineRunner, Runner
from fastddpm.models.unet import Upsample
from fastddpm.sampling import loop

CPU = torch.device("cpu")
CONFIGS = {
    "two levels": UNetConfig(sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4),
    "three levels, two attentions": UNetConfig(
        sample_size=12, in_channels=1, channels=8, channel_mult=(1, 1, 3), attention_resolutions=(12, 6), norm_groups=8,
        num_res_blocks=1
    ),
    "classes": UNetConfig(
        sample_size=8, in_channels=2, out_channels=4, channels=8, channel_mult=(2, 2), norm_groups=2, num_classes=3
    ),
    "guided diffusion's": UNetConfig(
        sample_size=8, out_channels=6, channels=16, channel_mult=(0.5, 1, 1.5), attention_resolutions=(4,),
        norm_groups=4, stem_channels=8, num_res_blocks=1, norm_eps=1e-5, num_head_channels=4, scale_shift=True,
        resample="resnet", flip_sin_to_cos=True, freq_shift=0, time_scale=0.25,
    ),
    "every other option": UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(), up_attention_resolutions=(8,),
        norm_groups=4, num_heads=2, downsample_padding="both", center_input=True, middle_groups=0, middle_scale=1.5,
    ),
    "scaled and shifted, resampled by residual blocks, one head": UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(8,), norm_groups=4, scale_shift=True,
        resample="resnet", middle_attention=False,
    ),
    "one head, in the middle without a norm": UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(8,), norm_groups=4, middle_groups=0,
        middle_scale=2.0,
    ),
}  # fmt: skip


def both(model, dtype, n=3):
    """The network's answer in float64 and the engine's in dtype, float64 again, to the same noise."""
    x = torch.randn(n, *model.shape, dtype=torch.float64)
    t = torch.arange(n) * 300
    labels = None if model.config.num_classes is None else torch.arange(n) % model.config.num_classes
    engine = EngineRunner(model, CPU, dtype)
    with torch.inference_mode():
        for _ in range(2):  # the first call packs the weights
            got = Runner.predict(engine, x.to(engine.dtype, memory_format=torch.channels_last), t, labels)
        return model.double()(x, t, labels), got.double()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_engine_is_the_network(config, dtype, bound):
    model = randomised(config)
    expected, got = both(model.to(dtype), dtype)
    assert (got - expected).norm() <= bound * expected.norm()


WIDE = UNetConfig(sample_size=16, channels=32, channel_mult=(1, 2), attention_resolutions=(8,), norm_groups=8)
WIDE_GUIDED = dataclasses.replace(WIDE, scale_shift=True, resample="resnet", num_heads=4)


@pytest.mark.skipif(backend.native is None, reason="there are no compiled kernels")
@pytest.mark.parametrize("config", [WIDE, WIDE_GUIDED], ids=["the paper's", "guided diffusion's"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_wide_layers_go_winograd_s_way(config, dtype, bound):
    if not backend.native.winograd_serves(str(dtype)[6:]):
        pytest.skip("this processor has no bfloat16 products")
    model = randomised(config)
    engine = EngineRunner(model, CPU, dtype)
    x, t = torch.randn(2, *model.shape), torch.tensor([3, 800])
    with torch.inference_mode():
        got = Runner.predict(engine, x.to(dtype, memory_format=torch.channels_last), t, None).double()
        expected = model.double()(x.double(), t)
    assert (got - expected).norm() <= bound * expected.norm()
    used = [m.uses_winograd for m in engine.model.modules() if isinstance(m, convolution.Convolution)]
    assert sum(used) >= 10 and not all(used)


def test_a_float64_model_in_float32():
    for config in (CONFIGS["two levels"], CONFIGS["classes"]):
        model = randomised(config).double()
        labels = None if config.num_classes is None else 1
        images = fastddpm.sample(
            model, 2, schedule=Schedule.linear(3, 0.5, 0.99), seed=0, dtype=torch.float32, class_labels=labels
        )
        expected = fastddpm.sample(
            model.float(), 2, schedule=Schedule.linear(3, 0.5, 0.99), seed=0, class_labels=labels
        )
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def added_bytes(engine, model):
    """What the engine's weights take beside the model's own memory."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tensors = [*engine.model.parameters(), *engine.model.buffers()]
    added = sum(v.numel() * v.element_size() for v in tensors if v.untyped_storage().data_ptr() not in own)
    packed = [m.packed_weight for m in engine.model.modules() if isinstance(m, convolution.Convolution)]
    return added + sum(v.numel() * v.element_size() for v in packed if v is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_memory_is_the_weights_and_a_fifth(own, dtype):
    """In the wider one of the model's dtype and the products'."""
    model = randomised(UNetConfig(sample_size=16, channels=64, channel_mult=(1, 2, 2), attention_resolutions=(8,))).to(
        own
    )
    engine = EngineRunner(model, CPU, dtype)
    with torch.inference_mode():
        x = torch.randn(1, *model.shape).to(engine.dtype, memory_format=torch.channels_last)
        engine.predict(x, engine.time_inputs_per_image(torch.tensor([5])), None)
    products = dtype if backend.emulated_reason(CPU, dtype) is None else torch.float32
    weights = sum(p.numel() * max(own.itemsize, products.itemsize) for p in model.parameters())
    assert 0.3 * weights <= added_bytes(engine, model) <= 1.2 * weights


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_the_paper_s_network_at_twenty_timesteps(dtype, bound):
    """And on average no further from the truth than diffusers' network in the same dtype."""
    model = UNet.from_preset("cifar10").eval()
    for name, layer in model.named_modules():  # a fresh network has layers close to zero
        if name.endswith(("conv2", "conv_out", "to_out.0")):
            nn.init.xavier_uniform_(layer.weight, 0.5)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=float(p.detach().mean()), std=0.1)
    peer = as_diffusers(model.config)
    peer.load_state_dict(model.state_dict())
    peer.to(dtype, memory_format=torch.channels_last).eval()
    engine, truth = EngineRunner(model, CPU, dtype), copy.deepcopy(model).double()
    ours, theirs = [], []
    with torch.inference_mode():
        for t in torch.linspace(0, 999, 20).long()[:, None]:
            x = torch.randn(1, *model.shape)
            expected = truth(x.double(), t)
            x = x.to(memory_format=torch.channels_last)
            for errors, got in (
                (ours, Runner.predict(engine, x.to(engine.dtype), t, None)),
                (theirs, peer(x.to(dtype), t).sample),
            ):
                errors.append(float((got.double() - expected).norm() / expected.norm()))
    assert max(ours) <= bound and sum(ours) <= sum(theirs), (max(ours), sum(ours) / 20, sum(theirs) / 20)


@pytest.mark.parametrize("name", ["two levels", "guided diffusion's"])  # one head, and several
def test_attention_on_one_image_stays_channels_last(name):
    """Else torch.cat, and all that follows, works on the other layout at batch 1."""
    engine, seen = EngineRunner(randomised(CONFIGS[name]), CPU, torch.float32), []
    for layer in engine.model.modules():
        if isinstance(layer, (layers.FusedAttention, layers.FusedHeads)):
            layer.register_forward_hook(lambda _, __, y: seen.append(torch.cat((y, y), dim=1)))
    x = torch.randn(1, *engine.model.shape).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        Runner.predict(engine, x, torch.tensor([5]), None)
    assert seen and all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


# ------------------------------------------------------------------------------------ dtypes without products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["two levels", "classes"])
def test_a_dtype_without_products_is_float32_on_rounded_weights(float32_alone, name, own, dtype):
    model = randomised(CONFIGS[name]).to(own)
    rounded = copy.deepcopy(model).float()
    embedding = {p for layer in rounded.embedding_layers() for p in layer.parameters()}
    with torch.no_grad():
        for p in rounded.parameters():
            if p not in embedding:  # computed once for a chain, with unchanged weights
                p.copy_(p.to(dtype))
    options = {"schedule": Schedule.linear(3, 0.5, 0.99), "class_labels": 1 if name == "classes" else None}
    got, expected = draw(model, dtype=dtype, **options), draw(rounded, **options)
    if own == torch.float64:  # whose embeddings are float64, too
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(got, expected)
    assert next(model.parameters()).dtype == own


def test_a_16_bit_model_keeps_as_many_transformed_weights(float32_alone):
    model = randomised(UNetConfig(sample_size=16, channels=32, channel_mult=(1, 2), attention_resolutions=()))
    kept = []
    for kind in (torch.float32, torch.bfloat16):
        engine = EngineRunner(model.to(kind), CPU, kind)
        kept.append([m.may_cache_winograd for m in engine.model.modules() if isinstance(m, convolution.Convolution)])
    assert any(kept[0]) and not all(kept[0]) and kept[0] == kept[1]


def test_a_dtype_without_products_is_said_once(float32_alone):
    model = small()
    x = torch.randint(256, (2, *model.shape), dtype=torch.uint8)
    calls = (
        lambda: draw(model, dtype=torch.bfloat16),
        lambda: fastddpm.likelihood(model, x, dtype=torch.bfloat16, seed=0),
        lambda: fastddpm.encode(model, x / 127.5 - 1, steps=2, dtype=torch.bfloat16),
    )
    [message] = notices(lambda: [call() for call in calls])
    assert "no products of torch.bfloat16, so the network runs in float32" in message
    assert "float16" in notices(lambda: draw(model, dtype=torch.float16))[0]
    assert notices(lambda: draw(model)) == []
    foreign = nn.Conv2d(3, 3, 3, padding=1).bfloat16()
    foreign.forward = lambda x, t: x
    messages = notices(lambda: draw(foreign, shape=(3, 8, 8), schedule=Schedule.linear(3, 0.5, 0.99)))
    assert any("the module's convolutions and matrix products are many times slower" in m for m in messages)


def test_a_gpu_without_products_multiplies_in_float32(monkeypatch):
    """As a CPU does: on meta tensors, where a GPU would be."""
    monkeypatch.setattr(backend, "emulated_reason", lambda device, dtype: "no" if dtype == torch.bfloat16 else None)
    for dtype, arithmetic in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        engine = EngineRunner(small(), torch.device("meta"), dtype)
        assert engine.dtype == arithmetic and engine.model.conv_in.weight.dtype == arithmetic
        assert len(engine.warnings) == (dtype == torch.bfloat16)


# ------------------------------------------------------------------- what holds on a GPU, without one


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """cuDNN's settings as for a GPU, though the engine is on a CPU."""
    cudnn_for = graphs.cudnn_for
    monkeypatch.setattr(graphs, "cudnn_for", lambda device: cudnn_for(torch.device("cuda", 0)))


def test_every_convolution_finds_its_settings(monkeypatch, as_on_a_gpu):
    """Step by step, while steps are captured and replayed, backwards, and in the bound: on cuDNN's own it is a matter of the
    sizes whether float32 gives the same bits twice."""
    model, found, forward, cudnn = small(), [], convolution.Convolution.forward, torch.backends.cudnn

    def settings():
        return cudnn.deterministic, cudnn.allow_tf32

    def recorded(self, *args, **options):
        found.append(settings())
        return forward(self, *args, **options)

    def capture(step, counts, device):
        step()
        return dict.fromkeys(counts, types.SimpleNamespace(replay=step))

    monkeypatch.setattr(convolution.Convolution, "forward", recorded)
    images = draw(model, schedule=Schedule.linear(3, 0.5, 0.99))
    fastddpm.encode(model, images.clamp(-1, 1), steps=2)
    fastddpm.likelihood(model, images.clamp(-1, 1), quantize=True, subsample=2, seed=0, progress=False)
    monkeypatch.setattr(graphs, "usable", lambda device: True)
    monkeypatch.setattr(graphs, "capture", capture)
    draw(model, schedule=Schedule.linear(3, 0.5, 0.99), callback=lambda state: None)
    assert len(found) > 100 and set(found) == {(True, False)}
    assert settings() == (False, True)  # the caller's own, again


def test_another_chain_s_settings_make_no_new_engine(as_on_a_gpu):
    """They are the process's, and what an engine asks for is the same each time."""
    model = small()
    x = draw(model)
    engine = cache._caches[model].entry.runner
    with graphs.cudnn_for(torch.device("cuda", 0)):
        assert torch.equal(draw(model), x)
    assert cache._caches[model].entry.runner is engine


class Graph:
    """Stands for torch.cuda.CUDAGraph."""


@pytest.fixture
def torch_s_captures(monkeypatch):
    """What torch.cuda does for a capture, on a CPU, where it has no streams: (its graphs, what streams were captured on)."""
    made, on = weakref.WeakSet(), []

    def made_graph():
        made.add(graph := Graph())
        return graph

    def stream(device):
        return types.SimpleNamespace(device=torch.device("cuda", 0), wait_stream=lambda other: None)

    def graph(cuda_graph, pool, stream, capture_error_mode):
        on.append(stream)
        return contextlib.nullcontext()

    for name, standing in {
        "Stream": stream, "current_stream": stream, "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": made_graph, "graph": graph, "graph_pool_handle": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, standing)
    monkeypatch.setattr(graphs, "_failed", [])
    return made, on


@pytest.mark.parametrize(
    ("failure", "raised"), [(RuntimeError, graphs.CaptureError), (TypeError, TypeError), (KeyboardInterrupt,) * 2]
)
def test_a_graph_whose_capture_failed_is_never_destroyed(torch_s_captures, failure, raised):
    """Whatever the step raises: Triton's errors, for one, are no RuntimeErrors."""
    made, _ = torch_s_captures
    calls = itertools.count()

    def step():
        if next(calls) == 3:  # one to warm up, and one captured in the first graph
            raise failure("no")

    with pytest.raises(raised):
        graphs.capture(step, (1, 2), torch.device("cuda"))
    gc.collect()
    assert len(made) == 2


def test_captures_have_streams_of_their_own(torch_s_captures):
    """torch keeps cuBLAS's workspace by stream, and two models' graphs may be replayed at the same time."""
    made, on = torch_s_captures
    for _ in range(2):
        graphs.capture(lambda: None, (1, 2), torch.device("cuda"))
    gc.collect()
    assert len(on) == 4 and on[0] is on[1] and on[2] is on[3] and on[0] is not on[2]
    assert len(made) == 0  # those that did not fail go with their owner


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_what_onednn_may_not_use_is_no_product(limit, tmp_path):
    """With AVX512_CORE it takes bfloat16, and is slower in it than in float32."""
    code = (
        "import torch; from fastddpm import backend as b; print(b.emulated_reason(torch.device('cpu'), torch.bfloat16))"
    )
    result = python(code, tmp_path, ONEDNN_MAX_CPU_ISA=limit)
    reason = "this processor does not multiply bfloat16 in hardware" if platform.machine() == "x86_64" else "None"
    assert result.stdout.startswith(reason), result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's instructions")
@pytest.mark.parametrize(("limits", "there"), [
    ({}, True), ({"ONEDNN_MAX_CPU_ISA": "default"}, True), ({"DNNL_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
    ({"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, True), ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, False),
    ({"DNNL_MAX_CPU_ISA": "AVX2"}, False),
])  # fmt: skip
def test_limits_of_onednn_are_named(monkeypatch, limits, there):
    """On any processor: torch's answers are those of one with AVX512_BF16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    reason = backend.emulated_reason(CPU, torch.bfloat16)
    assert (reason is None) == there
    assert there or reason.endswith(" under " + " ".join(f"{k}={v}" for k, v in limits.items()))
    with torch.backends.mkldnn.flags(enabled=False):
        assert "oneDNN" in backend.emulated_reason(CPU, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_dtype_is_slow(dtype):
    """A dtype that is emulated somewhere takes 3 to 100 times as long as float32; this allows for a busy machine."""
    model = randomised(UNetConfig(sample_size=16, channels=64, channel_mult=(1, 2), attention_resolutions=(8,)))
    best = dict.fromkeys((torch.float32, dtype), math.inf)
    for _ in range(4):
        for kind in best:
            start = time.perf_counter()
            draw(model, n=4, dtype=kind, schedule=Schedule.linear(3, 0.5, 0.99))
            best[kind] = min(best[kind], time.perf_counter() - start)
    assert best[dtype] <= 2 * best[torch.float32], best


def test_every_layer_that_can_be_fused_is():
    for config, attentions in (("two levels", (6, 0)), ("guided diffusion's", (0, 4)), ("every other option", (0, 4))):
        model = randomised(CONFIGS[config])
        kinds = [type(m) for m in EngineRunner(model, CPU, torch.float32).model.modules()]
        assert (kinds.count(layers.FusedAttention), kinds.count(layers.FusedHeads)) == attentions
        assert kinds.count(layers.FusedResBlock) == len(model.resblocks())
        assert nn.Conv2d not in kinds and Upsample not in kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_onednn(monkeypatch, dtype):
    monkeypatch.setattr(convolution, "_onednn_accepts", lambda x: False)
    model = randomised(CONFIGS["two levels"]).to(dtype)
    expected, got = both(model, dtype)
    assert (got - expected).norm() <= (2e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_weights_are_packed_once():
    """And serve any batch size; the unpacked ones are let go."""
    model = randomised(CONFIGS["two levels"])
    engine = EngineRunner(model, CPU, torch.float32)
    layers = [m for m in engine.model.modules() if isinstance(m, convolution.Convolution)]
    packed = []
    for n in (2, 5):
        x, t = torch.randn(n, *model.shape), torch.arange(n)
        with torch.inference_mode():
            torch.testing.assert_close(Runner.predict(engine, x, t, None), model(x, t), rtol=0, atol=2e-5)
        packed.append([layer.packed_weight for layer in layers])
        assert all(layer.weight is None for layer in layers)
    assert all(a is b and a is not None for a, b in zip(*packed, strict=True))


def test_large_images_go_winograds_way_with_weights_that_are_not_kept(monkeypatch, kernels):
    if backend.native.cpu_variant() == "generic":
        pytest.skip("Winograd's method is not the faster one there")
    model = randomised(UNetConfig(sample_size=8, channels=32, channel_mult=(1, 1), attention_resolutions=()))
    for n, growth, some in (
        (1, 0, False),
        (4, 0, True),
        (4, 10, False),
    ):  # 64 and 256 pixels; memory for none, and for all
        monkeypatch.setattr(engines, "WEIGHT_GROWTH", growth)
        engine = EngineRunner(model, CPU, torch.float32)
        x, t = torch.randn(n, *model.shape), torch.arange(n)
        with torch.inference_mode():
            torch.testing.assert_close(Runner.predict(engine, x, t, None), model(x, t), rtol=0, atol=2e-5)
        layers = [m for m in engine.model.modules() if isinstance(m, convolution.Convolution) and m.uses_winograd]
        assert any(layer.packed_weight is None for layer in layers) == some
        assert all((layer.packed_weight is None) == (layer.weight is not None) for layer in layers)


def test_onednn_switched_off():
    model = randomised(CONFIGS["two levels"])
    with torch.backends.mkldnn.flags(enabled=False):
        engine = EngineRunner(model, CPU, torch.float32)
        with torch.inference_mode():
            Runner.predict(engine, torch.randn(1, *model.shape), torch.arange(1), None)
    assert all(m.packed_weight is None for m in engine.model.modules() if isinstance(m, convolution.Convolution))


def test_a_timestep_projection_of_another_kind():
    """Widths come from what the projections give: a replaced one needn't have a weight."""
    model = small()
    expected = draw(model)
    block = model.mid_block.resnets[0]
    block.time_emb_proj = nn.Sequential(block.time_emb_proj)
    [message] = notices(lambda: torch.testing.assert_close(draw(model), expected, rtol=0, atol=1e-5))
    assert "mid_block.resnets.0" in message


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


def tile_by_hand(model):
    """As people make images that can be tiled."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding == (1, 1):
            layer._conv_forward = types.MethodType(
                lambda self, x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias), layer
            )


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
    adapt_linear, adapt_convolution, hook, hook_before, hook_that_reads, patch, hook_a_container, tile, tile_by_hand,
    dilate, pad_by_name, another_kernel, groups, narrow_attention, no_bias,
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
    engine, x, t = EngineRunner(model, CPU, torch.float32), torch.randn(2, *model.shape), torch.arange(2)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(Runner.predict(engine, x, t, None), model(x, t), rtol=0, atol=2e-5)


def test_under_autocast():
    model = randomised(CONFIGS["classes"])
    x, t, labels = torch.randn(2, *model.shape), torch.arange(2), torch.arange(2)
    with torch.inference_mode():
        truth = model(x, t, labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = Runner.predict(EngineRunner(model, CPU, torch.float32), x, t, labels)
    assert got.dtype == torch.bfloat16 and (got - truth).norm() <= 5e-2 * truth.norm()


# ------------------------------------------------------------------------------------- from call to call


def small(seed=0):
    config = UNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4, num_res_blocks=1
    )
    model = randomised(config, seed)
    model.schedule = Schedule.linear(3, 0.5, 0.99)
    return model


def draw(model, n=2, **options):
    return fastddpm.sample(model, n, seed=0, **options)


def kept(model):
    entry = cache._caches[model].entry
    return None if entry is None else entry.runner


def packed(engine):
    return [m.packed_weight for m in engine.model.modules() if isinstance(m, convolution.Convolution)]


def test_an_unchanged_model_keeps_its_engine():
    model = small()
    first = draw(model)
    engine = kept(model)
    before = packed(engine)
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    assert torch.equal(draw(model), first)
    assert kept(model) is engine
    assert all(a is b for a, b in zip(packed(engine), before, strict=True))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})  # the same values, written again
    assert torch.equal(draw(model), first) and kept(model) is not engine
    engine = kept(model)
    model.conv_in.bias.data = model.conv_in.bias.data.clone()  # and elsewhere
    assert torch.equal(draw(model), first) and kept(model) is not engine


def test_a_model_in_training_keeps_none():
    """It will change before the next call, and its memory is wanted."""
    model = small()
    expected = draw(model)
    model.train()
    assert torch.equal(draw(model), expected) and model.training and kept(model) is None


def test_what_a_failed_call_leaves_is_not_kept(monkeypatch):
    model, pack = small(), torch.ops.aten.mkldnn_reorder_conv2d_weight
    calls = iter(range(100))

    def out_of_memory(*args):
        if next(calls) == 3:
            raise RuntimeError("cannot allocate memory")
        return pack(*args)

    monkeypatch.setattr(torch.ops.aten, "mkldnn_reorder_conv2d_weight", out_of_memory)
    with pytest.raises(RuntimeError, match="cannot allocate"):
        draw(model)
    drawn_as_by_a_copy(model)


def test_a_weight_that_is_no_parameter():
    """As in functional code, and where pruning has left its hooks out."""
    model = small()
    conv = model.mid_block.resnets[0].conv1
    weight = conv.weight.detach().clone()
    del conv.weight
    conv.weight = weight
    with pytest.warns(UserWarning, match="mid_block.resnets.0:"):
        before = drawn_as_by_a_copy(model)
    weight.mul_(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(drawn_as_by_a_copy(model), before)


def test_tied_and_exchanged_parameters():
    model = small()
    a, b = (block.conv2 for block in model.mid_block.resnets)
    norm = model.mid_block.resnets[0].norm1
    b.bias = a.bias
    drawn_as_by_a_copy(model)
    b.bias = nn.Parameter(a.bias.detach().clone())
    drawn_as_by_a_copy(model)
    weight, bias = norm.weight, norm.bias
    del norm.weight, norm.bias
    norm.register_parameter("bias", weight)
    norm.register_parameter("weight", bias)
    drawn_as_by_a_copy(model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parameters_with_gaps(dtype):
    model = randomised(WIDE)
    model.schedule = Schedule.linear(3, 0.5, 0.99)
    expected = draw(model, dtype=dtype)
    for p in model.parameters():
        p.data = torch.stack((p.data, torch.full_like(p.data, torch.nan)), dim=-1)[..., 0]
    assert torch.equal(draw(model, dtype=dtype), expected)


def test_other_defaults():
    model = small()
    expected = draw(model)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(draw(model), expected)
        wide = randomised(WIDE).float()
        wide.schedule = Schedule.linear(3, 0.5, 0.99)
        images = draw(wide)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(draw(wide), images)


@pytest.mark.parametrize("buffer", [torch.eye(3).to_sparse(), torch.eye(3, dtype=torch.complex64).conj()])
def test_exotic_buffers(buffer):
    model = small()
    expected = draw(model)
    model.register_buffer("exotic", buffer)
    assert torch.equal(draw(model), expected) and kept(model) is not None


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_model_that_cannot_be_copied_runs_as_it_is():
    model = small()
    nn.utils.weight_norm(model.mid_block.resnets[0].conv1)
    x, t = torch.randn(2, *model.shape), torch.tensor([0, 2])
    model(x, t)  # with gradients: the layer's weight is no leaf any more
    with pytest.warns(UserWarning, match="cannot be copied"):
        images = draw(model)
    assert images.isfinite().all()
    model(x, t)
    with pytest.raises(ValueError, match="model: for torch.bfloat16 on cpu it must be copied, but"):
        draw(model, dtype=torch.bfloat16)


def within(seconds, *functions):
    """Run the functions on a thread each; whether they came to an end."""
    threads = [threading.Thread(target=f, daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in threads)


def test_callbacks_that_sample_wait_for_nobody():
    a, b = small(0), small(1)
    expected = {model: draw(model) for model in (a, b)}
    both_there, got = threading.Barrier(2, timeout=30), []

    def chain(model, other):
        def callback(state):
            if state.step == 0:
                both_there.wait()
            got.append(torch.equal(draw(other), expected[other]))

        got.append(torch.equal(draw(model, callback=callback), expected[model]))

    assert within(60, lambda: chain(a, b), lambda: chain(b, a))
    assert got == [True] * 8


def test_a_callback_s_own_thread_may_sample():
    model, got = small(), []
    expected = draw(model)

    def callback(state):
        got.append(within(30, lambda: got.append(torch.equal(draw(model), expected))))

    assert within(60, lambda: draw(model, callback=callback)) and got == [True] * 6


def through_data(model, p):
    p.data.copy_(-p)


def into_data(model, p):
    p.data[0] = 3


def through_numpy(model, p):
    p.detach().numpy()[0] = 3


def in_place(model, p):
    with torch.no_grad():
        p.mul_(2)


def other_memory(model, p):
    p.data = 2 * p.data


def one_bit(model, p):
    p.data.view(torch.int32).view(-1)[-1] ^= 1 << 20


def two_elements_swapped(model, p):
    p.data.view(-1)[[0, -1]] = p.data.view(-1)[[-1, 0]]


def optimizer(model, p, **options):
    p.grad = torch.ones_like(p)
    torch.optim.Adam([p], lr=0.3, **options).step()


def fused_optimizer(model, p):
    optimizer(model, p, fused=True)


def new_parameter(model, p):
    for module in model.modules():
        for name, v in module._parameters.items():
            if v is p:
                setattr(module, name, nn.Parameter(2 * p.detach()))


def state_dict(model, p):
    model.load_state_dict({k: 2 * v if v.data_ptr() == p.data_ptr() else v for k, v in model.state_dict().items()})


WRITES = [
    through_data, into_data, through_numpy, in_place, other_memory, one_bit, two_elements_swapped, optimizer,
    fused_optimizer, new_parameter, state_dict,
]  # fmt: skip
# Packed, transformed with others, in the caller's memory, out of the loop.
WEIGHTS = [
    "mid_block.resnets.0.conv1.weight",
    "mid_block.attentions.0.to_q.weight",
    "mid_block.resnets.0.norm2.bias",
    "time_embedding.linear_2.weight",
]


def drawn_as_by_a_copy(model, **options):
    """What sample gives, held against the same of a copy that has no past."""
    x = draw(model, **options)
    assert torch.equal(x, draw(copy.deepcopy(model), **options))
    return x


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_written_weights_are_seen(weight, write):
    model = small()
    before = draw(model)
    write(model, model.get_parameter(weight))
    assert not torch.equal(drawn_as_by_a_copy(model), before)


def swap_a_layer(model):
    old = model.conv_in
    model.conv_in = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1)


def without_attention(model):
    model.down_blocks[1].attention = False


def hook_the_model(model):
    model.register_forward_hook(lambda module, args, output: 2 * output)


def hook_the_embedding(model):
    model.time_embedding.linear_1.register_forward_hook(lambda module, args, output: 2 * output)


def patch_the_body(model):
    body = model.body
    model.body = lambda x, embedding: 2 * body(x, embedding)


SEEN = [
    *(change for change in CHANGES if change not in (hook_that_reads, hook_a_container, pad_by_name)),  # which change no number
    swap_a_layer, without_attention, hook_the_model, hook_the_embedding, patch_the_body,
]  # fmt: skip


@pytest.mark.parametrize("change", SEEN)
@pytest.mark.filterwarnings("ignore:fastddpm")
def test_changed_layers_are_seen(change):
    model = small()
    before = draw(model)
    change(model)
    x = draw(model)
    assert not torch.equal(x, before)
    model.eval()
    plain = fastddpm.sample(lambda x, t: model(x, t), 2, shape=model.shape, schedule=model.schedule, seed=0)
    torch.testing.assert_close(x, plain, rtol=0, atol=1e-4)


class Scaled(nn.Conv2d):
    scale = None  # a tensor that is no parameter and no buffer

    def forward(self, x):
        return super().forward(x) * self.scale


def test_a_foreign_layer_that_changes_its_mind():
    """What it keeps where cannot be known: such a model's engine is made for each call."""
    model = small()
    model.conv_in = Scaled(3, model.conv_in.out_channels, 3, padding=1)
    model.conv_in.scale = torch.ones(())
    with pytest.warns(UserWarning, match="the network's conv_in: not fastddpm's own layers"):
        before = draw(model)
    model.conv_in.scale *= 2
    with pytest.warns(UserWarning, match="conv_in"):  # of the copy
        assert not torch.equal(drawn_as_by_a_copy(model), before)


def test_another_dtype_mode_batch_or_setting():
    model = small()
    first = draw(model)
    model.bfloat16()
    low = drawn_as_by_a_copy(model)
    assert not torch.equal(low, first)
    model = small()
    for options in ({"dtype": torch.bfloat16}, {"n": 5}, {"batch_size": 1}):
        assert torch.equal(draw(model), first)
        engine = kept(model)
        drawn_as_by_a_copy(model, **options)
        assert kept(model) is not engine
        assert not any(m.training for m in model.modules())
    assert torch.equal(draw(model), first)
    for setting in (backend.use("reference"), torch.backends.mkldnn.flags(enabled=False)):
        engine = kept(model)
        with setting:
            drawn_as_by_a_copy(model)
            assert kept(model) is not engine
        assert torch.equal(draw(model), first)
    engine = kept(model)
    with torch.autocast("cpu", torch.bfloat16):
        drawn_as_by_a_copy(model)
    assert kept(model) is engine and torch.equal(draw(model), first)


def test_threads_are_part_of_what_is_kept(with_threads):
    """They change the images by rounding alone. Everywhere else pytest-xdist's workers have one."""
    model, images, engines = small(), [], []
    for threads in (1, 2, 3):
        images.append(with_threads(threads, lambda: draw(model)))
        engines.append(kept(model))
    assert len(set(map(id, engines))) == 3
    for x in images[1:]:
        torch.testing.assert_close(x, images[0], rtol=0, atol=1e-4)


def test_the_copy_shares_what_it_can():
    """Parameters that are not packed are read where the caller has them; the caller's own stay what they are."""
    model = small()
    before = {k: (v, v.data_ptr(), v.dtype, v.requires_grad) for k, v in model.named_parameters()}
    draw(model), draw(model, dtype=torch.bfloat16)
    assert {k: (v, v.data_ptr(), v.dtype, v.requires_grad) for k, v in model.named_parameters()} == before
    draw(model)
    ours = dict(kept(model).model.named_parameters())
    for name in ("mid_block.resnets.0.norm2.bias", "time_embedding.linear_2.weight"):
        assert ours[name].data_ptr() == before[name][1]


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_a_foreign_layer_writes_into_its_copy():
    class Counting(nn.Conv2d):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = small()
    model.conv_in = Counting(3, model.conv_in.out_channels, 3, padding=1)
    model.conv_in.register_buffer("calls", torch.zeros(()))
    draw(model)
    assert model.conv_in.calls == 0


@pytest.mark.filterwarnings("ignore:fastddpm")
@pytest.mark.parametrize("hooked", [False, True])
def test_the_engine_goes_with_its_model(hooked):
    model = small()
    if hooked:  # by closures that hold the model, of whatever kind
        model.mid_block.register_forward_hook(lambda module, args, output, model=model: output)
        model.conv_in.register_state_dict_pre_hook(lambda *args, model=model: None)
        model.conv_out.name = lambda model=model: "out"
    draw(model)
    gone = [weakref.ref(model), *([] if hooked else [weakref.ref(kept(model))])]
    del model
    gc.collect()
    assert not any(r() for r in gone)


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_layers_that_are_kept_do_not_train():
    model = UNet(
        UNetConfig(sample_size=8, channels=8, channel_mult=(1,), attention_resolutions=(), norm_groups=4, dropout=0.5)
    )
    model.schedule = Schedule.linear(3, 0.5, 0.99)
    with torch.no_grad():
        for block in model.resblocks():
            block.conv2.weight.normal_()
            block.register_forward_hook(lambda module, args, output: output)
    assert torch.equal(draw(model), draw(model)) and model.training


def test_two_models_keep_an_engine_each():
    a, b = small(0), small(1)
    first = draw(a), draw(b)
    both = kept(a), kept(b)
    assert torch.equal(draw(a), first[0]) and torch.equal(draw(b), first[1])
    assert (kept(a), kept(b)) == both and not torch.equal(*first)


# --------------------------------------------------------------------------------------------- the weights' key


@pytest.mark.parametrize(
    "checksum", [cache._host_checksum, lambda v: int(cache._device_checksum(v))], ids=["digest", "sum"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_checksums_see_every_bit_and_every_place(checksum, dtype):
    layouts = [
        torch.randn(3, 4, 5, 2).to(dtype),
        torch.randn(3, 4, 5, 2).to(dtype, memory_format=torch.channels_last),
        torch.randn(3, 4, 5, 4).to(dtype)[..., ::2],  # with gaps
        torch.randn(1).to(dtype)[0],
    ]
    bits = 8 * dtype.itemsize
    integer = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    for v in layouts:
        seen = {checksum(v)}
        assert checksum(v.clone()) in seen
        places = [tuple(int(torch.randint(0, size, ())) for size in v.shape) for _ in range(20)]
        for i, place in enumerate(places):
            for bit in (0, bits - 1, int(torch.randint(0, bits, ()))):
                changed = v.clone()
                changed.view(integer)[place] ^= 1 << bit if bit < bits - 1 else -(1 << bit)
                seen.add(checksum(changed))
                assert checksum(changed) != checksum(v)
            swapped, other = v.clone(), places[i - 1]
            swapped[place], swapped[other] = v[other].clone(), v[place].clone()
            assert torch.equal(swapped, v) or checksum(swapped) != checksum(v)
        # A distance moved from one element to another, and a shift of all: what sums with weights might miss.
        if v.dim():
            moved = v.clone()
            moved.view(integer)[0, 0, 0, 0] += 2
            moved.view(integer)[1, 1, 1, 1] -= 2
            assert checksum(moved) != checksum(v) and checksum(v.roll(1, 0)) != checksum(v)


def test_the_sum_is_that_of_splitmix64():
    """Its constants, and shifts that bring in zeros: with signs, a number and its complement would be the same."""

    def mixed(state):
        z = state % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    for values in ([0], [-5, 2**62, 17], [-(2**63), 2**63 - 1]):
        expected = sum(mixed(0x9E3779B97F4A7C15 * i + v) for i, v in enumerate(values, 1))
        assert int(cache._device_checksum(torch.tensor(values))) % 2**64 == expected % 2**64


def test_an_empty_tensor_has_a_checksum():
    for checksum in (cache._host_checksum, cache._device_checksum):
        checksum(torch.empty(0, 3))


# ---------------------------------------------------------------------------------------------------- threads


def test_threads_take_turns_at_a_model(monkeypatch):
    model = small().train()
    expected, order, step = draw(model), [], loop.Chain.step

    def logged(self, *args):
        order.append(threading.get_ident())
        time.sleep(0.01)  # in which another thread would come
        step(self, *args)

    monkeypatch.setattr(loop.Chain, "step", logged)
    for x in in_threads(*[lambda: draw(model)] * 3):
        assert torch.equal(x, expected)
    assert [len(list(run)) for _, run in itertools.groupby(order)] == [3, 3, 3]
    assert model.training


def test_threads_with_a_model_each_run_at_once():
    models = small(0), small(1)
    expected = [draw(model) for model in models]
    meeting = threading.Barrier(2)  # in every step; alone, one would wait in vain

    def call(model):
        return lambda: draw(model, callback=lambda state: meeting.wait(timeout=60))

    for x, y in zip(in_threads(*map(call, models)), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:fastddpm")
def test_threads_take_turns_at_any_module():
    """Its mode is switched, and must be back for the next one only when that one looks."""

    class Dropping(nn.Module):
        def forward(self, x, t):
            return nn.functional.dropout(x, 0.5, self.training)

    model = Dropping().train()

    def call():
        return fastddpm.sample(model, 1, seed=0, shape=(1, 4, 4), schedule=Schedule.cosine(30))

    expected = call()
    assert all(torch.equal(x, expected) for x in in_threads(*[call] * 4))
    assert model.training


def test_a_callback_may_sample_from_the_same_model():
    model = small()
    expected, inner = draw(model), []
    assert torch.equal(draw(model, callback=lambda state: inner.append(draw(model))), expected)
    assert len(inner) == 3 and all(torch.equal(x, expected) for x in inner)
    assert torch.equal(draw(model), expected)


def test_a_compiled_model_is_taken_as_it_was_written():
    model = small()
    expected = draw(model)
    model.compile()
    assert notices(lambda: draw(model)) == [] and torch.equal(draw(model), expected)


def test_after_a_call_that_failed():
    model = small()
    expected = draw(model)

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, callback=stop)
    assert torch.equal(draw(model), expected)


# ---------------------------------------------------------------------------------------------------- notices


def notices(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [w for w in caught if str(w.message).startswith("fastddpm")]
    assert all(w.filename == __file__ for w in ours)
    return [str(w.message) for w in ours]


class Doubled(UNet):
    def forward(self, x, t, class_labels=None):
        return 2 * super().forward(x, t, class_labels)


class Foreign(nn.Module):
    def forward(self, x, t):
        return 0.5 * x


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Foreign(), "fastddpm: Foreign is not a fastddpm.UNet, so it runs unmodified, without the engine"),
        (Doubled(CONFIGS["two levels"]), "the Doubled has hooks, functions set on it, or overridden methods"),
    ],
)
def test_models_that_run_as_they_are_say_so_once(model, says):
    options = {"shape": (3, 8, 8), "schedule": Schedule.linear(3, 0.5, 0.99), "prediction": "epsilon"}
    model.eval()
    [message] = notices(lambda: [draw(model, **options) for _ in range(2)])
    assert says in message and ("are the same, only slower" in message) == isinstance(model, UNet)
    plain = draw(lambda x, t: model(x, t), **options)
    torch.testing.assert_close(draw(model, **options), plain, rtol=0, atol=1e-5)
    assert notices(lambda: draw(copy.deepcopy(model), **options)) == [message]  # once for each model


def test_layers_that_run_as_they_are_are_named():
    model = small()
    no_bias(model)
    assert notices(lambda: draw(model)) == [
        "fastddpm: the network's mid_block.resnets.0, mid_block.attentions.0: not fastddpm's own layers, so they "
        "run unmodified. Results are the same, only slower"
    ]
    model = small()
    tile(model)
    [message] = notices(lambda: draw(model))
    assert "conv_in" in message and " and " in message


def test_nothing_is_said_of_what_is_usual():
    model, labelled = small(), randomised(CONFIGS["classes"])
    labelled.schedule = model.schedule
    for call in (
        lambda: draw(model),
        lambda: draw(model, dtype=torch.float32 if backend.emulated_reason(CPU, torch.bfloat16) else torch.bfloat16),
        lambda: draw(labelled, class_labels=1),
        lambda: draw(lambda x, t: x, shape=(1, 4, 4), schedule=model.schedule, prediction="epsilon"),
    ):
        assert notices(call) == []
        with torch.autocast("cpu", torch.bfloat16):
            assert notices(call) == []
