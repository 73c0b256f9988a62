// The gradient of y = act(z), z = xhat * gain + beta, with g = dL/dz = dy * act'(z), gain = weight * (1 + scale):
//   dx = rstd * (g * gain - mean_group(g * gain) - xhat * mean_group(g * gain * xhat))
// and the sums over pixels of g, g * xhat and dx, for the other gradients. SiLU is recomputed from x.
//
// As in the forward, t = x + hi, hi + lo = add - first element of the group - mean, and z = t * a + b, a = rstd * gain. Three
// sums per channel are sufficient: those of g, g * t and t. The third corrects the rounding of the saved mean. Then
// dx = g * a + t * k1 + k0, and its sum over pixels follows without another pass.
//
// Layout and work: group_norm_silu.cuh. Columns: a thread holds its vectors of x and dy in registers for both passes.
// Flat: a warp iterates over the pixels of one channel after the other, twice.
//
// Bytes: x and dy are read once, dx is written once. Flat, and in two stages, x and dy are read twice.
#include "group_norm_silu.cuh"

namespace fastddpm {
namespace {

constexpr Limits kLimits{256, 2, 8};  // the column kernel has 128 registers per thread, of which 64 hold data
constexpr int kFlatThreads = 128;

enum Sum { kG, kGt, kT, kSums3 };

struct Backward {
    const void* dy;
    void* dx;
    const float *mean, *rstd;            // [samples, groups]
    float *sum_g, *sum_g_xhat, *sum_dx;  // [samples, channels]
};

// The numbers of a channel.
struct Numbers {
    float hi, a, b, k1, k0;
};

// The numbers for the first pass; lo is returned for the second.
template <class T>
__device__ __forceinline__ Numbers first_numbers(const Norm& k, const Backward& f, int64_t sample, int channel,
                                                 double& lo) {
    const int64_t group = sample * k.groups + channel / k.width;
    const float mean = f.mean[group], rstd = f.rstd[group];
    const Operands of = operands_of<T>(k, sample, channel);
    const double offset = of.offset - mean;
    Numbers n{};
    n.hi = static_cast<float>(offset);
    lo = offset - n.hi;
    n.a = static_cast<float>(rstd * of.gain);
    n.b = static_cast<float>(lo * n.a + of.beta);
    return n;
}

struct Value {
    float t, g;
};

__device__ __forceinline__ Value value(const Norm& k, const Numbers& n, float x, float dy) {
    Value v{x + n.hi, dy};
    if (k.silu) v.g *= silu_grad(fmaf(v.t, n.a, n.b));
    return v;
}

__device__ __forceinline__ float gradient(const Norm& k, const Numbers& n, float x, float dy) {
    const Value v = value(k, n, x, dy);
    return fmaf(v.g, n.a, fmaf(v.t, n.k1, n.k0));
}

// The numbers that a group's channels share. One warp computes them from the channels' sums.
struct Common {
    float shift, k1, k0;  // shift: the rounding error of the saved mean
};

// For channel c in [begin, begin + k.width): sum(c, which), and a(c, lo), which also sets lo.
template <class SumOf, class AOf>
__device__ __forceinline__ Common common_of(const Norm& k, float rstd, int begin, const SumOf& sum, const AOf& a) {
    const double pixels = static_cast<double>(k.pixels), count = pixels * k.width;
    double t = 0.0, ag = 0.0, agt = 0.0;
    for (int c = begin + threadIdx.x % 32; c < begin + k.width; c += 32) {
        double lo;
        const double ac = a(c, lo), g = sum(c, kG);
        t += sum(c, kT) + pixels * lo;
        ag += ac * g;
        agt += ac * (sum(c, kGt) + lo * g);
    }
    const double shift = warp_sum(t) / count;
    ag = warp_sum(ag), agt = warp_sum(agt) - shift * ag;
    const double k1 = -static_cast<double>(rstd) * rstd * agt / count;
    return {static_cast<float>(shift), static_cast<float>(k1), static_cast<float>(-ag / count)};
}

// Computes a channel's numbers for the second pass, and stores its sums for the caller.
__device__ __forceinline__ void second_numbers(const Norm& k, const Backward& f, const Part& at, int channel,
                                               const Common& common, double lo, float g, float gt, float t,
                                               Numbers& n) {
    const double centred = lo - common.shift;
    n.k1 = common.k1;
    n.k0 = static_cast<float>(common.k0 + centred * common.k1);
    if (at.part == 0) {
        const int64_t out = at.sample * k.channels + channel;
        f.sum_g[out] = g;
        f.sum_g_xhat[out] = static_cast<float>(f.rstd[at.sample * k.groups + channel / k.width] * (gt + centred * g));
        f.sum_dx[out] = static_cast<float>(static_cast<double>(n.a) * g + static_cast<double>(n.k1) * t +
                                           static_cast<double>(k.pixels) * n.k0);
    }
}

// ---- columns ----

// Distance between rows of the threads' sums, chosen so that simultaneous stores use different banks.
__host__ __device__ inline int odd(int rows) { return rows | 1; }

// The numbers of the slice's channels and groups, in shared memory.
struct Table {
    double* lo;
    float *hi, *a, *b, *k0;
    float *part, *total;  // [3, channels]; the other blocks of the cluster read `part`
    Common* common;
    float* sums;  // the threads' partial sums

