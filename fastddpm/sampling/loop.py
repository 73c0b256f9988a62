"""The reverse process (Ho et al. 2020, algorithm 2): the reference, and the loop that `sample` runs.

`sample_ref` is the algorithm. `Chain` computes the same in place: its steps read and write fixed buffers, so that a GPU can run
them as a CUDA graph. The host reads the device's state once per segment.
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

# Steps per segment: after each, the host reads the state, moves the bar and checks for a bad output.
STEPS_PER_LOOK = 50
# Steps whose time inputs are computed together: those of all steps would take a seventh of the weights' size.
TIME_INPUTS = 50
UNROLL = 10  # steps in one CUDA graph
SEED, FIRST, STEP, FIRST_BAD = range(4)  # entries of the state that ops.ddpm_step_ reads and advances


def sample_ref(
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    table: Table,
    shape: tuple[int, ...],
    *,
    seed: int,
    first: int = 0,
    clip: float | None = 1.0,
) -> torch.Tensor:
    """Draw images in plain PyTorch. This is the reference that `sample` is tested against.

    Args:
        model: model(x_t, t) -> prediction, with t int64 [N].
        table: Timesteps [S] and the step coefficients at each, [S, 9], from `diffusion.coefficients.table`.
        shape: (N, C, H, W).
        seed: An int in [0, 2^64). Image i has the noise of image first + i of the seed's sequence.
        first: Number of the first image.
        clip: Bound on |x_0| in each step, or None.

    Returns:
        x_0, float32 [N, C, H, W].
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
    """The state of a chain after a step, passed to a callback.

    Attributes:
        step: Number of the step, from 0.
        timestep: Timestep t of the step.
        x: A copy of x_{t-1}, float32 [B, C, H, W].
        x0: A copy of the step's prediction of x_0, clipped, float32 [B, C, H, W].
        indices: Numbers of the B images in the seed's sequence.
    """

    step: int
    timestep: int
    x: torch.Tensor
    x0: torch.Tensor
    indices: range


class Batch(NamedTuple):
    """The images of one run of a chain, at most as many as the chain's batch size B.

    Attributes:
        out: The output, float32 [n, C, H, W] with n <= B.
        seed: An int in [0, 2^64).
        first: Number of the first image in the seed's sequence.
        x_T: Initial noise, float32 [B, C, H, W]. None draws it from the seed.
        class_labels: int64 [B], or None.
    """

    out: torch.Tensor
    seed: int
    first: int
    x_T: torch.Tensor | None
    class_labels: torch.Tensor | None


class ChainShape(NamedTuple):
    """Everything that a chain's buffers and graphs depend on. A chain runs every table, seed and batch of its shape."""

    steps: int
    x: tuple[int, int, int, int]
    clip: float | None
    has_labels: bool
    has_callback: bool
    uses_x0_last: bool
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
            len(table.timesteps), x, clip, has_labels, has_callback, table.uses_x0_last, table.uses_learned_variance
        )


def chain_for(entry: CacheEntry, table: Table, shape: ChainShape) -> Chain:
    """Return the cached captured chain if it has this shape, else a new one, captured as a CUDA graph if possible."""
    chain, runner = entry.chain, entry.runner
    if chain is not None and chain.shape == shape:
        chain.load(table)
        return chain
    entry.chain = None  # frees the old buffers before new ones are allocated
    if not (runner.capturable and graphs.usable(runner.device)):
        return Chain(runner, table, shape)
    chain = Chain(runner, table, shape, for_capture=True)
    try:
        chain.capture()
    except graphs.CaptureError as error:
        reason = f"steps are launched kernel by kernel, as they could not be captured as a CUDA graph ({error})"
        chain.warning = f"{reason}. {SAME_RESULTS}"
        if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):  # the next call may have more memory
            return chain
    entry.chain = chain  # also after a failure, so that the next call does not repeat it
    return chain


