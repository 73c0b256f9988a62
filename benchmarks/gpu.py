"""The proof on a GPU, in four steps: is everything right, is it fast, op by op and as a whole, and is every memory access sound?

    python benchmarks/gpu.py parity | benchmarks | engine | sanitize [--out FOLDER]

`make gpu` installs the package and runs the four. Each takes less than nine minutes and needs no network. What they find
goes into <out>/<name of the GPU>.json as it comes, so that a step that is killed leaves what it had. A step keeps what
another wrote there only if that was the same commit, the same sources and the same versions.

parity      every op on every backend against float64 (`fastddpm.parity`), then the tests that need a GPU
benchmarks  the GPU cases of kernels.py, and the bars that they have to reach
engine      steps_per_sec.py for each network and batch size, and its bars; a first run leaves some to --resume
sanitize    compute-sanitizer's tools over the kernels, called from C++ without torch (tests/cuda_on_cpu/driver.cpp)

The exit status is 0 where everything was run, is right, and reaches its bar.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import filecmp
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import kernels
import steps_per_sec
import torch
from _bars import BF16, F32, cells, engine_bars
from _harness import Clock, commit, machine, print_table, version, versions, write_json
from ptxas import arithmetic_flags

import fastddpm
from fastddpm import backend, parity

ROOT = Path(__file__).resolve().parent.parent
STEPS = {  # and their keys
    "parity": ("parity",),
    "benchmarks": ("benchmarks", "bars"),
    "engine": ("engine", "engine_bars"),
    "sanitize": ("sanitize",),
}
BACKENDS = ("cuda", "triton", "reference")
OP_TESTS = ("philox_normal", "timestep_embedding", "ddpm_step", "group_norm_silu")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 9  # the exit status by which compute-sanitizer says that it found something

# ------------------------------------------------------------------------------------------- the results file


def slug(name: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def sources(root: Path = ROOT) -> str:
    """A fingerprint of what is measured and of what measures it, for checkouts that are not what their commit says."""
    digest = hashlib.sha256()
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh", ".txt"}
    files = [root / "CMakeLists.txt", root / "setup.py"]
    files += [path for folder in ("csrc", "fastddpm", "benchmarks", "tests") for path in (root / folder).rglob("*")]
    for path in sorted(path for path in files if path.suffix in kinds and path.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Record:
    """The results of one GPU: a header, and the keys of each step. The file is always whole."""

    SAME = ("commit", "sources", "versions")  # of a step whose results may stand beside those of another

    def __init__(self, path: Path, header: dict[str, object], step: str) -> None:
        self.path = path
        header = json.loads(json.dumps(header))  # as it will be read
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if any(found.get(name) != header[name] for name in self.SAME):
            found = {}
        self.earlier = {key: found[key] for key in STEPS[step] if key in found}
        others = [key for other, keys in STEPS.items() if other != step for key in keys]
        self.content = {**header, **{key: found[key] for key in others if key in found}}

    def put(self, **keys: object) -> None:
        self.content.update(keys)
        write_json(self.path, self.content, quiet=True)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, or where toolkits are installed."""
    folders = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    return shutil.which(name) or next(
        (found for folder in folders if folder and (found := shutil.which(name, path=f"{folder}/bin"))), None
    )


def device_facts() -> dict[str, object]:
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    seen = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{p.uuid}")
    return {
        "name": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_mib": p.L2_cache_size / 2**20,
        "memory_gib": round(p.total_memory / 2**30, 1),
        **(dict(zip(query.split(","), seen.splitlines()[0].split(", "), strict=False)) if seen else {}),
    }


def header(settings: argparse.Namespace) -> dict[str, object]:
    nvcc = tool("nvcc")
    released = re.search(r"release ([\d.]+)", _output(nvcc, "--version") or "") if nvcc else None
    return {
        "benchmark": "gpu",
        "commit": settings.commit or commit(),
        "sources": sources(),
        "versions": {
            **versions(),
            "triton": version("triton"),
            "torch_cuda": torch.version.cuda,
            "nvcc": released and released[1],
        },
        "device": device_facts(),
        "machine": machine(),
        "build": None if backend.native is None else backend.native.build_info(),
    }


