"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.

    key     = (seed low 32, seed high 32)
    counter = (e // 4, t, sample low 32, (sample high 32) xor (stream << 24))
    u_k     = (w_k + 1/2) 2^-32
    z       = (r01 cos 2 pi u1, r01 sin 2 pi u1, r23 cos 2 pi u3, r23 sin 2 pi u3),  r01 = sqrt(-2 ln u0), r23 = sqrt(-2 ln u2)

e is the element's index in the sample's C*H*W order, in every memory layout. t is below 2^20; the bits above are reserved. An
element's noise depends only on (seed, stream, t, sample, e), and not on the batch, the device, the process or the order of calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._register import register
from .rng import UINT64, Stream, as_int64_bits, check_first, check_seed

_MASK = 0xFFFFFFFF


def philox_words_ref(
    counter: Sequence[torch.Tensor | int], seed: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the four 32-bit words of Philox4x32-10, as int64 tensors of the counters' broadcast shape.

    `seed` is the int64 bit pattern of a seed in [0, 2^64), as an int or a 0-d int64 tensor.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64) for c in counter))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The 64-bit products may overflow into the sign bit. The masks still extract the right words.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def first_words(sample: torch.Tensor, *, seed: int, stream: Stream, t: int = 0) -> torch.Tensor:
    """Return word w0 of element 0 of each sample, int64 [N] in [0, 2^32). Timesteps, flips and dropout seeds use it."""
    high = ((sample >> 32) & _MASK) ^ (int(stream) << 24)
    zero = torch.zeros_like(sample)
    return philox_words_ref((zero, zero + t, sample & _MASK, high), as_int64_bits(seed))[0]


