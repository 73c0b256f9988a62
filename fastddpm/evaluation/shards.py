"""Arrays of images or figures kept on a disk in parts, each whole or not at all, so that what is interrupted goes on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..data import UNREADABLE
from ..errors import EvaluationError
from ..utils.files import whole
from ..utils.progress import bar as progress_bar

LOT = 1000  # rows read at a time


class Shards:
    """Rows 0, 1, 2, ... of one array, in the .npy files of a folder; a file's name holds the numbers of its first and last row.

    Each file is written whole. Names that begin with a dot are unfinished writing, and are passed over.
    """

    NAME = re.compile(r"(\d{8,})-(\d{8,})\.npy")

    def __init__(self, folder: str | Path, row: tuple[int, ...], dtype: np.dtype | type) -> None:
        """row: the shape of one row. Raises EvaluationError naming a file that is not such rows, or is cut short."""
        self.folder, self.row, self.dtype = Path(folder), tuple(row), np.dtype(dtype)
        found = [p for p in self.folder.iterdir() if not p.name.startswith(".")] if self.folder.is_dir() else []
        self.files = {self._span(path): path for path in sorted(found)}
        for span, after in itertools.pairwise(self._spans()):
            if after.start < span.stop:
                raise EvaluationError(
                    f"{self.files[after]}: row {after.start} is in {self.files[span].name} too; delete one of them"
                )

    def _span(self, path: Path) -> range:
        match = self.NAME.fullmatch(path.name)
        if match is None:
            raise EvaluationError(f"{path}: not written by an evaluation; move it away, or name another folder")
        span = range(int(match[1]), int(match[2]) + 1)
        try:
            rows = np.load(path, mmap_mode="r")  # a file that is cut short is noticed, and nothing read yet
            if not isinstance(rows, np.ndarray):
                raise ValueError("an archive")
        except UNREADABLE as error:
            raise EvaluationError(f"{path}: not a whole .npy file ({error}); delete it, and it is made anew") from error
        if rows.shape != (len(span), *self.row) or rows.dtype != self.dtype:
            raise EvaluationError(
                f"{path}: holds {rows.dtype} {list(rows.shape)}; expected {self.dtype} {[len(span), *self.row]}; "
                "delete it, and it is made anew"
            )
        return span

    def _spans(self) -> list[range]:
        return sorted(self.files, key=lambda span: span.start)

    def missing(self, n: int, size: int) -> list[range]:
        """Rows below n that are in no file, in runs that end at multiples of `size`: as an unbroken run would cut them."""
        at, runs = 0, []
        for span in [*self._spans(), range(n, n)]:
            while at < min(span.start, n):
                stop = min(at - at % size + size, span.start, n)
                runs.append(range(at, stop))
                at = stop
            at = max(at, span.stop)
        return runs

    def _path(self, span: range) -> Path:
        return self.folder / f"{span.start:08d}-{span.stop - 1:08d}.npy"

    def write(self, span: range, rows: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(span)
        with whole(path) as aside:
            np.save(aside, np.ascontiguousarray(rows, self.dtype))
        self.files[self._span(path)] = path

    def rows(self, wanted: range) -> np.ndarray:
        """[len(wanted), *row], all of which there must be."""
        parts = []
        for span in self._spans():
            first, stop = max(span.start, wanted.start), min(span.stop, wanted.stop)
            if first < stop:
                parts.append(np.load(self.files[span], mmap_mode="r")[first - span.start : stop - span.start])
        return np.concatenate(parts)

    def lots(self, n: int) -> Iterator[np.ndarray]:
        """Rows 0..n-1 in order, at most LOT at a time."""
        return (self.rows(range(first, min(first + LOT, n))) for first in range(0, n, LOT))

    def fill(self, n: int, size: int, make: Callable[[range], np.ndarray], progress: bool | None, what: str) -> None:
        """Make and write the rows below n that are missing, one for each image; `what` names the bar.

        A run that another process has written meanwhile is taken as it is.
        """
        runs = self.missing(n, size)
        done = n - sum(map(len, runs))
        with progress_bar(progress, total=n, initial=done, desc=what, unit="image", leave=progress is True) as bar:
            for span in runs:
                path = self._path(span)
                if path.is_file():
                    self.files[self._span(path)] = path
                else:
                    self.write(span, make(span))
                bar.update(len(span))
