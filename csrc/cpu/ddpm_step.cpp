// One reverse step, with the row (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi) that state points at:
//   x0     = clamp(a*x + b*o, -clip, clip)                                          NaN is preserved
//   x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,  f = (v+1)/2
// Terms with coefficient 0 are not read. The exponential is computed only for learned variances.
//
// Layout: the arithmetic follows x's memory order. Data in another order (o or next_input of the other layout, noise drawn in
// element order for a channels_last x) is copied through a small buffer in x's order. So an element's arithmetic is the same in
// every layout, tile and lane.
//
// Work: a task is a tile of one sample, a range of channels times a range of pixels, of at most kTile elements. If every tensor
// is contiguous, a sample is treated as one channel of channels*pixels elements.
//
// Bytes: x and o are read once, x_prev (and x0, next_input) is written once. Drawn noise never leaves the cache.
#include "common/parallel.h"
#include "common/vec_random.h"
#include "kernels.h"

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int64_t kTile = 2048;  // elements; a multiple of NormalStream::kBlock
constexpr uint32_t kStream = 1;  // of the reverse step

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Row {
    float a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi;
};

// A run of elements of a tensor of any dtype.
struct Input {
    const void* data;
    Dtype dtype;

    Input at(int64_t offset) const {
        return {static_cast<const char*>(data) + offset * (dtype == Dtype::float32 ? 4 : 2), dtype};
    }
    vfloat vector(int64_t i, int count) const {
        if (dtype == Dtype::bfloat16) return load(static_cast<const bfloat16*>(data) + i, count);
        if (dtype == Dtype::float16) return load(static_cast<const float16*>(data) + i, count);
        return load(static_cast<const float*>(data) + i, count);
    }
};

struct Output {
    void* data;
    Dtype dtype;

    Output at(int64_t offset) const {
        return {static_cast<char*>(data) + offset * (dtype == Dtype::float32 ? 4 : 2), dtype};
    }
    void vector(int64_t i, vfloat v, int count) const {
        if (dtype == Dtype::bfloat16)
            store(static_cast<bfloat16*>(data) + i, v, count);
        else if (dtype == Dtype::float16)
            store(static_cast<float16*>(data) + i, v, count);
        else
            store(static_cast<float*>(data) + i, v, count);
    }
};

// Consecutive elements in x's order. Null: absent, or not read in this row.
struct Run {
    int64_t count;
    const float *x, *x0_last, *z;
    float *x_prev, *x0;
    Input o, v;
    Output next;
};

// One vector of step(). A partial vector takes the same path.
inline __attribute__((always_inline)) void step_vector(const Row& row, bool clip, float bound, const Run& run,
                                                       int64_t i, int count, vfloat& poison) {
    const vfloat zero{};
    const vfloat x = run.x ? load(run.x + i, count) : zero;
    vfloat o = zero, x0 = zero, x_prev = zero;
    if (run.o.data) {
        o = run.o.vector(i, count);
        poison = fma(o, zero, poison);  // an infinity or a NaN makes poison NaN for good
        if (row.b != 0.0f) x0 = row.b * o;
    }
    if (row.a != 0.0f) x0 = fma(splat(row.a), x, x0);
    if (clip) {
        x0 = x0 > bound ? splat(bound) : x0;
        x0 = x0 < -bound ? splat(-bound) : x0;
    }
    if (row.c1 != 0.0f) x_prev = row.c1 * x;
    if (row.c0 != 0.0f) x_prev = fma(splat(row.c0), x0, x_prev);
    if (run.x0_last) x_prev = fma(splat(row.c2), load(run.x0_last + i, count), x_prev);
    if (row.d != 0.0f) x_prev = fma(splat(row.d), o, x_prev);
    if (run.z) {
        vfloat sigma = splat(row.sigma);
        if (run.v.data) {
            const vfloat v = run.v.vector(i, count);
            poison = fma(v, zero, poison);
            const vfloat f = (v + 1.0f) * 0.5f;
            const vfloat log_variance = fma(f, splat(row.lv_hi), (1.0f - f) * row.lv_lo);
            sigma = log_variance == log_variance ? sigma * exp_clamped(log_variance * 0.5f) : log_variance;
        }
        x_prev = fma(sigma, load(run.z + i, count), x_prev);
    }
    if (run.x0) store(run.x0 + i, x0, count);
    store(run.x_prev + i, x_prev, count);
    if (run.next.data) run.next.vector(i, x_prev, count);
}

