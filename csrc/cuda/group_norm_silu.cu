// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or identity.
//
// Layout and work: group_norm_silu.cuh. A block loads its part once, into registers. All three passes run on the registers:
// the mean, the squared deviations from it, and the result. So the variance is computed in two passes with one memory read.
//
// Per channel, hi + lo = add - first element of the group - mean, computed in float64 and split. So an element costs one add
// and one FMA: t = x + hi, z = t * a + b with a = rstd * weight * (1 + scale) and b = lo * a + bias * (1 + scale) + shift. The
// rounding of t is relative to its own size. So a large mean or add costs no accuracy, and a constant group gives the bias.
// Means and squared deviations of parts are merged by Chan's formula.
//
// Bytes: x is read once, y is written once. In two stages x is read twice, the second time from the L2 if it holds a sample.
#include "group_norm_silu.cuh"

namespace fastddpm {
namespace {

// The column kernels use 80 registers per thread, of which 32 hold data: 96 KB of data per multiprocessor.
constexpr Limits kLimits{384, 2, 8};

struct Forward {
    void* y;
    float eps;
    float *mean, *rstd;  // [samples, groups]
};

struct Moments {
    float count, mean, m2;  // m2: sum of squared deviations from the mean
};

// Chan's formula. An empty operand has no effect.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    if (count == 0.0f) return a;
    const float d = b.mean - a.mean, share = b.count / count;
    return {count, fmaf(d, share, a.mean), a.m2 + fmaf(d * d, a.count * share, b.m2)};
}

// Lane 0 gets the moments of the first `lanes` lanes, merged in a fixed order. The other lanes hold empty moments.
__device__ __forceinline__ Moments warp_merge(Moments m, int lanes) {
#pragma unroll 1  // one division each; this keeps the code short, and there are usually few lanes
    for (int d = 16; d; d /= 2) {
        if (d >= lanes) continue;
        m = merge(m, {__shfl_down_sync(0xffffffffu, m.count, d), __shfl_down_sync(0xffffffffu, m.mean, d),
                      __shfl_down_sync(0xffffffffu, m.m2, d)});
    }
    return m;
}

// The numbers of a channel; see above. During the statistics b is lo, and a is not used.
struct Numbers {
    float hi, a, b;
};

// The numbers of the slice's channels and groups, in shared memory, or in the workspace if there are too many channels.
struct Table {
    double* offset;  // add - first element of the group
    float *hi, *a, *b;
    // weight * (1 + scale), bias * (1 + scale) + shift. They are read from memory while x is being loaded.
    float *gain, *beta;
    float *part_mean, *part_m2;  // of this block's part; the other blocks of the cluster read them
    float *mean, *rstd;
    float* sums;  // the threads' partial sums

    static constexpr int kChannelFloats = 7;  // offset counts twice
    // Workspace floats of a block with too many channels for shared memory. Even, because a double comes first.
    static __host__ __device__ int64_t elsewhere(int channels) {
        return (int64_t{kChannelFloats} * channels + 1) / 2 * 2;
    }

    static size_t bytes(int channels, int groups, int64_t sums) {
        return (kChannelFloats * channels + 4 * groups + sums) * sizeof(float);
    }
    // elsewhere: memory for the channels' numbers; null if they are in shared memory, too.
    __device__ Table(int channels, int groups, float* elsewhere) {
        offset = elsewhere ? reinterpret_cast<double*>(elsewhere) : shared_memory<double>();
        hi = reinterpret_cast<float*>(offset + channels), a = hi + channels, b = a + channels;
        gain = b + channels, beta = gain + channels;
        part_mean = elsewhere ? shared_memory<float>() : beta + channels;
        part_m2 = part_mean + groups, mean = part_m2 + groups, rstd = mean + groups, sums = rstd + groups;
    }
};

enum Pass { kMean, kDeviation, kResult };

// Computes the channels' numbers, one pass after the other.
template <class T>
struct Channels {
    const Norm& k;
    const Part& at;
    const Table& table;

