"""Checkpoints: our own folders, diffusers', pytorch_diffusion's and OpenAI's files, against networks of those libraries."""

import contextlib
import dataclasses
import gc
import http.server
import inspect
import json
import math
import os
import pickle
import re
import threading
import warnings
import zlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import python, randomised, same_bits
from openai_unet import OpenAIUNet
from pesser_unet import PesserUNet
from safetensors.torch import save_file

import fastddpm
from fastddpm import Schedule, UNet, UNetConfig
from fastddpm.checkpoints import diffusers as interchange
from fastddpm.checkpoints import diffusers_options, openai, pretrained, scheduler, tensors
from fastddpm.checkpoints.base import check_state_dict
from fastddpm.errors import CheckpointError

SMALL = UNetConfig(sample_size=8, channels=8, channel_mult=(1, 2), attention_resolutions=(4,), norm_groups=4)


def every_parameter_matters(model):
    """Return the network with random weights, initialised as in other libraries."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() < 2 else 0.02))
    return model.eval()


def quietly(*arguments, **options):
    """Call from_pretrained and ignore its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return UNet.from_pretrained(*arguments, **options)


def says(*arguments, **options):
    """Return (the network, the warnings of from_pretrained)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return UNet.from_pretrained(*arguments, **options), "\n".join(str(warning.message) for warning in caught)


def same_network(a, b):
    assert a.config == b.config and a.schedule == b.schedule
    assert (a.prediction, a.variance, a.clip) == (b.prediction, b.variance, b.clip)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(same_bits(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def close(ours, theirs, bound):
    assert (ours - theirs).abs().max() <= bound * max(1, theirs.abs().max())


def edit(path, change):
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


# --- our own folder


def test_save_and_load(tmp_path):
    model = randomised(SMALL)
    model.schedule, model.prediction, model.variance, model.clip = Schedule.cosine(30), "mean", "none", 1.5
    model.save_pretrained(tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = UNet.from_pretrained(tmp_path / "new" / "folder")
    same_network(loaded, model)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    edit(tmp_path / "new" / "folder" / "config.json", lambda c: c.pop("clip"))
    assert UNet.from_pretrained(tmp_path / "new" / "folder").clip is True


def test_a_config_with_every_option(tmp_path):
    config = dataclasses.replace(
        SMALL, out_channels=6, norm_eps=1e-5, up_attention_resolutions=(8, 4), stem_channels=4, num_heads=2,
        scale_shift=True, resample="resnet", downsample_padding="both", flip_sin_to_cos=True, freq_shift=0,
        time_scale=0.25, center_input=True, middle_groups=0, middle_scale=math.sqrt(2), num_classes=3,
        channel_mult=(0.5, 2),
    )  # fmt: skip
    model = randomised(config)
    model.save_pretrained(tmp_path)
    same_network(UNet.from_pretrained(tmp_path), model)


def test_a_config_with_the_old_names_of_options(tmp_path):
    config = dataclasses.replace(SMALL, num_classes=3, num_heads=2, downsample_padding="both")
    model = randomised(config)
    model.save_pretrained(tmp_path)
    old = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "channels": 8, "multipliers": [1, 2], "blocks": 2,
        "attention": [4], "dropout": 0.0, "groups": 4, "classes": 3, "eps": 1e-6, "attention_up": None, "stem": None,
        "heads": 2, "head_channels": None, "scale_shift": False, "resample": "conv", "pad": "both",
    }  # fmt: skip
    edit(tmp_path / "config.json", lambda c: c.update(unet=old))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_network(UNet.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_load_as_float32(tmp_path, dtype):
    model = randomised(SMALL)
    model.save_pretrained(tmp_path)
    save_file({k: v.to(dtype) for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    for k, v in UNet.from_pretrained(tmp_path).state_dict().items():
        assert same_bits(v, model.state_dict()[k].to(dtype).float())


def test_a_loaded_network_is_its_own(tmp_path):
    """The network can be trained, and later changes of the file, even in place, do not affect it."""
    model = randomised(dataclasses.replace(SMALL, channels=32))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "pipeline", format="diffusers")
    torch.save(model.state_dict(), tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin")
    paths = [tmp_path / "model.safetensors", *(tmp_path / "pipeline" / "unet").glob("diffusion*.safetensors")]
    loaded = [UNet.from_pretrained(tmp_path), quietly(tmp_path / "pipeline")]
    paths[1].unlink()
    loaded.append(quietly(tmp_path / "pipeline"))  # the .bin
    for path in (paths[0], tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.bin"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    for other in loaded:
        same_network(other, model)
        storages = {p.untyped_storage().data_ptr() for p in other.parameters()}
        assert len(storages) == len(list(other.parameters()))  # a copy of a layer isn't one of the whole file
        fastddpm.training_loss(other, torch.randn(2, 3, 8, 8)).mean().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:1000]), "truncated"),
        (
            lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
            "git lfs pull",
        ),
        (lambda d: (d / "model.safetensors").unlink(), "missing"),
        (lambda d: (d / "config.json").unlink(), "missing"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "config.json").write_text('{"_class_name": "UNet2DModel"}'), "another library"),
        (lambda d: edit(d / "config.json", lambda c: c["unet"].update(channels=16)), "of another shape"),
        (
            lambda d: edit(d / "config.json", lambda c: c["unet"].update(num_res_blocks=3)),
            "tensors do not fit this network",
        ),
        (
            lambda d: edit(d / "config.json", lambda c: c["unet"].update(attention_resolutions=[8])),
            "attention is at other levels",
        ),
        (lambda d: edit(d / "config.json", lambda c: c["unet"].update(out_channels=6)), "belong to these weights"),
        (lambda d: edit(d / "config.json", lambda c: c["unet"].update(wings=2)), "unet: .*wings"),
        (lambda d: edit(d / "config.json", lambda c: c.update(prediction="future")), "prediction: got 'future'"),
        (lambda d: edit(d / "config.json", lambda c: c.update(clip="yes")), "clip: got 'yes'"),
        (lambda d: edit(d / "config.json", lambda c: c["schedule"].update(start=2.0)), "schedule: betas"),
        (lambda d: edit(d / "config.json", lambda c: c.pop("schedule")), "schedule: 'schedule' is missing"),
    ],
)
def test_bad_folders(tmp_path, spoil, says):
    randomised(SMALL).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        UNet.from_pretrained(tmp_path)


MIXED = {
    "a": torch.randn(3, 5),
    "empty": torch.empty(0, 4),
    "half": torch.randn(7).half(),
    "b": torch.randn(257, 3, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "brain": torch.randn(2, 2).bfloat16(),
    "c": torch.randn(1000),
}


@pytest.mark.parametrize(("piece", "most"), [(8 << 20, 1000), (64, 1000), (8 << 20, 2), (1, 1)])
def test_reading_by_pieces(tmp_path, monkeypatch, piece, most):
    monkeypatch.setattr(tensors.TensorReader, "PIECE_BYTES", piece)
    monkeypatch.setattr(tensors.TensorReader, "MAX_PIECE_TENSORS", most)
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file(MIXED, paths[0], metadata={"format": "pt"})
    save_file({"d": torch.randn(11)}, paths[1])
    reader = tensors.TensorReader.open(paths)
    for value in reader.state.values():  # what isn't read would show
        value.fill_(torch.nan)
    for path in paths:  # a file that is replaced is another one
        save_file({"z": torch.zeros(3000)}, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    threads = [threading.Thread(target=reader) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.state.keys() == MIXED.keys() | {"d"}
    assert all(same_bits(reader.state[name], value) for name, value in MIXED.items())
    assert not reader.state["d"].isnan().any()


def test_reading_what_the_system_gives_at_a_time(tmp_path, monkeypatch):
    save_file(MIXED, tmp_path / "a.safetensors")
    reader, whole = tensors.TensorReader.open([tmp_path / "a.safetensors"]), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: whole(file, [views[0].reshape(-1).view("u1")[:5]], at))
    reader()
    assert all(same_bits(reader.state[name], value) for name, value in MIXED.items())


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"a": torch.randn(1000)}, tmp_path / "a.safetensors")
    reader = tensors.TensorReader.open([tmp_path / "a.safetensors"])
    with open(tmp_path / "a.safetensors", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a complete safetensors file .*truncated while"):
        reader()


def test_a_disk_that_fails(tmp_path, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    save_file(MIXED, tmp_path / "a.safetensors")
    reader = tensors.TensorReader.open([tmp_path / "a.safetensors"])
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a complete safetensors file .*Input/output error"):
        reader()


def test_what_is_left_to_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int64)}, path)
    assert tensors.TensorReader.open([path]) is None
    assert tensors.TensorReader.open([tmp_path / "missing.safetensors"]) is None
    assert tensors.TensorReader.open([tmp_path / "a.bin"]) is None
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, path)
    good = path.read_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    for bad in (
        b"",
        good[:4],
        good[:-1],
        good + b"x",
        (1 << 60).to_bytes(8, "little") + good[8:],
        good[:8] + b"x" * (size - 8) + good[size:],
        good.replace(b"[3]", b"[2]"),
        good.replace(b"[12,20]", b"[13,21]"),
        good.replace(b"[3]", b'""'),
        good.replace(b"[0,12]", b"[0   ]"),
    ):
        path.write_bytes(bad)
        assert tensors.TensorReader.open([path]) is None, bad
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            tensors.load_file(path)


def test_loading_leaves_the_garbage_collector_as_it_was(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path / "ema")
    gc.disable()
    try:
        UNet.from_pretrained(tmp_path / "ema")
        assert not gc.isenabled()
    finally:
        gc.enable()
    UNet.from_pretrained(tmp_path / "ema")
    assert gc.isenabled()
    edit(tmp_path / "ema" / "config.json", lambda config: config["unet"].update(channel_mult=[1]))
    with pytest.raises(CheckpointError):
        UNet.from_pretrained(tmp_path / "ema")
    assert gc.isenabled()


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
def test_a_network_loaded_in_inference_mode_can_be_trained(format, tmp_path):
    UNet(SMALL).save_pretrained(tmp_path / "ema", format=format)
    with torch.inference_mode():
        model = UNet.from_pretrained(tmp_path / "ema")
    fastddpm.training_loss(model, torch.zeros(1, *model.shape)).backward()
    model.load_state_dict(UNet(SMALL).state_dict())


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
def test_what_is_saved_is_read_in_one_pass(format, tmp_path, monkeypatch):
    """The file is read into memory, not mapped and copied."""
    UNet(SMALL).save_pretrained(tmp_path / "ema", format=format)
    monkeypatch.delattr(tensors, "load_file")
    UNet.from_pretrained(tmp_path / "ema")


def test_a_network_lands_on_the_default_device():
    with torch.device("meta"):
        assert all(p.is_meta for p in UNet.from_pretrained("digits").parameters())
    assert not any(p.is_meta for p in UNet.from_pretrained("digits").parameters())


def test_a_folder_holds_one_model(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path)
    (tmp_path / "other" / "unet_ema").mkdir(parents=True)
    (tmp_path / "parts" / "unet").mkdir(parents=True)
    (tmp_path / "parts" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    UNet(SMALL).save_pretrained(tmp_path / "theirs", format="diffusers")
    UNet(SMALL).save_pretrained(tmp_path / "theirs", format="diffusers")  # over itself is fine
    for folder, format, says in (
        (tmp_path, "diffusers", "a model of fastddpm, which would be read instead"),
        (tmp_path / "other", "diffusers", "unet_ema, which"),
        (tmp_path / "parts", "diffusers", "weights in parts, which"),
        (tmp_path / "theirs", "fastddpm", "a model of diffusers, which diffusers would continue to read"),
    ):
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match=f"folder: .* already has {says}"):
            UNet(SMALL).save_pretrained(folder, format=format)
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
def test_a_save_that_fails_leaves_no_folders(format, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="No space"):
        UNet(SMALL).save_pretrained(tmp_path / "there" / "new" / "deep", format=format)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("mid_block.resnets.0.conv1.bias"), "1 missing .* copied and saved completely"),
        (
            lambda s: [s.pop("mid_block.resnets.0.conv1.bias"), s.update({"conv_in.bias": torch.zeros(9)})],
            "1 missing .* 1 of another shape .*belong to these weights",
        ),
        (lambda s: s.update({"mid_block.attn2.to_k.weight": torch.zeros(2)}), "1 unknown .*UNet2DConditionModel"),
        (lambda s: s.update({"conv_out.weight": torch.zeros(6, 8, 3, 3)}), "6 output channels, half of them"),
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}),
            "1 not of floating point .*conv_in.bias",
        ),
        (lambda s: [s.pop(k) for k in list(s)] and s.update(a=torch.zeros(1)), "the checkpoint of another network"),
    ],
)
def test_the_likely_cause(spoil, says):
    state = UNet(SMALL).state_dict()
    spoil(state)
    with pytest.raises(CheckpointError, match=f"^some.pt: its tensors do not fit this network: .*{says}"):
        check_state_dict(UNet(SMALL).state_dict(), state, Path("some.pt"))


def test_names_and_arguments(tmp_path):
    with pytest.raises(CheckpointError, match="'numbers' is neither a folder nor a bundled model"):
        UNet.from_pretrained("numbers")
    with pytest.raises(CheckpointError, match=r"'runs/numbers\.pt' is neither a folder nor .* nor a file"):
        UNet.from_pretrained("runs/numbers.pt")
    with pytest.raises(CheckpointError, match="has no model; expected config.json"):
        UNet.from_pretrained(tmp_path)
    randomised(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision: got 'main', but"):
        UNet.from_pretrained(tmp_path, revision="main")
    with pytest.raises(ValueError, match="flags: got '"):
        UNet.from_pretrained(tmp_path, flags="--image_size 64")
    with pytest.raises(CheckpointError, match="pass the folder instead, "):
        UNet.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "format", "says"),
    [
        ({"prediction": "future"}, "fastddpm", "prediction: got 'future'"),
        ({"variance": "large"}, "fastddpm", "variance: got 'large'"),
        ({"clip": -1}, "fastddpm", "clip: got -1"),
        ({"prediction": "mean"}, "diffusers", "prediction: 'mean'"),
        ({"variance": "none"}, "diffusers", "variance: 'none'"),
        ({}, "onnx", "format: got 'onnx'; expected one of fastddpm, diffusers"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tmp_path, change, format, says):
    model = UNet(SMALL)
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=says):
        model.save_pretrained(tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


# --- diffusers


def diffusers_model(**options):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    standard = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    return every_parameter_matters(diffusers.UNet2DModel(**(standard | options)))


def embedding_float64(timesteps, dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
    """diffusers' get_timestep_embedding without its cast to float32."""
    k = torch.arange(dim // 2, dtype=torch.float64)
    angles = scale * timesteps.double()[:, None] * max_period ** (-k / (dim // 2 - downscale_freq_shift))
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(pair, dim=1)


RESNET = ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D")
NETWORKS = {
    "paper": {
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "attention_head_dim": None,
        "layers_per_block": 2,
    },
    "class defaults": {},  # of everything that this leaves open: heads of 8 channels, padding all around, cosines first
    "several heads, attention up alone": {
        "attention_head_dim": 2, "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    },
    "scale and shift, no norm in the middle": {"resnet_time_scale_shift": "scale_shift"},
    "scale and shift, a norm in the middle": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "another norm in the middle": {"attn_norm_num_groups": 2, "mid_block_scale_factor": math.sqrt(2)},
    "residual resampling": {
        "block_out_channels": (8, 8, 16), "down_block_types": RESNET, "resnet_time_scale_shift": "scale_shift",
        "up_block_types": tuple(name.replace("Downsample", "Upsample") for name in RESNET), "attn_norm_num_groups": 4,
    },
    "residual resampling after attention": {
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"), "downsample_type": "resnet",
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"), "upsample_type": "resnet",
        "block_out_channels": (8, 8, 16),
    },
    "no attention in the middle": {"add_attention": False, "mid_block_scale_factor": 2.0},
    "centred input, learned variance": {"center_input_sample": True, "out_channels": 6, "dropout": 0.25},
    "classes": {"num_class_embeds": 5, "act_fn": "swish", "time_embedding_dim": 32},
    "one level": {
        "block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("AttnUpBlock2D",),
        "downsample_type": "resnet", "in_channels": 1, "out_channels": 1,
    },
    "widths that are no multiples": {
        "block_out_channels": (12, 16, 20), "attention_head_dim": 4, "sample_size": (8, 8), "norm_num_groups": 2,
        "down_block_types": ("AttnDownBlock2D",) * 3, "up_block_types": ("AttnUpBlock2D",) * 3,
    },
}  # fmt: skip


def as_pipeline(folder, network, **trained):
    """Write a folder with diffusers. trained: options of its DDPMScheduler."""
    import diffusers

    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**trained)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_folders(name, tmp_path, monkeypatch):
    """Each network agrees in float64 and float32. diffusers' pipeline draws from the written folder; reading it is exact."""
    peer = diffusers_model(**NETWORKS[name])
    model = quietly(as_pipeline(tmp_path / "theirs", peer))
    classes, C, side = model.config.num_classes, model.config.in_channels, model.config.sample_size
    x, labels = torch.randn(100, C, side, side), torch.arange(100) % classes if classes else None
    with torch.no_grad():
        for t in torch.arange(1000).split(100):
            close(model(x, t, labels), peer(x, t, class_labels=labels).sample, 1e-4)
        model, peer, x = model.double(), peer.double(), x.double()
        monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding_float64)
        for t in torch.arange(1000).split(100):
            close(model(x, t, labels), peer(x, t, class_labels=labels).sample, 1e-10)

    import diffusers

    model.float().save_pretrained(tmp_path / "ours", format="diffusers")
    same_network(quietly(tmp_path / "ours"), model)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet").double()
    with torch.no_grad():
        assert torch.equal(again(x, t, class_labels=labels).sample, peer(x, t, class_labels=labels).sample)
    if classes is None and model.config.out_channels == C:
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(num_inference_steps=2, output_type="np").images
        assert drawn.shape == (1, side, side, C)


@pytest.mark.parametrize("flip_sin_to_cos", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_the_embedding_at_every_timestep(flip_sin_to_cos, freq_shift, tmp_path, monkeypatch):
    peer = diffusers_model(flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
    model = quietly(as_pipeline(tmp_path, peer))
    t = torch.arange(1000)
    with torch.no_grad():
        close(model.time_embedding(t), peer.time_embedding(peer.time_proj(t)), 1e-4)
        model, peer = model.double(), peer.double()
        monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding_float64)
        close(model.time_embedding(t), peer.time_embedding(peer.time_proj(t)), 1e-10)


def test_options_that_a_config_leaves_out_are_the_classs():
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if name != "self"}  # older ones have fewer
    assert theirs == {name: diffusers_options.UNET2D_DEFAULTS[name] for name in theirs}
    ours = diffusers_options.unet_config({"sample_size": 8})
    assert ours == diffusers_options.unet_config(diffusers_options.unet_options(ours)) and ours.widths == [
        224,
        448,
        672,
        896,
    ]
    assert (ours.flip_sin_to_cos, ours.freq_shift, ours.norm_eps, ours.downsample_padding, ours.num_head_channels) == (
        True,
        0,
        1e-5,
        "both",
        8,
    )
    for cls in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        for name, p in inspect.signature(cls.__init__).parameters.items():
            assert scheduler.SCHEDULER_DEFAULTS.get(name, p.default) == p.default


def test_a_learned_variance_is_drawn_from_by_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    model = randomised(dataclasses.replace(SMALL, out_channels=6))
    model.variance, model.clip, model.schedule = "learned_range", 2.0, Schedule.linear(20, 1e-3, 0.3)
    model.save_pretrained(tmp_path, format="diffusers")
    same_network(quietly(tmp_path), model)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.clip_sample_range == 2.0 and len(pipeline.scheduler.betas) == 20
    assert pipeline(num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"time_scale": 0.25}, "time_scale: got 0.25"),
        ({"stem_channels": 4}, "stem_channels: got 4"),
        ({"channel_mult": (2, 4)}, r"channel_mult: got \(2, 4\)"),
        ({"middle_groups": 0}, "middle_groups: got 0"),
        ({"num_heads": 2, "attention_resolutions": (8, 4)}, r"num_heads: got 2; .* \[8, 16, 16\]"),
    ],
)
def test_networks_that_diffusers_has_not(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        UNet(dataclasses.replace(SMALL, **change)).save_pretrained(tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, num_heads=2),
        dataclasses.replace(SMALL, middle_groups=8, middle_attention=False),
        dataclasses.replace(SMALL, middle_groups=8, scale_shift=True),
        dataclasses.replace(
            SMALL, up_attention_resolutions=(4,), stem_channels=8, num_head_channels=16, channel_mult=(1.0, 2.0)
        ),
        dataclasses.replace(SMALL, attention_resolutions=(4, 64)),
    ],
)
def test_the_same_network_in_other_words(config, tmp_path):
    """Options that can be written in several ways are written in one of them."""
    model = randomised(config)
    model.save_pretrained(tmp_path, format="diffusers")
    loaded = quietly(tmp_path)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(loaded(x, t), model(x, t))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name: got 'UNet2DConditionModel'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type: got 'fourier'"),
        ({"time_embedding_type": "learned"}, "time_embedding_type: got 'learned'"),
        ({"time_embedding_dim": 64}, "time_embedding_dim: got 64; expected None or 32"),
        ({"act_fn": "mish"}, "act_fn: got 'mish'"),
        ({"class_embed_type": "timestep"}, "class_embed_type: got 'timestep'"),
        ({"mid_block_type": None}, "mid_block_type: got None"),
        ({"sample_size": None}, "sample_size: got None"),
        ({"sample_size": [8, 16]}, r"sample_size: got \[8, 16\]"),
        ({"sample_size": 9}, "sample_size: 9 cannot be halved"),
        ({"attention_head_dim": 5}, "attention_head_dim: got 5; expected None or a divisor of 16"),
        ({"attention_head_dim": 32}, "attention_head_dim: got 32"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift: got 'spatial'"),
        ({"downsample_padding": 2}, "downsample_padding: got 2"),
        (
            {"down_block_types": ["AttnSkipDownBlock2D", "AttnDownBlock2D"]},
            "down_block_types: got .*AttnSkipDownBlock2D",
        ),
        (
            {"up_block_types": ["AttnDownBlock2D", "UpBlock2D"]},
            "up_block_types: got .*expected, for each level, one of UpBlock2D",
        ),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types: got"),
        (
            {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "upsample_type": "resnet"},
            "resample by convolutions at some",
        ),
        ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "upsample_type": "fir"}, "upsample_type: got 'fir'"),
        ({"norm_num_groups": None}, "norm_num_groups: got None"),
        ({"layers_per_block": 0}, "layers_per_block: got 0"),
        ({"attn_norm_num_groups": 3}, "attn_norm_num_groups: 16 channels cannot be divided into 3 groups"),
        ({"norm_num_groups": 3}, "norm_num_groups: 8 channels cannot be divided"),
        ({"block_out_channels": 8}, "config.json: "),
    ],
)
def test_diffusers_networks_that_unet_is_not(change, says, tmp_path):
    UNet(SMALL).save_pretrained(tmp_path, format="diffusers")
    edit(tmp_path / "unet" / "config.json", lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=f"config.json: .*{says}" if "json" not in says else says):
        UNet.from_pretrained(tmp_path)


