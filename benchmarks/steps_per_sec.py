"""End to end: steps of the paper's chain a second, against the best that a user could pick instead, with the same weights.

    python benchmarks/steps_per_sec.py [--device cuda] [--network lsun256] [--batch 1 16] [--quick] [--json PATH] [--plot PATH]

A step is the whole of it: the network, the posterior mean, fresh noise. Parity first: each contestant's prediction is
held against the network in float64 at a few timesteps before anybody is timed, and who is wrong is left out. Then all
contestants take turns, and with them matrix products that say what this machine could do: "of matmul" is the share of
the step that the network's products, as it is written down, would take at the rate of the same precision.

fastddpm runs the loop that `fastddpm.sample` runs; diffusers, torch.compile and OpenVINO run that of DDPMPipeline, and
on a GPU the whole compiled step, captured into a CUDA graph by hand, has one of its own (`_contestants.py`). "setup" is
what each takes once: weights packed, code compiled, models converted, graphs captured. "images/s" is that of a first chain
of 1000 steps, set-up included. "memory" is the weights and what a step adds at its peak; "added" what the engine
keeps besides activations, in sizes of the caller's weights. "kernels" are those that a step runs on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from _bars import BF16, DEFAULTS, F32, cells, engine_bars
from _contestants import DTYPES, Contestant, Entrant, T, UNet2DModel, entrants, macs, synchronize, the_network
from _graphs import refuse_if_used
from _harness import Load, Timing, alternate, arguments, bar_chart, check_outputs, print_table, provenance, write_json
from torch import nn

import fastddpm
from fastddpm import UNet, backend

BATCHES = {
    ("cpu", "cifar10"): (1, 16),
    ("cpu", "lsun256"): (1,),
    ("cuda", "cifar10"): (1, 16, 64, 256),
    ("cuda", "lsun256"): (1, 4, 16),
}
PROBES = (980, 500, 20)  # timesteps at which predictions are compared
FEW = 2  # images of a batch that are compared
TOLERANCE = {"float32": 5e-5, "tf32": 5e-3, "bfloat16": 5e-2}  # rms error / rms of the prediction
PRODUCT = {"cpu": (2048, 1), "cuda": (8192, 10)}  # side of the matrices whose product is the limit, products in a turn
TURN = {"cpu": 25e9, "cuda": 16e12}  # a turn has as many steps as make so many multiply-adds, from 1
MOST = 50  # to this many


# --------------------------------------------------------------------------------------------------- memory


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def resident(field: str) -> int | None:
    """A line of what Linux tells of this process's memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    return None


def standing(device: torch.device) -> int | None:
    """Bytes in use that stay, after giving back what was freed; None where the system does not tell.

    On a GPU not those of a CUDA graph's activations, which torch counts as freed within the graph's own memory.
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory otherwise
    return resident("VmRSS")


def highest(call: Callable[[], object], device: torch.device) -> int | None:
    """The most that is in use during the call.

    On a GPU what torch has reserved by then: its peak of what is allocated knows nothing of what CUDA graphs use.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        call()
        return torch.cuda.memory_reserved()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # makes the peak, VmHWM, start again from now
    except OSError:
        return None
    call()
    return resident("VmHWM")


# --------------------------------------------------------------------------------------------------- one call

COLD = """
import sys, time, torch, fastddpm
network, batch, device, dtype = sys.argv[1:]
model = fastddpm.UNet.from_preset(network).eval().to(device)

class First(Exception):
    pass

def first(state):
    state.x.sum().item()  # has been computed, and not just queued
    raise First

start = time.perf_counter()
try:
    fastddpm.sample(model, int(batch), dtype=getattr(torch, dtype), progress=False, callback=first)
except First:
    print(time.perf_counter() - start)
"""


