"""The options of the U-Net, and presets."""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Mapping

# Previous name of a field -> its current name. Previous names are read from files, and accepted as keywords.
OLD_NAMES = {
    "multipliers": "channel_mult", "blocks": "num_res_blocks", "attention": "attention_resolutions",
    "groups": "norm_groups", "classes": "num_classes", "eps": "norm_eps", "attention_up": "up_attention_resolutions",
    "stem": "stem_channels", "heads": "num_heads", "head_channels": "num_head_channels", "pad": "downsample_padding",
}  # fmt: skip


def with_current_names(options: Mapping) -> dict:
    """Return the options with each old name replaced by the field's name."""
    # An old name has precedence over the current one: dataclasses.replace(config, classes=3) adds num_classes from `config`.
    current = {name: value for name, value in {**options}.items() if name not in OLD_NAMES}
    return current | {OLD_NAMES[name]: options[name] for name in options if name in OLD_NAMES}


def _accept_old_names(cls: type) -> type:
    """Make the class also accept the keywords and attributes of OLD_NAMES, with a warning.

    The class's signature remains that of its fields.
    """
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *values: object, **options: object) -> None:
        renamed = [f"{name} is now {OLD_NAMES[name]}" for name in options if name in OLD_NAMES]
        if renamed:
            # dataclasses.replace adds one frame between the caller and this function.
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
    """The architecture of a `UNet`.

    The defaults are the paper's CIFAR-10 network without dropout. In the paper's networks the options from `norm_eps` on have
    their default values; other libraries' networks differ in them.

    Attributes:
        sample_size: Side of a square image in pixels, divisible by 2^(levels - 1).
        in_channels: Channels of an image.
        out_channels: Channels of the prediction. Default: in_channels. A learned variance requires 2 * in_channels.
        channels: Width of the timestep's sinusoids, and base width of the levels.
        channel_mult: Width of each level, as a multiple of `channels`. Its length is the number of levels.
        num_res_blocks: Residual blocks per level of the encoder. The decoder has one more.
        attention_resolutions: Sides in pixels of the levels in which self-attention follows every residual block.
        dropout: Dropout probability of the residual blocks in training, in [0, 1).
        norm_groups: Groups of every GroupNorm. They must divide the channels of every level.
        num_classes: Number of class labels. None for an unconditional network.
        norm_eps: eps of every GroupNorm, positive.
        up_attention_resolutions: Like `attention_resolutions`, for the decoder. Default: the same.
        stem_channels: Width of the first convolution. Default: `channels`.
        num_heads: Number of attention heads. Default: 1, unless `num_head_channels` is passed.
        num_head_channels: Channels of each attention head. At most one of `num_heads` and `num_head_channels` may be passed.
        scale_shift: If True, the timestep embedding scales and shifts the output of a block's second norm. If False, it is
            added to the input of that norm.
        resample: "conv" downsamples by a strided convolution, and upsamples by nearest-neighbour interpolation and a
            convolution. "resnet" uses a residual block for either, which averages or repeats 2x2 pixels between its first norm
            and its first convolution.
        downsample_padding: Zero padding of a strided convolution: "end" pads one row at the bottom and one column at the
            right; "both" pads one pixel on every side.
        flip_sin_to_cos: Order of the timestep's sinusoids, as in `ops.timestep_embedding`.
        freq_shift: Spacing of their frequencies, as in `ops.timestep_embedding`.
        time_scale: Factor by which t is multiplied before it is embedded, positive.
        center_input: If True, the network computes with 2x - 1 in place of x.
        middle_attention: Whether the middle block, between encoder and decoder, has attention.
        middle_groups: Groups of the norm in the middle block's attention, 0 for no norm. Default: `norm_groups`.
        middle_scale: Number by which every layer of the middle block divides its output, positive.

    Raises:
        ValueError: An option is invalid. The message names it.
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
                "images of other sides that its levels can halve with sample(model, n, shape=(C, H, W))"
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
                f"channel_mult: got {self.channel_mult}; expected a positive number for each level, whose product with "
                f"the {self.channels} channels is an integer"
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
        """Sides of the decoder's levels with attention."""
        return self.attention_resolutions if self.up_attention_resolutions is None else self.up_attention_resolutions

    @property
    def attention_channels(self) -> list[int]:
        """Channels of each level with attention, and of the middle block if it has attention."""
        everywhere = {*self.attention_resolutions, *self.up_attention}
        levels = [width for width, side in zip(self.widths, self.resolutions, strict=True) if side in everywhere]
        return [*levels, self.widths[-1]] if self.middle_attention else levels


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")


def _is_whole(width: float) -> bool:
    """Return whether a width is a positive integer, up to rounding: a multiple such as 1/3 is not exact."""
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
