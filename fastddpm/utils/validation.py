"""Checks of arguments that several functions share, with messages that name the argument."""

from __future__ import annotations

import numpy as np
import torch


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: object, least: int) -> int:
    value = plain(value)
    if not is_int(value) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected an int >= {least}")
    return value


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(choices)}")
    return value


def bound_of(clip: bool | float) -> float | None:
    clip = plain(clip)
    if clip is True:
        return 1.0
    if clip is False:
        return None
    if not isinstance(clip, (int, float)) or not clip > 0:
        raise ValueError(f"clip: got {clip!r}; expected True, False or a positive bound")
    return float(clip)


LEAST_BYTE = 16  # images in 0..255 have a larger pixel; images in [-1, 1], and standardised ones of both signs, don't


def check_range(name: str, x: torch.Tensor) -> None:
    """Raise ValueError where x cannot be images in [-1, 1] because they are in 0..255."""
    if x.numel() and float(x.min()) >= 0 and float(x.max()) > LEAST_BYTE:
        raise ValueError(
            f"{name}: values from {float(x.min()):g} to {float(x.max()):g}; expected images in [-1, 1]: write x / 127.5 - 1"
        )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(value: object) -> object:
    """A number of NumPy's, or a tensor or array of no dimensions, as Python's own number; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    return value
