"""Arrays stored as folders of .npy files, each written atomically, so that an interrupted computation can continue."""

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
    """Items 0, 1, 2, ... of one array, stored in the .npy files of a folder.

    The name of a file has the numbers of its first and last item. Each file is written atomically. A name that begins with a
    dot is an unfinished file's; such files are ignored.

    Args:
        folder: the folder, created when the first file is written.
        item_shape: shape of one item.
        dtype: dtype of the items.

    Raises:
        EvaluationError: a file has other items or is truncated. The message names the file.
    """

    NAME = re.compile(r"(\d{8,})-(\d{8,})\.npy")

    def __init__(self, folder: str | Path, item_shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        self.folder, self.item_shape, self.dtype = Path(folder), tuple(item_shape), np.dtype(dtype)
        paths = [p for p in self.folder.iterdir() if not p.name.startswith(".")] if self.folder.is_dir() else []
        self.files = {self._span(path): path for path in sorted(paths)}
        for span, following in itertools.pairwise(self._spans()):
            if following.start < span.stop:
                raise EvaluationError(
                    f"{self.files[following]}: item {following.start} is also in {self.files[span].name}; delete one of them"
                )

    def _span(self, path: Path) -> range:
        """Return the numbers of a file's items, from its name. Check the header without reading the items."""
        match = self.NAME.fullmatch(path.name)
        if match is None:
            raise EvaluationError(f"{path}: not written by an evaluation; move it away, or pass another folder")
        span = range(int(match[1]), int(match[2]) + 1)
        try:
            items = np.load(path, mmap_mode="r")
            if not isinstance(items, np.ndarray):
                raise ValueError("an archive")
        except NUMPY_LOAD_ERRORS as error:
            raise EvaluationError(
                f"{path}: not a complete .npy file ({error}); delete it, and it is computed again"
            ) from error
        if items.shape != (len(span), *self.item_shape) or items.dtype != self.dtype:
            raise EvaluationError(
                f"{path}: holds {items.dtype} {list(items.shape)}; expected {self.dtype} {[len(span), *self.item_shape]}; "
                "delete it, and it is computed again"
            )
        return span

    def _spans(self) -> list[range]:
        return sorted(self.files, key=lambda span: span.start)

    def missing(self, n: int, size: int) -> list[range]:
        """Return the spans of items below n that are in no file. Spans end at multiples of `size`, as without interruption."""
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
        """Yield items 0..n-1 in order, at most ITEMS_PER_READ at a time."""
        return (self.load(range(start, min(start + ITEMS_PER_READ, n))) for start in range(0, n, ITEMS_PER_READ))

    def fill(
        self, n: int, size: int, compute: Callable[[range], np.ndarray], progress: bool | None, description: str
    ) -> None:
        """Compute and write the missing items of 0..n-1, `size` to a file.

        Item i belongs to image i. Files that another process writes in the meantime are used.

        Args:
            n: number of items.
            size: number of items in one file.
            compute: function from a span to its items.
            progress: whether to show a progress bar; None shows it on a terminal or in a notebook.
            description: text of the progress bar.
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
    """Return members of a .npz file, or the array of a .npy file for `...`; raise EvaluationError if the file is damaged."""
    try:
        loaded = np.load(path)
        return [loaded[member] for member in members]
    except (IndexError, *NUMPY_LOAD_ERRORS) as error:  # IndexError: the file has an array instead of members
        raise EvaluationError(f"{path}: not readable ({error}); delete it, and it is computed again") from error
