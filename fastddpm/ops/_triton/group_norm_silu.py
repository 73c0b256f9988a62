"""y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift) and its gradient. act is SiLU or the identity.

Layout: a sample is a matrix of pixels and channels, either of which may be contiguous in memory. A program owns a slice of it:
all pixels of whole groups of channels. In channels_last a slice has at least 32 bytes per pixel, so that it uses every memory
sector completely.

Work: if the slice fits into the registers (RESIDENT elements; in the backward, two tensors of RESIDENT_BACKWARD), one program
processes all its pixels, and the op is a single kernel. Otherwise the pixels are split into chunks of tiles. The forward is then
three kernels: the moments of each chunk, their merging, and the application. The backward is four: centring (below), sums of the
gradient per chunk and channel, their merging, and the application. The choice between the two, and every order of summation,
depends only on the shape of a sample, and not on the batch or on the order in which programs run. There are no atomics.

Bytes: a resident slice reads x (and dy) once and writes y (or dx) once. In chunks, x (and dy) is read twice, the second time from
the L2 cache as far as its size allows.

Statistics are those of d = x + (add - pivot), with the pivot x + add at the group's first element. add - pivot is stored in two
floats, so that the rounding of d is relative to its own size. So a large mean or add costs no accuracy. A resident slice computes
the mean of d first and then the squares about it; the remaining mean of the differences corrects both. In chunks, each position
of the tile updates a running mean and the sum of squares about it (Welford), and all are merged by their sizes (Chan). The
backward centres d again, because the saved mean was rounded. In chunks it does so only if the rounding is significant.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._operands import Norm
from .launch import OPTIONS, cdiv, needs_int64, on, power_of_2

RESIDENT = 32768  # elements of a slice, in the forward
RESIDENT_BACKWARD = 16384
TILE = 4096  # elements of a chunk's tile, 16 per thread
CHUNKS = 128  # maximum number of chunks of a sample


# ------------------------------------------------------------------------------------------------ pieces


@triton.jit
def _slice(x, add, chunks, pixels, C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
           ADD_STRIDE: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Return this program's (sample, chunk, channels, mask of valid channels, hi, lo) with hi + lo = add - pivot."""
    slices: tl.constexpr = (C + SLICE - 1) // SLICE
    pid = tl.program_id(0)
    n = (pid // (chunks * slices)).to(tl.int64)  # neighbouring programs have adjacent slices of the same pixels
    j = tl.arange(0, BLOCK_C)
    channel = pid % slices * SLICE + j
    counts = (j < SLICE) & (channel < C)
    first = channel // WIDTH * WIDTH  # the group's first channel
    x_first = tl.load(x + n * C * pixels + (first if CHANNELS_LAST else first * pixels), mask=counts, other=0.0).to(
        tl.float32
    )
    if add is None:
        hi, lo = -x_first, tl.zeros_like(x_first)
    else:
        add += n * ADD_STRIDE
        hi, lo1 = _two_difference(_of_channels(add, channel, counts, 0.0), _of_channels(add, first, counts, 0.0))
        hi, lo2 = _two_difference(hi, x_first)
        hi, lo = _two_difference(hi, -(lo1 + lo2))
    return n, pid // slices % chunks, channel, counts, hi, lo


@triton.jit
def _two_difference(a, b):
    """Return a - b as the nearest float and the exact remainder."""
    difference = a - b
    other = difference - a
    return difference, (a - (difference - other)) - (b + other)


@triton.jit
def _of_channels(v, at, counts, absent: tl.constexpr):
    """Return the elements `at` of a per-channel vector in float32, or `absent` if v is None."""
    if v is None:
        value = tl.full(at.shape, absent, tl.float32)
    else:
        value = tl.load(v + at, mask=counts, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sized(pixels, ALIGNED: tl.constexpr, LARGE: tl.constexpr):
    if LARGE:
        pixels = pixels.to(tl.int64)
    if ALIGNED:
        pixels = pixels // 8 * 8  # shows the compiler that pixels is a multiple of 8
    return pixels


@triton.jit
def _tile(n, first_pixel, channel, counts, pixels, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return (the sample's offset, the tile's offsets in the sample, mask of valid elements), [BLOCK_C, BLOCK_P]."""
    p = (first_pixel + tl.arange(0, BLOCK_P)[None, :]).to(pixels.dtype)
    c = channel[:, None]
    return n * C * pixels, (p * C + c if CHANNELS_LAST else c * pixels + p), (p < pixels) & counts[:, None]


@triton.jit
def _distance(x, inside, hi, lo, add):
    """Return d = x + add - pivot."""
    d = tl.load(x, mask=inside, other=0.0).to(tl.float32) + hi[:, None]
    if add is not None:
        d += lo[:, None]
    return d


@triton.jit
def _over_groups(v, counts, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return each channel's group sum of v, [BLOCK_C]. A membership table supports groups of any width."""
    group = tl.arange(0, v.shape[0]) // WIDTH
    members = (group[:, None] == tl.arange(0, BLOCK_G)[None, :]) & counts[:, None]
    sums = tl.sum(tl.where(members, v[:, None], 0.0), axis=0)
    return tl.sum(tl.where(members, sums[None, :], 0.0), axis=1)


@triton.jit
def _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr):
    """Return (weight * (1 + scale), bias * (1 + scale) + shift)."""
    gain = 1.0 + _of_channels(scale, n * SCALE_STRIDE + channel, counts, 0.0)
    b = _of_channels(bias, channel, counts, 0.0) * gain + _of_channels(shift, n * SHIFT_STRIDE + channel, counts, 0.0)
    return _of_channels(weight, channel, counts, 0.0) * gain, b


@triton.jit
def _exp_minus(z):
    """Return e^-z, finite for very negative z. NaN is preserved."""
    return tl.exp(tl.where(z < -87.0, 87.0, -z))


@triton.jit
def _activate(z, SILU: tl.constexpr):
    return z / (1.0 + _exp_minus(z)) if SILU else z


@triton.jit
def _gradient_of_z(dy, z, SILU: tl.constexpr):
    """Return dy * silu'(z). silu' = s + z s (1 - s) is computed with 1 - s = e^-z s, which does not cancel."""
    if SILU:
        e = _exp_minus(z)
        s = 1.0 / (1.0 + e)
        dy = dy * (s * tl.fma(z, e * s, 1.0))
    return dy


@triton.jit
def _deviation(variance, eps):
    """Return 1 / sqrt(variance + eps). Rounding may have made the variance slightly negative."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps))


# --------------------------------------------------------------------------------------------- resident


@triton.jit(do_not_specialize=["pixels"])
def group_norm_silu_kernel(
    x, y, mean, rstd, weight, bias, add, scale, shift, pixels, inverse, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
    ADD_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, _, channel, counts, hi, lo = _slice(x, add, 1, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C)
    w, b = _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE, SHIFT_STRIDE)
    at, offset, inside = _tile(n, 0, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
    d = _distance(x + at + offset, inside, hi, lo, add)
    mean_of_d = _over_groups(tl.sum(tl.where(inside, d, 0.0), axis=1), counts, WIDTH, BLOCK_G) * inverse
    e = tl.where(inside, d - mean_of_d[:, None], 0.0)
    rest = _over_groups(tl.sum(e, axis=1), counts, WIDTH, BLOCK_G) * inverse
    variance = _over_groups(tl.sum(e * e, axis=1), counts, WIDTH, BLOCK_G) * inverse - rest * rest
    of_d = _deviation(variance, eps)
    group, first = n * (C // WIDTH) + channel // WIDTH, counts & (channel % WIDTH == 0)
    tl.store(mean + group, mean_of_d + rest, mask=first)
    tl.store(rstd + group, of_d, mask=first)
    a = of_d * w
    z = tl.fma(e, a[:, None], tl.fma(-rest, a, b)[:, None])
    tl.store(y + at + offset, _activate(z, SILU).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def group_norm_silu_backward_kernel(
    dy, x, dx, mean, rstd, weight, bias, add, scale, shift, sum_g, sum_g_xhat, sum_dx, pixels, inverse,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
    ADD_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, _, channel, counts, hi, lo = _slice(x, add, 1, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C)
    w, b = _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE, SHIFT_STRIDE)
    group = n * (C // WIDTH) + channel // WIDTH
    of_d = tl.load(rstd + group, mask=counts, other=0.0)
    at, offset, inside = _tile(n, 0, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
    e = _distance(x + at + offset, inside, hi, lo, add) - tl.load(mean + group, mask=counts, other=0.0)[:, None]
    # The saved mean was rounded, so centre again.
    rest = _over_groups(tl.sum(tl.where(inside, e, 0.0), axis=1), counts, WIDTH, BLOCK_G) * inverse
    e = tl.where(inside, e - rest[:, None], 0.0)
    g = tl.load(dy + at + offset, mask=inside, other=0.0).to(tl.float32)
    g = _gradient_of_z(g, tl.fma(e, (of_d * w)[:, None], b[:, None]), SILU)
    xhat = e * of_d[:, None]
    of_g, of_g_xhat = tl.sum(g, axis=1), tl.sum(g * xhat, axis=1)
    mean_g = _over_groups(w * of_g, counts, WIDTH, BLOCK_G) * inverse
    mean_g_xhat = _over_groups(w * of_g_xhat, counts, WIDTH, BLOCK_G) * inverse
    # The products are rounded before they are subtracted, so that a group of one element gets exactly 0.
    result = ((g * w[:, None] - mean_g[:, None]) - xhat * mean_g_xhat[:, None]) * of_d[:, None]
    tl.store(dx + at + offset, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(sum_g + n * C + channel, of_g, mask=counts)
    tl.store(sum_g_xhat + n * C + channel, of_g_xhat, mask=counts)
    tl.store(sum_dx + n * C + channel, tl.sum(tl.where(inside, result, 0.0), axis=1), mask=counts)


# -------------------------------------------------------------------------------------- forward, in chunks


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_partials_kernel(
    x, add, partials, pixels, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ADD_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store partials [N, G, chunks, 2]: the mean of d, and the sum of squares about it."""
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, chunk, channel, counts, hi, lo = _slice(
        x, add, chunks, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C
    )
    begin = chunk.to(pixels.dtype) * TILES * BLOCK_P
    mean = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for k in range(TILES):
        at, offset, inside = _tile(n, begin + k * BLOCK_P, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
        step = tl.where(inside, _distance(x + at + offset, inside, hi, lo, add) - mean, 0.0)
        moved = step * tl.div_rn(1.0, tl.cast(k + 1, tl.float32))
        mean += moved
        squares = tl.fma(step, step - moved, squares)
    # Each position of the tile has seen one pixel for every tile in which it is valid.
    left = pixels - begin - tl.arange(0, BLOCK_P)
    seen = tl.minimum(tl.maximum((left + BLOCK_P - 1) // BLOCK_P, 0), TILES).to(tl.float32)[None, :]
    inverse = tl.div_rn(1.0, tl.minimum(pixels - begin, TILES * BLOCK_P).to(tl.float32) * WIDTH)
    whole = _over_groups(tl.sum(mean * seen, axis=1), counts, WIDTH, BLOCK_G) * inverse
    step = mean - whole[:, None]
    rest = _over_groups(tl.sum(step * seen, axis=1), counts, WIDTH, BLOCK_G) * inverse
    step -= rest[:, None]
    squares = _over_groups(tl.sum(squares + step * step * seen, axis=1), counts, WIDTH, BLOCK_G)
    into = partials + 2 * ((n * (C // WIDTH) + channel // WIDTH) * chunks + chunk)
    first = counts & (channel % WIDTH == 0)
    tl.store(into, whole + rest, mask=first)
    tl.store(into + 1, squares, mask=first)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_merge_kernel(
    partials, mean, rstd, pixels, inverse, eps, chunks,
    WIDTH: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merge the moments of the chunks of one group of one sample."""
    group = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    of_chunk = partials + 2 * (group * chunks + k)
    means, squares = tl.load(of_chunk, mask=k < chunks, other=0.0), tl.load(of_chunk + 1, mask=k < chunks, other=0.0)
    pixels = _sized(pixels, False, LARGE)
    left = pixels - k.to(pixels.dtype) * TILES * BLOCK_P
    sizes = tl.minimum(tl.maximum(left, 0), TILES * BLOCK_P).to(tl.float32) * WIDTH
    whole = tl.sum(means * sizes, axis=0) * inverse
    rest = tl.sum((means - whole) * sizes, axis=0) * inverse
    step = (means - whole) - rest
    tl.store(mean + group, whole + rest)
    tl.store(rstd + group, _deviation(tl.sum(squares + step * step * sizes, axis=0) * inverse, eps))


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_apply_kernel(
    x, y, mean, rstd, weight, bias, add, scale, shift, pixels, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
    ADD_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, chunk, channel, counts, hi, lo = _slice(
        x, add, chunks, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C
    )
    w, b = _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE, SHIFT_STRIDE)
    group = n * (C // WIDTH) + channel // WIDTH
    mean_of_d = tl.load(mean + group, mask=counts, other=0.0)
    a = tl.load(rstd + group, mask=counts, other=0.0) * w
    begin = chunk.to(pixels.dtype) * TILES * BLOCK_P
    for k in range(TILES):
        at, offset, inside = _tile(n, begin + k * BLOCK_P, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
        e = _distance(x + at + offset, inside, hi, lo, add) - mean_of_d[:, None]
        z = tl.fma(e, a[:, None], b[:, None])
        tl.store(y + at + offset, _activate(z, SILU).to(y.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- backward, in chunks


@triton.jit(do_not_specialize=["pixels"])
def group_norm_silu_centre_kernel(
    x, mean, rstd, add, rest, pixels, inverse,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ADD_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Store rest [N, G], the corrections of the saved means. It is 0 if rounding was insignificant for all means of the slice.

    One program processes a whole slice, because this is rare: the first element must be 16 deviations from the mean.
    """
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, _, channel, counts, hi, lo = _slice(x, add, 1, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C)
    group = n * (C // WIDTH) + channel // WIDTH
    mean_of_d = tl.load(mean + group, mask=counts, other=0.0)
    coarse = tl.abs(mean_of_d) * tl.load(rstd + group, mask=counts, other=0.0) > 16.0
    sums = tl.zeros_like(hi)
    if tl.sum(tl.where(coarse, 1, 0)) > 0:
        of_place = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for k in range(TILES):
            at, offset, inside = _tile(
                n, tl.cast(k, pixels.dtype) * BLOCK_P, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P
            )
            e = _distance(x + at + offset, inside, hi, lo, add) - mean_of_d[:, None]
            of_place += tl.where(inside, e, 0.0)
        sums = _over_groups(tl.sum(of_place, axis=1), counts, WIDTH, BLOCK_G)
    tl.store(rest + group, sums * inverse, mask=counts & (channel % WIDTH == 0))


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_backward_partials_kernel(
    dy, x, mean, rstd, weight, bias, add, scale, shift, rest, partials, pixels, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
    ADD_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store partials [N, chunks, 3, C]: the sums of g, g * xhat and xhat."""
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, chunk, channel, counts, hi, lo = _slice(
        x, add, chunks, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C
    )
    w, b = _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE, SHIFT_STRIDE)
    group = n * (C // WIDTH) + channel // WIDTH
    mean_of_d, lacking = tl.load(mean + group, mask=counts, other=0.0), tl.load(rest + group, mask=counts, other=0.0)
    of_d = tl.load(rstd + group, mask=counts, other=0.0)
    a = of_d * w
    begin = chunk.to(pixels.dtype) * TILES * BLOCK_P
    # Sum each position of the tile separately, so that no reduction runs between tiles.
    of_g = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    of_ge = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    of_e = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for k in range(TILES):
        at, offset, inside = _tile(n, begin + k * BLOCK_P, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
        e = (_distance(x + at + offset, inside, hi, lo, add) - mean_of_d[:, None]) - lacking[:, None]
        e = tl.where(inside, e, 0.0)
        g = tl.load(dy + at + offset, mask=inside, other=0.0).to(tl.float32)
        g = _gradient_of_z(g, tl.fma(e, a[:, None], b[:, None]), SILU)
        of_g += g
        of_ge = tl.fma(g, e, of_ge)
        of_e += e
    into = partials + (n * chunks + chunk) * 3 * C + channel
    tl.store(into, tl.sum(of_g, axis=1), mask=counts)
    tl.store(into + C, tl.sum(of_ge, axis=1) * of_d, mask=counts)
    tl.store(into + 2 * C, tl.sum(of_e, axis=1) * of_d, mask=counts)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_backward_merge_kernel(
    rstd, weight, scale, partials, means, sum_g, sum_g_xhat, sum_dx, pixels, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store a slice's sums, formed in float64, and means [N, 2, C]: the means of w * g and w * g * xhat over each group."""
    slices: tl.constexpr = (C + SLICE - 1) // SLICE
    n = (tl.program_id(0) // slices).to(tl.int64)
    j = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % slices * SLICE + j
    counts = (j < SLICE) & (channel < C)
    of_g = tl.zeros((BLOCK_C,), tl.float64)
    of_g_xhat = tl.zeros((BLOCK_C,), tl.float64)
    of_xhat = tl.zeros((BLOCK_C,), tl.float64)
    # As many chunks at a time as the registers hold.
    step: tl.constexpr = BLOCK_K if BLOCK_K * BLOCK_C <= 4096 else max(4096 // BLOCK_C, 1)
    for begin in range(0, BLOCK_K, step):
        k = begin + tl.arange(0, step)[:, None]
        at = (n * chunks + k) * 3 * C + channel[None, :]
        there = (k < chunks) & counts[None, :]
        of_g += tl.sum(tl.load(partials + at, mask=there, other=0.0).to(tl.float64), axis=0)
        of_g_xhat += tl.sum(tl.load(partials + C + at, mask=there, other=0.0).to(tl.float64), axis=0)
        of_xhat += tl.sum(tl.load(partials + 2 * C + at, mask=there, other=0.0).to(tl.float64), axis=0)
    w, _ = _affine(weight, None, scale, None, n, channel, counts, SCALE_STRIDE, 0)
    w = w.to(tl.float64)
    size = pixels.to(tl.float64) * WIDTH
    mean_g = _over_groups(w * of_g, counts, WIDTH, BLOCK_G) / size
    mean_g_xhat = _over_groups(w * of_g_xhat, counts, WIDTH, BLOCK_G) / size
    of_d = tl.load(rstd + n * (C // WIDTH) + channel // WIDTH, mask=counts, other=0.0).to(tl.float64)
    of_dx = of_d * (w * of_g - pixels.to(tl.float64) * mean_g - of_xhat * mean_g_xhat)
    tl.store(sum_g + n * C + channel, of_g.to(tl.float32), mask=counts)
    tl.store(sum_g_xhat + n * C + channel, of_g_xhat.to(tl.float32), mask=counts)
    tl.store(sum_dx + n * C + channel, of_dx.to(tl.float32), mask=counts)
    tl.store(means + 2 * n * C + channel, mean_g.to(tl.float32), mask=counts)
    tl.store(means + (2 * n + 1) * C + channel, mean_g_xhat.to(tl.float32), mask=counts)


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_silu_backward_apply_kernel(
    dy, x, dx, mean, rstd, weight, bias, add, scale, shift, rest, means, pixels, chunks,
    C: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr,
    ADD_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr, SHIFT_STRIDE: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixels = _sized(pixels, ALIGNED, LARGE)
    n, chunk, channel, counts, hi, lo = _slice(
        x, add, chunks, pixels, C, WIDTH, SLICE, CHANNELS_LAST, ADD_STRIDE, BLOCK_C
    )
    w, b = _affine(weight, bias, scale, shift, n, channel, counts, SCALE_STRIDE, SHIFT_STRIDE)
    group = n * (C // WIDTH) + channel // WIDTH
    mean_of_d, lacking = tl.load(mean + group, mask=counts, other=0.0), tl.load(rest + group, mask=counts, other=0.0)
    of_d = tl.load(rstd + group, mask=counts, other=0.0)
    mean_g = tl.load(means + 2 * n * C + channel, mask=counts, other=0.0)
    mean_g_xhat = tl.load(means + (2 * n + 1) * C + channel, mask=counts, other=0.0)
    a = of_d * w
    begin = chunk.to(pixels.dtype) * TILES * BLOCK_P
    for k in range(TILES):
        at, offset, inside = _tile(n, begin + k * BLOCK_P, channel, counts, pixels, C, CHANNELS_LAST, BLOCK_P)
        e = (_distance(x + at + offset, inside, hi, lo, add) - mean_of_d[:, None]) - lacking[:, None]
        g = tl.load(dy + at + offset, mask=inside, other=0.0).to(tl.float32)
        g = _gradient_of_z(g, tl.fma(e, a[:, None], b[:, None]), SILU)
        result = ((g * w[:, None] - mean_g[:, None]) - (e * of_d[:, None]) * mean_g_xhat[:, None]) * of_d[:, None]
        tl.store(dx + at + offset, result.to(dx.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ launch


def _blocks(
    channels: int, pixels: int, size: int, channels_last: bool, groups: int, limit: int
) -> tuple[int, int, int, int, int]:
    """Return (channels of a slice, BLOCK_C, BLOCK_P, chunks, tiles of a chunk); 0 chunks if a slice fits into `limit`."""
    width = channels // groups
    # A slice is made of whole groups. In contiguous memory each group is one run, and several share a program only if they are
    # small. Their number is limited, because the membership table grows with its square.
    least = 32 // size if channels_last else min(cdiv(1024, pixels), 64)
    slice_ = width * min(cdiv(least, width), groups)
    block_c, block_p = power_of_2(slice_), power_of_2(pixels)
    if block_c * block_p <= limit:
        return slice_, block_c, block_p, 0, 0
    # In chunks the slice's width costs no registers. 64 bytes per pixel give longer runs of memory.
    slice_ = width * max(min(64 // size // width, groups), 1) if channels_last else width
    block_c = power_of_2(slice_)
    block_p = max(TILE // block_c, 1)
    tiles = cdiv(cdiv(pixels, block_p), CHUNKS)
    return slice_, block_c, block_p, cdiv(pixels, tiles * block_p), tiles


class _Plan:
    """The split of the work for calls with one shape and layout, and the constants of their kernels."""

    def __init__(self, shape, size, channels_last, groups, limit, per_sample, silu):
        """Plan for shape [N, C, P]. `size` is an element's bytes; `per_sample` is whether add, scale and shift are [N, C]."""
        n, channels, pixels = shape
        slice_, block_c, block_p, self.chunks, self.tiles = _blocks(
            channels, pixels, size, channels_last, groups, limit
        )
        self.pixels, self.elements = pixels, block_c * block_p
        self.inverse = groups / (channels * pixels)
        self.programs = n * cdiv(channels, slice_)
        add, scale, shift = (channels if each else 0 for each in per_sample)
        self.constants = {
            "C": channels, "WIDTH": channels // groups, "SLICE": slice_, "CHANNELS_LAST": channels_last, "SILU": silu,
            "ADD_STRIDE": add, "SCALE_STRIDE": scale, "SHIFT_STRIDE": shift,
            "TILES": self.tiles, "ALIGNED": pixels % 8 == 0,
            "LARGE": needs_int64(channels * (pixels + max(self.tiles, 1) * block_p)),
            "BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_G": power_of_2(slice_ * groups // channels),
            "BLOCK_K": power_of_2(max(self.chunks, 1)),
        }  # fmt: skip
        self.known = {}  # each kernel's subset of the constants

    def launch(self, kernel, programs, *arguments, most=8, **options):
        """Launch a kernel with 16 elements per thread, but at most `most` warps."""
        known = self.known.get(kernel)
        if known is None:
            known = {name: v for name, v in self.constants.items() if name in kernel.arg_names}
            self.known[kernel] = known
        warps = min(max(self.elements // 512, 1), most)
        kernel[(programs,)](*arguments, **{**known, "num_warps": warps, **options, **OPTIONS})


_plan_of = functools.lru_cache(maxsize=1024)(_Plan)


def _plan(x: torch.Tensor, channels_last: bool, norm: Norm, limit: int) -> _Plan:
    n, channels, *spatial = x.shape
    shape, vectors = (n, channels, math.prod(spatial)), (norm.add, norm.scale, norm.shift)
    per_sample = tuple([v is not None and v.dim() == 2 for v in vectors])
    return _plan_of(shape, x.element_size(), channels_last, norm.num_groups, limit, per_sample, norm.silu)


def forward(
    x: torch.Tensor,
    y: torch.Tensor,
    channels_last: bool,
    statistics: tuple[torch.Tensor, torch.Tensor],
    norm: Norm,
    eps: float,
) -> None:
    """Run the forward. x and y have a supported layout. y and `statistics`, mean and rstd (float32 [N, G]), are outputs."""
    plan = _plan(x, channels_last, norm, RESIDENT)
    mean, rstd = statistics
    add, pixels = norm.add, plan.pixels
    operands = x, y, mean, rstd, norm.weight, norm.bias, add, norm.scale, norm.shift
    with on(x.device):
        if not plan.chunks:
            # 128 registers hold 64 elements of a thread. A GPU has enough registers for two programs of 8 such warps: one
            # loads while the other computes.
            most = 8 if plan.elements <= 16384 else 16
            plan.launch(
                group_norm_silu_kernel, plan.programs, *operands, pixels, plan.inverse, eps, most=most, maxnreg=128
            )
            return
        programs = plan.programs * plan.chunks
        partials = torch.empty(*mean.shape, plan.chunks, 2, dtype=torch.float32, device=x.device)
        plan.launch(group_norm_silu_partials_kernel, programs, x, add, partials, pixels, plan.chunks)
        plan.launch(
            group_norm_silu_merge_kernel, mean.numel(), partials, mean, rstd, pixels, plan.inverse, eps, plan.chunks,
            most=1,
        )  # fmt: skip
        plan.launch(group_norm_silu_apply_kernel, programs, *operands, pixels, plan.chunks)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    dx: torch.Tensor,
    channels_last: bool,
    statistics: tuple[torch.Tensor, torch.Tensor],
    norm: Norm,
    sums: Sequence[torch.Tensor],
) -> None:
    """Run the backward. dy, x and dx have a supported layout. `statistics` is the forward's (mean, rstd).

    dx and `sums` are outputs: the sums of g, g*xhat and dx, float32 [N, C].
    """
    plan = _plan(x, channels_last, norm, RESIDENT_BACKWARD)
    mean, rstd = statistics
    weight, add, scale = norm.weight, norm.add, norm.scale
    vectors = mean, rstd, weight, norm.bias, add, scale, norm.shift
    pixels, inverse = plan.pixels, plan.inverse
    with on(x.device):
        if not plan.chunks:
            plan.launch(
                group_norm_silu_backward_kernel, plan.programs, dy, x, dx, *vectors, *sums, pixels, inverse,
                most=16,
            )  # fmt: skip
            return
        n, channels = x.shape[:2]
        programs = plan.programs * plan.chunks
        rest = torch.empty_like(mean)
        partials = torch.empty(n, plan.chunks, 3, channels, dtype=torch.float32, device=x.device)
        means = torch.empty(n, 2, channels, dtype=torch.float32, device=x.device)
        plan.launch(
            group_norm_silu_centre_kernel, plan.programs, x, mean, rstd, add, rest, pixels, inverse,
            TILES=plan.chunks * plan.tiles,
        )  # fmt: skip
        plan.launch(
            group_norm_silu_backward_partials_kernel, programs, dy, x, *vectors, rest, partials, pixels, plan.chunks
        )
        plan.launch(
            group_norm_silu_backward_merge_kernel, plan.programs,
            rstd, weight, scale, partials, means, *sums, pixels, plan.chunks,
        )  # fmt: skip
        plan.launch(
            group_norm_silu_backward_apply_kernel, programs, dy, x, dx, *vectors, rest, means, pixels, plan.chunks
        )
