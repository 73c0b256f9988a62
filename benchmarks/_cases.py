"""The ops as cases to measure: their buffers, contestants, and correct results. kernels.py times them.

On a GPU our contestants are the public op with each backend, and the CUDA kernel with its output preallocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastddpm import Schedule, UNet, backend, ops
from fastddpm.diffusion import coefficients
from fastddpm.models import unet
from fastddpm.ops._operands import Norm, StepOperands
from fastddpm.ops.ddpm_step import _launch as _launch_step
from fastddpm.ops.group_norm_silu import _launch_backward, _launch_forward
from fastddpm.ops.philox_normal import _launch as _launch_normal
from fastddpm.ops.rng import Stream, as_int64_bits

try:
    from diffusers import DDPMScheduler
except ImportError:
    DDPMScheduler = None

GROUPS, EPS = 32, 1e-6  # as in the paper's network
SEED, T, STEP = 7, 1000, 500
PLAIN = "torch"  # the composition that "times faster" refers to
COPY = "copy"
COMPILED = "torch.compile"  # prefix of the names of its settings
TABLE_ROWS = 1 << 16  # of ddpm_step_ on a GPU: every call of a turn advances by a row

# Largest |error| / (1 + |truth|) against float64. Our ops round once, to the output's dtype; compositions more often.
OURS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
THEIRS = {torch.float32: 4e-5, torch.bfloat16: 2e-2}

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Contestant:
    call: Callable[..., torch.Tensor]  # (a set of buffers) -> the result
    check: Callable[..., tuple[float, float]]  # (the result, the set before the call) -> (error, allowed)
    moved: int  # bytes


@dataclasses.dataclass
class Case:
    op: str
    name: str
    make: Callable[[], Tensors]  # one set of buffers
    contestants: dict[str, Contestant]
    source: int = 0  # index of the buffer that the plain copy reads
    out: int = -1  # index of the buffer that it writes; filled with NaN when a contestant is checked
    reset: Callable[[], None] = lambda: None  # resets state before calls that are counted or checked
    touched: int | None = None  # bytes that one call touches; default the fewest bytes that a contestant moves
    # On a GPU:
    bars: tuple[str, ...] = ()  # bars for which the case counts; see _bars.py
    calls: int = 0  # number of calls with this shape in the CIFAR-10 network
    sets: int | None = None  # sets of buffers, so calls in a graph; default: exceed the L2 four times

    def __str__(self) -> str:
        return f"{self.op} {self.name}"


class WrongResult(Exception):
    """A wrong output of a contestant."""


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((result.double() - exact).abs() / (1 + exact.abs())).max())


def against(truth: Callable[..., torch.Tensor], allowed: float) -> Callable[..., tuple[float, float]]:
    """Return a check against truth(*buffers), float64."""
    return lambda result, *buffers: (error(result, truth(*buffers)), allowed)


def looks_normal(result: torch.Tensor, *_: torch.Tensor) -> tuple[float, float]:
    """Check unpredictable noise: mean 0 and variance 1 within 5 standard errors."""
    n, z = result.numel(), result.double()
    return max(abs(float(z.mean())) * n**0.5, abs(float(z.var()) - 1) * (n / 2) ** 0.5), 5.0


def examined(case: Case, name: str) -> float:
    """Return a contestant's error against float64. Raise WrongResult if it exceeds the allowed error."""
    contestant, buffers = case.contestants[name], case.make()
    buffers[case.out].fill_(math.nan)
    # Leaves of a graph stay themselves; the rest is cloned, as some contestants write into their input.
    given = tuple(v if v.requires_grad else v.clone() for v in buffers)
    case.reset()
    torch.manual_seed(0)
    found, allowed = contestant.check(contestant.call(*given), *buffers)
    if not found <= allowed:  # also true for NaN
        raise WrongResult(f"{name} is wrong: error {found:.2g}, allowed {allowed:.2g}; not timed")
    return found


