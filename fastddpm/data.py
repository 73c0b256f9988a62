"""Images for training and evaluation, from a .npz or .npy file or a folder of pictures."""

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
from .utils.files import atomic_write
from .utils.progress import bar as progress_bar
from .utils.validation import LEAST_BYTE, as_python_number, check_choice, check_int
from .utils.warn import warn_once

# Exceptions of np.load, and of reading a member of a .npz, for a damaged file.
NUMPY_LOAD_ERRORS = (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile)
ALPHAS = ("black", "keep")
ARRAY_CHUNK = 1000  # images read from an array at a time
MANY_PICTURES = 1000  # minimum number for checking by worker processes and caching the result
WORKER_BATCH = 128  # pictures read by a worker process at a time
MAX_LISTED = 10  # maximum number of names in a message
MAX_LABEL = 1 << 62
HIDDEN_PREFIXES = (".", "__MACOSX")  # prefixes of files and folders that operating systems add
DARK = 1 / 8  # warn if the largest value is below this share of the full range


class Images(Dataset):
    """A data set of images of one shape, read on access.

    Items are float32 [C, H, W] in [-1, 1], x / 127.5 - 1 as in the paper. With labels, items are pairs (image, label).

    Attributes:
        shape: (C, H, W).
        labels: int64 [N], or None.
        class_names: names of the classes 0..K-1; None if the data's own ids are 0..K-1.
        source: description of the images, for messages and for the config.json of a run.
    """

    shape: tuple[int, int, int]
    labels: torch.Tensor | None
    class_names: list[str] | None
    source: str
    on_disk = False  # whether each access decodes a file

    def _unpadded(self, i: int) -> np.ndarray:
        """Return image i without padding, as uint8 [C, H, W]."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return a checksum of the images as `read` returns them."""
        raise NotImplementedError

    @property
    def classes(self) -> int | None:
        """The number of classes; None without labels."""
        return None if self.labels is None else len(self.class_names or ()) or int(self.labels.max()) + 1

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the images at `indices` as uint8 [len(indices), C, H, W].

        If the images are many files, worker processes decode them.

        Args:
            indices: integers in 0..N-1.
        """
        if self.on_disk and len(indices) >= WORKER_BATCH and torch.utils.data.get_worker_info() is None:
            batches = [indices[start : start + WORKER_BATCH] for start in range(0, len(indices), WORKER_BATCH)]
            return torch.cat(list(load_in_workers(_Batches(self), batch_size=None, sampler=batches)))
        out = torch.zeros(len(indices), *self.shape, dtype=torch.uint8)
        for padded, i in zip(out, indices, strict=True):
            image = torch.from_numpy(self._unpadded(i))
            top, left = ((a - b) // 2 for a, b in zip(self.shape[1:], image.shape[1:], strict=True))
            padded[:, top : top + image.shape[1], left : left + image.shape[2]] = image
        return out

    @property
    def pixels(self) -> torch.Tensor:
        """All images in memory, uint8 [N, C, H, W]."""
        return self.read(range(len(self)))

    def __getitem__(self, i: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = self.read([i])[0].float() / 127.5 - 1
        return image if self.labels is None else (image, self.labels[i])

    def pad_to(self, side: int) -> Images:
        """Return the images centred in black squares. Images that are larger are returned unchanged.

        Args:
            side: side of the squares in pixels.
        """
        if max(self.shape[1:]) > side:
            return self
        padded = copy.copy(self)
        padded.shape = (self.shape[0], side, side)
        return padded


class _Batches(Dataset):
    """A data set whose items are `Images.read(indices)`, for a list of indices as index."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, indices: Sequence[int]) -> torch.Tensor:
        return self.images.read(indices)