def test_an_option_that_diffusers_ignores_is_ignored_aloud(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path / "ema", format="diffusers")
    edit(tmp_path / "ema" / "unet" / "config.json", lambda c: c.update(wings=2, _name_or_path="x", tail=None))
    with pytest.warns(UserWarning, match="config.json: wings: not an option of UNet2DModel; ignored"):
        UNet.from_pretrained(tmp_path / "ema")


def test_layouts(tmp_path):
    """Files at the root, with .bin and in parts; unet_ema is read before unet; a missing scheduler; latent models."""
    import diffusers

    peer = diffusers_model()
    expected = peer.state_dict()

    def holds(folder, **says):
        loaded = quietly(folder)
        assert all(same_bits(v, expected[k]) for k, v in loaded.state_dict().items())
        return loaded

    peer.save_pretrained(tmp_path / "root", safe_serialization=False)
    assert (tmp_path / "root" / "diffusion_pytorch_model.bin").is_file()
    message = says(tmp_path / "root")[1]
    assert (
        "root: has no scheduler_config.json; assuming the paper's linear schedule of 1000 steps, epsilon, fixed_large"
        in message
    )
    assert holds(tmp_path / "root").variance == "fixed_large"
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "root")
    model = holds(tmp_path / "root")
    assert model.schedule != Schedule.linear() and model.variance == "fixed_small"

    peer.save_pretrained(tmp_path / "parts" / "unet", max_shard_size="20KB")
    assert len(list((tmp_path / "parts" / "unet").glob("*.safetensors"))) > 2
    holds(tmp_path / "parts")
    next((tmp_path / "parts" / "unet").glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="-00002-of-.* missing in its folder"):
        UNet.from_pretrained(tmp_path / "parts")

    peer.half().save_pretrained(tmp_path / "half" / "unet", variant="fp16")
    expected = {k: v.float() for k, v in peer.state_dict().items()}
    holds(tmp_path / "half")
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="has no weights; expected next to config.json one of diffusion_pytorch_model"
    ):
        UNet.from_pretrained(tmp_path / "half")

    expected = every_parameter_matters(diffusers_model()).state_dict()
    averaged = diffusers_model()
    averaged.load_state_dict(expected)
    as_pipeline(tmp_path / "both", diffusers_model())
    averaged.save_pretrained(tmp_path / "both" / "unet_ema")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNet.from_pretrained(tmp_path / "both")
    holds(tmp_path / "both")
    edit(tmp_path / "both" / "model_index.json", lambda c: c.update(vqvae=["diffusers", "VQModel"], other=[None, None]))
    with pytest.raises(CheckpointError, match="the pipeline has vqvae besides a unet and a scheduler"):
        UNet.from_pretrained(tmp_path / "both")


