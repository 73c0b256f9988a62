"""The CUDA kernels on a CPU: build tests/cuda_on_cpu and replace fastddpm._C by its module."""

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

from fastddpm import backend

HERE = Path(__file__).parent / "cuda_on_cpu"
# One folder per checkout. It is reused, so that make rebuilds only what has changed.
BUILD = Path(tempfile.gettempdir()) / f"fastddpm-cuda-on-cpu-{hashlib.sha256(bytes(HERE)).hexdigest()[:16]}"


@functools.cache
def cuda_include() -> Path | None:
    """Return the folder of CUDA's headers, next to nvcc or in CUDA_HOME; None if there is none."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    includes = [Path(home) / "include" for home in homes if home]
    return next((path for path in includes if (path / "cuda_bf16.h").is_file()), None)


def missing() -> str | None:
    """Return why the kernels cannot be compiled for a CPU on this machine; None if they can."""
    if cuda_include() is None:
        return "no CUDA headers"
    for tool in ("g++", "make"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    return None


@functools.cache
def built(target: str) -> Path:
    """Build the target of tests/cuda_on_cpu (driver, driver_sanitized, module, ...) for this machine and return its path."""
    if missing():
        pytest.skip(f"CUDA kernels on a CPU: {missing()}")
    import fcntl

    import pybind11

    BUILD.mkdir(mode=0o700, exist_ok=True)
    python = f"-I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}"
    command = ["make", "-s", f"-j{os.cpu_count()}", "-C", str(HERE), f"BUILD={BUILD}", target]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one pytest-xdist worker builds while the other workers wait
        done = subprocess.run(
            [*command, f"CUDA_INCLUDE={cuda_include()}", f"PYTHON_FLAGS={python}"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return BUILD / {"module": "cuda_on_cpu.so"}.get(target, target)


@functools.cache
def module():
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", built("module"))
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextlib.contextmanager
def cuda():
    """Make the backend cuda run CPU tensors on the simulated kernels."""
    patch = pytest.MonkeyPatch()
    real = backend.unavailable_reason

    def unsupported_reason(name, device, dtype):
        if name == "cuda":
            return None if dtype in backend.DTYPES else f"this tensor is {dtype}"
        return real_unsupported_reason(name, device, dtype)

    real_unsupported_reason = backend.unsupported_reason
    with patch.context() as p:
        p.setattr(backend, "native", module())
        p.setattr(backend, "launch_target", lambda kind, device: (0, 0))
        p.setattr(
            backend, "unavailable_reason", lambda name, device=None: None if name == "cuda" else real(name, device)
        )
        p.setattr(backend, "unsupported_reason", unsupported_reason)
        with backend.use("cuda"):
            yield
