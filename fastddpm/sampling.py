"""`sample`: the reverse process (Ho et al. 2020, algorithm 2) and the one loop that runs it."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from . import graphs, memory, ops, samplers
from .arguments import (
    Trained,
    bound_of,
    check_count,
    choice,
    device_of,
    fitting_batch,
    is_int,
    labels_of,
    output_fault,
    seed_of,
    shape_of,
    tell_left,
    trained_for,
)
from .engine import SLOWER, Plain, network
from .foreign import adopted, called
from .notices import warn_once
from .ops._library import as_int64_bits, check_first, plain
from .ops.philox_normal import Stream
from .progress import bar as progress_bar
from .schedule import Schedule
from .unet import UNet

__all__ = ["SamplingError", "StepState", "sample"]

SEGMENT = 50  # steps between two looks at the device state: the bar moves and a bad output is noticed
UNROLL = 10  # steps in one CUDA graph
# What `plan` takes of sample's.
PLANNED = ("schedule", "prediction", "sampler", "steps", "spacing", "eta", "variance", "clip")


class SamplingError(RuntimeError):
    """The chain cannot go on: what the model gave, at which step and timestep."""


@dataclasses.dataclass(frozen=True)
class StepState:
    """What a callback sees after a step. x, x0: clones, float32 [B, C, H, W]; indices: the images' numbers in the sequence."""

    step: int  # 0-based; S steps in all
    timestep: int  # t of the step just taken
    x: torch.Tensor  # x_{t-1}
    x0: torch.Tensor  # the step's prediction of x_0, clipped
    indices: range


def sample(
    model: nn.Module | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    n: int,
    *,
    shape: tuple[int, int, int] | None = None,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str | None = None,
    clip: bool | float | None = None,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    callback: Callable[[StepState], None] | None = None,
) -> torch.Tensor:
    """Draw n images: float32 [n, C, H, W] on the model's device, in [-1, 1] where clipped.

    model: a `UNet`; a diffusers UNet2DModel, which runs as the `UNet` with its parameters; or any callable
        model(x, t) -> prediction with x [B, C, H, W] and t int64 [B] in 0..T-1. A bare callable needs `shape` and gets
        float32 x; a module gets x in its parameters' dtype. A wrapper without attributes of these names (a module, an object, a
        functools.partial, a bound method) is taken to be trained for what the model in it is.
    shape: (C, H, W); default the model's own.
    schedule: a `Schedule`, or a diffusers scheduler, whose betas, prediction_type, variance_type and clip range are then
        the defaults; default the model's own, else the paper's linear one. prediction: "epsilon", "sample",
        "v_prediction" or "mean"; default the model's own, else "epsilon".
    sampler: "ddpm", the paper's, "ddim" (Song et al. 2021) or "dpm++2m" (DPM-Solver++, Lu et al. 2022).
    steps: calls of the network for each image, 1..T; default T for ddpm, 50 for ddim, 20 for dpm++2m (T where T is less).
    spacing: which of the T timesteps they are: "trailing" (the default), "linspace", "leading", or "logsnr" (dpm++2m's default).
    eta: ddim's noise, from 0 (none) to 1 (as much as ddpm's "fixed_small").
    variance: ddpm's noise: "fixed_large" (sigma^2 = beta), "fixed_small" (the posterior variance), "learned_range" (in between,
        as the second half of an output with 2C channels says) or "none" (an ablation). Default the model's own, else
        "fixed_large"; where steps are left out "fixed_small" takes the place of a default "fixed_large", which would ruin images.
    clip: bound on each step's x0; True is 1.0, False none; default the model's own, else True. A predicted mean is taken as it
        is, unless steps are left out: then it goes through x0, which costs precision, so that the network should answer in
        float32.
    class_labels: an int, or n integers (a tensor, a list, an array), for a network with classes. A callable gets each image's as
        model(x, t, class_labels), int64 [B]: torch.arange(n) tells one that holds a condition for each image which these are.
    noise: x_T, float32 [n, C, H, W], in place of the seed's.
    seed: an int in [0, 2^64), a torch.Generator, or None: 64 bits from torch's default generator. Image i is image
        first + i of the seed's endless sequence: its noise depends on (seed, first + i, timestep) alone.
    batch_size: images per forward; default what fits. A short last batch is padded and cut.
    device: default the model's; otherwise a copy is moved. dtype: arithmetic of the network (float32, bfloat16 or float16),
        through a cast copy; the chain's state is float32 always.
    progress: True or False; None shows a bar on a terminal. callback: called with a `StepState` after every step.

    Raises ValueError naming the argument that does not fit, before anything is drawn, and SamplingError where the
    model's output has the wrong shape or is not finite, naming the step.
    """
    model = adopted(model)
    chosen = plan(model, schedule, prediction, sampler, steps, spacing, eta, variance, clip)
    tell_left(model, chosen.schedule)
    return run(
        model, n, chosen.table, shape=shape, clip=chosen.clip, class_labels=class_labels, noise=noise, seed=seed, first=first,
        batch_size=batch_size, device=device, dtype=dtype, progress=progress, callback=callback,
    )  # fmt: skip


class Plan(NamedTuple):
    """What a chain takes, its defaults filled in. variance: of ddpm, else None."""

    table: samplers.Table
    schedule: Schedule
    prediction: str
    sampler: str
    spacing: str
    eta: float
    variance: str | None
    clip: bool | float