def test_a_learned_variance_is_assumed_of_twice_the_channels(tmp_path):
    diffusers_model(out_channels=6).save_pretrained(tmp_path)
    assert quietly(tmp_path).variance == "learned_range"


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_old_names_of_attention(dims, tmp_path):
    """Attention with old names (query, key, value, proj_attn), as linear layers or 1x1 convolutions, or with present names."""
    peer = diffusers_model()
    folder = as_pipeline(tmp_path, peer)
    old = {new: name for name, new in interchange.LEGACY_ATTENTION.items()}
    for names in (old, {}):
        state = {}
        for name, value in peer.state_dict().items():
            layer = next((new for new in old if f".{new}." in name and ".attentions." in name), None)
            if layer is not None:
                name = name.replace(f".{layer}.", f".{names.get(layer, layer)}.")
                value = value.reshape(*value.shape, *[1] * (dims - 2)) if value.dim() == 2 else value
            state[name] = value
        save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(same_bits(v, peer.state_dict()[k]) for k, v in quietly(folder).state_dict().items())


# --- a scheduler's config


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("T", [1000, 37])
def test_betas_are_diffusers(kind, T, tmp_path):
    """Betas agree with diffusers' float32, are computed in float64, and are written by name where possible."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(T, 0.00085, 0.012, kind)
    read = scheduler.settings_from_config(dict(theirs.config), "it:")
    assert (read[0].betas - theirs.betas.double()).abs().max() <= 2e-7 and len(read[0]) == T
    assert (read[0].alphas_cumprod - theirs.alphas_cumprod.double()).abs().max() <= 1e-5
    written = scheduler.config_from_settings(*read)
    assert ("trained_betas" in written) == (kind == "sigmoid")
    assert scheduler.settings_from_config(json.loads(json.dumps(written)), "it:") == read
    again = diffusers.DDPMScheduler.from_config(written)
    assert (again.betas - theirs.betas).abs().max() <= 2e-7


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("T", [1000, 37, 2])
def test_zero_snr_is_diffusers(kind, T):
    """Betas equal those of diffusers' own function in float64. Both libraries read what is written."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    config = {"num_train_timesteps": T, "beta_schedule": kind}
    plain = scheduler.settings_from_config(config, "it:")[0]
    read = scheduler.settings_from_config(
        {**config, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "it:"
    )
    assert (read[0].betas - rescale_zero_terminal_snr(plain.betas)).abs().max() <= 1e-12
    assert read[0].betas[-1] == 1 and read[0].betas[0] == plain.betas[0]
    written = json.loads(json.dumps(scheduler.config_from_settings(*read)))
    assert scheduler.settings_from_config(written, "it:") == read
    for cls in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        theirs = cls.from_config(written)
        assert theirs.alphas_cumprod[-1] == 0
        assert (theirs.alphas_cumprod - read[0].alphas_cumprod).abs().max() <= 2e-6
    solver = diffusers.DPMSolverMultistepScheduler.from_config(written)
    assert solver.lambda_t.isfinite().all()
    given = diffusers.DDPMScheduler(**config, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    # The float32 betas of the scheduler are recognised as those of its config.
    fastddpm.sample(lambda x, t: 0 * x, 1, shape=(1, 2, 2), schedule=given, steps=1)


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
def test_networks_with_zero_snr(format, tmp_path):
    """Such networks are saved and read with their schedule, but not with epsilon, which does not determine x0."""
    diffusers = pytest.importorskip("diffusers")
    model = randomised(SMALL)
    model.schedule, model.prediction = Schedule([0.1, 0.3, 0.6, 1.0]), "v_prediction"
    model.save_pretrained(tmp_path / "v", format=format)
    same_network(quietly(tmp_path / "v"), model)
    assert fastddpm.sample(quietly(tmp_path / "v"), 1, seed=0).isfinite().all()
    model.prediction = "epsilon"
    with pytest.raises(ValueError, match="prediction: got 'epsilon' .* x0 cannot be recovered from eps"):
        model.save_pretrained(tmp_path / "eps", format=format)
    assert not (tmp_path / "eps").exists()
    if format == "diffusers":
        pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "v")
        pipeline.set_progress_bar_config(disable=True)
        assert torch.from_numpy(pipeline(num_inference_steps=4, output_type="np").images).isfinite().all()
        edit(tmp_path / "v" / "scheduler" / "scheduler_config.json", lambda c: c.update(prediction_type="epsilon"))
    else:
        edit(tmp_path / "v" / "config.json", lambda c: c.update(prediction="epsilon"))
    with pytest.raises(CheckpointError, match="prediction: got 'epsilon' .* x0 cannot be recovered from eps"):
        UNet.from_pretrained(tmp_path / "v")


@pytest.mark.parametrize("start", [None, "low"])
def test_a_linear_schedule_without_its_ends_is_not_read_as_another(start, tmp_path):
    UNet(SMALL).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda c: c["schedule"].update(start=start, T=10))
    with pytest.raises(CheckpointError, match="config.json: schedule: "):
        UNet.from_pretrained(tmp_path)


