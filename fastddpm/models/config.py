"""The options of the U-Net, and presets."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The network's architecture.

    sample_size: side of the image, divisible by 2^(levels - 1). channels: width that the timestep's embedding starts with, and
    that of the first level in most networks; multipliers: widths of the levels, as multiples of it. blocks: residual blocks per
    level going down (one more going up). attention: sides at which every block is followed by self-attention (the middle always
    has it). out_channels: default in_channels; twice that for a learned variance. groups: of every GroupNorm. classes: number
    of class labels, None for an unconditional network.

    What the paper's network doesn't change:
    eps: of every GroupNorm. attention_up: the sides with attention going up, default as going down. stem: width of the first
    convolution, default `channels`. heads, head_channels: number of attention's heads, or width of each; at most one of them,
    default one head. scale_shift: the timestep scales and shifts the second norm's output instead of being added in front of it.
    resample: "conv", a strided convolution down and nearest upsampling with a convolution up, or "resnet", a residual block that
    averages 2x2 pixels or repeats them between its first norm and convolution. pad: what a strided convolution sees outside
    the image, "end", a zero at the right and bottom, or "both", zeros all around. flip_sin_to_cos, freq_shift: the timestep
    embedding's order and spacing (`ops.timestep_embedding`). time_scale: by which t is multiplied in front of it.
    center_input: the network is given 2x - 1. middle_attention: whether the middle has attention. middle_groups: of its
    norm, default `groups`; 0 for no norm. middle_scale: by which every layer of the middle divides its output.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 128
    multipliers: tuple[float, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (16,)
    dropout: float = 0.0
    groups: int = 32
    classes: int | None = None
    eps: float = 1e-6
    attention_up: tuple[int, ...] | None = None
    stem: int | None = None
    heads: int | None = None
    head_channels: int | None = None
    scale_shift: bool = False
    resample: str = "conv"
    pad: str = "end"
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    time_scale: float = 1.0
    center_input: bool = False
    middle_attention: bool = True
    middle_groups: int | None = None
    middle_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (
            ("multipliers", tuple(self.multipliers)),
            ("attention", tuple(self.attention)),
            ("attention_up", None if self.attention_up is None else tuple(self.attention_up)),
            ("out_channels", self.in_channels if self.out_channels is None else self.out_channels),
        ):
            object.__setattr__(self, name, value)
        if not isinstance(self.sample_size, int):
            raise ValueError(
                f"sample_size: got {self.sample_size!r}; expected an int, the side of a square image. The same network draws "
                "other ones, of sides that its levels can halve, with sample(model, n, shape=(C, H, W))"
            )
        for name in ("sample_size", "in_channels", "out_channels", "channels", "blocks", "groups"):
            _check_int(name, getattr(self, name), 1)
        for name in ("classes", "stem", "heads", "head_channels", "middle_groups"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0 if name == "middle_groups" else 1)
        if not self.multipliers or any(not _whole(self.channels, m) for m in self.multipliers):
            raise ValueError(
                f"multipliers: got {self.multipliers}; expected for each level a positive number that makes a whole "
                f"number of {self.channels} channels"
            )
        if self.sample_size % (1 << (len(self.multipliers) - 1)):
            raise ValueError(
                f"sample_size: {self.sample_size} cannot be halved {len(self.multipliers) - 1} times, once for each level "
                "after the first"
            )
        for width in (self.first_width, *self.widths):
            if width % self.groups:
                raise ValueError(f"groups: {width} channels cannot be divided into {self.groups} groups")
        if self.middle_groups and self.widths[-1] % self.middle_groups:
            width, groups = self.widths[-1], self.middle_groups
            raise ValueError(f"middle_groups: {width} channels cannot be divided into {groups} groups")
        least = 2 * (max(self.freq_shift, 1) + 1)
        if self.channels < least:
            raise ValueError(f"channels: got {self.channels}; expected at least {least}, for the timestep embedding")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected a probability in [0, 1)")
        if self.heads is not None and self.head_channels is not None:
            raise ValueError(f"heads, head_channels: got {self.heads} and {self.head_channels}; expected one of them")
        for width in self.attended:
            if width % (self.heads or self.head_channels or 1):
                name, value = ("heads", self.heads) if self.heads else ("head_channels", self.head_channels)
                raise ValueError(f"{name}: {width} channels, at which there is attention, cannot be divided by {value}")
        for name, choices in (("resample", ("conv", "resnet")), ("pad", ("end", "both"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        for name in ("eps", "time_scale", "middle_scale"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a positive number")

    @property
    def first_width(self) -> int:
        """Channels behind the first convolution."""
        return self.channels if self.stem is None else self.stem

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [round(self.channels * m) for m in self.multipliers]

    @property
    def sides(self) -> list[int]:
        """Side of each level's images."""
        return [self.sample_size >> i for i in range(len(self.multipliers))]

    @property
    def going_up(self) -> tuple[int, ...]:
        """Sides with attention going up."""
        return self.attention if self.attention_up is None else self.attention_up

    @property
    def attended(self) -> list[int]:
        """Channels of each level that has attention, and of the middle where it has it."""
        everywhere = {*self.attention, *self.going_up}
        levels = [width for width, side in zip(self.widths, self.sides, strict=True) if side in everywhere]
        return [*levels, self.widths[-1]] if self.middle_attention else levels


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")


def _whole(channels: int, multiplier: float) -> bool:
    """Whether it makes a whole number of channels; thirds are not exact."""
    width = channels * multiplier
    return width > 0.5 and abs(width - round(width)) < 1e-6


PRESETS = {
    "cifar10": UNetConfig(dropout=0.1),
    "lsun256": UNetConfig(sample_size=256, multipliers=(1, 1, 2, 2, 4, 4)),
    "digits": UNetConfig(in_channels=1, channels=16, multipliers=(1, 2, 4, 4), blocks=1, attention=(8,), groups=8),
}