    static size_t bytes(int channels, int groups, int64_t sums) {
        return channels * (sizeof(double) + 10 * sizeof(float)) + groups * sizeof(Common) + sums * sizeof(float);
    }
    __device__ Table(int channels, int groups) {
        lo = shared_memory<double>();
        hi = reinterpret_cast<float*>(lo + channels);
        a = hi + channels, b = a + channels, k0 = b + channels;
        part = k0 + channels, total = part + kSums3 * channels;
        common = reinterpret_cast<Common*>(total + kSums3 * channels);
        sums = reinterpret_cast<float*>(common + groups);
    }
};

struct Fetch {
    const Norm& k;
    const Table& table;

    __device__ __forceinline__ Numbers operator()(int c) const {
        return {table.hi[c], table.a[c], table.b[c], table.common[c / k.width].k1, table.k0[c]};
    }
};

template <class T, int V, int N>
__global__ void __launch_bounds__(kLimits.threads, 2) group_norm_silu_backward_kernel(Norm k, Backward f) {
    using Of = Numbers[2];
    const Part at(k);
    const Slots<V, N, true> slots(k, at);
    Pack<T, V> x[N], dy[N];
    slots.template load<T>(k.x, x);
    slots.template load<T>(f.dy, dy);

    const int thread = threadIdx.x, threads = blockDim.x, channels = k.slice_groups * k.width;
    const Table table(channels, k.slice_groups);
    for (int c = thread; c < at.channels; c += threads) {
        const Numbers n = first_numbers<T>(k, f, at.sample, at.first_channel + c, table.lo[c]);
        table.hi[c] = n.hi, table.a[c] = n.a, table.b[c] = n.b;
    }
    __syncthreads();

    float* parts = k.workspace + int64_t{kSums3} * channels * (at.index - at.part);  // [parts, 3, channels]
    if (k.stage != kRest) {
        const int stride = odd(slots.rows);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int c = slots.channel[0] + v;
            float g = 0.0f, gt = 0.0f, t = 0.0f;
            if (slots.count > 0) {
                const Numbers n{table.hi[c], table.a[c], table.b[c], 0.0f, 0.0f};
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    if (j < slots.count) {
                        const Value of = value(k, n, x[j].get(v), dy[j].get(v));
                        g += of.g;
                        gt = fmaf(of.g, of.t, gt);
                        t += of.t;
                    }
                }
            }
            if (slots.row < slots.rows) {
                float* to = table.sums + c * stride + slots.row;  // [3, channels, rows]
                to[kG * channels * stride] = g;
                to[kGt * channels * stride] = gt;
                to[kT * channels * stride] = t;
            }
        }
        __syncthreads();
        float* to = k.stage == kSums ? parts + int64_t{kSums3} * channels * at.part : table.part;
        sum_runs(table.sums, kSums3 * channels, slots.rows, stride, [&](int i, float sum) {
            if (thread % 32 == 0) to[i] = sum;
        });
        if (k.stage == kSums) return;
        __syncthreads();
    }
    const bool clustered = k.stage == kWhole && k.parts > 1;
    if (clustered) {
        cluster_arrive();
        cluster_wait();
    }
    for (int i = thread; i < kSums3 * channels; i += threads) {
        float sum = 0.0f;
        for (int p = 0; p < k.parts; ++p)
            sum += k.stage == kRest ? parts[kSums3 * channels * p + i] : *peer_shared(table.part + i, p);
        table.total[i] = sum;
    }
    __syncthreads();
    if (clustered) cluster_arrive_relaxed();  // this block has read its peers' sums
    for (int g = thread / 32; g < at.groups; g += threads / 32) {
        const Common common = common_of(
            k, f.rstd[at.sample * k.groups + at.first_group + g], g * k.width,
            [&](int c, Sum which) { return table.total[which * channels + c]; },
            [&](int c, double& lo) { return lo = table.lo[c], table.a[c]; });
        if (thread % 32 == 0) table.common[g] = common;
    }
    __syncthreads();
    for (int c = thread; c < at.channels; c += threads) {
        Numbers n{};
        n.a = table.a[c];
        second_numbers(k, f, at, at.first_channel + c, table.common[c / k.width], table.lo[c], table.total[c],
                       table.total[kGt * channels + c], table.total[kT * channels + c], n);
        table.k0[c] = n.k0;
    }
    __syncthreads();
    slots.template each<false>(Fetch{k, table}, [&](int j, int v, const Of& n) {
        float out[2];
#pragma unroll
        for (int u = 0; u < 2; ++u) out[u] = gradient(k, n[u], x[j].get(v + u), dy[j].get(v + u));
        put_lanes(x[j], v, out);
    });
    slots.template store<T>(f.dx, x);
    if (clustered) cluster_wait();  // else a block could exit while another reads its shared memory
}

