"""Parity: the errors of every op against float64, on every available backend. `fastddpm check` prints them; tests assert them.

Each error is reported as a share of its bound. A share over 1 is a bug. The bounds are guarantees to users and are defined only
in this file. They are small multiples of a float32 rounding, so that naive formulas, which cancel or lose digits of an argument,
exceed them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from . import backend, ops
from .diffusion import coefficients
from .diffusion.schedule import Schedule
from .ops.ddpm_step import C0, C1, C2, LV_HI, LV_LO, SIGMA, A, B, D
from .ops.philox_normal import normals_float64
from .ops.rng import Stream, as_int64_bits
from .utils.validation import dtype_name

NOISE = 4e-6  # bound on a normal's error against the float64 formula
EMBEDDING = 2e-6
GRADIENT = 4e-6  # relative to the largest |dx|, or to a channel's sum of |summands|
ROUNDING = 2.0**-24  # relative error of rounding to float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "permuted")


class Result(NamedTuple):
    op: str
    dtype: str
    layout: str
    backend: str
    share: float  # the largest error / its bound
    case: str  # the case with that error


class Case(NamedTuple):
    op: str
    dtype: torch.dtype
    layout: str
    name: str
    compute: Callable[[], torch.Tensor | Sequence[torch.Tensor]]  # runs the op on the backend in use
    truth: Sequence[torch.Tensor]  # float64
    bound: Sequence[torch.Tensor | float]


# ------------------------------------------------------------------------------------------------- bounds


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between adjacent numbers of dtype around float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def step_bound(x, o, row, z, x0_last=None, *, drawn=False):
    """Return bounds on the errors of (x_prev, x0), for float64 operands: four roundings of the sum of the terms' magnitudes.

    A term is rounded up to seven times, in its product and in the sums after it. No rounding error exceeds that of the sum of
    magnitudes, and most are far smaller. With a learned variance, exp turns the absolute error of its argument into a relative
    one.
    """
    c = x.shape[1]
    eps, v = o[:, :c], o[:, c:]
    x0 = (row[A] * x).abs() + (row[B] * eps).abs()
    x_prev = row[C0].abs() * x0 + (row[C1] * x).abs() + (row[D] * eps).abs()
    if x0_last is not None:
        x_prev = x_prev + (row[C2] * x0_last).abs()
    sigma, argument = row[SIGMA], 0.0
    if v.shape[1]:
        f = (v + 1) / 2
        high, low = f * row[LV_HI], (1 - f) * row[LV_LO]
        sigma, argument = sigma * ((high + low) / 2).exp(), (high.abs() + low.abs()) / 2
    if row[SIGMA] != 0:
        x_prev = x_prev + sigma * z.abs() * (1 + argument)
    return 4 * ROUNDING * x_prev + (NOISE * sigma if drawn else 0), 4 * ROUNDING * x0


def normalised(x, num_groups, eps, add=None):
    """Return float64 (h, xhat, std) for h = x + add. h and xhat are [N, G, C/G * P], std is [N, G, 1]."""
    h = x.double() if add is None else x.double() + per_channel(add, x)
    h = h.reshape(len(x), num_groups, -1)
    std = (h.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return h, (h - h.mean(-1, keepdim=True)) / std, std


def norm_bound(truth, x, num_groups, weight, eps, *, add=None, scale=None):
    """Return the bound on the error of group_norm_silu. It grows with the largest normalised value of the group.

    The bound is proportional to the factor of the normalised value, weight * (1 + scale).
    """
    h, xhat, std = normalised(x, num_groups, eps, add)
    per_group = 2e-7 * (20 + 4 * xhat.abs().amax(-1, keepdim=True))
    if add is not None:  # x + add is itself rounded to float32
        per_group = per_group + 1.2e-7 * h.abs().amax(-1, keepdim=True) / std
    slope = per_channel(weight, x) if scale is None else per_channel(weight, x) * (1 + per_channel(scale, x))
    bound = per_group.expand_as(h).reshape(x.shape) * (slope.abs() + 1) * 1.1 + 2.0**-22 * truth.abs()
    return bound if x.dtype == torch.float32 else bound + ulp(truth, x.dtype) + 1e-3


def norm_gradients(dy, x, num_groups, weight, bias, eps, *, add=None, scale=None, shift=None, silu=True):
    """Return float64 truth and bounds of (dx, sum_p g, sum_p g*xhat, sum_p dx), by autograd of the formula. g is dL/dz."""
    x64 = x.double().requires_grad_()
    xhat = normalised(x64, num_groups, eps, add)[1].reshape(x.shape)
    z = (xhat * per_channel(weight, x) + per_channel(bias, x)) * (1 if scale is None else 1 + per_channel(scale, x))
    z = z if shift is None else z + per_channel(shift, x)
    y = torch.nn.functional.silu(z) if silu else z
    g, dx = torch.autograd.grad(y, (z, x64), dy.double())
    dx_bound = (GRADIENT * dx.abs().max()).expand_as(dx)
    if x.dtype != torch.float32:
        dx_bound = dx_bound + ulp(dx, x.dtype)
    truth, bound = [dx], [dx_bound]
    for summands in (g, g * xhat, dx):
        summands = summands.detach().reshape(*x.shape[:2], -1)
        size = summands.abs()
        truth.append(summands.sum(-1))
        # A channel's few summands may all be near 0 and inaccurate, as they are differences of large numbers. So the bound uses
        # at least the largest summand of all channels.
        bound.append(GRADIENT * size.sum(-1).clamp_min(size.max()))
    return truth, bound


def share(got: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor | float) -> float:
    """Return the largest error as a share of its bound; infinity if a result is NaN."""
    if got.shape != truth.shape:
        raise ValueError(f"got shape {list(got.shape)}; expected {list(truth.shape)}, as the truth")
    error = (got.cpu().double() - truth).abs()
    ratio = torch.where(error == 0, 0.0, error / bound).nan_to_num(nan=math.inf)
    return float(ratio.max()) if ratio.numel() else 0.0


# ------------------------------------------------------------------------------------------------- inputs


def per_channel(v: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return v, [C] or [N, C], in float64, shaped to broadcast against [N, C, *spatial]."""
    return v.double().reshape(*v.shape, *[1] * (like.dim() - 2))


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return x in another memory layout. "permuted" is dense, but is neither contiguous nor channels_last."""
    if layout == "contiguous":
        return x.contiguous()
    where = -1 if layout == "channels_last" else 0
    return x.movedim(1, where).contiguous().movedim(where, 1)


def _on(device: str, arguments: dict[str, object]) -> dict[str, object]:
    return {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


# Samples whose words are extreme with seed 0, t 0 and stream REVERSE. For some, u is as near to 0 or 1 as 32-bit words allow,
# where the logarithm cancels. For others, the radius is large and the angle nearly a multiple of pi, where the sine cancels.
EXTREME_SAMPLES = (404004655, 836265242, 470173456, 858486204, 26811165, 511039549, 1025629789)


def _philox_normal(device: str) -> Iterator[Case]:
    extreme, edges = torch.tensor(EXTREME_SAMPLES), torch.tensor([0, 999, (1 << 20) - 1])
    for name, shape, seed, stream, arguments in (
        ("odd sizes, t per sample", (3, 3, 5, 7), (1 << 63) + 5, Stream.FORWARD, {"t": edges, "first": (1 << 40) + 3}),
        ("extreme words", (len(extreme), 4), 0, Stream.REVERSE, {"t": 0, "sample": extreme}),
        ("many", (2, 3, 64, 65), 42, Stream.X_T, {"t": 0}),
    ):
        first = arguments.get("first", 0)
        sample = arguments.get("sample", torch.arange(first, first + shape[0]))
        t = torch.as_tensor(arguments["t"]).expand(shape[0])
        truth = normals_float64(math.prod(shape[1:]), sample, t, as_int64_bits(seed), stream).reshape(shape)
        compute = functools.partial(
            ops.philox_normal, shape, seed=seed, stream=stream, device=device, **_on(device, arguments)
        )
        yield Case("philox_normal", torch.float32, "contiguous", name, compute, (truth,), (NOISE,))


def _timestep_embedding(device: str) -> Iterator[Case]:
    whole = torch.tensor([0, 1, 2, 500, 999, 10**6, -(10**6)])
    for name, t, dim, convention in (
        ("Ho", whole, 128, {}),
        ("odd dim", whole, 75, {}),
        ("cosine first, no shift", whole, 320, {"flip_sin_to_cos": True, "freq_shift": 0}),
        ("Ho", torch.tensor([0.5, 999.75, 12345.678, -1e6]), 130, {}),
        ("short period", torch.tensor([0.001, 998.999]), 34, {"max_period": 100.0}),
    ):
        truth = ops.timestep_embedding_ref(t.double(), dim, **convention)
        compute = functools.partial(ops.timestep_embedding, t.to(device), dim, **convention)
        yield Case("timestep_embedding", t.dtype, "contiguous", name, compute, (truth,), (EMBEDDING,))


def step_in_place(x, o, row, *, noise=None, seed=0, t=0, first=0, x0_last=None, clip=1.0, next_input=None):
    """Return (x_prev, x0, next_input), computed by `ddpm_step_` on copies, with the row in the middle of a table."""
    x, x0 = x.clone(), x.clone() if x0_last is None else torch.empty_like(x).copy_(x0_last)
    next_input = torch.empty_like(x, dtype=o.dtype) if next_input is None else next_input
    rows = torch.stack((torch.full_like(row, math.nan), row, torch.full_like(row, math.nan))).float().to(x.device)
    timesteps = torch.tensor([-1, t, -1], device=x.device)
    state = torch.tensor([as_int64_bits(seed), first, 1, -1], device=x.device)
    ops.ddpm_step_(x, o, rows, timesteps, state, x0=x0, next_input=next_input, noise=noise, clip=clip)
    if state.tolist() != [as_int64_bits(seed), first, 2, -1]:
        raise RuntimeError(f"ddpm_step_ left the state {state.tolist()}")
    return x, x0, next_input


def _ddpm_step(device: str) -> Iterator[Case]:
    schedule = Schedule.linear()
    epsilon, mean = coefficients.table(schedule), coefficients.table(schedule, prediction="mean")
    learned = epsilon.rows.clone()
    learned[:, SIGMA], learned[:, LV_HI] = 1, schedule.betas.log().flip(0)
    learned[:-1, LV_LO] = schedule.posterior_variance[1:].log().flip(0)
    multistep = torch.tensor([1.1, -0.4, 0.7, 0.2, -0.3, 0.25, 0.4, 0, 0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    for name, shape, row, channels, drawn, clip in (
        ("first step, odd sizes", (3, 3, 5, 7), epsilon.rows[0], 1, False, 1.0),
        ("noise drawn", (2, 3, 17, 9), epsilon.rows[499], 1, True, 1.0),
        ("learned variance, noise drawn", (2, 3, 8, 11), learned[300], 2, True, 0.7),
        ("every term, no clip", (1, 5, 33), multistep, 1, False, None),
        ("mean", (2, 1, 6, 6), mean.rows[700], 1, True, 1.0),
        ("last step", (2, 4, 6, 6), epsilon.rows[-1], 1, False, 1.0),
    ):
        n, c, *spatial = shape
        x, noise, x0_last = (torch.randn(shape, generator=generator) for _ in range(3))
        output = torch.randn(n, channels * c, *spatial, generator=generator)
        row = row.float().double()
        draw = {"seed": (1 << 63) + 11, "t": 999, "first": (1 << 40) + 1}
        if drawn:
            sample = torch.arange(draw["first"], draw["first"] + n)
            t = torch.tensor([draw["t"]])
            noise = normals_float64(math.prod(shape[1:]), sample, t, as_int64_bits(draw["seed"]), Stream.REVERSE)
            noise = noise.reshape(shape)
        for dtype in DTYPES:
            o = output.to(dtype)
            operands = (x.double(), o.double(), row)
            last = x0_last.double()
            truth = ops.ddpm_step_ref(*operands, noise=noise.double(), x0_last=last, clip=clip)
            bound = step_bound(*operands, noise.double(), last, drawn=drawn)
            for layout in LAYOUTS:
                # o and x have different layouts, which is the harder case.
                o_layout = "contiguous" if layout == "channels_last" else "channels_last"
                xs, os = arranged(x, layout).to(device), arranged(o, o_layout).to(device)
                arguments = draw if drawn else {"noise": arranged(noise, layout).to(device)}
                arguments = {**arguments, "x0_last": x0_last.to(device), "clip": clip}
                compute = functools.partial(ops.ddpm_step, xs, os, row, **arguments)
                yield Case("ddpm_step", dtype, layout, name, compute, truth, bound)
                if layout != "permuted":  # ddpm_step_ refuses permuted memory, because it must not copy
                    compute = functools.partial(step_in_place, xs, os, row, **arguments)
                    next_bound = bound[0] if dtype == torch.float32 else bound[0] + ulp(truth[0], dtype)
                    yield Case("ddpm_step_", dtype, layout, name, compute, (*truth, truth[0]), (*bound, next_bound))


def norm_backward(dy, x, num_groups, weight, bias, eps, *, add=None, scale=None, shift=None, silu=True):
    """Return (dx, sum_p g, sum_p g*xhat, sum_p dx), computed by the backend in use."""
    operands = (x, num_groups, weight, bias, eps, add, scale, shift, silu)
    _, mean, rstd = torch.ops.fastddpm.group_norm_silu(*operands)
    kind = backend.select(x.device, x.dtype)
    return torch.ops.fastddpm.group_norm_silu_backward(
        dy, x, weight, bias, add, scale, shift, mean, rstd, num_groups, silu, kind
    )


def _group_norm_silu(device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    hot = randn(1, 6, 21, 31)
    hot[0, 0, 0, 0], hot[0, -1, -1, -1] = 1e4, -1e4
    for name, x, groups, optional in (
        ("every input", randn(3, 12, 5, 7), 3, {"add": randn(3, 12), "scale": randn(3, 12), "shift": randn(12)}),
        ("32 groups", randn(2, 64, 16, 16), 32, {"add": randn(64)}),
        ("one group, mean 1e4", 1e4 + randn(2, 10, 9, 9), 1, {"silu": False}),
        ("group = channel, mean 1e3", 1e3 + randn(2, 37, 40), 37, {"scale": randn(37)}),
        ("hot pixels", hot, 2, {}),
        ("constant", torch.full((2, 8, 6, 6), 3.3), 4, {"shift": randn(2, 8)}),
        ("no spatial dimension", randn(3, 24), 4, {"add": randn(3, 24)}),
    ):
        c = x.shape[1]
        weight, bias, gradient, eps = 1 + 0.5 * randn(c), randn(c), randn(*x.shape), 1e-6
        for dtype in DTYPES:
            low, dy = x.to(dtype), gradient.to(dtype)
            parameters = (groups, weight, bias.to(dtype), eps)  # each in x's dtype or float32
            as_double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
            truth = ops.group_norm_silu_ref(
                low.double(), groups, weight.double(), bias.to(dtype).double(), eps, **as_double
            )
            bound = norm_bound(truth, low, groups, weight, eps, add=optional.get("add"), scale=optional.get("scale"))
            gradients, gradient_bounds = norm_gradients(dy, low, *parameters, **optional)
            for layout in LAYOUTS:
                xs, dys = arranged(low, layout).to(device), arranged(dy, layout).to(device)
                on_device = [p.to(device) if isinstance(p, torch.Tensor) else p for p in parameters]
                compute = functools.partial(ops.group_norm_silu, xs, *on_device, **_on(device, optional))
                yield Case("group_norm_silu", dtype, layout, name, compute, (truth,), (bound,))
                compute = functools.partial(norm_backward, dys, xs, *on_device, **_on(device, optional))
                yield Case("group_norm_silu_backward", dtype, layout, name, compute, gradients, gradient_bounds)


# ---------------------------------------------------------------------------------------------------- run


def cases(device: str = "cpu") -> Iterator[Case]:
    for of_op in (_philox_normal, _timestep_embedding, _ddpm_step, _group_norm_silu):
        yield from of_op(device)


def run(device: str = "cpu", backends: Sequence[str] | None = None) -> list[Result]:
    """Return a result for each op, dtype, layout and backend that runs on `device`. `backends` defaults to all available ones.

    Raises ValueError for an unknown backend and BackendError for one that cannot run on this machine.
    """
    if backends is None:
        backends = [name for name in backend.NAMES if backend.unavailable_reason(name) is None]
    worst: dict[tuple[str, ...], Result] = {}
    for name in backends:  # raise for an unknown or missing backend before computing
        with backend.use(name):
            pass
    for case in cases(device):
        for name in backends:
            served = case.dtype if case.dtype.is_floating_point else torch.float32
            if backend.unsupported_reason(name, torch.device(device), served) is not None:
                continue
            with backend.use(name):
                outputs = case.compute()
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            largest = max(map(share, outputs, case.truth, case.bound))
            result = Result(case.op, dtype_name(case.dtype), case.layout, name, largest, case.name)
            if result[:4] not in worst or largest > worst[result[:4]].share:
                worst[result[:4]] = result
    return list(worst.values())


def as_text(results: Sequence[Result]) -> str:
    """Return the results as a table in plain text, with the shares of the bounds in percent."""
    lines = [("op", "dtype", "layout", "backend", "error/bound", "largest in")]
    lines += [(*r[:4], f"{r.share:.1%}" + ("" if r.share <= 1 else " (!)"), r.case) for r in results]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
