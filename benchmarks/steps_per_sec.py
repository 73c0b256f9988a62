"""Measure whole steps of the paper's chain a second, and compare with the best alternatives, with the same weights.

    python benchmarks/steps_per_sec.py [--isa avx2] [--device cuda] [--network lsun256] [--batch 1 16]
                                       [--quick] [--minutes 12] [--json PATH] [--plot PATH]

A run ends within the minutes that it announces. Each batch size has a share of them, and a quarter of the share is
reserved for the timed rounds. A contestant that no longer fits is left out. So is a dtype that would take absurdly long on
this processor, by a short probe (`_contestants.refuse_if_absurd`).

`--isa avx2` caps every contestant to AVX2, so that a machine with wider vectors measures both kinds of processor (`_isa.py`).

A step is the network, the posterior mean and fresh noise. Parity first: each contestant's prediction is compared with the
network in float64 at a few timesteps before any timing, and a wrong contestant is left out. Then all contestants take
turns, together with matrix products that measure this machine's limit: "of matmul" is the share of the step that the
network's products, as written down, would take at the rate of the same precision.

fastddpm runs the loop of `fastddpm.sample`; diffusers, torch.compile and OpenVINO run that of DDPMPipeline. On a GPU the
whole compiled step, captured into a CUDA graph by hand, has a separate loop (`_contestants.py`). "setup" is the one-time
cost: weights packed, code compiled, models converted, graphs captured. "images/s" is that of a first chain of 1000 steps,
set-up included. "memory" is the weights and the peak that a step adds; "added" is the engine's memory besides activations,
in sizes of the caller's weights. "kernels" are those that a step runs on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from _bars import BF16, DEFAULTS, F32, engine_bars, print_bars
from _contestants import (
    DTYPES,
    Contestant,
    Entrant,
    LeftOut,
    T,
    UNet2DModel,
    entrants,
    macs,
    refuse_if_absurd,
    synchronize,
    the_network,
)
from _harness import (
    Clock,
    Load,
    Timing,
    arguments,
    bar_chart,
    check_outputs,
    in_round,
    print_table,
    provenance,
    refuse_if_used,
    write_json,
)
from _isa import CAP, capped, set_isa
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
TURN = {"cpu": 25e9, "cuda": 16e12}  # multiply-adds of a turn, which sets its steps, 1 to MOST
MOST = 50
ENOUGH_ROUNDS = 6  # if time is too short for these, turns have fewer steps
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20
MINUTES = {"cpu": 12, "cuda": 60}  # time limit of a run
QUICK_MINUTES = 4
NO_TIME = "no time left"


# --------------------------------------------------------------------------------------------------- memory


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def resident(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes, or None if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) << 10
    return None


def standing(device: torch.device) -> int | None:
    """Return the bytes in use after releasing freed memory, or None if the system does not report them.

    On a GPU this excludes a CUDA graph's activations, which torch counts as freed within the graph's own memory.
    """
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # otherwise glibc retains freed memory
    return resident("VmRSS")


def highest(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the peak of the bytes in use during the call, or None if the system does not report it.

    On a GPU this is torch's reserved memory: its peak of allocated memory does not include that of CUDA graphs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        call()
        return torch.cuda.memory_reserved()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
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


def cold(name: str, batch: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Return the seconds from a new process's first call of `fastddpm.sample` to the end of its first step, by dtype.

    They are medians of three calls, or of as many as fit into `seconds`, at least one. The run ends if a call takes longer
    than a minute plus ten times `seconds`.
    """

    def once(dtype: str) -> float:
        command = [sys.executable, "-P", "-c", COLD, name, str(batch), device.type, dtype]
        return float(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60 + 10 * seconds).stdout
        )

    start, found = time.monotonic(), {dtype: [] for dtype in DTYPES}
    for n in (1, 2, 3):
        for dtype, taken in found.items():
            taken.append(once(dtype))
        if (time.monotonic() - start) * (n + 1) / n > seconds:
            break
    return {dtype: statistics.median(taken) for dtype, taken in found.items()}


