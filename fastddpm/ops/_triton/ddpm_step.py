"""One reverse step, with a row (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi):

    x0     = clamp(a*x + b*o, -clip, clip)                                          NaN is preserved
    x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,  f = (v+1)/2

A term with coefficient 0 has no effect, even if its memory contains NaN. x0_last, noise and v are then not read, because their
loads are masked. The exponential is computed only for learned variances.

Layout: x, x_prev, x0, x0_last and noise share one layout, contiguous or channels_last. o and next_input each have their own. If
all are contiguous, a sample is treated as one channel of channels*pixels elements.

Work: a program processes a tile of one sample, BLOCK_C channels times BLOCK_P pixels. Noise is indexed by an element's position
in C*H*W order: BLOCK_P/4 quads per channel if a channel consists of whole quads. Otherwise (odd sizes in mixed layouts) each
element computes its quad and uses one of the four values.

The state (seed, first, row index, first bad row) is read and advanced in place. All programs must read the row index before
it changes, and a second kernel to advance it would cost as much as the step of a small batch. So one atomic reads the row
index from the lower half of state[2] and draws a number from the upper half. The program that draws the last number knows that
all programs have read the index. It stores the next index, with the upper half 0. No program waits.

Bytes: x and o are read once, x_prev (and x0, next_input) is written once. Drawn noise never leaves the registers.
"""

import torch
import triton
import triton.language as tl

from .._operands import StepOperands
from .._register import layout
from .launch import OPTIONS, cdiv, needs_int64, on, power_of_2
from .philox import normals

TILE = 1024  # elements, 8 per thread


@triton.jit
def _everywhere(condition, like):
    """Broadcast a scalar condition to a mask, via an integer, which the interpreter requires."""
    return tl.broadcast_to(tl.where(condition, 1, 0), like.shape) != 0


@triton.jit
def _add_term(total, coefficient, value):
    return tl.where(coefficient != 0.0, tl.fma(coefficient, value, total), total)


@triton.jit
def _exp(x):
    """Return e^x within 1e-7 + 2e-9 |x|, with x clamped to [-87, 87]. exp2.approx is slightly too coarse for the bound."""
    x = tl.where(x > 87.0, 87.0, tl.where(x < -87.0, -87.0, x))
    shifted = tl.fma(x, 1.44269504, 12583039.0)  # 1.5 2^23 + 127: n = round(x / ln 2), biased, in the low bits
    n = shifted - 12583039.0
    r = tl.fma(n, -1.42860677e-6, tl.fma(n, -0.693145752, x))  # ln 2 in two parts
    p = tl.fma(r, 0.00138144672, 0.00836878084)
    p = tl.fma(p, r, 0.0416683927)
    p = tl.fma(p, r, 0.166665196)
    p = tl.fma(p, r, 0.49999994)
    p = tl.fma(p, r, 1.0)
    p = tl.fma(p, r, 1.0)
    return p * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _offset(c, p, channels, pixels, CHANNELS_LAST: tl.constexpr):
    return p * channels + c if CHANNELS_LAST else c * pixels + p


