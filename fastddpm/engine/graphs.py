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
_failed: list[object] = []  # not to be destroyed: torch's allocator may still refer to them
_cudnn = threading.Lock()
_users = 0
_undo: Callable[[], None]


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
        # Streams of the device's own: the one that torch.cuda.graph makes belongs to whichever device came first. And of each
        # capture's own, as torch gives cuBLAS a workspace for each stream, and graphs that share one can't be replayed at once.
        here = torch.cuda.current_stream(device)
        warm, stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        warm.wait_stream(here)
        try:
            with torch.cuda.stream(warm):
                step()
        finally:
            here.wait_stream(warm)
        stream.wait_stream(warm)
        with torch.cuda.stream(stream):  # around the captures too: a failed one leaves its stream the current one
            try:
                for count in counts:
                    graphs[count] = torch.cuda.CUDAGraph()
                    # Other threads may allocate memory meanwhile, so errors are this thread's alone.
                    with torch.cuda.graph(graphs[count], pool=pool, stream=stream, capture_error_mode="thread_local"):
                        for _ in range(count):
                            step()
            except BaseException as error:  # also what is no RuntimeError, such as Triton's errors
                _failed.append(graphs)
                if not isinstance(error, RuntimeError):
                    raise
                raise CaptureError(str(error).partition("\n")[0]) from error
        here.wait_stream(stream)
    return graphs


@contextlib.contextmanager
def cudnn_for(device: torch.device) -> Iterator[None]:
    """Inside the block cuDNN times its algorithms (unless FASTDDPM_AUTOTUNE=0), takes only those that give the same bits each
    time, and multiplies float32 as float32.

    By itself it would add with atomics in some convolutions, and round inputs to TF32's 11 bits. These settings are the
    process's: the last chain to end undoes them.
    """
    global _users, _undo
    if device.type != "cuda":
        yield
        return
    with _cudnn:
        if not _users:
            _undo = _set()
        _users += 1
    try:
        yield
    finally:
        with _cudnn:
            _users -= 1
            if not _users:
                _undo()


def _set() -> Callable[[], None]:
    """Make the settings above; what is returned undoes them."""
    cudnn, changed = torch.backends.cudnn, []

    def change(owner: object, name: str, value: object) -> None:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            changed.append((owner, name, before))

    try:
        change(cudnn, "allow_tf32", False)
    except RuntimeError:  # somebody has used the switches that torch has since 2.9, and the two kinds don't mix
        change(cudnn.conv, "fp32_precision", "ieee")
    change(cudnn, "deterministic", True)
    change(cudnn, "benchmark", os.environ.get("FASTDDPM_AUTOTUNE", "1") != "0")

    def undo() -> None:
        for owner, name, before in changed:
            setattr(owner, name, before)

    return undo
