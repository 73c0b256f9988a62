"""Training images: a .npz or .npy file, a folder of pictures, or any torch Dataset."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What np.load and the members of a .npz raise.
UNREADABLE = (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)


class DataError(ValueError):
    """Training data that cannot be used: what is wrong, and with which file."""


class ArrayImages(Dataset):
    """Images held as uint8 [N, C, H, W]; items are float32 [C, H, W] = x/127.5 - 1, as the paper scales them."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray | None, source: str) -> None:
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels))
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.source = source

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = self.pixels[i].float() / 127.5 - 1
        return image if self.labels is None else (image, self.labels[i])

    def pad_to(self, side: int) -> ArrayImages:
        """The same images in the middle of a black square; those that are larger stay as they are."""
        height, width = self.pixels.shape[2:]
        if max(height, width) > side or height == width == side:
            return self
        top, left = (side - height) // 2, (side - width) // 2
        margins = (left, side - width - left, top, side - height - top)
        padded = torch.nn.functional.pad(self.pixels, margins)
        return ArrayImages(padded.numpy(), None if self.labels is None else self.labels.numpy(), self.source)


def load(path: str | Path, *, labels: bool = False) -> ArrayImages:
    """Images from `path`.

    .npz: the array x_train, x, images or the only one, and with labels=True y_train, y or labels; .npy: the array. uint8,
    [N, H, W] or [N, H, W, C]. A folder: its pictures in the order of their names, all of one size and mode.
    """
    path = Path(path)
    if path.is_dir():
        if labels:
            raise DataError(f"data: {path}: a folder of pictures has no labels; use a .npz with y_train")
        return ArrayImages(_folder(path), None, path.name)
    names = ("y_train", "y", "labels") if labels else None
    return _images(_arrays(path), ("x_train", "x", "images"), names, path)


def load_test(path: str | Path, *, labels: bool = False) -> ArrayImages | None:
    """The x_test of a .npz, with labels=True its y_test too; None where `path` holds no such array."""
    path = Path(path)
    arrays = {} if path.is_dir() else _arrays(path)
    return _images(arrays, ("x_test",), ("y_test",) if labels else None, path) if "x_test" in arrays else None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"data: {path}: no such file or folder")
    try:
        loaded = np.load(path)
        return {"x": loaded} if isinstance(loaded, np.ndarray) else {k: loaded[k] for k in loaded.files}
    except UNREADABLE as error:
        raise DataError(f"data: {path}: not a readable .npz or .npy file ({error})") from error


def _images(
    arrays: dict[str, np.ndarray], names: tuple[str, ...], labels: tuple[str, ...] | None, path: Path
) -> ArrayImages:
    pixels = _pick(arrays, names, path)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise DataError(
            f"data: {path}: got {pixels.dtype} {list(pixels.shape)}; expected uint8 [N, H, W] or [N, H, W, C]"
        )
    y = None if labels is None else _pick(arrays, labels, path)
    if y is not None and y.shape != pixels.shape[:1]:
        raise DataError(f"data: {path}: labels have shape {list(y.shape)}; expected [{len(pixels)}]")
    return ArrayImages(_channels_first(pixels), y, path.name)


def _pick(arrays: dict[str, np.ndarray], names: tuple[str, ...], path: Path) -> np.ndarray:
    for name in names:
        if name in arrays:
            return arrays[name]
    if len(arrays) == 1 and "x" in names:
        return next(iter(arrays.values()))
    raise DataError(f"data: {path}: holds {', '.join(arrays) or 'nothing'}; expected one of {', '.join(names)}")


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)


def read_picture(path: Path) -> np.ndarray:
    """A picture as uint8 [H, W] where it is grey, else [H, W, 3]; OSError where it cannot be read."""
    with Image.open(path) as image:
        return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _folder(path: Path) -> np.ndarray:
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"data: {path}: no pictures in it; expected {', '.join(SUFFIXES)}")
    pictures = []
    for file in files:
        try:
            pictures.append(read_picture(file))
        except OSError as error:
            raise DataError(f"data: {file}: not a readable picture ({error})") from error
        if pictures[-1].shape != pictures[0].shape:
            raise DataError(
                f"data: {file}: {list(pictures[-1].shape)}, but {files[0].name} is {list(pictures[0].shape)}; "
                "pictures must have one size and mode"
            )
    return _channels_first(np.stack(pictures))
