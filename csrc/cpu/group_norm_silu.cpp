// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or identity; and its gradient.
//
// Work: a task is one sample's slice of whole groups. Channels inner: vectors run over channels, and a slice is the
// sample, or a part of it where samples don't divide evenly among threads. Channels outer: vectors run over pixels,
// and a slice is one group. A group's arithmetic is the same in whatever slice it falls, so results depend neither on
// the thread count nor on the batch.
//
// Bytes: forward reads x once and writes y once, backward reads x and dy once and writes dx once; all other passes
// meet a slice in the cache as long as it fits. A thread's slices follow each other, and while one is computed the
// next is prefetched: otherwise the first pass only waits for memory, and memory then waits for the second.
//
// Statistics: sums of x + add - pivot and of its square, about a pivot taken from some of the pixels (themselves
// summed about the group's first element). If it turns out far from the mean, the pass is done again about the mean,
// so that the squares never cancel. Runs of kRun terms are summed in float32, the rest in float64.
//
// Per-channel numbers are formed in float64 and split so that an element costs one add and one FMA:
//   t = x + hi,  z = t * a + b,   hi + lo = add - mean,  a = rstd * weight * (1 + scale),
//   b = lo * a + bias * (1 + scale) + shift
// t is rounded relative to its own size, so that a large mean or add costs no accuracy.
#include "../common/parallel.h"
#include "../common/vec.h"
#include "../kernels.h"

