"""One engine per model, kept between calls as long as nothing that it was made from has changed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .. import backend
from ..inputs.adopt import unwrapped, why_not
from ..models.config import UNetConfig
from ..models.unet import (
    UNet,
)
from . import graphs
from .runner import SLOWER, CopyError, Engine, Plain, changed_layers

SIMPLE = (bool, int, float, str, tuple, types.NoneType, UNetConfig)


def structure(model: UNet) -> list[tuple]:
    """What a UNet of unchanged layers is besides its tensors."""
    return [
        (name, type(module), {k: repr(v) for k, v in vars(module).items() if k != "training" and isinstance(v, SIMPLE)})
        for name, module in model.named_modules()
    ]


def fingerprint(tensors: list[torch.Tensor]) -> tuple:
    """Equal for equal tensors in the same place, and only for these: the last part is a checksum of all values.

    `_version` alone misses what is written through .data, NumPy or a fused optimiser.
    """
    places = [
        (v.data_ptr(), None if v.is_inference() else v._version, v.dtype, v.shape, v.stride(), v.device)
        for v in tensors
    ]
    on_host = [v for v in tensors if v.device.type == "cpu"]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter
        digests = list(pool.map(_digest, on_host))
    sums = [_sum(v) for v in tensors if v.device.type != "cpu"]
    return places, digests, torch.stack(sums).tolist() if sums else []  # one wait for the device


def _bits(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The elements of v [...] in the order of memory, as integers of `dtype`; a copy only where v has gaps."""
    by_stride = sorted(range(v.dim()), key=lambda d: -v.stride(d))
    return v.detach().permute(by_stride).contiguous().flatten().view(dtype)


def _digest(v: torch.Tensor) -> bytes:
    return hashlib.sha256(_bits(v, torch.uint8).numpy()).digest()


def _sum(v: torch.Tensor) -> torch.Tensor:
    """A checksum where v is, int64 []: the sum of all elements' bits, each mixed with its index one to one (as splitmix64 does).

    So a change of one element always shows; any other one, such as two that change places, but for 1 in 2^64.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[v.element_size()]

    def folded(w: torch.Tensor, shift: int) -> torch.Tensor:
        # The mask makes it a shift of unsigned numbers: w and ~w must not become the same.
        return w.bitwise_xor_((w >> shift).bitwise_and_((1 << 64 - shift) - 1))

    w = torch.arange(1, v.numel() + 1, device=v.device).mul_(-0x61C8864680B583EB).add_(_bits(v, integer))
    w = folded(w, 30).mul_(-0x40A7B892E31B1A47)
    w = folded(w, 27).mul_(-0x6B2FB644ECCEEE15)
    return folded(w, 31).sum()


def _settings(device: torch.device, dtype: torch.dtype) -> tuple:
    """What else packed weights and captured kernels depend on."""
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    return (
        torch.get_num_threads(),
        {backend.select(device, kind) for kind in (dtype, torch.float32)},
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        os.environ.get("FASTDDPM_AUTOTUNE"),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
        matmul.fp32_precision if hasattr(matmul, "fp32_precision") else matmul.allow_tf32,
    )


class _Kept:
    """A model's lock, for a whole chain at a time, and its latest engine."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # again from the same thread: a callback that samples
        self.busy = False
        self.engine: Engine | None = None
        self.key: tuple | None = None


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()
_keeping = threading.Lock()


@contextlib.contextmanager
def network(
    model: nn.Module | Callable, device: torch.device, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> Iterator[Plain]:
    """The model ready for a loop over x of `shape` [N, C, H, W] on `device`, in `dtype`; default its own.

    The caller's module is never changed, its mode restored. Threads that use the same module take turns.
    """
    if not isinstance(model, nn.Module):
        if dtype is not None:
            raise ValueError(
                f"dtype: {dtype} was asked for, but a bare callable cannot be cast; cast it yourself and leave dtype"
            )
        yield Plain(model, device, torch.float32)
        return
    parameter = next(model.parameters(), None)
    own = torch.float32 if parameter is None else parameter.dtype
    dtype = own if dtype is None else dtype
    if dtype not in backend.DTYPES:
        whose = "the model's own" if dtype == own else "got"
        raise ValueError(f"dtype: {whose} {dtype}; expected float32, bfloat16 or float16: pass one as dtype=")
    moved = dtype != own or (parameter is not None and parameter.device != device)
    why = why_not(model)
    with _keeping:
        kept = _kept.setdefault(model, _Kept())
    with kept.lock, contextlib.ExitStack() as stack:
        if isinstance(model, UNet):
            try:
                engine = stack.enter_context(_engine(kept, model, device, dtype, shape))
            except CopyError as error:
                if moved:
                    raise ValueError(f"model: for {dtype} on {device} it must be copied, but {error}") from error
                why = f"the model cannot be copied ({error})"
            else:
                engine.lock = kept.lock
                yield engine
                return
        used = copy.deepcopy(model).to(device, dtype) if moved else model
        modes = [(module, module.training) for module in used.modules()]
        used.eval()
        try:
            if why is None:  # there is nothing that its results could be the same as
                said = (
                    f"{type(unwrapped(model)).__name__} is not a fastddpm.UNet, so it runs as it is, without the engine"
                )
            else:
                said = f"{why}, so it runs as it is. {SLOWER}"
            plain = Plain(used, device, dtype, said)
            if reason := backend.emulated_reason(device, dtype):
                plain.notices.append(backend.slow_module_warning(reason))
            plain.lock = kept.lock
            yield plain
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _engine(
    kept: _Kept, model: UNet, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> Iterator[Engine]:
    """The kept engine where it still is the model's; else a new one, kept where it can be told whether it still is.

    Not kept either: that of a model in training, which changes before the next call, and what a failed call leaves.
    """
    # By all names that they have: which tensors are tied belongs to what a model is.
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names, tensors = [name for name, _ in named], list({id(v): v for _, v in named}.values())
    ties = [id(v) for _, v in named]
    why = None
    if torch.is_autocast_enabled(device.type):
        why = "torch.autocast is on"
    elif any(type(v) not in (nn.Parameter, torch.Tensor) or v.device != tensors[0].device for v in tensors):
        why = "its parameters are not plain tensors on one device"
    elif any(v.layout != torch.strided or v.is_complex() or v.is_neg() for v in tensors):
        why = "some of its buffers are sparse or complex"
    if kept.busy or why or changed_layers(model):
        engine = Engine(model, device, dtype)
        engine.captured = False
        if why and graphs.usable(device):
            engine.notices.append(f"steps are not captured as a CUDA graph, as {why}. {SLOWER}")
        yield engine
        return
    key = device, dtype, shape, _settings(device, dtype), structure(model), names, ties, fingerprint(tensors)
    if kept.key != key:
        kept.engine = kept.key = None  # its memory goes before a new one's comes
        kept.engine = Engine(model, device, dtype)
        kept.key = key
    kept.busy = True
    try:
        yield kept.engine
    except BaseException:
        kept.engine = kept.key = None
        raise
    finally:
        kept.busy = False
        if model.training:
            kept.engine = kept.key = None
