// SIMD on GCC/Clang vector extensions, as wide as the compile flags allow: 16 floats with AVX-512, 8 with AVX2
// and FMA, 4 otherwise. + - * / and comparisons are the compiler's own; `mask ? a : b` selects lanes.
//
// Sources that include this are compiled once per variant and linked together, so everything here has internal
// linkage: the generic code must never call a weak symbol that was compiled for AVX-512.
#pragma once

#include <cstdint>

#include "../kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastddpm {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTDDPM_VEC_AVX512 1
constexpr int kLanes = 16;
constexpr __mmask16 kAllLanes = 0xffff;  // GCC warns about the unmasked intrinsics' undefined operand
#elif defined(__AVX2__) && defined(__FMA__)
#define FASTDDPM_VEC_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalf __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Calls f with a value of the type that `dtype` names.
template <class F>
inline void of_dtype(Dtype dtype, const F& f) {
    if (dtype == Dtype::float32)
        f(float{});
    else if (dtype == Dtype::bfloat16)
        f(bfloat16{});
    else  // bindings.cpp accepts no other dtype
        f(float16{});
}

inline vfloat splat(float a) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_set1_ps(a);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_set1_ps(a);
#else
    return vfloat{a, a, a, a};
#endif
}
inline vint splat(int32_t a) { return vint{} + a; }

inline vint lane_index() {
    vint v;
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

// All ones in the first `count` lanes.
inline vint first_lanes(int count) { return lane_index() < count; }

// a*b + c, rounded once if the variant has the instruction.
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Both return b if a is NaN.
inline vfloat min(vfloat a, vfloat b) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_maskz_min_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

inline vfloat max(vfloat a, vfloat b) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The lanes' sum, halves added to halves.
inline float sum_lanes(vfloat v) {
    float lanes[kLanes];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int n = kLanes / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
}

// ---- memory: load(p), load(p, count), store(p, v), store(p, v, count) ----
// A partial load returns 0 in the lanes past count. Partial loads and stores do not access memory past it.

inline vfloat load(const float* p) {
    vfloat v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, vfloat v) { __builtin_memcpy(p, &v, sizeof v); }

inline vfloat load(const float* p, int count) {
    if (count == kLanes) return load(p);
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_maskload_ps(p, (__m256i)first_lanes(count));
#else
    vfloat v{};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}

inline void store(float* p, vfloat v, int count) {
    if (count == kLanes) return store(p, v);
#if defined(FASTDDPM_VEC_AVX512)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(FASTDDPM_VEC_AVX2)
    _mm256_maskstore_ps(p, (__m256i)first_lanes(count), (__m256)v);
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// ---- the same for bfloat16 and float16: loads widen to float32, stores round ----
// GCC's own conversions between 16 and 32 bits go through shuffles.

inline vuint widen_bits(vhalf h) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vuint)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)h);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vuint)_mm256_cvtepu16_epi32((__m128i)h);
#else
    return __builtin_convertvector(h, vuint);
#endif
}

// For lanes below 2^16.
inline vhalf narrow_bits(vuint u) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vhalf)_mm512_maskz_cvtepi32_epi16(kAllLanes, (__m512i)u);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vhalf)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
    return __builtin_convertvector(u, vhalf);
#endif
}

inline vfloat widen(vhalf h, bfloat16) { return (vfloat)(widen_bits(h) << 16); }

// Rounds to nearest even. NaN is preserved (its payload could otherwise round to infinity).
inline vhalf narrow(vfloat v, bfloat16) {
    vuint u = (vuint)v;
    vuint rounded = u + 0x7fff + ((u >> 16) & 1);
    vuint kept = v == v ? rounded : u | 0x400000;
    return narrow_bits(kept >> 16);
}

inline vfloat widen(vhalf h, float16) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)h);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_cvtph_ps((__m128i)h);
#else
    vuint u = widen_bits(h), sign = (u & 0x8000) << 16, magnitude = (u & 0x7fff) << 13;
    // A subnormal's value is what its bits add to 2^-14. No float32 here is subnormal, as a process may flush those to 0.
    vuint subnormal = (vuint)((vfloat)(magnitude + (113u << 23)) - splat(0x1p-14f));
    vuint finite = magnitude < 0x0400u << 13 ? subnormal : magnitude + (112u << 23);
    return (vfloat)(sign | (magnitude < 0x7c00u << 13 ? finite : magnitude | 0x7f800000));
#endif
}

