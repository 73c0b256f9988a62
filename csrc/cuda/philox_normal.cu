// out[i, e] = the e-th normal of (seed, stream, t_i, sample_i), see common/philox.h.
//
// Work: a thread draws the four normals of one counter, four consecutive elements of one sample.
// Bytes: out is written once, 16 bytes per thread if the sample size allows it. Nothing is read.
#include "../common/philox.h"
#include "device.cuh"

namespace fastddpm {
namespace {

constexpr int kThreads = 256;

template <bool kVector>
__global__ void __launch_bounds__(kThreads) philox_normal_kernel(PhiloxNormalArgs args, int64_t quads) {
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    if (index >= args.samples * quads) return;
    // 64-bit divisions are slow, and few calls need them.
    const bool small = args.samples * quads <= INT32_MAX;
    const int64_t i = small ? int64_t(uint32_t(index) / uint32_t(quads)) : index / quads, quad = index - i * quads;
    const int64_t sample = args.sample ? args.sample[i] : args.first + i;
    const uint32_t t = static_cast<uint32_t>(args.t ? args.t[i] : args.t_all);
    uint32_t words[4] = {static_cast<uint32_t>(quad), t, static_cast<uint32_t>(sample),
                         counter_word3(sample, args.stream)};
    philox4x32_10<ScalarMath>(words, args.seed);
    float4 z;
    box_muller<ScalarMath>(words[0], words[1], z.x, z.y);
    box_muller<ScalarMath>(words[2], words[3], z.z, z.w);
    float* out = args.out + i * args.elements + 4 * quad;
    if constexpr (kVector) {
        __stcg(reinterpret_cast<float4*>(out), z);  // written this way, the compiler does not split the store
    } else {
        const int64_t left = args.elements - 4 * quad;
        out[0] = z.x;
        if (left > 1) out[1] = z.y;
        if (left > 2) out[2] = z.z;
        if (left > 3) out[3] = z.w;
    }
}

}  // namespace

void philox_normal_cuda(const PhiloxNormalArgs& args, CudaPlace place) {
    if (args.samples == 0 || args.elements == 0) return;
    DeviceScope scope(place.device);
    const int64_t quads = ceil_div(args.elements, 4), blocks = ceil_div(args.samples * quads, kThreads);
    const bool vector = args.elements % 4 == 0 && aligned(args.out, 16);
    launch(vector ? philox_normal_kernel<true> : philox_normal_kernel<false>, blocks, kThreads, 1, 0, place.stream,
           args, quads);
}

void load_philox_normal() {
    load_kernel(philox_normal_kernel<true>);
    load_kernel(philox_normal_kernel<false>);
}

}  // namespace fastddpm
