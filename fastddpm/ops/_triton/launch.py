"""What every launch shares."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch

# Every product and sum is rounded by itself, and fused only where the source says tl.fma: an element's arithmetic must
# not depend on what the compiler finds beside it.
OPTIONS = {"enable_fp_fusion": False}


RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, which torch has loaded; None on a GPU of another make."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _exchange_mode(mode: ctypes.c_int) -> None:
    """Swap `mode` with what this thread may do while any stream is being captured."""
    if _driver() is not None and (error := _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))):
        raise RuntimeError(f"cuThreadExchangeStreamCaptureMode: CUDA error {error}")


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Inside the block Triton launches on `device`, and may load kernels though a stream is being captured.

    It launches on the current GPU, whichever the tensors are on. A kernel's first launch loads it, which the driver refuses
    during a capture unless the thread says that it doesn't mind: as DeviceScope does for the CUDA kernels.
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
    """Whether offsets within so many elements don't fit an int32."""
    return elements >= 1 << 31


# Triton's own of these two take microseconds on the host.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()
