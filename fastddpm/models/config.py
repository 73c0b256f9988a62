"""The options of the U-Net, and presets."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Mapping

# Fields by the names that they had before, which are read from existing files and still accepted as keywords.
OLD_NAMES = {
    "multipliers": "channel_mult", "blocks": "num_res_blocks", "attention": "attention_resolutions",
    "groups": "norm_groups", "classes": "num_classes", "eps": "norm_eps", "attention_up": "up_attention_resolutions",
    "stem": "stem_channels", "heads": "num_heads", "head_channels": "num_head_channels", "pad": "downsample_padding",
}  # fmt: skip


def with_current_names(options: Mapping) -> dict:
    """Return the options with each old name replaced by the field's name."""
    # An old name counts where both are given: dataclasses.replace(config, classes=3) adds num_classes from `config`.
    current = {name: value for name, value in {**options}.items() if name not in OLD_NAMES}
    return current | {OLD_NAMES[name]: options[name] for name in options if name in OLD_NAMES}


def _accept_old_names(cls: type) -> type:
    """Make the class accept the keywords and attributes of OLD_NAMES too, with a warning.

    Its signature stays that of its fields.
    """
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *values: object, **options: object) -> None:
        renamed = [f"{name} is now {OLD_NAMES[name]}" for name in options if name in OLD_NAMES]
        if renamed:
            # Of dataclasses.replace, the caller's line is one further up.
            level = 3 if sys._getframe(1).f_globals.get("__name__") == "dataclasses" else 2
            warnings.warn(f"fastddpm: UNetConfig: {', '.join(renamed)}", DeprecationWarning, stacklevel=level)
            options = with_current_names(options)
        init(self, *values, **options)

    def __getattr__(self, name: str) -> object:
        if name not in OLD_NAMES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        message = f"fastddpm: UNetConfig: {name} is now {OLD_NAMES[name]}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(self, OLD_NAMES[name])

    cls.__init__, cls.__getattr__ = __init__, __getattr__
    return cls


