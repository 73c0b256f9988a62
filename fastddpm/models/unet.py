"""The U-Net of Ho et al. 2020 (appendix B), written as body(x, embed(t)).

`embed` computes what each residual block receives of the timestep (and class); `body` computes everything that depends on x.
Parameters have the same names as in diffusers' UNet2DModel, so that either network loads the other's state dict unchanged.

The defaults are the paper's network. The options after `num_classes` are the changes of its descendants (Nichol & Dhariwal
2021, Dhariwal & Nichol 2021, diffusers), so that this network loads their checkpoints too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..diffusion.schedule import Schedule
from ..utils.validation import as_python_number
from .config import PRESETS, UNetConfig

__all__ = ["UNet", "UNetConfig"]


class _SkipInit:
    """A layer with uninitialized weights: `_initialize` would replace the values that torch draws."""

    def reset_parameters(self) -> None:
        pass


class _SkipInitLinear(_SkipInit, nn.Linear):
    pass


class _SkipInitConv2d(_SkipInit, nn.Conv2d):
    pass


class _SkipInitEmbedding(_SkipInit, nn.Embedding):
    pass


def _initialize(layer: nn.Linear | nn.Conv2d, gain: float) -> nn.Linear | nn.Conv2d:
    """Draw weights by variance scaling (fan_avg, uniform); biases are 0. A gain of 1e-5 is the paper's scale of 1e-10."""
    layer.__class__ = type(layer).__bases__[1]  # torch's own class, by which quantisers and similar tools find layers
    if not layer.weight.is_meta:
        nn.init.xavier_uniform_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    return _initialize(_SkipInitLinear(inputs, outputs), gain)


def _conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0, **options: int) -> nn.Conv2d:
    layer = _SkipInitConv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), **options)
    return _initialize(layer, gain)


def _embedding(entries: int, width: int) -> nn.Embedding:
    layer = _SkipInitEmbedding(entries, width)
    layer.__class__ = type(layer).__bases__[1]
    if not layer.weight.is_meta:
        nn.init.normal_(layer.weight)
    return layer


