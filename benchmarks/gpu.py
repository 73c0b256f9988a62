"""Verify and benchmark the package on a GPU, in four independent pieces of at most nine minutes.

    python benchmarks/gpu.py check | steps | ops | peers [--out FOLDER] [--force]

`make gpu-check`, `gpu-steps`, `gpu-ops` and `gpu-peers` install the package first; `make gpu` runs all four. No network is
needed. A piece writes its results to <out>/<name of the GPU>_<piece>.json after each case.

check  the tests that need a GPU, every op against float64, compute-sanitizer over the kernels; pytest's logs: build/gpu
steps  steps_per_sec.py with each network and batch size, without peers to compile; the hot kernels under ncu if installed
ops    the GPU cases of kernels.py
peers  compiled peers of whole steps, in the bars' order, added to the results of `steps`; a repeated call continues

The exit status is 1 if a result is wrong, 2 if nothing could run, 3 if every result is right but a bar was missed or something
did not run, and 0 otherwise. If a peer is not installed, a line reports it, and no bar requires it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import filecmp
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import ptxas
import torch
from _bars import BF16, F32, GRAPH, engine_bars, missed, print_bars
from _contestants import UNet2DModel, entrants, the_network
from _harness import Clock, provenance, refuse_if_used, version, write_json
from steps_per_sec import BATCHES, NO_TIME, measure, table

import fastddpm
from fastddpm import backend

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"check": 420, "steps": 430, "ops": 380, "peers": 430}  # time limit of a piece, without the installation
OPS = ("philox_normal", "timestep_embedding", "ddpm_step", "group_norm_silu")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")  # of compute-sanitizer
CHUNKS = {  # test arguments, each run in a separate process: a crashing kernel ends its process
    "test_gpu": ["tests/test_gpu.py"],
    **{f"test_{op}": [f"tests/test_{op}.py", "-k", "cuda and not simulated"] for op in OPS},
    "test_parity": ["tests/test_parity.py", "-k", "on_a_gpu"],
    **{tool: ["tests/test_gpu_proof.py", "-k", tool, "-m", ""] for tool in TOOLS},
}
UNITS = [(network, batch) for (kind, network), all_of in BATCHES.items() if kind == "cuda" for batch in all_of]
UNITS.sort(key=lambda unit: unit not in (("cifar10", 1), ("cifar10", 256), ("lsun256", 4)))  # these have bars
SHORTEST, FOR_PROFILE = 30, 60  # seconds: the least left to begin a unit, and ncu's limit
Judgement = tuple[list[str], list[str]]  # wrong results; bars that were missed or not measured


class Results(dict):
    """Case name -> its stored result; the file is rewritten after each case."""

    def __init__(self, path: Path, header: dict[str, object], keep: bool) -> None:
        """Create or, with `keep`, continue the results; the file's are used if its sources and versions are the same."""
        found = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
        if not keep or any(found.get(name) != header[name] for name in ("sources", "versions", "triton")):
            found = {}
        super().__init__(found.get("results", {}))
        self.path, self.header = path, found | header

    def write(self, **about: object) -> None:
        self.header |= about
        write_json(self.path, {**self.header, "results": self}, quiet=True)


