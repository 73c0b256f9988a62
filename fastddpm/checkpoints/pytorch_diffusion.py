"""Files with the names of Esser's conversions of the paper's weights (pytorch_diffusion), which the DDIM authors' have too.

All that a file doesn't say is the paper's: attention at 16x16, and the settings of Ho et al.'s code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..diffusion.schedule import Schedule
from ..errors import CheckpointError
from ..models.config import UNetConfig
from .base import Read, multiples

ANCHOR = "temb.dense.0.weight"
ATTENDED = 16  # the side at which the paper's networks have attention
LAYERS = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
PARTS = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
WITHIN = {
    "resnets": {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"},
    "attentions": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
}


def read(path: Path, state: Mapping[str, torch.Tensor], averaged: bool | None) -> Read:
    levels = 1 + max((int(m[1]) for m in (re.match(r"down\.(\d+)\.", name) for name in state) if m), default=0)
    try:
        config = _config(state, levels)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a network of pytorch_diffusion's names: {error}") from error
    variance = "fixed_large" if config.sample_size == 32 else "fixed_small"
    named = {_name(name, levels): value for name, value in state.items()}
    for name, value in named.items():
        if ".attentions." in name and value.dim() == 4:  # a 1x1 convolution there
            named[name] = value.flatten(1)
    return Read("pytorch_diffusion", path, config, named, Schedule.linear(), "epsilon", variance, True, averaged)


def _config(state: Mapping[str, torch.Tensor], levels: int) -> UNetConfig:
    channels, inputs = state["conv_in.weight"].shape[:2]
    widths = [state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state]
    if len(attended) != 1:
        raise ValueError(
            f"attention at {len(attended)} levels; expected one, at {ATTENDED}x{ATTENDED}, which tells the images' size"
        )
    size = ATTENDED << attended[0]
    return UNetConfig(
        sample_size=size,
        in_channels=inputs,
        out_channels=state["conv_out.weight"].shape[0],
        channels=channels,
        channel_mult=multiples(widths, channels),
        num_res_blocks=sum(re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in state),
        attention_resolutions=(ATTENDED,),
        dropout=0.1 if size == 32 else 0.0,
    )


def _name(name: str, levels: int) -> str:
    """UNet's name of a tensor; an unknown one as it is."""
    layer, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(down|up)\.(\d+)\.([a-z]+)(.*)", layer):
        way, level, part, rest = match.groups()
        level = int(level) if way == "down" else levels - 1 - int(level)
        layer = f"{way}_blocks.{level}.{PARTS.get(part, part)}{rest}"
    else:
        whole, _, rest = layer.rpartition(".")
        layer = LAYERS.get(layer) or (f"{LAYERS[whole]}.{rest}" if whole in LAYERS else layer)
    part = "resnets" if ".resnets." in layer else "attentions" if ".attentions." in layer else None
    stem, _, last = layer.rpartition(".")
    if part is not None and last in WITHIN[part]:
        layer = f"{stem}.{WITHIN[part][last]}"
    return f"{layer}.{kind}" if layer else kind
