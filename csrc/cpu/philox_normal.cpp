// out[i, e] = the e-th normal of (seed, stream, t_i, sample_i), see common/philox.h.
//
// Work: a task is up to kChunk consecutive elements of one sample. Bytes: out is written once. Nothing is read.
#include "common/parallel.h"
#include "common/vec_random.h"
#include "kernels.h"

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int64_t kChunk = 4096;  // a multiple of NormalStream::kBlock

}  // namespace

void philox_normal(const PhiloxNormalArgs& args) {
    const int64_t chunks = (args.elements + kChunk - 1) / kChunk;
    if (!args.samples || !chunks) return;
    const int64_t task_elements = args.elements < kChunk ? args.elements + NormalStream::kBlock : kChunk;
    const int64_t grain = (kParallelElements + task_elements - 1) / task_elements;
    parallel_for(args.samples * chunks, grain, args.threads, [&](int64_t task) {
        const int64_t i = task / chunks, begin = task % chunks * kChunk;
        const int64_t left = args.elements - begin;
        const NormalStream normals(args.seed, args.stream, static_cast<uint32_t>(args.t ? args.t[i] : args.t_all),
                                   args.sample ? args.sample[i] : args.first + i);
        normals.write(begin, left < kChunk ? left : kChunk, args.out + i * args.elements + begin);
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