def plan(
    model: object,
    schedule: Schedule | Any | None = None,
    prediction: str | None = None,
    sampler: str = "ddpm",
    steps: int | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    variance: str | None = None,
    clip: bool | float | None = None,
    start: int | None = None,
) -> Plan:
    """The chain that `sample`'s arguments ask for. start: the timestep of the noise that it begins with, default T - 1."""
    choice("sampler", sampler, tuple(samplers.STEPS))
    asked = variance
    needs = [name for name in Trained._fields if name != "variance" or sampler == "ddpm"]
    schedule, prediction, variance, clip = trained_for(model, schedule, prediction, variance, clip, needs=needs)
    choice("variance", variance, samplers.VARIANCES)
    most = len(schedule) if start is None else start + 1
    if steps is None:
        steps = min(samplers.STEPS[sampler] or most, most)
    steps, eta = plain(steps), plain(eta)
    if not is_int(steps) or not 1 <= steps <= most:
        raise ValueError(f"steps: got {steps!r}; expected an int in 1..{most}, as the chain has {most} timesteps")
    spacing = choice("spacing", samplers.SPACING[sampler] if spacing is None else spacing, samplers.SPACINGS)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta!r}; expected a number in [0, 1]")
    if eta and sampler != "ddim":
        raise ValueError(f'eta: got {eta}, which only sampler="ddim" has; {sampler!r} has none: leave it out')
    if asked is not None and sampler != "ddpm":
        raise ValueError(
            f'variance: got {asked!r}, which only sampler="ddpm" has; '
            + ("ddim's noise is eta" if sampler == "ddim" else f"{sampler!r} adds no noise")
        )
    timesteps = samplers.spaced(schedule, steps, spacing, start)
    if sampler == "ddpm" and variance == "fixed_large" and steps < most:
        if asked is None:
            variance = "fixed_small"
            said, way_out = "fixed_small in place of the default fixed_large", " (passing fixed_large keeps it)"
        else:
            said, way_out = "consider fixed_small in place of fixed_large", ""
        warn_once(model, f"variance: {said}, which ruins images where steps are left out{way_out}")
    table = samplers.table(
        schedule, sampler=sampler, prediction=prediction, variance=variance, eta=eta, timesteps=timesteps
    )
    if table.learned and isinstance(model, UNet) and model.config.out_channels != 2 * model.config.in_channels:
        raise ValueError(
            f"variance: learned_range needs a network with {2 * model.config.in_channels} output channels; "
            f"this one has {model.config.out_channels}"
        )
    return Plan(table, schedule, prediction, sampler, spacing, eta, variance if sampler == "ddpm" else None, clip)


def run(
    model: nn.Module | Callable,
    n: int,
    table: samplers.Table,
    *,
    shape: tuple[int, int, int] | None = None,
    clip: bool | float = True,
    class_labels: torch.Tensor | Sequence[int] | int | None = None,
    noise: torch.Tensor | None = None,
    seed: int | torch.Generator | None = None,
    first: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
    callback: Callable[[StepState], None] | None = None,
) -> torch.Tensor:
    """Where the table takes n images. model: none of diffusers' that `foreign.adopted` takes. All else as in `sample`."""
    n = check_count("n", n, 0)
    shape = shape_of(model, shape)
    bound = bound_of(clip)
    seed, first = seed_of(seed), check_first(first)
    device = device_of(model, device)
    class_labels = labels_of(class_labels, n, model)
    if noise is not None and not isinstance(noise, torch.Tensor):
        raise ValueError(f"noise: got {type(noise).__name__}; expected float32 {[n, *shape]}")
    if noise is not None and (tuple(noise.shape) != (n, *shape) or noise.dtype != torch.float32):
        raise ValueError(f"noise: got {noise.dtype} {list(noise.shape)}; expected float32 {[n, *shape]}")
    if batch_size is None:
        batch_size = fitting_batch(n, shape, device)
        if batch_size < n and class_labels is None and not isinstance(called(model), nn.Module):
            warn_once(
                model,
                f"batch_size: the {n} images are drawn {batch_size} at a time, as many as fit. If the function holds a condition "
                f"for each image, pass class_labels=torch.arange({n}): it is then called as model(x, t, index), with the index "
                "of each image in x",
            )
    batch_size = check_count("batch_size", batch_size, 1)
    if n == 0:
        with torch.inference_mode(False):
            return torch.empty(0, *shape, dtype=torch.float32, device=device)
    batch_size = min(batch_size, n)
    chunks = range(0, n, batch_size)
    with (
        torch.inference_mode(False),  # the result is an ordinary tensor even where the caller is in inference mode
        torch.no_grad(),
        memory.kept(device),
        network(model, device, dtype, (batch_size, *shape)) as net,
        progress_bar(progress, total=len(table.timesteps) * len(chunks), unit="step", leave=progress is True) as bar,
    ):
        out = torch.empty(n, *shape, dtype=torch.float32, device=device)
        chain = prepared(net, table, (batch_size, *shape), bound, class_labels is not None, callback is not None)
        for notice in net.notices:
            warn_once(model, notice)
        for start in chunks:
            count = min(batch_size, n - start)
            x_T = None if noise is None else _padded(noise[start : start + count], batch_size)
            labels = None if class_labels is None else _padded(class_labels[start : start + count], batch_size)
            chain.run(net, out[start : start + count], seed, first + start, x_T, labels, bar, callback)
    return out


def prepared(
    net: Plain, table: samplers.Table, shape: tuple[int, ...], bound: float | None, labelled: bool, callback: bool
) -> Chain:
    """A chain over x of `shape` [N, C, H, W], captured where it can be: the one that `net` keeps, if it fits."""
    key = len(table.timesteps), shape, bound, labelled, callback, table.multistep, table.learned
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

    def __init__(self, net: Plain, table: samplers.Table, key: tuple) -> None:
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

    def load(self, net: Plain, table: samplers.Table) -> None:
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


def _padded(v: torch.Tensor, size: int) -> torch.Tensor:
    return v if len(v) == size else torch.cat((v, v[-1:].expand(size - len(v), *v.shape[1:])))