// ---- flat ----

// A part is a range of pixels, in vectors of V. With one stage, sums are stored in the caller's result arrays, and the results
// replace them later.
template <class T, int V>
__global__ void __launch_bounds__(kFlatThreads) group_norm_silu_backward_flat_kernel(Norm k, Backward f) {
    constexpr int kStep = V > 1 ? 2 : 1;
    const Part at(k);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = kFlatThreads / 32;
    Common* common = shared_memory<Common>();
    const int64_t base = at.sample * k.pixels * k.channels;
    const auto offset = [&](int channel, uint32_t i) {
        return base + (k.channels_last ? int64_t{i} * k.channels + channel : channel * k.pixels + int64_t{i} * V);
    };
    // Per channel: a group's [parts, 3, width], or the caller's [3 arrays][channels].
    float* parts = k.workspace + int64_t{kSums3} * k.width * (at.index - at.part);
    float* const whole[kSums3] = {f.sum_g, f.sum_g_xhat, f.sum_dx};
    const int64_t row = at.sample * k.channels + at.first_channel;
    const auto sum_of = [&](int c, int which) {
        if (k.stage != kRest) return whole[which][row + c];
        float sum = 0.0f;
        for (int p = 0; p < k.parts; ++p) sum += parts[(int64_t{kSums3} * p + which) * k.width + c];
        return sum;
    };

    if (k.stage != kRest) {
        for (int c = warp; c < k.width; c += warps) {
            double lo;
            const Numbers n = first_numbers<T>(k, f, at.sample, at.first_channel + c, lo);
            float sums[kSums3] = {};
            for (uint32_t i = at.begin + lane; i < at.end; i += 32) {
                const int64_t o = offset(at.first_channel + c, i);
                Pack<T, V> x, dy;
                x.load(static_cast<const T*>(k.x) + o);
                dy.load(static_cast<const T*>(f.dy) + o);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const Value of = value(k, n, x.get(v), dy.get(v));
                    sums[kG] += of.g;
                    sums[kGt] = fmaf(of.g, of.t, sums[kGt]);
                    sums[kT] += of.t;
                }
            }
#pragma unroll
            for (int which = 0; which < kSums3; ++which) {
                const float sum = warp_sum(sums[which]);
                if (lane == 0) {
                    if (k.stage == kSums)
                        parts[(int64_t{kSums3} * at.part + which) * k.width + c] = sum;
                    else
                        whole[which][row + c] = sum;
                }
            }
        }
        if (k.stage == kSums) return;
        __syncthreads();
    }
    if (warp == 0) {
        const Common of = common_of(
            k, f.rstd[at.sample * k.groups + at.first_group], 0, [&](int c, Sum which) { return sum_of(c, which); },
            [&](int c, double& lo) { return first_numbers<T>(k, f, at.sample, at.first_channel + c, lo).a; });
        if (lane == 0) *common = of;
    }
    __syncthreads();
    for (int c = warp; c < k.width; c += warps) {
        double lo;
        Numbers n = first_numbers<T>(k, f, at.sample, at.first_channel + c, lo);
        const float g = sum_of(c, kG), gt = sum_of(c, kGt), t = sum_of(c, kT);
        __syncwarp();  // all lanes have read the values that lane 0 overwrites
        Part writer = at;
        if (lane != 0) writer.part = -1;
        second_numbers(k, f, writer, at.first_channel + c, *common, lo, g, gt, t, n);
        for (uint32_t i = at.begin + lane; i < at.end; i += 32) {
            const int64_t o = offset(at.first_channel + c, i);
            Pack<T, V> x, dy;
            x.load(static_cast<const T*>(k.x) + o);
            dy.load(static_cast<const T*>(f.dy) + o);
#pragma unroll
            for (int v = 0; v < V; v += kStep) {
                float out[kStep];
#pragma unroll
                for (int u = 0; u < kStep; ++u) out[u] = gradient(k, n, x.get(v + u), dy.get(v + u));
                put_lanes(x, v, out);
            }
            x.store(static_cast<T*>(f.dx) + o);
        }
    }
}