#include <cmath>
#include <cstdlib>

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int64_t kRun = 32;         // terms that a float32 accumulator takes
constexpr int64_t kPilot = 16;       // pixels that tell the pivot, channels inner
constexpr int64_t kSmall = 1 << 15;  // elements below which threads cost more than they bring

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Zeroed scratch. Not std::vector, whose weak symbols the variants would share.
template <class T>
class Buffer {
  public:
    explicit Buffer(int64_t size) : data_(static_cast<T*>(std::calloc(size, sizeof(T)))) {
        if (!data_) std::abort();
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() const { return data_; }

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

// Whole groups of one sample. Offsets are in elements and count from the tensor's start.
struct Slice {
    int64_t sample, begin, channels;  // channels [begin, begin + channels)
    int64_t width;                    // channels of a group
    int64_t pixels;
    int64_t base, channel_stride, pixel_stride;
    int64_t ahead;  // from here to the thread's next slice

    int64_t groups() const { return channels / width; }
    double group_size() const { return double(width) * pixels; }
};

// The slice's part of a per-channel vector; `absent` where there is none.
void load_channels(const ChannelVector& v, const Slice& at, float absent, float* out) {
    int64_t offset = at.sample * v.sample_stride + at.begin;
    if (!v.data) {
        for (int64_t c = 0; c < at.channels; ++c) out[c] = absent;
    } else if (v.dtype == Dtype::float32) {
        const float* p = static_cast<const float*>(v.data) + offset;
        for (int64_t c = 0; c < at.channels; ++c) out[c] = p[c];
    } else if (v.dtype == Dtype::bfloat16) {
        const bfloat16* p = static_cast<const bfloat16*>(v.data) + offset;
        for (int64_t c = 0; c < at.channels; ++c) out[c] = scalar(p + c);
    } else {
        const uint16_t* p = static_cast<const uint16_t*>(v.data) + offset;
        for (int64_t c = 0; c < at.channels; ++c) out[c] = half_to_float(p[c]);
    }
}

// Calls f(i, lanes) over [0, count) a vector at a time; `lanes` is a constant in all calls but the tail's.
template <class F>
inline void for_vectors(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
    if (i < count) f(i, int(count - i));
}

// Calls f(offset, channel, lanes) over the pixels [p0, p1) of a slice, in the order of memory.
template <bool kInner, class F>
inline void for_elements(const Slice& at, int64_t p0, int64_t p1, const F& f) {
    if constexpr (kInner) {
        for (int64_t p = p0; p < p1; ++p) {
            int64_t row = at.base + p * at.pixel_stride;
            for_vectors(at.channels, [&](int64_t c, int lanes) { f(row + c, c, lanes); });
        }
    } else {
        for (int64_t c = 0; c < at.channels; ++c) {
            int64_t row = at.base + c * at.channel_stride + p0;
            for_vectors(p1 - p0, [&](int64_t p, int lanes) { f(row + p, c, lanes); });
        }
    }
}

// What f above gets of a per-channel array.
template <bool kInner>
inline vfloat of_channel(const float* v, int64_t c, int lanes) {
    return kInner ? load(v + c, lanes) : splat(v[c]);
}

// ---- statistics ----

template <class T, int kVectors>
inline void add_moments(const T* x, int64_t stride, int64_t pixels, int lanes, const float* hi, double* sum,
                        double* square) {
    vfloat s[kVectors], q[kVectors], h[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        s[v] = q[v] = vfloat{};
        h[v] = load(hi + v * kLanes, lanes);
    }
    for (int64_t p = 0; p < pixels; ++p) {
        for (int v = 0; v < kVectors; ++v) {
            vfloat t = load(x + p * stride + v * kLanes, lanes) + h[v];
            s[v] += t;
            q[v] = fma(t, t, q[v]);
        }
    }
    for (int v = 0; v < kVectors; ++v) {
        for (int i = 0; i < lanes; ++i) {
            sum[v * kLanes + i] += s[v][i];
            square[v * kLanes + i] += q[v][i];
        }
    }
}

// Sums of t = x + hi and of t^2 per channel. The accumulators stay in registers: as many vectors of channels at once
// as fit there, or several along one channel's pixels.
template <class T, bool kInner>
void moments(const T* x, const Slice& at, const float* hi, double* sum, double* square) {
    x += at.base;
    for (int64_t c = 0; c < at.channels; ++c) sum[c] = square[c] = 0;
    if constexpr (kInner) {
        int64_t stride = at.pixel_stride;
        for (int64_t p = 0; p < at.pixels; p += kRun) {
            const T* row = x + p * stride;
            int64_t pixels = smaller(kRun, at.pixels - p), c = 0;
            if constexpr (kLanes == 16)  // which come with 32 registers
                for (; c + 8 * kLanes <= at.channels; c += 8 * kLanes)
                    add_moments<T, 8>(row + c, stride, pixels, kLanes, hi + c, sum + c, square + c);
            for (; c + 4 * kLanes <= at.channels; c += 4 * kLanes)
                add_moments<T, 4>(row + c, stride, pixels, kLanes, hi + c, sum + c, square + c);
            for (; c + 2 * kLanes <= at.channels; c += 2 * kLanes)
                add_moments<T, 2>(row + c, stride, pixels, kLanes, hi + c, sum + c, square + c);
            for (; c < at.channels; c += kLanes) {
                int lanes = int(smaller(kLanes, at.channels - c));
                add_moments<T, 1>(row + c, stride, pixels, lanes, hi + c, sum + c, square + c);
            }
        }
    } else {
        constexpr int kChains = 4;
        constexpr int64_t kBlock = kRun * kChains * kLanes;
        for (int64_t c = 0; c < at.channels; ++c) {
            const T* row = x + c * at.channel_stride;
            vfloat h = splat(hi[c]);
            for (int64_t p = 0; p < at.pixels; p += kBlock) {
                int64_t end = smaller(at.pixels, p + kBlock), i = p;
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

// Mean and variance of x + add, per group.
template <class T, bool kInner>
void statistics(const T* x, const Slice& at, const float* add, double* mean, double* variance) {
    Buffer<float> hi(at.channels);
    Buffer<double> lo(at.channels), sum(at.channels), square(at.channels);
    Buffer<bool> done(at.groups());
    for (int64_t g = 0; g < at.groups(); ++g) {
        int64_t c = g * at.width;
        mean[g] = double(scalar(x + at.base + c * at.channel_stride)) + add[c];
    }
    // A few pixels from all over the image; channels outer, where a group is small, all of it.
    Slice pilot = at;
    if (kInner && at.pixels > kPilot) {
        pilot.pixels = kPilot;
        pilot.pixel_stride *= at.pixels / kPilot;
    }
    bool again = true;
    for (int pass = 0; again; ++pass) {
        const Slice& part = pass == 0 ? pilot : at;
        split_offsets(at, add, mean, hi, lo);
        moments<T, kInner>(x, part, hi, sum, square);
        again = pass == 0;
        for (int64_t g = 0; g < at.groups(); ++g) {
            if (done[g]) continue;
            double s = 0, q = 0;
            for (int64_t c = g * at.width; c < (g + 1) * at.width; ++c) {
                s += sum[c] + part.pixels * lo[c];
                q += square[c] + lo[c] * (2 * sum[c] + part.pixels * lo[c]);
            }
            double shift = s / part.group_size(), v = q / part.group_size() - shift * shift;
            mean[g] += shift;
            variance[g] = v < 0 ? 0 : v;
            // Within sqrt(3) deviations of the mean, a pivot costs two bits to cancellation at most.
            done[g] = pass > 1 || (pass == 1 && !(shift * shift > 3 * v));
            again |= !done[g];
        }
    }
}

// ---- coefficients of the normalisation ----

struct Coefficients {
    Buffer<float> add, hi, a, b;  // t = x + hi, z = t * a + b
    Buffer<double> lo;

    template <class Args>
    Coefficients(const Args& args, const Slice& at)
        : add(at.channels), hi(at.channels), a(at.channels), b(at.channels), lo(at.channels) {
        load_channels(args.add, at, 0, add);
    }

    template <class Args>
    void set(const Args& args, const Slice& at, const double* mean, const double* rstd) {
        Buffer<float> weight(at.channels), bias(at.channels), scale(at.channels), shift(at.channels);
        load_channels(args.weight, at, 1, weight);
        load_channels(args.bias, at, 0, bias);
        load_channels(args.scale, at, 0, scale);
        load_channels(args.shift, at, 0, shift);
        split_offsets(at, add, mean, hi, lo);
        for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
            for (int64_t end = c + at.width; c < end; ++c) {
                double gain = 1.0 + scale[c], slope = rstd[g] * weight[c] * gain;
                a[c] = float(slope);
                b[c] = float(lo[c] * slope + bias[c] * gain + shift[c]);
            }
        }
    }
};

// ---- forward ----

template <class T, bool kInner, bool kSilu>
void apply(const T* x, T* y, const Slice& at, const Coefficients& k) {
    for_elements<kInner>(at, 0, at.pixels, [&](int64_t i, int64_t c, int lanes) {
        __builtin_prefetch(x + i + at.ahead, 0, 2);
        vfloat t = load(x + i, lanes) + of_channel<kInner>(k.hi, c, lanes);
        vfloat z = fma(t, of_channel<kInner>(k.a, c, lanes), of_channel<kInner>(k.b, c, lanes));
        store(y + i, kSilu ? silu(z) : z, lanes);
    });
}

template <class T, bool kInner>
void forward_slice(const GroupNormSiluArgs& args, const Slice& at) {
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    Buffer<double> mean(at.groups()), rstd(at.groups());
    Coefficients k(args, at);
    statistics<T, kInner>(x, at, k.add, mean, rstd);  // rstd holds the variance at first
    int64_t out = at.sample * args.groups + at.begin / at.width;
    for (int64_t g = 0; g < at.groups(); ++g) {
        rstd[g] = 1 / std::sqrt(rstd[g] + args.eps);
        args.mean[out + g] = float(mean[g]);
        args.rstd[out + g] = float(rstd[g]);
    }
    k.set(args, at, mean, rstd);
    if (args.silu)
        apply<T, kInner, true>(x, y, at, k);
    else
        apply<T, kInner, false>(x, y, at, k);
}

// ---- backward ----
//
// With g = dy * act'(z), xhat = (t + lo) * rstd, w = weight * (1 + scale), so that a = rstd * w:
//   dx = rstd * (w * g - mean(w * g) - xhat * mean(w * g * xhat)) = (g * a + k0) + t * k1
// The first pass sums g, g * t and t per channel, the second forms dx. In float32 the first leaves g where dx will be.

template <class T>
constexpr bool kKeepsG = sizeof(T) == sizeof(float);

struct GradientSums {
    Buffer<double> g, gt, t;
    explicit GradientSums(int64_t channels) : g(channels), gt(channels), t(channels) {}
};

template <class T, bool kInner, bool kSilu>
inline vfloat gradient_of_z(const T* dy, vfloat t, int64_t i, int64_t c, int lanes, const Coefficients& k) {
    vfloat g = load(dy + i, lanes);
    if (!kSilu) return g;
    return g * silu_grad(fma(t, of_channel<kInner>(k.a, c, lanes), of_channel<kInner>(k.b, c, lanes)));
}

template <class T, bool kInner, bool kSilu>
void sum_gradients(const T* dy, const T* x, T* dx, const Slice& at, const Coefficients& k, GradientSums& sums) {
    // Accumulators in memory (in practice the nearest cache), hidden behind the arithmetic: per channel one lane, or
    // channels outer one vector.
    constexpr int64_t kStep = kInner ? 1 : kLanes;
    Buffer<float> g_run(at.channels * kStep), gt_run(at.channels * kStep), t_run(at.channels * kStep);
    for (int64_t p = 0; p < at.pixels; p += kRun * kStep) {
        for_elements<kInner>(at, p, smaller(at.pixels, p + kRun * kStep), [&](int64_t i, int64_t c, int lanes) {
            vfloat t = load(x + i, lanes) + of_channel<kInner>(k.hi, c, lanes);
            vfloat g = gradient_of_z<T, kInner, kSilu>(dy, t, i, c, lanes, k);
            if constexpr (kKeepsG<T>) store(dx + i, g, lanes);
            if (!kInner) t = first_lanes(lanes) ? t : vfloat{};  // g is 0 there, as dy is
            int64_t j = c * kStep;
            int used = kInner ? lanes : kLanes;
            store(g_run + j, load(g_run + j, used) + g, used);
            store(gt_run + j, fma(g, t, load(gt_run + j, used)), used);
            store(t_run + j, load(t_run + j, used) + t, used);
        });
        for (int64_t c = 0; c < at.channels; ++c) {
            for (int64_t j = c * kStep; j < (c + 1) * kStep; ++j) {
                sums.g[c] += g_run[j];
                sums.gt[c] += gt_run[j];
                sums.t[c] += t_run[j];
                g_run[j] = gt_run[j] = t_run[j] = 0;
            }
        }
    }
}

template <class T, bool kInner, bool kSilu>
void apply_gradients(const T* dy, const T* x, T* dx, const Slice& at, const Coefficients& k, const float* k1,
                     const float* k0) {
    for_elements<kInner>(at, 0, at.pixels, [&](int64_t i, int64_t c, int lanes) {
        __builtin_prefetch(x + i + at.ahead, 0, 2);
        __builtin_prefetch(dy + i + at.ahead, 0, 2);
        vfloat t = load(x + i, lanes) + of_channel<kInner>(k.hi, c, lanes), g;
        if constexpr (kKeepsG<T>)
            g = load(dx + i, lanes);
        else
            g = gradient_of_z<T, kInner, kSilu>(dy, t, i, c, lanes, k);
        // Rounded product, then sum: a group of one element gets exactly 0.
        vfloat d = g * of_channel<kInner>(k.a, c, lanes) + of_channel<kInner>(k0, c, lanes);
        store(dx + i, fma(t, of_channel<kInner>(k1, c, lanes), d), lanes);
    });
}

// The saved means are rounded to float32; those for which that is coarse against the deviation are found again.
template <class T, bool kInner>
void refine_means(const T* x, const Slice& at, const float* add, const double* rstd, double* mean) {
    auto coarse = [&](int64_t g) { return std::fabs(mean[g]) * rstd[g] > 4; };
    bool any = false;
    for (int64_t g = 0; g < at.groups(); ++g) any |= coarse(g);
    if (!any) return;
    Buffer<float> hi(at.channels);
    Buffer<double> lo(at.channels), sum(at.channels), square(at.channels);
    split_offsets(at, add, mean, hi, lo);
    moments<T, kInner>(x, at, hi, sum, square);
    for (int64_t g = 0; g < at.groups(); ++g) {
        if (!coarse(g)) continue;
        double s = 0;
        for (int64_t c = g * at.width; c < (g + 1) * at.width; ++c) s += sum[c] + at.pixels * lo[c];
        mean[g] += s / at.group_size();
    }
}

template <class T, bool kInner>
void backward_slice(const GroupNormSiluBackwardArgs& args, const Slice& at) {
    const T* dy = static_cast<const T*>(args.dy);
    const T* x = static_cast<const T*>(args.x);
    T* dx = static_cast<T*>(args.dx);
    int64_t in = at.sample * args.groups + at.begin / at.width, out = at.sample * args.channels + at.begin;
    Buffer<double> mean(at.groups()), rstd(at.groups());
    for (int64_t g = 0; g < at.groups(); ++g) {
        mean[g] = args.mean[in + g];
        rstd[g] = args.rstd[in + g];
    }
    Coefficients k(args, at);
    refine_means<T, kInner>(x, at, k.add, rstd, mean);
    k.set(args, at, mean, rstd);

    GradientSums sums(at.channels);
    if (args.silu)
        sum_gradients<T, kInner, true>(dy, x, dx, at, k, sums);
    else
        sum_gradients<T, kInner, false>(dy, x, dx, at, k, sums);

    Buffer<float> k1(at.channels), k0(at.channels);
    for (int64_t g = 0; g < at.groups(); ++g) {
        int64_t begin = g * at.width, end = begin + at.width;
        double mean_ag = 0, mean_agx = 0;  // means of rstd * w * g and of that times xhat
        for (int64_t c = begin; c < end; ++c) {
            double sum_g_xhat = rstd[g] * (sums.gt[c] + k.lo[c] * sums.g[c]);
            args.sum_g[out + c] = float(sums.g[c]);
            args.sum_g_xhat[out + c] = float(sum_g_xhat);
            mean_ag += k.a[c] * sums.g[c] / at.group_size();
            mean_agx += k.a[c] * sum_g_xhat / at.group_size();
        }
        for (int64_t c = begin; c < end; ++c) {
            double slope = -mean_agx * rstd[g], offset = slope * k.lo[c] - mean_ag;
            k1[c] = float(slope);
            k0[c] = float(offset);
            args.sum_dx[out + c] = float(k.a[c] * sums.g[c] + slope * sums.t[c] + offset * at.pixels);
        }
    }
    if (args.silu)
        apply_gradients<T, kInner, true>(dy, x, dx, at, k, k1, k0);
    else
        apply_gradients<T, kInner, false>(dy, x, dx, at, k, k1, k0);
}

// ---- division of the work ----

// Calls f(slice) for every slice, each thread taking a run of neighbours.
template <class Args, class F>
void for_slices(const Args& args, bool inner, const F& f) {
    int64_t group = args.channels / args.groups, width = group;
    if (inner) {
        // Parts of a sample end between groups and, where that is possible, between cache lines.
        int64_t unit = group;
        while (unit % 32 != 0 && unit < args.channels) unit += group;
        int64_t units = (args.channels + unit - 1) / unit;
        int64_t parts = args.samples % args.threads == 0 ? 1 : smaller(args.threads, units);
        width = unit * ((units + parts - 1) / parts);
    }
    int64_t parts = (args.channels + width - 1) / width, slices = args.samples * parts;
    auto slice = [&](int64_t i) {
        Slice at;
        at.sample = i / parts;
        at.begin = i % parts * width;
        at.channels = smaller(width, args.channels - at.begin);
        at.width = group;
        at.pixels = args.pixels;
        at.channel_stride = inner ? 1 : args.pixels;
        at.pixel_stride = inner ? args.channels : 1;
        at.base = at.sample * args.channels * args.pixels + at.begin * at.channel_stride;
        at.ahead = 0;
        return at;
    };
    bool small = args.samples * args.channels * args.pixels < kSmall;
    int64_t threads = small ? 1 : smaller(args.threads, slices);
    parallel_for(threads, 1, int(threads), [&](int64_t thread) {
        int64_t end = slices * (thread + 1) / threads;
        for (int64_t i = slices * thread / threads; i < end; ++i) {
            Slice at = slice(i);
            if (i + 1 < end) at.ahead = slice(i + 1).base - at.base;
            f(at);
        }
    });
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
    bool inner = args.inner || args.pixels == 1;  // one pixel is both, and channels fill the vectors
    bool wide = args.dtype == Dtype::float32;
    for_slices(args, inner, [&](const Slice& at) {
        if (inner)
            wide ? forward_slice<float, true>(args, at) : forward_slice<bfloat16, true>(args, at);
        else
            wide ? forward_slice<float, false>(args, at) : forward_slice<bfloat16, false>(args, at);
    });
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
    bool inner = args.inner || args.pixels == 1;
    bool wide = args.dtype == Dtype::float32;
    for_slices(args, inner, [&](const Slice& at) {
        if (inner)
            wide ? backward_slice<float, true>(args, at) : backward_slice<bfloat16, true>(args, at);
        else
            wide ? backward_slice<float, false>(args, at) : backward_slice<bfloat16, false>(args, at);
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
