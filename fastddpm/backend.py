"""Selection of the backend that runs an op. This is the only file that imports the compiled module.

| name      | supports                        | requires                                           |
|-----------|---------------------------------|----------------------------------------------------|
| reference | any device, any floating dtype  | PyTorch only                                       |
| cpu       | CPU tensors                     | the compiled module                                |
| cuda      | CUDA tensors                    | the compiled module, built with nvcc               |
| triton    | CUDA tensors                    | Triton, as installed with torch                    |

cpu, cuda and triton support float32, bfloat16 and float16. If TRITON_INTERPRET=1 is set, triton runs on CPU tensors, for tests.

By default the tensor's device selects the backend: cuda, else triton, else reference for a CUDA tensor; cpu, else reference for a
CPU tensor. If CUDA kernels were built but fail a small test on the tensor's GPU, one warning reports why.
A backend requested with `use`, or with the environment variable FASTDDPM_BACKEND, is never replaced by another: if it does not
support a tensor, the op raises BackendError.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import warnings
from pathlib import Path

import torch  # imported before _C, because _C uses the OpenMP runtime that torch loads

from .errors import BackendError
from .utils.validation import dtype_name

__all__ = ["NAMES", "describe", "use"]
NAMES = ("reference", "cpu", "cuda", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_TRITON = (3, 6)


try:
    from . import _C as native
except ImportError as error:
    native = None
    _native_missing = str(error)


@functools.cache
def _native_missing_reason() -> str:
    """Return why the compiled module is missing: the reason that the build recorded, or else the import error."""
    note = Path(__file__).with_name("_build_info.json")
    if note.is_file():
        reason = json.loads(note.read_text(encoding="utf-8")).get("reason")
        if reason:
            return f"the native build did not succeed ({reason}); install a C++ compiler and run pip install again"
    return f"the compiled module fastddpm._C does not import ({_native_missing}); reinstall with a C++ compiler at hand"


# These facts do not change during a process, and every call of an op needs them. So each is determined once.
@functools.cache
def _gpu_unavailable_reason() -> str | None:
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


@functools.cache
def _cuda_kernels_unavailable_reason() -> str | None:
    build = native.build_info()
    if build["cuda"]:
        return None
    return f"the compiled module has no CUDA kernels: {build['cuda_reason']}"


@functools.cache
def _self_test_failure(device: int) -> str | None:
    """Return why a small test of the CUDA kernels failed on this GPU; None if it passed."""
    failure = native.cuda_self_test(device)
    archs = ", ".join(native.build_info()["cuda_archs"])
    return f"its kernels, built for {archs}, do not run on this GPU: {failure}" if failure else None


def _cuda_unavailable_reason(device: torch.device | None) -> str | None:
    if native is None:
        return _native_missing_reason()
    return _cuda_kernels_unavailable_reason() or _gpu_unavailable_reason() or _self_test_failure(_gpu_index(device))


def _interpreting() -> bool:
    """Return whether the Triton kernels run under Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton_unavailable_reason() -> str | None:
    version = _triton_version()
    if version is None:
        return "Triton is not installed; PyTorch's CUDA builds install it"
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}; torch 2.11 and newer install a newer one"
    return None if _interpreting() else _gpu_unavailable_reason() or _triton_start_failure()


@functools.cache
def _triton_start_failure() -> str | None:
    """Return why Triton does not start on this GPU; None if it does. On first use it compiles its driver with a C compiler."""
    try:
        import triton

        triton.runtime.driver.active.get_current_device()
    except Exception as error:  # torch, Triton, the compiler and the driver raise different kinds
        return f"Triton does not start: {str(error).partition(chr(10))[0]}"
    return None


def unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    """Return why the backend cannot run on this machine; None if it can. `device` is a GPU, by default the current one."""
    if name == "cpu":
        return None if native is not None else _native_missing_reason()
    if name == "cuda":
        return _cuda_unavailable_reason(device)
    if name == "triton":
        return _triton_unavailable_reason()
    return None


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: unknown name {name!r}; expected one of {', '.join(NAMES)}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise BackendError(f"backend {name!r} was requested, but {reason}")
    return name


_requested: str | None = None  # None: the tensor's device selects the backend
_environment_read = False


class use:
    """A choice of backend for the whole process.

    `use("cpu")` sets the backend at once. `with use("cpu"): ...` restores the previous choice at the end of the block.

    Args:
        name: "reference", "cpu", "cuda" or "triton". None lets the device of each tensor select the backend, which is the
            default.

    Raises:
        ValueError: If the name is unknown.
        BackendError: If the backend cannot run on this machine. The message gives the reason.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        _read_environment()
        self._previous = _requested
        _requested = None if name is None else _check(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _requested
        _requested = self._previous


def _read_environment() -> None:
    global _requested, _environment_read
    if not _environment_read:
        variant = os.environ.get("FASTDDPM_CPU_VARIANT")
        if variant:
            if native is None:
                raise BackendError(
                    f"FASTDDPM_CPU_VARIANT={variant} requires compiled kernels, but {_native_missing_reason()}; "
                    "or unset the variable"
                )
            try:
                native.cpu_variant()
            except RuntimeError as error:
                raise BackendError(f"{error}; choose one of these, or unset the variable") from error
        requested = os.environ.get("FASTDDPM_BACKEND")
        if requested:
            _requested = _check(requested)
        _environment_read = True


def unsupported_reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why backend `name` does not support tensors of this device and dtype; None if it does."""
    if name == "reference":
        return None
    served, kind = "cpu" if name == "cpu" or (name == "triton" and _interpreting()) else "cuda", device.type
    reason = unavailable_reason(name, device if served == kind else None)
    if reason is not None:
        return reason
    if kind != served:
        return f"it supports {served.upper()} tensors, and this one is on {device}"
    if dtype not in DTYPES:
        *most, last = (dtype_name(d) for d in DTYPES)
        return f"it supports {', '.join(most)} and {last}, and this tensor is {dtype_name(dtype)}"
    return None