def tool(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, from the PATH or the toolkit's folder, or None."""
    return shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


def header(settings: argparse.Namespace) -> dict[str, object]:
    """Return the results' machine, versions and sources; the sources' fingerprint identifies uncommitted changes."""
    files = (path for folder in ("csrc", "fastddpm", "benchmarks") for path in sorted((ROOT / folder).rglob("*.*")))
    code = b"".join(path.read_bytes() for path in files if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"})
    p, smi = torch.cuda.get_device_properties("cuda"), shutil.which("nvidia-smi")
    query = f"--id=GPU-{p.uuid} --query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.memory --format=csv"
    return {
        "benchmark": "gpu", **provenance(settings), "sources": hashlib.sha256(code).hexdigest()[:16],
        "device": str(p), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": version("triton"),
        "nvidia-smi": smi and subprocess.run([smi, *query.split()], capture_output=True, text=True).stdout,
        "build": backend.native and backend.native.build_info(),
    }  # fmt: skip


def obstacle() -> str | None:
    """Return the reason why nothing can be verified here, or None."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device; run this on a machine with an NVIDIA GPU and PyTorch for CUDA"
    installed, ours = Path(fastddpm.__file__).parent, ROOT / "fastddpm"
    names = [str(path.relative_to(ours)) for path in ours.rglob("*.py")]
    _, differ, missing = filecmp.cmpfiles(ours, installed, names, shallow=False)
    if stale := ", ".join([*differ, *missing][:3]):
        return f"{installed} is not this checkout's ({stale} differ); install it: rm -f build/gpu-installed; make gpu-check"
    return "; ".join(why for kind in ("cuda", "triton") if (why := backend.unavailable_reason(kind))) or None


def check(results: Results, clock: Clock, chunks: dict[str, list[str]] = CHUNKS) -> Judgement:
    folder, wrong, short = ROOT / "build" / "gpu", [], []
    folder.mkdir(parents=True, exist_ok=True)
    # -P: import the installed package, not the source tree beside it.
    pytest = [sys.executable, "-P", "-u", "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    threads = max(1, (os.cpu_count() or 1) // max(1, len(chunks) - len(TOOLS)))  # the sanitizers need few
    pytest = ["env", f"OMP_NUM_THREADS={threads}", "timeout", "-k", "5", f"{clock.left():.0f}", *pytest]

    def run(name: str, arguments: list[str]) -> int:
        with open(folder / f"{name}.log", "w") as log:
            return subprocess.run([*pytest, *arguments], stdout=log, stderr=log, cwd=ROOT).returncode

    with concurrent.futures.ThreadPoolExecutor(len(chunks)) as pool:
        running = {pool.submit(run, *chunk): chunk[0] for chunk in chunks.items()}
        for done in concurrent.futures.as_completed(running):  # store each result when its tests end
            name, status = running[done], done.result()
            said = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            words = re.findall(r"::.* (PASSED|FAILED|ERROR|SKIPPED)\b", said)
            counts = {word: words.count(word) for word in sorted(set(words))}
            right = status == 0 and "PASSED" in counts  # tests that are all skipped prove nothing
            lines = said.splitlines()[-1 if right else -60 :]
            results[name] = {"right": right, "status": status, "counts": counts, "end": lines}
            results.write()
            late = status == 124 and not {"FAILED", "ERROR"} & counts.keys()
            if late or (status == 0 and not right and name in TOOLS):
                short.append(f"{name}: {'out of time' if late else 'skipped; see its log'}")
            elif not right:
                wrong.append(f"{name}: pytest ended with {status}")
            clock.say(f"{name}: {'right' if right else 'NOT RIGHT'}, {counts}")
            print("".join(f"    {line}\n" for line in lines), flush=True)
    return wrong, short


def profile(to: Path) -> str:
    """Write ncu's report of the hot kernels, or its error, to a file. Return one line about it."""
    if (ncu := tool("ncu")) is None:
        return "no profile: ncu is not on the PATH"
    options = ["--profile-from-start", "off", "--csv", "--print-details", "all", "--set", "detailed"]
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import kernels; kernels.run_hot()"
    command = ["timeout", str(FOR_PROFILE), ncu, *options, sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    to.write_text(done.stdout, encoding="utf-8")
    return f"ncu ended with {done.returncode}; it wrote {to}\n{done.stderr[-999:]}"


def steps(results: Results, clock: Clock, device: str = "cuda", units=UNITS, compiled: bool = False) -> Judgement:
    """Measure each unit within its share of the time; compiled peers use the time they need, one unit after the other."""
    wrong, short, models, kept = [], [], {}, 0 if compiled else FOR_PROFILE
    for network, batch in units:
        results.setdefault(f"{network} at batch {batch}", {"network": network, "batch": batch, "contestants": {}})
    for n, (unit, stored) in enumerate(results.items()):
        network, batch, left = stored["network"], stored["batch"], clock.left() - kept
        if compiled and any(GRAPH in who for who in stored.get("compiled", {}).get("contestants", ())):
            continue
        if left < SHORTEST:
            short += [f"{unit}: no time left; its results are from an earlier run"] if stored["contestants"] else []
            continue
        later = kept + (0 if compiled else left * (1 - 1 / (len(results) - n)))
        try:
            model = models[network] = models[network] if network in models else the_network(network).to(device)
            field = entrants(model, batch, quick=not compiled)
            if compiled:
                field = {who: entrant for who, entrant in field.items() if who == BF16 or GRAPH in who}
            found = measure(model, network, batch, field, clock, later, {}, calls=not compiled)
        except Exception as error:
            outside = isinstance(error, (torch.cuda.OutOfMemoryError, subprocess.TimeoutExpired))  # no wrong result
            (short if outside else wrong).append(f"{unit}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        stored |= {"compiled": found} if compiled else found
        lost = {who: why for who, why in found["left_out"].items() if who in (F32, BF16) and NO_TIME not in why}
        wrong += [f"{unit}: {who} is left out: {why}" for who, why in lost.items()]
        results.write(bars=engine_bars(results.values(), "cuda"))
        table([found])
    rows = engine_bars(results.values(), "cuda")
    print_bars(rows)
    ptxas.print_predictions(results.values())
    if compiled:
        return wrong, short + [bar for bar in missed(rows) if "best peer" in bar]
    results.write(profile=profile(results.path.with_name(f"{results.path.stem}_ncu.csv")))
    print(results.header["profile"])
    without = ["diffusers"] if UNet2DModel is None else []
    print(*(f"{who} is not installed, and no bar requires it" for who in without), sep="\n")
    short += [unit for unit, stored in results.items() if not {F32, BF16} <= stored["contestants"].keys()]
    return wrong, short + [bar for bar in missed(rows, without) if "best peer" not in bar]


def ops(results: Results, clock: Clock) -> Judgement:
    wrong = []
    torch.manual_seed(0)
    for found in kernels.run_on_gpu(left=clock.left):
        case = f"{found['op']} {found['case']}"
        results[case], lost = found, {w: why for w, why in found["left_out"].items() if w.startswith("fastddpm")}
        wrong += [f"{case}: {who}: {why}" for who, why in lost.items()]
        results.write(bars=kernels.bars_of(results.values()))
        kernels.table([found], "us")
        sys.stdout.flush()
    rows = kernels.bars_of(results.values())
    print_bars(rows)
    ptxas.print_predictions(results.values())
    return wrong, missed(rows)


PIECES = {"check": check, "steps": steps, "ops": ops, "peers": functools.partial(steps, compiled=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=tuple(PIECES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--force", action="store_true", help="measure although other processes use the GPU")
    settings = parser.parse_args()
    if why := obstacle():
        print(f"gpu.py: {why}", file=sys.stderr)
        sys.exit(2)
    if settings.piece != "check":
        refuse_if_used(settings.force)
    torch.set_grad_enabled(False)
    settings.out.mkdir(parents=True, exist_ok=True)
    file = {"peers": "steps"}.get(settings.piece, settings.piece)
    slug = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    results = Results(settings.out / f"{slug}_{file}.json", header(settings), keep=file == "steps")
    clock = Clock(SECONDS[settings.piece])
    wrong, short = PIECES[settings.piece](results, clock)
    results.write(**{settings.piece: {"wrong": wrong, "missed or not measured": short}})
    print(*(f"WRONG: {line}" for line in wrong), *(f"missed or not measured: {line}" for line in short), sep="\n")
    clock.say(f"{settings.piece}: {'WRONG' if wrong else 'right'}, {len(short)} missed or not measured; {results.path}")
    sys.exit(1 if wrong else 3 if short else 0)


if __name__ == "__main__":
    main()
