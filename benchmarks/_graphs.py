"""Timing on a GPU: a contestant's calls over a rotation of buffers are one CUDA graph, and the graphs take turns.

A graph launches without Python in between, so that what is timed is the device's work. The buffers of a rotation come to
more than four times the L2, and results stay allocated until the graph is complete, so that no two calls share memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from _cases import COPY, Case, Tensors
from _harness import Timing, alternate

CACHES = 4  # a rotation is larger than so many L2 caches
MOST_SETS = 1000  # of buffers of small ops; all of them may fit into the L2 then
LEAST = 1e-3  # seconds on the GPU that a turn lasts at least
AHEAD = 2_000_000  # clock cycles, about a millisecond, that the GPU sleeps while the host queues what is timed


class Gpu:
    """What timing needs of the current CUDA device. The tests have another one, without a device."""

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache = self.properties.L2_cache_size
        # Autograd runs a backward on its forward's stream, and only the captured stream's work gets into a graph:
        # everything happens on this one.
        self.stream = torch.cuda.Stream()

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """What replays the run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = run()
        del results  # their memory stays with the graph
        return graph.replay

    def seconds(self, run: Callable[[], object], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def refuse_if_used(force: bool) -> None:
    """End the run where others have memory on this GPU, as they may then use it too."""
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    if others > 2 << 30:  # a context and its modules take some hundreds of MiB
        message = f"other processes hold {others / 2**30:.1f} GiB of this GPU's memory"
        if not force:
            sys.exit(f"{message}: timings would mean little. Wait for them to end, or pass --force.")
        print(f"warning: {message}; go on, as --force was given", file=sys.stderr)


def sets_needed(case: Case, cache: int) -> int:
    touched = case.touched or min(c.moved for c in case.contestants.values())
    return case.sets or min(MOST_SETS, max(2, math.floor(CACHES * cache / touched) + 1))


def turn(
    gpu: Gpu, call: Callable[..., object], sets: list[Tensors], reset: Callable[[], None]
) -> tuple[Callable[[], float], str | None]:
    """(one turn, which says the seconds of one call; why it is not a graph, or None)."""

    def run() -> list[object]:
        return [call(*buffers) for buffers in sets]

    reset()
    try:
        launch, obstacle = gpu.capture(run), None
    except Exception as error:  # whatever a contestant does that cannot be captured: it is timed as it is, and marked
        launch, obstacle = run, f"{type(error).__name__}: {error}".splitlines()[0]
    reset()
    launch()  # uploads the graph
    reset()
    times = max(1, math.ceil(LEAST / gpu.seconds(launch, 1)))

    def timed() -> float:
        reset()
        return gpu.seconds(launch, times) / (times * len(sets))

    return timed, obstacle


def measure(case: Case, names: list[str], gpu: Gpu, seconds: float) -> tuple[dict[str, Timing], dict[str, str], int]:
    """(each contestant's and the copy's timing, why some are not graphs, number of sets of buffers)."""
    sets = [case.make() for _ in range(sets_needed(case, gpu.cache))]

    def copy(*buffers: torch.Tensor) -> None:
        buffers[case.out].copy_(buffers[case.source])

    calls = {COPY: copy, **{name: case.contestants[name].call for name in names}}
    turns, obstacles = {}, {}
    for name, call in calls.items():
        turns[name], obstacle = turn(gpu, call, sets, case.reset)
        if obstacle is not None:
            obstacles[name] = obstacle
    timings = alternate(turns, self_timed=turns, seconds=seconds, least=0, label=str(case))
    return timings, obstacles, len(sets)
