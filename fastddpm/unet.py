"""The U-Net of Ho et al. 2020 (appendix B), written as body(x, embed(t)).

`embed` yields what each residual block needs of the timestep (and class); `body` is everything that depends on x. Parameters
carry the names that diffusers' UNet2DModel gives them, so that a state dict goes both ways unchanged.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import ops
from .schedule import Schedule

__all__ = ["UNet", "UNetConfig"]

EPS = 1e-6  # of every GroupNorm, as in the paper's code


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The network's architecture.

    sample_size: side of the image, divisible by 2^(levels - 1). channels: width of the first level; multipliers: widths of
    the levels, as multiples of it. blocks: residual blocks per level going down (one more going up). attention: sides
    at which every block is followed by self-attention (the middle always has it). out_channels: default in_channels; twice
    that for a learned variance. groups: of every GroupNorm. classes: number of class labels, None for an unconditional network.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0
    groups: int = 32
    classes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention", tuple(self.attention))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        for name in ("sample_size", "in_channels", "out_channels", "channels", "blocks", "groups"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected an int >= 1")
        if not self.multipliers or any(not isinstance(m, int) or m < 1 for m in self.multipliers):
            raise ValueError(f"multipliers: got {self.multipliers}; expected ints >= 1, one for each level")
        if self.sample_size % (1 << (len(self.multipliers) - 1)):
            raise ValueError(
                f"sample_size: {self.sample_size} cannot be halved {len(self.multipliers) - 1} times, once for each level "
                "after the first"
            )
        for m in self.multipliers:
            if self.channels * m % self.groups:
                raise ValueError(f"groups: {self.channels * m} channels cannot be divided into {self.groups} groups")
        if self.channels < 4:
            raise ValueError(f"channels: got {self.channels}; expected at least 4, for the timestep embedding")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected a probability in [0, 1)")
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes: got {self.classes}; expected None or at least 1")


PRESETS = {
    "cifar10": UNetConfig(dropout=0.1),
    "lsun256": UNetConfig(sample_size=256, multipliers=(1, 1, 2, 2, 4, 4)),
    "digits": UNetConfig(in_channels=1, channels=16, multipliers=(1, 2, 4, 4), blocks=1, attention=(8,), groups=8),
}


def _initialise(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> nn.Linear | nn.Conv2d:
    """Variance scaling, fan_avg, uniform; bias 0. The paper's code scales by 1e-10 where a gain of 1e-5 is passed."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _linear(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    return _initialise(nn.Linear(inputs, outputs), gain)


def _conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.0, **options: int) -> nn.Conv2d:
    return _initialise(nn.Conv2d(inputs, outputs, size, padding=options.pop("padding", size // 2), **options), gain)


class GroupNormSiLU(nn.Module):
    """GroupNorm with eps 1e-6 and, unless told otherwise, a SiLU behind it."""

    def __init__(self, groups: int, channels: int, silu: bool = True) -> None:
        super().__init__()
        self.groups, self.silu = groups, silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        return ops.group_norm_silu(x, self.groups, self.weight, self.bias, EPS, add=add, silu=self.silu)

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.weight.numel()}, silu={self.silu}"


class TimestepEmbedding(nn.Module):
    """Sinusoids of t, dense, SiLU, dense: [N] -> [N, 4 * channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = _linear(channels, 4 * channels)
        self.linear_2 = _linear(4 * channels, 4 * channels)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        dtype = self.linear_1.weight.dtype
        sinusoids = ops.timestep_embedding(t.double() if dtype == torch.float64 else t, self.channels).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class ResBlock(nn.Module):
    """norm, SiLU, conv, + timestep, norm, SiLU, dropout, conv; a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(config.groups, inputs)
        self.conv1 = _conv(inputs, outputs)
        self.time_emb_proj = _linear(4 * config.channels, outputs)
        self.norm2 = GroupNormSiLU(config.groups, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = _conv(outputs, outputs, gain=1e-5)
        self.conv_shortcut = _conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        """add: this block's projection of the embedding, [N, outputs] or [outputs]."""
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.dropout(self.norm2(h, add)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all pixels, scaled by C^-0.5, with a residual."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.group_norm = GroupNormSiLU(config.groups, channels, silu=False)
        self.to_q, self.to_k, self.to_v = (_linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([_linear(channels, channels, gain=1e-5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1, H*W, C], one head
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).squeeze(1).transpose(1, 2).reshape(n, c, height, width)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, stride=2, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, TensorFlow's "SAME"


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(i, o, config) for i, o in widths)
        if attention:
            self.attentions = nn.ModuleList(Attention(o, config) for _, o in widths)
        self.attention = attention

    def block(self, j: int, x: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        x = self.resnets[j](x, add)
        return self.attentions[j](x) if self.attention else x


class Middle(nn.Module):
    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config)])

    def forward(self, x: torch.Tensor, adds: list[torch.Tensor]) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, adds[0])), adds[1])