def own(model: UNet, batch: int, device: torch.device, seconds: float) -> float:
    """Return the milliseconds a step of a warm call of `fastddpm.sample` outside the network, the call's start included.

    It is the median of three calls, or of as many as fit into `seconds`, at least one.
    """
    idle, taken = copy.deepcopy(model), []
    with mock.patch.object(UNet, "body", lambda self, x, embedding: torch.zeros_like(x)):
        while len(taken) < 2 or (len(taken) < 4 and sum(taken) < seconds):
            start = time.perf_counter()
            fastddpm.sample(idle, batch, batch_size=batch, dtype=torch.bfloat16, seed=0, progress=False)
            synchronize(device)
            taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken[1:]) / T


# --------------------------------------------------------------------------------------------------- the run


class Late(BaseException):
    """The end of the time for set-up. Not an Exception, since compilers catch these."""

    def __str__(self) -> str:
        return ": ".join([NO_TIME, *self.args])


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Late inside the block after `seconds`.

    This uses no signal: while OpenVINO compiles a model, this thread's signal stack may be one that OpenVINO has freed.
    """
    target = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(Late)
    timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, target)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a Late raised by now arrives here, and not after the block


def exact(model: UNet, x: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return the network's predictions in float64, by timestep."""
    with backend.use("reference"):
        network = copy.deepcopy(model).double()
        return {t: network(x.double(), torch.full((len(x),), t, device=x.device)) for t in PROBES}


def error(contestant: Contestant, x: torch.Tensor, truth: dict[int, torch.Tensor]) -> float:
    """Return the largest rms error / rms of the prediction. Raise LeftOut if it exceeds the tolerance."""
    errors = []
    for t, y in truth.items():
        difference = contestant.predict(x, t)[:FEW].double() - y
        errors.append(float(difference.square().mean().sqrt() / y.square().mean().sqrt()))
    allowed = contestant.slack * TOLERANCE[contestant.precision]
    if not all(e <= allowed for e in errors):  # also true for NaN
        raise LeftOut(f"wrong: error {max(errors):.2g}, allowed {allowed:.2g}; not timed")
    return max(errors)


def kernels(contestant: Contestant) -> int | None:
    """Return the number of kernels that a step runs on the GPU, or None if the profiler sees none."""

    def run(steps: int) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            contestant.steps(steps)
        on_gpu = [e for e in profile.events() if e.device_type.name == "CUDA"]
        return sum(not (e.is_user_annotation or e.name.startswith(("Memcpy", "Memset"))) for e in on_gpu)

    return round((run(11) - run(1)) / 10) or None  # a chain's start runs additional kernels


def examined(
    entrant: Entrant,
    stack: contextlib.ExitStack,
    model: UNet,
    x: torch.Tensor,
    truth: dict[int, torch.Tensor],
    left: Callable[[], float],
) -> tuple[Contestant, dict[str, object]]:
    """Set a contestant up and measure everything except its exact speed.

    Raise LeftOut if its output is wrong, and Late if the seconds left are too few for the remaining work.
    """
    device = x.device
    stood, held = standing(device), highest(lambda: None, device)
    start, taken = time.perf_counter(), []
    contestant = stack.enter_context(entrant)
    warm = 2 if device.type == "cuda" else 1  # after the first step; torch captures CUDA graphs in the second
    contestant.steps(warm)
    setup = time.perf_counter() - start
    stands, peak = standing(device), highest(lambda: taken.append(contestant.steps(1)), device)
    (step,) = taken
    if step * (len(truth) + 2 * FEWEST_ROUNDS) > left():
        raise Late(f"a step takes {step:.3g} s")
    return contestant, {
        "setup_s": max(0.0, setup - (1 + warm) * step),
        "memory": None if peak is None else peak - held,
        "added_of_weights": None if stands is None else max(0, stands - stood) / weight_bytes(model),
        "kernels": kernels(contestant) if device.type == "cuda" else None,
        "error": error(contestant, x, truth),
        "rough_step_s": step,
    }


