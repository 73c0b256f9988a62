// out[i, :] = [sin(t_i f), cos(t_i f), 0 if dim is odd], cos first if flipped, with f_k = exp(-rate * k).
//
// The turns t*f / (2 pi) need more digits than a float32 has. They are computed in float64, and their nearest multiple of a
// quarter turn is subtracted. The remainder, at most an eighth of a turn, is passed to the float32 polynomials of
// common/philox.h.
//
// Work: a task is one row. The frequencies are computed once per call. Bytes: out is written once.
#include <cmath>
#include <cstdlib>

#include "common/parallel.h"
#include "common/vec_random.h"
#include "kernels.h"

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

typedef double vdouble __attribute__((vector_size(8 * kLanes)));

// turns_per_t: f_k / (2 pi), padded to whole vectors.
void embed(double t, const TimestepEmbeddingArgs& args, const double* turns_per_t, float* row) {
    const int64_t half = args.dim / 2;
    float* sines = row + (args.flip_sin_to_cos ? half : 0);
    float* cosines = row + (args.flip_sin_to_cos ? 0 : half);
    for (int64_t k = 0; k < half; k += kLanes) {
        const int count = half - k < kLanes ? static_cast<int>(half - k) : kLanes;
        vdouble turns;
        __builtin_memcpy(&turns, turns_per_t + k, sizeof turns);
        turns *= t;
        // Adding 1.5 * 2^50 rounds to quarters and leaves their number in the low bits.
        const double magic = 0x1.8p50;
        const vdouble shifted = turns + magic;
        const vdouble rest = (turns - (shifted - magic)) * 6.283185307179586;
        typedef uint64_t vbits __attribute__((vector_size(8 * kLanes)));
        const vuint quarters = __builtin_convertvector((vbits)shifted, vuint);
        vfloat sine, cosine;
        sine_cosine<VectorMath>(__builtin_convertvector(rest, vfloat), quarters << 30, sine, cosine);
        store(sines + k, sine, count);
        store(cosines + k, cosine, count);
    }
    if (args.dim % 2) row[args.dim - 1] = 0.0f;
}

}  // namespace

void timestep_embedding(const TimestepEmbeddingArgs& args) {
    const int64_t grain = (kParallelElements + args.dim - 1) / args.dim;
    const int64_t padded = args.dim / 2 + kLanes;
    double* turns = static_cast<double*>(std::malloc(padded * sizeof(double)));
    if (!turns) std::abort();
    for (int64_t k = 0; k < padded; ++k)
        turns[k] = k < args.dim / 2 ? std::exp(-args.rate * k) * 0.15915494309189535 : 0.0;
    parallel_for(args.count, grain, args.threads, [&](int64_t i) {
        embed(args.t_int ? static_cast<double>(args.t_int[i]) : static_cast<double>(args.t_float[i]), args, turns,
              args.out + i * args.dim);
    });
    std::free(turns);
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
