"""The reverse process (Ho et al. 2020, algorithm 2): as a reference, and as the loop that `sample` runs.

`sample_ref` is the algorithm. `Chain` does the same in place: steps read and write fixed buffers, so that on a GPU they are a
CUDA graph, and the host looks at the device once a segment.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from .. import ops
from ..diffusion.coefficients import Table
from ..engine import graphs
from ..engine.cache import CacheEntry
from ..engine.runner import SAME_RESULTS, Runner
from ..errors import SamplingError
from ..inputs.arguments import output_fault
from ..ops.rng import Stream, as_int64_bits

SEGMENT = 50  # steps between two looks at the device state, when the bar moves and a bad output is noticed
UNROLL = 10  # steps in one CUDA graph


def sample_ref(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    table: Table,
    shape: tuple[int, ...],
    *,
    seed: int,
    first: int = 0,
    clip: float | None = 1.0,
) -> torch.Tensor:
    """Draw x_0, float32 of `shape` [N, C, H, W], in plain PyTorch: what `sample` computes, and is tested against.

    Args:
        model: model(x_t, t) -> prediction, with t int64 [N].
        table: timesteps [S] and the coefficients of a step at each [S, 9], from `diffusion.coefficients.table`.
        shape: (N, C, H, W).
        seed: in [0, 2^64). Image i has the noise of image first + i of the seed's sequence.
        first: the number of the first image.
        clip: bound on each step's x_0, or None.
    """
    x = ops.philox_normal_ref(shape, seed=seed, t=0, stream=Stream.X_T, first=first)  # x_T ~ N(0, 1)
    x0 = torch.zeros_like(x)
    for t, row in zip(table.timesteps.tolist(), table.rows, strict=True):
        prediction = model(x, torch.full((len(x),), t))
        # x_{t-1} = posterior mean of x_0 and x_t, plus sigma z with fresh noise z; only multistep solvers read the last x_0
        x, x0 = ops.ddpm_step_ref(x, prediction, row, seed=seed, t=t, first=first, x0_last=x0, clip=clip)
    return x


@dataclasses.dataclass(frozen=True)
class StepState:
    """What a callback sees after a step. x, x0: clones, float32 [B, C, H, W]; indices: the images' numbers in the sequence."""

    step: int  # 0-based; S steps in all
    timestep: int  # t of the step just taken
    x: torch.Tensor  # x_{t-1}
    x0: torch.Tensor  # the step's prediction of x_0, clipped
    indices: range


class Batch(NamedTuple):
    """The images of one run of a chain. Their number may be less than the chain's batch size."""

    out: torch.Tensor  # float32 [n, C, H, W], where they go
    seed: int
    first: int  # number of the first image in the seed's sequence
    x_T: torch.Tensor | None  # in place of the seed's, of the chain's batch size
    class_labels: torch.Tensor | None  # of the chain's batch size


class ChainShape(NamedTuple):
    """What a chain's buffers and graphs depend on; a chain serves every table, seed and batch of its shape."""

    steps: int
    x: tuple[int, int, int, int]
    clip: float | None
    has_labels: bool
    has_callback: bool
    uses_previous_x0: bool
    uses_learned_variance: bool

    @classmethod
    def of(
        cls,
        table: Table,
        x: tuple[int, ...],
        clip: float | None,
        *,
        has_labels: bool = False,
        has_callback: bool = False,
    ) -> ChainShape:
        return cls(
            len(table.timesteps), x, clip, has_labels, has_callback, table.uses_previous_x0, table.uses_learned_variance
        )


def chain_for(entry: CacheEntry, table: Table, shape: ChainShape) -> Chain:
    """The chain in the cache entry if it has this shape; else a new one, captured as a CUDA graph where possible."""
    chain, runner = entry.chain, entry.runner
    if chain is not None and chain.shape == shape:
        chain.load(table)
        return chain
    entry.chain = None  # frees the old buffers before new ones are allocated
    try:
        entry.chain = Chain(runner, table, shape, capture=runner.capturable and graphs.usable(runner.device))
    except graphs.CaptureError as error:
        reason = f"steps are launched kernel by kernel, as they could not be captured as a CUDA graph ({error})"
        chain = Chain(runner, table, shape, warning=f"{reason}. {SAME_RESULTS}")
        if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):  # another time there may be more memory
            return chain
        entry.chain = chain  # the next call needn't fail again
    return entry.chain


