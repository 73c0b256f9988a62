// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or identity; and its gradient.
//
// Work: one task is one sample's channel slice, a run of whole groups; a group's arithmetic is the same in whatever
// slice it falls, so results depend neither on the thread count nor on the batch. Channels inner: vectors run over
// channels, a slice is as many groups as divide the work evenly. Channels outer: vectors run over pixels, a slice is
// one group.
//
// Bytes: x is read once and y written once; the later readings of x meet it in the cache as long as a slice fits.
//
// Statistics: sums of x + add - pivot and of its square, pivot = the group's mean so far, which starts at its first
// element and moves each time the number of pixels seen has doubled. Blocks merge as in Chan, Golub, LeVeque (1979).
// A block is never longer than what came before it, so its squares about the pivot are at most twice those about the
// mean of both: no cancellation, whatever the data. Runs of kRun terms are summed in float32, the rest in float64.
//
// Per-channel numbers are formed in float64 and split so that an element costs one add and one FMA:
//   t = x + hi,  z = t * a + b,   hi + lo = add - mean,  a = rstd * weight * (1 + scale),
//   b = lo * a + bias * (1 + scale) + shift
// t is rounded relative to its own size, so a large mean or add costs no accuracy.
#include "../common/vec.h"
#include "../kernels.h"

#include <cmath>
#include <cstdlib>

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int64_t kRun = 64;              // terms that a float32 accumulator takes
constexpr int64_t kFirstBlockInner = 64;  // pixels in the first block of the statistics
constexpr int64_t kFirstBlockOuter = 1024;
constexpr int64_t kSmall = 1 << 15;       // elements below which threads cost more than they bring

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Not std::vector, whose weak symbols would be shared between the variants.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(std::calloc(size > 0 ? size : 1, sizeof(T)))) {
        if (!data_) std::abort();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() { return data_; }

  private:
    T* data_;
};

inline float float_of_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // The bits moved into place are the value times 2^-112, for subnormals too.
    float value = float_of_bits(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
}

inline float scalar(const float* p) { return *p; }
inline float scalar(const bfloat16* p) { return float_of_bits(uint32_t(p->bits) << 16); }

// Channels [begin, begin + count) of a per-channel vector; `absent` where there is none.
void load_channels(const ChannelVector& v, int64_t sample, int64_t begin, int64_t count, float absent, float* out) {
    int64_t offset = sample * v.sample_stride + begin;
    if (!v.data) {
        for (int64_t c = 0; c < count; ++c) out[c] = absent;
    } else if (v.dtype == Dtype::float32) {
        const float* p = static_cast<const float*>(v.data) + offset;
        for (int64_t c = 0; c < count; ++c) out[c] = p[c];
    } else if (v.dtype == Dtype::bfloat16) {
        const bfloat16* p = static_cast<const bfloat16*>(v.data) + offset;
        for (int64_t c = 0; c < count; ++c) out[c] = scalar(p + c);
    } else {
        const uint16_t* p = static_cast<const uint16_t*>(v.data) + offset;
        for (int64_t c = 0; c < count; ++c) out[c] = half_to_float(p[c]);
    }
}

// Calls f(i, lanes) over [0, count) a vector at a time; `lanes` is a constant in all calls but the tail's.
template <class F>
inline void for_vectors(int64_t count, F f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
    if (i < count) f(i, int(count - i));
}

// Where a slice lies: `channels` channels that start at `base` (in elements) of every tensor.
struct Slice {
    int64_t sample, begin, channels, width, pixels;
    int64_t base, channel_stride, pixel_stride;
    int64_t groups() const { return channels / width; }
};

// ---- sums of t = x + hi and t^2 per channel over pixels [p0, p1) ----

template <class T, int V>
inline void add_moments_inner(const T* x, int64_t stride, int64_t pixels, int lanes, const float* hi, double* sum,
                              double* square) {
    vfloat s[V], q[V], h[V];
    for (int v = 0; v < V; ++v) {
        s[v] = q[v] = vfloat{};
        h[v] = load(hi + v * kLanes, lanes);
    }
    for (int64_t p = 0; p < pixels; ++p) {
        for (int v = 0; v < V; ++v) {
            vfloat t = load(x + p * stride + v * kLanes, lanes) + h[v];
            s[v] += t;
            q[v] = fma(t, t, q[v]);
        }
    }
    for (int v = 0; v < V; ++v) {
        for (int i = 0; i < lanes; ++i) {
            sum[v * kLanes + i] += s[v][i];
            square[v * kLanes + i] += q[v][i];
        }
    }
}