def product(precision: str, device: torch.device) -> Callable[[], float]:
    """Return the seconds of one matrix product."""
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


def limits(device: torch.device) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Return precision -> a call that times a matrix product, and the reasons for omitted precisions."""
    found, left_out = {}, {}
    for precision in DTYPES:
        side, _ = PRODUCT[device.type]
        try:
            if device.type == "cpu":
                refuse_if_absurd(f"a product of {side} x {side} matrices", precision, 0, side**3)
            found[precision] = product(precision, device)
        except LeftOut as problem:
            left_out[f"the limit in {precision}"] = str(problem)
    return found, left_out


def in_turn(
    calls: dict[str, Callable[[], float]], rounds: int, left: Callable[[], float], say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return every call's results, one for each round; rounds start with different calls, and end if time runs out."""
    taken, longest, said = {who: [] for who in calls}, 0.0, time.monotonic()
    for n in range(rounds):
        if n >= FEWEST_ROUNDS and left() < longest:
            break
        start = time.monotonic()
        for who in in_round(calls, n):
            taken[who].append(calls[who]())
        longest = max(longest, time.monotonic() - start)
        if time.monotonic() - said > 15:
            say(f"round {n + 1} of {rounds}")
            said = time.monotonic()
    return taken


def figures(
    field: dict[str, Contestant],
    found: dict[str, dict[str, object]],
    step: dict[str, Timing],
    flops: dict[str, float],
    model: UNet,
    batch: int,
) -> dict[str, dict[str, object]]:
    """Return contestant -> its entry in the JSON. `flops`: the limit's matrix products, in FLOP a second."""
    work = sum(macs(model)) * batch
    peers = {who: timing.median for who, timing in step.items() if not who.startswith("fastddpm")}
    contestants = {}
    for who, contestant in field.items():
        median, about = step[who].median, found[who]
        alike = [peers[peer] for peer in peers if field[peer].precision == contestant.precision]
        limit = flops.get(contestant.precision)
        mine = who.startswith("fastddpm")
        # The caller's network stays in memory beside the engine's weights.
        memory = None if about["memory"] is None else about["memory"] + (weight_bytes(model) if mine else 0)
        contestants[who] = {
            **step[who].milliseconds(),
            "precision": contestant.precision,
            "isa": contestant.isa,
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
    return contestants


def measure(
    model: UNet,
    name: str,
    batch: int,
    everybody: dict[str, Entrant],
    clock: Clock,
    later: float,
    tried: dict[str, float],
    calls: bool = True,
) -> dict[str, object]:
    """Measure contestants with one network at one batch size. Return the entry in the JSON.

    Args:
        later: Seconds of the clock reserved for later measurements.
        tried: Contestant -> seconds of its set-up at earlier batch sizes, finished or not; updated.
        calls: Also time whole calls of `sample`.
    """

    def left() -> float:
        return clock.left() - later

    def say(text: str) -> None:
        clock.say(f"batch {batch}: {text}")

    gc.collect()
    gc.freeze()  # imported modules stay: collections around the memory measurements can skip them
    torch.compiler.reset()  # code compiled for earlier shapes would count against dynamo's limit of versions
    device, share = next(model.parameters()).device, left()
    work = sum(macs(model)) * batch
    result = {"network": name, "batch": batch, "gmac_per_image": work / batch / 1e9}
    if calls:
        say(f"timing first calls in new processes, and the loop without a network; this batch size has {share:.0f} s")
        result["cold_s"] = cold(name, batch, device, share / 10)
        result["own_ms"] = own(model, batch, device, share / 20)
    torch.manual_seed(batch)
    x = torch.randn(batch, *model.shape, device=device)
    truth, field, found = exact(model, x[:FEW]), {}, {}
    products, left_out = limits(device)
    for_products = sum(PRODUCT[device.type][1] * call() for call in products.values())

    def round_of(per_turn: int) -> float:
        """Return the approximate seconds of a round. Each turn begins with a step that is not timed."""
        return for_products + (1 + per_turn) * sum(found[who]["rough_step_s"] for who in field)

    def free() -> float:
        """Return the seconds left for set-ups, without a quarter of the share or, if longer, the fewest rounds and one."""
        return left() - max((FEWEST_ROUNDS + 1) * round_of(1), share / 4)

    for who, why in left_out.items():
        say(f"{who}: left out: {why}")
    with contextlib.ExitStack() as stack:
        for n, (who, entrant) in enumerate(everybody.items(), 1):
            say(f"setting up {who}")
            start = time.monotonic()
            allowed = free() if n == len(everybody) else free() / 2  # leave time for the contestants after this one
            try:
                if 0 < allowed < tried.get(who, 0):
                    raise Late(f"its set-up took {tried[who]:.0f} s at an earlier batch size")
                with within(allowed):
                    contestant, about = examined(entrant, stack, model, x, truth, free)
                field[who], found[who] = contestant, about
                layers = ", ".join(f"{n} {isa}" for isa, n in (contestant.isa or {}).items())
                say(
                    f"{who}: set up in {time.monotonic() - start:.1f} s, error {about['error']:.2g}, "
                    f"roughly {1e3 * about['rough_step_s']:.3g} ms a step{layers and f'; layers: {layers}'}"
                )
            except (Exception, Late) as problem:  # the other contestants may still run
                kind = "" if isinstance(problem, (LeftOut, Late)) else f"{type(problem).__name__}: "
                left_out[who] = f"{kind}{problem}".splitlines()[0]
                say(f"{who}: left out: {left_out[who]}")
            tried[who] = max(tried.get(who, 0), time.monotonic() - start)
        for who in reversed(list(field)):  # contestants whose set-up left too little time
            if FEWEST_ROUNDS * round_of(1) > left():
                del field[who]
                left_out[who] = NO_TIME
                say(f"{who}: left out: {NO_TIME}")
        per_turn = max(1, min(MOST, int(TURN[device.type] / work)))
        while per_turn > 1 and ENOUGH_ROUNDS * round_of(per_turn) > left():
            per_turn -= 1
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(left() / round_of(per_turn))))
        say(
            f"up to {rounds} rounds of about {round_of(per_turn):.1f} s: "
            f"{len(field)} contestants, {per_turn} steps of each in turn"
        )
        turns = {who: lambda c=c: c.steps(per_turn) for who, c in field.items()}
        taken = in_turn({**turns, **products}, rounds, left, say)
    timings = {who: Timing(seconds) for who, seconds in taken.items()}
    flops = {precision: 2 * PRODUCT[device.type][0] ** 3 / timings[precision].median for precision in products}
    step = {who: Timing([s / per_turn for s in timings[who].seconds]) for who in field}
    contestants = figures(field, found, step, flops, model, batch)
    rates = {precision: rate / 1e9 for precision, rate in flops.items()}
    return {
        **result,
        "steps_per_turn": per_turn,
        "matmul_gflop_per_s": rates,
        "contestants": contestants,
        "left_out": left_out,
    }