def test_any_betas_survive(tmp_path):
    schedule = Schedule(torch.rand(50, dtype=torch.float64) * 0.1 + 1e-5)
    written = json.loads(json.dumps(scheduler.config_from_settings(schedule, "sample", "fixed_small", 0.5)))
    assert scheduler.settings_from_config(written, "it:") == (schedule, "sample", "fixed_small", 0.5)
    for clip in (True, False, 3.0):
        read = scheduler.settings_from_config(
            scheduler.config_from_settings(schedule, "epsilon", "fixed_large", clip), "it:"
        )
        assert read[3] == clip and type(read[3]) is type(clip)
    diffusers = pytest.importorskip("diffusers")
    assert torch.equal(diffusers.DDPMScheduler.from_config(written).betas, schedule.betas.float())


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_schedulers_of_other_classes(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, f"{name}Scheduler")(500, 1e-3, 0.03, prediction_type="v_prediction")
    theirs.save_pretrained(tmp_path)
    for config in (dict(theirs.config), json.loads((tmp_path / "scheduler_config.json").read_text())):
        assert scheduler.settings_from_config(config, "it:") == (
            Schedule.linear(500, 1e-3, 0.03),
            "v_prediction",
            "fixed_small",
            True,
        )


@pytest.mark.parametrize(
    ("change", "reads"),
    [
        ({}, ("epsilon", "fixed_small", True)),
        ({"clip_sample": False}, ("epsilon", "fixed_small", False)),
        ({"clip_sample_range": 2}, ("epsilon", "fixed_small", 2)),
        ({"clip_sample": False, "clip_sample_range": 2}, ("epsilon", "fixed_small", False)),
        ({"variance_type": "fixed_small_log"}, ("epsilon", "fixed_small", True)),
        ({"variance_type": "fixed_large"}, ("epsilon", "fixed_large", True)),
        ({"variance_type": "learned_range", "prediction_type": "sample"}, ("sample", "learned_range", True)),
        ({"timestep_spacing": "trailing", "steps_offset": 1, "thresholding": False}, ("epsilon", "fixed_small", True)),
    ],
)
def test_scheduler_options(change, reads):
    read = scheduler.settings_from_config({"_class_name": "DDPMScheduler", **change}, "it:")
    assert read == (Schedule.linear(), *reads) and isinstance(read[3], bool) == isinstance(reads[2], bool)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule: got 'laplace'; expected one of linear, scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type: got 'flow_prediction'"),
        ({"prediction_type": "mean"}, "prediction_type: got 'mean'"),
        ({"variance_type": "learned"}, "variance_type: got 'learned'"),
        ({"variance_type": "fixed_large_log"}, "variance_type: got 'fixed_large_log'"),
        ({"variance_type": "none"}, "variance_type: got 'none'"),
        ({"thresholding": True}, "thresholding: got True"),
        (
            {"rescale_betas_zero_snr": True, "num_train_timesteps": 1},
            "sets the last to 1; expected at least 2 timesteps",
        ),
        ({"clip_sample_range": 0}, "clip_sample_range: got 0"),
        ({"clip_sample_range": None}, "clip_sample_range: got None"),
        ({"beta_end": 1.5}, r"beta_end: betas: betas\[\d+\] = "),
        ({"beta_start": None}, "num_train_timesteps, beta_start, beta_end: "),
        ({"num_train_timesteps": 0}, r"num_train_timesteps, .*: betas: got shape \[0\]"),
        ({"trained_betas": [1.0, 0.1]}, r"trained_betas: betas: betas\[0\] = 1.0"),
        ({"trained_betas": "many"}, "trained_betas: "),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "beta_schedule: missing; FlowMatchEulerDiscreteScheduler",
        ),
    ],
)
def test_scheduler_refusals(change, says):
    with pytest.raises(ValueError, match=f"^its .*{says}"):
        scheduler.settings_from_config({"_class_name": "DDPMScheduler", **change}, "its")