// ---- host ----

using Kernel = void (*)(Norm, Backward);

template <class T, int V>
Kernel kernel_for(const Split& s) {
    if (!s.columns)
        return s.vectors ? group_norm_silu_backward_flat_kernel<T, V> : group_norm_silu_backward_flat_kernel<T, 1>;
    return s.slots == kLimits.few ? group_norm_silu_backward_kernel<T, V, kLimits.few>
                                  : group_norm_silu_backward_kernel<T, V, kLimits.many>;
}

Kernel kernel_for(const Split& s, Dtype dtype) {
    if (dtype == Dtype::float32) return kernel_for<float, 4>(s);
    if (dtype == Dtype::bfloat16) return kernel_for<__nv_bfloat16, 8>(s);
    return kernel_for<__half, 8>(s);
}

Split split_of(const GroupNormSiluBackwardArgs& args, bool pointers_aligned, int index) {
    const Device device = device_facts(index, group_norm_silu_backward_kernel<float, 4, kLimits.many>, kLimits.threads);
    Split s = split(args, pointers_aligned, kLimits, device);
    if (s.columns) return s;
    // Flat: a part is a range of pixels, with all channels of a group. There are parts only if the groups do not fill the device.
    if (args.channels_last) s.vectors = false;
    const int64_t pixels = args.pixels / s.lanes(args.dtype), groups = args.samples * args.groups;
    int64_t parts = ceil_div(4 * device.sms, groups);
    if (parts > ceil_div(pixels, 128)) parts = ceil_div(pixels, 128);
    s.threads = kFlatThreads;
    s.parts = static_cast<int>(parts);
    s.total = static_cast<uint32_t>(pixels);
    s.part_size = static_cast<uint32_t>(ceil_div(pixels, parts));
    s.two_stage = parts > 1;
    limit_batch(s, args, device);
    return s;
}

int64_t stage_floats(const GroupNormSiluBackwardArgs& args, const Split& s) {
    return s.two_stage ? kSums3 * s.blocks(s.batch) * s.slice_groups * (args.channels / args.groups) : 0;
}

}  // namespace

int64_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs& args, int device) {
    DeviceScope scope(device);
    const int64_t vectors = stage_floats(args, split_of(args, true, device));
    const int64_t elements = stage_floats(args, split_of(args, false, device));
    return vectors > elements ? vectors : elements;
}

void group_norm_silu_backward_cuda(const GroupNormSiluBackwardArgs& args, CudaPlace place) {
    if (!args.samples || !args.channels || !args.pixels) return;
    DeviceScope scope(place.device);
    const Split s = split_of(args, aligned(args.x, 16) && aligned(args.dy, 16) && aligned(args.dx, 16), place.device);
    const Norm k = norm_of(args, s, stage_floats(args, s));
    const size_t shared = s.columns ? Table::bytes(s.slice_groups * k.width, s.slice_groups,
                                                   int64_t{kSums3} * s.slice_groups * k.width * odd(k.rows))
                                    : sizeof(Common);
    launch_batches(kernel_for(s, args.dtype), k, s, shared, args.samples,
                   Backward{args.dy, args.dx, args.mean, args.rstd, args.sum_g, args.sum_g_xhat, args.sum_dx}, place);
}

void load_group_norm_silu_backward() {
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        for (bool columns : {false, true}) {
            for (bool either : {false, true}) {
                Split s{};
                s.columns = columns;
                s.vectors = either;
                s.slots = either ? kLimits.many : kLimits.few;
                load_kernel(kernel_for(s, dtype));
            }
        }
    }
}

}  // namespace fastddpm