def about(settings: argparse.Namespace) -> dict[str, object]:
    """What every step says of its own run."""
    given = {name: getattr(settings, name) for name in ("limit", "only", "seconds", "resume", "force")}
    return {"date": time.strftime("%Y-%m-%d"), "settings": given}


def check_installed() -> None:
    """What is measured is the installed package: it has to be this checkout's."""
    installed = Path(fastddpm.__file__).parent
    ours = [path.relative_to(ROOT / "fastddpm") for path in (ROOT / "fastddpm").rglob("*.py")]
    stale = [name for name in ours if not (installed / name).is_file()]
    stale += [
        n for n in ours if n not in stale and not filecmp.cmp(installed / n, ROOT / "fastddpm" / n, shallow=False)
    ]
    if stale:
        sys.exit(
            f"the fastddpm in {installed} is not this checkout's ({', '.join(map(str, stale[:3]))} differ); install it: "
            "make gpu, or pip install --no-build-isolation --no-deps ."
        )


# --------------------------------------------------------------------------------------------------- commands


LIVE: set[subprocess.Popen] = set()


def _end(process: subprocess.Popen) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def limited(command: Sequence[str], seconds: float, **options: object) -> tuple[int | None, str, float]:
    """(exit status, None if the time ran out; standard output and errors; seconds taken)."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)
        LIVE.add(process)
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            _end(process)
            process.wait()
            status = None
        LIVE.discard(process)
        log.seek(0)
        return status, log.read(), round(time.monotonic() - start, 1)


def tail(text: str, lines: int = 15) -> list[str]:
    return text.rstrip().splitlines()[-lines:]


def together(jobs: dict[str, Callable[[], dict]], workers: int, done: Callable[[str, dict], None]) -> None:
    """Run jobs side by side; done(name, result) is called for each as it ends, one at a time."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        names = {pool.submit(job): name for name, job in jobs.items()}
        try:
            for future in concurrent.futures.as_completed(names):
                done(names[future], future.result())
        except BaseException:  # interrupted: nothing that was started may go on using the GPU
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(LIVE):
                _end(process)
            raise


# ----------------------------------------------------------------------------------------------------- parity

# -P: the installed package is what imports, not the source tree beside it.
PYTHON = (sys.executable, "-P")
PARITY = """
import json, sys, torch
from fastddpm import parity
torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
json.dump(parity.run("cuda", [sys.argv[1]]), open(sys.argv[2], "w"))
"""


def parity_rows(name: str, clock: Clock) -> dict[str, object]:
    """One backend, in a process of its own: a kernel that goes astray takes its process along."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        status, output, seconds = limited((*PYTHON, "-c", PARITY, name, str(path)), clock.left())
        rows = json.loads(path.read_text()) if status == 0 else []
    over = [row for row in rows if not row[4] <= 1]
    passed = status == 0 and bool(rows) and not over
    return {
        "passed": passed, "status": status, "seconds": seconds, "over_their_bound": len(over), "rows": rows,
        **({} if status == 0 else {"output": tail(output)}),
    }  # fmt: skip


def pytest_command(tests: Iterable[str], junit: Path) -> list[str]:
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    return [*PYTHON, "-m", "pytest", *options, *tests]


def counted(junit: str) -> dict[str, object]:
    """What pytest's XML report counts, and what failed."""
    suites = list(xml.etree.ElementTree.fromstring(junit).iter("testsuite"))
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = {}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for outcome in (*case.findall("failure"), *case.findall("error")):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (outcome.get("message") or "").partition("\n")[0]
    return {**counts, "failed": failed}


def run_tests(arguments: Sequence[str], clock: Clock) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        status, output, seconds = limited(pytest_command(arguments, junit), clock.left(), cwd=ROOT)
        if status is not None and junit.is_file():
            counts = counted(junit.read_text(encoding="utf-8"))
        else:  # the time ran out, and the report is written last
            counts = {name: len(re.findall(rf"::.* {name.upper()}\b", output)) for name in ("passed", "failed")}
    ran = counts.get("tests", 0) - counts.get("skipped", 0)
    passed = status == 0 and ran > 0
    return {
        "passed": passed, "status": status, "seconds": seconds, "counts": counts,
        **({} if passed else {"output": tail(output)}),
    }  # fmt: skip


