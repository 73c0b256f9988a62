"""Arrays stored as a folder of .npy files, each written atomically, so that an interrupted computation can go on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..data import NUMPY_LOAD_ERRORS
from ..errors import EvaluationError
from ..utils.files import atomic_write
from ..utils.progress import bar as progress_bar

ITEMS_PER_READ = 1000


class Shards:
    """Items 0, 1, 2, ... of one array, in the .npy files of a folder; a file's name has the numbers of its first and last item.

    Each file is written atomically. Files whose names begin with a dot are unfinished, and are ignored.

    Args:
        folder: the folder; it is created when the first file is written.
        item_shape: the shape of one item.
        dtype: the items' dtype.

    Raises:
        EvaluationError: a file holds other items or is truncated; the message names it.
    """

    NAME = re.compile(r"(\d{8,})-(\d{8,})\.npy")

    def __init__(self, folder: str | Path, item_shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        self.folder, self.item_shape, self.dtype = Path(folder), tuple(item_shape), np.dtype(dtype)
        paths = [p for p in self.folder.iterdir() if not p.name.startswith(".")] if self.folder.is_dir() else []
        self.files = {self._span(path): path for path in sorted(paths)}
        for span, following in itertools.pairwise(self._spans()):
            if following.start < span.stop:
                raise EvaluationError(
                    f"{self.files[following]}: item {following.start} is in {self.files[span].name} too; delete one of them"
                )

    def _span(self, path: Path) -> range:
        """Return the numbers of a file's items, from its name; check its header without reading the items."""
        match = self.NAME.fullmatch(path.name)
        if match is None:
            raise EvaluationError(f"{path}: not written by an evaluation; move it away, or name another folder")
        span = range(int(match[1]), int(match[2]) + 1)
        try:
            items = np.load(path, mmap_mode="r")
            if not isinstance(items, np.ndarray):
                raise ValueError("an archive")
        except NUMPY_LOAD_ERRORS as error:
            raise EvaluationError(f"{path}: not a whole .npy file ({error}); delete it, and it is made anew") from error
        if items.shape != (len(span), *self.item_shape) or items.dtype != self.dtype:
            raise EvaluationError(
                f"{path}: holds {items.dtype} {list(items.shape)}; expected {self.dtype} {[len(span), *self.item_shape]}; "
                "delete it, and it is made anew"
            )
        return span

    def _spans(self) -> list[range]:
        return sorted(self.files, key=lambda span: span.start)

    def missing(self, n: int, size: int) -> list[range]:
        """Return the spans below n that are in no file. They end at multiples of `size`, as in an uninterrupted run."""
        start, spans = 0, []
        for span in [*self._spans(), range(n, n)]:
            while start < min(span.start, n):
                stop = min(start - start % size + size, span.start, n)
                spans.append(range(start, stop))
                start = stop
            start = max(start, span.stop)
        return spans

    def _path(self, span: range) -> Path:
        return self.folder / f"{span.start:08d}-{span.stop - 1:08d}.npy"

    def write(self, span: range, items: np.ndarray) -> None:
        """Write one file with the items of `span`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(span)
        with atomic_write(path) as temporary:
            np.save(temporary, np.ascontiguousarray(items, self.dtype))
        self.files[self._span(path)] = path

    def load(self, span: range) -> np.ndarray:
        """Return the items of `span`, [len(span), *item_shape]; all of them must have been written."""
        parts = []
        for stored in self._spans():
            start, stop = max(stored.start, span.start), min(stored.stop, span.stop)
            if start < stop:
                parts.append(np.load(self.files[stored], mmap_mode="r")[start - stored.start : stop - stored.start])
        return np.concatenate(parts)

    def batches(self, n: int) -> Iterator[np.ndarray]:
        """Return items 0..n-1 in order, at most ITEMS_PER_READ at a time."""
        return (self.load(range(start, min(start + ITEMS_PER_READ, n))) for start in range(0, n, ITEMS_PER_READ))

    def fill(
        self, n: int, size: int, compute: Callable[[range], np.ndarray], progress: bool | None, description: str
    ) -> None:
        """Compute and write the items below n that are missing, `size` to a file; one item belongs to each image.

        A file that another process has written in the meantime is used. `description` is the progress bar's.
        """
        missing = self.missing(n, size)
        done = n - sum(map(len, missing))
        with progress_bar(
            progress, total=n, initial=done, desc=description, unit="image", leave=progress is True
        ) as bar:
            for span in missing:
                path = self._path(span)
                if path.is_file():
                    self.files[self._span(path)] = path
                else:
                    self.write(span, compute(span))
                bar.update(len(span))


def load_arrays(path: Path, *members: object) -> list[np.ndarray]:
    """Load these members of a .npz file, or with `...` the array of a .npy file; raise EvaluationError if they are damaged."""
    try:
        loaded = np.load(path)
        return [loaded[member] for member in members]
    except (IndexError, *NUMPY_LOAD_ERRORS) as error:  # IndexError: the file holds an array in place of members
        raise EvaluationError(f"{path}: not readable ({error}); delete it, and it is made anew") from error
