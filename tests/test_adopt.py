"""diffusers' live objects: a UNet2DModel runs as the UNet with its parameters, a scheduler is read as a schedule."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

import fastddpm
from fastddpm import Schedule, UNet
from fastddpm.inputs import adopt

diffusers = pytest.importorskip("diffusers")

# Ends with little of the picture, and not so little that float32 roundings of eps grow beyond 2e-5 in x0.
SHORT = {"num_train_timesteps": 4, "beta_end": 0.985}
TINY = {
    "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
PAPER = {
    "attention_head_dim": None, "downsample_padding": 0, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip


def unet2d(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**TINY, **options}).eval()


def wrapped(model):
    """What runs through nothing of this package but the loop."""
    return lambda x, t: model(x, t).sample


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "options",
    [
        {}, PAPER, {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4}, {"mid_block_scale_factor": 2.0},
        {"out_channels": 6},
    ],
    ids=str,
)  # fmt: skip
def test_runs_as_the_unet_with_its_parameters(options, quiet):
    model = unet2d(**options)
    scheduler = diffusers.DDPMScheduler(
        **SHORT, variance_type="learned_range" if "out_channels" in options else "fixed_small"
    )
    twin = adopt.as_unet(model)[0]
    assert isinstance(twin, UNet) and twin is adopt.as_unet(model)[0]
    names = dict(model.named_parameters())
    assert all(names[name] is p for name, p in twin.named_parameters()) and len(names) == len(list(twin.parameters()))
    got = fastddpm.sample(model, 3, schedule=scheduler, seed=1)
    expected = fastddpm.sample(wrapped(model), 3, shape=(3, 8, 8), schedule=scheduler, seed=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    with torch.no_grad():  # a twin of a copy would not see this
        model.conv_out.bias += 1
    assert (fastddpm.sample(model, 3, schedule=scheduler, seed=1) - got).abs().max() > 0.05
    model.conv_out.bias = nn.Parameter(torch.zeros_like(model.conv_out.bias))  # nor one of the first parameters this
    got = fastddpm.sample(model, 3, schedule=scheduler, seed=1)
    expected = fastddpm.sample(wrapped(model), 3, shape=(3, 8, 8), schedule=scheduler, seed=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def hooked(model):
    model.mid_block.resnets[0].register_forward_hook(lambda module, args, output: output + 1)


def replaced(model):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    layer = model.mid_block.attentions[0].to_q
    model.mid_block.attentions[0].to_q = Adapted(layer.in_features, layer.out_features)


def processed(model):
    class Processor:
        def __call__(self, attention, hidden_states, **_):
            return hidden_states * 2

    model.mid_block.attentions[0].set_processor(Processor())


def overridden(model):
    forward = model.forward
    model.forward = lambda *args, **options: diffusers.models.unets.unet_2d.UNet2DOutput(
        forward(*args, **options).sample + 1
    )


def rescaled(model):
    model.mid_block.resnets[1].output_scale_factor = 3.0


def dilated(model):
    model.conv_in.dilation = model.conv_in.padding = (2, 2)


@pytest.mark.parametrize("change", [hooked, replaced, processed, overridden, rescaled, dilated])
def test_what_its_owner_changed_runs_as_it_is(change):
    model = unet2d()
    scheduler = diffusers.DDPMScheduler(**SHORT)
    assert isinstance(adopt.as_unet(model)[0], UNet)
    before = fastddpm.sample(model, 2, schedule=scheduler, seed=1)
    change(model)
    assert adopt.as_unet(model)[0] is model
    with pytest.warns(UserWarning, match="differs from diffusers' own"):
        got = fastddpm.sample(model, 2, schedule=scheduler, seed=1)
    assert torch.equal(
        got, fastddpm.sample(wrapped(model), 2, shape=(3, 8, 8), schedule=scheduler, seed=1)
    ) and not torch.equal(got, before)


def test_a_patched_class_is_noticed(monkeypatch):
    block = diffusers.models.resnet.ResnetBlock2D
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *args, **options: forward(self, *args, **options) / 2)
    assert "the forward of ResnetBlock2D" in adopt.as_unet(unet2d())[1]


def test_what_changes_nothing_is_overlooked():
    model = unet2d()
    model.note = "mine"
    model.enable_gradient_checkpointing()
    model.compile(backend="eager")
    assert isinstance(adopt.as_unet(model)[0], UNet)
    model.register_to_config(freq_shift=1)  # the twin is made of the config
    assert adopt.as_unet(model)[0].config.freq_shift == 1


def test_what_has_no_unet_of_its_kind_runs_as_it_is():
    model = unet2d(act_fn="gelu")
    with pytest.warns(UserWarning, match="act_fn.*gelu.*runs unmodified"):
        got = fastddpm.sample(model, 2, schedule=diffusers.DDPMScheduler(**SHORT), seed=1)
    expected = fastddpm.sample(wrapped(model), 2, shape=(3, 8, 8), schedule=diffusers.DDPMScheduler(**SHORT), seed=1)
    assert torch.equal(got, expected)


def test_classes(quiet):
    model = unet2d(num_class_embeds=3)
    scheduler, labels = diffusers.DDPMScheduler(**SHORT), torch.tensor([2, 0])
    got = fastddpm.sample(model, 2, schedule=scheduler, seed=1, class_labels=labels)
    expected = fastddpm.sample(
        lambda x, t: model(x, t, class_labels=labels).sample, 2, shape=(3, 8, 8), schedule=scheduler, seed=1
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="class_labels: missing; the network has 3 classes"):
        fastddpm.sample(model, 2, schedule=scheduler)


def test_one_warning_names_what_is_assumed():
    model = unet2d()
    with pytest.warns(
        UserWarning,
        match="assumed the paper's linear schedule of 1000 steps, prediction='epsilon', clip=True; pass its",
    ) as caught:
        for _ in range(2):
            fastddpm.sample(model, 1, steps=1, variance="none")
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastddpm.sample(unet2d(), 1, schedule=Schedule([0.999]), prediction="epsilon")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_a_scheduler_s_settings_are_taken(prediction, kind):
    options = {"variance_type": "fixed_large"} if kind == "DDPMScheduler" else {}
    scheduler = getattr(diffusers, kind)(
        **SHORT, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample_range=0.5, **options
    )
    schedule = Schedule(torch.linspace(1e-4**0.5, 0.985**0.5, 4, dtype=torch.float64) ** 2)
    settings = {
        "schedule": schedule, "prediction": prediction, "clip": 0.5,
        "variance": "fixed_large" if options else "fixed_small",
    }  # fmt: skip
    model, given = wrapped(unet2d()), {"shape": (3, 8, 8), "seed": 3}
    assert torch.equal(
        fastddpm.sample(model, 2, schedule=scheduler, **given), fastddpm.sample(model, 2, **settings, **given)
    )
    for name, value in (("prediction", "epsilon"), ("clip", False), ("clip", 2.0), ("variance", "none")):
        explicit = {**settings, name: value}
        assert torch.equal(
            fastddpm.sample(model, 2, schedule=scheduler, **{name: value}, **given),
            fastddpm.sample(model, 2, **explicit, **given),
        )


def test_attributes_of_another_meaning():
    class Network(nn.Module):
        schedule, prediction, shape = "constant", 3, torch.Size([3, 8])

        def __init__(self):
            super().__init__()
            self.clip, self.variance = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, x, t):
            return x / 2

    given = {"schedule": Schedule.linear(3, 0.1, 0.999), "seed": 0, "shape": (3, 8, 8)}
    with pytest.warns(UserWarning, match="runs unmodified"):
        got = fastddpm.sample(Network(), 1, **given)
    assert torch.equal(got, fastddpm.sample(lambda x, t: x / 2, 1, **given))
    fastddpm.training_loss(Network(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="shape: missing"):
        fastddpm.sample(Network(), 1)


def test_what_a_scheduler_cannot_be_read_for():
    changed = diffusers.DDPMScheduler()
    changed.betas = changed.betas * 2
    with pytest.raises(ValueError, match="DDPMScheduler's betas are not those of its config"):
        fastddpm.sample(wrapped(unet2d()), 1, schedule=changed, shape=(3, 8, 8))
    model, given = wrapped(unet2d()), {"shape": (3, 8, 8)}
    with pytest.raises(ValueError, match="DDPMScheduler's.*thresholding"):
        fastddpm.sample(model, 1, schedule=diffusers.DDPMScheduler(thresholding=True), **given)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler's.*beta"):
        fastddpm.sample(model, 1, schedule=diffusers.FlowMatchEulerDiscreteScheduler(), **given)
    with pytest.raises(ValueError, match="schedule: got str; expected a fastddpm.Schedule or one of diffusers'"):
        fastddpm.sample(model, 1, schedule="linear", **given)


def test_everything_else_takes_one(quiet):
    model, scheduler = unet2d(), diffusers.DDPMScheduler(**SHORT)
    x0 = (torch.arange(3 * 64).reshape(1, 3, 8, 8) % 256 / 127.5 - 1).float()
    twin, given = adopt.as_unet(model)[0], {"schedule": scheduler, "seed": 2}
    shape = {"schedule": scheduler, "steps": 4}
    pairs = [
        (lambda m: fastddpm.encode(m, x0, **shape)),
        (lambda m: fastddpm.interpolate(m, x0, -x0, weights=1, **given)),
        (lambda m: fastddpm.progressive(m, 1, frames=2, **given)),
        (lambda m: fastddpm.likelihood(m, x0, quantize=True, **given).per_image),
        (lambda m: fastddpm.rate_distortion(m, x0, quantize=True, **given).rate),
    ]
    for call in pairs:
        assert torch.equal(call(model), call(twin))
    clipped = diffusers.DDPMScheduler(**SHORT, clip_sample_range=0.25)
    assert fastddpm.progressive(model, 1, frames=2, schedule=clipped, seed=0).abs().max() <= 0.25
    losses = [fastddpm.training_loss(m, x0, **given) for m in (model, wrapped(model))]
    assert torch.equal(*losses) and losses[0].requires_grad


def test_modes_and_lifetime():
    model = unet2d(dropout=0.5).train()
    scheduler = diffusers.DDPMScheduler(**SHORT)
    got = fastddpm.sample(model, 1, schedule=scheduler, seed=0)
    assert model.training and model.mid_block.training
    assert torch.equal(fastddpm.sample(model.eval(), 1, schedule=scheduler, seed=0), got)
    kept = weakref.ref(model), weakref.ref(adopt.as_unet(model)[0])
    del model
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_half_precision(quiet):
    # Betas that do not magnify roundings, at the price of a picture in x_T.
    model, scheduler = unet2d(), diffusers.DDPMScheduler(4, beta_end=0.5)
    warnings.filterwarnings("ignore", "fastddpm: schedule: .* ends at")
    warnings.filterwarnings("ignore", "fastddpm: this processor does not multiply bfloat16 in hardware")
    expected = fastddpm.sample(model, 2, schedule=scheduler, seed=1)
    got = fastddpm.sample(model, 2, schedule=scheduler, seed=1, dtype=torch.bfloat16)
    assert 0 < (got - expected).abs().max() < 0.3
    own = fastddpm.sample(model.bfloat16(), 2, schedule=scheduler, seed=1)
    assert (own - got).abs().max() < 0.05  # its embedding of t is rounded, too


def test_out_of_torch_s_wrappers():
    model = unet2d()
    expected = fastddpm.sample(model, 2, schedule=diffusers.DDPMScheduler(**SHORT), seed=0)
    for wrap in (torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile):
        got = fastddpm.sample(wrap(model), 2, schedule=diffusers.DDPMScheduler(**SHORT), seed=0)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_subclass_in_a_wrapper_has_its_shape(wrap):
    class Own(diffusers.UNet2DModel):
        def forward(self, *args):
            return super().forward(*args)

    model = Own(**TINY).eval()
    with pytest.warns(UserWarning, match="cannot represent this Own"):
        got = fastddpm.sample(wrap(model), 1, schedule=diffusers.DDPMScheduler(**SHORT), seed=0)
    assert got.shape == (1, 3, 8, 8)


def test_a_pipeline_is_told_what_to_pass():
    pipeline = diffusers.DDPMPipeline(unet2d(), diffusers.DDPMScheduler())
    with pytest.raises(
        ValueError, match=r"got a DDPMPipeline; .*sample\(pipeline.unet, n, schedule=pipeline.scheduler\)"
    ):
        fastddpm.sample(pipeline, 1)
