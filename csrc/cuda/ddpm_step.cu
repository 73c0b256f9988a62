// One reverse step, with the row (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi) that state points at:
//   x0     = clamp(a*x + b*o, -clip, clip)                                          NaN is preserved
//   x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,  f = (v+1)/2
// A term with coefficient 0 has no effect, even if its memory contains NaN.
//
// Layout: x, o and next_input may each be contiguous or channels_last. Noise is drawn in C*H*W order, four elements of a
// counter at a time.
//
// Work: if a sample has 1, 3 or 4 channels and a multiple of 4 pixels, a thread processes 4 adjacent pixels with all their
// channels. Then every tensor is read and written in units of 8 or 16 bytes, in either layout, and one thread uses all normals
// of a counter. Otherwise a thread processes the four elements of one counter separately.
//
// Bytes: x and o are read once, x_prev (and x0, next_input) is written once. The first loads start before the row is known,
// because the row takes two dependent reads.
//
// State: the lower 32 bits of state[2] are the row index. After reading it, each block adds 1 to the upper 32 bits. The block
// that finds all other blocks counted there writes the next index. So a step is one launch, and no block waits.
#include "../common/philox.h"
#include "device.cuh"

namespace fastddpm {
namespace {

constexpr int kThreads = 128;
constexpr uint32_t kStream = 1;  // of the reverse step

struct Row {
    float a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi;
};

// The values of the row and the state that a step uses.
struct Point {
    Row row;
    uint64_t seed;
    int64_t first, t, index;
};

// Called first by all threads. One thread reads the row that state points at, because all blocks need the same few bytes.
// Returns whether the step is possible. It is not if the index is outside the table, or if the row requires an x0_last that
// is absent.
__device__ __forceinline__ bool arrive(const DdpmStepArgs& args, const Point& of_host, Point& point) {
    if (args.table_on_host) {
        point = of_host;
        return true;
    }
    Point* const of_block = shared_memory<Point>();
    if (threadIdx.x == 0) {
        point.index = static_cast<uint32_t>(*reinterpret_cast<const volatile unsigned long long*>(args.state + 2));
        point.row = {};
        if (point.index < args.table_rows) {
            const float* r = args.rows + 9 * point.index;
            point.row = {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
            point.t = args.timesteps[point.index];
        }
        point.seed = static_cast<uint64_t>(args.state[0]);
        point.first = args.state[1];
        *of_block = point;
    }
    __syncthreads();
    point = *of_block;
    return point.index < args.table_rows && (point.row.c2 == 0.0f || args.x0_last);
}

// Called last by all threads. bad: an element of o that this thread read was not finite, or the step is not possible.
__device__ __forceinline__ void leave(const DdpmStepArgs& args, const Point& point, bool bad) {
    if (args.table_on_host) return;
    if (bad)
        atomicCAS(reinterpret_cast<unsigned long long*>(args.state + 3), ~0ull,
                  static_cast<unsigned long long>(point.index));
    if (threadIdx.x == 0) {
        auto* counter = reinterpret_cast<unsigned long long*>(args.state + 2);
        const unsigned long long before = atomicAdd(counter, 1ull << 32);
        if (before >> 32 == gridDim.x - 1) atomicExch(counter, static_cast<unsigned long long>(point.index) + 1);
    }
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
    if (!arrive(args, of_host, point)) return leave(args, point, true);
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
            const auto place = [&](bool channels_last, int64_t channels) {
                return i * channels * args.pixels + (channels_last ? p * channels + c : c * args.pixels + p);
            };
            const int64_t at = place(args.x_channels_last, args.channels),
                          o_at = place(args.o_channels_last, args.o_channels);
            Element v{};
            v.x = args.x[at];
            if (reads_o) v.o = load_any(args.o, args.o_dtype, o_at);
            if (learned)
                v.v = load_any(args.o, args.o_dtype, o_at + args.channels * (args.o_channels_last ? 1 : args.pixels));
            if (row.c2 != 0.0f) v.x0_last = args.x0_last[at];
            v.z = args.noise ? args.noise[at] : z[k];
            bad |= !finite(v.o) || !finite(v.v);
            float x0;
            const float x_prev = step(row, args.clip, args.clip_bound, learned, v, x0);
            args.x_prev[at] = x_prev;
            if (args.x0) args.x0[at] = x0;
            if (args.next_input)
                store_any(args.next_input, args.next_dtype, place(args.next_channels_last, args.channels), x_prev);
        }
    }
    leave(args, point, bad);
}

// ---- C channels, pixels in fours ----

// 4 adjacent pixels of C channels, [C][4], as C vectors of 4 elements. In a contiguous tensor each vector belongs to one
// channel; in a channels_last tensor the vectors follow each other in memory.
template <int C>
struct Tile {
    float v[C][4];

