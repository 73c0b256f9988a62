"""What every launch shares."""

import contextlib

import torch

# Every product and sum is rounded by itself, and fused only where the source says tl.fma: an element's arithmetic must
# not depend on what the compiler finds beside it.
OPTIONS = {"enable_fp_fusion": False}


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU, whichever the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def needs_int64(elements: int) -> bool:
    """Whether offsets within so many elements don't fit an int32."""
    return elements >= 1 << 31


# Triton's own of these two take microseconds on the host.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one, n itself included."""
    return 1 << (n - 1).bit_length()
