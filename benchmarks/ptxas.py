"""Compare the CUDA kernels' compiled code, and the split of their work, with budget.json. Needs nvcc, no GPU.

    python benchmarks/ptxas.py [ARCH ...] [--write]

Compiles csrc/cuda for the given compute capabilities (default those of budget.json), as the build does, and disassembles
it. Fails if a kernel spills registers, or if a hot kernel exceeds its budget: instructions an element of each pass,
barriers, fences, code, registers, loads and stores of each width. Then runs the kernels' hosts to get the split of the
planned cases on an H200's 132 multiprocessors, and fails if a launch has a little more than one wave, or if too few bytes
are in flight. --write replaces the kernels' budget by the counts found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from _bars import OURS
from _harness import print_table

from fastddpm import UNet
from fastddpm.models import unet

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda"
BUDGET = Path(__file__).with_name("budget.json")

# -------------------------------------------------------------------------------------------- the compiler's output


class Hot(NamedTuple):
    """A kernel with a budget: elements that a thread holds at once, and its passes over them.

    A pass is (name, text at which its source begins, text at which it ends); the texts follow each other in the kernel's
    file. Passes are unrolled, so the instructions counted in the code are those that run, except for a choice of layouts
    and for branches that seldom run.
    """

    elements: int
    passes: tuple[tuple[str, str, str], ...]


NORM = (
    ("mean", "each<", "slots.sum_groups("),
    ("deviation", "each<", "slots.sum_groups("),
    ("result", "each<", "slots.template store"),
)
BACKWARD = (("sums", "for (int v = 0", "if (slots.row <"), ("result", "each<", "slots.template store"))
HOT = {
    # Resident, and both stages of the two-stage form: the same code
    "group_norm_silu_kernel<__nv_bfloat16, 8, 8, 4, true>": Hot(64, NORM),
    "group_norm_silu_kernel<__nv_bfloat16, 8, 2, 4, true>": Hot(16, NORM),
    "group_norm_silu_backward_kernel<__nv_bfloat16, 8, 8>": Hot(64, BACKWARD),
    "ddpm_step_tile_kernel<3>": Hot(12, (("noise", "draw(point", "\n"), ("step", "= step(", "x.store("))),
    "philox_normal_kernel<true>": Hot(4, (("noise", "philox4x32_10<", "float* out"),)),
    "timestep_embedding_kernel": Hot(2, (("row", "for (int64_t i = first", "\n}\n"),)),
}

Found = dict[str, float | dict[str, float]]


class Kernel(NamedTuple):
    name: str
    arch: str
    spilled: int  # bytes stored and loaded
    registers: int
    found: Found  # as in budget.json; empty if the kernel has no budget


def arithmetic_flags() -> list[str]:
    """Return the CUDA kernels' compile options from CMakeLists.txt, which gives their reasons."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    return re.search(r"target_compile_options\(fastddpm_cuda PRIVATE (.*?)\)", text)[1].split()