def table(results: list[dict]) -> None:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    header = ["", "ms a step", "p20", "p80", "steps/s", "images/s", "setup s", "memory MB", "added", "kernels"]
    header += ["of matmul", "x diffusers", "x best peer", "x same precision"]
    for result in results:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in result["matmul_gflop_per_s"].items())
        rounds = max((c["rounds"] for c in result["contestants"].values()), default=0)
        unit = f"{result['network']}, batch {result['batch']}, {rounds} rounds"
        rows = [[f"{unit} (GFLOP/s of matmul here: {rates})"]]
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
        print_table(header, rows)
        for name, why in result["left_out"].items():
            print(f"  left out: {name}: {why}")
        if "cold_s" in result:
            first = ", ".join(f"{seconds:.2f} s in {dtype}" for dtype, seconds in result["cold_s"].items())
            print(f"  a cold call's first step: {first}; a warm call's own time: {result['own_ms']:.2f} ms a step")
        print(flush=True)


def parser() -> argparse.ArgumentParser:
    made = arguments("Time whole steps of the paper's chain, compared with other implementations of the network.")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--network", choices=("cifar10", "lsun256"), default="cifar10", help="the paper's, by image size")
    made.add_argument(
        "--isa", choices=("native", "avx2"), default="native", help="avx2: every contestant is capped to it"
    )
    made.add_argument(
        "--batch", type=int, nargs="+", help="images at once; default the batch sizes of the device's bars"
    )
    made.add_argument(
        "--quick", action="store_true", help="without contestants that need minutes to set up (torch.compile)"
    )
    made.add_argument(
        "--minutes",
        type=float,
        help=f"time limit of the run; default {QUICK_MINUTES} with --quick, else {MINUTES['cpu']}, on a GPU {MINUTES['cuda']}",
    )
    return made


