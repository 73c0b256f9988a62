"""The progress bar of sampling, training and evaluation."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm

IN_NOTEBOOK = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)


def bar(progress: bool | None, **options: object) -> tqdm:
    """Return a tqdm bar. With `progress` None, it shows on a terminal and in a notebook (whose streams are no terminal)."""
    shown = progress if progress is not None else IN_NOTEBOOK or sys.stderr.isatty()
    return tqdm(disable=not shown, **options)
