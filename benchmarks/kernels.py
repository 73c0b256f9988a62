"""Time every op separately: ms, GB/s, share of the copy bandwidth, times faster than the plain PyTorch composition.

    python benchmarks/kernels.py [--device cpu] [--only group_norm] [--json PATH] [--plot PATH] [--quick]

Parity first: each contestant's output is compared with float64 before any timing. On a CPU a wrong output ends the run.
On a GPU, where a run is long, its contestant is left out and the JSON gives the reason. All contestants of a case,
including a plain copy, then take turns over the same buffers. The buffers exceed every cache: 256 MB on a CPU, more than
four times the L2 on a GPU.

"kernel" is the compiled kernel called directly with a preallocated output, "op" the public function, which allocates
its result and passes PyTorch's dispatcher. PyTorch's group_norm cannot write into a given tensor without a copy; in
"out=" the last operation of the composition has a preallocated output and the operations before it allocate. GB/s counts
the bytes that must move, regardless of the bytes that a contestant really moves: each input read once, each output
written once. For a tiny op it only restates the time per call.

On a GPU times are those of CUDA graphs, which exclude the host's cost of a call, and "fastddpm cuda" and "fastddpm
triton" are the public op by either backend. `gpu.py ops` runs the same cases within its time limit.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator

import torch
from _bars import BATCH_1, BATCHES, LARGE_STEP, ON_CHIP, OURS, SMALL_STEP, TWO_STAGE, bars, print_bars
from _cases import (
    COMPILED,
    COPY,
    PLAIN,
    Case,
    DDPMScheduler,
    Tensors,
    cifar10_norms,
    ddpm_step,
    ddpm_step_in_graph,
    examine,
    examined,
    group_norm_silu,
    group_norm_silu_backward,
    philox_normal,
    timestep_embedding,
)
from _harness import (
    Load,
    Rotation,
    Timing,
    alternate,
    arguments,
    bar_chart,
    check_outputs,
    in_round,
    print_table,
    provenance,
    refuse_if_used,
    write_json,
)
from tqdm.auto import tqdm

from fastddpm import backend

MB = 1 << 20
# On a GPU: most sets of buffers for small ops (which may all fit into the L2), milliseconds of a graph, rounds, and seconds
# of a case without compilers
MOST_SETS, REPLAYED, ROUNDS, A_CASE = 1000, 5, 3, 3
CL, CONTIGUOUS = torch.channels_last, torch.contiguous_format
BF16 = torch.bfloat16

CPU_CASES: list[tuple[Callable[..., Case], tuple]] = [
    *(
        (group_norm_silu, (shape, dtype, layout))
        for layout in (CL, CONTIGUOUS)
        for dtype in (torch.float32, BF16)
        for shape in ((16, 128, 32, 32), (16, 256, 16, 16))
    ),
    *((group_norm_silu, ((1, 128, 32, 32), dtype, CL)) for dtype in (torch.float32, BF16)),
    (group_norm_silu_backward, ((16, 128, 32, 32), torch.float32, CL)),
    (ddpm_step, ((256, 3, 32, 32),)),
    (timestep_embedding, (256, 128)),
    (philox_normal, ((256, 3, 32, 32),)),
]


def gpu_cases(device: str = "cuda") -> Iterator[Case]:
    """Yield the GPU's cases, the most informative first, in case time runs out."""
    norms = cifar10_norms()
    at = {"device": device}
    # 64 MiB and more, with groups that fit into the shared memory of an SM or of a few
    large = {(256, 128, 32, 32), (64, 256, 64, 64), (16, 256, 128, 128)}
    large |= {(256, *shape) for shape in norms if 512 * shape[0] * shape[1] * shape[2] >= 64 * MB}
    # A batch of the network's norms; its large ones count for both bars.
    wanted = {
        (batch, *shape): ((BATCHES[batch],), norms[shape]) for batch in reversed(BATCHES) for shape in sorted(norms)
    }
    for shape in sorted(large):
        names, calls = wanted.pop(shape, ((), 0))
        yield group_norm_silu(shape, BF16, CL, **at, bars=(ON_CHIP, *names), calls=calls)
    for shape in ((4, 128, 256, 256), (16, 128, 256, 256)):
        yield group_norm_silu(shape, BF16, CL, **at, bars=(TWO_STAGE,))
    yield ddpm_step_in_graph((64, 3, 256, 256), **at, bars=(LARGE_STEP,))
    yield ddpm_step_in_graph((256, 3, 32, 32), **at, bars=(SMALL_STEP,))
    for shape in ((256, 128, 32, 32), (64, 256, 16, 16), (4, 128, 256, 256)):
        yield group_norm_silu_backward(shape, BF16, CL, **at)
    for shape in ((256, 3, 32, 32), (64, 3, 256, 256)):
        yield philox_normal(shape, **at)
    yield timestep_embedding(256, 128, **at, sets=100)
    for shape in sorted(norms):  # only the time of a graph's node counts; without compiled peers
        yield group_norm_silu(
            (1, *shape), BF16, CL, **at, bars=(BATCH_1,), calls=norms[shape], sets=100, compiled=False
        )
    for shape, (names, calls) in wanted.items():
        yield group_norm_silu(shape, BF16, CL, **at, bars=names, calls=calls)