class GroupNormSiLU(nn.Module):
    """GroupNorm, followed by a SiLU unless `silu` is False."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.eps, self.silu = groups, eps, silu
        self.weight, self.bias = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        if not self.weight.is_meta:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor | None) -> torch.Tensor:
        """Return the normalised x, same shape. conditions: add, scale and shift of `ops.group_norm_silu`."""
        return ops.group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, silu=self.silu, **conditions)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.weight.numel()}, eps={self.eps}, silu={self.silu}"


class TimestepEmbedding(nn.Module):
    """The embedding of timesteps: sinusoids, dense, SiLU, dense. [N] -> [N, 4 * channels]."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.channels, self.time_scale = config.channels, config.time_scale
        self.flip_sin_to_cos, self.freq_shift = config.flip_sin_to_cos, config.freq_shift
        self.linear_1 = _linear(self.channels, 4 * self.channels)
        self.linear_2 = _linear(4 * self.channels, 4 * self.channels)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        dtype = self.linear_1.weight.dtype
        if dtype == torch.float64:
            t = t.double()
        if self.time_scale != 1:
            t = (t if t.is_floating_point() else t.float()) * self.time_scale
        sinusoids = ops.timestep_embedding(
            t, self.channels, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        return self.linear_2(F.silu(self.linear_1(sinusoids.to(dtype))))


class ResBlock(nn.Module):
    """A residual block: norm, SiLU, conv, + timestep, norm, SiLU, dropout, conv. The shortcut is a 1x1 conv if the width changes.

    resample: "up" or "down", applied before the first convolution and to the shortcut.
    """

    def __init__(
        self, inputs: int, outputs: int, config: UNetConfig, *, resample: str | None = None, divisor: float = 1.0
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample, self.divisor = config.scale_shift, resample, divisor
        self.norm1 = GroupNormSiLU(config.norm_groups, inputs, config.norm_eps)
        self.conv1 = _conv(inputs, outputs)
        self.time_emb_proj = _linear(4 * config.channels, 2 * outputs if config.scale_shift else outputs)
        self.norm2 = GroupNormSiLU(config.norm_groups, outputs, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv(outputs, outputs, gain=1e-5)
        self.conv_shortcut = _conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Return the block's output. embedding: its projection of the timestep embedding, [N, width] or [width]."""
        h = self.conv1(resampled(self.norm1(x), self.resample))
        h = self.conv2(self.dropout(self.norm2(h, **conditions(embedding, self.scale_shift))))
        x = resampled(x, self.resample)
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.divisor == 1 else h / self.divisor


def resampled(x: torch.Tensor, resample: str | None) -> torch.Tensor:
    """Return x, or x with sides doubled ("up", each pixel repeated) or halved ("down", means of 2x2 pixels)."""
    if resample is None:
        return x
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else F.avg_pool2d(x, 2)


def conditions(embedding: torch.Tensor, scale_shift: bool) -> dict[str, torch.Tensor]:
    """Return the conditions of a block's second norm: add [..., C], or scale and shift [..., C] from [..., 2C]."""
    if not scale_shift:
        return {"add": embedding}
    return dict(zip(("scale", "shift"), embedding.chunk(2, dim=-1), strict=True))


class Attention(nn.Module):
    """Self-attention over all pixels, scaled by (C / heads)^-0.5, with a residual."""

    def __init__(self, channels: int, config: UNetConfig, *, groups: int, divisor: float = 1.0) -> None:
        """Make the layers. groups: groups of the norm, 0 for no norm."""
        super().__init__()
        self.heads = config.num_heads or (
            1 if config.num_head_channels is None else channels // config.num_head_channels
        )
        self.divisor = divisor
        self.group_norm = GroupNormSiLU(groups, channels, config.norm_eps, silu=False) if groups else None
        self.to_q, self.to_k, self.to_v = (_linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([_linear(channels, channels, gain=1e-5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        h = (x if self.group_norm is None else self.group_norm(x)).flatten(2).transpose(1, 2)  # [N, H*W, C]
        q, k, v = (to(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = x + self.to_out[0](h).transpose(1, 2).reshape(n, c, height, width)
        return h if self.divisor == 1 else h / self.divisor


class Downsample(nn.Module):
    def __init__(self, channels: int, pad: str) -> None:
        super().__init__()
        self.pad = pad
        self.conv = _conv(channels, channels, stride=2, padding=int(pad == "both"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad == "end" else x)  # "end" is TensorFlow's "SAME"


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it, and the resampling layer."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(i, o, config) for i, o in widths)
        if attention:
            self.attentions = nn.ModuleList(Attention(o, config, groups=config.norm_groups) for _, o in widths)
        self.attention = attention

    def block(self, j: int, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        x = self.resnets[j](x, embedding)
        return self.attentions[j](x) if self.attention else x

    def resampler(self) -> nn.Module | None:
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                return getattr(self, name)[0]
        return None

    def resample(self, x: torch.Tensor, embedding: Iterator[torch.Tensor]) -> torch.Tensor:
        """Return x for the next level, unchanged after the last one."""
        resampler = self.resampler()
        if resampler is None:
            return x
        return resampler(x, next(embedding)) if _takes_embedding(resampler) else resampler(x)

    def resblocks(self) -> list[ResBlock]:
        """Return the residual blocks in the order of `UNet.body`."""
        return [*self.resnets, *([self.resampler()] if _takes_embedding(self.resampler()) else [])]


def _takes_embedding(layer: nn.Module | None) -> bool:
    """Return whether the layer is a residual block (the model's or the engine's), which takes a part of the embedding."""
    return hasattr(layer, "time_emb_proj")


class Middle(nn.Module):
    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels, channels, config, divisor=config.middle_scale) for _ in range(2)
        )
        if config.middle_attention:
            groups = config.norm_groups if config.middle_groups is None else config.middle_groups
            self.attentions = nn.ModuleList([Attention(channels, config, groups=groups, divisor=config.middle_scale)])
        self.attention = config.middle_attention

    def forward(self, x: torch.Tensor, embedding: Iterator[torch.Tensor]) -> torch.Tensor:
        x = self.resnets[0](x, next(embedding))
        if self.attention:
            x = self.attentions[0](x)
        return self.resnets[1](x, next(embedding))

    def resblocks(self) -> list[ResBlock]:
        return list(self.resnets)


def _resampler(channels: int, config: UNetConfig, direction: str) -> nn.Module:
    """Return the layer that changes the resolution after a level. direction: "down" or "up"."""
    if config.resample == "resnet":
        return ResBlock(channels, channels, config, resample=direction)
    return Downsample(channels, config.downsample_padding) if direction == "down" else Upsample(channels)


def _down_levels(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """Return the encoder's levels, and the channels of the skip connections in the order in which `UNet.body` makes them."""
    levels, channels = nn.ModuleList(), config.stem_width
    skip_channels = [channels]
    for width, resolution in zip(config.widths, config.resolutions, strict=True):
        pairs = [(channels, width)] + [(width, width)] * (config.num_res_blocks - 1)
        level = Level(pairs, resolution in config.attention_resolutions, config)
        skip_channels += [width] * config.num_res_blocks
        if resolution != config.resolutions[-1]:
            level.downsamplers = nn.ModuleList([_resampler(width, config, "down")])
            skip_channels.append(width)
        levels.append(level)
        channels = width
    return levels, skip_channels


def _up_levels(config: UNetConfig, skip_channels: list[int]) -> nn.ModuleList:
    """Return the decoder's levels. Each block takes the last of the remaining skip connections."""
    levels, channels, skips = nn.ModuleList(), config.widths[-1], list(skip_channels)
    for width, resolution in reversed(list(zip(config.widths, config.resolutions, strict=True))):
        pairs = []
        for _ in range(config.num_res_blocks + 1):
            pairs.append((channels + skips.pop(), width))
            channels = width
        level = Level(pairs, resolution in config.up_attention, config)
        if resolution != config.sample_size:
            level.upsamplers = nn.ModuleList([_resampler(width, config, "up")])
        levels.append(level)
    return levels


class UNet(nn.Module):
    """The U-Net of Ho et al. 2020 (appendix B): x_t and t -> prediction.

    Each argument is also an attribute. schedule, prediction, variance and clip specify what the network was trained for, and
    are the defaults of `fastddpm.sample`.

    Args:
        config: The architecture.
        schedule: The `Schedule` that the network was trained with. Default: the paper's linear schedule.
        prediction: What the network predicts: "epsilon", "sample" (x0), "v_prediction" or "mean" (of x_{t-1}).
        variance: Variance of the reverse process: "fixed_large", "fixed_small", "learned_range" or "none".
        clip: Bound on |x0| in each step of sampling: a positive number, True for 1.0 or False for no bound.
        class_names: Names of the classes 0..K-1 of a network with K classes. None for classes without names.

    Raises:
        ValueError: The number of names is not that of the classes.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        schedule: Schedule | None = None,
        prediction: str = "epsilon",
        variance: str = "fixed_large",
        clip: bool | float = True,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != config.num_classes:
            raise ValueError(
                f"class_names: got {len(class_names)} names; the network has {config.num_classes or 'no'} classes"
            )
        self.config = config
        self.class_names = None if class_names is None else list(class_names)
        self.schedule = Schedule.linear() if schedule is None else schedule
        self.prediction, self.variance, self.clip = prediction, variance, as_python_number(clip)

        self.conv_in = _conv(config.in_channels, config.stem_width)
        self.time_embedding = TimestepEmbedding(config)
        if config.num_classes is not None:
            self.class_embedding = _embedding(config.num_classes, 4 * config.channels)

        self.down_blocks, skip_channels = _down_levels(config)
        self.mid_block = Middle(config.widths[-1], config)
        self.up_blocks = _up_levels(config, skip_channels)
        self.conv_norm_out = GroupNormSiLU(config.norm_groups, config.widths[0], config.norm_eps)
        self.conv_out = _conv(config.widths[0], config.out_channels, gain=1e-5)

    @classmethod
    def from_preset(cls, name: str) -> UNet:
        """Return an untrained network of a preset architecture.

        Args:
            name: "cifar10" (35,746,307 parameters), "lsun256" (113,673,219) or "digits".

        Returns:
            A network with random weights, in training mode.

        Raises:
            ValueError: No preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: unknown name {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(PRESETS[name])

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, flags: str | None = None) -> UNet:
        """Load a trained network.

        A pickle is read with weights_only, so that it cannot run code. A warning is issued if neither the file nor its name
        specifies that the weights are averaged (EMA) ones.

        Args:
            name: One of: the name of a bundled model ("digits"); a folder written by `save_pretrained`; a diffusers DDPM folder;
                a checkpoint file of pesser's pytorch_diffusion (conversions of the paper's weights); a checkpoint file or folder
                of OpenAI's improved-diffusion or guided-diffusion; the id of a diffusers or fastddpm model on the Hugging Face
                Hub ("google/ddpm-cifar10-32").
            revision: Branch, tag or commit. Only for the id of a Hub model.
            flags: The options that the publisher passes to the sampling script ("--image_size 64 --num_channels 192 ...").
                Only for OpenAI's files, which do not specify their architecture. OpenAI's published files do not require it.

        Returns:
            The network in eval mode, with the schedule, prediction, variance and clip that it was trained for. The weights are
                float32, whatever the file's dtype, on torch's default device.

        Raises:
            CheckpointError: The checkpoint cannot be loaded. The message names the file and the fault. It is a ValueError.
        """
        from ..checkpoints import pretrained

        return pretrained.load(name, revision=revision, flags=flags)

    def save_pretrained(self, folder: str | Path, *, format: str = "fastddpm") -> None:
        """Save the network to a folder.

        Each file is written completely or not at all.

        Args:
            folder: Path of the folder, created if missing.
            format: "fastddpm" (config.json and model.safetensors), or "diffusers", a folder for DDPMPipeline.from_pretrained.
                DDPMPipeline also opens a network with classes, but passes no labels to it.

        Raises:
            ValueError: diffusers' UNet2DModel cannot represent the network. The message names the option.
        """
        from ..checkpoints import pretrained

        pretrained.save(self, folder, format)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    def resblocks(self) -> list[ResBlock]:
        """Return all residual blocks, in the order in which `body` runs them."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block for level in levels for block in level.resblocks()]

    def embedding_layers(self) -> list[nn.Module]:
        """Return the layers that `embed` calls, none of which `body` calls."""
        classes = [self.class_embedding] if self.config.num_classes is not None else []
        return [self.time_embedding, *classes, *(block.time_emb_proj for block in self.resblocks())]

    def embed(self, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return the timestep (and class) embedding, projected for each residual block.

        Args:
            t: Timesteps, [N].
            class_labels: int64 [N] for a network with classes, otherwise None.

        Returns:
            A list of tensors [N, width], one for each block in `resblocks`. width is the block's number of output channels, or
                twice that if `config.scale_shift` is True.

        Raises:
            ValueError: class_labels are missing, or passed to a network without classes.
        """
        if (class_labels is None) != (self.config.num_classes is None):
            wanted = "int64 [N]" if self.config.num_classes is not None else "none, as this network has no classes"
            raise ValueError(f"class_labels: got {class_labels!r}; expected {wanted}")
        temb = self.time_embedding(t)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels)
        temb = F.silu(temb)
        return [block.time_emb_proj(temb) for block in self.resblocks()]

    def body(self, x: torch.Tensor, embedding: list[torch.Tensor]) -> torch.Tensor:
        """Return the prediction for x, with the embedding already computed: `forward` is body(x, embed(t)).

        Args:
            x: x_t, [N, C, H, W].
            embedding: The list that `embed` returns. Each entry is [N, width], or [width] if all images share a timestep.

        Returns:
            The prediction, [N, out_channels, H, W].
        """
        parts = iter(embedding)
        h = self.conv_in(2 * x - 1 if self.config.center_input else x)
        skips = [h]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, h, next(parts))
                skips.append(h)
            if level.resampler() is not None:
                h = level.resample(h, parts)
                skips.append(h)
        h = self.mid_block(h, parts)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, torch.cat((h, skips.pop()), dim=1), next(parts))
            h = level.resample(h, parts)
        return self.conv_out(self.conv_norm_out(h))

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the prediction for x_t.

        Args:
            x: x_t, [N, C, H, W]. H and W must be divisible by 2^(levels - 1).
            t: Timesteps in 0..T-1, int64 [N].
            class_labels: int64 [N] for a network with classes, otherwise None.

        Returns:
            The prediction, [N, out_channels, H, W].

        Raises:
            ValueError: The shape of x is wrong, or class_labels are missing or not supported.
        """
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x: got shape {list(x.shape)}; expected [N, {self.config.in_channels}, H, W]")
        return self.body(x, self.embed(t, class_labels))
