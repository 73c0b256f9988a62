"""Images to train on and to measure against: a .npz or .npy file, a folder of pictures, or any torch Dataset."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import signal
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from . import pictures
from .errors import DataError
from .pictures import CHANNELS
from .utils.files import whole
from .utils.progress import bar as progress_bar
from .utils.validation import LEAST_BYTE, as_python_number, check_choice, check_int
from .utils.warn import warn_once

# What np.load and the members of a .npz raise.
UNREADABLE = (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
ALPHAS = ("black", "keep")
MANY = 1000  # pictures from which on they are checked and read by worker processes, and the check is remembered
PART = 128  # pictures that a worker process reads at a time
FEW = 10  # names of a kind that are listed
MOST_LABEL = 1 << 62
HIDDEN = (".", "__MACOSX")  # how folders begin that systems add
DARK = 1 / 8  # a largest value below this share of the full range is pointed out


class Images(Dataset):
    """Images of one shape, read when they are needed; items are float32 [C, H, W] = x/127.5 - 1, as the paper scales them.

    With labels, items are pairs (image, label).

    Attributes:
        shape: (C, H, W).
        labels: int64 [N], or None.
        class_names: the names of the classes 0..K-1, or None where the data's own ids are 0..K-1.
        source: what the images are, for messages and for a run's config.json.
    """

    shape: tuple[int, int, int]
    labels: torch.Tensor | None
    class_names: list[str] | None
    source: str
    on_disk = False  # whether an item is decoded from a file each time

    def _bytes(self, i: int) -> np.ndarray:
        """Image i as uint8 [C, H, W], before it is padded."""
        raise NotImplementedError

    def digest(self) -> str:
        """A checksum of the images, as they are read."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """How many classes the labels are of; None without labels."""
        return None if self.labels is None else len(self.class_names or ()) or int(self.labels.max()) + 1

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The images of these indices as uint8 [len(indices), C, H, W]; many picture files by worker processes."""
        if self.on_disk and len(indices) >= PART and torch.utils.data.get_worker_info() is None:
            parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
            return torch.cat(list(decoded(_Parts(self), batch_size=None, sampler=parts)))
        out = torch.zeros(len(indices), *self.shape, dtype=torch.uint8)
        for row, i in zip(out, indices, strict=True):
            image = torch.from_numpy(self._bytes(i))
            top, left = ((a - b) // 2 for a, b in zip(self.shape[1:], image.shape[1:], strict=True))
            row[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        return out

    @property
    def pixels(self) -> torch.Tensor:
        """All images as uint8 [N, C, H, W], which reads them all into memory."""
        return self.read(range(len(self)))

    def __getitem__(self, i: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = self.read([i])[0].float() / 127.5 - 1
        return image if self.labels is None else (image, self.labels[i])

    def pad_to(self, side: int) -> Images:
        """The same images in the middle of a black square; those that are larger stay as they are."""
        if max(self.shape[1:]) > side:
            return self
        padded = copy.copy(self)
        padded.shape = (self.shape[0], side, side)
        return padded


class _Parts(Dataset):
    """What `Images.read` gives for lists of indices."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images.read(indices)


class ArrayImages(Images):
    """Images of one array.

    Args:
        pixels: [N, C, H, W], uint8, or any numbers with `scale`. A memory-mapped array is read image by image.
        labels: integers [N], or None.
        source: what the images are.
        class_names: the names of the classes.
        scale: what the array's numbers are multiplied by to be in 0..255; None for uint8.
        side: the smaller side that images are resized to before the middle is cut out as a square; None leaves them alone.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray | None,
        source: str,
        *,
        class_names: list[str] | None = None,
        scale: float | None = None,
        side: int | None = None,
    ) -> None:
        self._array, self._scale, self._side = pixels, scale, side
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.source, self.class_names = source, class_names
        self.shape = tuple(pixels.shape[1:]) if side is None else (pixels.shape[1], side, side)

    def __len__(self) -> int:
        return len(self._array)

    def _bytes(self, i: int) -> np.ndarray:
        image = self._array[i]
        image = np.array(image) if self._scale is None else (image * self._scale).round().astype(np.uint8)
        if self._side is None:
            return image
        return np.stack([np.asarray(pictures.cropped(Image.fromarray(channel), self._side)) for channel in image])

    def digest(self) -> str:
        read_as = self._array.shape, self._array.dtype.str, self._scale, self._side, self.shape
        return hashlib.sha256(f"{read_as} {self._content}".encode()).hexdigest()

    @functools.cached_property
    def _content(self) -> str:
        """A checksum of the array as it is, which may be long."""
        total = hashlib.sha256()
        for start in range(0, len(self), MANY):
            total.update(np.ascontiguousarray(self._array[start : start + MANY]))
        return total.hexdigest()


class PictureImages(Images):
    """Images of picture files, each decoded when it is needed.

    Args:
        files: the files.
        labels: integers [N], or None.
        source: what the images are.
        class_names: the names of the classes.
        mode: "L", "LA", "RGB" or "RGBA", what every picture is converted to. Without alpha, transparency is composed on black.
        size: (height, width) of the pictures.
        side: the smaller side that pictures are resized to before the middle is cut out as a square; None leaves them alone.
        digest: a checksum of the files' contents.
    """

    on_disk = True

    def __init__(
        self,
        files: list[Path],
        labels: np.ndarray | None,
        source: str,
        *,
        class_names: list[str] | None,
        mode: str,
        size: tuple[int, int],
        side: int | None,
        digest: str,
    ) -> None:
        self._files, self._mode, self._size, self._side, self._digest = files, mode, size, side, digest
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.source, self.class_names = source, class_names
        self.shape = (len(mode), *(size if side is None else (side, side)))

    def __len__(self) -> int:
        return len(self._files)

    def _bytes(self, i: int) -> np.ndarray:
        image, _ = pictures.read(self._files[i])
        if "A" not in self._mode:
            image = pictures.on_black(image)
        if self._side is not None:
            image = pictures.cropped(image, self._side)
        values = pictures.channels_first(image.convert(self._mode))
        if self._side is None and values.shape[1:] != self._size:
            height, width = self._size
            raise DataError(
                f"{self._files[i]}: its size was {width}x{height} pixels when it was checked, and is another one now"
            )
        return values

    def digest(self) -> str:
        return hashlib.sha256(repr((self._digest, self._mode, self._side, self.shape)).encode()).hexdigest()


def load(
    path: str | Path,
    *,
    labels: bool = False,
    classes: int | Sequence[str] | None = None,
    size: int | None = None,
    alpha: str = "black",
    skip_damaged: bool = False,
) -> Images:
    """Images from `path`.

    - A .npz: the array x_train, x, images or the only one, with its labels in y_train, y or labels. A .npy: the array, which is
      memory-mapped. Arrays are [N, H, W] or [N, H, W, C]; [N, C, H, W] where it cannot be mistaken. Their numbers are uint8;
      wider unsigned integers are scaled by their full range, floats in [0, 1] by 255.
    - A folder: its pictures and those of its subfolders, in the order of their names, with the subfolders as labels. A first
      pass decodes every file, so that a damaged one shows before any work. Of a thousand pictures and more it is remembered
      for the next call, in ~/.cache/fastddpm/pictures (or under XDG_CACHE_HOME).

    Args:
        path: the file or folder.
        labels: whether items are pairs (image, label). Words and ids that are not 0..K-1 become classes in their order, and
            `class_names` has their names.
        classes: the classes that labels are of: K for 0..K-1, or their names; default what is found.
        size: the smaller side that images are resized to, with antialiasing, before the middle is cut out as a square; default
            images stay as they are and have to be of one size.
        alpha: "black" composes transparent pictures on black; "keep" keeps transparency as a channel.
        skip_damaged: leave out pictures that cannot be read, and list them in a warning.

    Raises:
        DataError: the data cannot be used; the message says what is wrong, and with which file.
    """
    path = Path(path)
    check_choice("alpha", alpha, ALPHAS)
    size, classes = None if size is None else check_int("size", size, 1), as_python_number(classes)
    if path.is_dir():
        return _folder(path, labels, classes, size, alpha, skip_damaged)
    if alpha != "black" or skip_damaged:
        raise DataError(
            f"data: {path}: alpha and skip_damaged are for folders of pictures; leave them out for an array"
        )
    names = ("y_train", "y", "labels") if labels else None
    with _arrays(path) as arrays:
        return _images(arrays, ("x_train", "x", "images"), names, path, classes, size)


def load_test(
    path: str | Path,
    *,
    labels: bool = False,
    classes: int | Sequence[str] | None = None,
    size: int | None = None,
) -> Images | None:
    """The x_test of a .npz, with labels=True its y_test too; None where `path` holds no such array. See `load`."""
    path = Path(path)
    size, classes = None if size is None else check_int("size", size, 1), as_python_number(classes)
    if path.is_dir():
        return None
    with _arrays(path) as arrays:
        names = ("y_test",) if labels else None
        return _images(arrays, ("x_test",), names, path, classes, size) if "x_test" in arrays else None


# ------------------------------------------------------------------------------------------------------------- arrays


@contextlib.contextmanager
def _arrays(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a file by their names; those of a .npz are read when they are asked for."""
    if not path.is_file():
        raise DataError(f"data: {path}: no such file or folder")
    try:
        loaded = np.load(path, mmap_mode="r")
    except Exception as error:  # damaged headers make NumPy raise nearly anything
        raise _unreadable(path, error) from error
    if isinstance(loaded, np.ndarray):
        yield {"x": loaded}
    else:
        with loaded:
            yield loaded


def _unreadable(path: Path, error: Exception) -> DataError:
    hint = ": save words as an array of strings, x.astype(str)" if "allow_pickle" in str(error) else ""
    return DataError(f"data: {path}: not a readable .npz or .npy file ({type(error).__name__}: {error}){hint}")


def _images(
    arrays: dict[str, np.ndarray],
    names: tuple[str, ...],
    labels: tuple[str, ...] | None,
    path: Path,
    classes: int | Sequence[str] | None,
    size: int | None,
) -> ArrayImages:
    pixels = _pick(arrays, names, path)
    if pixels.size == 0:
        raise DataError(f"data: {path}: {list(pixels.shape)} holds no images")
    pixels, notes = _channels_first(pixels, path)
    scale = _scale(pixels, path, notes)
    y, class_names = None, None
    if labels is not None:
        y = _pick(arrays, labels, path)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.shape != pixels.shape[:1]:
            hint = ": of one-hot rows take y.argmax(1)" if y.ndim == 2 and len(y) == len(pixels) else ""
            raise DataError(f"data: {path}: labels have shape {list(y.shape)}; expected [{len(pixels)}]{hint}")
        y, class_names = _classes(y, classes, path, notes)
    if size is not None:
        _note_enlarged(len(pixels) if min(pixels.shape[2:]) < size else 0, len(pixels), size, notes)
    images = ArrayImages(pixels, y, path.name, class_names=class_names, scale=scale, side=size)
    for note in notes:
        warn_once(images, f"data: {path}: {note}")
    return images


def _pick(arrays: dict[str, np.ndarray], names: tuple[str, ...], path: Path) -> np.ndarray:
    only = next(iter(arrays)) if len(arrays) == 1 and "x" in names else None
    name = next((name for name in names if name in arrays), only)
    if name is not None:
        try:
            return arrays[name]
        except Exception as error:  # of a damaged member of a .npz
            raise _unreadable(path, error) from error
    raise DataError(f"data: {path}: holds {', '.join(arrays) or 'nothing'}; expected one of {', '.join(names)}")


def _channels_first(pixels: np.ndarray, path: Path) -> tuple[np.ndarray, list[str]]:
    """(The array as [N, C, H, W], what is to be said about it). A view, so that a memory-mapped array stays on the disk."""
    shape = list(pixels.shape)
    expected = "expected images [N, H, W] or [N, H, W, C]"
    if pixels.ndim == 2:
        raise DataError(f"data: {path}: got {shape}; {expected}: write one picture as x[None]")
    if pixels.ndim == 3:
        if shape[2] in CHANNELS:
            raise DataError(
                f"data: {path}: got {shape}, which may be one picture in colour; {expected}: write one picture as x[None], and "
                f"{shape[0]} grey ones that are {shape[2]} wide as x[..., None]"
            )
        notes = []
        if shape[0] == 3:
            notes.append(
                f"read as {shape[0]} grey pictures of {shape[1]}x{shape[2]}; one picture in colour is x.transpose(1, 2, 0)[None]"
            )
        return pixels[:, None], notes
    if pixels.ndim != 4:
        raise DataError(f"data: {path}: got {shape}; {expected}")
    first, last = shape[1], shape[3]
    square_first, square_last = shape[2] == shape[3], shape[1] == shape[2]
    if last in CHANNELS and not (first in CHANNELS and square_first and not square_last):
        return pixels.transpose(0, 3, 1, 2), []
    if first in CHANNELS and last not in CHANNELS and first < min(shape[2:]):
        return pixels, [f"{shape} was read as [N, C, H, W]"]
    if last < min(shape[1:3]):  # channels of another number, in the documented layout
        return pixels.transpose(0, 3, 1, 2), []
    raise DataError(
        f"data: {path}: got {shape}; {expected}. If its layout is [N, C, H, W], write x.transpose(0, 2, 3, 1)"
    )


def _scale(pixels: np.ndarray, path: Path, notes: list[str]) -> float | None:
    """What the array's numbers are multiplied by to be in 0..255; None where they are uint8."""
    kind = pixels.dtype
    if kind == np.uint8:
        return None
    if kind == np.bool_:
        return 255.0
    low, high = _range(pixels)
    if kind.kind == "u":
        full = np.iinfo(kind).max
        _note_dark(high / full, notes)
        return 255 / full
    if kind.kind == "f" and 0 <= low <= high <= 1:
        return 255.0
    wanted = "expected uint8, wider unsigned integers that use their full range, or floats in [0, 1]"
    if 0 <= low and LEAST_BYTE < high <= 255:
        mend = ": write x.round().astype(np.uint8)" if kind.kind == "f" else ": write x.astype(np.uint8)"
    elif kind.kind == "i" and 0 <= low and high <= 1:
        mend = ": write x.astype(bool)"
    elif kind.kind == "f" and 0 <= low and high <= 1.5:
        mend = ": write x.clip(0, 1)"
    elif kind.kind == "f" and -1.5 <= low and high <= 1.5:
        mend = ": write ((x + 1) / 2).clip(0, 1)"
    else:
        mend = ""
    raise DataError(f"data: {path}: {kind} from {low:.9g} to {high:.9g}; {wanted}{mend}")


def _range(pixels: np.ndarray) -> tuple[float, float]:
    """(The smallest number, the largest one), a part of the array at a time."""
    if pixels.dtype.kind not in "iuf":
        return float("nan"), float("nan")
    found = [(part.min(), part.max()) for part in (pixels[i : i + MANY] for i in range(0, len(pixels), MANY))]
    low, high = np.array(found).T
    return float(low.min()), float(high.max())


def _classes(
    y: np.ndarray, classes: int | Sequence[str] | None, path: Path, notes: list[str]
) -> tuple[np.ndarray, list[str] | None]:
    """(Labels in 0..K-1, the names of the classes or None where the labels are what they were)."""
    if y.dtype.kind in "US":
        words = [word.decode(errors="replace") if isinstance(word, bytes) else str(word) for word in y.tolist()]
        if isinstance(classes, int):
            raise DataError(f"data: {path}: labels are words, such as {words[0]!r}; expected ids in 0..{classes - 1}")
        names = sorted(set(words)) if classes is None else list(classes)
        return _numbered(words, names, path), names
    if y.dtype.kind not in "biuf":
        raise DataError(f"data: {path}: labels are {y.dtype}; expected whole numbers or words")
    if y.dtype == bool:
        y = y.astype(np.int64)
    # In this order, as a comparison with a NaN is False. Of integers and bools all but the bounds is true.
    right = (y >= 0) & (y < MOST_LABEL) & (y == np.floor(y))
    if not right.all():
        i = int(right.argmin())
        raise DataError(f"data: {path}: label {i} is {y[i]}; expected whole numbers from 0 to 2^62, or words")
    y = y.astype(np.int64)
    if isinstance(classes, int):
        if int(y.max()) >= classes:
            i = int((y >= classes).argmax())
            raise DataError(f"data: {path}: label {i} is {y[i]}; expected 0..{classes - 1}")
        return y, None
    if classes is not None:
        return _numbered([str(v) for v in y.tolist()], list(classes), path), list(classes)
    ids, mapped = np.unique(y, return_inverse=True)
    if len(ids) == int(ids[-1]) + 1:
        return y, None
    names = [str(v) for v in ids]
    notes.append(f"labels are {_listed(names)}: classes 0..{len(ids) - 1} in this order")
    return mapped.reshape(-1), names


def _numbered(words: list[str], names: list[str], path: Path) -> np.ndarray:
    number = {name: i for i, name in enumerate(names)}
    strange = next((word for word in words if word not in number), None)
    if strange is not None:
        raise DataError(f"data: {path}: label {strange!r} is none of the classes {_listed(names)}")
    return np.array([number[word] for word in words], dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------- folders


def _folder(
    path: Path, labels: bool, classes: int | Sequence[str] | None, size: int | None, alpha: str, skip_damaged: bool
) -> PictureImages:
    files, others = _found(path)
    if not files:
        seen = f": {_counted(others)}" if others else ""
        raise DataError(f"data: {path}: no pictures in it or its subfolders{seen}")
    notes = []
    if others:
        notes.append(f"left out files that are not pictures: {_counted(others)}")
    table = _checked(path, files)
    damaged = np.flatnonzero(table["fault"] != "")
    if len(damaged) and not skip_damaged:
        more = f"; so are {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise DataError(
            f"data: {table['fault'][damaged[0]]}{more}. skip_damaged (--skip-damaged) leaves such files out"
        )
    if len(damaged):
        notes.append(f"left out {len(damaged)} damaged: {', '.join(str(files[i].relative_to(path)) for i in damaged)}")
        whole_ones = np.flatnonzero(table["fault"] == "")
        if not len(whole_ones):
            raise DataError(f"data: {path}: none of its {len(files)} pictures can be read; {table['fault'][0]}")
        table, files = table[whole_ones], [files[i] for i in whole_ones]
    elif skip_damaged:
        notes.append("no damaged pictures")
    mode = _mode(path, files, table, alpha, notes)
    height, width = int(table["height"][0]), int(table["width"][0])
    if size is None:
        other = np.flatnonzero((table["height"] != height) | (table["width"] != width))
        if len(other):
            i = other[0]
            raise DataError(
                f"data: {files[i]}: {table['width'][i]}x{table['height'][i]} pixels, but {files[0].name} has {width}x{height}; "
                "pictures must have one size, or pass size (--size) to crop and resize them"
            )
    else:
        small = int((np.minimum(table["height"], table["width"]) < size).sum())
        _note_enlarged(small, len(files), size, notes)
    _note_dark(float(np.fmax.reduce(table["largest"])), notes)
    if table["several"].any():
        notes.append(f"{table['several'].sum()} of {len(files)} files hold several pictures each; the first is taken")
    doubtful = np.flatnonzero(table["doubt"] != "")
    if len(doubtful):
        i = doubtful[0]
        notes.append(
            f"{len(doubtful)} of {len(files)} pictures were read with a warning, such as {files[i]}: {table['doubt'][i]}"
        )
    y, class_names = None, None
    if labels:
        parts = [file.relative_to(path).parts for file in files]
        loose = next((file for file, names in zip(files, parts, strict=True) if len(names) == 1), None)
        if loose is not None:
            raise DataError(
                f"data: {loose}: has no class; with labels, every picture lies in the subfolder of its class"
            )
        words = [names[0] for names in parts]
        empty = sorted({entry.name for entry in os.scandir(path) if _is_open(entry)} - set(words))
        if empty:
            notes.append(f"subfolders without a picture are no classes: {_listed(empty)}")
        y, class_names = _classes(np.array(words), classes, path, notes)
    digest = _digest(path, files, table)
    images = PictureImages(
        files, y, path.name, class_names=class_names, mode=mode, size=(height, width), side=size, digest=digest
    )
    for note in notes:
        warn_once(images, f"data: {path}: {note}")
    return images


def _found(path: Path) -> tuple[list[Path], Counter[str]]:
    """(Picture files in the order of their names, how many other files there are of each suffix); hidden ones don't count."""
    files, others, seen = [], Counter(), set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder that it is in
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = [name for name in subfolders if not name.startswith(HIDDEN)]
        for name in names:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in pictures.suffixes():
                files.append(Path(folder, name))
            else:
                others[suffix or "no suffix"] += 1
    return sorted(files), others


def _is_open(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(HIDDEN)


FACTS = ("U4", "i4", "i4", "?", "f8", "?", "O")  # dtypes of pictures.Facts
TABLE = np.dtype([*zip(pictures.Facts._fields, FACTS, strict=True), ("sha256", "S64"), ("fault", "O")])
NOTHING = pictures.Facts("", 0, 0, False, float("nan"), False, "")


class _Check(Dataset):
    """The row of TABLE for each file."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple:
        content = b""
        try:
            content = self.files[i].read_bytes()
            _, facts = pictures.read(self.files[i], content)
            fault = ""
        except OSError as error:
            facts, fault = NOTHING, f"{self.files[i]}: cannot be read ({error})"
        except DataError as error:
            facts, fault = NOTHING, str(error)
        return (*facts, hashlib.sha256(content).hexdigest(), fault)


def _checked(path: Path, files: list[Path]) -> np.ndarray:
    """A row of TABLE for each file, decoded in full; of many files remembered as long as none of them has changed."""
    if len(files) < MANY:
        return np.array(list(map(_Check(files).__getitem__, range(len(files)))), dtype=TABLE)
    listing = hashlib.sha256(f"{path.resolve()} {pictures.RULES} {PIL.__version__}".encode(errors="surrogateescape"))
    for file in files:
        with contextlib.suppress(OSError):  # which the check will name
            status = file.stat()
            listing.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    kept = _cache() / f"{listing.hexdigest()}.npz"
    with contextlib.suppress(Exception), np.load(kept) as columns:  # of which a damaged one is made anew
        table = np.empty(len(files), dtype=TABLE)
        for name in TABLE.names:
            table[name] = columns[name]
        for i in np.flatnonzero(table["fault"] != ""):  # a network's fault may be over
            table[i] = _Check(files)[i]
        return table
    rows = []
    with progress_bar(None, total=len(files), unit="picture", desc=f"checking {path.name}") as bar:
        for part in decoded(_Check(files), batch_size=64, collate_fn=list):
            rows += part
            bar.update(len(part))
    table = np.array(rows, dtype=TABLE)
    with contextlib.suppress(OSError):  # it is checked again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        with whole(kept) as aside:
            columns = {name: table[name] for name in TABLE.names}
            texts = {name: column.astype(str) for name, column in columns.items() if column.dtype == object}
            np.savez_compressed(aside, **{**columns, **texts})
    return table


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm" / "pictures"


def decoded(dataset: Dataset, **options: object) -> Iterator:
    """What a DataLoader with these options gives, by worker processes that decode pictures side by side.

    Raises DataError without the worker's traceback in its message, and ends the processes at once.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    items = iter(DataLoader(dataset, num_workers=min(8, cores), worker_init_fn=_undisturbed, **options))
    fault = None
    while fault is None:
        try:
            item = next(items)
        except StopIteration:
            return
        except DataError as error:
            fault = DataError(str(error).rpartition("DataError: ")[2].strip())
            error.__traceback__ = (
                None  # one of torch's frames in it refers to the error, which would keep the processes
            )
        else:
            yield item
    del items  # outside of the except block, in which the error's frames are still referred to
    raise fault


def _undisturbed(_: int) -> None:
    """For a worker process: Ctrl-C is the main process's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _mode(path: Path, files: list[Path], table: np.ndarray, alpha: str, notes: list[str]) -> str:
    """The mode that every picture is converted to."""
    with_alpha = np.char.endswith(table["mode"], "A")
    grey = np.char.startswith(table["mode"], "L")
    if not grey.all() and grey.any():
        notes.append(f"{grey.sum()} of {len(files)} pictures are grey; all become RGB")
    mode = "L" if grey.all() else "RGB"
    if alpha == "keep":
        if not with_alpha.any():
            raise DataError(
                f"data: {path}: alpha is to be kept, but no picture has an alpha channel; leave alpha (--alpha) out"
            )
        return f"{mode}A"
    transparent = int(table["transparent"].sum())
    if transparent:
        notes.append(
            f"{transparent} of {len(files)} pictures are transparent; they are composed on black (alpha keeps transparency)"
        )
    return mode


def _digest(path: Path, files: list[Path], table: np.ndarray) -> str:
    total = hashlib.sha256()
    for file, checksum in zip(files, table["sha256"], strict=True):
        total.update(str(file.relative_to(path)).encode(errors="surrogateescape") + b"\0" + checksum)
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------- messages


def _note_enlarged(small: int, n: int, size: int, notes: list[str]) -> None:
    if small:
        notes.append(f"{small} of {n} images are smaller than {size} pixels and are enlarged")


def _note_dark(largest: float, notes: list[str]) -> None:
    """largest: as a share of the full range; a NaN where nothing has more than 8 bits."""
    if largest < DARK:
        notes.append(
            f"integers of more than 8 bits are scaled by their full range, of which they use {100 * largest:.2g} %, so that "
            "images are dark; scale them yourself, or state the largest value in the file"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (f", ... ({len(names)})" if len(names) > FEW else "")


def _counted(others: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(FEW))