def measure(case: Case, settings: argparse.Namespace) -> dict[str, Timing]:
    """Return the CPU's cases."""
    buffers = Rotation(case.make, (64 if settings.quick else 256) * MB)

    def copy() -> None:
        buffers_now = buffers.next()
        buffers_now[case.out].copy_(buffers_now[case.source])

    calls = {name: lambda call=c.call: call(*buffers.next()) for name, c in case.contestants.items()}
    return alternate({COPY: copy, **calls}, seconds=seconds_for(settings), label=str(case))


def seconds_for(settings: argparse.Namespace) -> float:
    return settings.seconds / (5 if settings.quick else 1)


def summary(case: Case, errors: dict[str, float], timings: dict[str, Timing]) -> dict[str, object]:
    """Return a case's entry in the JSON."""
    out = case.make()[case.out]
    moved = {COPY: 2 * out.numel() * out.element_size(), **{name: c.moved for name, c in case.contestants.items()}}
    rate = {name: moved[name] / timing.median / 1e9 for name, timing in timings.items()}
    plain = timings[PLAIN].median if PLAIN in timings else None
    contestants = {
        name: {
            **timing.milliseconds(),
            "gb_per_s": rate[name],
            "share_of_copy": rate[name] / rate[COPY],
            "times_faster_than_torch": None if name == COPY or plain is None else plain / timing.median,
            "error": errors.get(name),
        }
        for name, timing in timings.items()
    }
    return {"op": case.op, "case": case.name, "contestants": contestants}


def sets_needed(case: Case, cache: int) -> int:
    """Return the number of sets that exceeds four times the cache, limited for small ops."""
    touched = case.touched or min(c.moved for c in case.contestants.values())
    return case.sets or min(MOST_SETS, max(2, math.floor(4 * cache / touched) + 1))


def in_a_graph(call: Callable[..., object], sets: list[Tensors], reset: Callable[[], None]) -> float:
    """Return the seconds of a call, from replays of a CUDA graph of calls over all sets in turn."""
    from triton.testing import do_bench_cudagraph  # torch for CPUs does not include it

    reset()
    torch.cuda.synchronize()  # its streams do not wait for this one
    # Results of a turn stay allocated until its end, so that no two calls share memory.
    run = lambda: [call(*buffers) for buffers in sets]  # noqa: E731
    return do_bench_cudagraph(run, rep=REPLAYED, return_mode="median") / 1e3 / len(sets)


_failed: list[Exception] = []  # keeps the remains of failed captures alive: torch's allocator may refer to them


def measure_on_gpu(case: Case, cache: int, compiled: bool = True) -> dict[str, object]:
    """Check and time a case. A contestant that is wrong, fails or cannot be captured is listed in "left_out"."""
    torch.compiler.reset()  # code compiled for earlier shapes would count against dynamo's limit of versions
    result = {"op": case.op, "case": case.name, "contestants": {}, "bars": case.bars, "calls": case.calls}
    errors = {}
    calls = {COPY: lambda *buffers: buffers[case.out].copy_(buffers[case.source])}
    calls |= {name: c.call for name, c in case.contestants.items() if compiled or not name.startswith(COMPILED)}
    left_out = dict.fromkeys((name for name in case.contestants if name not in calls), "no time left to compile it")
    taken = {name: [] for name in calls}
    try:
        sets = [case.make() for _ in range(sets_needed(case, cache))]
        for r in range(ROUNDS):
            for name in in_round(calls, r):
                try:
                    if name not in errors and name != COPY:
                        errors[name] = examined(case, name)
                    taken[name].append(in_a_graph(calls[name], sets, case.reset))
                except Exception as error:  # the other contestants may still run
                    left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    del calls[name]
                    _failed.append(error)
        result |= {**summary(case, errors, {name: Timing(taken[name]) for name in calls}), "sets": len(sets)}
    except Exception as error:  # such as too little memory: the other cases may still run
        left_out = dict.fromkeys(case.contestants, f"{type(error).__name__}: {error}".splitlines()[0])
    return {**result, "left_out": left_out}