class Chain:
    """The loop over one batch, with its buffers. A captured chain is kept with its runner for later calls.

    A step reads and writes nothing but these buffers and the network, so that as a CUDA graph it serves every seed and table.
    warning: why the steps are not captured, for the caller; None if there is nothing to say.
    """

    def __init__(
        self, runner: Runner, table: Table, shape: ChainShape, *, capture: bool = False, warning: str | None = None
    ) -> None:
        """Raises graphs.CaptureError where the steps cannot be captured."""
        self.runner, self.shape, self.warning, self.captures = runner, shape, warning, capture
        self.device = device = runner.device
        self.steps = shape.steps
        self.x = torch.zeros(shape.x, dtype=torch.float32, device=device)
        self.x0 = torch.zeros_like(self.x) if shape.has_callback or shape.uses_previous_x0 else None
        self.input = torch.empty(shape.x, device=device, dtype=runner.dtype, memory_format=runner.memory_format).zero_()
        self.state = torch.zeros(
            4, dtype=torch.int64, device=device
        )  # (seed's bits, first, step, first bad step or -1)
        self.labels = torch.zeros(shape.x[0], dtype=torch.int64, device=device) if shape.has_labels else None
        # Two segments are in flight, so that a GPU never waits for the host.
        on_gpu = device.type == "cuda"
        self.max_in_flight = 2 if on_gpu and not shape.has_callback else 1
        self.host_state = torch.empty(2, 4, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.timesteps = torch.zeros(shape.steps, dtype=torch.int64, device=device)
        self.rows = torch.zeros(shape.steps, 9, dtype=torch.float32, device=device)
        self.time_inputs: torch.Tensor | None = None  # of all steps, where they are captured
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.load(table)
        if capture:
            unroll = 1 if shape.has_callback else UNROLL
            with runner.settings():
                self.graphs = graphs.capture(self.step, tuple(dict.fromkeys((unroll, 1))), device)

    def load(self, table: Table) -> None:
        """Take another table of as many steps."""
        self.host_timesteps = table.timesteps.tolist()
        self.timesteps.copy_(table.timesteps)
        self.rows.copy_(table.rows.float())
        self.segment_inputs: tuple[int, torch.Tensor] | None = None
        if self.captures:
            starts = range(0, self.steps, SEGMENT)
            time_inputs = torch.cat([self._segment_inputs(start) for start in starts])
            self.time_inputs = time_inputs if self.time_inputs is None else self.time_inputs.copy_(time_inputs)

    def run(self, batch: Batch, bar: tqdm, callback: Callable[[StepState], None] | None) -> None:
        """The whole chain for one batch."""
        self._begin(batch)
        segment = SEGMENT if callback is None else 1
        in_flight = deque()
        try:
            for start in range(0, self.steps, segment):
                count = min(segment, self.steps - start)
                with self.runner.settings():
                    self._launch(start, count)
                in_flight.append((count, *self._copy_state_async(start // segment)))
                if len(in_flight) == self.max_in_flight:
                    self._finish_segment(*in_flight.popleft(), bar)
                if callback is not None:
                    with self.runner.released():
                        self._call_back(callback, start, range(batch.first, batch.first + len(batch.out)))
            while in_flight:
                self._finish_segment(*in_flight.popleft(), bar)
            batch.out.copy_(self.x[: len(batch.out)])
        finally:
            if self.device.type == "cuda":  # the next call may use these buffers on another stream
                torch.cuda.current_stream(self.device).synchronize()

    def _begin(self, batch: Batch) -> None:
        x_T = batch.x_T
        if x_T is None:
            x_T = ops.philox_normal(
                self.x.shape, seed=batch.seed, t=0, stream=Stream.X_T, first=batch.first, device=self.device
            )
        self.x.copy_(x_T)
        self.input.copy_(self.x)
        self.state.copy_(torch.tensor([as_int64_bits(batch.seed), batch.first, 0, -1], device="cpu"))
        if batch.class_labels is not None:
            self.labels.copy_(batch.class_labels)

    def step(self, step: int | None = None) -> None:
        """One step. step: its number; None: where `state` points, which the host needn't know."""
        o = self.predict(step)
        ops.ddpm_step_(
            self.x, o, self.rows, self.timesteps, self.state, x0=self.x0, next_input=self.input, clip=self.shape.clip
        )

    def predict(self, step: int | None = None) -> torch.Tensor:
        """The network's output for `input`. step: as in `step`."""
        time_input = self.time_inputs.index_select(0, self.state[2:3])[0] if step is None else self._time_input(step)
        o = self.runner.predict(self.input, time_input, self.labels)
        fault = output_fault(o, list(self.x.shape), self.shape.uses_learned_variance)
        if fault is not None:
            step = step or 0
            raise SamplingError(f"model: at step {step} (timestep {self.host_timesteps[step]}) {fault}")
        return o

    def _segment_inputs(self, start: int) -> torch.Tensor:
        return self.runner.time_inputs(self.timesteps[start : start + SEGMENT], len(self.x))

    def _time_input(self, step: int) -> torch.Tensor:
        """The step's time input, made a segment at a time: all of them would be a seventh of the weights' size."""
        start = step - step % SEGMENT
        if self.segment_inputs is None or self.segment_inputs[0] != start:
            self.segment_inputs = start, self._segment_inputs(start)
        return self.segment_inputs[1][step - start]

    def _launch(self, start: int, count: int) -> None:
        if not self.graphs:
            for step in range(start, start + count):
                self.step(step)
            return
        unroll = max(self.graphs)
        many, few = divmod(count, unroll)
        for steps in [unroll] * many + [1] * few:
            self.graphs[steps].replay()

    def _copy_state_async(self, segment: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """(the device's state on its way to the host, the event of its arrival)."""
        host_state, arrival = self.host_state[segment % 2], None
        host_state.copy_(self.state, non_blocking=True)
        if self.device.type == "cuda":
            arrival = torch.cuda.Event(blocking=True)  # the host's core is free meanwhile
            arrival.record(torch.cuda.current_stream(self.device))
        return host_state, arrival

    def _finish_segment(
        self, count: int, host_state: torch.Tensor, arrival: torch.cuda.Event | None, bar: tqdm
    ) -> None:
        """Check a segment of `count` steps: the only place where the host waits for the device."""
        if arrival is not None:
            arrival.synchronize()
        bad = int(host_state[3])
        if bad >= 0:
            raise SamplingError(
                f"model: its output at step {bad} (timestep {self.host_timesteps[bad]}) holds a NaN or an infinity; "
                "try dtype=torch.float32, and check the weights"
            )
        bar.update(count)

    def _call_back(self, callback: Callable[[StepState], None], step: int, indices: range) -> None:
        x, x0 = (v[: len(indices)].clone() for v in (self.x, self.x0))
        callback(StepState(step, self.host_timesteps[step], x, x0, indices))
