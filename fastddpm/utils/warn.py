"""Warnings that point at the caller of this package, each given once."""

from __future__ import annotations

import sys
import warnings
import weakref

_notices: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: object, notice: str) -> None:
    """Warn once for each model and notice, at the caller's line. Pass a class as model to warn once for each process."""
    try:
        given = _notices.setdefault(model, set())
    except TypeError:  # some callables take no weak reference
        given = set()
    if notice not in given:
        given.add(notice)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddpm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"fastddpm: {notice}", stacklevel=level)