def disassembler() -> str:
    """Return the path of nvdisasm: from Triton's wheel, whose version constraints.txt pins, else from the toolkit."""
    triton = importlib.util.find_spec("triton")
    places = [] if triton is None else [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")]
    found = shutil.which("nvdisasm", path=os.pathsep.join([*places, os.environ["PATH"]]))
    if found is None:
        sys.exit("there is no nvdisasm, in Triton's wheel (pip install triton) or on the PATH (the CUDA toolkit's)")
    return found


def release(tool: str) -> str:
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("release ")[1].split(",")[0]


def readable(name: str) -> str:
    """Return `op_kernel<arguments>`, without namespaces and parameters."""
    match = re.search(r"(\w+_kernel(?:<[^()]*>)?)\(", name)
    return match[1] if match else name


def demangled(names: Sequence[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [readable(name) for name in done.stdout.splitlines()]


Line = tuple[str, int]  # file and line


def line_of(text: str, at: int) -> int:
    return 1 + text.count("\n", 0, at)


def pass_lines(source: Path, kernel: str) -> dict[str, range]:
    """Return the lines of each pass of a hot kernel."""
    text = source.read_text(encoding="utf-8")
    at, lines = text.index(f" {kernel.split('<')[0]}("), {}
    for name, begin, end in HOT[kernel].passes:
        begins = text.index(begin, at)
        at = text.index(end, begins + len(begin))
        lines[name] = range(line_of(text, begins), max(line_of(text, begins) + 1, line_of(text, at)))
    return lines


@functools.cache
def partial() -> Line:
    """Return the line of the branch for threads with empty slots, a second copy of a pass that element costs exclude."""
    header = KERNELS / "group_norm_silu.cuh"
    text = header.read_text(encoding="utf-8")
    return header.name, line_of(text, text.index("each_of<false>(of, f)"))


def instructions(sass: str) -> Iterator[tuple[str, str, list[Line]]]:
    """Yield (kernel, instruction, its source lines, the innermost first) from `nvdisasm -gi`."""
    kernel, lines, begins = "", [], True
    for text in sass.splitlines():
        if text.startswith("_Z") and text.endswith(":"):
            kernel = text[:-1]
        elif found := re.match(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)', text):
            lines, begins = ([] if begins else lines), False
            lines.append((found[1], int(found[2])))
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9_.]+)", text):
            begins = True
            yield kernel, found[1], lines


def width_of(instruction: str) -> str:
    """Return the bits that a load or store moves for each thread."""
    return next((w for w in ("128", "64", "16", "8") if re.search(rf"\.[US]?{w}\b", instruction)), "32")


def budget_of(kernel: str, source: Path, registers: int, code: Sequence[tuple[str, list[Line]]]) -> Found:
    def count(pattern: str) -> int:
        return sum(re.match(pattern, what) is not None for what, _ in code)

    passes = pass_lines(source, kernel)
    of_pass = Counter(
        next((name for file, line in lines if file == source.name for name, of in passes.items() if line in of), None)
        for _, lines in code
        if partial() not in lines
    )
    return {
        "registers": registers,
        "code_bytes": 16 * len(code),
        "instructions_per_element": {name: round(of_pass[name] / HOT[kernel].elements, 2) for name in passes},
        "special_functions": count("MUFU"),
        "barriers": count(r"BAR\b"),
        "cluster_barriers": count("UCGABAR_WAIT"),
        "fences": {name: n for name in ("MEMBAR", "CCTL", "ERRBAR", "CGAERRBAR") if (n := count(rf"{name}\b"))},
        "loads": dict(sorted(Counter(width_of(what) for what, _ in code if what.startswith("LDG")).items())),
        "stores": dict(sorted(Counter(width_of(what) for what, _ in code if what.startswith("STG")).items())),
    }


def compiled(source: Path, arch: str, nvdisasm: str) -> list[Kernel]:
    # Line numbers distinguish passes. They change no instruction.
    flags = ["-std=c++17", "-O3", "-DFASTDDPM_CUDA", *arithmetic_flags(), "-Xptxas", "-v", "-lineinfo"]
    with tempfile.TemporaryDirectory() as folder:
        image = f"{folder}/kernels.cubin"
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", str(source), "-o", image]
        done = subprocess.run(["nvcc", *flags, *target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"nvcc failed on {source.name} for sm_{arch}:\n{done.stdout}")
        sass = subprocess.run([nvdisasm, "-c", "-gi", image], capture_output=True, text=True, check=True).stdout
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    found = re.findall(pattern, done.stdout, re.DOTALL)
    code: dict[str, list[tuple[str, list[Line]]]] = {}
    for kernel, what, lines in instructions(sass):
        code.setdefault(kernel, []).append((what, lines))
    kernels = []
    for name, (mangled, target, stores, loads, registers) in zip(demangled([f[0] for f in found]), found, strict=True):
        budget = budget_of(name, source, int(registers), code[mangled]) if name in HOT else {}
        kernels.append(Kernel(name, target, int(stores) + int(loads), int(registers), budget))
    return kernels


def over(found: Mapping, budget: Mapping, where: str = "") -> Iterator[str]:
    """Yield each count that exceeds its budget; a count without a budget must be 0."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from over(value, budget.get(name, {}), f"{where} {name}")
        elif value > budget.get(name, 0):
            yield f"{where} {name}: {value:g}, budget {budget.get(name, 0):g}".strip()


# ------------------------------------------------------------------------------------------------- the launch plan

SMS = 132
H200 = {"CUDA_ON_CPU_SMS": str(SMS), "CUDA_ON_CPU_MAJOR": "9", "CUDA_ON_CPU_L2": str(50 << 20)}
NETWORKS = {"cifar10": (1, 16, 64, 256), "lsun256": (1, 4, 16)}  # batches that are measured
LARGE, UNDER_WAY = 16 << 20, 32 << 10  # bytes: of all reads, and of loads in flight in a multiprocessor


class Case(NamedTuple):
    op: str
    samples: int
    channels: int  # timestep_embedding: the width
    pixels: int

    def __str__(self) -> str:
        return f"{self.op} [{self.samples}, {self.channels}, {self.pixels}]"

    def bytes_read(self) -> int:
        """Return the bytes read: x and the inputs of its size; 0 for ops that compute from a few numbers."""
        element = {"group_norm_silu": 2, "group_norm_silu_backward": 4, "ddpm_step_": 6}.get(self.op, 0)
        return element * self.samples * self.channels * self.pixels


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    cluster: int
    shared: int  # bytes

    def resident(self, registers: Mapping[str, int]) -> int:
        """Return the blocks resident on an sm_90 multiprocessor; registers are allocated in eights for each thread."""
        warps = -(-self.threads // 32)
        by_registers = 65536 // (-(-registers[self.kernel] // 8) * 8 * 32 * warps)
        return min(by_registers, 64 // warps, 32, (228 << 10) // (self.shared + 1024))

    def waves(self, registers: Mapping[str, int]) -> float:
        return self.blocks / (SMS * self.resident(registers))


def norms(preset: str) -> set[tuple[int, int]]:
    """Return (channels, pixels) of group_norm_silu's calls in a network."""
    shapes = set()

    def noted(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        shapes.add((x.shape[1], x.shape[2] * x.shape[3]))
        return torch.empty_like(x)

    network = UNet.from_preset(preset).to("meta").eval()  # meta tensors have only shapes: nothing is computed
    with mock.patch.object(unet.ops, "group_norm_silu", noted):
        network(torch.empty(1, *network.shape, device="meta"), torch.empty(1, dtype=torch.int64, device="meta"))
    return shapes


def cases() -> list[Case]:
    """Return the cases that kernels.py and steps_per_sec.py launch on a GPU."""
    shapes = {(n, *shape) for preset, batches in NETWORKS.items() for shape in norms(preset) for n in batches}
    shapes |= {(64, 256, 4096), (16, 256, 16384), (16, 128, 65536)}
    others = [("group_norm_silu_backward", *shape) for shape in ((256, 128, 1024), (64, 256, 256), (4, 128, 65536))]
    for shape in ((256, 3, 1024), (64, 3, 65536)):
        others += [("ddpm_step_", *shape), ("philox_normal", *shape)]
    norm_cases = sorted(("group_norm_silu", *shape) for shape in shapes)
    return [Case(*c) for c in (*norm_cases, *others, ("timestep_embedding", 256, 128, 1))]


def plan(asked: Sequence[Case]) -> list[list[Launch]]:
    """Return the launches of each case, from the kernels' hosts, which tests/cuda_on_cpu compiles for this machine."""
    sys.path.append(str(ROOT / "tests"))
    import simulated

    if simulated.missing():
        sys.exit(f"the kernels' hosts, which split the work, cannot be built: {simulated.missing()}")
    program = simulated.built("plan")
    text = "".join(f"{' '.join(map(str, case))}\n" for case in asked)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True, env={**os.environ, **H200})
    symbols = subprocess.run(["nm", "-C", program], capture_output=True, text=True, check=True).stdout
    kernels = {
        int(line[:16], 16): readable(line) for line in symbols.splitlines() if re.search(r"::\w+_kernel[<(]", line)
    }
    launches = [[] for _ in asked]
    for line in done.stdout.splitlines():
        at, kernel, *sizes = line.split()
        launches[int(at)].append(Launch(kernels[int(kernel, 16)], *map(int, sizes)))
    return launches


class Split(NamedTuple):
    """A case's launches; all except the last are equal."""

    case: Case
    launches: list[Launch]
    registers: Mapping[str, int]

    def waves(self) -> list[float]:
        return [launch.waves(self.registers) for launch in self.launches]

    def under_way(self) -> float:
        """Return the bytes of the case's loads that a multiprocessor has in flight in the first launch."""
        first = self.launches[0]
        if self.case.op == "ddpm_step_":  # four pixels of a thread at a time
            block = first.threads * 4 * self.case.bytes_read() / (self.case.samples * self.case.pixels)
        else:  # all of a block's elements; two launches read them in two stages
            stages = 2 if len(self.launches) > 1 else 1
            block = stages * self.case.bytes_read() / sum(launch.blocks for launch in self.launches)
        return block * min(first.resident(self.registers), first.blocks / SMS)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (rule, description) of each violation."""
        bad = [w for w in self.waves() if 1.0 < w < 1.5]
        if bad:
            yield "waves", f"a launch of {bad[0]:.2f} waves: the last multiprocessors wait for the first"
        if self.case.bytes_read() > LARGE and self.under_way() < UNDER_WAY:
            yield "under_way", f"{self.under_way() / 1024:.1f} KB in flight in a multiprocessor, expected at least 32"

    def cells(self) -> list[str]:
        first, waves = self.launches[0], self.waves()
        of = f"{len(waves)} x " if len(waves) > 1 else ""
        shape = f"{of}{first.blocks} x {first.threads}" + (f" / {first.cluster}" if first.cluster > 1 else "")
        under_way = f"{self.under_way() / 1024:.1f}" if self.case.bytes_read() else ""
        return [str(self.case), shape, str(first.resident(self.registers)), f"{max(waves):.2f}", under_way]


def registers(budget: Mapping) -> dict[str, int]:
    """Return kernel -> registers on an H200."""
    return {name: found["registers"] for name, found in budget["kernels"]["sm_90"].items()}


def splits(registers: Mapping[str, int]) -> list[Split]:
    asked = cases()
    return [Split(case, launches, registers) for case, launches in zip(asked, plan(asked), strict=True)]


def unexpected(found: Sequence[Split], exceptions: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """Yield problems that budget.json does not except, and exceptions that are no longer needed."""
    problems = {(rule, str(split.case)): words for split in found for rule, words in split.problems()}
    excepted = {(rule, case) for rule, listed in exceptions.items() for case in listed}
    for (rule, case), words in problems.items():
        if (rule, case) not in excepted:
            yield f"{case}: {words}"
    for rule, case in sorted(excepted - set(problems)):
        yield f"{case}: excepted from {rule} in {BUDGET.name} without need; remove the exception"


# ------------------------------------------------------------------------------------------------------------------


def hot_cells(kernel: Kernel) -> list[str]:
    def each(name: str) -> str:
        return ", ".join(f"{k} {v:g}" for k, v in kernel.found[name].items())

    plain = [str(kernel.found[k]) for k in ("registers", "code_bytes", "special_functions", "barriers")]
    widths = [each(k) for k in ("fences", "loads", "stores")]
    return [kernel.name, kernel.arch, each("instructions_per_element"), *plain, *widths]


# ------------------------------------------------------------------------------------------------------ predictions


def print_predictions(results: Iterable[dict]) -> None:
    """Print budget.json's predictions beside measurements of gpu.py: results of kernels.py or of steps_per_sec.py."""
    rows, measured = [], {(r.get("op") or r["network"], r.get("case") or r["batch"]): r["contestants"] for r in results}
    for p in json.loads(BUDGET.read_text(encoding="utf-8"))["predictions"]:
        ours = OURS if "op" in p else f"fastddpm {p['dtype']}"
        for key in ((p["op"], case) for case in p["cases"]) if "op" in p else [(p["network"], p["batch"])]:
            if c := measured.get(key, {}).get(ours):
                share = c.get("share_of_copy", 1)
                found = {"of copy": share, "times a copy": 1 / share, "us": 1e3 * c["ms"], "ms a step": c["ms"]}[
                    p["measure"]
                ]
                within = "yes" if p["low"] <= found <= p["high"] else "NO"
                rows.append(["{} {}".format(*key), p["measure"], f"{p['low']} to {p['high']}", f"{found:.3g}", within])
    print_table(["", "measure", "predicted", "measured", "within"], rows)


def main() -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", default=[arch[3:] for arch in budget["kernels"]], metavar="ARCH")
    parser.add_argument("--write", action="store_true", help=f"write the kernels' budget into {BUDGET.name}")
    settings = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("nvcc is not on the PATH; it comes with the CUDA toolkit")
    nvdisasm = disassembler()
    tools = {"nvcc": release("nvcc"), "nvdisasm": release(nvdisasm)}
    work = [(source, arch, nvdisasm) for arch in settings.archs for source in sorted(KERNELS.glob("*.cu"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = [kernel for found in pool.map(compiled, *zip(*work, strict=True)) for kernel in found]
    hot = [kernel for kernel in kernels if kernel.name in HOT]
    header = ["kernel", "arch", "instructions an element", "registers", "code"]
    header += ["MUFU", "BAR", "fences", "loads", "stores"]
    print_table(header, [hot_cells(kernel) for kernel in hot])
    failures = [f"{k.name} for {k.arch}: {k.spilled} bytes of registers spilled" for k in kernels if k.spilled]
    missing = HOT.keys() - {kernel.name for kernel in hot}
    failures += [f"{name}: there is no such kernel in {KERNELS}" for name in sorted(missing)]
    if settings.write:
        budget["tools"] = tools
        for kernel in hot:
            budget["kernels"].setdefault(kernel.arch, {})[kernel.name] = kernel.found
        BUDGET.write_text(json.dumps(budget, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    elif tools["nvcc"] != budget["tools"]["nvcc"]:
        print(f"nvcc is {tools['nvcc']}; the budget was made with {budget['tools']['nvcc']}, and is not compared")
    else:
        for kernel in hot:
            allowed = budget["kernels"].get(kernel.arch, {}).get(kernel.name, {})
            failures += over(kernel.found, allowed, f"{kernel.name} for {kernel.arch}:")
    found = splits(registers(budget))
    header = ["case", "blocks x threads / cluster", "on a multiprocessor", "waves", "KB in flight"]
    print_table(header, [split.cells() for split in found])
    failures += unexpected(found, budget["exceptions"])
    print(f"{len(kernels)} kernels for {', '.join(settings.archs)}, {len(found)} cases; {len(failures)} failures")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
