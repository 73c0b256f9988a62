"""The files of OpenAI's improved-diffusion and guided-diffusion, which have only tensors.

The names and shapes of the tensors determine most of the network. The flags of those libraries' scripts specify the rest: the
size of the images, the attention heads and their order, the schedule, and whether t is rescaled.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from .base import Checkpoint, channel_multipliers

MARKER_KEY = "input_blocks.0.0.weight"

# The two libraries' defaults. They differ only in rescale_timesteps, which has no default here.
FLAG_DEFAULTS = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False, "learn_sigma": False,
    "sigma_small": False, "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
    "rescale_timesteps": None, "clip_denoised": True,
}  # fmt: skip
TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
BOOL_FLAGS = {name for name, value in FLAG_DEFAULTS.items() if isinstance(value, bool)} | {"rescale_timesteps"}
# Flags of training, computation and sampling, not of the network. timestep_respacing is sample's `steps`.
IGNORED_FLAGS = (
    "use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing", "batch_size", "num_samples",
    "use_ddim", "model_path", "data_dir", "lr", "weight_decay", "lr_anneal_steps", "microbatch", "ema_rate", "log_interval",
    "save_interval", "resume_checkpoint", "fp16_scale_growth", "schedule_sampler", "classifier_path", "classifier_scale",
    "classifier_depth", "classifier_width", "classifier_attention_resolutions", "classifier_pool", "classifier_use_fp16",
    "classifier_resblock_updown", "classifier_use_scale_shift_norm",
)  # fmt: skip
DEFAULT_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2),
}  # fmt: skip

_GUIDED = "--attention_resolutions 32,16,8 --learn_sigma True --resblock_updown True"
_GUIDED_256 = f"{_GUIDED} --image_size 256 --num_channels 256 --num_head_channels 64"
_IMPROVED = "--num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_IMPROVED_LSUN = (
    "--image_size 256 --num_heads 1 --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16"
)
# The flags of OpenAI's published files, from OpenAI's READMEs. All files have averaged weights.
PUBLISHED_FLAGS = {
    "64x64_diffusion.pt": f"{_GUIDED} --class_cond True --dropout 0.1 --image_size 64 --noise_schedule cosine "
    "--num_channels 192 --num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True",
    "128x128_diffusion.pt": f"{_GUIDED} --class_cond True --image_size 128 --num_channels 256 --num_heads 4",
    "256x256_diffusion.pt": f"{_GUIDED_256} --class_cond True",
    "256x256_diffusion_uncond.pt": _GUIDED_256,
    "512x512_diffusion.pt": f"{_GUIDED} --class_cond True --image_size 512 --num_channels 256 --num_head_channels 64",
    "lsun_bedroom.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_cat.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_horse.pt": f"{_GUIDED_256} --dropout 0.1",
    "lsun_horse_nodropout.pt": _GUIDED_256,
    "imagenet64_uncond_100M_1500K.pt": f"{_IMPROVED} --rescale_timesteps True",
    "imagenet64_uncond_vlb_100M_1500K.pt": f"{_IMPROVED} --rescale_timesteps True",
    "imagenet64_cond_270M_250K.pt": f"{_IMPROVED} --num_channels 192 --class_cond True --rescale_timesteps False",
    "cifar10_uncond_50M_500K.pt": f"{_IMPROVED} --image_size 32 --dropout 0.3 --rescale_timesteps True",
    "cifar10_uncond_vlb_50M_500K.pt": f"{_IMPROVED} --image_size 32 --dropout 0.3 --rescale_timesteps True",
    "lsun_uncond_100M_1200K_bs128.pt": _IMPROVED_LSUN,
    "lsun_uncond_100M_2400K_bs64.pt": _IMPROVED_LSUN,
}

LAYERS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in", "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
SUBLAYERS = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut", "norm": "group_norm", "qkv": "qkv",
    "proj_out": "to_out.0", "op": "conv", "conv": "conv",
}  # fmt: skip


def read_state_dict(
    path: Path, state: Mapping[str, torch.Tensor], averaged: bool | None, flags: str | None
) -> Checkpoint:
    """Return the checkpoint.

    Args:
        path: file of the tensors.
        state: the tensors by name.
        averaged: True if the weights are averages, None if unknown.
        flags: flags of the libraries' scripts; None means those of OpenAI's published file of this name.
    """
    if "output_blocks.0.0.in_layers.0.weight" not in state:
        raise CheckpointError(f"{path}: this is a classifier (no decoder); expected a network that draws images")
    if state[MARKER_KEY].shape[1] == 6:
        raise CheckpointError(
            f"{path}: this is an upsampler (its input is two images); expected a network that draws from noise"
        )
    published = path.name in PUBLISHED_FLAGS
    if flags is None and not published:
        raise CheckpointError(
            f"{path}: OpenAI's files don't specify their network; pass the flags that its publisher passes to the sampling "
            'script: flags="--image_size 64 --num_channels 128 ..." (on the command line, fastddpm convert --flags)'
        )
    source = f"flags of the published {path.name}" if flags is None else "flags"
    try:
        passed = parse_flags(PUBLISHED_FLAGS[path.name] if flags is None else flags)
        values, shapes = FLAG_DEFAULTS | passed, _shapes(state)
        _check_flags(passed, shapes)
        config, schedule = _unet_config(values, shapes), _schedule(values)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: not a complete network of OpenAI's: {error} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {source}: {error}") from error
    return Checkpoint(
        "openai",
        path,
        config,
        _unet_state_dict(state, config, values["use_new_attention_order"]),
        schedule,
        "sample" if values["predict_xstart"] else "epsilon",
        "learned_range" if values["learn_sigma"] else "fixed_small" if values["sigma_small"] else "fixed_large",
        values["clip_denoised"],
        True if published else averaged,
    )


def parse_flags(flags: str) -> dict[str, object]:
    """Return the values of the flags of the network and its schedule, by name."""
    words = _split_flags(flags)
    values: dict[str, object] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (equals or words):
            raise ValueError(f"got {word!r}; expected --name value --name value ...")
        value = value if equals else words.pop(0)
        if name in ("large_size", "small_size"):
            raise ValueError(f"{name} is a flag of an upsampler; expected the flags of a network that draws from noise")
        if name in IGNORED_FLAGS:
            continue
        if name not in FLAG_DEFAULTS:
            raise ValueError(f"unknown --{name}; expected some of {', '.join(FLAG_DEFAULTS)}")
        value = _flag_value(name, value)
        if values.setdefault(name, value) != value:
            raise ValueError(f"--{name} is given twice with different values: {values[name]} and {value}")
    return values


def _split_flags(flags: str) -> list[str]:
    """Return the words of the flags, split as by a shell. Quoted flags, and MODEL_FLAGS="--image_size ...", are split too."""
    words = []
    for word in shlex.split(re.sub(r"\\(\s*\n|\s*$|\s+(?=--))", " ", flags)):
        quoted = re.fullmatch(r"[A-Z_]+=(\s*--.*)?|(\s*--\w+(?:\s|=.*\s--\w).*)", word, re.DOTALL)
        words += [word] if quoted is None else _split_flags(quoted[1] or quoted[2] or "")
    return words


def _flag_value(name: str, text: str) -> object:
    if name in BOOL_FLAGS:
        if text.lower() not in TRUE_WORDS + FALSE_WORDS:
            raise ValueError(f"--{name}: got {text!r}; expected True or False")
        return text.lower() in TRUE_WORDS
    try:
        return type(FLAG_DEFAULTS[name])(text)
    except ValueError as error:
        raise ValueError(f"--{name}: got {text!r}; expected a number") from error


def _schedule(flags: Mapping) -> Schedule:
    T, kind = flags["diffusion_steps"], flags["noise_schedule"]
    if kind == "linear":
        return Schedule.linear(T, 1000 / T * 1e-4, 1000 / T * 0.02)  # T steps with the noise of the paper's 1000
    if kind == "cosine":
        return Schedule.cosine(T)
    raise ValueError(f"--noise_schedule: got {kind!r}; expected linear or cosine")


class _Shapes(NamedTuple):
    """Options of the network, as determined by the names and shapes of its tensors.

    Attributes:
        attention_levels: levels with attention; the first level is 0.
        resblock_updown: whether residual blocks change the resolution.
    """

    in_channels: int
    out_channels: int
    channels: int
    stem_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    num_classes: int | None
    scale_shift: bool
    resblock_updown: bool


def _shapes(state: Mapping[str, torch.Tensor]) -> _Shapes:
    num_output_blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("output_blocks."))
    upsamplers = [_upsampler(state, i) for i in range(num_output_blocks)]
    ups = [i for i, name in enumerate(upsamplers) if name is not None]
    num_res_blocks = ups[0] if ups else num_output_blocks - 1  # of a level of the encoder; the decoder's has one more
    num_levels = num_output_blocks // (num_res_blocks + 1)
    firsts = [f"input_blocks.{1 + level * (num_res_blocks + 1)}" for level in range(num_levels)]  # of each level
    widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
    channels = state["time_embed.0.weight"].shape[1]
    stem_channels, in_channels = state[MARKER_KEY].shape[:2]
    return _Shapes(
        in_channels=in_channels,
        out_channels=state["out.2.weight"].shape[0],
        channels=channels,
        stem_channels=stem_channels,
        channel_mult=channel_multipliers(widths, channels),
        num_res_blocks=num_res_blocks,
        attention_levels=tuple(i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
        num_classes=state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
        scale_shift=state[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        resblock_updown=bool(ups) and "in_layers" in upsamplers[ups[0]],
    )


def _upsampler(state: Mapping[str, torch.Tensor], i: int) -> str | None:
    """Return the name of a tensor of the layer that doubles the resolution after output block i; None if there is none."""
    names = (f"output_blocks.{i}.{j}.{layer}.weight" for j in (1, 2) for layer in ("conv", "in_layers.0"))
    return next((name for name in names if name in state), None)


def _check_flags(passed: Mapping, shapes: _Shapes) -> None:
    """Raise ValueError if the passed flags and the defaults contradict the shapes, or do not specify the network."""
    flags, num_levels = FLAG_DEFAULTS | passed, len(shapes.channel_mult)
    size, T = flags["image_size"], flags["diffusion_steps"]
    # The scripts round these quotients in the same way.
    steps = [size // int(side) for side in flags["attention_resolutions"].split(",")]
    default = DEFAULT_CHANNEL_MULT.get(size, shapes.channel_mult)
    channel_mult = flags["channel_mult"].split(",") if flags["channel_mult"] else default
    pairs = {  # (the flag's value, the file's value)
        "num_channels": (flags["num_channels"], shapes.channels),
        "num_res_blocks": (flags["num_res_blocks"], shapes.num_res_blocks),
        "channel_mult": (tuple(map(float, channel_mult)), tuple(map(float, shapes.channel_mult))),
        "attention_resolutions": (
            tuple(size >> i for i in range(num_levels) if 1 << i in steps),
            tuple(size >> i for i in shapes.attention_levels),
        ),
        "class_cond": (flags["class_cond"], shapes.num_classes is not None),
        "use_scale_shift_norm": (flags["use_scale_shift_norm"], shapes.scale_shift),
        "resblock_updown": (flags["resblock_updown"] and num_levels > 1, shapes.resblock_updown),
        "learn_sigma": (flags["learn_sigma"], shapes.out_channels == 2 * shapes.in_channels),
    }
    contradictions = [
        f"--{name} {'' if name in passed else 'by default '}means {wanted}, but the file has {actual}"
        for name, (wanted, actual) in pairs.items()
        if wanted != actual
    ]
    if contradictions:
        raise ValueError("; ".join(contradictions))
    if flags["num_head_channels"] == -1 and flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise ValueError(
            f"--num_heads_upsample: got {flags['num_heads_upsample']}, but --num_heads {flags['num_heads']}; UNet has as "
            "many heads in the decoder as in the encoder"
        )
    if T != 1000 and flags["rescale_timesteps"] is None:
        raise ValueError(
            f"rescale_timesteps: missing; with --diffusion_steps {T}, rescaling changes the timesteps that the network "
            "receives. improved-diffusion rescales by default, and guided-diffusion doesn't: add "
            "--rescale_timesteps True or False"
        )


def _unet_config(flags: Mapping, shapes: _Shapes) -> UNetConfig:
    size, num_head_channels = flags["image_size"], flags["num_head_channels"]
    return UNetConfig(
        sample_size=size,
        in_channels=shapes.in_channels,
        out_channels=shapes.out_channels,
        channels=shapes.channels,
        channel_mult=shapes.channel_mult,
        num_res_blocks=shapes.num_res_blocks,
        attention_resolutions=tuple(size >> i for i in shapes.attention_levels),
        dropout=flags["dropout"],
        num_classes=shapes.num_classes,
        norm_eps=1e-5,
        stem_channels=None if shapes.stem_channels == shapes.channels else shapes.stem_channels,
        num_heads=flags["num_heads"] if num_head_channels == -1 else None,
        num_head_channels=None if num_head_channels == -1 else num_head_channels,
        scale_shift=shapes.scale_shift,
        resample="resnet" if shapes.resblock_updown else "conv",
        downsample_padding="both",
        flip_sin_to_cos=True,
        freq_shift=0,
        time_scale=1000 / flags["diffusion_steps"] if flags["rescale_timesteps"] else 1.0,
    )


def _unet_state_dict(
    state: Mapping[str, torch.Tensor], config: UNetConfig, new_attention_order: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors with UNet's names and shapes."""
    result = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        layer = _unet_layer(layer, config.num_res_blocks)
        if ".attentions." in layer and value.dim() == 3:  # a convolution with kernel size 1
            value = value.squeeze(2)
        if not layer.endswith(".qkv"):
            result[f"{layer}.{kind}" if layer else kind] = value
            continue
        heads = config.num_heads or len(value) // 3 // config.num_head_channels
        # New order: all rows of q, then k, then v. Old order: q, k and v of the first head, then of the second, and so on.
        parts = value.unflatten(0, (3, -1) if new_attention_order else (heads, 3, -1))
        parts = parts if new_attention_order else parts.transpose(0, 1).flatten(1, 2)
        for letter, part in zip("qkv", parts, strict=True):
            result[f"{layer.removesuffix('qkv')}to_{letter}.{kind}"] = part
    return result


def _unet_layer(layer: str, num_res_blocks: int) -> str:
    """Return UNet's name of a layer; an unknown name is returned unchanged."""
    if layer in LAYERS:
        return LAYERS[layer]
    match = re.fullmatch(rf"(.*?)\.({'|'.join(map(re.escape, SUBLAYERS))})", layer)
    if match is None:
        return layer
    block, sublayer = match[1], match[2]
    if block in LAYERS:
        return f"{LAYERS[block]}.{SUBLAYERS[sublayer]}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)", block)
    if match is None:
        return layer
    direction, i, place = match[1], int(match[2]), int(match[3])
    level, j = divmod(i - (direction == "input"), num_res_blocks + 1)
    if sublayer in ("norm", "qkv", "proj_out"):
        part = f"attentions.{j}"
    elif direction == "input" and j == num_res_blocks:
        part = "downsamplers.0"
    else:
        part = "upsamplers.0" if place else f"resnets.{j}"
    return f"{'down' if direction == 'input' else 'up'}_blocks.{level}.{part}.{SUBLAYERS[sublayer]}"
