// Shared by the forward and the backward of group_norm_silu: the split of the work among blocks and threads, the per-channel
// numbers, and sums over a group.
//
// A slice is a set of whole groups of one sample. A block processes a part of a slice, all of its pixels or some of them. There
// are two mappings:
//   columns  channels_last: a slice is several adjacent groups, at least 32 bytes of each pixel, so that memory sectors are
//            used completely. A thread has one vector of channels and iterates over the pixels.
//   flat     all other cases, mainly contiguous tensors: a slice is one group, and its elements are distributed cyclically.
// The parts of a slice are the blocks of a cluster and read each other's sums in shared memory. Without clusters, or if a slice
// is too large for one, the blocks store their sums in a workspace (stage kSums). A second launch (kRest) reads the sums, and
// the elements again. It processes so few samples at a time that the L2 still holds them. Sums are merged in a fixed order and
// nothing is atomic, so reruns are bit-identical.
#pragma once

#include "device.cuh"

namespace fastddpm {
namespace {

constexpr int kTabledChannels = 1536;  // flat: the number of channels whose numbers fit into shared memory
constexpr int kColumnChannels = 384;   // the same for columns, backward

enum Stage { kWhole, kSums, kRest };

// The operands of both directions, and the split. `channels_last` determines the strides.
struct Norm {
    const void* x;
    ChannelVector weight, bias, add, scale, shift;
    int64_t first_sample;
    int channels, groups, width;  // width: channels of a group
    int64_t pixels;
    bool channels_last, silu;

    int slice_groups, slices, parts;
    uint32_t total, part_size;  // size of a slice and of a part, in pixels (columns) or vectors (flat)
    int columns, rows;          // vectors per pixel of a slice (flat: 1); threads per column
    Stage stage;
    float* workspace;  // begins with the `stage_floats` floats that the first stage passes to the second
    int64_t stage_floats;
};

// ---- sums ----

template <class V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
    for (int x = 16; x; x /= 2) v += __shfl_xor_sync(0xffffffffu, v, x);
    return v;
}

// Calls f(i, sum of values[i * stride .. i * stride + run)) for i < count. One warp computes each sum; all its lanes call f.
template <class F>
__device__ __forceinline__ void sum_runs(const float* values, int count, int run, int stride, const F& f) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
        float sum = 0.0f;
        for (int k = lane; k < run; k += 32) sum += values[i * stride + k];
        f(i, warp_sum(sum));
    }
}

// ---- the split, on the device ----

// The position of a block's work.
struct Part {
    int64_t sample;
    int64_t index;  // index of the block in this launch, in memory order
    int part;
    int first_group, groups;  // of the slice
    int first_channel, channels;
    uint32_t begin, end;

    __device__ explicit Part(const Norm& k) {
        // The second stage runs backwards, starting with the data that the first stage read last.
        const unsigned i = k.stage == kRest ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        const unsigned whole = i / unsigned(k.parts), row = whole / unsigned(k.slices);
        index = i;
        part = static_cast<int>(i - whole * k.parts);
        sample = k.first_sample + row;
        first_group = static_cast<int>(whole - row * k.slices) * k.slice_groups;
        groups = k.groups - first_group < k.slice_groups ? k.groups - first_group : k.slice_groups;
        first_channel = first_group * k.width;
        channels = groups * k.width;
        begin = size_before(k, part);
        end = size_before(k, part + 1);
    }
    // The number of pixels or vectors in the parts before this one.
    static __device__ uint32_t size_before(const Norm& k, int part) {
        const uint64_t size = uint64_t{k.part_size} * part;
        return size < k.total ? static_cast<uint32_t>(size) : k.total;
    }
};

// The positions and channels (relative to the slice's first) of up to N vectors of V elements per thread.
template <int V, int N, bool kColumns>
struct Slots {
    static constexpr int kStep = V > 1 ? 2 : 1;  // lanes processed together, as the conversions require
    int count;                                   // number of this thread's slots that hold data
    int column, row, rows;                       // columns: `rows` threads have the same column
    int width;                                   // channels of a group
    int64_t base, stride;                        // columns: offset of slot 0, and between slots
    int channel[kColumns ? 1 : N];
    bool channel_per_lane;
    uint32_t vectors, index;  // flat: vectors of a pixel (channels_last) or of a channel (contiguous); slot 0's index

