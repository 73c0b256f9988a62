"""Files of pytorch_diffusion, Esser's conversions of the paper's weights. The DDIM authors' files have the same names.

A file has only tensors. Everything else is as in Ho et al.'s code: attention at 16x16, and the training settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from .base import Checkpoint, channel_multipliers

MARKER_KEY = "temb.dense.0.weight"
ATTENTION_RESOLUTION = 16  # as in the paper's networks
LAYERS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
LEVEL_PARTS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
SUBLAYERS = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}


def read_state_dict(path: Path, state: Mapping[str, torch.Tensor], averaged: bool | None) -> Checkpoint:
    levels = 1 + max((int(m[1]) for m in (re.match(r"down\.(\d+)\.", name) for name in state) if m), default=0)
    try:
        config = _config(state, levels)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a network of pytorch_diffusion: {error}") from error
    variance = "fixed_large" if config.sample_size == 32 else "fixed_small"
    unet_state = {_unet_name(name, levels): value for name, value in state.items()}
    for name, value in unet_state.items():
        if ".attentions." in name and value.dim() == 4:  # a 1x1 convolution, which is a linear layer in UNet
            unet_state[name] = value.flatten(1)
    return Checkpoint(
        "pytorch_diffusion", path, config, unet_state, Schedule.linear(), "epsilon", variance, True, averaged
    )


def _config(state: Mapping[str, torch.Tensor], levels: int) -> UNetConfig:
    channels, inputs = state["conv_in.weight"].shape[:2]
    widths = [state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attention_levels = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state]
    if len(attention_levels) != 1:
        raise ValueError(
            f"attention at {len(attention_levels)} levels; expected one, at {ATTENTION_RESOLUTION}x{ATTENTION_RESOLUTION}, "
            "which determines the size of the images"
        )
    size = ATTENTION_RESOLUTION << attention_levels[0]
    return UNetConfig(
        sample_size=size,
        in_channels=inputs,
        out_channels=state["conv_out.weight"].shape[0],
        channels=channels,
        channel_mult=channel_multipliers(widths, channels),
        num_res_blocks=sum(re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in state),
        attention_resolutions=(ATTENTION_RESOLUTION,),
        dropout=0.1 if size == 32 else 0.0,
    )


def _unet_name(name: str, levels: int) -> str:
    """Return UNet's name of a tensor; an unknown name is returned unchanged."""
    layer, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(down|up)\.(\d+)\.([a-z]+)(.*)", layer):
        way, level, part, rest = match.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        layer = f"{way}_blocks.{level}.{LEVEL_PARTS.get(part, part)}{rest}"
    else:
        whole, _, rest = layer.rpartition(".")
        layer = LAYERS.get(layer) or (f"{LAYERS[whole]}.{rest}" if whole in LAYERS else layer)
    part = "resnets" if ".resnets." in layer else "attentions" if ".attentions." in layer else None
    stem, _, last = layer.rpartition(".")
    if part is not None and last in SUBLAYERS[part]:
        layer = f"{stem}.{SUBLAYERS[part][last]}"
    return f"{layer}.{kind}" if layer else kind
