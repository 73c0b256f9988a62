"""Device functions: normals from Philox4x32-10 and Box-Muller, as in csrc/common/philox.h.

The words are identical on every backend. The float32 arithmetic is that of philox.h, operation by operation: the same
polynomials, the same fused multiply-adds and an exact square root.
"""

import triton
import triton.language as tl


@triton.jit
def _minus_log_uniform(w):
    """Return -ln((w + 1/2) 2^-32). Near u = 1, the complement of w gives 1 - u exactly."""
    f = w.to(tl.float32) + 0.5
    bits = f.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3E2AAAAB) >> 23  # of f / (2/3), plus 2
    m = (bits - (exponent << 23) + 0x01000000).to(tl.float32, bitcast=True)
    k = (34 - exponent.to(tl.int32)).to(tl.float32)
    v = ((w ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    r = tl.where(f >= 2863311616.0, -v, m - 1.0)  # 2/3 2^32, from which k is 0
    p = tl.fma(r, 0.14374099671840668, -0.1537274271249771)
    p = tl.fma(p, r, 0.13920924067497253)
    p = tl.fma(p, r, -0.16419349610805511)
    p = tl.fma(p, r, 0.20016059279441833)
    p = tl.fma(p, r, -0.2500759959220886)
    p = tl.fma(p, r, 0.33333104848861694)
    p = tl.fma(p, r, -0.49999940395355225)
    log1p = tl.fma(r * r, p, r)
    return tl.fma(k, 0.693147181, -log1p)


@triton.jit
def sine_cosine(a, quadrant):
    """Return the sine and cosine of quadrant pi/2 + a, a in [-pi/4, pi/4]. The upper two bits of a uint32 are the quadrant."""
    a2 = a * a
    s = tl.fma(a2, -0.00019495634478516877, 0.00833197869360447)
    s = tl.fma(s, a2, -0.16666650772094727)
    s = tl.fma(a * a2, s, a)
    c = tl.fma(a2, 2.443845005473122e-05, -0.001388736767694354)
    c = tl.fma(c, a2, 0.04166664555668831)
    c = tl.fma(c, a2, -0.5)
    c = tl.fma(c, a2, 1.0)
    odd = (quadrant & 0x40000000) != 0
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ ((quadrant + 0x40000000) & 0x80000000)
    return sine.to(tl.float32, bitcast=True), cosine.to(tl.float32, bitcast=True)


@triton.jit
def _box_muller(w0, w1):
    minus_log = _minus_log_uniform(w0)
    radius = tl.sqrt_rn(minus_log + minus_log)
    quadrant = w1 + 0x20000000
    angle = ((w1 - (quadrant & 0xC0000000)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.46291807926716e-9
    sine, cosine = sine_cosine(angle, quadrant)
    return radius * cosine, radius * sine


@triton.jit
def words(seed, quad, t, sample, stream):
    """Return the four random words of elements 4 quad .. 4 quad + 3, as uint32. The other arguments are integer scalars."""
    sample = sample.to(tl.int64)
    return tl.philox(
        seed,
        quad.to(tl.uint32),
        t.to(tl.uint32),
        (sample & 0xFFFFFFFF).to(tl.uint32),
        ((sample >> 32) ^ (stream << 24)).to(tl.uint32),
    )


@triton.jit
def normals(seed, quad, t, sample, stream):
    """Return the normals of elements 4 quad .. 4 quad + 3, as four tensors of quad's shape."""
    w0, w1, w2, w3 = words(seed, quad, t, sample, stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3
