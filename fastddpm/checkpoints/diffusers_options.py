"""Conversion between UNet2DModel's options and a `UNetConfig`. Never imports diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..models.config import UNetConfig
from .base import channel_multipliers

# The options of UNet2DModel with its defaults, which apply if a config omits an option.
UNET2D_DEFAULTS = {
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

# UNetConfig's options and UNet2DModel's names of the same options. DIFFUSERS_OPTION_OF adds related options.
SHARED_OPTIONS = {
    "in_channels": "in_channels", "out_channels": "out_channels", "num_res_blocks": "layers_per_block",
    "dropout": "dropout", "norm_groups": "norm_num_groups", "num_classes": "num_class_embeds", "norm_eps": "norm_eps",
    "flip_sin_to_cos": "flip_sin_to_cos", "freq_shift": "freq_shift", "center_input": "center_input_sample",
    "middle_attention": "add_attention", "middle_scale": "mid_block_scale_factor",
}  # fmt: skip
DIFFUSERS_OPTION_OF = SHARED_OPTIONS | {
    "channels": "block_out_channels", "channel_mult": "block_out_channels", "middle_groups": "attn_norm_num_groups",
}  # fmt: skip

# Block type: (whether it has attention, how it resamples; None if downsample_type or upsample_type specifies it).
BLOCK_TYPES = {
    "DownBlock2D": (False, "conv"), "ResnetDownsampleBlock2D": (False, "resnet"), "AttnDownBlock2D": (True, None),
    "UpBlock2D": (False, "conv"), "ResnetUpsampleBlock2D": (False, "resnet"), "AttnUpBlock2D": (True, None),
}  # fmt: skip


def unet_config(config: Mapping) -> UNetConfig:
    """Return the config of the network of these options; raise ValueError, naming the option, if UNet cannot be it."""
    options = UNET2D_DEFAULTS | config

    def expect(option: str, *values: object) -> None:
        if options[option] not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(
                f"{option}: got {options[option]!r}; expected {wanted}, "
                "as UNet supports nothing else; diffusers' own model runs unmodified"
            )

    expect("time_embedding_type", "positional")
    expect("time_embedding_dim", None, 4 * options["block_out_channels"][0])
    expect("mid_block_type", "UNetMidBlock2D")
    expect("act_fn", "silu", "swish")
    expect("class_embed_type", None)
    expect("resnet_time_scale_shift", "default", "scale_shift")
    expect("downsample_padding", 0, 1)
    size = options["sample_size"]
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"sample_size: got {size!r}; expected the side of a square")
    widths = options["block_out_channels"]
    attention, down = _block_types(options, "down", [size >> i for i in range(len(widths))])
    attention_up, up = _block_types(options, "up", [size >> i for i in reversed(range(len(widths)))])
    if len(down | up) > 1:
        raise ValueError(
            f"down_block_types, up_block_types: got {list(options['down_block_types'])} and {list(options['up_block_types'])} "
            f"(downsample_type {options['downsample_type']!r}, upsample_type {options['upsample_type']!r}), which resample by "
            "convolutions at some levels and by residual blocks at others; expected one kind, as UNet supports only that"
        )
    scale_shift, groups = options["resnet_time_scale_shift"] == "scale_shift", options["norm_num_groups"]
    middle_groups = options["attn_norm_num_groups"] or (0 if scale_shift else groups)
    config = UNetConfig(
        sample_size=size,
        channels=widths[0],
        channel_mult=channel_multipliers(widths, widths[0]),
        attention_resolutions=attention,
        up_attention_resolutions=None if set(attention_up) == set(attention) else attention_up,
        scale_shift=scale_shift,
        resample=next(iter(down | up), "conv"),
        downsample_padding="both" if options["downsample_padding"] else "end",
        middle_groups=None if middle_groups == groups else middle_groups,
        **{ours: options[theirs] for ours, theirs in SHARED_OPTIONS.items()},
    )
    head = options["attention_head_dim"]
    for width in config.attention_channels:
        if head is not None and (not isinstance(head, int) or head < 1 or width % head):
            raise ValueError(f"attention_head_dim: got {head!r}; expected None or a divisor of {width} channels")
    return dataclasses.replace(config, num_head_channels=head if config.attention_channels else None)


def _block_types(options: Mapping, direction: str, resolutions: list[int]) -> tuple[tuple[int, ...], set[str]]:
    """Return (the resolutions with attention, descending; the kinds of resampling) of the "down" or "up" blocks."""
    option, default = f"{direction}_block_types", options[f"{direction}sample_type"] or "conv"
    types = [name.removeprefix("UNetRes") for name in options[option]]
    known = [
        name for name in BLOCK_TYPES if name.startswith(("Down", "AttnDown", "ResnetDown")) == (direction == "down")
    ]
    if len(types) != len(resolutions) or not set(types) <= set(known):
        raise ValueError(f"{option}: got {options[option]}; expected, for each level, one of {', '.join(known)}")
    kinds = {BLOCK_TYPES[name][1] or default for name in types[:-1]}  # nothing is resampled after the last block
    if not kinds <= {"conv", "resnet"}:
        raise ValueError(f"{direction}sample_type: got {default!r}; expected 'conv' or 'resnet'")
    attention = [size for size, name in zip(resolutions, types, strict=True) if BLOCK_TYPES[name][0]]
    return tuple(sorted(attention, reverse=True)), kinds


def unet_options(config: UNetConfig) -> dict:
    """Return UNet2DModel's config of this network; raise ValueError, naming the option, if UNet2DModel cannot be it."""

    def refuse(option: str, why: str) -> None:
        raise ValueError(
            f"{option}: got {getattr(config, option)!r}; diffusers' UNet2DModel does not support it: {why}"
        )

    if config.time_scale != 1:
        refuse("time_scale", "it embeds t unscaled")
    if config.stem_width != config.channels:
        refuse("stem_channels", f"its first convolution is as wide as the timestep's embedding, {config.channels}")
    if config.widths[0] != config.channels:
        refuse("channel_mult", "its first level is as wide as the timestep's embedding")
    if config.middle_groups == 0 and config.middle_attention and not config.scale_shift:
        refuse("middle_groups", "without scale_shift, the attention of the middle block has a norm")
    heads = (
        {width // config.num_heads for width in config.attention_channels}
        if config.num_heads
        else {config.num_head_channels}
    )
    if len(heads) > 1:
        refuse(
            "num_heads",
            f"its heads have the same width at all levels, and attention is at {config.attention_channels} channels",
        )
    groups = config.norm_groups if config.middle_groups is None else config.middle_groups
    default = 0 if config.scale_shift else config.norm_groups  # the value if attn_norm_num_groups is omitted
    without_attention = {
        "conv": ("DownBlock2D", "UpBlock2D"),
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    }
    down, up = without_attention[config.resample]
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
        **{theirs: getattr(config, ours) for ours, theirs in SHARED_OPTIONS.items()},
    }