template <class T>
void add_moments(const T* x, const Slice& at, int64_t p0, int64_t p1, const float* hi, double* sum, double* square) {
    x += at.base;
    if (at.channel_stride == 1) {
        for (int64_t p = p0; p < p1; p += kRun) {
            const T* row = x + p * at.pixel_stride;
            int64_t pixels = smaller(kRun, p1 - p), stride = at.pixel_stride, c = 0;
            for (; c + 4 * kLanes <= at.channels; c += 4 * kLanes)
                add_moments_inner<T, 4>(row + c, stride, pixels, kLanes, hi + c, sum + c, square + c);
            for (; c + 2 * kLanes <= at.channels; c += 2 * kLanes)
                add_moments_inner<T, 2>(row + c, stride, pixels, kLanes, hi + c, sum + c, square + c);
            for (; c < at.channels; c += kLanes)
                add_moments_inner<T, 1>(row + c, stride, pixels, int(smaller(kLanes, at.channels - c)), hi + c,
                                        sum + c, square + c);
        }
        return;
    }
    constexpr int kChains = 4;  // independent accumulators, to hide the latency of an add
    for (int64_t c = 0; c < at.channels; ++c) {
        const T* row = x + c * at.channel_stride;
        vfloat h = splat(hi[c]);
        for (int64_t p = p0; p < p1; p += kRun * kChains * kLanes) {
            int64_t end = smaller(p1, p + kRun * kChains * kLanes), i = p;
            vfloat s[kChains] = {}, q[kChains] = {};
            for (; i + kChains * kLanes <= end; i += kChains * kLanes) {
                for (int v = 0; v < kChains; ++v) {
                    vfloat t = load(row + i + v * kLanes) + h;
                    s[v] += t;
                    q[v] = fma(t, t, q[v]);
                }
            }
            for_vectors(end - i, [&](int64_t j, int lanes) {
                vfloat t = load(row + i + j, lanes) + h;
                t = first_lanes(lanes) ? t : vfloat{};
                s[0] += t;
                q[0] = fma(t, t, q[0]);
            });
            for (int v = 0; v < kChains; ++v) {
                sum[c] += sum_lanes(s[v]);
                square[c] += sum_lanes(q[v]);
            }
        }
    }
}

// hi + lo = add - mean
void split_offsets(const Slice& at, const float* add, const double* mean, float* hi, double* lo) {
    for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
        for (int64_t end = c + at.width; c < end; ++c) {
            double offset = add[c] - mean[g];
            hi[c] = float(offset);
            lo[c] = offset - hi[c];
        }
    }
}

// Mean and sum of squared deviations of x + add, per group.
template <class T>
void statistics(const T* x, const Slice& at, const float* add, int64_t first_block, double* mean, double* m2) {
    Buffer<float> hi(at.channels);
    Buffer<double> lo(at.channels), sum(at.channels), square(at.channels);
    for (int64_t g = 0; g < at.groups(); ++g) {
        int64_t c = g * at.width;
        mean[g] = double(scalar(x + at.base + c * at.channel_stride)) + add[c];
    }
    // The first block is gone over twice: first for its mean alone, so that a first element far from all others
    // does no harm as a pivot.
    bool only_mean = true;
    for (int64_t done = 0; done < at.pixels;) {
        int64_t end = smaller(at.pixels, done == 0 ? first_block : 2 * done);
        double before = double(done) * at.width, count = double(end - done) * at.width;
        split_offsets(at, add, mean, hi, lo);
        for (int64_t c = 0; c < at.channels; ++c) sum[c] = square[c] = 0;
        add_moments<T>(x, at, done, end, hi, sum, square);
        for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
            double s = 0, q = 0;
            for (int64_t last = c + at.width; c < last; ++c) {
                s += sum[c] + (end - done) * lo[c];
                q += square[c] + lo[c] * (2 * sum[c] + (end - done) * lo[c]);
            }
            double shift = s / count;  // the block's mean, as seen from the pivot
            mean[g] += shift * (count / (before + count));
            if (!only_mean) m2[g] += q - s * shift + shift * shift * (before * count / (before + count));
        }
        if (!only_mean) done = end;
        only_mean = false;
    }
    for (int64_t g = 0; g < at.groups(); ++g) m2[g] = m2[g] > 0 ? m2[g] : m2[g] == m2[g] ? 0 : m2[g];
}

// ---- the normalisation's coefficients ----

struct Coefficients {
    Buffer<float> add, hi, a, b;  // t = x + hi, z = t * a + b
    Buffer<double> lo;

