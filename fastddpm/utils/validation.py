"""Checks of arguments that several functions share, with messages that name the argument."""

from __future__ import annotations

import operator

import numpy as np
import torch


def as_python_number(value: object) -> object:
    """Return a NumPy scalar, or an array or tensor without dimensions, as a Python number; anything else unchanged."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    return value


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def as_int(value: object) -> int | None:
    """Return an integer of Python, NumPy or torch as an int; return None for anything else, including booleans."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return None
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_int(name: str, value: object, least: int, below: int | None = None, expected: str | None = None) -> int:
    """Return `value` as an int; raise ValueError unless least <= value < below."""
    number = as_int(value)
    if number is None or number < least or (below is not None and number >= below):
        raise ValueError(f"{name}: got {as_python_number(value)!r}; expected {expected or f'an int >= {least}'}")
    return number


def check_choice(name: str, value: str, choices: tuple[str, ...], error: type[Exception] = ValueError) -> str:
    if value not in choices:
        raise error(f"{name}: got {value!r}; expected one of {', '.join(choices)}")
    return value


def clip_bound(clip: bool | float) -> float | None:
    """Return the bound that `clip` specifies: 1 for True, None for False."""
    clip = as_python_number(clip)
    if clip is True:
        return 1.0
    if clip is False:
        return None
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: got {clip!r}; expected True, False or a positive bound")
    return float(clip)


# Images in 0..255 have a pixel above this value. Images in [-1, 1], and standardised images, have none.
LEAST_BYTE = 16


def check_range(name: str, x: torch.Tensor) -> None:
    """Raise ValueError if x has images in 0..255 instead of [-1, 1]."""
    if x.numel() and float(x.min()) >= 0 and float(x.max()) > LEAST_BYTE:
        raise ValueError(
            f"{name}: values from {float(x.min()):g} to {float(x.max()):g}; expected images in [-1, 1]: write x / 127.5 - 1"
        )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
