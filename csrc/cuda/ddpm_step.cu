// One reverse step, with the row (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi) that state points at:
//   x0     = clamp(a*x + b*o, -clip, clip)                                          a NaN stays a NaN
//   x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,  f = (v+1)/2
// A term whose coefficient is 0 plays no part, whatever its memory holds.
//
// Layout: x, o and next_input may each have channels outer or inner. Noise is drawn in C*H*W order, four elements of a
// counter at a time.
//
// Work: where a sample has 1, 3 or 4 channels and a multiple of 4 pixels, a thread takes 4 neighbouring pixels with all
// their channels, so that every tensor is read and written in whole 8 or 16 bytes, in either layout, and every counter
// is used up by one thread. Otherwise a thread takes the four elements of one counter, one by one.
//
// Bytes: x and o are read once, x_prev (and x0, next_input) written once. The first loads are under way before the row
// is known: it is three dependent reads away.
//
// State: the row index lies in the lower 32 bits of state[2]. Each block, when it has read it, adds one to the upper
// 32 bits; the block that finds all others there writes the next index. So one launch is a step, and none waits.
#include "../common/philox.h"
#include "device.cuh"

namespace fastddpm {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSm = 4;  // as many as live there at once
constexpr uint32_t kStream = 1;  // of the reverse step

struct Row {
    float a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi;
};

// What the step needs of its row and state.
struct Point {
    Row row;
    uint64_t seed;
    int64_t first, t, index;
};

// What all threads do first: the row that state points at. Returns whether the step can be taken; it can't where the
// index is beyond the table, or the row wants an x0_last that isn't there. Then state says so.
__device__ bool arrive(const DdpmStepArgs& args, const Point& of_host, Point& point) {
    if (args.table_on_host) {
        point = of_host;
        return true;
    }
    uint32_t* index = shared_memory<uint32_t>();
    if (threadIdx.x == 0) {
        auto* counter = reinterpret_cast<unsigned long long*>(args.state + 2);
        *index = static_cast<uint32_t>(*const_cast<volatile unsigned long long*>(counter));
        const unsigned long long before = atomicAdd(counter, 1ull << 32);
        if (before >> 32 == gridDim.x - 1) *counter = static_cast<unsigned long long>(*index) + 1;
    }
    __syncthreads();
    point.index = *index;
    bool possible = point.index < args.table_rows;
    if (possible) {
        const float* r = args.rows + 9 * point.index;
        point.row = {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
        point.t = args.timesteps[point.index];
        point.seed = static_cast<uint64_t>(args.state[0]);
        point.first = args.state[1];
        possible = point.row.c2 == 0.0f || args.x0_last;
    }
    return possible;
}

// The first row whose output was not finite, or that could not be taken.
__device__ void record(const DdpmStepArgs& args, const Point& point) {
    if (!args.table_on_host)
        atomicCAS(reinterpret_cast<unsigned long long*>(args.state + 3), ~0ull,
                  static_cast<unsigned long long>(point.index));
}

__device__ __forceinline__ bool finite(float v) { return v - v == 0.0f; }

struct Element {
    float x, o, v, x0_last, z;
};

// The step of one element: x_prev and x0.
__device__ __forceinline__ float step(const Row& row, bool clip, float bound, bool learned, const Element& e,
                                      float& x0) {
    x0 = row.b != 0.0f ? row.b * e.o : 0.0f;
    x0 = row.a != 0.0f ? fmaf(row.a, e.x, x0) : x0;
    if (clip) {
        x0 = x0 > bound ? bound : x0;
        x0 = x0 < -bound ? -bound : x0;
    }
    float x_prev = row.c1 != 0.0f ? row.c1 * e.x : 0.0f;
    x_prev = row.c0 != 0.0f ? fmaf(row.c0, x0, x_prev) : x_prev;
    x_prev = row.c2 != 0.0f ? fmaf(row.c2, e.x0_last, x_prev) : x_prev;
    x_prev = row.d != 0.0f ? fmaf(row.d, e.o, x_prev) : x_prev;
    if (row.sigma != 0.0f) {
        float sigma = row.sigma;
        if (learned) {
            const float f = (e.v + 1.0f) * 0.5f;
            sigma *= expf(fmaf(f, row.lv_hi, (1.0f - f) * row.lv_lo) * 0.5f);
        }
        x_prev = fmaf(sigma, e.z, x_prev);
    }
    return x_prev;
}

__device__ __forceinline__ void draw(const Point& point, int64_t sample, uint32_t quad, float (&z)[4]) {
    sample += point.first;
    uint32_t words[4] = {quad, static_cast<uint32_t>(point.t), static_cast<uint32_t>(sample),
                         counter_word3(sample, kStream)};
    philox4x32_10<ScalarMath>(words, point.seed);
    box_muller<ScalarMath>(words[0], words[1], z[0], z[1]);
    box_muller<ScalarMath>(words[2], words[3], z[2], z[3]);
}

// ---- any shape, alignment and layout; learned variances ----

__global__ void __launch_bounds__(kThreads) ddpm_step_kernel(DdpmStepArgs args, Point of_host) {
    Point point;
    if (!arrive(args, of_host, point)) {
        record(args, point);
        return;
    }
    const Row& row = point.row;
    const bool reads_o = row.b != 0.0f || row.d != 0.0f;
    const bool learned =
        args.o_channels > args.channels && row.sigma != 0.0f && (row.lv_lo != 0.0f || row.lv_hi != 0.0f);
    const int64_t elements = args.channels * args.pixels, quads = ceil_div(elements, 4);
    const int64_t total = args.samples * quads;
    bool bad = false;
    for (int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x; item < total;
         item += int64_t{gridDim.x} * kThreads) {
        const int64_t i = item / quads, quad = item - i * quads;
        float z[4] = {};
        if (row.sigma != 0.0f && !args.noise) draw(point, i, static_cast<uint32_t>(quad), z);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t e = 4 * quad + k;
            if (e >= elements) break;
            const int64_t c = e / args.pixels, p = e - c * args.pixels;
            const auto place = [&](bool inner, int64_t channels) {
                return i * channels * args.pixels + (inner ? p * channels + c : c * args.pixels + p);
            };
            const int64_t at = place(args.x_inner, args.channels), o_at = place(args.o_inner, args.o_channels);
            Element v{};
            v.x = args.x[at];
            if (reads_o) v.o = load_any(args.o, args.o_dtype, o_at);
            if (learned) v.v = load_any(args.o, args.o_dtype, o_at + args.channels * (args.o_inner ? 1 : args.pixels));
            if (row.c2 != 0.0f) v.x0_last = args.x0_last[at];
            v.z = args.noise ? args.noise[at] : z[k];
            bad |= !finite(v.o) || !finite(v.v);
            float x0;
            const float x_prev = step(row, args.clip, args.clip_bound, learned, v, x0);
            args.x_prev[at] = x_prev;
            if (args.x0) args.x0[at] = x0;
            if (args.next_input)
                store_any(args.next_input, args.next_dtype, place(args.next_inner, args.channels), x_prev);
        }
    }
    if (bad) record(args, point);
}

// ---- C channels, pixels in fours ----

// 4 neighbouring pixels of C channels, [C][4], as C vectors of 4 elements: with channels outer a vector is a channel's,
// with channels inner they follow each other in memory.
template <int C>
struct Tile {
    float v[C][4];