@triton.jit(do_not_specialize=["table_rows", "seed", "first", "timestep", "pixels"])
def ddpm_step_kernel(
    x,
    x_prev,
    o,
    x0_last,
    x0,
    next_input,
    noise,
    rows,  # [table_rows, 9], or None: then the row, seed, first and timestep are passed by value
    timesteps,
    state,
    table_rows,
    a,
    b,
    c0,
    c1,
    c2,
    d,
    sigma,
    lv_lo,
    lv_hi,
    seed: tl.int64,
    first: tl.int64,
    timestep: tl.int64,
    clip,
    pixels,
    CHANNELS: tl.constexpr,
    O_CHANNELS: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    O_CHANNELS_LAST: tl.constexpr,
    NEXT_CHANNELS_LAST: tl.constexpr,
    ALIGNED: tl.constexpr,  # pixels is a multiple of 4
    LARGE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    if LARGE:
        pixels = pixels.to(tl.int64)
    if ALIGNED:
        pixels = pixels // 4 * 4  # shows the compiler that pixels is a multiple of 4
    pid = tl.program_id(0)
    blocks_p = tl.cdiv(pixels, BLOCK_P).to(tl.int32)
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    i = (pid // (blocks_p * blocks_c)).to(tl.int64)
    begin = (pid % blocks_p).to(pixels.dtype) * BLOCK_P
    p = begin + tl.arange(0, BLOCK_P)[None, :]
    c = pid // blocks_p % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    inside = (c < CHANNELS) & (p < pixels)

    # All loads precede all stores, because x_prev may be x, and x0 may be x0_last. These loads start before the row is known,
    # as the row takes two dependent reads.
    at, o_at = i * CHANNELS * pixels, i * O_CHANNELS * pixels
    offset, o_offset = (
        _offset(c, p, CHANNELS, pixels, X_CHANNELS_LAST),
        _offset(c, p, O_CHANNELS, pixels, O_CHANNELS_LAST),
    )
    xs = tl.load(x + at + offset, mask=inside, other=0.0)
    eps = tl.load(o + o_at + o_offset, mask=inside, other=0.0).to(tl.float32)

    if rows is not None:
        drawn = tl.atomic_add(state + 2, 4294967296, sem="relaxed")
        index = (drawn << 32) >> 32
        if (drawn - index) >> 32 == tl.num_programs(0) - 1:
            tl.store(state + 2, index + 1)
        known = (index >= 0) & (index < table_rows)
        row = rows + 9 * index
        a = tl.load(row, mask=known, other=0.0)
        b = tl.load(row + 1, mask=known, other=0.0)
        c0 = tl.load(row + 2, mask=known, other=0.0)
        c1 = tl.load(row + 3, mask=known, other=0.0)
        c2 = tl.load(row + 4, mask=known, other=0.0)
        d = tl.load(row + 5, mask=known, other=0.0)
        sigma = tl.load(row + 6, mask=known, other=0.0)
        lv_lo = tl.load(row + 7, mask=known, other=0.0)
        lv_hi = tl.load(row + 8, mask=known, other=0.0)
        timestep = tl.load(timesteps + index, mask=known, other=0)
        seed = tl.load(state)
        first = tl.load(state + 1)
        if x0_last is None:
            known = known & (c2 == 0.0)

    if O_CHANNELS > CHANNELS:
        learned = _everywhere((sigma != 0.0) & ((lv_lo != 0.0) | (lv_hi != 0.0)), inside)
        v_at = o_at + _offset(CHANNELS, 0, O_CHANNELS, pixels, O_CHANNELS_LAST)
        v = tl.load(o + v_at + o_offset, mask=inside & learned, other=0.0).to(tl.float32)
    if x0_last is not None:
        last = tl.load(x0_last + at + offset, mask=inside & _everywhere(c2 != 0.0, inside), other=0.0)
    if noise is not None:
        z = tl.load(noise + at + offset, mask=inside & _everywhere(sigma != 0.0, inside), other=0.0)
    elif ALIGNED or CHANNELS == 1:
        z0, z1, z2, z3 = normals(
            seed, (c * pixels + begin) // 4 + tl.arange(0, BLOCK_P // 4)[None, :], timestep, first.to(tl.int64) + i, 1
        )
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(BLOCK_C, BLOCK_P)
    else:
        e = c * pixels + p
        z0, z1, z2, z3 = normals(seed, e // 4, timestep, first.to(tl.int64) + i, 1)
        z = tl.where(e % 4 < 2, tl.where(e % 4 == 0, z0, z1), tl.where(e % 4 == 2, z2, z3))

    nothing = tl.zeros_like(xs)
    x0_new = _add_term(_add_term(nothing, b, eps), a, xs)
    if clip is not None:
        x0_new = tl.where(x0_new > clip, clip, x0_new)
        x0_new = tl.where(x0_new < -clip, -clip, x0_new)
    result = _add_term(_add_term(nothing, c1, xs), c0, x0_new)
    if x0_last is not None:
        result = _add_term(result, c2, last)
    result = _add_term(result, d, eps)
    spread = sigma
    if O_CHANNELS > CHANNELS:
        f = (v + 1.0) * 0.5
        log_variance = tl.fma(f, lv_hi, (1.0 - f) * lv_lo)
        of_v = tl.where(log_variance == log_variance, sigma * _exp(log_variance * 0.5), log_variance)
        spread = tl.where(learned, of_v, sigma)
    result = tl.where(sigma != 0.0, tl.fma(spread, z, result), result)

    if rows is not None:
        # Programs that see a bad value store the same number, and only if none is stored yet. So no atomic is needed.
        bad = (tl.abs(eps) < float("inf")) == 0
        bad = bad & _everywhere((b != 0.0) | (d != 0.0), inside)
        if O_CHANNELS > CHANNELS:
            bad = bad | ((tl.abs(v) < float("inf")) == 0)
        any_bad = (tl.sum(tl.where(bad, 1, 0)) > 0) | (known == 0)
        tl.store(state + 3, index, mask=any_bad & (tl.load(state + 3) < 0))
        inside = inside & _everywhere(known, inside)

    if x0 is not None:
        tl.store(x0 + at + offset, x0_new, mask=inside)
    tl.store(x_prev + at + offset, result, mask=inside)
    if next_input is not None:
        next_offset = _offset(c, p, CHANNELS, pixels, NEXT_CHANNELS_LAST)
        tl.store(next_input + at + next_offset, result.to(next_input.dtype.element_ty), mask=inside)


def ddpm_step(
    operands: StepOperands,
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    clip: float | None,
    table_on_host: bool,
) -> None:
    """Run one step. x_prev may be x, and x0 may be x0_last. `table` is (rows, timesteps, state).

    With `table_on_host`, rows [9], timesteps [1] and state are in host memory; the call reads them and does not write them. For a
    row index outside the table, or a row with c2 != 0 and no x0_last, the kernel only records the row in the state.
    """
    x, _, o, _, _, next_input, _ = operands
    rows, timesteps, state = table
    n, channels, o_channels, pixels = *x.shape[:2], o.shape[1], x[0, 0].numel()
    x_channels_last, o_channels_last = layout(x) == "channels_last", layout(o) == "channels_last"
    next_channels_last = next_input is not None and layout(next_input) == "channels_last"
    if not (x_channels_last or o_channels_last or next_channels_last):
        channels, o_channels, pixels = 1, o_channels // channels, channels * pixels
    if table_on_host:
        row_arguments = (None, None, None, 0, *rows.tolist(), *state[:2].tolist(), timesteps.item())
    else:
        row_arguments = (rows, timesteps, state, timesteps.numel(), *[0.0] * 9, 0, 0, 0)
    block_c = min(power_of_2(channels), 32)
    block_p = TILE // block_c
    programs = n * cdiv(channels, block_c) * cdiv(pixels, block_p)
    with on(x.device):
        ddpm_step_kernel[(programs,)](
            *operands, *row_arguments, clip, pixels,
            CHANNELS=channels, O_CHANNELS=o_channels, X_CHANNELS_LAST=x_channels_last,
            O_CHANNELS_LAST=o_channels_last, NEXT_CHANNELS_LAST=next_channels_last,
            ALIGNED=pixels % 4 == 0, LARGE=needs_int64(o_channels * (pixels + block_p)),
            BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4, **OPTIONS,
        )  # fmt: skip