// Returns whether all of o (and v, if it is read) was finite. The arguments are copies, so that stores cannot alias them and
// they stay in registers.
bool step(Row row, bool clip, float bound, Run run) {
    vfloat poison{};
    int64_t i = 0;
    for (; i + kLanes <= run.count; i += kLanes) step_vector(row, clip, bound, run, i, kLanes, poison);
    if (i < run.count) step_vector(row, clip, bound, run, i, static_cast<int>(run.count - i), poison);
    bool finite = true;
    for (int lane = 0; lane < kLanes; ++lane) finite &= poison[lane] == poison[lane];
    return finite;
}

// A matrix [channels, pixels] in memory.
struct Strides {
    int64_t channel, pixel;
};

template <class Word>
void copy_words(const void* from, Strides f, void* to, Strides t, int64_t channels, int64_t pixels) {
    for (int64_t c = 0; c < channels; ++c) {
        const Word* source = static_cast<const Word*>(from) + c * f.channel;
        Word* target = static_cast<Word*>(to) + c * t.channel;
        for (int64_t p = 0; p < pixels; ++p) target[p * t.pixel] = source[p * f.pixel];
    }
}

void copy(Input from, Strides f, void* to, Strides t, int64_t channels, int64_t pixels) {
    if (from.dtype == Dtype::float32)
        copy_words<uint32_t>(from.data, f, to, t, channels, pixels);
    else
        copy_words<uint16_t>(from.data, f, to, t, channels, pixels);
}

// The call. Layouts that coincide (one channel or one pixel) are treated as contiguous.
struct Problem {
    const DdpmStepArgs& args;
    Row row;
    uint64_t seed;
    int64_t first, timestep;
    int64_t channels, o_channels, pixels;
    bool x_channels_last, o_channels_last, next_channels_last;
    bool reads_x, reads_o, reads_v, draws;
    int64_t tile_channels, tile_pixels;

    explicit Problem(const DdpmStepArgs& args) : args(args) {
        const int64_t index = args.state[2];
        const float* r = args.rows + 9 * index;
        row = {r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8]};
        seed = static_cast<uint64_t>(args.state[0]);
        first = args.state[1];
        timestep = args.timesteps[index];

        channels = args.channels, o_channels = args.o_channels, pixels = args.pixels;
        x_channels_last = args.x_channels_last && channels > 1 && pixels > 1;
        o_channels_last = args.o_channels_last && o_channels > 1 && pixels > 1;
        next_channels_last = args.next_input && args.next_channels_last && channels > 1 && pixels > 1;
        if (!x_channels_last && !o_channels_last && !next_channels_last) {
            pixels *= channels, o_channels /= channels, channels = 1;
        }

        reads_x = row.a != 0.0f || row.c1 != 0.0f;
        reads_o = row.b != 0.0f || row.d != 0.0f;
        reads_v = o_channels > channels && row.sigma != 0.0f && (row.lv_lo != 0.0f || row.lv_hi != 0.0f);
        draws = row.sigma != 0.0f && !args.noise;

        tile_channels = smaller(channels, kTile);
        tile_pixels = smaller(pixels, tile_channels < channels ? 1 : kTile / channels);
        if (tile_pixels < pixels && tile_pixels > NormalStream::kBlock)
            tile_pixels -= tile_pixels % NormalStream::kBlock;
    }

    Strides strides(bool channels_last, int64_t total_channels) const {
        return channels_last ? Strides{1, total_channels} : Strides{pixels, 1};
    }
};

