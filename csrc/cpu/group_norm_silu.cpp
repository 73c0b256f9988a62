// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or identity; and its gradient.
//
// Work: a task is a slice of one sample, made of whole groups. In channels_last, vectors span channels, and a slice is the
// whole sample, or a part of it if the samples do not divide evenly among threads. In contiguous memory, vectors span pixels,
// and a slice is one group. A group's arithmetic is the same in every slice, so results do not depend on the thread count or
// the batch.
//
// Bytes: the forward reads x once and writes y once. The backward reads x and dy once and writes dx once. All other passes
// find a slice in the cache if it fits. A thread's slices are consecutive, and the next one is prefetched while one is
// computed. Without prefetching, the first pass waits for memory, and memory is idle during the second.
//
// Statistics: the sums of x + add - pivot and of its square. The pivot is the mean of a few pixels (summed relative to the
// group's first element). If the pivot is far from the mean, the pass is repeated with the mean as pivot, so that the squares
// never cancel. Runs of kRun terms are summed in float32, the runs in float64.
//
// Per-channel numbers are computed in float64 and split so that an element costs one add and one FMA:
//   t = x + hi,  z = t * a + b,   hi + lo = add - mean,  a = rstd * weight * (1 + scale),
//   b = lo * a + bias * (1 + scale) + shift
// The rounding of t is relative to its own size, so that a large mean or add costs no accuracy.
#include "../common/parallel.h"
#include "../common/vec.h"
#include "../kernels.h"

#include <cmath>
#include <cstdlib>

namespace fastddpm {
namespace FASTDDPM_VARIANT {
namespace {

constexpr int64_t kRun = 32;    // number of terms per float32 accumulator
constexpr int64_t kPilot = 16;  // number of pixels for the pivot in channels_last

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Values per channel or per group, with space for the thread's largest slice. (Not std::vectors, because the variants would
// share their weak symbols.)
struct Scratch {
    double *mean, *rstd, *lo;
    double *sum, *square;            // of t, for the statistics
    double *sum_g, *sum_gt, *sum_t;  // for the gradient
    float *weight, *bias, *add, *scale, *shift;
    float *hi, *a, *b;  // t = x + hi, z = t * a + b
    float *k1, *k0;
    float* run;

    explicit Scratch(int64_t size) {
        double** doubles[] = {&mean, &rstd, &lo, &sum, &square, &sum_g, &sum_gt, &sum_t};
        float** floats[] = {&weight, &bias, &add, &scale, &shift, &hi, &a, &b, &k1, &k0};
        size_t run_size = 3 * kLanes * size_t(size);
        memory_ = std::malloc(size * (sizeof doubles / sizeof *doubles * sizeof(double) +
                                      sizeof floats / sizeof *floats * sizeof(float)) +
                              run_size * sizeof(float));
        if (!memory_) std::abort();
        double* d = static_cast<double*>(memory_);
        for (double** p : doubles) *p = d, d += size;
        float* f = reinterpret_cast<float*>(d);
        for (float** p : floats) *p = f, f += size;
        run = f;
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

  private:
    void* memory_;
};

inline float scalar(const float* p) { return *p; }
template <class T>
inline float scalar(const T* p) {
    return load(p, 1)[0];
}

// Whole groups of one sample. Offsets are in elements, from the tensor's start.
struct Slice {
    int64_t sample, begin, channels;  // channels [begin, begin + channels)
    int64_t width;                    // channels of a group
    int64_t pixels;
    int64_t base, channel_stride, pixel_stride;
    int64_t ahead;  // offset from this slice to the thread's next one