    static __device__ __forceinline__ int64_t at(bool inner, int64_t i, int64_t p, int64_t pixels, int k) {
        return i * C * pixels + (inner ? p * C + 4 * k : k * pixels + p);
    }

    template <class T>
    __device__ __forceinline__ void load_as(const void* from, bool inner, int64_t i, int64_t p, int64_t pixels) {
        Pack<T, 4> packs[C];
#pragma unroll
        for (int k = 0; k < C; ++k) packs[k].load(static_cast<const T*>(from) + at(inner, i, p, pixels, k));
        // The branch is around the loops: register arrays want constant indices.
        if (inner) {
#pragma unroll
            for (int f = 0; f < 4 * C; ++f) v[f % C][f / C] = packs[f / 4].get(f % 4);
        } else {
#pragma unroll
            for (int f = 0; f < 4 * C; ++f) v[f / 4][f % 4] = packs[f / 4].get(f % 4);
        }
    }
    template <class T>
    __device__ __forceinline__ void store_as(void* to, bool inner, int64_t i, int64_t p, int64_t pixels) const {
        Pack<T, 4> packs[C];
        if (inner) {
#pragma unroll
            for (int f = 0; f < 4 * C; f += 2) packs[f / 4].put(f % 4, v[f % C][f / C], v[(f + 1) % C][(f + 1) / C]);
        } else {
#pragma unroll
            for (int f = 0; f < 4 * C; f += 2) packs[f / 4].put(f % 4, v[f / 4][f % 4], v[f / 4][f % 4 + 1]);
        }
#pragma unroll
        for (int k = 0; k < C; ++k) packs[k].store(static_cast<T*>(to) + at(inner, i, p, pixels, k));
    }
    __device__ __forceinline__ void load(const void* from, Dtype dtype, bool inner, int64_t i, int64_t p,
                                         int64_t pixels) {
        if (dtype == Dtype::float32)
            load_as<float>(from, inner, i, p, pixels);
        else if (dtype == Dtype::bfloat16)
            load_as<__nv_bfloat16>(from, inner, i, p, pixels);
        else
            load_as<__half>(from, inner, i, p, pixels);
    }
    __device__ __forceinline__ void store(void* to, Dtype dtype, bool inner, int64_t i, int64_t p,
                                          int64_t pixels) const {
        if (dtype == Dtype::float32)
            store_as<float>(to, inner, i, p, pixels);
        else if (dtype == Dtype::bfloat16)
            store_as<__nv_bfloat16>(to, inner, i, p, pixels);
        else
            store_as<__half>(to, inner, i, p, pixels);
    }
};

template <int C>
__global__ void __launch_bounds__(kThreads, C == 4 ? 3 : 4) ddpm_step_tile_kernel(DdpmStepArgs args, Point of_host) {
    const int64_t tiles = args.pixels / 4, total = args.samples * tiles, stride = int64_t{gridDim.x} * kThreads;
    const bool small = total <= INT32_MAX;  // 64-bit divisions are slow
    int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x, i = 0, p = 0;
    Tile<C> x, o;
    const auto begin = [&] {
        i = small ? int64_t(uint32_t(item) / uint32_t(tiles)) : item / tiles;
        p = 4 * (item - i * tiles);
        x.load(args.x, Dtype::float32, args.x_inner, i, p, args.pixels);
        o.load(args.o, args.o_dtype, args.o_inner, i, p, args.pixels);
    };
    if (item < total) begin();
    Point point;
    if (!arrive(args, of_host, point)) {
        record(args, point);
        return;
    }
    const Row& row = point.row;
    const bool reads_o = row.b != 0.0f || row.d != 0.0f;
    bool bad = false;
    while (item < total) {
        Tile<C> last, z, x0;
        if (row.c2 != 0.0f) last.load(args.x0_last, Dtype::float32, args.x_inner, i, p, args.pixels);
        if (row.sigma != 0.0f) {
            if (args.noise) {
                z.load(args.noise, Dtype::float32, args.x_inner, i, p, args.pixels);
            } else {
#pragma unroll
                for (int c = 0; c < C; ++c) draw(point, i, static_cast<uint32_t>((c * args.pixels + p) / 4), z.v[c]);
            }
        }
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const Element e{x.v[c][j], o.v[c][j], 0.0f, row.c2 != 0.0f ? last.v[c][j] : 0.0f,
                                row.sigma != 0.0f ? z.v[c][j] : 0.0f};
                bad |= reads_o && !finite(e.o);
                x.v[c][j] = step(row, args.clip, args.clip_bound, false, e, x0.v[c][j]);
            }
        }
        x.store(args.x_prev, Dtype::float32, args.x_inner, i, p, args.pixels);
        if (args.x0) x0.store(args.x0, Dtype::float32, args.x_inner, i, p, args.pixels);
        if (args.next_input) x.store(args.next_input, args.next_dtype, args.next_inner, i, p, args.pixels);
        item += stride;
        if (item < total) begin();
    }
    if (bad) record(args, point);
}