    // For channel c of the slice: hi + lo = offset - mean. The mean is 0, the part's, or the group's.
    template <Pass kPass>
    __device__ __forceinline__ void compute(int c) const {
        const int channel = at.first_channel + c, g = c / k.width;
        if (kPass == kMean) {
            const Operands of = operands_of<T>(k, at.sample, channel);
            table.offset[c] = of.offset;
            table.gain[c] = static_cast<float>(of.gain);
            table.beta[c] = static_cast<float>(of.beta);
        }
        const double mean = kPass == kMean ? 0.0 : kPass == kDeviation ? table.part_mean[g] : table.mean[g];
        const double centred = table.offset[c] - mean;
        const float hi = static_cast<float>(centred);
        const double lo = centred - hi;
        table.hi[c] = hi;
        table.b[c] = static_cast<float>(lo);
        if (kPass == kResult) {
            table.a[c] = table.rstd[g] * table.gain[c];
            table.b[c] = static_cast<float>(lo * table.a[c] + table.beta[c]);
        }
    }
    template <Pass kPass>
    __device__ __forceinline__ void tabulate() const {
        for (int c = threadIdx.x; c < at.channels; c += blockDim.x) compute<kPass>(c);
        __syncthreads();
    }
    __device__ __forceinline__ Numbers operator()(int c) const { return {table.hi[c], table.a[c], table.b[c]}; }
};

// Returns to lane 0 the moments of group g of a slice in parts, from the other blocks of the cluster or from `parts`, which the
// first stage stored.
__device__ __forceinline__ Moments merged(const Norm& k, const Table& table, const float* parts, int g, float unit) {
    Moments m{};
    for (int p = threadIdx.x % 32; p < k.parts; p += 32) {
        Moments of_part;
        of_part.count = static_cast<float>(Part::size_before(k, p + 1) - Part::size_before(k, p)) * unit;
        if (k.stage == kRest) {
            of_part.mean = parts[2 * p * k.slice_groups + g];
            of_part.m2 = parts[(2 * p + 1) * k.slice_groups + g];
        } else {
            of_part.mean = *peer_shared(table.part_mean + g, p);
            of_part.m2 = *peer_shared(table.part_m2 + g, p);
        }
        m = merge(m, of_part);
    }
    return warp_merge(m, k.parts);
}

// kRun: the number of channels that a thread sums together, a divisor of the group's width and of V.
template <class T, int V, int N, int kRun, bool kColumns>
__global__ void __launch_bounds__(kLimits.threads, kColumns ? 2 : 1) group_norm_silu_kernel(Norm k, Forward f) {
    using Of = Numbers[V > 1 ? 2 : 1];
    constexpr int kPieces = kColumns ? V / kRun : 1, kStep = V > 1 ? 2 : 1;
    const Part at(k);
    const Slots<V, N, kColumns> slots(k, at);
    Pack<T, V> data[N] = {};
    slots.template load<T>(k.x, data);

    float* elsewhere = nullptr;
    if (!kColumns && k.width > kTabledChannels)
        elsewhere = k.workspace + k.stage_floats + Table::elsewhere(k.width) * blockIdx.x;
    const Table table(k.slice_groups * k.width, k.slice_groups, elsewhere);
    const Channels<T> channels{k, at, table};
    const int thread = threadIdx.x, threads = blockDim.x;
    const float unit = kColumns ? static_cast<float>(k.width) : V;  // elements of a group in each of the k.total units
    channels.template tabulate<kMean>();
    if (k.stage != kRest) {
        const float count = static_cast<float>(at.end - at.begin) * unit;
        float pieces[kPieces] = {};
        slots.template each<false>(channels, [&](int j, int v, const Of& n) {
#pragma unroll
            for (int u = 0; u < kStep; ++u) {
                const float t = data[j].get(v + u) + n[u].hi;
                pieces[kColumns ? (v + u) / kRun : 0] += kColumns ? t : t + n[u].b;
            }
        });
        slots.sum_groups(pieces, table.sums, at.groups, [&](int g, float sum) {
            float mean = count > 0.0f ? sum / count : 0.0f;
            // Columns: the part has the same number of elements of each channel, so lo can be added here. Without `add` an
            // offset has x's dtype, and lo is 0.
            if (kColumns && k.add.data) {
                float lo = 0.0f;
                for (int c = thread % 32; c < k.width; c += 32) lo += table.b[g * k.width + c];
                mean += warp_sum(lo) / k.width;
            }
            if (thread % 32 == 0) table.part_mean[g] = mean;
        });
        channels.template tabulate<kDeviation>();
#pragma unroll
        for (int s = 0; s < kPieces; ++s) pieces[s] = 0.0f;
        slots.template each<false>(channels, [&](int j, int v, const Of& n) {
#pragma unroll
            for (int u = 0; u < kStep; ++u) {
                const float t = (data[j].get(v + u) + n[u].hi) + n[u].b;
                float& piece = pieces[kColumns ? (v + u) / kRun : 0];
                piece = fmaf(t, t, piece);
            }
        });
        slots.sum_groups(pieces, table.sums, at.groups, [&](int g, float sum) {
            if (thread % 32 == 0) table.part_m2[g] = sum;
        });
    }

    float* parts = k.workspace + int64_t{2} * (at.index - at.part) * k.slice_groups;  // [parts, mean and m2, groups]
    if (k.stage == kSums) {
        for (int g = thread; g < at.groups; g += threads) {
            parts[(2 * at.part) * k.slice_groups + g] = table.part_mean[g];
            parts[(2 * at.part + 1) * k.slice_groups + g] = table.part_m2[g];
        }
        return;
    }
    const bool clustered = k.stage == kWhole && k.parts > 1;
    if (clustered) {
        cluster_arrive();
        cluster_wait();
    }
    for (int g = thread / 32; g < at.groups; g += threads / 32) {
        Moments m{static_cast<float>(k.total) * unit, 0.0f, 0.0f};
        if (k.parts == 1) {
            m.mean = table.part_mean[g], m.m2 = table.part_m2[g];
        } else {
            m = merged(k, table, parts, g, unit);
        }
        if (thread % 32 == 0) {
            table.mean[g] = m.mean;
            table.rstd[g] = 1.0f / sqrtf(m.m2 / m.count + f.eps);
            if (at.part == 0) {
                const int64_t out = at.sample * k.groups + at.first_group + g;
                f.mean[out] = table.mean[g];
                f.rstd[out] = table.rstd[g];
            }
        }
    }
    __syncthreads();
    if (clustered) cluster_arrive_relaxed();  // this block has read its peers' sums

    channels.template tabulate<kResult>();
    slots.template each<true>(channels, [&](int j, int v, const Of& n) {
        float out[kStep];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
            const float z = fmaf(data[j].get(v + u) + n[u].hi, n[u].a, n[u].b);
            out[u] = k.silu ? silu(z) : z;
        }
        put_lanes(data[j], v, out);
    });
    slots.template store<T>(f.y, data);
    if (clustered) cluster_wait();  // else a block could exit while another reads its shared memory
}