// One tile of sample i: channels [c, c + channels) and pixels [p, p + pixels).
bool step_tile(const Problem& problem, int64_t i, int64_t c, int64_t p, int64_t channels, int64_t pixels) {
    const DdpmStepArgs& args = problem.args;
    const int64_t total = channels * pixels;
    const bool whole = pixels == problem.pixels;
    alignas(64) float o_buffer[kTile], v_buffer[kTile], next_buffer[kTile], z_buffer[kTile + 4],
        drawn_buffer[kTile + 4];

    // In the buffers a tile is [channels, pixels] in x's order.
    const Strides tile = problem.x_channels_last ? Strides{1, channels} : Strides{pixels, 1};
    const Strides x_strides = problem.strides(problem.x_channels_last, problem.channels);
    const Strides o_strides = problem.strides(problem.o_channels_last, problem.o_channels);
    const Strides next_strides = problem.strides(problem.next_channels_last, problem.channels);
    const int64_t x_offset = i * problem.channels * problem.pixels + c * x_strides.channel + p * x_strides.pixel;
    const int64_t next_offset =
        i * problem.channels * problem.pixels + c * next_strides.channel + p * next_strides.pixel;
    const int64_t o_offset = i * problem.o_channels * problem.pixels + c * o_strides.channel + p * o_strides.pixel;

    // Contiguous: one run per channel, unless the channels follow each other without a gap.
    const int64_t runs = problem.x_channels_last || whole ? 1 : channels, length = total / runs;
    // The same for drawn noise, whose order is always contiguous.
    const int64_t draws = whole ? 1 : channels, draw_length = total / draws;

    const bool o_in_place = problem.o_channels_last == problem.x_channels_last &&
                            (!problem.o_channels_last || problem.o_channels == channels);
    const Input o{args.o, args.o_dtype};
    Input o_tile{nullptr, args.o_dtype}, v_tile{nullptr, args.o_dtype};
    if (problem.reads_o) {
        o_tile = o.at(o_offset);
        if (!o_in_place) {
            copy(o_tile, o_strides, o_buffer, tile, channels, pixels);
            o_tile.data = o_buffer;
        }
    }
    if (problem.reads_v) {
        v_tile = o.at(o_offset + problem.channels * o_strides.channel);
        if (!o_in_place) {
            copy(v_tile, o_strides, v_buffer, tile, channels, pixels);
            v_tile.data = v_buffer;
        }
    }
    const bool next_in_place = problem.next_channels_last == problem.x_channels_last;
    Output next{args.next_input, args.next_dtype};
    if (next.data) next = next_in_place ? next.at(next_offset) : Output{next_buffer, args.next_dtype};

    const NormalStream normals(problem.seed, kStream, static_cast<uint32_t>(problem.timestep), problem.first + i);
    // Draws number `index` of the tile into `buffer`, which has space for 4 elements before the first.
    auto draw = [&](int64_t index, float* buffer) {
        const int64_t begin = (c + index) * problem.pixels + p, before = begin % 4;
        normals.write(begin - before, draw_length + before, buffer);
        return buffer + before;
    };
    if (problem.draws && problem.x_channels_last) {
        for (int64_t k = 0; k < draws; ++k) {
            const Input drawn{draw(k, drawn_buffer), Dtype::float32};
            copy(drawn, {pixels, 1}, z_buffer + k * tile.channel, tile, channels / draws, pixels);
        }
    }

    bool finite = true;
    for (int64_t k = 0; k < runs; ++k) {
        const int64_t x_at = x_offset + k * problem.pixels, o_at = o_in_place ? k * problem.pixels : k * length;
        Run run{};
        run.count = length;
        run.x = problem.reads_x ? args.x + x_at : nullptr;
        run.x_prev = args.x_prev + x_at;
        run.x0 = args.x0 ? args.x0 + x_at : nullptr;
        run.x0_last = problem.row.c2 != 0.0f ? args.x0_last + x_at : nullptr;
        run.o = o_tile.data ? o_tile.at(o_at) : o_tile;
        run.v = v_tile.data ? v_tile.at(o_at) : v_tile;
        run.next = next.data ? next.at(next_in_place ? k * problem.pixels : k * length) : next;
        if (problem.row.sigma != 0.0f)
            run.z = !problem.draws ? args.noise + x_at : problem.x_channels_last ? z_buffer : draw(k, z_buffer);
        finite &= step(problem.row, args.clip, args.clip_bound, run);
    }
    if (next.data && !next_in_place)
        copy({next_buffer, args.next_dtype}, tile, Output{args.next_input, args.next_dtype}.at(next_offset).data,
             next_strides, channels, pixels);
    return finite;
}

}  // namespace

void ddpm_step(const DdpmStepArgs& args) {
    const int64_t index = args.state[2];
    if (args.samples && args.channels && args.pixels) {
        const Problem problem(args);
        const int64_t across = (problem.channels + problem.tile_channels - 1) / problem.tile_channels;
        const int64_t along = (problem.pixels + problem.tile_pixels - 1) / problem.tile_pixels;
        const int64_t tile = problem.tile_channels * problem.tile_pixels + NormalStream::kBlock;
        const int64_t grain = (kParallelElements + tile - 1) / tile;
        bool bad = false;
        parallel_for(args.samples * across * along, grain, args.threads, [&](int64_t task) {
            const int64_t p = task % along * problem.tile_pixels;
            const int64_t c = task / along % across * problem.tile_channels;
            if (!step_tile(problem, task / along / across, c, p, smaller(problem.tile_channels, problem.channels - c),
                           smaller(problem.tile_pixels, problem.pixels - p)))
                __atomic_store_n(&bad, true, __ATOMIC_RELAXED);
        });
        if (bad && args.state[3] == -1) args.state[3] = index;
    }
    args.state[2] = index + 1;
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