@functools.cache
def _warn(name: str, reason: str) -> None:
    """Warn once that the backend is installed but does not work, and is skipped."""
    warnings.warn(f"fastddpm: the {name} backend is not used: {reason}", stacklevel=4)


def requested_backend() -> str | None:
    """Return the backend that the user requested; None if the tensor's device selects it."""
    _read_environment()
    return _requested


def select(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the backend for tensors of this device and dtype; raise BackendError if the requested one doesn't support them."""
    if not _environment_read:
        _read_environment()
    if _requested is not None:
        reason = unsupported_reason(_requested, device, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {_requested!r} was requested, but {reason}; move or cast the tensor, or choose another backend"
            )
        return _requested
    candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    for name in candidates:
        reason = unsupported_reason(name, device, dtype)
        if reason is None:
            return name
        if name != "cpu" and not _gpu_unavailable_reason() and dtype in DTYPES:
            if name == "cuda":
                installed = native is not None and not _cuda_kernels_unavailable_reason()
            else:
                installed = _triton_version() is not None
            if installed:
                _warn(name, reason)
    return "reference"


def emulated_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the device does not multiply tensors of `dtype` in hardware; None if it does.

    Without hardware support, torch and oneDNN emulate the products on a CPU, 3 to 100 times slower than in float32. On a GPU
    cuDNN then has no convolutions, and torch falls back to its own.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    name = dtype_name(dtype)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if dtype == torch.float16 or major >= 8:
            return None
        return f"this GPU, of compute capability {major}.{minor}, multiplies float16 in hardware and not {name}"
    if device.type != "cpu":
        return None
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return f"oneDNN, which multiplies {name}, is not built into PyTorch or is disabled"
    limits = {
        key: value for key in _ONEDNN_LIMITS if (value := os.environ.get(key, "").upper()) not in ("", "ALL", "DEFAULT")
    }
    absent = f"this processor does not multiply {name} in hardware"
    if limits:
        absent += " under " + " ".join(f"{key}={value}" for key, value in limits.items())
    query = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    if not (hasattr(torch.ops.mkldnn, query) and getattr(torch.ops.mkldnn, query)()):
        return absent
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    # oneDNN also accepts bfloat16 on AVX-512 without bfloat16 instructions, and then emulates the products. Every x86
    # processor with instructions for either dtype, AMX included, has AVX512_BF16. A limit set for oneDNN can disable them.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    within = all(any(kind in value for kind in ("BF16", "FP16", "AMX", "AVX10")) for value in limits.values())
    return None if supported is not None and supported() and within else absent


_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def slow_module_warning(reason: str) -> str:
    """Return the warning for a module that runs unmodified on a device with this `emulated_reason`."""
    return (
        f"{reason}, so the module's convolutions and matrix products are many times slower than in float32; cast it to float32 "
        "to avoid that"
    )


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}


def buffer(tensor: torch.Tensor | None) -> tuple[int, int, int] | None:
    """Return the tensor in the compiled module's form: (address, dtype code, number of elements)."""
    return None if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel())


def _gpu_index(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def launch_target(kind: str, device: torch.device) -> int | tuple[int, int]:
    """Return the compiled module's launch target: the thread count, or (GPU index, address of its current stream)."""
    if kind == "cpu":
        return torch.get_num_threads()
    index = _gpu_index(device)
    return index, torch.cuda.current_stream(index).cuda_stream


def describe() -> dict[str, object]:
    """Return a report on the backends, the compiled module and the choices that this process makes.

    Returns:
        A dictionary. "backends" maps each name to "available" or to the reason why it is not. "chosen" is the requested
            backend. "cpu_variant" is the instruction set of the CPU kernels. "threads" is torch's number of CPU threads.
            "serves" maps "cpu" and "cuda" to the backend that runs float32 tensors there. "build" is the build information of
            the compiled module, or None if the module is missing.

    Raises:
        BackendError: If FASTDDPM_BACKEND or FASTDDPM_CPU_VARIANT requests a backend or instruction set that cannot run here.
    """
    _read_environment()
    backends = {name: unavailable_reason(name) or "available" for name in NAMES}
    return {
        "backends": backends,
        "chosen": _requested or "by the tensor's device",
        "cpu_variant": None if native is None else native.cpu_variant(),
        "threads": torch.get_num_threads(),
        "serves": {
            "cpu": select(torch.device("cpu")) if _requested in (None, "cpu", "reference") else _requested,
            "cuda": (select(torch.device("cuda")) if _requested is None else _requested)
            if torch.cuda.is_available()
            else "no CUDA device",
        },
        "build": None if native is None else native.build_info(),
    }
