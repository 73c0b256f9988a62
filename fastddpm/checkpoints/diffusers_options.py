"""UNet2DModel's options as a `UNetConfig`, and the other way round. Imports nothing of diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..models.config import UNetConfig
from .base import multiples

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


# The options that both have, by UNetConfig's names.
SAME = {
    "in_channels": "in_channels", "out_channels": "out_channels", "num_res_blocks": "layers_per_block",
    "dropout": "dropout", "norm_groups": "norm_num_groups", "num_classes": "num_class_embeds", "norm_eps": "norm_eps",
    "flip_sin_to_cos": "flip_sin_to_cos", "freq_shift": "freq_shift", "center_input": "center_input_sample",
    "middle_attention": "add_attention", "middle_scale": "mid_block_scale_factor",
}  # fmt: skip
TOLD_BY = SAME | {
    "channels": "block_out_channels", "channel_mult": "block_out_channels", "middle_groups": "attn_norm_num_groups",
}  # fmt: skip


# What a block type says: whether it attends, and how it resamples (None: as down- or upsample_type says).
BLOCKS = {
    "DownBlock2D": (False, "conv"), "ResnetDownsampleBlock2D": (False, "resnet"), "AttnDownBlock2D": (True, None),
    "UpBlock2D": (False, "conv"), "ResnetUpsampleBlock2D": (False, "resnet"), "AttnUpBlock2D": (True, None),
}  # fmt: skip


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
        channel_mult=multiples(widths, widths[0]),
        attention_resolutions=attention,
        up_attention_resolutions=None if set(attention_up) == set(attention) else attention_up,
        scale_shift=scale_shift,
        resample=next(iter(down | up), "conv"),
        downsample_padding="both" if found["downsample_padding"] else "end",
        middle_groups=None if middle_groups == groups else middle_groups,
        **{ours: found[theirs] for ours, theirs in SAME.items()},
    )
    head = found["attention_head_dim"]
    for width in config.attention_channels:
        if head is not None and (not isinstance(head, int) or head < 1 or width % head):
            raise ValueError(f"attention_head_dim: got {head!r}; expected None or what divides {width} channels")
    return dataclasses.replace(config, num_head_channels=head if config.attention_channels else None)


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
    if config.stem_width != config.channels:
        refuse("stem_channels", f"its first convolution is as wide as the timestep's embedding, {config.channels}")
    if config.widths[0] != config.channels:
        refuse("channel_mult", "its first level is as wide as the timestep's embedding")
    if config.middle_groups == 0 and config.middle_attention and not config.scale_shift:
        refuse("middle_groups", "without scale_shift the middle's attention has a norm")
    heads = (
        {width // config.num_heads for width in config.attention_channels}
        if config.num_heads
        else {config.num_head_channels}
    )
    if len(heads) > 1:
        refuse(
            "num_heads",
            f"its heads are equally wide everywhere, and {config.attention_channels} channels have attention",
        )
    groups = config.norm_groups if config.middle_groups is None else config.middle_groups
    default = (
        0 if config.scale_shift else config.norm_groups
    )  # what it makes of an attn_norm_num_groups that is left out
    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
    down, up = plain[config.resample]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": config.sample_size,
        "block_out_channels": config.widths,
        "down_block_types": [
            "AttnDownBlock2D" if s in config.attention_resolutions else down for s in config.resolutions
        ],
        "up_block_types": ["AttnUpBlock2D" if s in config.up_attention else up for s in reversed(config.resolutions)],
        "downsample_type": config.resample,
        "upsample_type": config.resample,
        "downsample_padding": int(config.downsample_padding == "both"),
        "attention_head_dim": next(iter(heads), None),
        "attn_norm_num_groups": None if groups in (0, default) else groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        **{theirs: getattr(config, ours) for ours, theirs in SAME.items()},
    }
