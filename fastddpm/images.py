"""Convert tensors in [-1, 1] to uint8, PIL images and grids of images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .pictures import CHANNELS, composed_on_black
from .utils.files import atomic_write

__all__ = ["to_pil", "to_uint8"]

MAX_GIF_SIDE, MAX_PNG_SIDE = 65_535, 1_000_000  # pixels; PNG allows 2^31, more than fits in memory
GRID_GAP = 2  # pixels around and between the images of a grid


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to uint8: (x + 1) * 127.5, rounded and clamped to 0..255.

    Args:
        x: floating-point tensor of any shape.

    Returns:
        A uint8 tensor of the same shape, on the same device.
    """
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """Convert images in [-1, 1] to PIL images.

    Args:
        x: floating-point tensor [N, C, H, W]; C is 1, 3 or 4.

    Returns:
        N PIL images of mode L (C = 1), RGB (C = 3) or RGBA (C = 4).

    Raises:
        ValueError: x has another shape.
    """
    if x.dim() != 4 or x.shape[1] not in CHANNELS:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [N, 1, 3 or 4, H, W]")
    pixels = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def to_opaque_pil(x: torch.Tensor) -> list[Image.Image]:
    """Convert images [N, C, H, W] of any C to PIL images without transparency.

    Images with four channels are RGBA and are composed on black. If C is not 1, 3 or 4, the channels become grey images
    side by side.
    """
    n, c, height, width = x.shape
    if c not in CHANNELS:
        x = x.transpose(1, 2).reshape(n, 1, height, c * width)
    return [composed_on_black(image) for image in to_pil(x)]


class GridLayout(NamedTuple):
    """The arrangement of images in a grid."""

    columns: int
    rows: int
    width: int  # of an image, in pixels
    height: int
    scale: int  # factor by which the grid is enlarged

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) of the grid in pixels."""
        left, top = self.corner(self.columns * self.rows - 1)
        return (left + self.width + GRID_GAP) * self.scale, (top + self.height + GRID_GAP) * self.scale

    def corner(self, i: int) -> tuple[int, int]:
        """Return (left, top) of image i before the grid is enlarged."""
        row, column = divmod(i, self.columns)
        return GRID_GAP + column * (self.width + GRID_GAP), GRID_GAP + row * (self.height + GRID_GAP)


def grid_layout(
    n: int, shape: tuple[int, int, int], columns: int | None = None, scale: int | None = None
) -> GridLayout:
    """Return the layout of n images of shape (C, H, W). By default, the grid has about as many rows as columns."""
    if n < 1:
        raise ValueError("x: no images; a grid needs at least one")
    channels, height, width = shape
    if channels not in CHANNELS:
        width *= channels
    columns = columns or math.ceil(math.sqrt(n))
    return GridLayout(columns, math.ceil(n / columns), width, height, scale or max(1, 64 // max(width, height)))


def check_grid_size(name: str, path: Path, layout: GridLayout) -> None:
    """Raise ValueError if the grid is too large for the format of `path`."""
    limit = MAX_GIF_SIDE if path.suffix.lower() == ".gif" else MAX_PNG_SIDE
    if max(layout.size) > limit:
        width, height = layout.size
        raise ValueError(
            f"{name}: {path} would have {width}x{height} pixels; a {path.suffix} has at most {limit} per side: draw fewer images"
        )


def grid(x: torch.Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Return images [N, C, H, W] as one image, row by row; by default as near a square as N allows, small images enlarged."""
    layout = grid_layout(len(x), tuple(x.shape[1:]), columns, scale)
    images = to_opaque_pil(x)
    picture = Image.new(images[0].mode, (layout.size[0] // layout.scale, layout.size[1] // layout.scale))
    for i, image in enumerate(images):
        picture.paste(image, layout.corner(i))
    return picture.resize(layout.size, Image.Resampling.NEAREST)


def save(image: Image.Image, path: str | Path, **options: object) -> None:
    """Write an image file atomically. `options` are passed to PIL.Image.Image.save."""
    with atomic_write(path) as temporary:
        image.save(temporary, **options)