def normals_float64(
    elements: int, sample: torch.Tensor, t: torch.Tensor, seed: torch.Tensor | int, stream: int
) -> torch.Tensor:
    """Return float64 normals [N, elements]. sample is int64 [N]; t is int64 [N] or [1]."""
    quad = torch.arange((elements + 3) // 4, device=sample.device)
    high = ((sample >> 32) & _MASK) ^ (stream << 24)
    words = philox_words_ref((quad, t[:, None], (sample & _MASK)[:, None], high[:, None]), seed)
    u0, u1, u2, u3 = ((w.double() + 0.5) * 2.0**-32 for w in words)
    r01, r23 = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    a1, a3 = 2 * math.pi * u1, 2 * math.pi * u3
    z = torch.stack((r01 * a1.cos(), r01 * a1.sin(), r23 * a3.cos(), r23 * a3.sin()), dim=-1)
    return z.flatten(1)[:, :elements]


def _samples(n: int, first: int, sample: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    return torch.arange(first, first + n, device=device) if sample is None else sample


def _launch(kind, out, seed, stream, t, t_all, sample, first):
    if kind == "triton":
        from ._triton import philox_normal as triton_kernels

        triton_kernels.philox_normal(out, seed, stream, t, t_all, sample, first)
        return
    b, (n, *size) = backend.buffer, out.shape
    backend.native.philox_normal(
        b(out), n, math.prod(size), seed % UINT64, stream, b(t), t_all, b(sample), first,
        backend.launch_target(kind, out.device),
    )  # fmt: skip


def _implementation(
    shape: Sequence[int],
    seed: int,
    stream: int,
    t_all: int,
    t: torch.Tensor | None,
    first: int,
    sample: torch.Tensor | None,
    device: torch.device | None,
) -> torch.Tensor:
    device = torch.device("cpu") if device is None else device
    kind = backend.select(device)
    if kind != "reference":
        out = torch.empty(shape, dtype=torch.float32, device=device)
        _launch(kind, out, seed, stream, t, t_all, sample, first)
        return out
    t = torch.tensor([t_all], device=device) if t is None else t
    z = normals_float64(math.prod(shape[1:]), _samples(shape[0], first, sample, device), t, seed, stream)
    return z.float().reshape(shape)


def _fake(shape, seed, stream, t_all, t, first, sample, device):
    return torch.empty(shape, dtype=torch.float32, device="cpu" if device is None else device)


register(
    "philox_normal(SymInt[] shape, SymInt seed, int stream, SymInt t_all, Tensor? t, SymInt first, Tensor? sample, "
    "Device? device) -> Tensor",
    _implementation,
    _fake,
)


def _checked(shape, seed, t, stream, first, sample, device):
    shape = tuple(shape)
    if not shape or any(size < 0 for size in shape):
        raise ValueError(f"shape: got {shape}; expected [N, ...] with sizes >= 0")
    seed, first = check_seed(seed), check_first(first)
    if not 0 <= int(stream) < 256:
        raise ValueError(f"stream: got {stream!r}; expected an int in [0, 256)")
    if device is None:
        tensors = [v for v in (t, sample) if isinstance(v, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for name, value in (("t", t), ("sample", sample)):
        if isinstance(value, torch.Tensor):
            if value.dtype != torch.int64 or tuple(value.shape) != (shape[0],):
                raise ValueError(
                    f"{name}: got {dtype_name(value.dtype)} {list(value.shape)}; expected int64 [{shape[0]}]"
                )
            if value.device != device:
                raise ValueError(f"{name}: is on {value.device}, the noise is requested on {device}; move one of them")
    if not isinstance(t, torch.Tensor) and not 0 <= t < 1 << 20:
        raise ValueError(f"t: got {t}; expected an int in [0, 2^20)")
    return shape, seed, first, device


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    t: int | torch.Tensor,
    stream: int,
    first: int = 0,
    sample: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return standard normals from the counter-based generator Philox4x32-10 (Salmon et al. 2011) and Box-Muller.

        key     = (seed low 32, seed high 32)
        counter = (e // 4, t, sample low 32, (sample high 32) xor (stream << 24))
        u_k     = (w_k + 1/2) 2^-32        for the generator's words w_0..w_3
        z       = (r01 cos 2 pi u1, r01 sin 2 pi u1, r23 cos 2 pi u3, r23 sin 2 pi u3)
        r01     = sqrt(-2 ln u0),    r23 = sqrt(-2 ln u2)

    e is the element's index in its sample, in C*H*W order. An element depends only on (seed, stream, t, sample, e), and not on
    the batch, the device, the process or the order of calls.

    Args:
        shape: The shape [N, ...] of the result.
        seed: An int in [0, 2^64).
        t: The timestep: an int in [0, 2^20), or int64 [N] with one for each sample.
        stream: The purpose of the draw, an int in [0, 256); see `Stream`.
        first: The sample index of row 0, an int in [0, 2^56). Row i is sample first + i.
        sample: The sample index of each row, int64 [N]. Replaces first + i.
        device: The device of the result. Default: that of t or sample if one is a tensor, else the CPU.

    Returns:
        float32 `shape`, contiguous; each element is within 4e-6 of the formula in float64.

    Raises:
        ValueError: If an argument is out of range or has the wrong dtype, shape or device. The message names the argument.
        BackendError: If the requested backend does not support the device.
    """
    shape, seed, first, device = _checked(shape, seed, t, stream, first, sample, device)
    per_sample = t.contiguous() if isinstance(t, torch.Tensor) else None
    return torch.ops.fastddpm.philox_normal(
        shape,
        as_int64_bits(seed),
        int(stream),
        0 if per_sample is not None else t,
        per_sample,
        first,
        None if sample is None else sample.contiguous(),
        device,
    )


def philox_normal_ref(
    shape: Sequence[int],
    *,
    seed: int,
    t: int | torch.Tensor,
    stream: int,
    first: int = 0,
    sample: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return what `philox_normal` returns, computed in plain PyTorch: in float64, rounded once to float32.

    Args:
        shape: As in `philox_normal`.
        seed: As in `philox_normal`.
        t: As in `philox_normal`.
        stream: As in `philox_normal`.
        first: As in `philox_normal`.
        sample: As in `philox_normal`.
        device: As in `philox_normal`.

    Returns:
        float32 `shape`.

    Raises:
        ValueError: If an argument is out of range or has the wrong dtype, shape or device. The message names the argument.
    """
    shape, seed, first, device = _checked(shape, seed, t, stream, first, sample, device)
    t = t if isinstance(t, torch.Tensor) else torch.tensor([t], device=device)
    z = normals_float64(
        math.prod(shape[1:]), _samples(shape[0], first, sample, device), t, as_int64_bits(seed), int(stream)
    )
    return z.float().reshape(shape)