class UNet(nn.Module):
    """Ho et al.'s network: x_t [N, C, H, W] and t int64 [N] -> prediction [N, out_channels, H, W].

    schedule, prediction, variance: what the network was trained for, taken by `fastddpm.sample` unless told otherwise;
    default the paper's linear schedule, "epsilon" and "fixed_large".
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        schedule: Schedule | None = None,
        prediction: str = "epsilon",
        variance: str = "fixed_large",
    ) -> None:
        super().__init__()
        self.config = config
        self.schedule = Schedule.linear() if schedule is None else schedule
        self.prediction, self.variance = prediction, variance
        widths = [config.channels * m for m in config.multipliers]
        sides = [config.sample_size >> i for i in range(len(widths))]
        temb = 4 * config.channels

        self.conv_in = _conv(config.in_channels, config.channels)
        self.time_embedding = TimestepEmbedding(config.channels)
        if config.classes is not None:
            self.class_embedding = nn.Embedding(config.classes, temb)

        skips = [config.channels]  # widths of what the way up will be given, in the order it is produced
        width = config.channels
        self.down_blocks = nn.ModuleList()
        for i, (out, side) in enumerate(zip(widths, sides, strict=True)):
            level = Level([(width, out)] + [(out, out)] * (config.blocks - 1), side in config.attention, config)
            skips += [out] * config.blocks
            if i + 1 < len(widths):
                level.downsamplers = nn.ModuleList([Downsample(out)])
                skips.append(out)
            self.down_blocks.append(level)
            width = out

        self.mid_block = Middle(width, config)

        self.up_blocks = nn.ModuleList()
        for i, (out, side) in reversed(list(enumerate(zip(widths, sides, strict=True)))):
            pairs = []
            for _ in range(config.blocks + 1):
                pairs.append((width + skips.pop(), out))
                width = out
            level = Level(pairs, side in config.attention, config)
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(out)])
            self.up_blocks.append(level)

        self.conv_norm_out = GroupNormSiLU(config.groups, width)
        self.conv_out = _conv(width, config.out_channels, gain=1e-5)

    @classmethod
    def from_preset(cls, name: str) -> UNet:
        """A fresh network: "cifar10" (35,746,307 parameters), "lsun256" (113,673,219) or "digits"."""
        if name not in PRESETS:
            raise ValueError(f"preset: unknown name {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(PRESETS[name])

    @classmethod
    def from_pretrained(cls, name: str | Path) -> UNet:
        """A trained network, in eval mode: a bundled model's name ("digits") or a folder that `save_pretrained` wrote."""
        from .checkpoints import native

        return native.load(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, made if missing; each file appears whole or not at all."""
        from .checkpoints import native

        native.save(self, folder)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.config.in_channels, self.config.sample_size, self.config.sample_size

    def resblocks(self) -> list[ResBlock]:
        """All residual blocks in the order `body` meets them."""
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block for level in levels for block in level.resnets]

    def embedding_layers(self) -> list[nn.Module]:
        """All that `embed` calls and `body` doesn't."""
        classes = [self.class_embedding] if self.config.classes is not None else []
        return [self.time_embedding, *classes, *(block.time_emb_proj for block in self.resblocks())]

    def embed(self, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> list[torch.Tensor]:
        """What each residual block adds for timesteps t [N] (and class labels int64 [N]): a list of [N, width]."""
        if (class_labels is None) != (self.config.classes is None):
            wanted = "int64 [N]" if self.config.classes is not None else "none, as this network has no classes"
            raise ValueError(f"class_labels: got {class_labels!r}; expected {wanted}")
        temb = self.time_embedding(t)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels)
        temb = F.silu(temb)
        return [block.time_emb_proj(temb) for block in self.resblocks()]

    def body(self, x: torch.Tensor, embedding: list[torch.Tensor]) -> torch.Tensor:
        """Everything that depends on x. embedding: a list as `embed` gives it, each entry [N, width] or [width]."""
        adds = iter(embedding)
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, h, next(adds))
                skips.append(h)
            if hasattr(level, "downsamplers"):
                h = level.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, [next(adds), next(adds)])
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, torch.cat((h, skips.pop()), dim=1), next(adds))
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0](h)
        return self.conv_out(self.conv_norm_out(h))

    def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x: got shape {list(x.shape)}; expected [N, {self.config.in_channels}, H, W]")
        return self.body(x, self.embed(t, class_labels))
