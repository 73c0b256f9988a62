"""Tensors in [-1, 1] to pictures: bytes, PIL images, grids, films."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .pictures import CHANNELS, on_black
from .utils.files import atomic_write

__all__ = ["to_pil", "to_uint8"]

GIF_SIDE, PNG_SIDE = 65_535, 1_000_000  # pixels; PNG's own limit is 2^31, which no memory holds


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """((x + 1) * 127.5), rounded and clamped to 0..255: images in [-1, 1] of any shape as uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1], C 1, 3 or 4, as N PIL images (modes L, RGB and RGBA)."""
    if x.dim() != 4 or x.shape[1] not in CHANNELS:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [N, 1, 3 or 4, H, W]")
    pixels = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def visible(x: torch.Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] of any C as PIL images without transparency.

    Four channels are RGBA, composed on black. Other numbers than 1, 3 and 4 give the channels side by side in grey.
    """
    n, c, height, width = x.shape
    if c not in CHANNELS:
        x = x.transpose(1, 2).reshape(n, 1, height, c * width)
    return [on_black(image) for image in to_pil(x)]


class Sheet(NamedTuple):
    """How a grid is laid out: columns and rows of images, pixels of an image, and how many times it is enlarged."""

    columns: int
    rows: int
    width: int
    height: int
    scale: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture."""
        return (self.columns * (self.width + 2) + 2) * self.scale, (self.rows * (self.height + 2) + 2) * self.scale


def laid_out(n: int, shape: tuple[int, int, int], columns: int | None = None, scale: int | None = None) -> Sheet:
    """The grid of n images of shape (C, H, W): `columns` wide, by default as near a square as n allows."""
    if n < 1:
        raise ValueError("x: no images; a grid needs at least one")
    channels, height, width = shape
    if channels not in CHANNELS:
        width *= channels
    columns = columns or math.ceil(math.sqrt(n))
    return Sheet(columns, math.ceil(n / columns), width, height, scale or max(1, 64 // max(width, height)))


def check_size(name: str, path: Path, sheet: Sheet) -> None:
    """Raise ValueError where the grid has more pixels than a file of this kind can have."""
    most = GIF_SIDE if path.suffix.lower() == ".gif" else PNG_SIDE
    if max(sheet.size) > most:
        width, height = sheet.size
        raise ValueError(
            f"{name}: {path} would have {width}x{height} pixels; a {path.suffix} has at most {most} a side: draw fewer images"
        )


def grid(x: torch.Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images [N, C, H, W] as one picture, row by row, as near a square as N allows; small images are enlarged."""
    sheet = laid_out(len(x), tuple(x.shape[1:]), columns, scale)
    images = visible(x)
    picture = Image.new(images[0].mode, (sheet.size[0] // sheet.scale, sheet.size[1] // sheet.scale))
    for i, image in enumerate(images):
        picture.paste(image, (2 + i % sheet.columns * (sheet.width + 2), 2 + i // sheet.columns * (sheet.height + 2)))
    return picture.resize(sheet.size, Image.Resampling.NEAREST)


def save(image: Image.Image, path: str | Path, **options: object) -> None:
    with atomic_write(path) as temporary:
        image.save(temporary, **options)
