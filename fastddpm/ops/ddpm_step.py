"""One fused reverse step of any sampler: x0 from the prediction, clipping, mean, variance and noise.

With o the network's output and a row (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi):

    x0     = clamp(a*x + b*o, -clip, clip)                          NaN is preserved
    x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,    f = (v+1)/2

For DDPM (Ho et al. 2020, eqs. 7, 11 and 15), c0*x0 + c1*x is the posterior mean and sigma*z the fresh noise. v is the second
half of an output with 2C channels ("learned_range"); it is read only if (lv_lo, lv_hi) != (0, 0). Terms with coefficient 0
are not read. z is the `noise` argument, or else Philox stream 1 of (seed, timestep, first + i).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import backend
from ..utils.validation import dtype_name
from ._operands import StepOperands
from ._register import checked_layout, forward_mode, has_tangent, layout, register
from .philox_normal import normals_float64
from .rng import Stream, as_int64_bits, check_first, check_seed

A, B, C0, C1, C2, D, SIGMA, LV_LO, LV_HI = range(9)
O_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------- reference


def _term(coefficient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return coefficient * value; exactly 0 if the coefficient is 0, even if the value is NaN or infinite."""
    return torch.where(coefficient == 0, 0.0, coefficient * value)


def _step(x, o, row, z, x0_last, clip):
    """Return (x_prev, x0) for row [9] in x's dtype, without synchronizing with the device."""
    c = x.shape[1]
    eps, v = o[:, :c].to(x.dtype), o[:, c:].to(x.dtype)
    x0 = _term(row[A], x) + _term(row[B], eps)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    x_prev = _term(row[C0], x0) + _term(row[C1], x) + _term(row[D], eps)
    if x0_last is not None:
        x_prev = x_prev + _term(row[C2], x0_last)
    if z is not None:
        sigma = row[SIGMA]
        if v.shape[1]:
            f = (v + 1) / 2
            log_variance = _term(row[LV_HI], f) + _term(row[LV_LO], 1 - f)
            sigma = torch.where(sigma == 0, 0.0, sigma * (log_variance / 2).exp())
        x_prev = x_prev + torch.where(row[SIGMA] == 0, 0.0, sigma * z)
    return x_prev, x0


def _normals(x, seed, t, first):
    """Return z of stream 1, in x's shape and dtype. seed (its int64 bits), t and first are ints or 0-d tensors."""
    n = x.shape[0]
    sample = first + torch.arange(n, device=x.device)
    t = torch.as_tensor(t, device=x.device).reshape(1)
    z = normals_float64(x[0].numel() if n else 0, sample, t, seed, Stream.REVERSE)
    return z.reshape(x.shape).to(x.dtype)


def _bad(o, row, c):
    """Return whether any element of o that the step reads is not finite, as a 0-d bool tensor."""
    bad = ~o[:, :c].isfinite().all() & ((row[B] != 0) | (row[D] != 0))
    if o.shape[1] > c:
        learned = (row[SIGMA] != 0) & ((row[LV_LO] != 0) | (row[LV_HI] != 0))
        bad = bad | (~o[:, c:].isfinite().all() & learned)
    return bad


def _functional_reference(x, o, row, noise, seed, t, first, x0_last, clip):
    if noise is None and float(row[SIGMA]) != 0:
        noise = _normals(x, seed, t, first)
    return _step(x, o, row.to(x), noise, x0_last, clip)


# ------------------------------------------------------------------------------------------------- launch


def _launch(kind, operands, table, clip, *, table_on_host=False):
    """Run the kernel. table is (rows, timesteps, state), on x's device or, for a single step, on the host."""
    if kind == "triton":
        from ._triton import ddpm_step as triton_kernels

        triton_kernels.ddpm_step(operands, table, clip, table_on_host)
        return
    x, x_prev, o, x0_last, x0, next_input, noise = operands
    b, (n, c) = backend.buffer, x.shape[:2]
    backend.native.ddpm_step(
        b(x), b(x_prev), layout(x) == "channels_last", b(o), layout(o) == "channels_last", b(x0_last), b(x0),
        b(next_input), next_input is not None and layout(next_input) == "channels_last", b(noise), *map(b, table),
        n, c, o.shape[1], x[0, 0].numel(), clip, table_on_host, backend.launch_target(kind, x.device),
    )  # fmt: skip


def _in_kernel_layout(v: torch.Tensor, name: str) -> torch.Tensor:
    return v.contiguous() if checked_layout(v, name) == "dense" else v