    __device__ Slots(const Norm& k, const Part& at) {
        const int thread = threadIdx.x, threads = blockDim.x;
        width = k.width;
        if constexpr (kColumns) {
            column = thread % k.columns;
            row = thread / k.columns;
            rows = k.rows;
            const uint32_t first = at.begin + row;
            const bool works = row < rows && column * V < at.channels && first < at.end;
            count = works ? static_cast<int>((at.end - first + rows - 1) / rows) : 0;
            channel[0] = column * V;
            base = (at.sample * k.pixels + first) * k.channels + at.first_channel + column * V;
            stride = int64_t{rows} * k.channels;
        } else {
            column = 0, row = thread, rows = threads;
            index = at.begin + thread;
            count = index < at.end ? static_cast<int>((at.end - index + threads - 1) / threads) : 0;
            channel_per_lane = k.channels_last;
            vectors = static_cast<uint32_t>((k.channels_last ? k.width : k.pixels) / V);
            base = at.sample * k.pixels * k.channels + at.first_channel * (k.channels_last ? 1 : k.pixels);
            stride = k.channels_last ? k.channels : k.pixels;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const uint32_t i = index + j * threads, q = i / vectors;
                channel[j] = static_cast<int>(k.channels_last ? (i - q * vectors) * V : q);
            }
        }
    }
    __device__ __forceinline__ int64_t offset(int j) const {
        if constexpr (kColumns) return base + j * stride;
        const uint32_t i = index + j * blockDim.x, q = i / vectors;
        return base + q * stride + int64_t{i - q * vectors} * V;
    }
    template <class T>
    __device__ __forceinline__ void load(const void* from, Pack<T, V> (&data)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (j < count) data[j].load(static_cast<const T*>(from) + offset(j));
    }
    template <class T>
    __device__ __forceinline__ void store(void* to, const Pack<T, V> (&data)[N]) const {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (j < count) data[j].store(static_cast<T*>(to) + offset(j));
    }
    // Sums the threads' pieces by group and calls f(group, sum), with one warp per group. A piece has V / pieces adjacent
    // channels, and no group ends inside one. sums: memory for all pieces of all threads.
    template <int kPieces, class F>
    __device__ __forceinline__ void sum_groups(const float (&pieces)[kPieces], float* sums, int groups,
                                               const F& f) const {
        if (row < rows) {
#pragma unroll
            for (int s = 0; s < kPieces; ++s) sums[(column * kPieces + s) * rows + row] = pieces[s];
        }
        __syncthreads();
        const int run = kColumns ? width / (V / kPieces) * rows : rows;
        sum_runs(sums, groups, run, run, f);
        __syncthreads();
    }
    // Calls f(slot, lane, numbers) for all lanes that hold data, kStep lanes at a time, from an even lane. numbers[u] is
    // of(channel) for the lane's channel. Columns: a channel's numbers are fetched once for all slots. With kEmpty, f is also
    // called for slots that hold no data.
    template <bool kEmpty, class Of, class F>
    __device__ __forceinline__ void each(const Of& of, const F& f) const {
        if (kColumns && (kEmpty || count == N))  // the common case needs no test per slot
            each_of<true>(of, f);
        else
            each_of<false>(of, f);
    }

  private:
    template <bool kFull, class Of, class F>
    __device__ __forceinline__ void each_of(const Of& of, const F& f) const {
        using Numbers = decltype(of(0));
        if constexpr (kColumns) {
#pragma unroll
            for (int v = 0; v < V; v += kStep) {
                Numbers numbers[kStep];
#pragma unroll
                for (int u = 0; u < kStep; ++u) numbers[u] = of(channel[0] + v + u);
#pragma unroll
                for (int j = 0; j < N; ++j)
                    if (kFull || j < count) f(j, v, numbers);
            }
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (kFull || j < count) {
                    const Numbers first = of(channel[j]);
#pragma unroll
                    for (int v = 0; v < V; v += kStep) {
                        Numbers numbers[kStep];
#pragma unroll
                        for (int u = 0; u < kStep; ++u) numbers[u] = channel_per_lane ? of(channel[j] + v + u) : first;
                        f(j, v, numbers);
                    }
                }
            }
        }
    }
};