bool in_fours(const void* p, Dtype dtype) { return aligned(p, 4 * size_of(dtype)); }

using Kernel = void (*)(DdpmStepArgs, Point);

Kernel kernel_for(const DdpmStepArgs& args) {
    const bool tiles = args.pixels % 4 == 0 && args.o_channels == args.channels && in_fours(args.o, args.o_dtype) &&
                       in_fours(args.next_input, args.next_dtype) && aligned(args.x, 16) && aligned(args.x_prev, 16) &&
                       aligned(args.x0, 16) && aligned(args.x0_last, 16) && aligned(args.noise, 16);
    if (tiles && args.channels == 1) return ddpm_step_tile_kernel<1>;
    if (tiles && args.channels == 3) return ddpm_step_tile_kernel<3>;
    if (tiles && args.channels == 4) return ddpm_step_tile_kernel<4>;
    return ddpm_step_kernel;
}

}  // namespace

void ddpm_step_cuda(const DdpmStepArgs& args, CudaPlace place) {
    DeviceScope scope(place.device);
    Point of_host{};
    if (args.table_on_host) {
        const int64_t index = args.state[2];
        const float* r = args.rows + 9 * index;
        of_host = {{r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]},
                   static_cast<uint64_t>(args.state[0]),
                   args.state[1],
                   args.timesteps[index],
                   index};
    }
    const Kernel kernel = kernel_for(args);
    const int64_t work =
        args.samples * (kernel == ddpm_step_kernel ? ceil_div(args.channels * args.pixels, 4) : args.pixels / 4);
    const int64_t most = kBlocksPerSm * device_attribute(cudaDevAttrMultiProcessorCount, place.device);
    const int64_t blocks = ceil_div(work, kThreads) < most ? ceil_div(work, kThreads) : most;
    // Without elements too a step is a step: state moves on.
    launch(kernel, blocks ? blocks : 1, kThreads, 1, sizeof(uint32_t), place.stream, args, of_host);
}

void load_ddpm_step() {
    for (Kernel kernel : {ddpm_step_kernel, Kernel(ddpm_step_tile_kernel<1>), Kernel(ddpm_step_tile_kernel<3>),
                          Kernel(ddpm_step_tile_kernel<4>)})
        load_kernel(kernel);
}

}  // namespace fastddpm
