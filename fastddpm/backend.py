"""Which backend serves a tensor, and why not another. The only file that imports the compiled module.

| name      | serves                             | needs                                              |
|-----------|------------------------------------|----------------------------------------------------|
| reference | any device, any floating dtype     | PyTorch only                                       |
| cpu       | CPU tensors, float32 and bfloat16  | the compiled module                                |
| cuda      | CUDA tensors                       | the compiled module, built where nvcc was found    |
| triton    | CUDA tensors                       | Triton                                             |

The tensor's device chooses: a CUDA tensor goes to cuda, else triton, else reference; a CPU tensor to cpu, else reference.
An explicit choice (`use`, or the environment variable FASTDDPM_BACKEND) is kept or refused, never replaced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch  # before _C: torch brings the OpenMP runtime that _C's threads run on

__all__ = ["NAMES", "describe", "use"]

NAMES = ("reference", "cpu", "cuda", "triton")
CPU_DTYPES = (torch.float32, torch.bfloat16)

try:
    from . import _C as native
except ImportError as error:
    native = None
    _native_missing = str(error)

NOT_YET = "this version of fastddpm has no {} kernels yet"


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot serve this call."""


def _missing_reason() -> str:
    """Why there is no compiled module: what the build wrote down, else what the import said."""
    note = Path(__file__).with_name("_build_info.json")
    if note.is_file():
        reason = json.loads(note.read_text(encoding="utf-8")).get("reason")
        if reason:
            return f"the native build did not succeed ({reason}); install a C++ compiler and run pip install again"
    return f"the compiled module fastddpm._C does not import ({_native_missing}); reinstall with a C++ compiler at hand"


def unavailable(name: str) -> str | None:
    """None if the backend can run on this machine, else the reason why not."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if native is not None else _missing_reason()
    return NOT_YET.format("CUDA" if name == "cuda" else "Triton")


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: unknown name {name!r}; expected one of {', '.join(NAMES)}")
    reason = unavailable(name)
    if reason is not None:
        raise BackendError(f"backend {name!r} was asked for, but {reason}")
    return name


_chosen: str | None = None  # None: the tensor's device chooses
_environment_read = False


class use:
    """Choose the backend for the whole process: `use("cpu")`, or `with use("cpu"): ...` to restore afterwards.

    name: one of "reference", "cpu", "cuda", "triton"; None lets the tensor's device choose again.
    Raises ValueError for an unknown name and BackendError where the backend cannot run here.
    """

    def __init__(self, name: str | None) -> None:
        global _chosen
        _read_environment()
        self._previous = _chosen
        _chosen = None if name is None else _check(name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        global _chosen
        _chosen = self._previous


def _read_environment() -> None:
    global _chosen, _environment_read
    if not _environment_read:
        wanted = os.environ.get("FASTDDPM_BACKEND")
        if wanted:
            _chosen = _check(wanted)
        _environment_read = True


def refuses(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if backend `name` serves tensors of this device and dtype, else the reason why not."""
    reason = unavailable(name)
    if reason is not None or name == "reference":
        return reason
    if name == "cpu":
        if device.type != "cpu":
            return f"it serves CPU tensors and this one is on {device}"
        if dtype not in CPU_DTYPES:
            return f"it serves float32 and bfloat16 and this tensor is {str(dtype).removeprefix('torch.')}"
        return None
    return None if device.type == "cuda" else f"it serves CUDA tensors and this one is on {device}"


def choose(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves a tensor of this device and dtype."""
    _read_environment()
    if _chosen is not None:
        reason = refuses(_chosen, device, dtype)
        if reason is not None:
            raise BackendError(
                f"backend {_chosen!r} was asked for, but {reason}; move or cast the tensor, or choose another backend"
            )
        return _chosen
    candidates = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    for name in candidates:
        if refuses(name, device, dtype) is None:
            return name
    return "reference"


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3}


def buffer(tensor: torch.Tensor | None) -> tuple[int, int, int] | None:
    """How a tensor crosses into the compiled module: (address, dtype code, number of elements)."""
    return None if tensor is None else (tensor.data_ptr(), _DTYPE_CODES[tensor.dtype], tensor.numel())


def describe() -> dict[str, object]:
    """What was built, what serves what, and why each missing backend is missing."""
    _read_environment()
    backends = {name: unavailable(name) or "available" for name in NAMES}
    return {
        "backends": backends,
        "chosen": _chosen or "by the tensor's device",
        "cpu_variant": None if native is None else native.cpu_variant(),
        "threads": torch.get_num_threads(),
        "serves": {
            "cpu": choose(torch.device("cpu")) if _chosen in (None, "cpu", "reference") else _chosen,
            "cuda": (choose(torch.device("cuda")) if _chosen is None else _chosen)
            if torch.cuda.is_available()
            else "no CUDA device",
        },
        "build": None if native is None else native.build_info(),
    }