// Writes the results of kStep lanes.
template <class T, int V>
__device__ __forceinline__ void put_lanes(Pack<T, V>& pack, int v, const float (&out)[V > 1 ? 2 : 1]) {
    if constexpr (V > 1)
        pack.put(v, out[0], out[1]);
    else
        pack.put(v, out[0]);
}

// ---- numbers of a channel ----

// The bits of an element of an optional per-channel vector.
__device__ __forceinline__ uint32_t bits_of_channel(const ChannelVector& v, int64_t sample, int channel) {
    return v.data ? load_bits(v.data, v.dtype, sample * v.sample_stride + channel) : 0;
}

// The numbers of a channel that do not depend on x's statistics.
struct Operands {
    double offset;      // add less the first element of the channel's group: x + offset is x + add - first, exactly
    double gain, beta;  // weight * (1 + scale), bias * (1 + scale) + shift
};

template <class T>
__device__ __forceinline__ Operands operands_of(const Norm& k, int64_t sample, int channel) {
    const int first = channel - channel % k.width;
    const int64_t at = sample * k.pixels * k.channels + first * (k.channels_last ? 1 : k.pixels);
    const T x = static_cast<const T*>(k.x)[at];
    const uint32_t add = bits_of_channel(k.add, sample, channel), add_first = bits_of_channel(k.add, sample, first),
                   weight = bits_of_channel(k.weight, sample, channel), bias = bits_of_channel(k.bias, sample, channel),
                   scale = bits_of_channel(k.scale, sample, channel), shift = bits_of_channel(k.shift, sample, channel);
    // Zero bits are 0 in every dtype, so an absent vector adds 0.
    Operands o{-static_cast<double>(to_float(x)), 0.0, 0.0};
    o.offset += static_cast<double>(of_bits(add, k.add.dtype)) - static_cast<double>(of_bits(add_first, k.add.dtype));
    const double factor = 1.0 + of_bits(scale, k.scale.dtype);
    o.gain = of_bits(weight, k.weight.dtype) * factor;
    o.beta = of_bits(bias, k.bias.dtype) * factor + of_bits(shift, k.shift.dtype);
    return o;
}

// ---- activation ----

__device__ __forceinline__ float silu(float z) { return __fdividef(z, 1.0f + __expf(-z)); }

// d silu / dz = s + z s (1 - s), s = sigmoid(z), computed with 1 - s = e^-z s, which does not cancel.
__device__ __forceinline__ float silu_grad(float z) {
    const float e = __expf(z < -80.0f ? 80.0f : -z), s = __fdividef(1.0f, 1.0f + e);
    return s * fmaf(z, e * s, 1.0f);
}

// ---- the split, on the host ----

// The limits of a kernel.
struct Limits {
    int threads;    // in a block
    int few, many;  // slots of a thread in the kernel's two versions
};

struct Device {
    int64_t sms, l2;
    int cluster;  // maximum number of blocks in a cluster
};

// `kernel` represents all kernels with the same split.
template <class... Parameters>
Device device_facts(int index, void (*kernel)(Parameters...), int threads) {
    return {device_attribute(cudaDevAttrMultiProcessorCount, index), device_attribute(cudaDevAttrL2CacheSize, index),
            largest_cluster(index, kernel, threads)};
}

struct Split {
    bool columns, vectors;  // vectors: of 16 bytes; else single elements
    int slots, threads, slice_groups, slices, parts, slice_columns;
    uint32_t total, part_size;
    bool two_stage;
    int64_t batch;  // samples per launch