    explicit Coefficients(int64_t channels) : add(channels), hi(channels), a(channels), b(channels), lo(channels) {}

    template <class Args>
    void load_add(const Args& args, const Slice& at) {
        load_channels(args.add, at.sample, at.begin, at.channels, 0, add);
    }

    template <class Args>
    void fill(const Args& args, const Slice& at, const double* mean, const double* rstd) {
        Buffer<float> weight(at.channels), bias(at.channels), scale(at.channels), shift(at.channels);
        load_channels(args.weight, at.sample, at.begin, at.channels, 1, weight);
        load_channels(args.bias, at.sample, at.begin, at.channels, 0, bias);
        load_channels(args.scale, at.sample, at.begin, at.channels, 0, scale);
        load_channels(args.shift, at.sample, at.begin, at.channels, 0, shift);
        split_offsets(at, add, mean, hi, lo);
        for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
            for (int64_t end = c + at.width; c < end; ++c) {
                double gain = 1.0 + scale[c];
                double slope = rstd[g] * weight[c] * gain;
                a[c] = float(slope);
                b[c] = float(lo[c] * slope + bias[c] * gain + shift[c]);
            }
        }
    }
};

// ---- forward ----

template <bool kSilu>
inline vfloat activate(vfloat z) {
    return kSilu ? silu(z) : z;
}

template <class T, bool kSilu>
void apply(const T* x, T* y, const Slice& at, const float* hi, const float* a, const float* b) {
    x += at.base;
    y += at.base;
    if (at.channel_stride == 1) {
        for (int64_t p = 0; p < at.pixels; ++p) {
            int64_t row = p * at.pixel_stride;
            for_vectors(at.channels, [&](int64_t c, int lanes) {
                vfloat t = load(x + row + c, lanes) + load(hi + c, lanes);
                vfloat z = fma(t, load(a + c, lanes), load(b + c, lanes));
                store(y + row + c, activate<kSilu>(z), lanes);
            });
        }
        return;
    }
    for (int64_t c = 0; c < at.channels; ++c) {
        int64_t row = c * at.channel_stride;
        vfloat h = splat(hi[c]), slope = splat(a[c]), offset = splat(b[c]);
        for_vectors(at.pixels, [&](int64_t p, int lanes) {
            vfloat z = fma(load(x + row + p, lanes) + h, slope, offset);
            store(y + row + p, activate<kSilu>(z), lanes);
        });
    }
}

template <class T>
void forward_slice(const GroupNormSiluArgs& args, const Slice& at) {
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    int64_t groups = at.groups(), first_group = at.begin / at.width;
    Buffer<double> mean(groups), m2(groups), rstd(groups);
    Coefficients k(at.channels);
    k.load_add(args, at);
    statistics<T>(x, at, k.add, at.channel_stride == 1 ? kFirstBlockInner : kFirstBlockOuter, mean, m2);
    for (int64_t g = 0; g < groups; ++g) {
        rstd[g] = 1 / std::sqrt(m2[g] / (double(at.width) * at.pixels) + args.eps);
        args.mean[at.sample * args.groups + first_group + g] = float(mean[g]);
        args.rstd[at.sample * args.groups + first_group + g] = float(rstd[g]);
    }
    k.fill(args, at, mean, rstd);
    if (args.silu)
        apply<T, true>(x, y, at, k.hi, k.a, k.b);
    else
        apply<T, false>(x, y, at, k.hi, k.a, k.b);
}

// ---- backward ----
//
// With g = dy * act'(z), xhat = (t + lo) * rstd, w = weight * (1 + scale) and means over the group:
//   dx = rstd * (w * g - mean(w * g) - xhat * mean(w * g * xhat)) = g * a + t * k1 + k0

template <bool kSilu>
inline vfloat activation_grad(vfloat z) {
    return kSilu ? silu_grad(z) : splat(1.0f);
}

struct BackwardSums {
    Buffer<double> g, gt, t;  // per channel: sums of g, g * t and t
    explicit BackwardSums(int64_t channels) : g(channels), gt(channels), t(channels) {}
};