def test_a_folder_with_a_bad_scheduler_names_the_file(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path, format="diffusers")
    edit(tmp_path / "scheduler" / "scheduler_config.json", lambda c: c.update(thresholding=True))
    with pytest.raises(CheckpointError, match="scheduler_config.json: thresholding: got True"):
        UNet.from_pretrained(tmp_path)


# --- pytorch_diffusion


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention", "variance"),
    [((1, 2, 2), 2, 1, "fixed_large"), ((1, 1, 2), 1, 2, "fixed_small"), ((1,), 1, 0, "fixed_small")],
)
def test_pesser(multipliers, blocks, attention, variance, tmp_path):
    peer = every_parameter_matters(PesserUNet(32, multipliers, blocks, attention))
    state = {k: v.float() for k, v in peer.state_dict().items()}
    torch.save(state, tmp_path / "ema_new.ckpt")
    torch.save(state, tmp_path / "ema_old.ckpt", _use_new_zipfile_serialization=False)  # as the published ones are
    model = UNet.from_pretrained(tmp_path / "ema_new.ckpt")
    same_network(UNet.from_pretrained(str(tmp_path / "ema_old.ckpt")), model)
    side = 16 << attention
    assert model.shape == (3, side, side) and model.schedule == Schedule.linear() and model.clip is True
    assert (model.prediction, model.variance) == ("epsilon", variance)
    model, peer, x = model.double(), peer.double(), torch.randn(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        for t in map(torch.tensor, ([0, 1], [500, 999])):
            close(model(x, t), peer(x, t), 1e-10)


def test_pesser_where_the_side_cannot_be_told(tmp_path):
    torch.save(PesserUNet(32, (1, 2), 1, attention=7).state_dict(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match="model.ckpt: .*attention at 0 levels; expected one, at 16x16"):
        UNet.from_pretrained(tmp_path / "model.ckpt")


def test_the_ddim_authors_container(tmp_path):
    """[model, optimizer, epoch, step, averages]: the model's names have the prefix "module.", those of the averages do not."""
    raw, averaged = (every_parameter_matters(PesserUNet(32, (1,), 1, 0)).state_dict() for _ in range(2))
    states = [{f"module.{k}": v for k, v in raw.items()}, {"state": {}, "param_groups": []}, 3, 500]
    torch.save(states, tmp_path / "raw.pth")
    with pytest.warns(UserWarning, match="its weights are not known to be averages"):
        model = UNet.from_pretrained(tmp_path / "raw.pth")
    assert torch.equal(model.conv_in.weight, raw["conv_in.weight"])
    torch.save([*states, averaged], tmp_path / "ckpt.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = UNet.from_pretrained(tmp_path / "ckpt.pth")
    assert torch.equal(model.conv_in.weight, averaged["conv_in.weight"])


# --- OpenAI

GUIDED = "--image_size 64 --num_res_blocks 1 --num_channels 32 --channel_mult 1,2 --rescale_timesteps False"
OPENAI = {
    "legacy heads": (
        {"heads": 4, "attention": (1, 2)},
        "--attention_resolutions 32,16 --channel_mult 1,1,2",
        ((1, 1, 2), {}),
    ),
    "the new order": (
        {"heads": 2, "attention": (1,), "new_order": True, "scale_shift": False},
        "--attention_resolutions 32 --num_heads 2 --use_new_attention_order True --use_scale_shift_norm False",
        ((1, 2), {"variance": "fixed_large"}),
    ),
    "wide heads, residual resampling, classes, learned variance": (
        {"heads": lambda width: width // 16, "attention": (1,), "new_order": True, "updown": True, "classes": 7, "outputs": 6},
        "--attention_resolutions 32 --num_head_channels 16 --use_new_attention_order True --resblock_updown True "
        "--class_cond True --learn_sigma True",
        ((1, 2), {"variance": "learned_range"}),
    ),
    "legacy wide heads, a narrow stem": (
        {"heads": lambda width: width // 16, "attention": (2,), "updown": True, "stem": 32},
        "--num_channels 64 --channel_mult 0.5,1,1 --attention_resolutions 16 --num_head_channels 16 --resblock_updown True",
        ((0.5, 1, 1), {}),
    ),
    "a stem that the first level isn't as wide as": (
        {"heads": 1, "attention": (1,)},
        "--channel_mult 2,1 --attention_resolutions 32 --num_heads 1 --predict_xstart True --sigma_small True",
        ((2, 1), {"prediction": "sample", "variance": "fixed_small"}),
    ),
    "4000 rescaled timesteps, more blocks": (
        {"heads": 4, "attention": (1,), "blocks": 3},
        "--num_res_blocks 3 --attention_resolutions 32 --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True",
        ((1, 2), {"schedule": Schedule.cosine(4000)}),
    ),
    "4000 timesteps as they are": (
        {"heads": 4, "attention": ()},
        "--attention_resolutions 4 --diffusion_steps 4000 --num_heads_upsample 4 --clip_denoised False",
        ((1, 2), {"schedule": Schedule.linear(4000, 2.5e-5, 5e-3), "clip": False}),
    ),
    "one level": ({"heads": 4, "attention": (0,)}, "--channel_mult 1 --attention_resolutions 64", ((1,), {})),
}  # fmt: skip


def openai_flags(more, **others):
    """Return GUIDED with the flags in `more` and `others` replaced; None omits a flag."""
    given = dict(zip((words := f"{GUIDED} {more}".split())[::2], words[1::2], strict=True))
    given |= {f"--{name}": value for name, value in others.items()}
    return " ".join(f"{name} {value}" for name, value in given.items() if value is not None)


FITTING = openai_flags("--attention_resolutions 32")  # what openai_file makes


def openai_file(path, multipliers=(1, 2), channels=32, blocks=1, **options):
    torch.manual_seed(2)
    peer = every_parameter_matters(OpenAIUNet(channels, multipliers, blocks, options.pop("attention", (1,)), **options))
    torch.save(peer.state_dict(), path)
    return peer


@pytest.mark.parametrize("name", OPENAI)
def test_openai(name, tmp_path):
    options, more, (multipliers, trained) = OPENAI[name]
    flags = openai_flags(more)
    channels = int(re.search(r"--num_channels (\d+)", flags)[1])
    peer = openai_file(tmp_path / "ema_0.9999_000100.pt", multipliers, channels, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = UNet.from_pretrained(tmp_path / "ema_0.9999_000100.pt", flags=flags)
    expected = {
        "schedule": Schedule.linear(),
        "prediction": "epsilon",
        "variance": "fixed_large",
        "clip": True,
    } | trained
    assert {key: getattr(model, key) for key in expected} == expected
    model, peer = model.double(), peer.double()
    x, labels = (
        torch.randn(2, 3, 64, 64)[..., :16, :16].double(),
        torch.tensor([0, 6]) if model.config.num_classes else None,
    )
    T = len(model.schedule)
    with torch.no_grad():
        for t in map(torch.tensor, ([0, 1], [T // 2, T - 1])):
            scaled = t * (1000 / T) if "--rescale_timesteps True" in flags else t
            close(model(x, t, labels), peer(x, scaled, labels), 1e-10)


def test_the_published_files():
    """The flags of each published file fit a network of its size, and specify its training."""
    sizes = {  # parameters in millions, learned variance in all
        "64x64_diffusion.pt": (295.9, 64), "128x128_diffusion.pt": (421.5, 128), "256x256_diffusion.pt": (553.8, 256),
        "256x256_diffusion_uncond.pt": (552.8, 256), "512x512_diffusion.pt": (559.0, 512), "lsun_bedroom.pt": (552.8, 256),
        "lsun_cat.pt": (552.8, 256), "lsun_horse.pt": (552.8, 256), "lsun_horse_nodropout.pt": (552.8, 256),
        "imagenet64_uncond_100M_1500K.pt": (121.1, 64), "imagenet64_uncond_vlb_100M_1500K.pt": (121.1, 64),
        "imagenet64_cond_270M_250K.pt": (273.0, 64), "cifar10_uncond_50M_500K.pt": (52.5, 32),
        "cifar10_uncond_vlb_50M_500K.pt": (52.5, 32), "lsun_uncond_100M_1200K_bs128.pt": (113.7, 256),
        "lsun_uncond_100M_2400K_bs64.pt": (113.7, 256),
    }  # fmt: skip
    assert sizes.keys() == openai.PUBLISHED_FLAGS.keys()
    for name, (millions, side) in sizes.items():
        flags = openai.FLAG_DEFAULTS | openai.parse_flags(openai.PUBLISHED_FLAGS[name])
        multipliers = openai.DEFAULT_CHANNEL_MULT[flags["image_size"]]
        wide, heads = flags["num_head_channels"], flags["num_heads"]
        levels = [i for i in range(len(multipliers)) if str(side >> i) in flags["attention_resolutions"].split(",")]
        with torch.device("meta"):
            peer = OpenAIUNet(
                flags["num_channels"], multipliers, flags["num_res_blocks"], levels, outputs=6,
                stem=int(multipliers[0] * flags["num_channels"]), classes=1000 if flags["class_cond"] else None,
                heads=(lambda width, wide=wide: width // wide) if wide > 0 else heads,
                scale_shift=flags["use_scale_shift_norm"], updown=flags["resblock_updown"],
            )  # fmt: skip
            read = openai.read_state_dict(Path(name), peer.state_dict(), None, None)
            own = UNet(read.config)
        check_state_dict(own.state_dict(), read.state, Path(name))
        assert abs(sum(p.numel() for p in own.parameters()) / 1e6 - millions) < 0.06, name
        assert read.averaged and read.variance == "learned_range" and read.config.sample_size == side
        cosine = "cosine" in openai.PUBLISHED_FLAGS[name]
        rescaled = len(read.schedule) == 4000 and "cond_270M" not in name
        assert read.config.time_scale == (0.25 if rescaled else 1.0)
        T = 4000 if name.startswith(("imagenet64", "cifar10")) else 1000
        assert read.schedule == (Schedule.cosine(T) if cosine else Schedule.linear(T))
    assert openai.PUBLISHED_FLAGS["lsun_cat.pt"] != openai.PUBLISHED_FLAGS["lsun_horse_nodropout.pt"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_channels": 64}, "--num_channels means 64, but the file has 32"),
        ({"num_channels": None}, "--num_channels by default means 128, but the file has 32"),
        ({"num_res_blocks": 2}, "--num_res_blocks means 2, but the file has 1"),
        ({"channel_mult": "1,2,2"}, r"--channel_mult means \(1.0, 2.0, 2.0\), but the file has \(1.0, 2.0\)"),
        ({"channel_mult": None}, r"--channel_mult by default means \(1.0, 2.0, 3.0, 4.0\)"),
        ({"attention_resolutions": 64}, r"--attention_resolutions means \(64,\), but the file has \(32,\)"),
        ({"class_cond": True}, "--class_cond means True, but the file has False"),
        ({"learn_sigma": True}, "--learn_sigma means True"),
        ({"use_scale_shift_norm": False}, "--use_scale_shift_norm means False"),
        ({"resblock_updown": True}, "--resblock_updown means True"),
        ({"image_size": 32}, r"--attention_resolutions means \(32,\), but the file has \(16,\)"),
        ({"num_heads": 5}, "heads: 64 channels, at which there is attention, cannot be divided by 5"),
        ({"num_heads_upsample": 2}, "--num_heads_upsample: got 2, but --num_heads 4"),
        ({"noise_schedule": "sqrt"}, "--noise_schedule: got 'sqrt'"),
        ({"rescale_timesteps": "maybe"}, "--rescale_timesteps: got 'maybe'; expected True or False"),
        (
            {"diffusion_steps": 4000, "rescale_timesteps": None},
            "rescale_timesteps: missing; with --diffusion_steps 4000",
        ),
        ({"num_heads": "four"}, "--num_heads: got 'four'; expected a number"),
        ({"wings": 2}, "unknown --wings; expected some of image_size"),
        ({"large_size": 256}, "large_size is a flag of an upsampler"),
        ("--image_size 32", "--image_size is given twice with different values: 64 and 32"),
        ("image_size 64", "got 'image_size'; expected --name value"),
        ("--class_cond", "got '--class_cond'; expected --name value"),
        ("--model_path 'ema.pt", "No closing quotation"),
    ],
)
def test_flags_that_contradict(more, says, tmp_path):
    path = tmp_path / "ema_0.9999_1.pt"
    openai_file(path)
    flags = openai_flags("--attention_resolutions 32", **more) if isinstance(more, dict) else f"{FITTING} {more}"
    with pytest.raises(CheckpointError, match=f"ema_0.9999_1.pt: flags: .*{says}"):
        UNet.from_pretrained(path, flags=flags)


def test_flags_as_they_stand_in_a_readme(tmp_path):
    path = tmp_path / "ema_0.9999_1.pt"
    openai_file(path)
    text = (
        f'MODEL_FLAGS="{FITTING} --num_heads=4 \\\n--image_size 64"\nSAMPLE_FLAGS="--batch_size 4 --timestep_respacing 250"'
        "\nEMPTY= --model_path 'my models/A=B.pt' \\"
    )
    same_network(UNet.from_pretrained(path, flags=text), UNet.from_pretrained(path, flags=FITTING))
    for text in (
        f'"{FITTING}"',
        f'MODEL_FLAGS=" {FITTING}"',
        f'MODEL_FLAGS="\\\n  {FITTING}"',
        f"{FITTING} --model_path ''",
        '"' + FITTING.replace(" ", "=", 1) + '"',
        FITTING.replace(" --", " \\ --"),
    ):
        assert openai.parse_flags(text) == openai.parse_flags(FITTING)


def test_openai_files_that_are_refused(tmp_path):
    peer = openai_file(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="model.pt: OpenAI's files don't specify .* flags=\"--image_size 64"):
        UNet.from_pretrained(tmp_path / "model.pt")
    state = peer.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("output")}, tmp_path / "64x64_classifier.pt")
    with pytest.raises(CheckpointError, match="64x64_classifier.pt: this is a classifier"):
        UNet.from_pretrained(tmp_path / "64x64_classifier.pt", flags=FITTING)
    upsampler = state | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}
    torch.save(upsampler, tmp_path / "64_256_upsampler.pt")
    with pytest.raises(CheckpointError, match="64_256_upsampler.pt: this is an upsampler"):
        UNet.from_pretrained(tmp_path / "64_256_upsampler.pt")
    torch.save(state, tmp_path / "64x64_diffusion.pt")
    with pytest.raises(CheckpointError, match="flags of the published 64x64_diffusion.pt: --num_channels means 192"):
        UNet.from_pretrained(tmp_path / "64x64_diffusion.pt")
    torch.save({k: v for k, v in state.items() if not k.startswith("out.2")}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="not a complete network of OpenAI's: 'out.2.weight' is missing"):
        UNet.from_pretrained(tmp_path / "part.pt", flags=FITTING)
    torch.save(state | {"middle_block.0.in_layers.2.bias": torch.zeros(3)}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match="mid_block.resnets.0.conv1.bias has shape"):
        UNet.from_pretrained(tmp_path / "wide.pt", flags=FITTING)
    torch.save({f"model.diffusion_model.{k}": v for k, v in state.items()} | {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2)
    }, tmp_path / "latent.ckpt")  # fmt: skip
    with pytest.raises(CheckpointError, match="1 unknown .* It has cross-attention to text"):
        UNet.from_pretrained(tmp_path / "latent.ckpt", flags=FITTING)


# --- which weights, and what a file holds


def test_a_log_folder_of_openai(tmp_path):
    """A folder loads the newest average. A raw file loads with a warning that names the average."""
    for name in (
        "ema_0.999_000200.pt",
        "ema_0.9999_000200.pt",
        "ema_0.9999_000100.pt",
        "model000200.pt",
        "model000100.pt",
    ):
        openai_file(tmp_path / name)
    torch.save({}, tmp_path / "opt000200.pt")
    assert pretrained.read_checkpoint(tmp_path, flags=FITTING).path.name == "ema_0.9999_000200.pt"
    assert says(tmp_path, flags=FITTING)[1] == ""
    message = says(tmp_path / "model000100.pt", flags=FITTING)[1]
    assert (
        "model000100.pt: its weights" in message and "; ema_0.9999_000200.pt in the same folder has averages" in message
    )
    for path in tmp_path.glob("ema*"):
        path.unlink()
    assert pretrained.read_checkpoint(tmp_path, flags=FITTING).path.name == "model000200.pt"
    message = says(tmp_path, flags=FITTING)[1]
    assert "model000200.pt: its weights" in message and "in the same folder" not in message


@pytest.mark.parametrize(
    ("name", "averaged"),
    [
        ("ema_model.ckpt", True), ("model-EMA.ckpt", True), ("model.ema.ckpt", True), ("ddpm_ema_32/model.ckpt", True),
        ("model.ckpt", False), ("cinema.ckpt", False), ("schema-2.ckpt", False), ("model_non_ema.ckpt", False),
        ("no-ema.ckpt", False), ("ema/sub/model.ckpt", False),
    ],
)  # fmt: skip
def test_names_that_say_so(name, averaged, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(PesserUNet(32, (1,), 1, 0).state_dict(), path)
    assert ("averages over training (EMA)" in says(path)[1]) != averaged


def test_a_folder_is_asked_by_its_name(tmp_path):
    for name in ("raw", "ddpm-ema-cifar10"):
        UNet(SMALL).save_pretrained(tmp_path / name, format="diffusers")
    assert "averages over training" in says(tmp_path / "raw")[1] and not says(tmp_path / "ddpm-ema-cifar10")[1]


CONTAINERS = {
    "bare": (lambda raw, ema: raw, False),
    "DataParallel": (lambda raw, ema: {f"module.{k}": v for k, v in raw.items()}, False),
    "with an average": (lambda raw, ema: {"model": raw, "ema": ema, "step": 3, "opt": {"state": {}}}, True),
    "an average alone": (lambda raw, ema: {"ema_state_dict": ema}, True),
    "without": (lambda raw, ema: {"state_dict": raw, "epoch": 1}, False),
    "nested": (lambda raw, ema: {"model": {"state_dict": OrderedDict(raw)}}, False),
    "a shadow": (lambda raw, ema: {"net": raw, "ema": {"decay": 0.999, "shadow": ema}}, True),
    "an EMA module": (
        lambda raw, ema: {f"online_model.{k}": v for k, v in raw.items()} | {f"ema_model.{k}": v for k, v in ema.items()}
        | {"initted": torch.tensor(True), "step": torch.tensor(1)},
        True,
    ),
    "Lightning": (
        lambda raw, ema: {"state_dict": {f"model.unet.{k}": v for k, v in raw.items()} | {"loss.weight": torch.ones(1)}},
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers(name, tmp_path):
    raw, ema = (every_parameter_matters(PesserUNet(32, (1,), 1, 0)).state_dict() for _ in range(2))
    make, averaged = CONTAINERS[name]
    torch.save(make(raw, ema), tmp_path / "x.pt")
    model, message = says(tmp_path / "x.pt")
    assert torch.equal(model.conv_in.weight, (ema if averaged else raw)["conv_in.weight"])
    assert ("averages over training" in message) != averaged
    if name == "bare":
        save_file(raw, tmp_path / "x.safetensors")
        same_network(quietly(tmp_path / "x.safetensors"), model)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([1, 2], "has no tensors of a network; it contains list"),
        ({"epoch": 3, "lr": 0.1}, "has no tensors of a network; it contains the entries epoch, lr"),
        ({"a.temb.dense.0.weight": torch.ones(1), "b.temb.dense.0.weight": torch.ones(1)}, "contains several networks"),
        ({"temb.dense.0.weight": torch.ones(1)}, "not a network of pytorch_diffusion: 'conv_in.weight'"),
        (
            {"model": {"init_conv.weight": torch.ones(1)}},
            "denoising-diffusion-pytorch's.; its tensors are init_conv.weight",
        ),
        ({"w": torch.ones(1)}, "unsupported architecture .unknown."),
    ],
)
def test_files_without_a_network(held, says, tmp_path):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"x.pt: .*{says}"):
        UNet.from_pretrained(tmp_path / "x.pt")


def test_damaged_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(PesserUNet(32, (1,), 1, 0).state_dict(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x89PNG\r\n", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        expected = "git lfs pull" if content.startswith(b"version") else "not a complete torch checkpoint"
        with pytest.raises(CheckpointError, match=f"x.pt: .*{expected}") as error:
            UNet.from_pretrained(path)
        assert "weights_only" not in str(error.value)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_pickle_runs_nothing(zipped, place, tmp_path):
    marker = tmp_path / "executed"
    UNet(SMALL).save_pretrained(tmp_path / "ema", format="diffusers")
    (tmp_path / "ema" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    path = tmp_path / "x.pt" if place == "file" else tmp_path / "ema" / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"model": Malice(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"contains more than tensors \(.*\), .* nothing was read") as error:
        UNet.from_pretrained(path if place == "file" else tmp_path / "ema")
    assert "torch.save(model.state_dict(), path)" in str(error.value) and "weights_only" not in str(error.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the pickle is one that would have run


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_any_protocol_runs_nothing(protocol, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "x.bin"
    path.write_bytes(pickle.dumps({"model": Malice(marker)}, protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            CheckpointError, match=r"contains more than tensors \((pathlib|os|posix|.*getattr).*nothing was"
        ):
            UNet.from_pretrained(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_pickle_is_said_to_hold(zipped, protocol, tmp_path):
    path, state = tmp_path / "ema.pt", UNet(SMALL).state_dict()
    held = {"collections": 1, "model": state, "args": Malice(tmp_path / "executed")}  # words that names are made of
    torch.save(held, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    name = "a pickle in another protocol" if protocol > 2 and not zipped else r"(?!.*OrderedDict)[\w.]+\)"
    with pytest.raises(CheckpointError, match=rf"contains more than tensors \({name}"):
        UNet.from_pretrained(path)
    if protocol > 2:
        path.write_bytes(pickle.dumps(OrderedDict(a=1), protocol))
        with pytest.raises(CheckpointError, match=r"\(a pickle in another protocol than torch.save's\)"):
            UNet.from_pretrained(path)


@pytest.mark.parametrize(
    "held", [b"c", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc", b"no pickle at all"]
)
def test_what_is_no_pickle(held, tmp_path):
    (tmp_path / "ema.pt").write_bytes(held)
    with pytest.raises(CheckpointError, match="not a complete torch checkpoint"):
        UNet.from_pretrained(tmp_path / "ema.pt")


def test_a_warning_points_to_the_line_that_loads(tmp_path):
    UNet(SMALL).save_pretrained(tmp_path, format="diffusers")
    with pytest.warns(UserWarning, match="averages over training") as caught:
        UNet.from_pretrained(tmp_path)
    assert {w.filename for w in caught} == {__file__}


# --- the Hub


@pytest.fixture
def cache(tmp_path):
    """Create a cache of huggingface_hub with a diffusers model and a fastddpm model."""
    for name, format in (("me/ddpm-ema-digits", "diffusers"), ("me/own", "fastddpm")):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        randomised(SMALL).save_pretrained(repository / "snapshots" / ("a" * 40), format=format)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    return tmp_path / "hub"


def offline(code, cache, tmp_path):
    pytest.importorskip("huggingface_hub")
    result = python(f"import fastddpm\n{code}", tmp_path, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    return result.stdout, result.stderr


def test_the_hubs_cache_without_a_network(cache, tmp_path):
    out, err = offline(
        """
for name in ("me/ddpm-ema-digits", "me/own"):
    print(fastddpm.UNet.from_pretrained(name).config.channels)
print(fastddpm.UNet.from_pretrained("me/own", revision="a" * 40).config.channels)
for arguments in ({"name": "me/other"}, {"name": "me/own", "revision": "v2"}):
    try:
        fastddpm.UNet.from_pretrained(**arguments)
    except ValueError as error:
        print(error)
""",
        cache,
        tmp_path,
    )
    assert out.splitlines()[:3] == ["8", "8", "8"] and "Warning" not in err, err
    first, second = out.splitlines()[3:]
    assert "'me/other' is no local folder or file, the Hugging Face Hub cannot be reached (" in first
    assert "hf download me/other --local-dir FOLDER" in first and "its cache has no such model" in first
    assert "its cache has no revision 'v2' of it" in second


COMMIT = "b" * 40


@contextlib.contextmanager
def hub(repositories):
    """Yield (the address of a Hub with these folders by name, the files downloaded so far)."""
    downloaded = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, content=b"", status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.split("?")[0].removeprefix("/api/models")
            _, owner, name, *rest = path.split("/")
            folder = repositories.get(f"{owner}/{name}")
            if folder is None or folder == "gated":
                code = "GatedRepo" if folder else "RepoNotFound"
                return self.reply(status=403 if folder else 404, X_Error_Code=code)
            if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
                return self.reply(status=404, X_Error_Code="RevisionNotFound")
            if rest[:1] == ["resolve"]:
                content = (folder / "/".join(rest[2:])).read_bytes()
                if self.command == "GET":
                    downloaded.append("/".join(rest[2:]))
                return self.reply(content, ETag=f'"{zlib.crc32(content):08x}"')
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            names = [file.relative_to(folder).as_posix() for file in files]
            if rest[:1] == ["tree"]:
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "c" * 40}
                    for name, file in zip(names, files, strict=True)
                ]
                return self.reply(json.dumps(entries).encode())
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.reply(json.dumps(info).encode())

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", downloaded
        server.shutdown()


def test_the_hub(tmp_path):
    """Only one kind of weights is downloaded, with the configs. Files in the cache are not requested again."""
    pytest.importorskip("huggingface_hub")
    randomised(SMALL).save_pretrained(tmp_path / "ddpm", format="diffusers")
    for other in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "README.md"):
        (tmp_path / "ddpm" / other).write_text("not asked for")
    randomised(SMALL).save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "samples.png").write_text("not asked for")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_text("{}")
    code = """
import warnings, fastddpm
warnings.simplefilter("error", UserWarning)
for name, revision in (("me/own", None), ("me/own", "main"), ("me/own", "%s"), ("me/own", "v9"), ("me/text", None),
                       ("me/gated", None), ("me/none", None), ("me/ddpm", None)):
    try:
        print(fastddpm.UNet.from_pretrained(name, revision=revision).config.channels)
    except (ValueError, UserWarning) as message:
        print(message)
"""
    repositories = {f"me/{name}": tmp_path / name for name in ("own", "ddpm", "text")} | {"me/gated": "gated"}
    with hub(repositories) as (address, downloaded):
        result = python(
            code % COMMIT, tmp_path, HF_ENDPOINT=address, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="0"
        )
    lines = result.stdout.splitlines()
    assert lines[:3] == ["8", "8", "8"], result.stderr
    assert lines[3] == "revision: 'v9' is not a branch, tag or commit of 'me/own' on the Hub"
    assert "'me/text' on the Hub has no diffusers or fastddpm model; its files are tokenizer.json" in lines[4]
    assert "'me/gated' on the Hugging Face Hub requires accepting its terms" in lines[5]
    assert "'me/none' is no local folder or file, and no model on the Hugging Face Hub" in lines[6]
    assert "diffusion_pytorch_model.safetensors: its weights are not known to be averages" in lines[7]
    assert sorted(downloaded) == [
        "config.json", "model.safetensors", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    again = "import fastddpm; print(*(fastddpm.UNet.from_pretrained(name).config.channels for name in ('me/own', 'me/ddpm')))"
    assert offline(again, tmp_path / "cache", tmp_path)[0] == "8 8\n"  # of a cache that hasn't all there is on the Hub


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'pip install "fastddpm\[hub\]"'):
        UNet.from_pretrained("me/ddpm")


# ------------------------------------------------------------------------------------- what must not happen


def other(model):
    """A network of the same shapes that computes something else, with other weights."""
    return every_parameter_matters(UNet(dataclasses.replace(model.config, flip_sin_to_cos=True, num_heads=2)))


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
def test_a_save_that_fails_leaves_the_model_that_was_there(format, tmp_path, monkeypatch):
    first = randomised(SMALL)
    first.save_pretrained(tmp_path / "ema", format=format)
    write = Path.write_text

    def full(path, *arguments, **options):
        if "config" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        other(first).save_pretrained(tmp_path / "ema", format=format)
    same_network(quietly(tmp_path / "ema"), first)
    assert not [path for path in (tmp_path / "ema").rglob("*") if path.name.startswith(".")]


def test_another_librarys_folder_is_not_written_into(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=r"folder: .* has the config\.json of another model"):
        randomised(SMALL).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_parts_are_read_before_a_file_beside_them(tmp_path):
    """Split weights are read before a single file, as in diffusers."""
    network = diffusers_model()
    network.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"older")
    state = quietly(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for held in ({}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "../x.safetensors"}}):
        index.write_text(json.dumps(held))
        with pytest.raises(CheckpointError, match="weight_map: expected names of files"):
            UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", ["ema", "params_ema", "ema_params", "unet_ema", "shadow"])
def test_averages_are_found_under_any_name(entry, tmp_path):
    model = PesserUNet(32, (1, 1), 1, attention=1)
    raw = model.state_dict()
    averaged = {name: value + 1 for name, value in raw.items()}
    torch.save({"model": raw, entry: averaged}, tmp_path / "x.pt")
    found = pretrained.read_checkpoint(tmp_path / "x.pt")
    assert found.averaged and torch.equal(found.state["conv_in.bias"], averaged["conv_in.bias"])
    torch.save({"model": raw, "ema": {"decay": torch.tensor(0.5)}}, tmp_path / "x.pt")
    assert torch.equal(pretrained.read_checkpoint(tmp_path / "x.pt").state["conv_in.bias"], raw["conv_in.bias"])


def test_odd_but_harmless_files(tmp_path):
    held = {"step": 1}
    held["model"] = held
    torch.save(held, tmp_path / "itself.pt")
    with pytest.raises(CheckpointError, match="has no tensors of a network"):
        UNet.from_pretrained(tmp_path / "itself.pt")
    state = PesserUNet(32, (1, 1), 1, attention=1).state_dict()
    for value in (torch.zeros(1).expand(1 << 14, 1 << 15), torch.empty(32, device="meta"), torch.eye(32).to_sparse()):
        torch.save({**state, "conv_in.bias": value}, tmp_path / "odd-ema.pt")
        with pytest.raises(
            CheckpointError, match=r"odd-ema.pt: .*(conv_in\.bias isn't a dense tensor|not a complete torch)"
        ):
            UNet.from_pretrained(tmp_path / "odd-ema.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [0, 8]}, {"block_out_channels": []}, {"block_out_channels": {"a": 1}},
        {"down_block_types": [1, 2]}, {"norm_eps": "1e-5"}, {"dropout": None},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_another_kind(change, tmp_path):
    diffusers_model().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match="config.json: "):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["fastddpm", "diffusers"])
@pytest.mark.parametrize("name", ["model.ckpt", "ema_model.ckpt"])
def test_converting_keeps_whether_weights_are_averages(name, format, tmp_path):
    from click.testing import CliRunner

    from fastddpm.cli import cli

    torch.save(PesserUNet(32, (1, 1), 1, attention=1).state_dict(), tmp_path / name)
    made = CliRunner().invoke(cli, ["convert", str(tmp_path / name), str(tmp_path / "out"), "--to", format])
    assert made.exit_code == 0, made.output
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        UNet.from_pretrained(tmp_path / "out")
    assert [str(w.message) for w in caught if "averages over training" in str(w.message)] == ([] if "ema" in name else [
        str(caught[0].message)
    ])  # fmt: skip
    if format == "diffusers":
        theirs = pytest.importorskip("diffusers").UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
        theirs.save_pretrained(tmp_path / "later" / "unet")  # perhaps trained meanwhile: it says nothing any more
        assert pretrained.read_checkpoint(tmp_path / "later").averaged is False


def test_the_networks_folder_of_a_pipelines(tmp_path):
    """The scheduler's folder is next to the network's."""
    model = randomised(SMALL)
    model.schedule, model.prediction, model.variance, model.clip = (
        Schedule.cosine(30),
        "v_prediction",
        "fixed_small",
        1.5,
    )
    model.save_pretrained(tmp_path / "ema", format="diffusers")
    found = quietly(tmp_path / "ema" / "unet")
    same_network(found, model)
    (tmp_path / "other" / "pipe-ema").mkdir(parents=True)
    (tmp_path / "ema" / "unet").rename(tmp_path / "other" / "pipe-ema" / "unet")
    (tmp_path / "ema" / "scheduler").rename(tmp_path / "other" / "scheduler")  # which is another pipeline's
    with pytest.warns(UserWarning, match=r"no scheduler_config\.json; assuming"):
        assert UNet.from_pretrained(tmp_path / "other" / "pipe-ema").prediction == "epsilon"
    with pytest.warns(UserWarning, match=r"no scheduler_config\.json; assuming"):
        assert UNet.from_pretrained(tmp_path / "other" / "pipe-ema" / "unet").prediction == "epsilon"


def test_a_variance_that_the_network_does_not_have_is_told(tmp_path):
    model = randomised(SMALL)
    model.save_pretrained(tmp_path / "ema", format="diffusers")
    edit(tmp_path / "ema" / "scheduler" / "scheduler_config.json", lambda c: c.update(variance_type="learned_range"))
    with pytest.warns(
        UserWarning, match="learned_range, .*requires 6 output channels, but it has 3; pass another variance"
    ):
        loaded = UNet.from_pretrained(tmp_path / "ema")
    fastddpm.sample(loaded, 1, schedule=Schedule.linear(2, 0.1, 0.99), variance="fixed_large")


def test_the_silent_default_of_heads_is_told(tmp_path):
    diffusers_model(down_block_types=("DownBlock2D", "AttnDownBlock2D")).save_pretrained(tmp_path)
    quietly(tmp_path)
    edit(tmp_path / "config.json", lambda config: config.pop("attention_head_dim"))
    with pytest.warns(UserWarning, match=r"config\.json: no attention_head_dim, so heads are 8 channels wide"):
        assert UNet.from_pretrained(tmp_path).config.num_head_channels == 8


def test_what_diffusers_ema_writes_beside_the_options(tmp_path):
    network, training_utils = diffusers_model(), pytest.importorskip("diffusers.training_utils")
    average = training_utils.EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)
    average.step(network.parameters())
    average.save_pretrained(tmp_path / "unet_ema")
    pytest.importorskip("diffusers").DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNet.from_pretrained(tmp_path)