    int lanes(Dtype dtype) const { return vectors ? static_cast<int>(16 / size_of(dtype)) : 1; }
    int64_t blocks(int64_t samples) const { return samples * slices * parts; }
    int threads_for(int64_t size, int slots) const {
        return static_cast<int>(round_up(ceil_div(size, slots) * slice_columns, 32));
    }
    void cut(int64_t into) {
        parts = static_cast<int>(into);
        part_size = static_cast<uint32_t>(ceil_div(total, into));
        threads = threads_for(part_size, slots);
    }
};

// Splits a slice of `total` pixels of `columns` vectors.
inline void split_slice(Split& s, const Limits& limits, const Device& device, int64_t slices, int64_t total,
                        int columns) {
    const int64_t capacity = limits.threads / columns * limits.many;
    int64_t parts = 1;
    while (parts * capacity < total && parts < device.cluster) parts *= 2;
    s.two_stage = parts * capacity < total;
    if (s.two_stage) {
        parts = ceil_div(total, capacity);
    } else {  // more blocks, as long as each has work
        const int most = device.cluster < kPortableCluster ? device.cluster : kPortableCluster;
        while (parts < most && slices * parts < device.sms && ceil_div(total, 2 * parts) * columns >= 256) parts *= 2;
    }
    const int64_t size = ceil_div(total, parts);
    s.total = static_cast<uint32_t>(total);
    s.slice_columns = columns;
    // Few slots if the whole grid is resident at once, because the time is then that of one block. Otherwise many slots, to
    // amortize the work at the start of each thread.
    const bool few = size <= limits.threads / columns * limits.few &&
                     slices * parts * s.threads_for(size, limits.few) <= device.sms * 2 * limits.threads;
    s.slots = few ? limits.few : limits.many;
    s.cut(parts);
    if (s.threads > limits.threads)
        throw std::logic_error("group_norm_silu: a block of " + std::to_string(s.threads) + " threads");
}

// Samples per launch. With two stages they are so few that the second finds the first one's data in the L2.
template <class Args>
void limit_batch(Split& s, const Args& args, const Device& device) {
    s.batch = INT32_MAX / s.blocks(1);
    const int64_t cached = 2 * device.l2 / 5 / (args.channels * args.pixels * size_of(args.dtype));
    if (s.two_stage && s.batch > cached) s.batch = cached;
    if (s.batch > args.samples) s.batch = args.samples;
    if (s.batch < 1) s.batch = 1;
}

// Two stages: if the last wave of blocks would leave much of the device idle, up to 50 % more parts. Only a few numbers are
// tried, because a call may have many parts, and host time is limited.
inline void fill_waves(Split& s, const Limits& limits, const Device& device) {
    const auto busiest = [&](const Split& t) {  // pixels or vectors per multiprocessor
        const int64_t resident = (t.columns ? 2 : 1) * limits.threads / t.threads;  // as in __launch_bounds__
        return ceil_div(t.blocks(t.batch), device.sms * resident) * resident * t.part_size;
    };
    const int64_t least = s.parts;
    Split best = s;
    for (int64_t parts = least; parts <= 3 * least / 2; parts += ceil_div(least, 32)) {
        Split t = s;
        t.cut(parts);
        if (busiest(t) < busiest(best)) best = t;
    }
    s = best;
}