    int64_t groups() const { return channels / width; }
    double group_size() const { return double(width) * pixels; }
};

// Calls f(i, lanes) for the vectors of [0, count). `lanes` is a constant in all calls except the tail's.
template <class F>
inline void for_vectors(int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
    if (i < count) f(i, int(count - i));
}

// The slice's part of a per-channel vector, or `absent` if the vector is null.
void load_channels(const ChannelVector& v, const Slice& at, float absent, float* out) {
    int64_t offset = at.sample * v.sample_stride + at.begin;
    if (!v.data) {
        for (int64_t c = 0; c < at.channels; ++c) out[c] = absent;
        return;
    }
    of_dtype(v.dtype, [&](auto kind) {
        const auto* p = static_cast<const decltype(kind)*>(v.data) + offset;
        for_vectors(at.channels, [&](int64_t c, int lanes) { store(out + c, load(p + c, lanes), lanes); });
    });
}

// Calls f(offset, channel, lanes) for the pixels [p0, p1) of a slice, in memory order.
template <bool kChannelsLast, class F>
inline void for_elements(const Slice& at, int64_t p0, int64_t p1, const F& f) {
    if constexpr (kChannelsLast) {
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

// The elements of a per-channel array that belong to a call of f above.
template <bool kChannelsLast>
inline vfloat of_channel(const float* v, int64_t c, int lanes) {
    return kChannelsLast ? load(v + c, lanes) : splat(v[c]);
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

// Sums of t = x + hi and of t^2 per channel. The accumulators stay in registers: as many vectors of channels as fit, or
// several along one channel's pixels.
template <class T, bool kChannelsLast>
void moments(const T* x, const Slice& at, const float* hi, double* sum, double* square) {
    x += at.base;
    for (int64_t c = 0; c < at.channels; ++c) sum[c] = square[c] = 0;
    if constexpr (kChannelsLast) {
        int64_t stride = at.pixel_stride;
        for (int64_t p = 0; p < at.pixels; p += kRun) {
            const T* row = x + p * stride;
            int64_t pixels = smaller(kRun, at.pixels - p), c = 0;
            if constexpr (kLanes == 16)  // AVX-512 has 32 registers
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
                sum[c] += sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
                square[c] += sum_lanes((q[0] + q[1]) + (q[2] + q[3]));
            }
        }
    }
}

// hi + lo = add - mean
void split_offsets(const Slice& at, Scratch& k) {
    for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
        for (int64_t end = c + at.width; c < end; ++c) {
            double offset = k.add[c] - k.mean[g];
            k.hi[c] = float(offset);
            k.lo[c] = offset - k.hi[c];
        }
    }
}

// x + add at the group's first element. Saved means are relative to it.
template <class T>
double first_element(const T* x, const Slice& at, const Scratch& k, int64_t g) {
    const int64_t c = g * at.width;
    return double(scalar(x + at.base + c * at.channel_stride)) + k.add[c];
}

// The mean of x + add per group, and the variance (in k.rstd).
template <class T, bool kChannelsLast>
void statistics(const T* x, Slice at, bool has_add, Scratch& k) {
    if (!kChannelsLast && !has_add) {  // a group is contiguous in memory
        at.pixels *= at.width;
        at.channels = at.width = 1;
    }
    for (int64_t g = 0; g < at.groups(); ++g) {
        k.mean[g] = first_element(x, at, k, g);
        k.rstd[g] = -1;  // not known yet
    }
    // A few pixels spread over the image. In a contiguous image a small group uses all pixels.
    Slice pilot = at;
    if (kChannelsLast && at.pixels > kPilot) {
        pilot.pixels = kPilot;
        pilot.pixel_stride *= at.pixels / kPilot;
    }
    bool again = true;
    for (int pass = 0; again; ++pass) {
        const Slice& part = pass == 0 ? pilot : at;
        split_offsets(at, k);
        moments<T, kChannelsLast>(x, part, k.hi, k.sum, k.square);
        again = pass == 0;
        for (int64_t g = 0; g < at.groups(); ++g) {
            if (k.rstd[g] >= 0) continue;
            double s = 0, q = 0;
            for (int64_t c = g * at.width; c < (g + 1) * at.width; ++c) {
                s += k.sum[c] + part.pixels * k.lo[c];
                q += k.square[c] + k.lo[c] * (2 * k.sum[c] + part.pixels * k.lo[c]);
            }
            double shift = s / part.group_size(), variance = q / part.group_size() - shift * shift;
            k.mean[g] += shift;
            // A pivot within sqrt(3) deviations of the mean loses at most two bits to cancellation.
            if (pass == 1 && shift * shift > 3 * variance)
                again = true;
            else if (pass > 0)
                k.rstd[g] = variance < 0 ? 0 : variance;
        }
    }
}

// ---- coefficients of the normalisation ----

template <class Args>
void load_vectors(const Args& args, const Slice& at, Scratch& k) {
    load_channels(args.weight, at, 1, k.weight);
    load_channels(args.bias, at, 0, k.bias);
    load_channels(args.add, at, 0, k.add);
    load_channels(args.scale, at, 0, k.scale);
    load_channels(args.shift, at, 0, k.shift);
}

void set_coefficients(const Slice& at, Scratch& k) {
    split_offsets(at, k);
    for (int64_t g = 0, c = 0; g < at.groups(); ++g) {
        for (int64_t end = c + at.width; c < end; ++c) {
            double gain = 1.0 + k.scale[c], slope = k.rstd[g] * k.weight[c] * gain;
            k.a[c] = float(slope);
            k.b[c] = float(k.lo[c] * slope + k.bias[c] * gain + k.shift[c]);
        }
    }
}

// ---- forward ----

template <class T, bool kChannelsLast, bool kSilu>
void apply(const T* x, T* y, const Slice& at, const Scratch& k) {
    // Pointers in local variables: pointers in memory would be reloaded after every store.
    const float *hi = k.hi, *a = k.a, *b = k.b;
    const T* next = x + at.ahead;
    auto value = [&](int64_t i, int64_t c, int lanes) {
        __builtin_prefetch(next + i);
        vfloat t = load(x + i, lanes) + of_channel<kChannelsLast>(hi, c, lanes);
        vfloat z = fma(t, of_channel<kChannelsLast>(a, c, lanes), of_channel<kChannelsLast>(b, c, lanes));
        return kSilu ? silu(z) : z;
    };
    if constexpr (sizeof(T) == sizeof(float)) {
        for_elements<kChannelsLast>(at, 0, at.pixels,
                                    [&](int64_t i, int64_t c, int lanes) { store(y + i, value(i, c, lanes), lanes); });
    } else {
        // Rounding has a separate loop. After SiLU's long chain of dependent operations it would take eight times as long.
        constexpr int64_t kBuffer = 16 * kLanes;
        float buffer[kBuffer];
        const int64_t lines = kChannelsLast ? at.pixels : at.channels, length = kChannelsLast ? at.channels : at.pixels;
        for (int64_t line = 0; line < lines; ++line)
            for (int64_t j = 0; j < length; j += kBuffer) {
                const int64_t row = at.base + line * (kChannelsLast ? at.pixel_stride : at.channel_stride) + j;
                const int64_t count = smaller(kBuffer, length - j);
                for_vectors(count, [&](int64_t i, int lanes) {
                    store(buffer + i, value(row + i, kChannelsLast ? j + i : line, lanes), lanes);
                });
                for_vectors(count, [&](int64_t i, int lanes) { store(y + row + i, load(buffer + i, lanes), lanes); });
            }
    }
}

template <class T, bool kChannelsLast>
void forward_slice(const GroupNormSiluArgs& args, const Slice& at, Scratch& k) {
    const T* x = static_cast<const T*>(args.x);
    T* y = static_cast<T*>(args.y);
    load_vectors(args, at, k);
    statistics<T, kChannelsLast>(x, at, args.add.data, k);
    int64_t out = at.sample * args.groups + at.begin / at.width;
    for (int64_t g = 0; g < at.groups(); ++g) k.rstd[g] = 1 / std::sqrt(k.rstd[g] + args.eps);
    set_coefficients(at, k);
    if (args.coefficients) {
        const float* found[] = {k.hi, k.a, k.b};
        for (int j = 0; j < 3; ++j) {
            float* to = args.coefficients + (j * args.samples + at.sample) * args.channels + at.begin;
            for (int64_t c = 0; c < at.channels; ++c) to[c] = found[j][c];
        }
        return;
    }
    for (int64_t g = 0; g < at.groups(); ++g) {
        args.mean[out + g] = float(k.mean[g] - first_element(x, at, k, g));
        args.rstd[out + g] = float(k.rstd[g]);
    }
    if (args.silu)
        apply<T, kChannelsLast, true>(x, y, at, k);
    else
        apply<T, kChannelsLast, false>(x, y, at, k);
}

// ---- backward ----
//
// With g = dy * act'(z), xhat = (t + lo) * rstd, w = weight * (1 + scale), so that a = rstd * w:
//   dx = rstd * (w * g - mean(w * g) - xhat * mean(w * g * xhat)) = (g * a + k0) + t * k1
// The first pass sums g, g * t and t per channel, the second computes dx. In float32 the first stores g in dx's memory.

template <class T>
constexpr bool kKeepsG = sizeof(T) == sizeof(float);

template <bool kSilu>
inline vfloat gradient_of_z(vfloat dy, vfloat z) {
    return kSilu ? dy * silu_grad(z) : dy;
}

template <class T, bool kChannelsLast, bool kSilu>
void sum_gradients(const T* dy, const T* x, T* dx, const Slice& at, Scratch& k) {
    for (int64_t c = 0; c < at.channels; ++c) k.sum_g[c] = k.sum_gt[c] = k.sum_t[c] = 0;
    const float *hi = k.hi, *a = k.a, *b = k.b;
    // A run's sums are in memory (in practice in the L1 cache); the arithmetic hides the access. The three vectors are
    // adjacent. At a distance of 4096 bytes, a load of one would wait for a store to another.
    float* run = k.run;
    const T* next = x + at.ahead;
    constexpr int64_t kStep = kChannelsLast ? 1 : kLanes;  // contiguous: a vector has elements of one channel
    int64_t run_size = 3 * kStep * (kChannelsLast ? (at.channels + kLanes - 1) / kLanes * kLanes : at.channels);
    for (int64_t p = 0; p < at.pixels; p += kRun * kStep) {
        for (int64_t i = 0; i < run_size; ++i) run[i] = 0;
        for_elements<kChannelsLast>(at, p, smaller(at.pixels, p + kRun * kStep), [&](int64_t i, int64_t c, int lanes) {
            __builtin_prefetch(next + i);
            vfloat t = load(x + i, lanes) + of_channel<kChannelsLast>(hi, c, lanes);
            vfloat z = fma(t, of_channel<kChannelsLast>(a, c, lanes), of_channel<kChannelsLast>(b, c, lanes));
            vfloat g = gradient_of_z<kSilu>(load(dy + i, lanes), z);
            if constexpr (kKeepsG<T>) store(dx + i, g, lanes);
            if (!kChannelsLast) t = first_lanes(lanes) ? t : vfloat{};  // g is 0 there, as dy is
            float* sums = run + 3 * kStep * c;
            store(sums, load(sums) + g);
            store(sums + kLanes, fma(g, t, load(sums + kLanes)));
            store(sums + 2 * kLanes, load(sums + 2 * kLanes) + t);
        });
        if constexpr (kChannelsLast) {
            for_vectors(at.channels, [&](int64_t c, int lanes) {
                for (int i = 0; i < lanes; ++i) {
                    k.sum_g[c + i] += run[3 * c + i];
                    k.sum_gt[c + i] += run[3 * c + kLanes + i];
                    k.sum_t[c + i] += run[3 * c + 2 * kLanes + i];
                }
            });
        } else {
            for (int64_t c = 0; c < at.channels; ++c) {
                const float* sums = run + 3 * kLanes * c;
                k.sum_g[c] += sum_lanes(load(sums));
                k.sum_gt[c] += sum_lanes(load(sums + kLanes));
                k.sum_t[c] += sum_lanes(load(sums + 2 * kLanes));
            }
        }
    }
}

template <class T, bool kChannelsLast, bool kSilu>
void apply_gradients(const T* dy, const T* x, T* dx, const Slice& at, const Scratch& k) {
    const float *hi = k.hi, *a = k.a, *b = k.b, *k1 = k.k1, *k0 = k.k0;
    const T* next = dy + at.ahead;  // the first pass has prefetched x
    for_elements<kChannelsLast>(at, 0, at.pixels, [&](int64_t i, int64_t c, int lanes) {
        __builtin_prefetch(next + i);
        vfloat t = load(x + i, lanes) + of_channel<kChannelsLast>(hi, c, lanes);
        vfloat slope = of_channel<kChannelsLast>(a, c, lanes), g;
        if constexpr (kKeepsG<T>)
            g = load(dx + i, lanes);
        else
            g = gradient_of_z<kSilu>(load(dy + i, lanes), fma(t, slope, of_channel<kChannelsLast>(b, c, lanes)));
        // The product is rounded before the sum, so that a group of one element gets exactly 0.
        vfloat d = g * slope + of_channel<kChannelsLast>(k0, c, lanes);
        store(dx + i, fma(t, of_channel<kChannelsLast>(k1, c, lanes), d), lanes);
    });
}

// The saved means are rounded to float32. A mean whose rounding is large against the deviation is recomputed.
template <class T, bool kChannelsLast>
void refine_means(const T* x, const Slice& at, const float* saved, Scratch& k) {
    auto coarse = [&](int64_t g) { return std::fabs(saved[g]) * k.rstd[g] > 4; };
    bool any = false;
    for (int64_t g = 0; g < at.groups(); ++g) any |= coarse(g);
    if (!any) return;
    split_offsets(at, k);
    moments<T, kChannelsLast>(x, at, k.hi, k.sum, k.square);
    for (int64_t g = 0; g < at.groups(); ++g) {
        if (!coarse(g)) continue;
        double s = 0;
        for (int64_t c = g * at.width; c < (g + 1) * at.width; ++c) s += k.sum[c] + at.pixels * k.lo[c];
        k.mean[g] += s / at.group_size();
    }
}

template <class T, bool kChannelsLast>
void backward_slice(const GroupNormSiluBackwardArgs& args, const Slice& at, Scratch& k) {
    const T* dy = static_cast<const T*>(args.dy);
    const T* x = static_cast<const T*>(args.x);
    T* dx = static_cast<T*>(args.dx);
    int64_t in = at.sample * args.groups + at.begin / at.width, out = at.sample * args.channels + at.begin;
    load_vectors(args, at, k);
    for (int64_t g = 0; g < at.groups(); ++g) {
        k.mean[g] = args.mean[in + g] + first_element(x, at, k, g);
        k.rstd[g] = args.rstd[in + g];
    }
    refine_means<T, kChannelsLast>(x, at, args.mean + in, k);
    set_coefficients(at, k);
    if (args.silu)
        sum_gradients<T, kChannelsLast, true>(dy, x, dx, at, k);
    else
        sum_gradients<T, kChannelsLast, false>(dy, x, dx, at, k);

    for (int64_t g = 0; g < at.groups(); ++g) {
        int64_t begin = g * at.width, end = begin + at.width;
        double mean_ag = 0, mean_agx = 0;  // means of rstd * w * g and of that times xhat
        for (int64_t c = begin; c < end; ++c) {
            double sum_g_xhat = k.rstd[g] * (k.sum_gt[c] + k.lo[c] * k.sum_g[c]);
            args.sum_g[out + c] = float(k.sum_g[c]);
            args.sum_g_xhat[out + c] = float(sum_g_xhat);
            mean_ag += k.a[c] * k.sum_g[c] / at.group_size();
            mean_agx += k.a[c] * sum_g_xhat / at.group_size();
        }
        for (int64_t c = begin; c < end; ++c) {
            double slope = -mean_agx * k.rstd[g], offset = slope * k.lo[c] - mean_ag;
            k.k1[c] = float(slope);
            k.k0[c] = float(offset);
            args.sum_dx[out + c] = float(k.a[c] * k.sum_g[c] + slope * k.sum_t[c] + offset * at.pixels);
        }
    }
    if (args.silu)
        apply_gradients<T, kChannelsLast, true>(dy, x, dx, at, k);
    else
        apply_gradients<T, kChannelsLast, false>(dy, x, dx, at, k);
}

// ---- split of the work ----

// Calls f(slice, scratch) for every slice. Each thread processes consecutive slices.
template <class Args, class F>
void for_slices(const Args& args, bool channels_last, const F& f) {
    int64_t group = args.channels / args.groups, width = group;
    if (channels_last) {
        // Parts of a sample end between groups and, if possible, between cache lines.
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
        at.channel_stride = channels_last ? 1 : args.pixels;
        at.pixel_stride = channels_last ? args.channels : 1;
        at.base = at.sample * args.channels * args.pixels + at.begin * at.channel_stride;
        at.ahead = 0;
        return at;
    };
    int64_t elements = args.samples * args.channels * args.pixels;
    int64_t runs = smaller(smaller(args.threads, slices), 1 + elements / kParallelElements);
    parallel_for(runs, 1, args.threads, [&](int64_t run) {
        Scratch scratch(width);
        int64_t end = slices * (run + 1) / runs;
        for (int64_t i = slices * run / runs; i < end; ++i) {
            Slice at = slice(i);
            if (i + 1 < end) at.ahead = slice(i + 1).base - at.base;
            f(at, scratch);
        }
    });
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
    bool channels_last = args.channels_last || args.pixels == 1;  // one pixel has both; channels fill the vectors
    of_dtype(args.dtype, [&](auto kind) {
        using T = decltype(kind);
        for_slices(args, channels_last, [&](const Slice& at, Scratch& k) {
            channels_last ? forward_slice<T, true>(args, at, k) : forward_slice<T, false>(args, at, k);
        });
    });
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& args) {
    bool channels_last = args.channels_last || args.pixels == 1;
    of_dtype(args.dtype, [&](auto kind) {
        using T = decltype(kind);
        for_slices(args, channels_last, [&](const Slice& at, Scratch& k) {
            channels_last ? backward_slice<T, true>(args, at, k) : backward_slice<T, false>(args, at, k);
        });
    });
}

}  // namespace FASTDDPM_VARIANT
}  // namespace fastddpm
