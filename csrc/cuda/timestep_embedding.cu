// out[i, :] = [sin(t_i f), cos(t_i f), 0 if dim is odd], cos first if flipped, with f_k = exp(-rate * k).
//
// The turns t*f / (2 pi) need more digits than a float32 has. They are computed in float64, and their nearest multiple of a
// quarter turn is subtracted. The remainder, at most an eighth of a turn, is passed to the float32 polynomials of
// common/philox.h.
// The kernel computes the frequencies. A table would have to be copied to the device before a graph's capture.
//
// Work: a thread computes one frequency and iterates over the rows. Bytes: out is written once.
#include "../common/philox.h"
#include "device.cuh"

namespace fastddpm {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kRows = 16;  // minimum per block, because a frequency costs as much as several rows

__global__ void __launch_bounds__(kThreads) timestep_embedding_kernel(TimestepEmbeddingArgs args, int64_t rows) {
    const int64_t half = args.dim / 2, columns = ceil_div(half, kThreads);
    const int64_t k = blockIdx.x % columns * kThreads + threadIdx.x, first = blockIdx.x / columns * rows;
    const int64_t last = first + rows < args.count ? first + rows : args.count;
    if (k >= half) return;
    const double turns_per_t = exp(-args.rate * static_cast<double>(k)) * 0.15915494309189535;
    const int64_t sine_at = args.flip_sin_to_cos ? half : 0, cosine_at = half - sine_at;
    for (int64_t i = first; i < last; ++i) {
        const double t = args.t_int ? static_cast<double>(args.t_int[i]) : static_cast<double>(args.t_float[i]);
        const double turns = t * turns_per_t, quarters = rint(4.0 * turns);
        const float rest = static_cast<float>((turns - 0.25 * quarters) * 6.283185307179586);
        // The quadrant is passed in the upper two bits.
        const uint32_t quadrant = static_cast<uint32_t>(static_cast<int64_t>(quarters)) << 30;
        float sine, cosine;
        sine_cosine<ScalarMath>(rest, quadrant, sine, cosine);
        float* row = args.out + i * args.dim;
        row[sine_at + k] = sine;
        row[cosine_at + k] = cosine;
        if (k == 0 && args.dim % 2) row[args.dim - 1] = 0.0f;
    }
}

}  // namespace

void timestep_embedding_cuda(const TimestepEmbeddingArgs& args, CudaPlace place) {
    if (args.count == 0) return;
    DeviceScope scope(place.device);
    const int64_t columns = ceil_div(args.dim / 2, kThreads), most = int64_t{1} << 16;
    const int64_t rows = ceil_div(args.count, most) > kRows ? ceil_div(args.count, most) : kRows;
    launch(timestep_embedding_kernel, columns * ceil_div(args.count, rows), kThreads, 1, 0, place.stream, args, rows);
}

void load_timestep_embedding() { load_kernel(timestep_embedding_kernel); }

}  // namespace fastddpm