class ArrayImages(Images):
    """Images of one array.

    Args:
        pixels: array [N, C, H, W], uint8, or of any other dtype if `scale` is given. A memory-mapped array is read image by
            image.
        labels: integers [N], or None.
        source: description of the images.
        class_names: names of the classes.
        scale: factor that maps the array's values to 0..255; None for uint8.
        side: images are resized so that their smaller side is `side`, and cropped to a centred square; None means unchanged.
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

    def _unpadded(self, i: int) -> np.ndarray:
        image = self._array[i]
        image = np.array(image) if self._scale is None else (image * self._scale).round().astype(np.uint8)
        if self._side is None:
            return image
        return np.stack(
            [np.asarray(pictures.center_cropped(Image.fromarray(channel), self._side)) for channel in image]
        )

    def digest(self) -> str:
        reading = self._array.shape, self._array.dtype.str, self._scale, self._side, self.shape
        return hashlib.sha256(f"{reading} {self._array_checksum}".encode()).hexdigest()

    @functools.cached_property
    def _array_checksum(self) -> str:
        checksum = hashlib.sha256()
        for start in range(0, len(self), ARRAY_CHUNK):
            checksum.update(np.ascontiguousarray(self._array[start : start + ARRAY_CHUNK]))
        return checksum.hexdigest()


class PictureImages(Images):
    """Images of picture files, decoded on access.

    Args:
        files: the files.
        labels: integers [N], or None.
        source: description of the images.
        class_names: names of the classes.
        mode: mode of Pillow that every picture is converted to: "L", "LA", "RGB" or "RGBA". In a mode without alpha,
            transparent pictures are composed on black.
        size: (height, width) of the pictures.
        side: pictures are resized so that their smaller side is `side`, and cropped to a centred square; None means unchanged.
        digest: checksum of the files' contents.
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

    def _unpadded(self, i: int) -> np.ndarray:
        image, _ = pictures.read(self._files[i])
        if "A" not in self._mode:
            image = pictures.composed_on_black(image)
        if self._side is not None:
            image = pictures.center_cropped(image, self._side)
        values = pictures.channels_first(image.convert(self._mode))
        if self._side is None and values.shape[1:] != self._size:
            height, width = self._size
            raise DataError(f"{self._files[i]}: its size has changed from {width}x{height} pixels since it was checked")
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
    """Load the images at a path: a .npz or .npy file, or a folder of pictures.

    - .npz: the images are the array x_train, x or images, or the only array. Their labels are in y_train, y or labels.
    - .npy: the images are the array, which is memory-mapped.
    - Folder: the images are the pictures in the folder and its subfolders, sorted by name. The names of the subfolders
      are the labels.

    Arrays have shape [N, H, W] or [N, H, W, C], or [N, C, H, W] if that is unambiguous. uint8 arrays are used
    unmodified. Wider unsigned integers are scaled to 0..255 by their full range, and floats in [0, 1] by 255.

    All files of a folder are decoded once before use, so that a damaged file is reported at once. For 1000 pictures or
    more, the result is cached in ~/.cache/fastddpm/pictures (or below XDG_CACHE_HOME) for later calls.

    Args:
        path: the file or folder.
        labels: whether items are pairs (image, label). Words, and ids that are not 0..K-1, become classes in sorted
            order; `class_names` has their names.
        classes: the classes that labels may have, as their number K, or as their names. Default: the classes found in
            the data.
        size: resize images so that their smaller side is `size`, with antialiasing, and crop them to a centred square.
            Default: images are not resized and must have one size.
        alpha: "black" composes transparent pictures on black; "keep" keeps transparency as a channel.
        skip_damaged: whether to omit pictures that cannot be read, and to list them in a warning.

    Returns:
        The images, as `Images`.

    Raises:
        DataError: the data cannot be used. The message names the file and the reason.
    """
    path = Path(path)
    check_choice("alpha", alpha, ALPHAS)
    size, classes = None if size is None else check_int("size", size, 1), as_python_number(classes)
    if path.is_dir():
        return _load_folder(path, labels, classes, size, alpha, skip_damaged)
    if alpha != "black" or skip_damaged:
        raise DataError(f"data: {path}: alpha and skip_damaged are for folders of pictures; omit them for an array")
    names = ("y_train", "y", "labels") if labels else None
    with _opened(path) as arrays:
        return _load_arrays(arrays, ("x_train", "x", "images"), names, path, classes, size)


def load_test(
    path: str | Path,
    *,
    labels: bool = False,
    classes: int | Sequence[str] | None = None,
    size: int | None = None,
) -> Images | None:
    """Load the test images x_test of a .npz.

    Args:
        path: the file or folder.
        labels: whether to load the labels y_test too.
        classes: as for `load`.
        size: as for `load`.

    Returns:
        The images, as `Images`; None if `path` has no x_test.

    Raises:
        DataError: the data cannot be used. The message names the file and the reason.
    """
    path = Path(path)
    size, classes = None if size is None else check_int("size", size, 1), as_python_number(classes)
    if path.is_dir():
        return None
    with _opened(path) as arrays:
        names = ("y_test",) if labels else None
        return _load_arrays(arrays, ("x_test",), names, path, classes, size) if "x_test" in arrays else None