    static __device__ __forceinline__ int64_t at(bool channels_last, int64_t i, int64_t p, int64_t pixels, int k) {
        return i * C * pixels + (channels_last ? p * C + 4 * k : k * pixels + p);
    }

    // Loading has two steps, first the words and then their values, so that the loads of several tiles overlap.
    struct Words {
        uint4 of[C];
    };
    static __device__ __forceinline__ Words fetch(const void* from, Dtype dtype, bool channels_last, int64_t i,
                                                  int64_t p, int64_t pixels) {
        Words words;
        if (dtype == Dtype::float32) {
#pragma unroll
            for (int k = 0; k < C; ++k)
                words.of[k] = *reinterpret_cast<const uint4*>(static_cast<const float*>(from) +
                                                              at(channels_last, i, p, pixels, k));
        } else {
#pragma unroll
            for (int k = 0; k < C; ++k) {
                const auto* half = static_cast<const uint16_t*>(from) + at(channels_last, i, p, pixels, k);
                const uint2 pair = *reinterpret_cast<const uint2*>(half);
                words.of[k].x = pair.x, words.of[k].y = pair.y;
            }
        }
        return words;
    }
    template <class T>
    static __device__ __forceinline__ void unpack(const Words& words, float (&flat)[4 * C]) {
#pragma unroll
        for (int k = 0; k < C; ++k) {
            Pack<T, 4> pack;
            pack.words[0] = words.of[k].x, pack.words[1] = words.of[k].y;
            if constexpr (sizeof(T) == 4) pack.words[2] = words.of[k].z, pack.words[3] = words.of[k].w;
#pragma unroll
            for (int j = 0; j < 4; ++j) flat[4 * k + j] = pack.get(j);
        }
    }
    __device__ __forceinline__ void take(const Words& words, Dtype dtype, bool channels_last) {
        float flat[4 * C];
        if (dtype == Dtype::float32)
            unpack<float>(words, flat);
        else if (dtype == Dtype::bfloat16)
            unpack<__nv_bfloat16>(words, flat);
        else
            unpack<__half>(words, flat);
#pragma unroll
        for (int e = 0; e < 4 * C; ++e) v[e / 4][e % 4] = channels_last ? flat[e % 4 * C + e / 4] : flat[e];
    }
    __device__ __forceinline__ void load(const float* from, bool channels_last, int64_t i, int64_t p, int64_t pixels) {
        take(fetch(from, Dtype::float32, channels_last, i, p, pixels), Dtype::float32, channels_last);
    }
    template <class T>
    __device__ __forceinline__ void store_as(void* to, bool channels_last, int64_t i, int64_t p, int64_t pixels) const {
        Pack<T, 4> packs[C];
        if (channels_last) {
#pragma unroll
            for (int f = 0; f < 4 * C; f += 2) packs[f / 4].put(f % 4, v[f % C][f / C], v[(f + 1) % C][(f + 1) / C]);
        } else {
#pragma unroll
            for (int f = 0; f < 4 * C; f += 2) packs[f / 4].put(f % 4, v[f / 4][f % 4], v[f / 4][f % 4 + 1]);
        }
#pragma unroll
        for (int k = 0; k < C; ++k) packs[k].store(static_cast<T*>(to) + at(channels_last, i, p, pixels, k));
    }
    __device__ __forceinline__ void store(void* to, Dtype dtype, bool channels_last, int64_t i, int64_t p,
                                          int64_t pixels) const {
        if (dtype == Dtype::float32)
            store_as<float>(to, channels_last, i, p, pixels);
        else if (dtype == Dtype::bfloat16)
            store_as<__nv_bfloat16>(to, channels_last, i, p, pixels);
        else
            store_as<__half>(to, channels_last, i, p, pixels);
    }
};

template <int C>
__global__ void __launch_bounds__(kThreads, C == 4 ? 3 : 4) ddpm_step_tile_kernel(DdpmStepArgs args, Point of_host) {
    const int64_t tiles = args.pixels / 4, total = args.samples * tiles, stride = int64_t{gridDim.x} * kThreads;
    const bool small = total <= INT32_MAX;  // 64-bit divisions are slow
    int64_t item = int64_t{blockIdx.x} * kThreads + threadIdx.x, i = 0, p = 0;
    typename Tile<C>::Words x_words, o_words;
    const auto begin = [&] {
        i = small ? int64_t(uint32_t(item) / uint32_t(tiles)) : item / tiles;
        p = 4 * (item - i * tiles);
        x_words = Tile<C>::fetch(args.x, Dtype::float32, args.x_channels_last, i, p, args.pixels);
        o_words = Tile<C>::fetch(args.o, args.o_dtype, args.o_channels_last, i, p, args.pixels);
    };
    if (item < total) begin();
    Point point;
    if (!arrive(args, of_host, point)) return leave(args, point, true);
    const Row& row = point.row;
    const bool reads_o = row.b != 0.0f || row.d != 0.0f;
    bool bad = false;
    while (item < total) {
        Tile<C> x, o, last, z, x0;
        x.take(x_words, Dtype::float32, args.x_channels_last);
        o.take(o_words, args.o_dtype, args.o_channels_last);
        if (row.c2 != 0.0f) last.load(args.x0_last, args.x_channels_last, i, p, args.pixels);
        if (row.sigma != 0.0f) {
            if (args.noise) {
                z.load(args.noise, args.x_channels_last, i, p, args.pixels);
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
        x.store(args.x_prev, Dtype::float32, args.x_channels_last, i, p, args.pixels);
        if (args.x0) x0.store(args.x0, Dtype::float32, args.x_channels_last, i, p, args.pixels);
        if (args.next_input) x.store(args.next_input, args.next_dtype, args.next_channels_last, i, p, args.pixels);
        item += stride;
        if (item < total) begin();
    }
    leave(args, point, bad);
}

bool in_fours(const void* p, Dtype dtype) { return aligned(p, 4 * size_of(dtype)); }

// A kernel, and the number of its blocks that are resident on a multiprocessor at once.
struct Choice {
    void (*kernel)(DdpmStepArgs, Point);
    int blocks;
};
constexpr Choice kElements{ddpm_step_kernel, 8};
constexpr Choice kTiles[] = {
    {ddpm_step_tile_kernel<1>, 7}, {ddpm_step_tile_kernel<3>, 4}, {ddpm_step_tile_kernel<4>, 3}};

Choice choose(const DdpmStepArgs& args) {
    const bool tiles = args.pixels % 4 == 0 && args.o_channels == args.channels && in_fours(args.o, args.o_dtype) &&
                       in_fours(args.next_input, args.next_dtype) && aligned(args.x, 16) && aligned(args.x_prev, 16) &&
                       aligned(args.x0, 16) && aligned(args.x0_last, 16) && aligned(args.noise, 16);
    if (tiles && args.channels == 1) return kTiles[0];
    if (tiles && args.channels == 3) return kTiles[1];
    if (tiles && args.channels == 4) return kTiles[2];
    return kElements;
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
    const Choice chosen = choose(args);
    const int64_t work =
        args.samples * (chosen.kernel == kElements.kernel ? ceil_div(args.channels * args.pixels, 4) : args.pixels / 4);
    const int64_t most = chosen.blocks * device_attribute(cudaDevAttrMultiProcessorCount, place.device);
    const int64_t blocks = ceil_div(work, kThreads) < most ? ceil_div(work, kThreads) : most;
    // A step without elements also advances the state.
    launch(chosen.kernel, blocks ? blocks : 1, kThreads, 1, sizeof(Point), place.stream, args, of_host);
}

void load_ddpm_step() {
    load_kernel(kElements.kernel);
    for (const Choice& choice : kTiles) load_kernel(choice.kernel);
}

}  // namespace fastddpm
