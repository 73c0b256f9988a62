"""Tensors in [-1, 1] to pictures: bytes, PIL images, grids, films."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image

from .files import whole

__all__ = ["to_pil", "to_uint8"]


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """((x + 1) * 127.5), rounded and clamped to 0..255: images in [-1, 1] of any shape as uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(x: torch.Tensor) -> list[Image.Image]:
    """Images [N, C, H, W] in [-1, 1], C 1 or 3, as N PIL images (modes L and RGB)."""
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x: got shape {list(x.shape)}; expected [N, 1 or 3, H, W]")
    pixels = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def grid(x: torch.Tensor, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images [N, C, H, W] as one picture, row by row, as near a square as N allows; small images are enlarged."""
    images = to_pil(x)
    if not images:
        raise ValueError("x: no images; a grid needs at least one")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    scale = scale or max(1, 64 // max(width, height))
    sheet = Image.new(images[0].mode, (columns * (width + 2) + 2, rows * (height + 2) + 2))
    for i, image in enumerate(images):
        sheet.paste(image, (2 + i % columns * (width + 2), 2 + i // columns * (height + 2)))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def save(image: Image.Image, path: str | Path, **options: object) -> None:
    with whole(path) as aside:
        image.save(aside, **options)
