"""Helpers for launching Triton kernels."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

# Products and sums are rounded separately, and fused only by an explicit tl.fma. An element's arithmetic must not depend on the
# code around it.
OPTIONS = {"enable_fp_fusion": False}


RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """Return NVIDIA's driver, which torch has loaded; None on another vendor's GPU."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _exchange_mode(mode: ctypes.c_int) -> None:
    """Swap `mode` and this thread's stream capture mode, which determines the calls that it may make during a capture."""
    if _driver() is not None and (error := _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: CUDA error {error}")


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Make Triton launch on `device` inside the block, and allow it to load kernels while a stream is being captured.

    Triton launches on the current GPU, even if the tensors are on another. A kernel's first launch loads it. The driver refuses
    this during a capture unless the thread's capture mode is relaxed. DeviceScope does the same for the CUDA kernels.
    """
    if device.type != "cuda":
        yield
        return
    mode = ctypes.c_int(RELAXED)
    with torch.cuda.device(device):
        _exchange_mode(mode)
        try:
            yield
        finally:
            _exchange_mode(mode)


def needs_int64(elements: int) -> bool:
    """Return whether offsets into this number of elements overflow an int32."""
    return elements >= 1 << 31


# Triton's versions of these two functions cost microseconds per call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()
