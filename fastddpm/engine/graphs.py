"""A chain's steps as CUDA graphs, and cuDNN's settings while a chain runs.

One launch of a graph runs hundreds of kernels, which the host could not launch one by one fast enough.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch

_capturing = threading.Lock()  # one capture at a time in the process
_failed: list[object] = []  # never destroyed, as torch's allocator may still refer to them
_cudnn = threading.Lock()
_users = 0
_undo: Callable[[], None]


class CaptureError(RuntimeError):
    """The steps cannot be captured. The message gives the reason."""


def usable(device: torch.device) -> bool:
    return device.type == "cuda"


def capture(step: Callable[[], None], counts: tuple[int, ...], device: torch.device) -> dict[int, torch.cuda.CUDAGraph]:
    """Capture `step` as CUDA graphs: for each count, a graph of that number of calls. All share one memory pool.

    `step` may only use memory with fixed addresses. It is first called once without a capture, which loads the kernels and lets
    cuDNN choose its algorithms. An error of this call is raised unchanged. Raises CaptureError if the capture fails.
    """
    with _capturing:
        # A new stream on this device: torch.cuda.graph's default stream belongs to the first device that captured. A new one per
        # capture: torch gives cuBLAS one workspace per stream, and graphs that share one cannot be replayed concurrently.
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
        with torch.cuda.stream(stream):  # set around the captures too, as a failed one leaves its own stream current
            try:
                for count in counts:
                    graphs[count] = torch.cuda.CUDAGraph()
                    # thread_local, so that other threads may allocate memory during the capture.
                    with torch.cuda.graph(graphs[count], pool=pool, stream=stream, capture_error_mode="thread_local"):
                        for _ in range(count):
                            step()
            except BaseException as error:  # also errors of other types, such as Triton's
                _failed.append(graphs)
                if not isinstance(error, RuntimeError):
                    raise
                raise CaptureError(str(error).partition("\n")[0]) from error
        here.wait_stream(stream)
    return graphs


@contextlib.contextmanager
def cudnn_for(device: torch.device) -> Iterator[None]:
    """Make cuDNN deterministic, without TF32, inside the block, and let it time its algorithms.

    FASTDDPM_AUTOTUNE=0 disables the timing. By default cuDNN adds with atomics in some convolutions, and rounds float32 inputs
    to TF32's 11 bits. These settings are global to the process: the last chain to end restores them.
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
    """Apply the settings of `cudnn_for`. Return a function that restores the previous ones."""
    cudnn, changed = torch.backends.cudnn, []

    def change(owner: object, name: str, value: object) -> None:
        before = getattr(owner, name)
        if before != value:
            setattr(owner, name, value)
            changed.append((owner, name, before))

    try:
        change(cudnn, "allow_tf32", False)
    except RuntimeError:  # user code has set torch 2.9's new switches, which exclude the old ones
        change(cudnn.conv, "fp32_precision", "ieee")
    change(cudnn, "deterministic", True)
    change(cudnn, "benchmark", os.environ.get("FASTDDPM_AUTOTUNE", "1") != "0")

    def undo() -> None:
        for owner, name, before in changed:
            setattr(owner, name, before)

    return undo