// Rounds to nearest even. NaN is preserved.
inline vhalf narrow(vfloat v, float16) {
#if defined(FASTDDPM_VEC_AVX512)
    return (vhalf)_mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    vuint u = (vuint)v, magnitude = u & 0x7fffffff;
    vuint normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    // Below 2^-14, adding 1/2 rounds to the multiples of 2^-24 and leaves their number in the low bits.
    vuint subnormal = (vuint)((vfloat)magnitude + splat(0.5f)) - 0x3f000000;
    vuint finite = magnitude < 0x38800000 ? subnormal : normal;
    vuint special = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : vuint{} + 0x7c00;
    return narrow_bits((magnitude < 0x477ff000 ? finite : special) | u >> 16 & 0x8000);
#endif
}

template <class T>
inline vfloat load(const T* p) {
    vhalf h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h, T{});
}

template <class T>
inline void store(T* p, vfloat v) {
    vhalf h = narrow(v, T{});
    __builtin_memcpy(p, &h, sizeof h);
}

template <class T>
inline vfloat load(const T* p, int count) {
    if (count == kLanes) return load(p);
#if defined(FASTDDPM_VEC_AVX512)
    return widen((vhalf)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), T{});
#else
    vhalf h{};
    for (int i = 0; i < count; ++i) h[i] = p[i].bits;
    return widen(h, T{});
#endif
}

template <class T>
inline void store(T* p, vfloat v, int count) {
    if (count == kLanes) return store(p, v);
    vhalf h = narrow(v, T{});
#if defined(FASTDDPM_VEC_AVX512)
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)h);
#else
    for (int i = 0; i < count; ++i) p[i].bits = h[i];
#endif
}

// ---- functions ----

// e^-x = m * power for |x| <= 87, with a relative error below 1e-7 + 2e-9 |x|. x is clamped to [-87, 87], also if it is NaN.
struct ExpMinus {
    vfloat m, power;  // power = 2^n
};

inline ExpMinus exp_minus(vfloat x) {
    x = max(min(x, splat(87.0f)), splat(-87.0f));
    // n = round(-x / ln 2). Adding 1.5 * 2^23 leaves n, biased by 127, in the low bits.
    const vfloat magic = splat(12582912.0f + 127.0f);
    vfloat shifted = fma(x, splat(-1.44269504f), magic);
    vfloat n = shifted - magic;
#if defined(FASTDDPM_VEC_AVX512) || defined(FASTDDPM_VEC_AVX2)
    vfloat r = fma(n, splat(0.693147182f), x);  // off by n times ln 2's rounding, 2e-9
#else
    // Without FMA, ln 2 is split in two parts. n times the first is exact (8 bits and 15).
    vfloat r = fma(n, splat(1.42860677e-6f), fma(n, splat(0.693145752f), x));
#endif
    // e^-r = 1 - r + r^2 p(r), p minimax on |r| <= ln(2) / 2.
    vfloat p = splat(0.00138144672f);
    p = fma(p, r, splat(-0.00836878084f));
    p = fma(p, r, splat(0.0416683927f));
    p = fma(p, r, splat(-0.166665196f));
    p = fma(p, r, splat(0.49999994f));
    p = fma(p, r, splat(-1.0f));
    p = fma(p, r, splat(1.0f));
    return {p, (vfloat)((vint)shifted << 23)};  // the low bits, moved to the exponent, are 2^n
}

inline vfloat exp_clamped(vfloat x) {
    ExpMinus e = exp_minus(-x);
    return e.m * e.power;
}

// 1 / x for finite x away from over- and underflow.
inline vfloat reciprocal(vfloat x) {
#if defined(FASTDDPM_VEC_AVX512)
    // 14 bits, doubled by one Newton step. On current cores this takes half the time of a division.
    vfloat r = (vfloat)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
    return fma(r, fma(-x, r, splat(1.0f)), r);
#else
    return splat(1.0f) / x;
#endif
}

// x / (1 + e^-x): tiny for large negative x, x for large positive x, NaN for NaN.
inline vfloat silu(vfloat x) {
    ExpMinus e = exp_minus(x);
    return x * reciprocal(fma(e.m, e.power, splat(1.0f)));
}

// d silu(x) / dx = s + x s (1 - s), s = sigmoid(x), computed with 1 - s = e^-x s, which does not cancel.
inline vfloat silu_grad(vfloat x) {
    ExpMinus e = exp_minus(x);
    vfloat s = reciprocal(fma(e.m, e.power, splat(1.0f)));
    return s * fma(x, e.m * e.power * s, splat(1.0f));
}

}  // namespace
}  // namespace fastddpm