def examine(case: Case) -> dict[str, float]:
    """Return each contestant's error against float64. Exit if one exceeds the allowed error."""
    try:
        return {name: examined(case, name) for name in case.contestants}
    except WrongResult as wrong:
        sys.exit(f"{case}: {wrong}")


def describe(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format | None = None) -> str:
    words = [str(list(shape)), str(dtype).removeprefix("torch.")]
    if layout is not None:
        words.append("channels_last" if layout == torch.channels_last else "contiguous")
    return " ".join(words)


# -------------------------------------------------------------------------------------------- contestants


def _served(device: str) -> list[str]:
    """Return the backends that have kernels for a device and can run here."""
    return [
        name for name in (("cpu",) if device == "cpu" else ("cuda", "triton")) if not backend.unavailable_reason(name)
    ]


def _using(kind: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if kind is None else backend.use(kind)


def _with(kind: str, op: Callable) -> Callable:
    def call(*buffers: torch.Tensor) -> torch.Tensor:
        with backend.use(kind):
            return op(*buffers)

    return call


def _ours(device: str, op: Callable, kernel: Callable | None = None) -> dict[str, Callable]:
    """Return our contestants: op(*buffers) as users call it, and kernel(kind, *buffers) with a preallocated output."""
    served = _served(device)
    calls = {}
    if kernel is not None and served and served[0] != "triton":  # Triton's op runs no other kernel
        name = "fastddpm kernel" if device == "cpu" else "fastddpm cuda kernel"
        calls[name] = functools.partial(kernel, served[0])
    if device == "cpu":
        return {**calls, "fastddpm op": op}
    return {**calls, **{f"fastddpm {kind}": _with(kind, op) for kind in served}}


def _all(calls: dict[str, Callable], check: Callable, moved: int) -> dict[str, Contestant]:
    return {name: Contestant(call, check, moved) for name, call in calls.items()}


REINDEXING = "loop_reindexing_after_fusion"  # TORCHINDUCTOR_LOOP_REINDEXING_AFTER_FUSION, which came after torch 2.11


def inductor_settings(mode: str) -> dict[str, dict[str, object]]:
    """Return name suffix -> torch.compile's options for a mode, with loop reindexing on and off if torch has it."""
    from torch import _inductor  # loads slowly

    options = _inductor.list_mode_options(mode)
    if not hasattr(_inductor.config, REINDEXING):
        return {"": options}
    return {"": {**options, REINDEXING: True}, ", no reindexing": {**options, REINDEXING: False}}


def _compiled(function: Callable) -> dict[str, Callable]:
    """Return torch.compile of `function` in inference mode, with every setting that a fair comparison tries."""
    variants = {}
    for mode, name in (("default", COMPILED), ("max-autotune-no-cudagraphs", f"{COMPILED} max-autotune")):
        for suffix, options in inductor_settings(mode).items():
            # fullgraph: a fallback of torch.compile to eager code is an error, not a slow peer.
            optimised = torch.compile(function, fullgraph=True, dynamic=False, options=options)
            variants[f"{name}{suffix}"] = torch.inference_mode()(optimised)
    return variants


# -------------------------------------------------------------------------------------------- group_norm_silu


def composition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _norm_parameters(channels: int, dtype: torch.dtype, device: str) -> Tensors:
    return torch.empty(channels, device=device).uniform_(0.5, 1.5).to(dtype), torch.randn(channels, device=device).to(
        dtype
    )


def _norm_input(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> torch.Tensor:
    return (2 * torch.randn(shape, device=device) + 0.5).to(dtype).contiguous(memory_format=layout)


def group_norm_silu(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str = "cpu", **about: object
) -> Case:
    weight, bias = _norm_parameters(shape[1], dtype, device)
    norm = Norm(GROUPS, weight, bias, None, None, None, True)
    statistics = torch.empty(2, shape[0], GROUPS, device=device).unbind()
    channels_last = layout == torch.channels_last

    def make() -> Tensors:
        x = _norm_input(shape, dtype, layout, device)
        return x, torch.empty_like(x)

    def op(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return ops.group_norm_silu(x, GROUPS, weight, bias, EPS)

    def kernel(kind: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        _launch_forward(kind, x, out, channels_last, statistics, norm, EPS)
        return out

    def truth(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return composition(x.double(), weight.double(), bias.double())

    peers = {PLAIN: lambda x, out: composition(x, weight, bias)}
    if device == "cpu":
        peers["torch, out="] = lambda x, out: torch.ops.aten.silu.out(
            F.group_norm(x, GROUPS, weight, bias, EPS), out=out
        )
        peers["torch, silu in place"] = lambda x, out: F.silu(F.group_norm(x, GROUPS, weight, bias, EPS), inplace=True)
    elif about.pop("compiled", True):
        for name, call in _compiled(composition).items():
            peers[name] = lambda x, out, call=call: call(x, weight, bias)
    moved = 2 * math.prod(shape) * dtype.itemsize
    contestants = {
        **_all(_ours(device, op, kernel), against(truth, OURS[dtype]), moved),
        **_all(peers, against(truth, THEIRS[dtype]), moved),
    }
    return Case("group_norm_silu", describe(shape, dtype, layout), make, contestants, **about)


def group_norm_silu_backward(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str = "cpu", **about: object
) -> Case:
    """Return the gradients of x, weight and bias from an existing graph."""
    weight, bias = (v.requires_grad_() for v in _norm_parameters(shape[1], dtype, device))
    channels_last = layout == torch.channels_last
    norm = Norm(GROUPS, weight, bias, None, None, None, True)
    sums = torch.empty(3, *shape[:2], device=device)
    kinds = [None] if device == "cpu" else _served(device)

    def make() -> Tensors:
        x = _norm_input(shape, dtype, layout, device).requires_grad_()
        dy = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout)
        outputs = []
        with torch.enable_grad():
            for kind in kinds:
                with _using(kind):
                    forward = torch.ops.fastddpm.group_norm_silu
                    y, mean, rstd = forward(x, GROUPS, weight, bias, EPS, None, None, None, True)
                    outputs.append(y)
            return x, dy, torch.empty_like(dy), mean, rstd, composition(x, weight, bias), *outputs

    def kernel(kind, x, dy, out, mean, rstd, *_) -> torch.Tensor:
        _launch_backward(kind, dy, x, out, channels_last, (mean, rstd), norm, sums.unbind())
        return out

    def gradient(at: int) -> Callable:
        def call(*buffers: torch.Tensor) -> torch.Tensor:
            x, dy, y = buffers[0], buffers[1], buffers[5 + at]
            return torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)[0]

        return call

    def truth(x, dy, *_) -> torch.Tensor:
        with torch.enable_grad():
            exact = x.detach().double().requires_grad_()
            y = composition(exact, weight.detach().double(), bias.detach().double())
        return torch.autograd.grad(y, exact, dy.double())[0]

    calls = _ours(device, gradient(1), kernel)
    calls.update({f"fastddpm {kind}": gradient(i) for i, kind in enumerate(kinds, 1) if kind is not None})
    moved = 3 * math.prod(shape) * dtype.itemsize
    contestants = {
        **_all(calls, against(truth, OURS[dtype]), moved),
        **_all({PLAIN: gradient(0)}, against(truth, THEIRS[dtype]), moved),
    }
    return Case("group_norm_silu_backward", describe(shape, dtype, layout), make, contestants, 1, 2, **about)


@functools.cache
def cifar10_norms() -> Counter[tuple[int, int, int]]:
    """Return [C, H, W] -> number of group_norm_silu calls in one forward of the paper's CIFAR-10 network."""
    shapes = Counter()

    def noted(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        shapes[tuple(x.shape[1:])] += 1
        return torch.empty_like(x)

    network = UNet.from_preset("cifar10").to("meta").eval()  # meta tensors have only shapes: nothing is computed
    original, unet.ops.group_norm_silu = unet.ops.group_norm_silu, noted
    try:
        network(torch.empty(1, *network.shape, device="meta"), torch.empty(1, dtype=torch.int64, device="meta"))
    finally:
        unet.ops.group_norm_silu = original
    return shapes


# -------------------------------------------------------------------------------------------------- ddpm_step


def _row() -> torch.Tensor:
    """Return a step's coefficients from the middle of the paper's chain."""
    return coefficients.table(Schedule.linear(T)).rows[T - 1 - STEP]


def ddpm_step(shape: tuple[int, ...]) -> Case:
    """Return the case of one step with fresh noise, on a CPU."""
    row = _row()
    a, b, c0, c1, sigma = (float(row[i]) for i in (0, 1, 2, 3, 6))
    rows, timesteps = row.float()[None].contiguous(), torch.tensor([STEP])
    start = torch.tensor([SEED, 0, 0, -1])
    state, z, x0_buffer = start.clone(), torch.empty(shape), torch.empty(shape)

    def make() -> Tensors:
        return torch.randn(shape), torch.randn(shape), torch.empty(shape)

    def kernel(kind: str, x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        state.copy_(start)
        _launch_step(kind, StepOperands(x, out, o), (rows, timesteps, state), 1.0)
        return out

    def in_place(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        state.copy_(start)
        ops.ddpm_step_(x, o, rows, timesteps, state)
        return x

    def plain(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x0 = (a * x + b * o).clamp(-1, 1)
        return c0 * x0 + c1 * x + sigma * torch.randn_like(x)

    def preallocated(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        z.normal_()
        torch.mul(o, b, out=x0_buffer).add_(x, alpha=a).clamp_(-1, 1)
        return torch.mul(x0_buffer, c0, out=out).add_(x, alpha=c1).add_(z, alpha=sigma)

    def truth(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return ops.ddpm_step_ref(x.double(), o.double(), row, seed=SEED, t=STEP)[0]

    def truth_with_torch_noise(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # as `examined` does before the call
        noise = torch.randn(shape).double()
        return ops.ddpm_step_ref(x.double(), o.double(), row, noise=noise)[0]

    ours, theirs = against(truth, 4e-6), against(truth_with_torch_noise, 1e-4)
    size = 4 * math.prod(shape)
    calls = _ours("cpu", lambda x, o, out: ops.ddpm_step(x, o, row, seed=SEED, t=STEP)[0], kernel)
    contestants = {
        **{name: Contestant(call, ours, (4 if name.endswith("op") else 3) * size) for name, call in calls.items()},
        "fastddpm op, in place": Contestant(in_place, ours, 3 * size),
        PLAIN: Contestant(plain, theirs, 3 * size),
        "torch, out=": Contestant(preallocated, theirs, 3 * size),
    }
    if DDPMScheduler is not None:
        scheduler = DDPMScheduler(T, beta_schedule="linear", variance_type="fixed_large", clip_sample=True)
        scheduler.set_timesteps(T)
        t = scheduler.timesteps[T - 1 - STEP]
        contestants["diffusers"] = Contestant(lambda x, o, out: scheduler.step(o, t, x).prev_sample, theirs, 4 * size)
    return Case("ddpm_step", describe(shape, torch.float32), make, contestants)


def ddpm_step_in_graph(shape: tuple[int, ...], device: str = "cuda", **about: object) -> Case:
    """Return the case of a captured chain's step: in place, with the network's next input, all inputs on the device."""
    row = _row()
    a, b, c0, c1, sigma = (float(row[i]) for i in (0, 1, 2, 3, 6))
    rows, timesteps = (v.repeat(TABLE_ROWS, 1) for v in (row.float(), torch.tensor([STEP])))
    rows, timesteps = rows.to(device), timesteps.flatten().to(device)
    start = torch.tensor([as_int64_bits(SEED), 0, 0, -1], device=device)
    state, numel = start.clone(), math.prod(shape)

    def make() -> Tensors:
        x, o = (torch.randn(shape, device=device) for _ in range(2))
        o = o.to(torch.bfloat16, memory_format=torch.channels_last)
        # The step moves 12 bytes an element: the copy reads 6 of them and writes 6.
        source, out = (torch.zeros(numel * 3 // 2, device=device) for _ in range(2))
        return x, o, torch.full_like(o, math.nan), source, out

    def step(x, o, next_input, *_) -> Tensors:
        ops.ddpm_step_(x, o, rows, timesteps, state, next_input=next_input)
        return x, next_input

    def plain(x, o, next_input, *_) -> Tensors:
        x0 = (a * x + b * o).clamp(-1, 1)
        x.copy_(c0 * x0 + c1 * x + sigma * torch.randn_like(x))
        return x, next_input.copy_(x)

    def check(noise: Callable[[], dict], allowed: float) -> Callable[..., tuple[float, float]]:
        def of(result: Tensors, x: torch.Tensor, o: torch.Tensor, *_: torch.Tensor) -> tuple[float, float]:
            exact = ops.ddpm_step_ref(x.double(), o.double(), row, **noise())[0]
            # One figure for both outputs: the low precision's error in units of float32's allowed error.
            rounded = error(result[1], exact) / OURS[torch.bfloat16] * allowed
            return max(error(result[0], exact), rounded), allowed

        return of

    def torch_noise() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # as `examined` does before the call
        return {"noise": torch.randn(shape, device=device).double()}

    def reset() -> None:
        state.copy_(start)

    moved = 12 * numel
    contestants = {
        **_all(_ours(device, step), check(lambda: {"seed": SEED, "t": STEP}, 4e-6), moved),
        PLAIN: Contestant(plain, check(torch_noise, 1e-4), moved),
    }
    name = f"{describe(shape, torch.float32)} in place, o and next_input bfloat16 channels_last"
    return Case("ddpm_step_", name, make, contestants, 3, 4, reset, 8 * numel, **about)


# ------------------------------------------------------------------------------- timestep_embedding, philox_normal


def timestep_embedding(n: int, dim: int, device: str = "cpu", **about: object) -> Case:
    half = dim // 2

    def make() -> Tensors:
        out = torch.zeros(n, dim, device=device)
        return torch.randint(0, T, (n,), device=device), out, torch.empty_like(out)

    def formula(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        f = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=device) / (half - 1))
        angles = t.to(dtype)[:, None] * f
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    def truth(t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return formula(t, torch.float64)

    moved = 8 * n + 4 * n * dim
    contestants = {
        **_all(_ours(device, lambda t, *_: ops.timestep_embedding(t, dim)), against(truth, 2e-6), moved),
        PLAIN: Contestant(lambda t, *_: formula(t, torch.float32), against(truth, 1e-4), moved),
        "torch, float64 inside": Contestant(
            lambda t, *_: formula(t, torch.float64).float(), against(truth, 2e-6), moved
        ),
    }
    return Case("timestep_embedding", f"[{n}] -> {dim}", make, contestants, source=1, **about)


def philox_normal(shape: tuple[int, ...], device: str = "cpu", **about: object) -> Case:
    n, elements = shape[0], math.prod(shape[1:])
    arguments = {"seed": SEED, "t": STEP, "stream": Stream.REVERSE, "device": device}

    def make() -> Tensors:
        return torch.zeros(shape, device=device), torch.empty(shape, device=device)

    def kernel(kind: str, source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        _launch_normal(kind, out, SEED, int(Stream.REVERSE), None, STEP, None, 0)
        return out

    def truth(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        # The reference computes in float64 and rounds once, far below the allowed error.
        return ops.philox_normal_ref(shape, **arguments).double()

    moved = 4 * n * elements
    calls = _ours(device, lambda source, out: ops.philox_normal(shape, **arguments), kernel)
    peers = {
        PLAIN: lambda source, out: torch.randn(shape, device=device),
        "torch, out=": lambda source, out: out.normal_(),
    }
    contestants = {**_all(calls, against(truth, 4e-6), moved), **_all(peers, looks_normal, moved)}
    return Case("philox_normal", describe(shape, torch.float32), make, contestants, **about)