template <class T, bool kSilu>
void add_backward_sums(const T* dy, const T* x, const Slice& at, const Coefficients& k_, BackwardSums& sums) {
    Coefficients& k = const_cast<Coefficients&>(k_);
    x += at.base;
    dy += at.base;
    const float *hi = k.hi, *a = k.a, *b = k.b;
    double *sum_g = sums.g, *sum_gt = sums.gt, *sum_t = sums.t;
    if (at.channel_stride == 1) {
        Buffer<float> g_run(at.channels), gt_run(at.channels), t_run(at.channels);
        float *rg = g_run, *rgt = gt_run, *rt = t_run;
        for (int64_t p0 = 0; p0 < at.pixels; p0 += kRun) {
            for (int64_t c = 0; c < at.channels; ++c) rg[c] = rgt[c] = rt[c] = 0;
            int64_t end = smaller(at.pixels, p0 + kRun);
            for (int64_t p = p0; p < end; ++p) {
                int64_t row = p * at.pixel_stride;
                for_vectors(at.channels, [&](int64_t c, int lanes) {
                    vfloat t = load(x + row + c, lanes) + load(hi + c, lanes);
                    vfloat z = fma(t, load(a + c, lanes), load(b + c, lanes));
                    vfloat g = load(dy + row + c, lanes) * activation_grad<kSilu>(z);
                    store(rg + c, load(rg + c, lanes) + g, lanes);
                    store(rgt + c, fma(g, t, load(rgt + c, lanes)), lanes);
                    store(rt + c, load(rt + c, lanes) + t, lanes);
                });
            }
            for (int64_t c = 0; c < at.channels; ++c) {
                sum_g[c] += rg[c];
                sum_gt[c] += rgt[c];
                sum_t[c] += rt[c];
            }
        }
        return;
    }
    for (int64_t c = 0; c < at.channels; ++c) {
        int64_t row = c * at.channel_stride;
        vfloat h = splat(hi[c]), slope = splat(a[c]), offset = splat(b[c]);
        for (int64_t p0 = 0; p0 < at.pixels; p0 += kRun * kLanes) {
            vfloat rg{}, rgt{}, rt{};
            int64_t count = smaller(at.pixels - p0, kRun * kLanes);
            for_vectors(count, [&](int64_t p, int lanes) {
                vfloat t = load(x + row + p0 + p, lanes) + h;
                if (lanes < kLanes) t = first_lanes(lanes) ? t : vfloat{};
                vfloat g = load(dy + row + p0 + p, lanes) * activation_grad<kSilu>(fma(t, slope, offset));
                rg += g;
                rgt = fma(g, t, rgt);
                rt += t;
            });
            sum_g[c] += sum_lanes(rg);
            sum_gt[c] += sum_lanes(rgt);
            sum_t[c] += sum_lanes(rt);
        }
    }
}

template <class T, bool kSilu>
void apply_backward(const T* dy, const T* x, T* dx, const Slice& at, const Coefficients& k_, const float* k1,
                    const float* k0) {
    Coefficients& k = const_cast<Coefficients&>(k_);
    x += at.base;
    dy += at.base;
    dx += at.base;
    const float *hi = k.hi, *a = k.a, *b = k.b;
    if (at.channel_stride == 1) {
        for (int64_t p = 0; p < at.pixels; ++p) {
            int64_t row = p * at.pixel_stride;
            for_vectors(at.channels, [&](int64_t c, int lanes) {
                vfloat slope = load(a + c, lanes);
                vfloat t = load(x + row + c, lanes) + load(hi + c, lanes);
                vfloat z = fma(t, slope, load(b + c, lanes));
                vfloat g = load(dy + row + c, lanes) * activation_grad<kSilu>(z);
                vfloat d = fma(g, slope, fma(t, load(k1 + c, lanes), load(k0 + c, lanes)));
                store(dx + row + c, d, lanes);
            });
        }
        return;
    }
    for (int64_t c = 0; c < at.channels; ++c) {
        int64_t row = c * at.channel_stride;
        vfloat h = splat(hi[c]), slope = splat(a[c]), offset = splat(b[c]);
        vfloat f1 = splat(k1[c]), f0 = splat(k0[c]);
        for_vectors(at.pixels, [&](int64_t p, int lanes) {
            vfloat t = load(x + row + p, lanes) + h;
            vfloat g = load(dy + row + p, lanes) * activation_grad<kSilu>(fma(t, slope, offset));
            store(dx + row + p, fma(g, slope, fma(t, f1, f0)), lanes);
        });
    }
}

// The saved mean is rounded to float32; where that is coarse against the deviation, the mean is found again.
template <class T>
void refine_means(const T* x, const Slice& at, const float* add, double* mean, const double* rstd) {
    bool coarse = false;
    for (int64_t g = 0; g < at.groups(); ++g) coarse |= std::fabs(mean[g]) * rstd[g] > 4;
    if (!coarse) return;
    Buffer<float> hi(at.channels);
    Buffer<double> lo(at.channels), sum(at.channels), square(at.channels);
    split_offsets(at, add, mean, hi, lo);
    add_moments<T>(x, at, 0, at.pixels, hi, sum, square);
    for (int64_t g = 0; g < at.groups(); ++g) {
        if (!(std::fabs(mean[g]) * rstd[g] > 4)) continue;
        double s = 0;
        for (int64_t c = g * at.width; c < (g + 1) * at.width; ++c) s += sum[c] + at.pixels * lo[c];
        mean[g] += s / (double(at.width) * at.pixels);
    }
}