@_accept_old_names
@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The network's architecture.

    sample_size: side of the image, divisible by 2^(levels - 1). channels: width that the timestep's embedding starts with, and
    that of the first level in most networks; channel_mult: widths of the levels, as multiples of it. num_res_blocks: residual
    blocks per level going down (one more going up). attention_resolutions: sides at which every block is followed by
    self-attention (the middle always has it). out_channels: default in_channels; twice that for a learned variance.
    norm_groups: groups of every GroupNorm. num_classes: number of class labels, None for an unconditional network.

    What the paper's network doesn't change:
    norm_eps: eps of every GroupNorm. up_attention_resolutions: the sides with attention going up, default as going down.
    stem_channels: width of the first convolution, default `channels`. num_heads, num_head_channels: number of attention's
    heads, or width of each; at most one of them, default one head. scale_shift: the timestep scales and shifts the second
    norm's output instead of being added to its input. resample: "conv", a strided convolution down and nearest upsampling with
    a convolution up, or "resnet", a residual block that averages 2x2 pixels or repeats them between its first norm and
    convolution. downsample_padding: the zeros around the input of a strided convolution, "end", one row and column at the
    bottom and right, or "both", one on every side. flip_sin_to_cos, freq_shift: the timestep embedding's order and spacing
    (`ops.timestep_embedding`). time_scale: factor by which t is multiplied before it is embedded. center_input: the network is
    given 2x - 1. middle_attention: whether the middle has attention. middle_groups: groups of its norm, default `norm_groups`;
    0 for no norm. middle_scale: number by which every layer of the middle divides its output.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    norm_groups: int = 32
    num_classes: int | None = None
    norm_eps: float = 1e-6
    up_attention_resolutions: tuple[int, ...] | None = None
    stem_channels: int | None = None
    num_heads: int | None = None
    num_head_channels: int | None = None
    scale_shift: bool = False
    resample: str = "conv"
    downsample_padding: str = "end"
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    time_scale: float = 1.0
    center_input: bool = False
    middle_attention: bool = True
    middle_groups: int | None = None
    middle_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_resolutions", "up_attention_resolutions"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None and name.startswith("up_") else tuple(value))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)
        self._check_integers()
        self._check_channels()
        self._check_attention()
        self._check_other_options()

    def _check_integers(self) -> None:
        if not isinstance(self.sample_size, int):
            raise ValueError(
                f"sample_size: got {self.sample_size!r}; expected an int, the side of a square image. The same network draws "
                "other ones, of sides that its levels can halve, with sample(model, n, shape=(C, H, W))"
            )
        for name in ("sample_size", "in_channels", "out_channels", "channels", "num_res_blocks", "norm_groups"):
            _check_int(name, getattr(self, name), 1)
        for name in ("num_classes", "stem_channels", "num_heads", "num_head_channels", "middle_groups"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0 if name == "middle_groups" else 1)

    def _check_channels(self) -> None:
        """Check the number of levels and the channels of each."""
        if not self.channel_mult or any(not _is_whole(self.channels * m) for m in self.channel_mult):
            raise ValueError(
                f"channel_mult: got {self.channel_mult}; expected for each level a positive number that makes a whole "
                f"number of {self.channels} channels"
            )
        if self.sample_size % (1 << (len(self.channel_mult) - 1)):
            raise ValueError(
                f"sample_size: {self.sample_size} cannot be halved {len(self.channel_mult) - 1} times, once for each level "
                "after the first"
            )
        for width in (self.stem_width, *self.widths):
            if width % self.norm_groups:
                raise ValueError(f"norm_groups: {width} channels cannot be divided into {self.norm_groups} groups")
        if self.middle_groups and self.widths[-1] % self.middle_groups:
            width, groups = self.widths[-1], self.middle_groups
            raise ValueError(f"middle_groups: {width} channels cannot be divided into {groups} groups")
        least = 2 * (max(self.freq_shift, 1) + 1)
        if self.channels < least:
            raise ValueError(f"channels: got {self.channels}; expected at least {least}, for the timestep embedding")

    def _check_attention(self) -> None:
        if self.num_heads is not None and self.num_head_channels is not None:
            raise ValueError(
                f"num_heads, num_head_channels: got {self.num_heads} and {self.num_head_channels}; expected one of them"
            )
        name = "num_heads" if self.num_heads else "num_head_channels"
        divisor = getattr(self, name) or 1
        for width in self.attention_channels:
            if width % divisor:
                raise ValueError(
                    f"{name}: {width} channels, at which there is attention, cannot be divided by {divisor}"
                )

    def _check_other_options(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}; expected a probability in [0, 1)")
        for name, choices in (("resample", ("conv", "resnet")), ("downsample_padding", ("end", "both"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        for name in ("norm_eps", "time_scale", "middle_scale"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a positive number")

    @property
    def stem_width(self) -> int:
        """Channels after the first convolution."""
        return self.channels if self.stem_channels is None else self.stem_channels

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [round(self.channels * m) for m in self.channel_mult]

    @property
    def resolutions(self) -> list[int]:
        """Side of each level's images."""
        return [self.sample_size >> i for i in range(len(self.channel_mult))]

    @property
    def up_attention(self) -> tuple[int, ...]:
        """Sides with attention going up."""
        return self.attention_resolutions if self.up_attention_resolutions is None else self.up_attention_resolutions

    @property
    def attention_channels(self) -> list[int]:
        """Channels of each level that has attention, and of the middle where it has it."""
        everywhere = {*self.attention_resolutions, *self.up_attention}
        levels = [width for width, side in zip(self.widths, self.resolutions, strict=True) if side in everywhere]
        return [*levels, self.widths[-1]] if self.middle_attention else levels


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")


def _is_whole(width: float) -> bool:
    """Return whether a level can have this many channels; a third of them is not exact in floating point."""
    return width > 0.5 and abs(width - round(width)) < 1e-6


PRESETS = {
    "cifar10": UNetConfig(dropout=0.1),
    "lsun256": UNetConfig(sample_size=256, channel_mult=(1, 1, 2, 2, 4, 4)),
    "digits": UNetConfig(
        in_channels=1,
        channels=16,
        channel_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        attention_resolutions=(8,),
        norm_groups=8,
    ),
}
