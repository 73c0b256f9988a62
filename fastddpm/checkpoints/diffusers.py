"""diffusers' folders: UNet2DModel's config and weights, a scheduler's config beside them. Imports nothing of diffusers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from ..files import made, whole
from ..notices import warn_once
from ..schedule import Schedule
from ..unet import UNet, UNetConfig
from . import scheduler, tensors
from .base import CheckpointError, Read, multiples

CONFIG, INDEX, SCHEDULER = "config.json", "model_index.json", "scheduler_config.json"
ANCHOR = "time_embedding.linear_1.weight"  # a name that no other format has
STEM = "diffusion_pytorch_model"
WEIGHTS = tuple(  # in the order in which one is chosen
    STEM + ending
    for ending in (
        ".safetensors.index.json",
        ".safetensors",
        ".bin.index.json",
        ".bin",
        ".fp16.safetensors",
        ".fp16.bin",
    )
)
# The options of UNet2DModel by the values that its class gives those that a config leaves out.
DEFAULTS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1,
    "downsample_padding": 1, "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu",
    "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "num_train_timesteps": None,
}  # fmt: skip
# What diffusers' EMAModel writes among them.
EMA_OPTIONS = (
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
)  # fmt: skip
# The options that both have, by UNetConfig's names.
SAME = {
    "in_channels": "in_channels", "out_channels": "out_channels", "blocks": "layers_per_block", "dropout": "dropout",
    "groups": "norm_num_groups", "classes": "num_class_embeds", "eps": "norm_eps", "flip_sin_to_cos": "flip_sin_to_cos",
    "freq_shift": "freq_shift", "center_input": "center_input_sample", "middle_attention": "add_attention",
    "middle_scale": "mid_block_scale_factor",
}  # fmt: skip
TOLD_BY = SAME | {
    "channels": "block_out_channels", "multipliers": "block_out_channels", "middle_groups": "attn_norm_num_groups",
}  # fmt: skip
# What a block type says: whether it attends, and how it resamples (None: as down- or upsample_type says).
BLOCKS = {
    "DownBlock2D": (False, "conv"), "ResnetDownsampleBlock2D": (False, "resnet"), "AttnDownBlock2D": (True, None),
    "UpBlock2D": (False, "conv"), "ResnetUpsampleBlock2D": (False, "resnet"), "AttnUpBlock2D": (True, None),
}  # fmt: skip
# Attention as diffusers wrote it up to version 0.12; then as today. Either may be 1x1 convolutions.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


class Layout(NamedTuple):
    """The files of a network by their names within a folder or a repository; None for what isn't there."""

    config: str
    weights: str | None
    parts: list[str]  # that the weights are split into
    scheduler: str | None
    index: str | None

    @property
    def files(self) -> list[str]:
        return [name for name in (self.config, self.weights, *self.parts, self.scheduler, self.index) if name]


def layout(files: Collection[str]) -> Layout | None:
    """Of all the names in a folder or repository those that matter; averaged weights before raw ones."""
    folder = next((folder for folder in ("unet_ema/", "unet/", "") if folder + CONFIG in files), None)
    if folder is None:
        return None
    return Layout(
        folder + CONFIG,
        next((folder + name for name in WEIGHTS if folder + name in files), None),
        sorted(name for name in files if re.fullmatch(re.escape(folder + STEM) + r"-\d+-of-\d+\..*", name)),
        next((name for name in (f"scheduler/{SCHEDULER}", SCHEDULER) if name in files), None),
        INDEX if INDEX in files else None,
    )


def read(folder: Path, found: Layout) -> Read:
    if found.index is not None:
        index = _json(folder / found.index)
        foreign = [
            name
            for name, value in index.items()
            if name not in ("unet", "scheduler") and isinstance(value, list) and value[:1] != [None]
        ]
        if foreign:
            raise CheckpointError(
                f"{folder / found.index}: the pipeline has {', '.join(foreign)} beside its unet and scheduler; a UNet alone "
                "wouldn't draw its images"
            )
    path = folder / found.config
    notes: list[str] = []
    options = _json(path)
    config = _wrapped(options, path, notes)
    if found.weights is None:
        raise CheckpointError(f"{path.parent}: no weights beside {CONFIG}; expected one of {', '.join(WEIGHTS)}")
    state, averaged, fill = _state(folder / found.weights)
    # diffusers keeps _averaged when it saves what it has loaded, and perhaps trained, but adds its version.
    if found.config.startswith("unet_ema/") or (
        options.get("_averaged") is True and "_diffusers_version" not in options
    ):
        averaged = True
    described = None if found.scheduler is None else folder / found.scheduler
    if described is None and folder.name in ("unet", "unet_ema"):
        described = folder.parent / "scheduler" / SCHEDULER  # a part of a pipeline's folder was named
    if described is not None and described.is_file():
        try:
            trained = scheduler.read(_json(described), f"{described}:")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    else:
        variance = "learned_range" if config.out_channels == 2 * config.in_channels else "fixed_large"
        trained = (Schedule.linear(), "epsilon", variance, True)
        notes.append(
            f"{folder}: no {SCHEDULER}; assumed the paper's linear schedule of 1000 steps, epsilon, {variance} and clipping"
        )
    return Read("diffusers", folder / found.weights, config, renamed(state), *trained, averaged, notes, fill)


