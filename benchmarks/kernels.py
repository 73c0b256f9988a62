"""Every op by itself: time, GB/s, share of the copy bandwidth, times faster than the plain PyTorch composition.

    python benchmarks/kernels.py [--only group_norm] [--json PATH] [--plot PATH] [--quick]

Parity first: each contestant's output is held against float64 before anybody is timed, and a wrong one ends the run.
All contestants of a case, a plain copy among them, then take turns over the same buffers, 256 MB of them, so that no
cache serves anyone.

"kernel" is the compiled kernel called directly with a preallocated output, "op" the public function, which allocates
its result and passes PyTorch's dispatcher. PyTorch's group_norm cannot write into a given tensor without a copy;
where "out=" is said, the last operation of the composition has a preallocated output and what comes before allocates.
GB/s counts the bytes that must move, whatever a contestant really moves: each input read once, each output written
once. For a tiny op it is no more than the time per call in other words.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _harness import (
    Load,
    Rotation,
    Timing,
    alternate,
    arguments,
    bar_chart,
    check_outputs,
    print_table,
    provenance,
    write_json,
)
from tqdm.auto import tqdm

from fastddpm import Schedule, backend, ops, samplers
from fastddpm.ops.philox_normal import Stream

try:
    from diffusers import DDPMScheduler
except ImportError:
    DDPMScheduler = None

MB = 1 << 20
GROUPS, EPS = 32, 1e-6  # as in the paper's network
SEED, T, STEP = 7, 1000, 500
PLAIN = "torch"  # the composition that "times faster" refers to
COPY = "copy"

# Largest |error| / (1 + |truth|) against float64. Ours round once, to the output's dtype; compositions also in between.
OURS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
THEIRS = {torch.float32: 4e-5, torch.bfloat16: 2e-2}

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Contestant:
    call: Callable[..., torch.Tensor]  # of a set of buffers -> the result
    check: Callable[..., tuple[float, float]]  # of the result and the set as it was before -> (error, allowed)
    moved: int  # bytes


@dataclasses.dataclass
class Case:
    op: str
    name: str
    make: Callable[[], Tensors]  # one set of buffers
    contestants: dict[str, Contestant]
    source: int = 0  # which of the buffers the plain copy reads,
    out: int = -1  # and which it writes; this one is full of NaN when a contestant is checked


def against(truth: Callable[..., torch.Tensor], allowed: float) -> Callable[..., tuple[float, float]]:
    """A check against truth(*buffers), float64."""

    def check(result: torch.Tensor, *buffers: torch.Tensor) -> tuple[float, float]:
        exact = truth(*buffers)
        return float(((result.double() - exact).abs() / (1 + exact.abs())).max()), allowed

    return check


def looks_normal(result: torch.Tensor, *_: torch.Tensor) -> tuple[float, float]:
    """For noise that nobody can predict: mean 0 and variance 1 within 5 standard errors."""
    n, z = result.numel(), result.double()
    return max(abs(float(z.mean())) * n**0.5, abs(float(z.var()) - 1) * (n / 2) ** 0.5), 5.0


def describe(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format | None = None) -> str:
    words = [str(list(shape)), str(dtype).removeprefix("torch.")]
    if layout is not None:
        words.append("channels_last" if layout == torch.channels_last else "contiguous")
    return " ".join(words)


# -------------------------------------------------------------------------------------------- group_norm_silu


def composition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _norm_parameters(channels: int, dtype: torch.dtype) -> Tensors:
    return torch.empty(channels).uniform_(0.5, 1.5).to(dtype), torch.randn(channels).to(dtype)


def group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Case:
    weight, bias = _norm_parameters(shape[1], dtype)
    mean, rstd = torch.empty(shape[0], GROUPS), torch.empty(shape[0], GROUPS)
    n, c, pixels = shape[0], shape[1], math.prod(shape[2:])
    inner = layout == torch.channels_last
    b, parameters = backend.buffer, (backend.buffer(weight), backend.buffer(bias))

    def make() -> Tensors:
        x = (2 * torch.randn(shape) + 0.5).to(dtype).contiguous(memory_format=layout)
        return x, torch.empty_like(x)

    def kernel(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        backend.native.group_norm_silu(
            b(x), b(out), inner, b(mean), b(rstd), *parameters, None, None, None,
            n, c, pixels, GROUPS, EPS, True, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def truth(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return composition(x.double(), weight.double(), bias.double())

    ours, theirs = against(truth, OURS[dtype]), against(truth, THEIRS[dtype])
    moved = 2 * math.prod(shape) * dtype.itemsize
    contestants = {
        "fastddpm op": Contestant(lambda x, out: ops.group_norm_silu(x, GROUPS, weight, bias, EPS), ours, moved),
        PLAIN: Contestant(lambda x, out: composition(x, weight, bias), theirs, moved),
        "torch, out=": Contestant(
            lambda x, out: torch.ops.aten.silu.out(F.group_norm(x, GROUPS, weight, bias, EPS), out=out), theirs, moved
        ),
        "torch, silu in place": Contestant(
            lambda x, out: F.silu(F.group_norm(x, GROUPS, weight, bias, EPS), inplace=True), theirs, moved
        ),
    }
    if backend.native is not None:
        contestants = {"fastddpm kernel": Contestant(kernel, ours, moved), **contestants}
    return Case("group_norm_silu", describe(shape, dtype, layout), make, contestants)


def group_norm_silu_backward(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Case:
    """The gradients of x, weight and bias from a graph that is there already."""
    weight, bias = (v.requires_grad_() for v in _norm_parameters(shape[1], dtype))
    n, c, pixels = shape[0], shape[1], math.prod(shape[2:])
    inner = layout == torch.channels_last
    sums = torch.empty(3, n, c)
    b, parameters = backend.buffer, (backend.buffer(weight), backend.buffer(bias))

    def make() -> Tensors:
        x = (2 * torch.randn(shape) + 0.5).to(dtype).contiguous(memory_format=layout).requires_grad_()
        dy = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        with torch.enable_grad():
            y, mean, rstd = torch.ops.fastddpm.group_norm_silu(x, GROUPS, weight, bias, EPS, None, None, None, True)
            return x, dy, torch.empty_like(dy), mean, rstd, y, composition(x, weight, bias)

    def kernel(x, dy, out, mean, rstd, *_) -> torch.Tensor:
        backend.native.group_norm_silu_backward(
            b(dy), b(x), b(out), inner, b(mean), b(rstd), *parameters, None, None, None,
            b(sums[0]), b(sums[1]), b(sums[2]), n, c, pixels, GROUPS, True, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gradient(y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)[0]

    def truth(x, dy, *_) -> torch.Tensor:
        with torch.enable_grad():
            exact = x.detach().double().requires_grad_()
            y = composition(exact, weight.detach().double(), bias.detach().double())
        return torch.autograd.grad(y, exact, dy.double())[0]

    ours, theirs = against(truth, OURS[dtype]), against(truth, THEIRS[dtype])
    moved = 3 * math.prod(shape) * dtype.itemsize
    contestants = {
        "fastddpm op": Contestant(lambda x, dy, out, mean, rstd, y, _: gradient(y, x, dy), ours, moved),
        PLAIN: Contestant(lambda x, dy, out, mean, rstd, _, y: gradient(y, x, dy), theirs, moved),
    }
    if backend.native is not None:
        contestants = {"fastddpm kernel": Contestant(kernel, ours, moved), **contestants}
    return Case("group_norm_silu_backward", describe(shape, dtype, layout), make, contestants, 1, 2)


# -------------------------------------------------------------------------------------------------- ddpm_step


def ddpm_step(shape: tuple[int, ...]) -> Case:
    """One step with fresh noise, from the middle of the paper's chain."""
    schedule = Schedule.linear(T)
    row = samplers.ddpm(schedule).rows[T - 1 - STEP]
    a, b, c0, c1, sigma = (float(row[i]) for i in (0, 1, 2, 3, 6))
    rows, timesteps = row.float()[None].contiguous(), torch.tensor([STEP])
    start = torch.tensor([SEED, 0, 0, -1])
    state, z, x0_buffer = start.clone(), torch.empty(shape), torch.empty(shape)
    n, c, pixels = shape[0], shape[1], math.prod(shape[2:])
    as_buffer = backend.buffer

    def make() -> Tensors:
        return torch.randn(shape), torch.randn(shape), torch.empty(shape)

    def kernel(x: torch.Tensor, o: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        state.copy_(start)
        backend.native.ddpm_step(
            as_buffer(x), as_buffer(out), False, as_buffer(o), False, None, None, None, False, None,
            as_buffer(rows), as_buffer(timesteps), as_buffer(state), n, c, c, pixels, 1.0, torch.get_num_threads(),
        )  # fmt: skip
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
        torch.manual_seed(0)  # as `examine` does before the call
        noise = torch.randn(shape).double()
        return ops.ddpm_step_ref(x.double(), o.double(), row, noise=noise)[0]

    ours, theirs = against(truth, 4e-6), against(truth_with_torch_noise, 1e-4)
    size = 4 * math.prod(shape)
    contestants = {
        "fastddpm op": Contestant(lambda x, o, out: ops.ddpm_step(x, o, row, seed=SEED, t=STEP)[0], ours, 4 * size),
        "fastddpm op, in place": Contestant(in_place, ours, 3 * size),
        PLAIN: Contestant(plain, theirs, 3 * size),
        "torch, out=": Contestant(preallocated, theirs, 3 * size),
    }
    if backend.native is not None:
        contestants = {"fastddpm kernel": Contestant(kernel, ours, 3 * size), **contestants}
    if DDPMScheduler is not None:
        scheduler = DDPMScheduler(T, beta_schedule="linear", variance_type="fixed_large", clip_sample=True)
        scheduler.set_timesteps(T)
        t = scheduler.timesteps[T - 1 - STEP]
        contestants["diffusers"] = Contestant(lambda x, o, out: scheduler.step(o, t, x).prev_sample, theirs, 4 * size)
    return Case("ddpm_step", describe(shape, torch.float32), make, contestants)


# ------------------------------------------------------------------------------- timestep_embedding, philox_normal


def timestep_embedding(n: int, dim: int) -> Case:
    half = dim // 2

    def make() -> Tensors:
        return torch.randint(0, T, (n,)), torch.zeros(n, dim), torch.empty(n, dim)

    def formula(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        f = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype) / (half - 1))
        angles = t.to(dtype)[:, None] * f
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    def truth(t: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return formula(t, torch.float64)

    moved = 8 * n + 4 * n * dim
    return Case(
        "timestep_embedding",
        f"[{n}] -> {dim}",
        make,
        {
            "fastddpm op": Contestant(lambda t, *_: ops.timestep_embedding(t, dim), against(truth, 2e-6), moved),
            PLAIN: Contestant(lambda t, *_: formula(t, torch.float32), against(truth, 1e-4), moved),
            "torch, float64 inside": Contestant(
                lambda t, *_: formula(t, torch.float64).float(), against(truth, 2e-6), moved
            ),
        },
        source=1,
    )


def philox_normal(shape: tuple[int, ...]) -> Case:
    n, elements = shape[0], math.prod(shape[1:])

    def make() -> Tensors:
        return torch.zeros(shape), torch.empty(shape)

    def kernel(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        backend.native.philox_normal(
            backend.buffer(out), n, elements, SEED, int(Stream.REVERSE), None, STEP, None, 0, torch.get_num_threads()
        )
        return out

    def truth(source: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        # The reference computes in float64 and rounds once, far below what is allowed here.
        return ops.philox_normal_ref(shape, seed=SEED, t=STEP, stream=Stream.REVERSE).double()

    ours = against(truth, 4e-6)
    moved = 4 * n * elements
    contestants = {
        "fastddpm op": Contestant(
            lambda source, out: ops.philox_normal(shape, seed=SEED, t=STEP, stream=Stream.REVERSE), ours, moved
        ),
        PLAIN: Contestant(lambda source, out: torch.randn(shape), looks_normal, moved),
        "torch, out=": Contestant(lambda source, out: out.normal_(), looks_normal, moved),
    }
    if backend.native is not None:
        contestants = {"fastddpm kernel": Contestant(kernel, ours, moved), **contestants}
    return Case("philox_normal", describe(shape, torch.float32), make, contestants)


# ------------------------------------------------------------------------------------------------ the run

CL, CONTIGUOUS = torch.channels_last, torch.contiguous_format
CASES: list[tuple[Callable[..., Case], tuple]] = [
    *(
        (group_norm_silu, (shape, dtype, layout))
        for layout in (CL, CONTIGUOUS)
        for dtype in (torch.float32, torch.bfloat16)
        for shape in ((16, 128, 32, 32), (16, 256, 16, 16))
    ),
    *((group_norm_silu, ((1, 128, 32, 32), dtype, CL)) for dtype in (torch.float32, torch.bfloat16)),
    (group_norm_silu_backward, ((16, 128, 32, 32), torch.float32, CL)),
    (ddpm_step, ((256, 3, 32, 32),)),
    (timestep_embedding, (256, 128)),
    (philox_normal, ((256, 3, 32, 32),)),
]


def examine(case: Case) -> dict[str, float]:
    """Each contestant's error against float64; ends the run where one is over what is allowed."""
    buffers = case.make()
    buffers[case.out].fill_(math.nan)
    errors = {}
    for name, contestant in case.contestants.items():
        # Leaves of a graph stay themselves; the rest is cloned, as some contestants write into their input.
        given = tuple(v if v.requires_grad else v.clone() for v in buffers)
        torch.manual_seed(0)
        error, allowed = contestant.check(contestant.call(*given), *buffers)
        if not error <= allowed:  # a NaN is not
            sys.exit(f"{case.op} {case.name}: {name} is wrong: error {error:.2g}, allowed {allowed:.2g}; not timed")
        errors[name] = error
    return errors


def measure(case: Case, settings: argparse.Namespace) -> dict[str, Timing]:
    buffers = Rotation(case.make, (64 if settings.quick else 256) * MB)

    def copy() -> None:
        turn = buffers.next()
        turn[case.out].copy_(turn[case.source])

    calls = {name: lambda call=c.call: call(*buffers.next()) for name, c in case.contestants.items()}
    seconds = settings.seconds / (5 if settings.quick else 1)
    return alternate({COPY: copy, **calls}, seconds=seconds, label=f"{case.op} {case.name}")


def summary(case: Case, errors: dict[str, float], timings: dict[str, Timing]) -> dict[str, object]:
    """A case as it goes into the JSON."""
    out = case.make()[case.out]
    moved = {COPY: 2 * out.numel() * out.element_size(), **{name: c.moved for name, c in case.contestants.items()}}
    rate = {name: moved[name] / timing.median / 1e9 for name, timing in timings.items()}
    contestants = {
        name: {
            **timing.milliseconds(),
            "gb_per_s": rate[name],
            "share_of_copy": rate[name] / rate[COPY],
            "times_faster_than_torch": None if name == COPY else timings[PLAIN].median / timing.median,
            "error": errors.get(name),
        }
        for name, timing in timings.items()
    }
    return {"op": case.op, "case": case.name, "contestants": contestants}


def table(results: list[dict]) -> None:
    rows = []
    for result in results:
        rows.append([f"{result['op']} {result['case']}"])
        for name, c in result["contestants"].items():
            faster = c["times_faster_than_torch"]
            rows.append(
                [
                    f"  {name}",
                    f"{c['ms']:.3f}",
                    f"{c['ms_p20']:.3f}",
                    f"{c['ms_p80']:.3f}",
                    f"{c['gb_per_s']:.1f}",
                    f"{c['share_of_copy']:.0%}",
                    "" if faster is None else f"{faster:.2f}",
                ]
            )
    print_table(["", "ms", "p20", "p80", "GB/s", "of copy", "x torch"], rows)


def main() -> None:
    parser = arguments("Time every op beside a copy of the same bytes and the plain PyTorch composition.")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose op and name contain this")
    parser.add_argument("--seconds", type=float, default=3.0, help="time spent on each case")
    parser.add_argument("--quick", action="store_true", help="a fifth of the time, a quarter of the buffers")
    settings = parser.parse_args()
    check_outputs(settings)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    cases = [build(*given) for build, given in CASES]
    cases = [case for case in cases if settings.only in f"{case.op} {case.name}"]
    if not cases:
        sys.exit(f"--only: no case contains {settings.only!r}")
    if backend.native is None:
        print(f"no compiled kernels here: {backend.unavailable('cpu')}; the ops run as their PyTorch reference")
    if DDPMScheduler is None:
        print("diffusers is not installed: its DDPMScheduler.step is missing below")

    load = Load(settings.force)
    results = []
    for case in tqdm(cases, desc="cases", unit="case", disable=None):
        results.append(summary(case, examine(case), measure(case, settings)))
    table(results)
    loaded = load.report()
    if settings.json is not None:
        write_json(settings.json, {"benchmark": "kernels", **provenance(settings), "load": loaded, "results": results})
    if settings.plot is not None:
        panels = {f"{r['op']} {r['case']}": {name: c["ms"] for name, c in r["contestants"].items()} for r in results}
        bar_chart(settings.plot, "Time of each op, shorter is better", "ms", panels)


if __name__ == "__main__":
    main()