using Kernel = void (*)(Norm, Forward);

template <class T, int V>
Kernel kernel_for(const Split& s, int64_t width) {
    if (!s.columns)
        return s.slots == kLimits.few ? group_norm_silu_kernel<T, V, kLimits.few, 1, false>
                                      : group_norm_silu_kernel<T, V, kLimits.many, 1, false>;
    if constexpr (V > 1) {
        if (width % 4 == 0)
            return s.slots == kLimits.few ? group_norm_silu_kernel<T, V, kLimits.few, 4, true>
                                          : group_norm_silu_kernel<T, V, kLimits.many, 4, true>;
        return s.slots == kLimits.few ? group_norm_silu_kernel<T, V, kLimits.few, 1, true>
                                      : group_norm_silu_kernel<T, V, kLimits.many, 1, true>;
    }
    return nullptr;
}

Kernel kernel_for(const Split& s, Dtype dtype, int64_t width) {
    if (dtype == Dtype::float32) return s.vectors ? kernel_for<float, 4>(s, width) : kernel_for<float, 1>(s, width);
    if (dtype == Dtype::bfloat16)
        return s.vectors ? kernel_for<__nv_bfloat16, 8>(s, width) : kernel_for<__nv_bfloat16, 1>(s, width);
    return s.vectors ? kernel_for<__half, 8>(s, width) : kernel_for<__half, 1>(s, width);
}

Split split_of(const GroupNormSiluArgs& args, bool pointers_aligned, int device) {
    return split(args, pointers_aligned, kLimits,
                 device_facts(device, group_norm_silu_kernel<float, 4, kLimits.many, 1, false>, kLimits.threads));
}

// Means and squared deviations. Their number is even, because a double may follow.
int64_t stage_floats(const Split& s) { return s.two_stage ? 2 * s.blocks(s.batch) * s.slice_groups : 0; }

}  // namespace

int64_t group_norm_silu_workspace(const GroupNormSiluArgs& args, int device) {
    DeviceScope scope(device);
    int64_t floats = 0;
    for (bool pointers_aligned : {false, true}) {
        const Split s = split_of(args, pointers_aligned, device);
        const int64_t width = args.channels / args.groups;
        int64_t these = stage_floats(s);
        if (!s.columns && width > kTabledChannels)
            these += Table::elsewhere(static_cast<int>(width)) * s.blocks(s.batch);
        if (these > floats) floats = these;
    }
    return floats;
}

void group_norm_silu_cuda(const GroupNormSiluArgs& args, CudaPlace place) {
    if (!args.samples || !args.channels || !args.pixels) return;
    DeviceScope scope(place.device);
    const Split s = split_of(args, aligned(args.x, 16) && aligned(args.y, 16), place.device);
    const Norm k = norm_of(args, s, stage_floats(s));
    const int pieces = !s.columns ? 1 : k.width % 4 == 0 ? s.lanes(args.dtype) / 4 : s.lanes(args.dtype);
    const int tabled = !s.columns && k.width > kTabledChannels ? 0 : s.slice_groups * k.width;
    launch_batches(kernel_for(s, args.dtype, k.width), k, s,
                   Table::bytes(tabled, s.slice_groups, int64_t{pieces} * s.threads), args.samples,
                   Forward{args.y, args.eps, args.mean, args.rstd}, place);
}

void load_group_norm_silu() {
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        for (int64_t width : {1, 4}) {
            for (int slots : {kLimits.few, kLimits.many}) {
                for (bool vectors : {false, true}) {
                    Split s{};
                    s.slots = slots, s.vectors = vectors;
                    load_kernel(kernel_for(s, dtype, width));
                    s.columns = vectors;
                    load_kernel(kernel_for(s, dtype, width));
                }
            }
        }
    }
}

}  // namespace fastddpm
