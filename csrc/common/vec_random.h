// Philox normals, a vector at a time: common/philox.h over the vectors of common/vec.h.
//
// Philox runs on 64-bit lanes whose lower halves hold the words, with two vectors of lanes per vector of words. The wide
// multiply reads and writes this form. So a round is a multiply, a shift and one three-way xor per pair of words, without
// shuffles. The upper halves may contain any value.
#pragma once

#include "philox.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastddpm {
namespace {

typedef uint64_t vwide __attribute__((vector_size(4 * kLanes)));

struct WideMath {
    using Word = vwide;

    static inline void multiply(uint32_t factor, vwide c, vwide& high, vwide& low) {
#if defined(FASTDDPM_VEC_AVX512)
        low = (vwide)_mm512_mul_epu32((__m512i)c, _mm512_set1_epi64(factor));
#elif defined(FASTDDPM_VEC_AVX2)
        low = (vwide)_mm256_mul_epu32((__m256i)c, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
        low = (vwide)_mm_mul_epu32((__m128i)c, _mm_set1_epi64x(factor));
#else
        low = (c & 0xFFFFFFFFu) * (uint64_t{} + factor);
#endif
        high = low >> 32;
    }
    static inline vwide xor3(vwide a, vwide b, uint32_t key) {
#if defined(FASTDDPM_VEC_AVX512)
        return (vwide)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, _mm512_set1_epi64(key), 0x96);
#else
        return a ^ b ^ (uint64_t{} + key);
#endif
    }
};

struct VectorMath {
    using Word = vuint;
    using Int = vint;
    using Float = vfloat;

    static inline Float broadcast(float f) { return splat(f); }
    static inline Float to_float(Word w) { return __builtin_convertvector(w, vfloat); }
    static inline Float to_float(Int i) { return __builtin_convertvector(i, vfloat); }
    static inline Word bits(Float f) { return (Word)f; }
    static inline Float from_bits(Word w) { return (Float)w; }
    static inline Float fma(Float a, Float b, Float c) { return fastddpm::fma(a, b, c); }
    static inline Float sqrt(Float a) {
#if defined(FASTDDPM_VEC_AVX512)
        return (Float)_mm512_sqrt_ps((__m512)a);
#elif defined(FASTDDPM_VEC_AVX2)
        return (Float)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
        return (Float)_mm_sqrt_ps((__m128)a);
#else
        for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
        return a;
#endif
    }
};

inline vfloat interleave_low(vfloat a, vfloat b) {  // within each 128 bits: a0 b0 a1 b1
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_unpacklo_ps((__m512)a, (__m512)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_unpacklo_ps((__m256)a, (__m256)b);
#else
    return vfloat{a[0], b[0], a[1], b[1]};
#endif
}

inline vfloat interleave_high(vfloat a, vfloat b) {  // within each 128 bits: a2 b2 a3 b3
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
    return vfloat{a[2], b[2], a[3], b[3]};
#endif
}

inline vfloat low_pairs(vfloat a, vfloat b) {  // within each 128 bits: a0 a1 b0 b1
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_unpacklo_pd((__m512d)a, (__m512d)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
#else
    return vfloat{a[0], a[1], b[0], b[1]};
#endif
}

inline vfloat high_pairs(vfloat a, vfloat b) {  // within each 128 bits: a2 a3 b2 b3
#if defined(FASTDDPM_VEC_AVX512)
    return (vfloat)_mm512_unpackhi_pd((__m512d)a, (__m512d)b);
#elif defined(FASTDDPM_VEC_AVX2)
    return (vfloat)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
    return vfloat{a[2], a[3], b[2], b[3]};
#endif
}

// The normals of one sample at one timestep, kBlock consecutive elements at a time.
class NormalStream {
  public:
    static constexpr int kBlock = 4 * kLanes;

    NormalStream(uint64_t seed, uint32_t stream, uint32_t t, int64_t sample)
        : seed_(seed), t_(t), sample_(static_cast<uint32_t>(sample)), word3_(counter_word3(sample, stream)) {
        // Lane 4b + j draws quad kLanes/4 * j + b, so that transposing each 128 bits separately puts all elements in order.
        for (int i = 0; i < kLanes / 2; ++i) {
            even_[i] = quad_of_lane(2 * i);
            odd_[i] = quad_of_lane(2 * i + 1);
        }
    }

    // Normals of elements 4*quad .. 4*quad + kBlock - 1.
    inline void block(uint32_t quad, vfloat (&z)[4]) const {
        const vwide zero{};
        vwide even[4] = {even_ + quad, zero + t_, zero + sample_, zero + word3_};
        vwide odd[4] = {odd_ + quad, zero + t_, zero + sample_, zero + word3_};
        philox4x32_10<WideMath>(even, seed_);
        philox4x32_10<WideMath>(odd, seed_);
        vuint words[4];
        for (int k = 0; k < 4; ++k) words[k] = (vuint)((even[k] & 0xFFFFFFFFu) | (odd[k] << 32));
        vfloat c01, s01, c23, s23;
        box_muller<VectorMath>(words[0], words[1], c01, s01);
        box_muller<VectorMath>(words[2], words[3], c23, s23);
        const vfloat low01 = interleave_low(c01, s01), high01 = interleave_high(c01, s01);
        const vfloat low23 = interleave_low(c23, s23), high23 = interleave_high(c23, s23);
        z[0] = low_pairs(low01, low23);
        z[1] = high_pairs(low01, low23);
        z[2] = low_pairs(high01, high23);
        z[3] = high_pairs(high01, high23);
    }

    // Writes the normals of elements [begin, begin + count) and nothing else. begin is a multiple of 4.
    inline void write(int64_t begin, int64_t count, float* out) const {
        vfloat z[4];
        for (int64_t done = 0; done < count; done += kBlock) {
            block(static_cast<uint32_t>((begin + done) / 4), z);
            for (int k = 0; k < 4; ++k) {
                const int64_t left = count - done - k * kLanes;
                if (left > 0) store(out + done + k * kLanes, z[k], left < kLanes ? static_cast<int>(left) : kLanes);
            }
        }
    }

  private:
    static constexpr uint64_t quad_of_lane(int lane) { return kLanes / 4 * (lane % 4) + lane / 4; }

    uint64_t seed_;
    uint32_t t_, sample_, word3_;
    vwide even_, odd_;
};

}  // namespace
}  // namespace fastddpm