# ------------------------------------------------------------------------------------------------------------- arrays


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of a file by name. Arrays of a .npz are read on access."""
    if not path.is_file():
        raise DataError(f"data: {path}: no such file or folder")
    try:
        loaded = np.load(path, mmap_mode="r")
    except Exception as error:  # damaged headers make NumPy raise nearly anything
        raise _load_error(path, error) from error
    if isinstance(loaded, np.ndarray):
        yield {"x": loaded}
    else:
        with loaded:
            yield loaded


def _load_error(path: Path, error: Exception) -> DataError:
    hint = ": save words as an array of strings, x.astype(str)" if "allow_pickle" in str(error) else ""
    return DataError(f"data: {path}: not a readable .npz or .npy file ({type(error).__name__}: {error}){hint}")


def _load_arrays(
    arrays: dict[str, np.ndarray],
    names: tuple[str, ...],
    labels: tuple[str, ...] | None,
    path: Path,
    classes: int | Sequence[str] | None,
    size: int | None,
) -> ArrayImages:
    """Return the images of the first array of `names` that is in `arrays`, with the first labels of `labels`."""
    pixels = _pick(arrays, names, path)
    if pixels.size == 0:
        raise DataError(f"data: {path}: {list(pixels.shape)} has no images")
    pixels, notes = _channels_first(pixels, path)
    scale = _scale(pixels, path, notes)
    y, class_names = None, None
    if labels is not None:
        y = _pick(arrays, labels, path)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.shape != pixels.shape[:1]:
            hint = ": for one-hot rows, write y.argmax(1)" if y.ndim == 2 and len(y) == len(pixels) else ""
            raise DataError(f"data: {path}: labels have shape {list(y.shape)}; expected [{len(pixels)}]{hint}")
        y, class_names = _number_labels(y, classes, path, notes)
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
        except Exception as error:  # a damaged member of a .npz makes NumPy raise nearly anything
            raise _load_error(path, error) from error
    raise DataError(f"data: {path}: holds {', '.join(arrays) or 'nothing'}; expected one of {', '.join(names)}")


def _channels_first(pixels: np.ndarray, path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the array as a view [N, C, H, W], which leaves a memory-mapped array on disk, and notes about it."""
    shape = list(pixels.shape)
    expected = "expected images [N, H, W] or [N, H, W, C]"
    if pixels.ndim == 2:
        raise DataError(f"data: {path}: got {shape}; {expected}: write one image as x[None]")
    if pixels.ndim == 3:
        if shape[2] in CHANNELS:
            raise DataError(
                f"data: {path}: got {shape}, which may be one colour image; {expected}: write one image as x[None], or "
                f"{shape[0]} grey images that are {shape[2]} pixels wide as x[..., None]"
            )
        notes = []
        if shape[0] == 3:
            notes.append(
                f"read as {shape[0]} grey images of {shape[1]}x{shape[2]}; for one colour image, write x.transpose(1, 2, 0)[None]"
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
    if last < min(shape[1:3]):  # another number of channels, in the documented layout
        return pixels.transpose(0, 3, 1, 2), []
    raise DataError(
        f"data: {path}: got {shape}; {expected}. If its layout is [N, C, H, W], write x.transpose(0, 2, 3, 1)"
    )


def _scale(pixels: np.ndarray, path: Path, notes: list[str]) -> float | None:
    """Return the factor that maps the array's values to 0..255; None if they are uint8."""
    dtype = pixels.dtype
    if dtype == np.uint8:
        return None
    if dtype == np.bool_:
        return 255.0
    low, high = _range(pixels)
    if dtype.kind == "u":
        full = np.iinfo(dtype).max
        _note_dark(high / full, notes)
        return 255 / full
    if dtype.kind == "f" and 0 <= low <= high <= 1:
        return 255.0
    expected = "expected uint8, wider unsigned integers that use their full range, or floats in [0, 1]"
    if 0 <= low and LEAST_BYTE < high <= 255:
        hint = ": write x.round().astype(np.uint8)" if dtype.kind == "f" else ": write x.astype(np.uint8)"
    elif dtype.kind == "i" and 0 <= low and high <= 1:
        hint = ": write x.astype(bool)"
    elif dtype.kind == "f" and 0 <= low and high <= 1.5:
        hint = ": write x.clip(0, 1)"
    elif dtype.kind == "f" and -1.5 <= low and high <= 1.5:
        hint = ": write ((x + 1) / 2).clip(0, 1)"
    else:
        hint = ""
    raise DataError(f"data: {path}: {dtype} from {low:.9g} to {high:.9g}; {expected}{hint}")


def _range(pixels: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest value. The array is read in chunks."""
    if pixels.dtype.kind not in "iuf":
        return float("nan"), float("nan")
    chunks = (pixels[i : i + ARRAY_CHUNK] for i in range(0, len(pixels), ARRAY_CHUNK))
    low, high = np.array([(chunk.min(), chunk.max()) for chunk in chunks]).T
    return float(low.min()), float(high.max())


def _number_labels(
    y: np.ndarray, classes: int | Sequence[str] | None, path: Path, notes: list[str]
) -> tuple[np.ndarray, list[str] | None]:
    """Return (labels in 0..K-1, the names of the classes or None if the labels are unchanged)."""
    if y.dtype.kind in "US":
        words = [word.decode(errors="replace") if isinstance(word, bytes) else str(word) for word in y.tolist()]
        if isinstance(classes, int):
            raise DataError(f"data: {path}: labels are words, such as {words[0]!r}; expected ids in 0..{classes - 1}")
        names = sorted(set(words)) if classes is None else list(classes)
        return _indices_of(words, names, path), names
    if y.dtype.kind not in "biuf":
        raise DataError(f"data: {path}: labels are {y.dtype}; expected whole numbers or words")
    if y.dtype == bool:
        y = y.astype(np.int64)
    valid = (y >= 0) & (y < MAX_LABEL) & (y == np.floor(y))  # False for a NaN
    if not valid.all():
        i = int(valid.argmin())
        raise DataError(f"data: {path}: label {i} is {y[i]}; expected whole numbers from 0 to 2^62, or words")
    y = y.astype(np.int64)
    if isinstance(classes, int):
        if int(y.max()) >= classes:
            i = int((y >= classes).argmax())
            raise DataError(f"data: {path}: label {i} is {y[i]}; expected 0..{classes - 1}")
        return y, None
    if classes is not None:
        return _indices_of([str(v) for v in y.tolist()], list(classes), path), list(classes)
    ids, mapped = np.unique(y, return_inverse=True)
    if len(ids) == int(ids[-1]) + 1:
        return y, None
    names = [str(v) for v in ids]
    notes.append(f"labels are {_shortened(names)}: classes 0..{len(ids) - 1} in this order")
    return mapped.reshape(-1), names


def _indices_of(words: list[str], names: list[str], path: Path) -> np.ndarray:
    """Return the index of each word among the classes' names."""
    index = {name: i for i, name in enumerate(names)}
    unknown = next((word for word in words if word not in index), None)
    if unknown is not None:
        raise DataError(f"data: {path}: label {unknown!r} is not one of the classes {_shortened(names)}")
    return np.array([index[word] for word in words], dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------- folders


def _load_folder(
    path: Path, labels: bool, classes: int | Sequence[str] | None, size: int | None, alpha: str, skip_damaged: bool
) -> PictureImages:
    """Return the images of the pictures in a folder and its subfolders, after checking every file."""
    notes = []
    files, facts = _readable_pictures(path, skip_damaged, notes)
    mode = _common_mode(path, facts, alpha, notes)
    if size is None:
        _check_sizes(files, facts)
    else:
        small = int((np.minimum(facts["height"], facts["width"]) < size).sum())
        _note_enlarged(small, len(files), size, notes)
    _note_dark(float(np.fmax.reduce(facts["largest"])), notes)
    if facts["several"].any():
        notes.append(
            f"{facts['several'].sum()} of {len(files)} files have several pictures each; the first picture is used"
        )
    doubtful = np.flatnonzero(facts["doubt"] != "")
    if len(doubtful):
        i = doubtful[0]
        notes.append(
            f"{len(doubtful)} of {len(files)} pictures were read with a warning, such as {files[i]}: {facts['doubt'][i]}"
        )
    y, class_names = _subfolder_labels(path, files, classes, notes) if labels else (None, None)
    images = PictureImages(
        files,
        y,
        path.name,
        class_names=class_names,
        mode=mode,
        size=(int(facts["height"][0]), int(facts["width"][0])),
        side=size,
        digest=_digest(path, files, facts),
    )
    for note in notes:
        warn_once(images, f"data: {path}: {note}")
    return images


def _readable_pictures(path: Path, skip_damaged: bool, notes: list[str]) -> tuple[list[Path], np.ndarray]:
    """Return the folder's pictures and their facts; raise DataError if there are none, or if damaged ones are not skipped."""
    files, others = _list_pictures(path)
    if not files:
        contents = f": {_summary(others)}" if others else ""
        raise DataError(f"data: {path}: no pictures in the folder or its subfolders{contents}")
    if others:
        notes.append(f"omitted files that are not pictures: {_summary(others)}")
    facts = _check_pictures(path, files)
    damaged = np.flatnonzero(facts["fault"] != "")
    if not len(damaged):
        if skip_damaged:
            notes.append("no damaged pictures")
        return files, facts
    if not skip_damaged:
        more = f"; so are {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise DataError(f"data: {facts['fault'][damaged[0]]}{more}. skip_damaged (--skip-damaged) omits such files")
    notes.append(f"omitted {len(damaged)} damaged: {', '.join(str(files[i].relative_to(path)) for i in damaged)}")
    readable = np.flatnonzero(facts["fault"] == "")
    if not len(readable):
        raise DataError(f"data: {path}: none of its {len(files)} pictures can be read; {facts['fault'][0]}")
    return [files[i] for i in readable], facts[readable]


def _check_sizes(files: list[Path], facts: np.ndarray) -> None:
    """Raise DataError if the pictures have more than one size."""
    height, width = facts["height"][0], facts["width"][0]
    others = np.flatnonzero((facts["height"] != height) | (facts["width"] != width))
    if len(others):
        i = others[0]
        raise DataError(
            f"data: {files[i]}: {facts['width'][i]}x{facts['height'][i]} pixels, but {files[0].name} has {width}x{height}; "
            "pictures must have one size, or pass size (--size) to crop and resize them"
        )


def _subfolder_labels(
    path: Path, files: list[Path], classes: int | Sequence[str] | None, notes: list[str]
) -> tuple[np.ndarray, list[str] | None]:
    """Return (the pictures' labels, the names of the classes), from the subfolders of the pictures."""
    parts = [file.relative_to(path).parts for file in files]
    unlabelled = next((file for file, names in zip(files, parts, strict=True) if len(names) == 1), None)
    if unlabelled is not None:
        raise DataError(
            f"data: {unlabelled}: has no class; with labels, every picture must be in the subfolder of its class"
        )
    words = [names[0] for names in parts]
    empty = sorted({entry.name for entry in os.scandir(path) if _is_visible_folder(entry)} - set(words))
    if empty:
        notes.append(f"subfolders without pictures are not classes: {_shortened(empty)}")
    return _number_labels(np.array(words), classes, path, notes)


def _list_pictures(path: Path) -> tuple[list[Path], Counter[str]]:
    """Return (the sorted picture files, the number of other files by suffix). Hidden files are ignored."""
    files, others, visited = [], Counter(), set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        target = os.path.realpath(folder)
        if target in visited:  # a link to a folder that contains the link
            subfolders.clear()
            continue
        visited.add(target)
        subfolders[:] = [name for name in subfolders if not name.startswith(HIDDEN_PREFIXES)]
        for name in names:
            if name.startswith("."):
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in pictures.suffixes():
                files.append(Path(folder, name))
            else:
                others[suffix or "no suffix"] += 1
    return sorted(files), others


def _is_visible_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(HIDDEN_PREFIXES)


FACTS = np.dtype(
    [
        *zip(pictures.Facts._fields, ("U4", "i4", "i4", "?", "f8", "?", "O"), strict=True),
        ("sha256", "S64"),
        ("fault", "O"),  # the reason if the file cannot be read, else ""
    ]
)
NO_FACTS = pictures.Facts("", 0, 0, False, float("nan"), False, "")


class _PictureChecks(Dataset):
    """A data set of the FACTS of each file. Reading an item decodes the complete file."""

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
            facts, fault = NO_FACTS, f"{self.files[i]}: cannot be read ({error})"
        except DataError as error:
            facts, fault = NO_FACTS, str(error)
        return (*facts, hashlib.sha256(content).hexdigest(), fault)


def _check_pictures(path: Path, files: list[Path]) -> np.ndarray:
    """Return the FACTS of each file. The FACTS of MANY_PICTURES files or more are cached until a file changes."""
    checks = _PictureChecks(files)
    if len(files) < MANY_PICTURES:
        return np.array([checks[i] for i in range(len(files))], dtype=FACTS)
    cache = _cache_folder() / f"{_listing_checksum(path, files)}.npz"
    with contextlib.suppress(Exception), np.load(cache) as columns:  # a damaged cache is computed again
        facts = np.empty(len(files), dtype=FACTS)
        for name in FACTS.names:
            facts[name] = columns[name]
        for i in np.flatnonzero(facts["fault"] != ""):  # the reason may have been a network that was down
            facts[i] = checks[i]
        return facts
    checked = []
    with progress_bar(None, total=len(files), unit="picture", desc=f"checking {path.name}") as bar:
        for batch in load_in_workers(checks, batch_size=64, collate_fn=list):
            checked += batch
            bar.update(len(batch))
    facts = np.array(checked, dtype=FACTS)
    with contextlib.suppress(OSError):  # without a cache, the next call checks the files again
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as temporary:
            columns = {name: facts[name] for name in FACTS.names}
            texts = {name: column.astype(str) for name, column in columns.items() if column.dtype == object}
            np.savez_compressed(temporary, **{**columns, **texts})
    return facts


def _listing_checksum(path: Path, files: list[Path]) -> str:
    """Return a checksum of the files' names, sizes and times, and of the versions that a check depends on."""
    checksum = hashlib.sha256(
        f"{path.resolve()} {pictures.READER_VERSION} {PIL.__version__}".encode(errors="surrogateescape")
    )
    for file in files:
        with contextlib.suppress(OSError):  # `_PictureChecks` reports the error
            status = file.stat()
            checksum.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return checksum.hexdigest()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm" / "pictures"


def load_in_workers(dataset: Dataset, **options: object) -> Iterator:
    """Yield the items of a DataLoader with these options, in which worker processes decode pictures in parallel.

    A DataError of a worker ends all workers at once. It is raised again without the worker's traceback in its message.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    items = iter(DataLoader(dataset, num_workers=min(8, cores), worker_init_fn=_ignore_interrupts, **options))
    fault = None
    while fault is None:
        try:
            item = next(items)
        except StopIteration:
            return
        except DataError as error:
            fault = DataError(str(error).rpartition("DataError: ")[2].strip())
            # A frame of torch in the traceback refers to the iterator, which keeps the worker processes running.
            error.__traceback__ = None
        else:
            yield item
    del items  # outside the except block, which refers to the error's frames
    raise fault


def _ignore_interrupts(_: int) -> None:
    """Ignore Ctrl-C in a worker process. The main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _common_mode(path: Path, facts: np.ndarray, alpha: str, notes: list[str]) -> str:
    """Return the mode of Pillow that every picture is converted to."""
    with_alpha = np.char.endswith(facts["mode"], "A")
    grey = np.char.startswith(facts["mode"], "L")
    if not grey.all() and grey.any():
        notes.append(f"{grey.sum()} of {len(facts)} pictures are grey; all are converted to RGB")
    mode = "L" if grey.all() else "RGB"
    if alpha == "keep":
        if not with_alpha.any():
            raise DataError(
                f"data: {path}: alpha: got 'keep', but no picture has an alpha channel; omit alpha (--alpha)"
            )
        return f"{mode}A"
    transparent = int(facts["transparent"].sum())
    if transparent:
        notes.append(
            f"{transparent} of {len(facts)} pictures are transparent and composed on black (alpha='keep' keeps transparency)"
        )
    return mode


def _digest(path: Path, files: list[Path], facts: np.ndarray) -> str:
    """Return a checksum of the files' names and contents."""
    total = hashlib.sha256()
    for file, checksum in zip(files, facts["sha256"], strict=True):
        total.update(str(file.relative_to(path)).encode(errors="surrogateescape") + b"\0" + checksum)
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------- messages


def _note_enlarged(small: int, n: int, size: int, notes: list[str]) -> None:
    if small:
        notes.append(f"{small} of {n} images are smaller than {size} pixels; they are enlarged")


def _note_dark(largest: float, notes: list[str]) -> None:
    """Add a note if images are dark. `largest` is a share of the full range; NaN if no image has more than 8 bits."""
    if largest < DARK:
        notes.append(
            f"integers of more than 8 bits are scaled by their full range, but use only {100 * largest:.2g} % of it, so that "
            "images are dark; scale them yourself, or state the largest value in the file"
        )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (f", ... ({len(names)})" if len(names) > MAX_LISTED else "")


def _summary(others: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(MAX_LISTED))