// pointers_aligned: whether x and all tensors of its layout are aligned to 16 bytes.
template <class Args>
Split split(const Args& args, bool pointers_aligned, const Limits& limits, const Device& device) {
    const int64_t element = size_of(args.dtype), width = args.channels / args.groups, lanes = 16 / element;
    if (args.channels > INT32_MAX || args.pixels > INT32_MAX || width * args.pixels > UINT32_MAX - 1024)
        throw std::runtime_error("group_norm_silu: more than 2^31 channels or pixels, or 2^32 elements in a group");
    Split s{};
    // With a size of 0 there is nothing to split, and the sizes must not be divisors. One stage needs no workspace.
    if (!args.samples || !args.channels || !args.pixels) {
        s.columns = true;
        return s;
    }
    s.vectors = pointers_aligned && (args.channels_last ? args.channels : args.pixels) % lanes == 0;

    // The number of groups in the narrowest slice of whole vectors, and of whole sectors if a pixel has whole sectors.
    const int64_t grain = args.channels * element % 32 ? 16 : 32;
    int64_t narrow = 1;
    while (s.vectors && args.channels_last && narrow * width * element % grain) ++narrow;
    s.columns = s.vectors && args.channels_last && narrow * width <= kColumnChannels;
    if (s.columns) {
        const auto with_groups = [&](int64_t groups) {
            Split t = s;
            t.slice_groups = static_cast<int>(groups);
            t.slices = static_cast<int>(ceil_div(args.groups, groups));
            split_slice(t, limits, device, args.samples * t.slices, args.pixels,
                        static_cast<int>(groups * width / lanes));
            return t;
        };
        // Wider slices: 64 bytes, or, with many blocks and small images, wide enough to give each block work.
        int64_t wide = narrow;
        const auto small = [&] {
            return args.pixels * wide * width < 256 * lanes &&
                   args.samples * ceil_div(args.groups, 2 * wide) >= 4 * device.sms;
        };
        while ((wide * width * element < 64 || small()) && 2 * wide <= args.groups &&
               2 * wide * width <= kColumnChannels)
            wide *= 2;
        const Split narrowest = with_groups(narrow);
        s = with_groups(wide);
        // Narrower slices if that makes the data fit on the chip, or keeps the whole device busy.
        if (s.two_stage != narrowest.two_stage || (!s.two_stage && s.blocks(args.samples) < 2 * device.sms))
            s = narrowest;
    } else {
        if (args.channels_last && width % lanes) s.vectors = false;
        s.slice_groups = 1;
        s.slices = static_cast<int>(args.groups);
        split_slice(s, limits, device, args.samples * args.groups, width * args.pixels / s.lanes(args.dtype), 1);
    }
    limit_batch(s, args, device);
    if (s.two_stage) fill_waves(s, limits, device);
    return s;
}

// The kernels' view of a call, without the batch and the stage.
template <class Args>
Norm norm_of(const Args& args, const Split& s, int64_t stage_floats) {
    Norm k{};
    k.x = args.x;
    k.weight = args.weight;
    k.bias = args.bias;
    k.add = args.add;
    k.scale = args.scale;
    k.shift = args.shift;
    k.channels = static_cast<int>(args.channels);
    k.groups = static_cast<int>(args.groups);
    k.width = static_cast<int>(args.channels / args.groups);
    k.pixels = args.pixels;
    k.channels_last = args.channels_last;
    k.silu = args.silu;
    k.slice_groups = s.slice_groups;
    k.slices = s.slices;
    k.parts = s.parts;
    k.total = s.total;
    k.part_size = s.part_size;
    k.columns = s.slice_columns;
    k.rows = s.threads / s.slice_columns;
    k.workspace = args.workspace;
    k.stage_floats = stage_floats;
    return k;
}

// Launches kernel(k, more) for all samples, one batch at a time, in one or two stages.
template <class More>
void launch_batches(void (*kernel)(Norm, More), Norm k, const Split& s, size_t shared, int64_t samples,
                    const More& more, CudaPlace place) {
    for (k.first_sample = 0; k.first_sample < samples; k.first_sample += s.batch) {
        const int64_t batch = samples - k.first_sample < s.batch ? samples - k.first_sample : s.batch;
        if (s.two_stage) {
            k.stage = kSums;
            launch(kernel, s.blocks(batch), s.threads, 1, shared, place.stream, k, more);
            k.stage = kRest;
            launch(kernel, s.blocks(batch), s.threads, 1, shared, place.stream, k, more);
        } else {
            k.stage = kWhole;
            launch(kernel, s.blocks(batch), s.threads, s.parts, shared, place.stream, k, more);
        }
    }
}

}  // namespace
}  // namespace fastddpm
