"""What the compiler makes of the CUDA kernels: registers, spills and shared memory of each, as a table. Needs nvcc.

    python benchmarks/ptxas.py [ARCH ...] [--json PATH]

Compiles csrc/cuda for the given compute capabilities (default 80 and 90), as the build does, and fails where a kernel
spills registers: a spilled value goes to memory and back, in kernels whose time is memory's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from _harness import print_table, write_json

ROOT = Path(__file__).resolve().parents[1]


def arithmetic_flags() -> list[str]:
    """The options of the CUDA kernels in CMakeLists.txt, where they have their reasons."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.search(r"target_compile_options\(fastddpm_cuda PRIVATE (.*?)\)", text)[1].split()


class Kernel(NamedTuple):
    name: str
    arch: str
    registers: int
    spilled: int  # bytes stored and loaded
    stack: int  # bytes


def parse(log: str) -> Iterator[Kernel]:
    """The kernels that `ptxas -v` speaks of."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, arch, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        yield Kernel(name, arch, int(registers), int(stores) + int(loads), int(stack))


def readable(names: Sequence[str]) -> list[str]:
    """`op_kernel<arguments>`, without namespaces and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return list(names)
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    found = (re.search(r"(\w+_kernel(?:<[^()]*>)?)\(", line) for line in done.stdout.splitlines())
    return [match[1] if match else name for match, name in zip(found, names, strict=True)]


def compiled(source: Path, arch: str) -> list[Kernel]:
    flags = ["-std=c++17", "-O3", "-DFASTDDPM_CUDA", *arithmetic_flags(), "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", str(source), "-o", f"{folder}/kernel.o"]
        done = subprocess.run(["nvcc", *flags, *target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stdout}")
    return list(parse(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", default=["80", "90"], metavar="ARCH")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here")
    settings = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on the PATH; it comes with the CUDA toolkit")
    work = [(source, arch) for arch in settings.archs for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(compiled, *zip(*work, strict=True)) for kernel in found]
    kernels = [k._replace(name=name) for k, name in zip(kernels, readable([k.name for k in kernels]), strict=True)]
    header = ["kernel", "arch", "registers", "bytes spilled", "stack"]
    print_table(header, [[k.name, k.arch, str(k.registers), str(k.spilled), str(k.stack)] for k in kernels])
    if settings.json is not None:
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        write_json(
            settings.json,
            {"nvcc": version.split("release ")[1].split(",")[0], "kernels": [k._asdict() for k in kernels]},
        )
    spilling = [f"{k.name} for {k.arch}" for k in kernels if k.spilled]
    if spilling:
        sys.exit(f"registers are spilled in {', '.join(spilling)}")


if __name__ == "__main__":
    main()