class Chain:
    """The loop over one batch, with its buffers.

    A step accesses only these buffers and the network, so that one CUDA graph runs every seed and table.

    Attributes:
        warning: A sentence on why the steps are not captured, for the caller to issue; None if there is none.
    """

    def __init__(self, runner: Runner, table: Table, shape: ChainShape, *, for_capture: bool = False) -> None:
        """Allocate the buffers. for_capture: store the time inputs of all steps, which captured steps need."""
        self.runner, self.shape, self.steps = runner, shape, shape.steps
        self.device = device = runner.device
        self.warning: str | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by the number of steps
        self.x = torch.zeros(shape.x, dtype=torch.float32, device=device)
        self.x0 = torch.zeros_like(self.x) if shape.has_callback or shape.uses_x0_last else None
        self.input = torch.empty(shape.x, device=device, dtype=runner.dtype, memory_format=runner.memory_format).zero_()
        self.labels = torch.zeros(shape.x[0], dtype=torch.int64, device=device) if shape.has_labels else None
        self.timesteps = torch.zeros(shape.steps, dtype=torch.int64, device=device)
        self.rows = torch.zeros(shape.steps, table.rows.shape[1], dtype=torch.float32, device=device)
        self.state = torch.zeros(4, dtype=torch.int64, device=device)
        # Two segments are in flight so that a GPU never waits for the host.
        on_gpu = device.type == "cuda"
        self.max_in_flight = 2 if on_gpu and not shape.has_callback else 1
        self.host_states = torch.empty(2, 4, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.all_time_inputs: torch.Tensor | None = None
        self.load(table)
        if for_capture:
            self.all_time_inputs = self._all_time_inputs()

    def load(self, table: Table) -> None:
        """Replace the table by another one with the same number of steps."""
        self.host_timesteps = table.timesteps.tolist()
        self.timesteps.copy_(table.timesteps)
        self.rows.copy_(table.rows.float())
        self.some_time_inputs: tuple[int, torch.Tensor] | None = None
        if self.all_time_inputs is not None:
            self.all_time_inputs.copy_(self._all_time_inputs())

    def capture(self) -> None:
        """Capture the step as graphs. Raise graphs.CaptureError on failure; `run` then launches the kernels one by one."""
        unroll = 1 if self.shape.has_callback else UNROLL
        with self.runner.execution_context():
            self.graphs = graphs.capture(self.captured_step, tuple(dict.fromkeys((unroll, 1))), self.device)

    def run(self, batch: Batch, bar: tqdm, callback: Callable[[StepState], None] | None) -> None:
        """Run the whole chain for one batch."""
        self._begin(batch)
        segment = STEPS_PER_LOOK if callback is None else 1
        in_flight = deque()
        try:
            for start in range(0, self.steps, segment):
                count = min(segment, self.steps - start)
                with self.runner.execution_context():
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
        """Draw x_T and reset the state to the first step."""
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

    def _launch(self, start: int, count: int) -> None:
        """Launch the steps start..start + count - 1."""
        if not self.graphs:
            for step in range(start, start + count):
                self.step(step)
            return
        unroll = max(self.graphs)
        many, few = divmod(count, unroll)
        for steps in [unroll] * many + [1] * few:
            self.graphs[steps].replay()

    def step(self, step: int) -> None:
        """Run the step with this number."""
        self._advance(self.predict(step))

    def captured_step(self) -> None:
        """Run the step whose number is in `state`, on the device."""
        self._advance(self._predict(self.all_time_inputs.index_select(0, self.state[STEP : STEP + 1])[0], 0))

    def _advance(self, o: torch.Tensor) -> None:
        ops.ddpm_step_(
            self.x, o, self.rows, self.timesteps, self.state, x0=self.x0, next_input=self.input, clip=self.shape.clip
        )

    def predict(self, step: int) -> torch.Tensor:
        """Return the network's output for `input` at the step with this number."""
        start = step - step % TIME_INPUTS
        if self.some_time_inputs is None or self.some_time_inputs[0] != start:
            self.some_time_inputs = start, self._time_inputs(start)
        return self._predict(self.some_time_inputs[1][step - start], step)

    def _predict(self, time_input: torch.Tensor, step: int) -> torch.Tensor:
        o = self.runner.predict(self.input, time_input, self.labels)
        fault = output_fault(o, list(self.x.shape), self.shape.uses_learned_variance)
        if fault is not None:
            raise SamplingError(f"model: at step {step} (timestep {self.host_timesteps[step]}) {fault}")
        return o

    def _time_inputs(self, start: int) -> torch.Tensor:
        return self.runner.time_inputs(self.timesteps[start : start + TIME_INPUTS], len(self.x))

    def _all_time_inputs(self) -> torch.Tensor:
        return torch.cat([self._time_inputs(start) for start in range(0, self.steps, TIME_INPUTS)])

    def _copy_state_async(self, segment: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Start copying the state to the host. Return the host's tensor and, on a GPU, the event of the copy's end."""
        host_state, arrival = self.host_states[segment % 2], None
        host_state.copy_(self.state, non_blocking=True)
        if self.device.type == "cuda":
            arrival = torch.cuda.Event(blocking=True)  # waiting leaves the host's core free
            arrival.record(torch.cuda.current_stream(self.device))
        return host_state, arrival

    def _finish_segment(
        self, count: int, host_state: torch.Tensor, arrival: torch.cuda.Event | None, bar: tqdm
    ) -> None:
        """Check a segment of `count` steps: the only place where the host waits for the device."""
        if arrival is not None:
            arrival.synchronize()
        bad = int(host_state[FIRST_BAD])
        if bad >= 0:
            raise SamplingError(
                f"model: its output at step {bad} (timestep {self.host_timesteps[bad]}) holds a NaN or an infinity; "
                "try dtype=torch.float32, and check the weights"
            )
        bar.update(count)

    def _call_back(self, callback: Callable[[StepState], None], step: int, indices: range) -> None:
        x, x0 = (v[: len(indices)].clone() for v in (self.x, self.x0))
        callback(StepState(step, self.host_timesteps[step], x, x0, indices))
