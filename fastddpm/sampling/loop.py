"""The reverse process as one loop over a table of step coefficients (Ho et al. 2020, algorithm 2)."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import torch

from .. import ops
from ..diffusion import coefficients
from ..engine import graphs
from ..engine.runner import SLOWER, Plain
from ..errors import SamplingError
from ..inputs.arguments import output_fault
from ..ops.rng import Stream, as_int64_bits

SEGMENT = 50  # steps between two looks at the device state: the bar moves and a bad output is noticed
UNROLL = 10  # steps in one CUDA graph


@dataclasses.dataclass(frozen=True)
class StepState:
    """What a callback sees after a step. x, x0: clones, float32 [B, C, H, W]; indices: the images' numbers in the sequence."""

    step: int  # 0-based; S steps in all
    timestep: int  # t of the step just taken
    x: torch.Tensor  # x_{t-1}
    x0: torch.Tensor  # the step's prediction of x_0, clipped
    indices: range


def prepared(
    net: Plain, table: coefficients.Table, shape: tuple[int, ...], bound: float | None, labelled: bool, callback: bool
) -> Chain:
    """A chain over x of `shape` [N, C, H, W], captured where it can be: the one that `net` keeps, if it fits."""
    key = len(table.timesteps), shape, bound, labelled, callback, table.uses_previous_x0, table.uses_learned_variance
    if net.chain is not None and net.chain.key == key:
        net.chain.load(net, table)
        return net.chain
    net.chain = None  # the old one's memory goes before the new one's comes
    chain = Chain(net, table, key)
    if net.captured and graphs.usable(net.device):
        try:
            chain.capture(net)
        except graphs.CaptureError as error:
            notice = f"steps are launched kernel by kernel, as they could not be captured as a CUDA graph ({error}). {SLOWER}"
            if notice not in net.notices:
                net.notices.append(notice)
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):  # another time there may be more
                return chain
        net.chain = chain  # also after a failure: the next call needn't fail once more
    return chain