template <class T>
void backward_slice(const GroupNormSiluBackwardArgs& args, const Slice& at) {
    const T* dy = static_cast<const T*>(args.dy);
    const T* x = static_cast<const T*>(args.x);
    T* dx = static_cast<T*>(args.dx);
    int64_t groups = at.groups(), first_group = at.sample * args.groups + at.begin / at.width;
    Buffer<double> mean(groups), rstd(groups);
    for (int64_t g = 0; g < groups; ++g) {
        mean[g] = args.mean[first_group + g];
        rstd[g] = args.rstd[first_group + g];
    }
    Coefficients k(at.channels);
    k.load_add(args, at);
    refine_means<T>(x, at, k.add, mean, rstd);
    k.fill(args, at, mean, rstd);

    BackwardSums sums(at.channels);
    if (args.silu)
        add_backward_sums<T, true>(dy, x, at, k, sums);
    else
        add_backward_sums<T, false>(dy, x, at, k, sums);

    Buffer<float> k1(at.channels), k0(at.channels);
    int64_t out = at.sample * args.channels + at.begin;
    double count = double(at.width) * at.pixels;
    for (int64_t g = 0; g < groups; ++g) {
        int64_t begin = g * at.width, end = begin + at.width;
        double mean_wg = 0, mean_wgx = 0;  // times rstd, which is in k.a
        for (int64_t c = begin; c < end; ++c) {
            double sum_g_xhat = rstd[g] * (sums.gt[c] + k.lo[c] * sums.g[c]);
            args.sum_g[out + c] = float(sums.g[c]);
            args.sum_g_xhat[out + c] = float(sum_g_xhat);
            mean_wg += k.a[c] * sums.g[c] / count;
            mean_wgx += k.a[c] * sum_g_xhat / count;
        }
        for (int64_t c = begin; c < end; ++c) {
            double slope = -mean_wgx * rstd[g], offset = slope * k.lo[c] - mean_wg;
            k1[c] = float(slope);
            k0[c] = float(offset);
            args.sum_dx[out + c] = float(k.a[c] * sums.g[c] + slope * sums.t[c] + offset * at.pixels);
        }
    }
    if (args.silu)
        apply_backward<T, true>(dy, x, dx, at, k, k1, k0);
    else
        apply_backward<T, false>(dy, x, dx, at, k, k1, k0);
}

// ---- division of the work ----

template <class Args, class F>
void for_slices(const Args& args, F f) {
    int64_t width = args.channels / args.groups;
    bool inner = args.inner || args.pixels == 1;  // one pixel is both; vectors over channels are full
    int64_t slices = args.groups;
    if (inner) {
        // Slices hold whole groups and, where that is possible, whole cache lines of 32 channels.
        int64_t unit = width;
        while (unit % 32 != 0 && unit < args.channels) unit += width;
        int64_t units = (args.channels + unit - 1) / unit;
        slices = args.samples % args.threads == 0 ? 1 : smaller(args.threads, units);
        width = unit * ((units + slices - 1) / slices);
    }
    int64_t tasks = args.samples * slices;
    bool small = args.samples * args.channels * args.pixels < kSmall;
    int threads = small ? 1 : int(smaller(args.threads, tasks));
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
#endif
    for (int64_t task = 0; task < tasks; ++task) {
        Slice at;
        at.sample = task / slices;
        at.begin = task % slices * width;
        at.channels = smaller(width, args.channels - at.begin);
        if (at.channels <= 0) continue;
        at.width = args.channels / args.groups;
        at.pixels = args.pixels;
        at.channel_stride = inner ? 1 : args.pixels;
        at.pixel_stride = inner ? args.channels : 1;
        at.base = at.sample * args.channels * args.pixels + at.begin * at.channel_stride;
        f(at);
    }
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
    for_slices(args, [&](const Slice& at) {
        if (args.dtype == Dtype::float32)
            forward_slice<float>(args, at);
        else
            forward_slice<bfloat16>(args, at);
    });
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
    for_slices(args, [&](const Slice& at) {
        if (args.dtype == Dtype::float32)
            backward_slice<float>(args, at);
        else
            backward_slice<bfloat16>(args, at);
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