def write(model: UNet, folder: Path, extra: dict | None = None) -> None:
    """A folder that DDPMPipeline.from_pretrained opens. Raises ValueError before the first file is written.

    extra: entries for the network's config, there with a "_" in front, as diffusers then ignores them.
    """
    if model.class_names is not None:
        warn_once(model, "class_names: left out, as diffusers' format has no place for names of classes")
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    configs = {
        f"unet/{CONFIG}": unet_options(model.config) | {f"_{name}": value for name, value in (extra or {}).items()},
        f"scheduler/{SCHEDULER}": scheduler.write(model.schedule, model.prediction, model.variance, model.clip),
        INDEX: index,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # All are written before the first is renamed; the weights are, and configs follow.
    with contextlib.ExitStack() as stack:
        for name in ("unet", "scheduler"):
            stack.enter_context(made(folder / name))
        paths = {name: stack.enter_context(whole(folder / name)) for name in configs}
        weights = stack.enter_context(whole(folder / "unet" / f"{STEM}.safetensors"))
        weights.write_bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
        for name, config in configs.items():
            paths[name].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def unet_config(config: Mapping) -> UNetConfig:
    """The network that UNet2DModel makes of these options. Raises ValueError for one that UNet isn't, naming the option."""
    found = DEFAULTS | config

    def expect(option: str, *values: object) -> None:
        if found[option] not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(
                f"{option}: got {found[option]!r}; expected {wanted}, as UNet has nothing else; diffusers' own runs as it is"
            )

    expect("time_embedding_type", "positional")
    expect("time_embedding_dim", None, 4 * found["block_out_channels"][0])
    expect("mid_block_type", "UNetMidBlock2D")
    expect("act_fn", "silu", "swish")
    expect("class_embed_type", None)
    expect("resnet_time_scale_shift", "default", "scale_shift")
    expect("downsample_padding", 0, 1)
    size = found["sample_size"]
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"sample_size: got {size!r}; expected the side of a square")
    widths = found["block_out_channels"]
    attention, down = _levels(found, "down", [size >> i for i in range(len(widths))])
    attention_up, up = _levels(found, "up", [size >> i for i in reversed(range(len(widths)))])
    if len(down | up) > 1:
        raise ValueError(
            f"down_block_types, up_block_types: got {list(found['down_block_types'])} and {list(found['up_block_types'])} "
            f"(downsample_type {found['downsample_type']!r}, upsample_type {found['upsample_type']!r}), which resample by "
            "convolutions at some levels and by residual blocks at others; expected one of both, as UNet has nothing else"
        )
    scale_shift, groups = found["resnet_time_scale_shift"] == "scale_shift", found["norm_num_groups"]
    middle_groups = found["attn_norm_num_groups"] or (0 if scale_shift else groups)
    config = UNetConfig(
        sample_size=size,
        channels=widths[0],
        multipliers=multiples(widths, widths[0]),
        attention=attention,
        attention_up=None if set(attention_up) == set(attention) else attention_up,
        scale_shift=scale_shift,
        resample=next(iter(down | up), "conv"),
        pad="both" if found["downsample_padding"] else "end",
        middle_groups=None if middle_groups == groups else middle_groups,
        **{ours: found[theirs] for ours, theirs in SAME.items()},
    )
    head = found["attention_head_dim"]
    for width in config.attended:
        if head is not None and (not isinstance(head, int) or head < 1 or width % head):
            raise ValueError(f"attention_head_dim: got {head!r}; expected None or what divides {width} channels")
    return dataclasses.replace(config, head_channels=head if config.attended else None)


