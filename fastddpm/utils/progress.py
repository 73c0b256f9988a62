"""The progress bar that sampling and training share."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm

IN_NOTEBOOK = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)


def bar(progress: bool | None, **options: object) -> tqdm:
    """A tqdm bar; progress None shows it on a terminal and in a notebook (whose streams don't call themselves terminals)."""
    shown = progress if progress is not None else IN_NOTEBOOK or sys.stderr.isatty()
    return tqdm(disable=not shown, **options)
