"""Read picture files as 8-bit images, for training, evaluation and the command line.

`read` converts the content of a file to one of four modes of Pillow: "L" (grey), "LA", "RGB" or "RGBA". Integers of more than
8 bits are scaled by their full range, or by the smaller maximum that the file states. Floats in [0, 1] are scaled by 255. The
EXIF orientation is applied. `read` raises `DataError`, which names the file, if the content cannot be converted.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DataError

READER_VERSION = 1  # increment when `read` changes, because the results of checks are cached
MODES = ("L", "LA", "RGB", "RGBA")
CHANNELS = (1, 3, 4)  # numbers of channels of grey, RGB and RGBA

# Formats that Pillow identifies without decoding, or decodes with another program.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
BITS, PHOTOMETRIC, MAXIMUM, SAMPLE_FORMAT = 258, 262, 281, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # a PhotometricInterpretation, a SampleFormat


class Facts(NamedTuple):
    """Properties of a picture that `read` returns besides its pixels."""

    mode: str
    width: int
    height: int
    transparent: bool  # whether any pixel is not opaque
    largest: float  # largest value as a share of the full range, for integers of more than 8 bits; else NaN
    several: bool  # whether the file has several pictures, of which the first is used
    doubt: str  # Pillow's first warning, mostly about damaged metadata; "" if none


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that Pillow decodes, in lower case."""
    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED))


def read(path: str | Path, content: bytes | None = None) -> tuple[Image.Image, Facts]:
    """Return the picture of a file in one of `MODES`, and facts about it.

    Args:
        path: the file.
        content: bytes of the file, if they have been read already.

    Raises:
        DataError: the file is missing, damaged or too large, or has values that cannot be scaled to 8 bits.
    """
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            Image.open(path if content is None else io.BytesIO(content), formats=_formats()) as image,
        ):
            warnings.simplefilter("always")
            # Pillow also raises an error, for twice the number of pixels of this warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # An MPO file is a phone's photograph; its further pictures are previews and depth maps.
            several = image.format != "MPO" and getattr(image, "is_animated", False)
            upright = ImageOps.exif_transpose(image)
            converted, largest = _to_8_bits(upright, image.format, getattr(image, "tag_v2", {}), path)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: too large a picture ({error}); reduce its size first") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a readable picture (no format that Pillow decodes)") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise DataError(f"{path}: not a readable picture ({type(error).__name__}: {error})") from error
    transparent = "A" in converted.mode and converted.getchannel("A").getextrema()[0] < 255
    doubt = str(caught[0].message).strip() if caught else ""
    return converted, Facts(converted.mode, *converted.size, transparent, largest, several, doubt)


def _to_8_bits(image: Image.Image, format: str, tags: dict, path: str | Path) -> tuple[Image.Image, float]:
    """Return (the image in one of `MODES`, its largest value as a share of the full range). `tags`: those of a TIFF."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F":
            scaled, largest = _floats(values, path), math.nan
        else:
            scaled, largest = _integers(values, _full_range(image.mode, format, tags), path)
        if (
            _largest_in_tag(tags, PHOTOMETRIC, None) == WHITE_IS_ZERO
        ):  # Pillow inverts such files only if they have 8 bits
            scaled, largest = 255 - scaled, math.nan
        grey = Image.fromarray(scaled)
        if image.has_transparency_data:
            opaque = (values != image.info["transparency"]).astype(np.uint8) * 255
            grey = Image.merge("LA", (grey, Image.fromarray(opaque)))
        return grey, largest
    bits, stated = _largest_in_tag(tags, BITS, 8), _largest_in_tag(tags, MAXIMUM, None)
    if bits > 8 and stated and stated < (1 << bits) - 1:
        # Pillow has dropped the low bits, which are the only bits that such a file uses.
        raise DataError(
            f"{path}: {image.mode} of {bits} bits with a maximum of {stated}; expected colours that use all of their "
            "bits: scale them, or store 8 bits"
        )
    grey = image.mode in ("1", "L", "LA", "La")
    mode = ("LA" if grey else "RGBA") if image.has_transparency_data else ("L" if grey else "RGB")
    return image.convert(mode), math.nan


def _largest_in_tag(tags: dict, tag: int, default: int | None) -> int | None:
    """Return the largest number of a tag."""
    value = tags.get(tag, default)
    return max(value) if isinstance(value, tuple) else value


def _full_range(mode: str, format: str, tags: dict) -> range:
    """Return the range of values of a picture, from 0 to the maximum that the file states or that its bits allow."""
    if tags:
        signed = _largest_in_tag(tags, SAMPLE_FORMAT, 1) == SIGNED
        bits = _largest_in_tag(tags, BITS, 16)
        largest = (1 << bits - signed) - 1
        return range(min(largest, _largest_in_tag(tags, MAXIMUM, None) or largest) + 1)
    # Pillow scales every PNG to 16 bits, and a PGM too, by the maximum in its header.
    return range(1 << 16 if mode.startswith("I;16") or format in ("PNG", "PPM") else 1 << 31)


def _floats(values: np.ndarray, path: str | Path) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # also raised for NaN
        raise DataError(f"{path}: floats from {low:g} to {high:g}; expected floats in [0, 1], or 8-bit integers")
    return (values * 255).round().astype(np.uint8)


def _integers(values: np.ndarray, full: range, path: str | Path) -> tuple[np.ndarray, float]:
    if len(full) == 1 << 32:  # Pillow stores the unsigned integers as signed ones
        values = values.view(np.uint32)
    low, high = int(values.min()), int(values.max())
    if low not in full or high not in full:
        raise DataError(f"{path}: integers from {low} to {high}; expected 0 to {full[-1]}, the file's full range")
    return (values * (255 / full[-1])).round().astype(np.uint8), high / full[-1]


def composed_on_black(image: Image.Image) -> Image.Image:
    """Return the image composed on black, without its alpha channel. An image without alpha is returned unmodified."""
    if "A" not in image.mode:
        return image
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))
    return opaque.convert(image.mode.removesuffix("A"))


def center_cropped(image: Image.Image, side: int) -> Image.Image:
    """Return the image cropped to a centred square and resized to side x side, with antialiasing."""
    width, height = image.size
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    box = left, top, left + shorter, top + shorter
    return image.resize((side, side), Image.Resampling.BICUBIC, box=box)


def channels_first(image: Image.Image) -> np.ndarray:
    """Return the image as uint8 [C, H, W]."""
    values = np.array(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
