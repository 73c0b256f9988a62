"""Retain freed memory in the process while a chain runs on a CPU, in the main thread.

Every step allocates and frees the same tensors. By default glibc returns freed memory to the system, and the next step incurs a
page fault for each 4 KiB: an eighth of a float32 step of the CIFAR-10 network at batch size 16. Other threads allocate from heaps
of at most 64 MiB, which these settings do not affect.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
RETAIN = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}  # allocate everything from the heap, and never shrink it
# glibc adapts both thresholds only until either is set. These are the largest values that it adapts them to.
GLIBC_DEFAULTS = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}

_lock = threading.Lock()
_users = 0


def _adjustable() -> bool:
    """Return whether malloc is glibc's, and not tuned by environment variables."""
    tuned = [name for name in os.environ if name.startswith("MALLOC_")]
    return platform.libc_ver()[0] == "glibc" and not tuned and "malloc" not in os.environ.get("GLIBC_TUNABLES", "")


def _adjust(settings: dict[int, int]) -> None:
    for parameter, value in settings.items():
        ctypes.CDLL(None).mallopt(parameter, value)


@contextlib.contextmanager
def retain_freed_memory(device: torch.device) -> Iterator[None]:
    """Retain freed memory in the process inside the block if `device` is a CPU, and release it on exit.

    This does nothing in other threads than the main one, and unless malloc is an untuned glibc's.
    """
    global _users
    main = threading.current_thread() is threading.main_thread()
    if device.type != "cpu" or not main or not _adjustable():
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _adjust(RETAIN)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _adjust(GLIBC_DEFAULTS)
                ctypes.CDLL(None).malloc_trim(0)
