"""The cap to AVX2 of steps_per_sec.py: a machine with wider vectors measures the speed of a processor without them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import torch

from fastddpm import backend

# The variables that cap each library to AVX2: torch, oneDNN (torch's and OpenVINO's), MKL (on Intel's processors),
# torch.compile's compiler, and fastddpm. Each is read when its library loads.
CAP = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    **({} if backend.native is None else {"FASTDDPM_CPU_VARIANT": "avx2"}),
}


def set_isa(isa: str, device: str) -> None:
    """Continue in this process, or restart it with the variables of CAP. Exit with a message if a cap is impossible."""
    there = {name: os.environ[name] for name in CAP if name in os.environ}
    listed = " ".join(f"{name}={value}" for name, value in there.items())
    if isa == "native":
        if there and device == "cpu":
            sys.exit(
                f"--isa native: the environment has {listed}, which caps libraries; unset that, or pass --isa avx2"
            )
        return
    if device != "cpu":
        sys.exit(f"--isa avx2: only a CPU can be capped, and --device is {device}; pass --device cpu")
    if not torch.cpu._is_avx2_supported():
        sys.exit("--isa avx2: this processor has no AVX2; omit --isa to measure its own instructions")
    if any(CAP[name] != value for name, value in there.items()):
        sys.exit(f"--isa avx2: the environment has {listed}, which contradicts it; unset that")
    if there != CAP:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | CAP)


ASKED = """
import torch
torch.nn.functional.conv2d(torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3))
torch.randn(64, 64) @ torch.randn(64, 64)
"""


def capped(quick: bool) -> dict[str, str]:
    """Return library -> evidence that it obeys the cap to AVX2, from this process or the log of a similar one."""
    command, verbose = [sys.executable, "-P", "-c", ASKED], {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    log = subprocess.run(command, env=os.environ | verbose, check=True, stdout=subprocess.PIPE, text=True).stdout

    def logged(pattern: str) -> str:
        found = re.search(pattern, log)
        return found[1] if found else "nothing"

    said = {
        "fastddpm's kernels": f"{backend.describe()['cpu_variant'] or 'none'}, as fastddpm.backend.describe() reports",
        "torch's kernels": f"{torch.backends.cpu.get_cpu_capability()}, as torch.backends.cpu.get_cpu_capability() reports",
        "torch's convolutions": f"{logged(r'cpu,isa:(.*)')}, {logged(r'convolution,([^,]*),')}, as oneDNN logs",
    }
    if not quick:
        from torch._inductor import config, cpu_vec_isa  # loads slowly

        march = getattr(config.cpp, "march", None)  # older torch compiles for the native processor
        vectors = cpu_vec_isa.pick_vec_isa()
        said["torch.compile's kernels"] = f"{vectors}, -march={march or 'native'}, from torch._inductor's settings"
    if torch.backends.mkl.is_available():  # MKL names its instructions only on Intel's processors, see NOTES.md
        version = logged(r"MKL_VERBOSE ([^,]*)")
        said["torch's matrix products"] = (
            f"{'AVX-512' if '512' in version else 'AVX2 or less'}, as MKL logs ({version})"
        )
    disobeys = [f"{who}: {what}" for who, what in said.items() if any(x in what for x in ("512", "native", "nothing"))]
    if disobeys:
        sys.exit(f"--isa avx2: these libraries do not obey it: {'; '.join(disobeys)}")
    return {
        **said,
        "OpenVINO": "as its compiled model reports for each layer, see its set-up; layers of MLAS cannot be capped",
    }
