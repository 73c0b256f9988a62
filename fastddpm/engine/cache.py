"""A cache of one engine per model, valid until anything that the engine was made from changes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import threading
import types
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .. import backend
from ..inputs.resolve import ResolvedModel
from ..models.config import UNetConfig
from ..models.unet import UNet
from . import graphs
from .runner import SAME_RESULTS, CopyError, EngineRunner, Runner, changed_layers


@dataclasses.dataclass(eq=False)
class CacheEntry:
    """A runner, and the chain that the loop has captured with it."""

    runner: Runner
    chain: object | None = None


class _ModelCache:
    """A model's latest entry, and its lock, which a thread holds for a whole chain."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # reentrant, as a callback may sample with the same model
        self.in_use = False
        self.key: tuple | None = None
        self.entry: CacheEntry | None = None

    def clear(self) -> None:
        self.key = self.entry = None


_caches: weakref.WeakKeyDictionary[nn.Module, _ModelCache] = weakref.WeakKeyDictionary()
_caches_lock = threading.Lock()


@contextlib.contextmanager
def acquire_runner(
    model: ResolvedModel, device: torch.device, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> Iterator[CacheEntry]:
    """Yield an entry with a runner for x of `shape` [N, C, H, W] on `device`, in `dtype` (default: the model's own).

    The caller's module is unchanged on exit, and its mode restored. Threads that use the same module run one after another.
    """
    network = model.network
    if not isinstance(network, nn.Module):
        if dtype is not None:
            raise ValueError(
                f"dtype: got {dtype}; expected None for a bare callable, which cannot be cast: cast its network yourself"
            )
        yield CacheEntry(Runner(network, device, torch.float32))
        return
    parameter = next(network.parameters(), None)
    own = torch.float32 if parameter is None else parameter.dtype
    dtype = own if dtype is None else dtype
    if dtype not in backend.DTYPES:
        source = "the model's own" if dtype == own else "got"
        raise ValueError(f"dtype: {source} {dtype}; expected float32, bfloat16 or float16: pass one as dtype=")
    moves = dtype != own or (parameter is not None and parameter.device != device)
    with _caches_lock:
        cache = _caches.setdefault(network, _ModelCache())
    with cache.lock, contextlib.ExitStack() as stack:
        unsupported = model.unsupported_reason
        if unsupported is None:
            try:
                entry = stack.enter_context(_engine_entry(cache, network, device, dtype, shape))
            except CopyError as error:
                if moves:
                    raise ValueError(f"model: for {dtype} on {device} it must be copied, but {error}") from error
                unsupported = f"the model cannot be copied ({error}), so it runs unmodified. {SAME_RESULTS}"
            else:
                yield entry
                return
        warnings = [unsupported]
        if reason := backend.emulated_reason(device, dtype):
            warnings.append(backend.slow_module_warning(reason))
        with _in_eval_mode(copy.deepcopy(network).to(device, dtype) if moves else network) as module:
            yield CacheEntry(Runner(module, device, dtype, warnings=warnings, lock=cache.lock))


@contextlib.contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[nn.Module]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _engine_entry(
    cache: _ModelCache, model: UNet, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> Iterator[CacheEntry]:
    """Yield the cached engine if the model is unchanged, otherwise a new one, cached if later changes can be detected.

    The engine of a model in training mode is not cached, as the model changes before the next call. Nor is that of a failed call.
    """
    # With all names of each tensor, as the key must contain which tensors are tied.
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = list({id(v): v for _, v in named}.values())
    reason = _uncacheable_reason(tensors, device)
    if cache.in_use or reason or changed_layers(model):
        warnings = []
        if reason and graphs.usable(device):
            warnings.append(f"steps are not captured as a CUDA graph, as {reason}. {SAME_RESULTS}")
        yield CacheEntry(EngineRunner(model, device, dtype, warnings=warnings, lock=cache.lock, capturable=False))
        return
    names, ties = [name for name, _ in named], [id(v) for _, v in named]
    key = device, dtype, shape, settings_key(device, dtype), structure_key(model), names, ties, weights_key(tensors)
    if cache.key != key:
        cache.clear()  # frees the old engine's memory before a new one is made
        cache.entry = CacheEntry(EngineRunner(model, device, dtype, lock=cache.lock))
        cache.key = key
    cache.in_use = True
    try:
        yield cache.entry
    except BaseException:
        cache.clear()
        raise
    finally:
        cache.in_use = False
        if model.training:
            cache.clear()


def _uncacheable_reason(tensors: list[torch.Tensor], device: torch.device) -> str | None:
    """Return why changes of these tensors cannot be detected, or None."""
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast is on"
    if any(type(v) not in (nn.Parameter, torch.Tensor) or v.device != tensors[0].device for v in tensors):
        return "its parameters are not plain tensors on one device"
    if any(v.layout != torch.strided or v.is_complex() or v.is_neg() for v in tensors):
        return "some of its buffers are sparse or complex"
    return None


# ------------------------------------------------------------------------------- the cache's key

SCALARS = (bool, int, float, str, tuple, types.NoneType, UNetConfig)


def structure_key(model: UNet) -> list[tuple]:
    """Return the types and scalar attributes of a UNet's modules, as the part of the key that is not tensors."""
    return [
        (
            name,
            type(module),
            {k: repr(v) for k, v in vars(module).items() if k != "training" and isinstance(v, SCALARS)},
        )
        for name, module in model.named_modules()
    ]


def weights_key(tensors: list[torch.Tensor]) -> tuple:
    """Return a key that is the same only for tensors with the same values at the same addresses.

    It contains a checksum of all values.

    `_version` alone misses writes through .data, NumPy or a fused optimiser.
    """
    places = [
        (v.data_ptr(), None if v.is_inference() else v._version, v.dtype, v.shape, v.stride(), v.device)
        for v in tensors
    ]
    on_host = [v for v in tensors if v.device.type == "cpu"]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the interpreter's lock
        digests = list(pool.map(_host_checksum, on_host))
    sums = [_device_checksum(v) for v in tensors if v.device.type != "cpu"]
    return places, digests, torch.stack(sums).tolist() if sums else []  # a single synchronisation


def _as_integers(v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements of v [...] in memory order, as integers of `dtype`. This copies v only if it has gaps."""
    by_stride = sorted(range(v.dim()), key=lambda d: -v.stride(d))
    return v.detach().permute(by_stride).contiguous().flatten().view(dtype)


def _host_checksum(v: torch.Tensor) -> bytes:
    return hashlib.sha256(_as_integers(v, torch.uint8).numpy()).digest()


def _device_checksum(v: torch.Tensor) -> torch.Tensor:
    """Return a checksum on v's device, int64 []: the sum over all elements of a bijective mix of bits and index (splitmix64).

    It detects every change of a single element. It misses any other change, such as a swap, with a probability of 2^-64.
    """
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[v.element_size()]

    def folded(w: torch.Tensor, shift: int) -> torch.Tensor:
        # The mask makes the shift unsigned, so that w and ~w do not collide.
        return w.bitwise_xor_((w >> shift).bitwise_and_((1 << 64 - shift) - 1))

    w = torch.arange(1, v.numel() + 1, device=v.device).mul_(-0x61C8864680B583EB).add_(_as_integers(v, integer))
    w = folded(w, 30).mul_(-0x40A7B892E31B1A47)
    w = folded(w, 27).mul_(-0x6B2FB644ECCEEE15)
    return folded(w, 31).sum()


def settings_key(device: torch.device, dtype: torch.dtype) -> tuple:
    """Return the global settings that packed weights and captured kernels depend on."""
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