def main() -> None:
    settings = parser().parse_args()
    check_outputs(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device")
    settings.batch = settings.batch or BATCHES[settings.device, settings.network]
    if min(settings.batch) < 1:
        sys.exit(f"--batch: got {settings.batch}; expected numbers >= 1")
    if settings.minutes is None:
        settings.minutes = QUICK_MINUTES if settings.quick else MINUTES[settings.device]
    if not settings.minutes > 0:
        sys.exit(f"--minutes: got {settings.minutes:g}; expected a number > 0")
    set_isa(settings.isa, settings.device)
    clock = Clock(60 * settings.minutes)
    clock.say(
        f"{settings.network} on {settings.device}, {settings.isa}, batch {', '.join(map(str, settings.batch))}: "
        f"this ends within {settings.minutes:g} minutes"
    )
    torch.set_grad_enabled(False)
    if backend.native is None:
        print(f"no compiled kernels here: {backend.unavailable_reason('cpu')}")
    if UNet2DModel is None:
        print("diffusers is not installed, so contestants with its network are missing (pip install diffusers)")
    if settings.device == "cuda":
        refuse_if_used(settings.force)

    load = Load(settings.force)
    isa = {"asked": settings.isa, "variables": {name: os.environ[name] for name in CAP if name in os.environ}}
    if settings.isa == "avx2":
        isa["capped"] = capped(settings.quick)
        clock.say("every contestant is capped to AVX2, except for a part of OpenVINO; the evidence:")
        for what, known in isa["capped"].items():
            clock.say(f"  {what}: {known}")
    model = the_network(settings.network).to(settings.device)
    device, results, tried = torch.device(settings.device), [], {}
    content = {"benchmark": "steps_per_sec", **provenance(settings), "isa": isa, "load": None, "results": results}
    # Time reserved for the end: results are written, and a call into a library cannot be interrupted.
    end = clock.seconds / 20
    weights = [1 + min(batch, 16) / 16 for batch in settings.batch]  # for set-up, and for steps
    for i, batch in enumerate(settings.batch):
        later = end + (clock.left() - end) * sum(weights[i + 1 :]) / sum(weights[i:])
        everybody = entrants(model, batch, settings.quick)
        results.append(measure(model, settings.network, batch, everybody, clock, later, tried))
        table(results[-1:])
        if settings.json is not None:
            write_json(settings.json, content, quiet=True)
    bars = engine_bars(results, "avx2" if backend.emulated_reason(device, torch.bfloat16) else device.type)
    print_bars(bars)
    content["load"] = load.report()
    if settings.json is not None:
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