def run_on_gpu(only: str = "", left: Callable[[], float] = lambda: math.inf) -> Iterator[dict[str, object]]:
    """Yield the results of the GPU's cases. left() returns the seconds left; compilers get those not used by our ops."""
    torch.backends.cudnn.benchmark = True
    cache, stream = torch.cuda.get_device_properties("cuda").L2_cache_size, torch.cuda.Stream()
    # Autograd runs a backward on its forward's stream, and a graph contains only the captured stream's work.
    torch.cuda.graph.default_capture_stream = stream
    with torch.cuda.stream(stream):
        for n, case in enumerate(gpu_cases()):
            if left() <= 0:
                break
            if only in str(case):
                yield measure_on_gpu(case, cache, left() > (len(planned()) - n) * A_CASE)
                torch.cuda.empty_cache()


def run_hot() -> None:
    """Run the norm, on chip and in two stages, and the step, once each, between a profiler's start and stop."""
    cases, profiler = list(gpu_cases()), torch.cuda.cudart()
    for bar in (ON_CHIP, TWO_STAGE, LARGE_STEP):
        case = next(case for case in cases if bar in case.bars)
        call, buffers = case.contestants[OURS].call, case.make()
        call(*buffers)  # loads the kernel
        torch.cuda.synchronize()
        profiler.cudaProfilerStart()
        call(*buffers)
        torch.cuda.synchronize()
        profiler.cudaProfilerStop()


def table(results: list[dict], unit: str = "ms") -> None:
    scale = {"ms": 1, "us": 1e3}[unit]
    rows = []
    for result in results:
        rows.append([f"{result['op']} {result['case']}"])
        for name, c in result["contestants"].items():
            faster = c["times_faster_than_torch"]
            rows.append(
                [
                    f"  {name}",
                    f"{scale * c['ms']:.3f}",
                    f"{scale * c['ms_p20']:.3f}",
                    f"{scale * c['ms_p80']:.3f}",
                    f"{c['gb_per_s']:.1f}",
                    f"{c['share_of_copy']:.0%}",
                    "" if faster is None else f"{faster:.2f}",
                ]
            )
        rows += [[f"  left out: {name}: {why}"] for name, why in result.get("left_out", {}).items()]
    print_table(["", unit, "p20", "p80", "GB/s", "of copy", "x torch"], rows)


@functools.cache
def planned() -> tuple[dict[str, object], ...]:
    """Return op, name and bars of every GPU case, from meta tensors, since only shapes are needed."""
    return tuple({"op": case.op, "case": case.name, "bars": case.bars} for case in gpu_cases("meta"))


def bars_of(results: list[dict]) -> list[dict]:
    """Return the GPU's bars, measured as far as the results contain their cases."""
    return bars(results, planned())


def main() -> None:
    parser = arguments("Time every op beside a copy of the same bytes and the plain PyTorch composition.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose op and name contain this")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case, on a CPU")
    parser.add_argument("--quick", action="store_true", help="a fifth of the time, on a CPU a quarter of the buffers")
    settings = parser.parse_args()
    check_outputs(settings)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    on_gpu = settings.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device")
    for name in ("cuda", "triton") if on_gpu else ("cpu",):
        if backend.unavailable_reason(name):
            print(f"no {name} kernels here: {backend.unavailable_reason(name)}")

    load = Load(settings.force)
    results = []
    if on_gpu:
        refuse_if_used(settings.force)
        for result in run_on_gpu(settings.only):
            results.append(result)
            table([result], "us")
        print_bars(bars_of(results))
    else:
        if DDPMScheduler is None:
            print("diffusers is not installed: its DDPMScheduler.step is missing below")
        cases = [build(*given) for build, given in CPU_CASES]
        cases = [case for case in cases if settings.only in str(case)]
        for case in tqdm(cases, desc="cases", unit="case", disable=None):
            results.append(summary(case, examine(case), measure(case, settings)))
        table(results)
    if not results:
        sys.exit(f"--only: no case contains {settings.only!r}")
    loaded = load.report()
    if settings.json is not None:
        write_json(settings.json, {"benchmark": "kernels", **provenance(settings), "load": loaded, "results": results})
    if settings.plot is not None:
        panels = {f"{r['op']} {r['case']}": {name: c["ms"] for name, c in r["contestants"].items()} for r in results}
        bar_chart(settings.plot, "Time of each op, shorter is better", "ms", panels)


if __name__ == "__main__":
    main()