def _levels(found: Mapping, way: str, sides: list[int]) -> tuple[tuple[int, ...], set[str]]:
    """(the sides with attention, from the largest; how it is resampled) of the block types going down or up."""
    option, standard = f"{way}_block_types", found[f"{way}sample_type"] or "conv"
    types = [name.removeprefix("UNetRes") for name in found[option]]
    known = [name for name in BLOCKS if name.startswith(("Down", "AttnDown", "ResnetDown")) == (way == "down")]
    if len(types) != len(sides) or not set(types) <= set(known):
        raise ValueError(f"{option}: got {found[option]}; expected for each level one of {', '.join(known)}")
    kinds = {BLOCKS[name][1] or standard for name in types[:-1]}  # behind the last block nothing is resampled
    if not kinds <= {"conv", "resnet"}:
        raise ValueError(f"{way}sample_type: got {standard!r}; expected 'conv' or 'resnet'")
    attended = [side for side, name in zip(sides, types, strict=True) if BLOCKS[name][0]]
    return tuple(sorted(attended, reverse=True)), kinds


def unet_options(config: UNetConfig) -> dict:
    """UNet2DModel's config for this network. Raises ValueError for one that it doesn't have, naming the option."""

    def refuse(option: str, why: str) -> None:
        raise ValueError(
            f"{option}: got {getattr(config, option)!r}; diffusers' UNet2DModel has no such network: {why}"
        )

    if config.time_scale != 1:
        refuse("time_scale", "it embeds t as it is")
    if config.first_width != config.channels:
        refuse("stem", f"its first convolution is as wide as the timestep's embedding, {config.channels}")
    if config.widths[0] != config.channels:
        refuse("multipliers", "its first level is as wide as the timestep's embedding")
    if config.middle_groups == 0 and config.middle_attention and not config.scale_shift:
        refuse("middle_groups", "without scale_shift the middle's attention has a norm")
    heads = {width // config.heads for width in config.attended} if config.heads else {config.head_channels}
    if len(heads) > 1:
        refuse("heads", f"its heads are equally wide everywhere, and {config.attended} channels have attention")
    groups = config.groups if config.middle_groups is None else config.middle_groups
    default = 0 if config.scale_shift else config.groups  # what it makes of an attn_norm_num_groups that is left out
    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down, up = plain[config.resample]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.sample_size,
        "block_out_channels": config.widths,
        "down_block_types": ["AttnDownBlock2D" if s in config.attention else down for s in config.sides],
        "up_block_types": ["AttnUpBlock2D" if s in config.going_up else up for s in reversed(config.sides)],
        "downsample_type": config.resample,
        "upsample_type": config.resample,
        "downsample_padding": int(config.pad == "both"),
        "attention_head_dim": next(iter(heads), None),
        "attn_norm_num_groups": None if groups in (0, default) else groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        **{theirs: getattr(config, ours) for ours, theirs in SAME.items()},
    }


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with attention's layers as UNet has them, whichever version of diffusers wrote it."""
    result = {}
    for name, value in state.items():
        if match := ATTENTION.fullmatch(name):
            block, layer, kind = match.groups()
            name = f"{block}.{OLD.get(layer, layer)}.{kind}"
            if kind == "weight" and set(value.shape[2:]) == {1}:
                value = value.flatten(1)
        result[name] = value
    return result


def _state(path: Path) -> tuple[dict[str, torch.Tensor], bool | None, Callable[[], None] | None]:
    parts = [path]
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(_json(path)["weight_map"].values()))
            inside = all(name == Path(name).name for name in names)
        except (KeyError, AttributeError, TypeError):
            inside = False
        if not inside:
            raise CheckpointError(f"{path}: weight_map: expected the names of files beside it, by those of tensors")
        parts = [path.parent / name for name in names]
        if missing := [part.name for part in parts if not part.is_file()]:
            raise CheckpointError(f"{path}: of its parts {', '.join(missing)} aren't beside it")
    held, fill = tensors.begin(parts)
    return *tensors.network_in(held, path, (ANCHOR,)), fill


def _wrapped(config: dict, path: Path, notes: list[str]) -> UNetConfig:
    """unet_config, with errors that name the file and diffusers' option."""
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{path}: _class_name: got {kind!r}; expected 'UNet2DModel', the one that UNet can be")
    known = {*DEFAULTS, *EMA_OPTIONS}
    unknown = [name for name, value in config.items() if name not in known and not name.startswith("_") and value]
    if unknown:
        notes.append(f"{path}: {', '.join(unknown)}: unknown to UNet2DModel, and ignored")
    try:
        found = unet_config(config)
        if found.attended and "attention_head_dim" not in config:
            notes.append(
                f"{path}: no attention_head_dim, so heads are {DEFAULTS['attention_head_dim']} channels wide, as in diffusers; "
                "the paper's networks have one head, for which null has to stand there"
            )
        return found
    except ValueError as error:
        option, colon, said = str(error).partition(":")
        raise CheckpointError(f"{path}: {TOLD_BY.get(option, option)}{colon}{said}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: an option is of another kind than UNet2DModel's ({error})") from error


def _json(path: Path) -> dict:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: got a {type(held).__name__}; expected an object of options")
    return held
