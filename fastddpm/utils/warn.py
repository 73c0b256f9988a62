"""Warnings that point at the caller of this package, each given once."""

from __future__ import annotations

import sys
import warnings
import weakref

_warned: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: object, message: str) -> None:
    """Warn once per (model, message), pointing at the caller's line. Pass a class as model to warn once per process."""
    try:
        earlier = _warned.setdefault(model, set())
    except TypeError:  # some callables do not support weak references
        earlier = set()
    if message not in earlier:
        earlier.add(message)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddpm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"fastddpm: {message}", stacklevel=level)
