"""Warnings to who called this package, each given once."""

from __future__ import annotations

import sys
import warnings
import weakref

_notices: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: object, notice: str) -> None:
    """To who called this package, once for each model and notice. model: a class where it is once for each process."""
    try:
        told = _notices.setdefault(model, set())
    except TypeError:  # some callables cannot be remembered
        told = set()
    if notice not in told:
        told.add(notice)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddpm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"fastddpm: {notice}", stacklevel=level)