def _like(v: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Return v in x's memory layout; v itself if the layouts agree."""
    if v is None or layout(v) == layout(x):
        return v
    return torch.empty_like(x).copy_(v)


# ------------------------------------------------------------------------------------------ registered ops


def _functional(x, o, row, noise, seed, t, first, x0_last, clip):
    _check_values(row, noise, seed, x0_last)
    kind = backend.select(x.device, x.dtype if x.dtype == torch.float64 else o.dtype)
    if kind != "reference" and x.numel():
        x_in = _in_kernel_layout(x, "x")
        result = torch.empty_like(x_in), torch.empty_like(x_in)
        host = torch.device("cpu")  # explicit, as the default device may be another
        table = row.float(), torch.tensor([t or 0], device=host), torch.tensor([seed or 0, first, 0, -1], device=host)
        operands = StepOperands(
            x_in, result[0], _in_kernel_layout(o, "o"), _like(x0_last, x_in), result[1], noise=_like(noise, x_in)
        )
        _launch(kind, operands, table, clip, table_on_host=True)
        if x_in is x:  # the results then have x's strides, as the fake implementation promises
            return result
    else:
        result = _functional_reference(x, o, row, noise, seed, t, first, x0_last, clip)
    outputs = torch.empty_like(x), torch.empty_like(x)  # in x's exact strides, as the fake implementation promises
    return tuple(v if v.stride() == y.stride() else y.copy_(v) for v, y in zip(result, outputs, strict=True))


def _functional_fake(x, o, row, noise, seed, t, first, x0_last, clip):
    return torch.empty_like(x), torch.empty_like(x)


register(
    "ddpm_step(Tensor x, Tensor o, Tensor row, Tensor? noise, SymInt? seed, SymInt? t, SymInt first, Tensor? x0_last, "
    "float? clip) -> (Tensor, Tensor)",
    _functional,
    _functional_fake,
)


def _in_place(x, o, rows, timesteps, state, *, x0=None, next_input=None, noise=None, clip=1.0):
    kind = backend.select(x.device, o.dtype)
    if next_input is not None and kind == "cpu":  # it supports fewer dtypes than the reference
        kind = backend.select(x.device, next_input.dtype)
    if kind != "reference" and x.numel():
        operands = StepOperands(x, x, _in_kernel_layout(o, "o"), x0, x0, next_input, _like(noise, x))
        _launch(kind, operands, (rows, timesteps, state), clip)
        return
    index, count = state[2:3], len(timesteps)
    possible = (index >= 0) & (index < count)
    index_in_range = index.clamp(0, count - 1)
    row, t = rows.index_select(0, index_in_range)[0], timesteps.index_select(0, index_in_range)
    complete = row[C2] == 0 if x0 is None else torch.ones_like(possible)
    if x.device.type == "cpu":  # on other devices the host does not read the state, and state[3] records the error
        if not possible:
            raise ValueError(f"state points at row {int(index)} of a table of {count}")
        if not complete:
            raise ValueError("this row's c2 is not 0, so x0_last is required")
    possible = possible & complete
    z = _normals(x, state[0], t, state[1]) if noise is None else noise
    x_prev, x0_new = _step(x, o, row, z, x0, clip)
    bad = _bad(o, row, x.shape[1]) | ~possible
    state[3:4].copy_(torch.where((state[3] < 0) & bad, state[2], state[3]))
    state[2:3] += 1
    x.copy_(torch.where(possible, x_prev, x))
    if x0 is not None:
        x0.copy_(torch.where(possible, x0_new, x0))
    if next_input is not None:
        next_input.copy_(torch.where(possible, x_prev, next_input))


def _in_place_fake(x, o, rows, timesteps, state, *, x0=None, next_input=None, noise=None, clip=1.0):
    return None


register(
    "ddpm_step_(Tensor(a!) x, Tensor o, Tensor rows, Tensor timesteps, Tensor(b!) state, *, Tensor(c!)? x0=None, "
    "Tensor(d!)? next_input=None, Tensor? noise=None, float? clip=1.0) -> ()",
    _in_place,
    _in_place_fake,
)


# ------------------------------------------------------------------------------------------------- public


def _check_pair(x, o, clip):
    allowed = (torch.float32, torch.float64)
    if x.dim() < 3 or x.dtype not in allowed:
        raise ValueError(f"x: got {dtype_name(x.dtype)} {list(x.shape)}; expected float32 [N, C, *spatial]")
    n, c, *spatial = x.shape
    if o.dtype not in (*O_DTYPES, x.dtype):
        raise ValueError(f"o: got {dtype_name(o.dtype)}; expected float32, bfloat16 or float16")
    if list(o.shape) not in ([n, c, *spatial], [n, 2 * c, *spatial]):
        raise ValueError(
            f"o: got shape {list(o.shape)}; expected {[n, c, *spatial]}, or {[n, 2 * c, *spatial]} with a learned variance"
        )
    if o.device != x.device:
        raise ValueError(f"o: is on {o.device}, x is on {x.device}; move one of them")
    checked_layout(x, "x"), checked_layout(o, "o")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: got {clip}; expected a positive bound or None")
    if x.requires_grad or o.requires_grad:
        raise ValueError("x, o: require grad, but the sampling step has no gradient; call it under torch.no_grad()")


def _check_like(name, v, x):
    if v is not None and (v.shape != x.shape or v.dtype != x.dtype or v.device != x.device):
        raise ValueError(
            f"{name}: got {dtype_name(v.dtype)} {list(v.shape)} on {v.device}; expected {dtype_name(x.dtype)} {list(x.shape)} "
            f"on {x.device}, as x"
        )


def _checked(x, o, row, noise, seed, t, first, x0_last, clip):
    """Return the arguments in the op's form: row as float64, seed as int64 bits. Raise ValueError for an invalid argument."""
    _check_pair(x, o, clip)
    _check_like("noise", noise, x)
    _check_like("x0_last", x0_last, x)
    if not isinstance(row, torch.Tensor):
        row = torch.tensor(row, dtype=torch.float64, device="cpu")
    if tuple(row.shape) != (9,) or row.device.type != "cpu":
        raise ValueError(f"row: got shape {list(row.shape)} on {row.device}; expected 9 coefficients on the CPU")
    if seed is not None:
        seed = as_int64_bits(check_seed(seed))
        if noise is None and (t is None or not 0 <= t < 1 << 20):
            raise ValueError(f"t: got {t}; expected the timestep of the noise, an int in [0, 2^20)")
    return x, o, row.double(), noise, seed, t, check_first(first), x0_last, clip


def _check_values(row, noise, seed, x0_last):
    """Check the row's values. This happens when the op runs, as the values are unknown while torch.compile traces."""
    if noise is None and seed is None and float(row[SIGMA]) != 0:
        raise ValueError("noise: missing, and there is no seed to draw it from; pass noise=, or seed= and t=")
    if x0_last is None and float(row[C2]) != 0:
        raise ValueError("x0_last: missing, and the row's coefficient c2 is not 0")


def ddpm_step(
    x: torch.Tensor,
    o: torch.Tensor,
    row: torch.Tensor | Sequence[float],
    *,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    t: int | None = None,
    first: int = 0,
    x0_last: torch.Tensor | None = None,
    clip: float | None = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x_prev, x0): one reverse step of a sampler, fused into one kernel.

    With o the network's output and row = (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi):

        x0     = clamp(a*x + b*o, -clip, clip)
        x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,    f = (v+1)/2

    For DDPM (Ho et al. 2020, eqs. 7, 11 and 15), c0*x0 + c1*x is the posterior mean and sigma*z the fresh noise. v is the
    second half of an output with 2C channels; it is read only if (lv_lo, lv_hi) != (0, 0). Terms with coefficient 0 are not
    read. A NaN in x0 survives the clamp.

    Args:
        x: The noisy images x_t, float32 [N, C, *spatial]. float64 runs the reference.
        o: The network's output, [N, C, *spatial] or, with a learned variance, [N, 2C, *spatial]; float32, bfloat16,
            float16 or x's dtype.
        row: The 9 coefficients, on the CPU. The kernels round them to float32.
        noise: The noise z, like x. If None, z is drawn for (seed, t, first + i), i being the image's index in the batch. Not
            read if sigma is 0.
        seed: The noise's seed, an int in [0, 2^64). Required if sigma is not 0 and `noise` is None.
        t: The training timestep of the noise, an int in [0, 2^20). Required with `seed`.
        first: The sample index of the batch's first image, an int in [0, 2^56).
        x0_last: The previous step's x0, like x. Required if c2 is not 0.
        clip: The positive bound of x0; None disables clipping.

    Returns:
        x_prev and x0, each with x's shape, dtype and strides.

    Raises:
        ValueError: If an argument has an unsupported shape, dtype, device or value, or if x or o requires grad. The message
            names the argument.
        BackendError: If the requested backend does not support the tensors.
    """
    if forward_mode("ddpm_step"):
        return ddpm_step_ref(x, o, row, noise=noise, seed=seed, t=t, first=first, x0_last=x0_last, clip=clip)
    return torch.ops.fastddpm.ddpm_step(*_checked(x, o, row, noise, seed, t, first, x0_last, clip))


def ddpm_step_ref(
    x: torch.Tensor,
    o: torch.Tensor,
    row: torch.Tensor | Sequence[float],
    *,
    noise: torch.Tensor | None = None,
    seed: int | None = None,
    t: int | None = None,
    first: int = 0,
    x0_last: torch.Tensor | None = None,
    clip: float | None = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x_prev, x0) as `ddpm_step` does, computed in plain PyTorch in x's dtype.

    With float64 x and o, the result is the ground truth that the kernels are tested against.

    Args:
        x: As in `ddpm_step`.
        o: As in `ddpm_step`.
        row: As in `ddpm_step`.
        noise: As in `ddpm_step`.
        seed: As in `ddpm_step`.
        t: As in `ddpm_step`.
        first: As in `ddpm_step`.
        x0_last: As in `ddpm_step`.
        clip: As in `ddpm_step`.

    Returns:
        x_prev and x0, with x's shape and dtype.

    Raises:
        ValueError: If an argument has an unsupported shape, dtype, device or value. The message names the argument.
    """
    x, o, row, noise, seed, t, first, x0_last, clip = _checked(x, o, row, noise, seed, t, first, x0_last, clip)
    _check_values(row, noise, seed, x0_last)
    return _functional_reference(x, o, row, noise, seed, t, first, x0_last, clip)


def ddpm_step_(
    x: torch.Tensor,
    o: torch.Tensor,
    rows: torch.Tensor,
    timesteps: torch.Tensor,
    state: torch.Tensor,
    *,
    x0: torch.Tensor | None = None,
    next_input: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    clip: float | None = 1.0,
) -> None:
    """Replace x by x_prev of `ddpm_step`, with the row, the seed and the step counter read from device memory.

    A CUDA graph captured around this op can be replayed with any seed and any table of the same size. The host does not wait
    for the device.

    Args:
        x: The noisy images x_t, float32 [N, C, *spatial], contiguous or channels_last. Receives x_prev.
        o: The network's output, as in `ddpm_step`.
        rows: The sampler's coefficients, float32 [S, 9], on x's device.
        timesteps: The training timesteps of the rows, int64 [S], on x's device.
        state: int64 [4], on x's device: (the seed's bits, first, row index, first bad row or -1). The step uses row
            `state[2]`, in [0, 2^31), and then adds 1 to state[2]. state[3] records the first row whose o was not finite.
        x0: The previous step's x0, like x and in x's layout. Receives this step's x0. Required if a row's c2 is not 0.
        next_input: Receives a copy of x_prev in its own dtype (float32, bfloat16 or float16) and layout, for the network.
        noise: The noise z, like x. If None, z is drawn for (seed, timestep, first + i).
        clip: The positive bound of x0; None disables clipping.

    Raises:
        ValueError: If an argument has an unsupported shape, dtype, device, layout or value. On the CPU, also if state[2] is
            not a row of the table, or if the row's c2 is not 0 and x0 is None. A GPU then leaves x unchanged and
            records the row in state[3].
        BackendError: If the requested backend does not support the tensors.
    """
    _check_pair(x, o, clip)
    if has_tangent(x) or has_tangent(o) or has_tangent(noise):
        raise ValueError(
            "x, o, noise: carry tangents, but ddpm_step_ has no derivative; use ddpm_step, which has forward-mode derivatives"
        )
    _check_like("x0", x0, x)
    _check_like("noise", noise, x)
    if x.dtype != torch.float32:
        raise ValueError(f"x: got {dtype_name(x.dtype)}; expected float32")
    for name, v, dtype, shape in (
        ("rows", rows, torch.float32, [timesteps.numel(), 9]),
        ("timesteps", timesteps, torch.int64, [timesteps.numel()]),
        ("state", state, torch.int64, [4]),
    ):
        if v.dtype != dtype or list(v.shape) != shape or v.device != x.device or not v.is_contiguous():
            raise ValueError(
                f"{name}: got {dtype_name(v.dtype)} {list(v.shape)} on {v.device}; "
                f"expected contiguous {dtype_name(dtype)} {shape} on {x.device}"
            )
    for name, v in (("x", x), ("x0", x0), ("next_input", next_input)):
        if v is not None and checked_layout(v, name) == "dense":
            raise ValueError(
                f"{name}: strides {v.stride()}; expected contiguous or channels_last memory, because the step writes it in place"
            )
    if x0 is not None and layout(x0) != layout(x):
        raise ValueError(f"x0: strides {x0.stride()}; expected x's memory layout, with strides {x.stride()}")
    if next_input is not None and (
        next_input.shape != x.shape or next_input.dtype not in O_DTYPES or next_input.device != x.device
    ):
        raise ValueError(
            f"next_input: got {dtype_name(next_input.dtype)} {list(next_input.shape)} on {next_input.device}; expected "
            f"{list(x.shape)} in float32, bfloat16 or float16 on {x.device}"
        )
    torch.ops.fastddpm.ddpm_step_(x, o, rows, timesteps, state, x0=x0, next_input=next_input, noise=noise, clip=clip)
