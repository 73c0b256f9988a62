"""Warnings that point at the caller of this package, each given once."""

from __future__ import annotations

import sys
import warnings
import weakref

_warned: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(model: object, message: str) -> None:
    """Warn once for each model and message, at the caller's line. Pass a class as model to warn once for each process."""
    try:
        earlier = _warned.setdefault(model, set())
    except TypeError:  # some callables take no weak reference
        earlier = set()
    if message not in earlier:
        earlier.add(message)
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastddpm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"fastddpm: {message}", stacklevel=level)
