"""Steps of a chain as CUDA graphs, and what cuDNN is told while a chain runs.

One launch of a graph stands for hundreds of kernels, which the host would be too slow to launch one by one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch

_capturing = threading.Lock()  # one capture at a time in the process
_cudnn = threading.Lock()
_users = 0
_before: tuple | None = None


class CaptureError(RuntimeError):
    """The steps cannot be captured; the message says why."""


def usable(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(step: Callable[[], None], counts: tuple[int, ...], device: torch.device) -> dict[int, torch.cuda.CUDAGraph]:
    """For each count a graph of so many calls of `step`, all in one memory pool.

    `step` must find everything in memory that stays where it is. It is called once without a capture, to load kernels and
    let cuDNN choose its algorithms; what that raises is the step's own error. Raises CaptureError where the capture fails.
    """
    with _capturing:
        # A stream of the device's own: the one that torch.cuda.graph makes belongs to whichever device came first.
        stream, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(here)
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        with torch.cuda.stream(stream):  # around the captures too: a failed one leaves its stream the current one
            step()
            try:
                for count in counts:
                    graphs[count] = torch.cuda.CUDAGraph()
                    # Other threads may allocate memory meanwhile, so errors are this thread's alone.
                    with torch.cuda.graph(graphs[count], pool=pool, stream=stream, capture_error_mode="thread_local"):
                        for _ in range(count):
                            step()
            except RuntimeError as error:
                raise CaptureError(str(error).partition("\n")[0]) from error
        here.wait_stream(stream)
    return graphs


@contextlib.contextmanager
def cudnn_for(device: torch.device) -> Iterator[None]:
    """Inside the block cuDNN times its algorithms (unless FASTDDPM_AUTOTUNE=0) and multiplies float32 as float32.

    By itself it would round convolutions' inputs to TF32's 11 bits. These settings are the process's: the last chain to
    end puts them back.
    """
    global _users, _before
    if device.type != "cuda":
        yield
        return
    with _cudnn:
        if not _users:
            _before = torch.backends.cudnn.benchmark, *_precision()
            torch.backends.cudnn.benchmark = os.environ.get("FASTDDPM_AUTOTUNE", "1") != "0"
            _set_precision(None if _before[1] is None else False, None if _before[2] is None else "ieee")
        _users += 1
    try:
        yield
    finally:
        with _cudnn:
            _users -= 1
            if not _users:
                torch.backends.cudnn.benchmark = _before[0]
                _set_precision(*_before[1:])


def _precision() -> tuple[bool | None, str | None]:
    """cuDNN's old switch and, since torch 2.9, the new one. The old one raises where somebody has used the new: then None."""
    cudnn = torch.backends.cudnn
    try:
        old = cudnn.allow_tf32
    except RuntimeError:
        old = None
    return old, cudnn.conv.fp32_precision if hasattr(cudnn, "conv") else None


def _set_precision(old: bool | None, new: str | None) -> None:
    if old is not None:  # first, as it sets the new one too
        torch.backends.cudnn.allow_tf32 = old
    if new is not None:
        torch.backends.cudnn.conv.fp32_precision = new