def cold(name: str, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds from a new process's first call of `fastddpm.sample` to the end of its first step, by dtype: medians of three."""

    def once(dtype: str) -> float:
        command = [sys.executable, "-P", "-c", COLD, name, str(batch), device.type, dtype]
        return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    return {dtype: statistics.median(once(dtype) for _ in range(3)) for dtype in DTYPES}


def own(model: UNet, batch: int, device: torch.device) -> float:
    """Milliseconds a step that a warm call of `fastddpm.sample` takes beside the network, of all its steps and itself."""
    idle, taken = copy.deepcopy(model), []
    with mock.patch.object(UNet, "body", lambda self, x, embedding: torch.zeros_like(x)):
        for _ in range(4):
            start = time.perf_counter()
            fastddpm.sample(idle, batch, batch_size=batch, dtype=torch.bfloat16, seed=0, progress=False)
            synchronize(device)
            taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[1:]) / T


# --------------------------------------------------------------------------------------------------- the run


class Late(BaseException):
    """The time for setting up is over. Not an Exception: compilers catch these."""

    def __str__(self) -> str:
        return "out of time"


@contextlib.contextmanager
def until(deadline: float | None) -> Iterator[None]:
    """Raise Late inside the block when time.monotonic() gets to the deadline.

    Not by a signal: OpenVINO leaves the process an alternate signal stack that it has freed.
    """
    if deadline is None:
        yield
        return
    target = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(Late)
    timer = threading.Timer(deadline - time.monotonic(), ctypes.pythonapi.PyThreadState_SetAsyncExc, target)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def exact(model: UNet, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """The network's predictions in float64, by timestep."""
    with backend.use("reference"):
        network = copy.deepcopy(model).double()
        return {t: network(x.double(), torch.full((len(x),), t, device=x.device)) for t in PROBES}


def error(contestant: Contestant, x: torch.Tensor, truth: dict[int, torch.Tensor]) -> float:
    """The largest rms error / rms of the prediction; raises ValueError where that is over the tolerance."""
    errors = []
    for t, y in truth.items():
        difference = contestant.predict(x, t)[:FEW].double() - y
        errors.append(float(difference.square().mean().sqrt() / y.square().mean().sqrt()))
    allowed = contestant.slack * TOLERANCE[contestant.precision]
    if not all(e <= allowed for e in errors):  # a NaN is not
        raise ValueError(f"wrong: error {max(errors):.2g}, allowed {allowed:.2g}; not timed")
    return max(errors)


def kernels(contestant: Contestant) -> int | None:
    """That a step runs on the GPU; None where the profiler sees none."""

    def run(steps: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            contestant.steps(steps)
        on_gpu = [e for e in profile.events() if e.device_type.name == "CUDA"]
        return sum(not (e.is_user_annotation or e.name.startswith(("Memcpy", "Memset"))) for e in on_gpu)

    return round((run(11) - run(1)) / 10) or None  # a chain's beginning has some of its own


def examined(
    entrant: Entrant, stack: contextlib.ExitStack, model: UNet, x: torch.Tensor, truth: dict[int, torch.Tensor]
) -> tuple[Contestant, dict[str, object]]:
    """Set a contestant up, and find everything about it but its speed; ValueError where its output is wrong."""
    device = x.device
    stood, held = standing(device), highest(lambda: None, device)
    start = time.perf_counter()
    contestant = stack.enter_context(entrant)
    contestant.steps(2)  # three steps, after which nothing is done for the first time
    setup = time.perf_counter() - start - 3 * contestant.steps(1)
    stands, peak = standing(device), highest(lambda: contestant.steps(1), device)
    return contestant, {
        "setup_s": max(0.0, setup),
        "memory": None if peak is None else peak - held,
        "added_of_weights": None if stands is None else max(0, stands - stood) / weight_bytes(model),
        "kernels": kernels(contestant) if device.type == "cuda" else None,
        "error": error(contestant, x, truth),
    }


def product(precision: str, device: torch.device) -> Callable[[], float]:
    """Seconds of one matrix product."""
    side, times = PRODUCT[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(DTYPES[precision]) for _ in range(3))

    def seconds() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(a, b, out=out)
        synchronize(device)
        return (time.perf_counter() - start) / times

    return seconds


def measure(model: UNet, name: str, batch: int, settings: argparse.Namespace) -> dict[str, object]:
    """All contestants with one network at one batch size, as it goes into the JSON."""
    deadline = None if settings.patience is None else time.monotonic() + settings.patience
    torch.compiler.reset()  # code compiled for earlier shapes would count against dynamo's limit of versions
    device, work = next(model.parameters()).device, macs(model) * batch
    per_turn = settings.steps or max(1, min(MOST, int(TURN[device.type] / work)))
    result = {
        "network": name,
        "batch": batch,
        "steps_per_turn": per_turn,
        "gmac_per_image": work / batch / 1e9,
        "cold_s": cold(name, batch, device),
        "own_ms": own(model, batch, device),
    }
    torch.manual_seed(batch)
    x = torch.randn(batch, *model.shape, device=device)
    truth, field, found, left_out = exact(model, x[:FEW]), {}, {}, {}
    with contextlib.ExitStack() as stack:
        for who, entrant in entrants(model, batch, settings.quick).items():
            try:
                with until(deadline):
                    field[who], found[who] = examined(entrant, stack, model, x, truth)
            except (Exception, Late) as problem:  # one contestant's failure is not the others'
                left_out[who] = f"{type(problem).__name__}: {problem}".splitlines()[0]
        calls = {who: lambda c=c: c.steps(per_turn) for who, c in field.items()}
        limits = {precision: product(precision, device) for precision in DTYPES}
        timings = alternate(
            {**calls, **limits},
            self_timed={**calls, **limits},
            rounds=settings.rounds,
            seconds=settings.seconds,
            least=0,
            label=f"{name}, batch {batch}",
        )
    flops = {precision: 2 * PRODUCT[device.type][0] ** 3 / timings[precision].median for precision in limits}
    step = {who: Timing([s / per_turn for s in timings[who].seconds]) for who in field}
    peers = {who: timing.median for who, timing in step.items() if not who.startswith("fastddpm")}
    contestants = {}
    for who, contestant in field.items():
        median, about = step[who].median, found[who]
        alike = [peers[peer] for peer in peers if field[peer].precision == contestant.precision]
        limit = flops.get(contestant.precision)
        mine = who.startswith("fastddpm")
        # The caller's network stays beside what the engine has made of it.
        memory = None if about["memory"] is None else about["memory"] + (weight_bytes(model) if mine else 0)
        contestants[who] = {
            **step[who].milliseconds(),
            "precision": contestant.precision,
            "steps_per_s": 1 / median,
            "images_per_s": batch / (about["setup_s"] + T * median),
            "setup_s": about["setup_s"],
            "memory_mb": None if memory is None else memory / 2**20,
            "added_of_weights": about["added_of_weights"] if mine else None,
            "kernels": about["kernels"],
            "share_of_matmul": None if limit is None else 2 * work / limit / median,
            "times_faster_than_diffusers": step[DEFAULTS].median / median if DEFAULTS in step else None,
            "times_faster_than_best_peer": min(peers.values()) / median if peers else None,
            "times_faster_than_best_alike": min(alike) / median if alike else None,
            "error": about["error"],
        }
    rates = {precision: rate / 1e9 for precision, rate in flops.items()}
    return {**result, "matmul_gflop_per_s": rates, "contestants": contestants, "left_out": left_out}


def table(results: list[dict]) -> None:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = []
    for result in results:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in result["matmul_gflop_per_s"].items())
        rows.append([f"{result['network']}, batch {result['batch']} (GFLOP/s of matmul here: {rates})"])
        for name, c in result["contestants"].items():
            rows.append(
                [
                    f"  {name}",
                    *(f"{c[key]:.4g}" for key in ("ms", "ms_p20", "ms_p80")),
                    f"{c['steps_per_s']:.3g}",
                    f"{c['images_per_s']:.3g}",
                    f"{c['setup_s']:.1f}",
                    cell(c["memory_mb"], ".0f"),
                    cell(c["added_of_weights"], ".2f"),
                    cell(c["kernels"], "d"),
                    cell(c["share_of_matmul"], ".0%"),
                    cell(c["times_faster_than_diffusers"], ".2f"),
                    cell(c["times_faster_than_best_peer"], ".2f"),
                    cell(c["times_faster_than_best_alike"], ".2f"),
                ]
            )
        rows += [[f"  left out: {name}: {why}"] for name, why in result["left_out"].items()]
        first = ", ".join(f"{seconds:.2f} s in {dtype}" for dtype, seconds in result["cold_s"].items())
        rows.append([f"  a cold call's first step: {first}; a warm call's own time: {result['own_ms']:.2f} ms a step"])
    header = ["", "ms a step", "p20", "p80", "steps/s", "images/s", "setup s", "memory MB", "added", "kernels"]
    print_table([*header, "of matmul", "x diffusers", "x best peer", "x same precision"], rows)


def parser() -> argparse.ArgumentParser:
    made = arguments("Time whole steps of the paper's chain, beside those who run the same network.")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--network", choices=("cifar10", "lsun256"), default="cifar10", help="the paper's, by image size")
    made.add_argument("--batch", type=int, nargs="+", help="images at once; default what the device's bars are about")
    made.add_argument("--steps", type=int, help="steps in one turn; default by how much a step computes")
    made.add_argument("--rounds", type=int, help="turns of each contestant; default what fits into --seconds")
    made.add_argument("--seconds", type=float, default=60.0, help="time spent on each batch size, after the set-up")
    made.add_argument("--patience", type=float, help="seconds that the set-up may take; default as many as it does")
    made.add_argument("--quick", action="store_true", help="without those that need minutes to set up (torch.compile)")
    return made


def main() -> None:
    settings = parser().parse_args()
    check_outputs(settings)
    for name in ("steps", "rounds"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            sys.exit(f"--{name}: got {getattr(settings, name)}; expected at least 1")
    if settings.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device")
    settings.batch = settings.batch or BATCHES[settings.device, settings.network]
    if min(settings.batch) < 1:
        sys.exit(f"--batch: got {settings.batch}; expected numbers >= 1")
    torch.set_grad_enabled(False)
    if backend.native is None:
        print(f"no compiled kernels here: {backend.unavailable('cpu')}")
    if UNet2DModel is None:
        print("diffusers is not installed, so those who run its network are missing (pip install diffusers)")
    if settings.device == "cuda":
        refuse_if_used(settings.force)

    load = Load(settings.force)
    model = the_network(settings.network).to(settings.device)
    results = [measure(model, settings.network, batch, settings) for batch in settings.batch]
    table(results)
    bars = engine_bars(results, settings.device)
    print()
    print_table(["bar", "wanted", "measured", "reached", "where"], cells(bars))
    loaded = load.report()
    if settings.json is not None:
        content = {"benchmark": "steps_per_sec", **provenance(settings), "load": loaded, "results": results}
        write_json(settings.json, {**content, "bars": bars})
    if settings.plot is not None:
        panels = {
            f"{r['network']}, batch {r['batch']}": {name: c["ms"] for name, c in r["contestants"].items()}
            for r in results
        }
        bar_chart(settings.plot, "Time of one step of the chain, shorter is better", "ms", panels)
    lost = {name: why for r in results for name, why in r["left_out"].items() if name in (F32, BF16)}
    if lost:
        sys.exit("; ".join(f"{name} is left out: {why}" for name, why in lost.items()))


if __name__ == "__main__":
    main()