def run_parity(record: Record, settings: argparse.Namespace, clock: Clock) -> bool:
    found = {**about(settings), "passed": False, "ops": {}, "tests": {}}

    def done(name: str, result: dict) -> None:
        kind, _, what = name.partition(" ")
        found[kind][what] = result
        record.put(parity=found)
        more = f"{result['counts']}" if kind == "tests" else f"{len(result['rows'])} rows"
        print(f"{'ok    ' if result['passed'] else 'FAILED'} {name}: {more} in {result['seconds']} s", flush=True)
        for line in result.get("output", ()):
            print(f"    {line}")

    jobs = {f"ops {name}": lambda name=name: parity_rows(name, clock) for name in BACKENDS}
    jobs["tests test_gpu"] = lambda: run_tests(["tests/test_gpu.py"], clock)
    for op in OP_TESTS:
        jobs[f"tests test_{op}"] = lambda op=op: run_tests([f"tests/test_{op}.py", "-k", "cuda"], clock)
    cores = os.cpu_count() or 1
    workers = min(len(jobs), max(1, cores // 2))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))  # or the jobs' pools would fight for the cores
    together(jobs, workers, done)

    rows = [parity.Row(*row) for result in found["ops"].values() for row in result["rows"]]
    print(parity.table(sorted(rows)))
    found["passed"] = all(result["passed"] for kind in ("ops", "tests") for result in found[kind].values())
    record.put(parity=found)
    return found["passed"]


# ------------------------------------------------------------------------------------------------- benchmarks


def run_benchmarks(record: Record, settings: argparse.Namespace, clock: Clock) -> bool:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    results = record.earlier.get("benchmarks", {}).get("results", []) if settings.resume else []
    found = {**about(settings), "complete": False, "results": results}
    for result in kernels.run_on_gpu(settings, {(r["op"], r["case"]) for r in results}):
        results.append(json.loads(json.dumps(result)))
        record.put(benchmarks=found, bars=kernels.bars_of(results))
        kernels.table([result], "us")
        sys.stdout.flush()
        if clock.left() <= 0:
            print(f"\nstopped after {settings.limit:.0f} s; go on with --resume")
            break
    else:
        found["complete"] = not settings.only
    rows = kernels.bars_of(results)
    record.put(benchmarks=found, bars=rows)
    print()
    kernels.print_bars(rows)
    ours_failed = any(name.startswith("fastddpm") for r in results for name in r["left_out"])
    return found["complete"] and not ours_failed and all(row["reached"] for row in rows)


# ----------------------------------------------------------------------------------------------------- engine

# Network and batch size, those with most bars first
UNITS = (
    ("cifar10", 1), ("cifar10", 256), ("lsun256", 4), ("cifar10", 64), ("cifar10", 16), ("lsun256", 1), ("lsun256", 16)
)  # fmt: skip


SHORTEST = 120  # seconds without which no unit is begun
AROUND = 30  # seconds that a process takes before it announces its time, and after


def measuring(name: str, batch: int, to: Path, left: float, force: bool) -> list[str]:
    script = str(ROOT / "benchmarks" / "steps_per_sec.py")
    options = ["--device", "cuda", "--network", name, "--batch", str(batch), "--json", str(to)]
    return [sys.executable, script, *options, f"--minutes={(left - AROUND) / 60:.2f}", *(["--force"] if force else [])]


def whole(result: dict) -> bool:
    return not any(why.startswith(steps_per_sec.NO_TIME) for why in result["left_out"].values())


def run_engine(record: Record, settings: argparse.Namespace, clock: Clock) -> bool:
    """Each unit in a process of its own. A peer that isn't compiled in time is left out, and its unit measured anew by
    --resume: what was compiled by then is in Inductor's cache, so that the next run gets further."""
    results = record.earlier.get("engine", {}).get("results", []) if settings.resume else []
    found = {**about(settings), "complete": False, "results": results, "failed": {}}
    for name, batch in UNITS:
        unit = f"{name} at batch {batch}"
        earlier = [r for r in results if (r["network"], r["batch"]) == (name, batch)]
        if settings.only not in unit or any(map(whole, earlier)):
            continue
        if clock.left() <= SHORTEST:
            break
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            command = measuring(name, batch, path, clock.left(), settings.force)
            status, output, seconds = limited(command, clock.left())
            measured = json.loads(path.read_text(encoding="utf-8"))["results"] if path.is_file() else []
        if measured:
            results[:] = [r for r in results if r not in earlier] + measured
            steps_per_sec.table(measured)
        else:
            found["failed"][unit] = {"status": status, "seconds": seconds, "output": tail(output)}
            print(f"FAILED {unit}: {'out of time' if status is None else status}", *tail(output), sep="\n    ")
        sys.stdout.flush()
        record.put(engine=found, engine_bars=engine_bars(results, "cuda"))
    complete = {(r["network"], r["batch"]) for r in results if whole(r)} == set(UNITS)
    if not complete:
        print("\nnot everything was measured; go on with --resume")
    rows = engine_bars(results, "cuda")
    record.put(engine={**found, "complete": complete}, engine_bars=rows)
    print()
    print_table(["bar", "wanted", "measured", "reached", "where"], cells(rows))
    ours_failed = any(name in r["left_out"] for r in results for name in (F32, BF16))
    return complete and not ours_failed and all(row["reached"] or row["moonshot"] for row in rows)


# --------------------------------------------------------------------------------------------------- sanitize

DRIVER = ROOT / "tests" / "cuda_on_cpu" / "driver.cpp"


def compiling(nvcc: str, arch: str, source: Path, to: Path) -> list[str]:
    flags = ["-std=c++17", "-O3", "-lineinfo", "-DFASTDDPM_CUDA", *arithmetic_flags(), f"-I{ROOT / 'csrc'}"]
    return [nvcc, f"-gencode=arch=compute_{arch},code=sm_{arch}", *flags, "-c", str(source), "-o", str(to)]


def build_driver(nvcc: str, folder: Path, clock: Clock) -> tuple[Path, dict[str, object]]:
    """The driver and the kernels, each file by a compiler of its own; (the program, what came of it)."""
    files = [DRIVER, *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    objects = {str(path.relative_to(ROOT)): folder / f"{path.stem}.o" for path in files}
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    built = {"passed": True, "architecture": arch, "seconds": {}}

    def done(name: str, result: dict) -> None:
        built["seconds"][name] = result["seconds"]
        if result["status"] != 0:
            built.update(passed=False, failed=name, output=tail(result["output"]))

    def job(command: list[str]) -> Callable[[], dict]:
        return lambda: dict(zip(("status", "output", "seconds"), limited(command, clock.left()), strict=True))

    compile_all = {name: job(compiling(nvcc, arch, ROOT / name, to)) for name, to in objects.items()}
    together(compile_all, os.cpu_count() or 1, done)
    if built["passed"]:
        program = [nvcc, *map(str, objects.values()), "-o", str(folder / "driver")]
        together({"linking": job(program)}, 1, done)
    return folder / "driver", built


def right(output: str) -> int:
    """How many cases the driver says are right. A run of none proves nothing."""
    return len(re.findall(r"^ok ", output, re.MULTILINE))


def judged(status: int | None, output: str) -> dict[str, object]:
    """What compute-sanitizer printed: its summaries, the first of what it found, and whether it found nothing."""
    said = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    summaries = [line for line in said if re.match(r"[A-Z ]*SUMMARY:", line)]
    clean = bool(summaries) and all(re.match(r"[A-Z ]*SUMMARY: 0 ", line) for line in summaries)
    cases = right(output)
    result = {"passed": status == 0 and clean and cases > 0, "status": status, "cases": cases, "summary": summaries}
    if status is None:
        result["ended"] = "out of time"
    elif status == FOUND:
        result["ended"] = "errors were found"
    elif status != 0:
        result["ended"] = "the driver, or the tool itself, failed"
    if not result["passed"]:
        result.update(found=said[:40], output=tail(output))
    return result


def sanitizing(sanitizer: str, name: str, driver: Path) -> list[str]:
    return [sanitizer, "--tool", name, "--error-exitcode", str(FOUND), str(driver)]


def run_sanitize(record: Record, settings: argparse.Namespace, clock: Clock) -> bool:
    found = {**about(settings), "passed": False, "tools": {}}
    nvcc, sanitizer = tool("nvcc"), tool("compute-sanitizer")
    missing = [name for name, path in (("nvcc", nvcc), ("compute-sanitizer", sanitizer)) if path is None]
    missing += [] if DRIVER.is_file() else [str(DRIVER.relative_to(ROOT))]
    if missing:
        record.put(sanitize={**found, "missing": missing})
        print(f"FAILED: {' and '.join(missing)} not found; install the CUDA toolkit and put it on the PATH")
        return False

    def done(name: str, result: dict) -> None:
        found["tools"][name] = result
        record.put(sanitize=found)
        said = "; ".join([f"{result['cases']} cases right", *result["summary"], *filter(None, [result.get("ended")])])
        print(f"{'ok    ' if result['passed'] else 'FAILED'} {name}: {said}, {result['seconds']} s", flush=True)
        for line in () if result["passed"] else (*result.get("found", ()), *result.get("output", ())):
            print(f"    {line}")

    def plain(driver: Path) -> dict[str, object]:
        status, output, seconds = limited([str(driver)], min(120, clock.left()))
        return {
            "passed": status == 0 and right(output) > 0, "status": status, "cases": right(output), "summary": [],
            "output": tail(output), "seconds": seconds,
        }  # fmt: skip

    def check(name: str, driver: Path) -> dict[str, object]:
        status, output, seconds = limited(sanitizing(sanitizer, name, driver), clock.left())
        return {**judged(status, output), "seconds": seconds}

    with tempfile.TemporaryDirectory() as folder:
        driver, found["build"] = build_driver(nvcc, Path(folder), clock)
        record.put(sanitize=found)
        print(f"{'built ' if found['build']['passed'] else 'FAILED'} {found['build']['seconds']}", flush=True)
        if not found["build"]["passed"]:
            print("\n".join(found["build"]["output"]))
            return False
        done("none", plain(driver))  # first without a tool, every case
        together({name: lambda name=name: check(name, driver) for name in TOOLS}, len(TOOLS), done)
    found["passed"] = all(result["passed"] for result in found["tools"].values())
    record.put(sanitize=found)
    return found["passed"]


# -------------------------------------------------------------------------------------------------------- main

RUN = {"parity": run_parity, "benchmarks": run_benchmarks, "engine": run_engine, "sanitize": run_sanitize}


def arguments() -> argparse.ArgumentParser:
    head, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=tuple(STEPS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=510, help="seconds after which nothing new is begun (510)")
    parser.add_argument("--commit", help="what to call this checkout where git does not know it")
    timed = parser.add_argument_group("benchmarks and engine")
    timed.add_argument(
        "--only", default="", metavar="TEXT", help='only cases whose name contains this, like "batch 64"'
    )
    timed.add_argument("--seconds", type=float, default=1.5, help="time spent on each case of benchmarks (1.5)")
    timed.add_argument("--resume", action="store_true", help="keep the cases that an earlier run has measured")
    timed.add_argument("--force", action="store_true", help="measure although others use the GPU")
    parser.set_defaults(quick=False)
    return parser


def main() -> None:
    settings = arguments().parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            f"gpu.py: PyTorch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no CUDA device; "
            "run this on a machine with an NVIDIA GPU and a CUDA build of PyTorch"
        )
    check_installed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.py: ended by a signal"))  # by way of what ends the children
    clock = Clock(settings.limit)
    settings.out.mkdir(parents=True, exist_ok=True)
    facts = header(settings)
    record = Record(settings.out / f"{slug(facts['device']['name'])}.json", facts, settings.step)
    print(
        f"{settings.step} on {facts['device']['name']}, torch {torch.__version__}, commit {facts['commit']}", flush=True
    )
    passed = RUN[settings.step](record, settings, clock)
    print(f"\n{settings.step}: {'passed' if passed else 'FAILED'}; {record.path}")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