class Chain:
    """The loop over one batch, with the buffers that all batches of a call share, and later calls where they are captured.

    A step reads and writes nothing but these buffers and the network, so that as a CUDA graph it serves every seed and table.
    """

    def __init__(self, net: Plain, table: coefficients.Table, key: tuple) -> None:
        """key: (number of steps, shape of x, bound on x0, whether there are class labels, whether there is a callback, whether
        steps need the last x0, whether they need a learned variance)."""
        self.key = key
        self.steps, shape, self.bound, labelled, callback, multistep, self.learned = key
        self.device = net.device
        self.x = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.x0 = torch.zeros_like(self.x) if callback or multistep else None
        self.unroll = 1 if callback else UNROLL
        self.input = torch.empty(shape, device=self.device, dtype=net.dtype, memory_format=net.memory_format).zero_()
        self.state = torch.zeros(4, dtype=torch.int64, device=self.device)
        self.labels = torch.zeros(shape[0], dtype=torch.int64, device=self.device) if labelled else None
        self.table: list[torch.Tensor] | None = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Two segments on their way: a GPU doesn't wait for the host to look at the first one's end.
        on_gpu = self.device.type == "cuda"
        self.in_flight = 2 if on_gpu and not callback else 1
        self.seen = torch.empty(2, 4, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self.load(net, table)

    def load(self, net: Plain, table: coefficients.Table) -> None:
        """Take another table of as many steps."""
        self.host_timesteps = table.timesteps.tolist()
        self.timesteps = table.timesteps.to(self.device)
        self.piece = None
        fresh = [self.timesteps, table.rows.float().to(self.device)]
        if net.captured and graphs.usable(self.device):
            fresh.append(torch.cat([self._piece(net, start) for start in range(0, self.steps, SEGMENT)]))
        if self.table is None:
            self.table = fresh
        else:
            for v, new in zip(self.table, fresh, strict=True):
                v.copy_(new)

    def _piece(self, net: Plain, start: int) -> torch.Tensor:
        return net.per_step(self.timesteps[start : start + SEGMENT], len(self.x))

    def _row(self, net: Plain, step: int) -> torch.Tensor:
        """The step's row of `per_step`, a segment at a time: all together would be a seventh of the weights' size."""
        start = step - step % SEGMENT
        if self.piece is None or self.piece[0] != start:
            self.piece = start, self._piece(net, start)
        return self.piece[1][step - start]

    def capture(self, net: Plain) -> None:
        """Make graphs of the step. Raises graphs.CaptureError; the buffers then hold nothing that `run` would use."""
        with net.settings():
            self.graphs = graphs.capture(
                lambda: self.step(net), (self.unroll, 1) if self.unroll > 1 else (1,), self.device
            )

    def run(self, net, out, seed, first, x_T, labels, bar, callback) -> None:
        """The whole chain for images first.. of the sequence; the leading len(out) of them go into `out`."""
        x = self.x
        if x_T is None:
            x_T = ops.philox_normal(x.shape, seed=seed, t=0, stream=Stream.X_T, first=first, device=self.device)
        x.copy_(x_T)
        self.input.copy_(x)
        self.state.copy_(torch.tensor([as_int64_bits(seed), first, 0, -1], device="cpu"))
        if labels is not None:
            self.labels.copy_(labels)
        segment = SEGMENT if callback is None else 1
        launched = deque()
        try:
            for start in range(0, self.steps, segment):
                count = min(segment, self.steps - start)
                with net.settings():
                    self._launch(net, start, count)
                launched.append((count, *self._look(start // segment)))
                if len(launched) == self.in_flight:
                    self._settle(*launched.popleft(), bar)
                if callback is not None:
                    with net.let_go():
                        self._tell(callback, start, range(first, first + len(out)))
            while launched:
                self._settle(*launched.popleft(), bar)
            out.copy_(x[: len(out)])
        finally:
            if self.device.type == "cuda":  # the next call may use these buffers on another stream
                torch.cuda.current_stream(self.device).synchronize()

    def predict(self, net: Plain, step: int | None = None) -> torch.Tensor:
        """The network's output for `input`. step: its number; None: where `state` points, which the host needn't know."""
        row = self.table[2].index_select(0, self.state[2:3])[0] if step is None else self._row(net, step)
        o = net.predict(self.input, row, self.labels)
        fault = output_fault(o, list(self.x.shape), self.learned)
        if fault is not None:
            step = step or 0
            raise SamplingError(f"model: at step {step} (timestep {self.host_timesteps[step]}) {fault}")
        return o

    def step(self, net: Plain, step: int | None = None) -> None:
        timesteps, rows = self.table[:2]
        o = self.predict(net, step)
        ops.ddpm_step_(self.x, o, rows, timesteps, self.state, x0=self.x0, next_input=self.input, clip=self.bound)

    def _launch(self, net: Plain, start: int, count: int) -> None:
        if not self.graphs:
            for step in range(start, start + count):
                self.step(net, step)
            return
        many, few = divmod(count, self.unroll)
        for unrolled in [self.unroll] * many + [1] * few:
            self.graphs[unrolled].replay()

    def _look(self, segment: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """(the device's state on its way to the host, the event of its arrival)."""
        seen, arrival = self.seen[segment % 2], None
        seen.copy_(self.state, non_blocking=True)
        if self.device.type == "cuda":
            arrival = torch.cuda.Event(blocking=True)  # the host's core is free meanwhile
            arrival.record(torch.cuda.current_stream(self.device))
        return seen, arrival

    def _settle(self, count: int, seen: torch.Tensor, arrival: torch.cuda.Event | None, bar) -> None:
        """Check a segment of `count` steps: the only place where the host waits for the device."""
        if arrival is not None:
            arrival.synchronize()
        bad = int(seen[3])
        if bad >= 0:
            raise SamplingError(
                f"model: its output at step {bad} (timestep {self.host_timesteps[bad]}) holds a NaN or an infinity; "
                "try dtype=torch.float32, and check the weights"
            )
        bar.update(count)

    def _tell(self, callback: Callable[[StepState], None], step: int, indices: range) -> None:
        x, x0 = (v[: len(indices)].clone() for v in (self.x, self.x0))
        callback(StepState(step, self.host_timesteps[step], x, x0, indices))
