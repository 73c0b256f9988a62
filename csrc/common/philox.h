// The package's random numbers: Philox4x32-10 (Salmon et al., 2011), a counter-based generator, and Box-Muller.
//
//   key     = (seed low 32, seed high 32)
//   counter = (e / 4, t, sample low 32, (sample high 32) xor (stream << 24))
//   words w0..w3 -> u_k = (w_k + 1/2) * 2^-32, all strictly inside (0, 1)
//   normals of elements 4k..4k+3:
//     sqrt(-2 ln u0) * (cos(2 pi u1), sin(2 pi u1)),  sqrt(-2 ln u2) * (cos(2 pi u3), sin(2 pi u3))
//
// A normal depends only on (seed, stream, sample, t, e), and not on the batch, the thread, the layout or the machine.
// Words are identical on every backend. Normals are within 1.1e-6 of the formula in float64, extreme words included.
//
// The source is a template over a struct M that defines a word, a float and their few primitive operations. ScalarMath has one
// lane, on host or device. vec_random.h defines the vectors of the CPU kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDDPM_HD __host__ __device__ __forceinline__
#define FASTDDPM_UNROLL _Pragma("unroll")
#else
#define FASTDDPM_HD inline
#define FASTDDPM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fastddpm {
namespace {

struct ScalarMath {
    using Word = uint32_t;
    using Int = int32_t;
    using Float = float;

    // Both halves of the 64-bit product.
    static FASTDDPM_HD void multiply(uint32_t factor, Word c, Word& high, Word& low) {
        uint64_t product = static_cast<uint64_t>(factor) * c;
        high = static_cast<Word>(product >> 32);
        low = static_cast<Word>(product);
    }
    static FASTDDPM_HD Word xor3(Word a, Word b, uint32_t key) { return a ^ b ^ key; }
    static FASTDDPM_HD Float broadcast(float f) { return f; }
    static FASTDDPM_HD Float to_float(Word w) { return static_cast<float>(w); }
    static FASTDDPM_HD Float to_float(Int i) { return static_cast<float>(i); }
    static FASTDDPM_HD Word bits(Float f) {
        Word w;
        memcpy(&w, &f, sizeof w);
        return w;
    }
    static FASTDDPM_HD Float from_bits(Word w) {
        Float f;
        memcpy(&f, &w, sizeof f);
        return f;
    }
    static FASTDDPM_HD Float fma(Float a, Float b, Float c) { return fmaf(a, b, c); }
    static FASTDDPM_HD Float sqrt(Float a) { return sqrtf(a); }
};

// c: the counter on entry, the four random words on return.
template <class M>
FASTDDPM_HD void philox4x32_10(typename M::Word (&c)[4], uint64_t seed) {
    using Word = typename M::Word;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    FASTDDPM_UNROLL
    for (int round = 0; round < 10; ++round) {
        Word high0, low0, high1, low1;
        M::multiply(0xD2511F53u, c[0], high0, low0);
        M::multiply(0xCD9E8D57u, c[2], high1, low1);
        c[0] = M::xor3(high1, c[1], key0);
        c[1] = low1;
        c[2] = M::xor3(high0, c[3], key1);
        c[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// -ln((w + 1/2) * 2^-32), to a few 1e-8 relative. With f = w + 1/2 = 2^(32 - k) m and m in [2/3, 4/3) it is
// k ln 2 - log1p(m - 1). Near u = 1 (k = 0) the rounding of f would dominate the result. There the complement
// of w gives 1 - u exactly.
template <class M>
FASTDDPM_HD typename M::Float minus_log_uniform(typename M::Word w) {
    using Word = typename M::Word;
    using Int = typename M::Int;
    using Float = typename M::Float;
    const uint32_t two_thirds = 0x3F2AAAABu;
    const Float f = M::to_float(w) + 0.5f;
    const Word exponent = (M::bits(f) - (two_thirds - (2u << 23))) >> 23;  // of f / (2/3), plus 2
    const Float m = M::from_bits(M::bits(f) - (exponent << 23) + (2u << 23));
    const Float k = M::to_float((Int)(34u - exponent));
    const Float v = (M::to_float(~w) + 0.5f) * 0x1p-32f;
    const Float r = f >= 2863311616.0f ? -v : m - 1.0f;  // 2/3 * 2^32, from which k is 0
    // (log1p(r) - r) / r^2 on [-1/3, 1/3], minimax for the relative error of log1p
    const float q[] = {0.14374099671840668f, -0.1537274271249771f, 0.13920924067497253f, -0.16419349610805511f,
                       0.20016059279441833f, -0.2500759959220886f, 0.33333104848861694f, -0.49999940395355225f};
    Float p = M::broadcast(q[0]);
    FASTDDPM_UNROLL
    for (int i = 1; i < 8; ++i) p = M::fma(p, r, M::broadcast(q[i]));
    const Float log1p = M::fma(r * r, p, r);
    return M::fma(k, M::broadcast(0.693147181f), -log1p);
}

// Sine and cosine of quadrant * pi/2 + a for a in [-pi/4, pi/4]: polynomials of a, rotated by a swap and sign bits.
// The upper two bits of `quadrant` are the quadrant, modulo 4. The other bits are ignored.
template <class M>
FASTDDPM_HD void sine_cosine(typename M::Float a, typename M::Word quadrant, typename M::Float& sine,
                             typename M::Float& cosine) {
    using Float = typename M::Float;
    const Float a2 = a * a;
    Float s = M::fma(a2, M::broadcast(-0.00019495634478516877f), M::broadcast(0.00833197869360447f));
    s = M::fma(s, a2, M::broadcast(-0.16666650772094727f));
    s = M::fma(a * a2, s, a);
    Float c = M::fma(a2, M::broadcast(2.443845005473122e-05f), M::broadcast(-0.001388736767694354f));
    c = M::fma(c, a2, M::broadcast(0.04166664555668831f));
    c = M::fma(c, a2, M::broadcast(-0.5f));
    c = M::fma(c, a2, M::broadcast(1.0f));
    const auto odd = (quadrant & 0x40000000u) != 0u;
    sine = M::from_bits(M::bits(odd ? c : s) ^ (quadrant & 0x80000000u));
    cosine = M::from_bits(M::bits(odd ? s : c) ^ ((quadrant + 0x40000000u) & 0x80000000u));
}

// z0, z1 = sqrt(-2 ln u0) * (cos(2 pi u1), sin(2 pi u1)). The angle's quadrant is split off in integers, exactly.
template <class M>
FASTDDPM_HD void box_muller(typename M::Word w0, typename M::Word w1, typename M::Float& z0, typename M::Float& z1) {
    using Word = typename M::Word;
    using Int = typename M::Int;
    using Float = typename M::Float;
    const Float minus_log = minus_log_uniform<M>(w0);
    const Float radius = M::sqrt(minus_log + minus_log);
    const Word quadrant = w1 + 0x20000000u;
    const Float a = (M::to_float((Int)(w1 - (quadrant & 0xC0000000u))) + 0.5f) * 1.46291807926716e-9f;  // 2 pi 2^-32
    Float sine, cosine;
    sine_cosine<M>(a, quadrant, sine, cosine);
    z0 = radius * cosine;
    z1 = radius * sine;
}

// The counter's words for one sample and timestep. The caller sets word 0, e / 4.
FASTDDPM_HD uint32_t counter_word3(int64_t sample, uint32_t stream) {
    return static_cast<uint32_t>(static_cast<uint64_t>(sample) >> 32) ^ (stream << 24);
}

}  // namespace
}  // namespace fastddpm
