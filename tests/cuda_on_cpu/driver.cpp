// Calls every CUDA kernel without PyTorch and compares the results with the formulas in float64. It runs under
// compute-sanitizer on a GPU, and under the address sanitizer with the device code on a CPU. It prints one line per case. The
// exit status is 1 if a result is wrong.
//   driver [text]    only the cases whose name contains the text
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/philox.h"
#include "kernels.h"

#ifndef CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

using namespace fastddpm;

namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

size_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Device memory of exactly `count` elements (at least one), so that sanitizers detect an access past its end. Filled with NaNs at
// first.
class Array {
  public:
    Array(int64_t count, Dtype dtype = Dtype::float32) : count_(count), dtype_(dtype) {
        check(cudaMalloc(&data_, bytes() ? bytes() : 1));
        if (!count) return;
        std::vector<unsigned char> nan(bytes(), 0xff);
        check(cudaMemcpy(data_, nan.data(), bytes(), cudaMemcpyHostToDevice));
    }
    ~Array() { cudaFree(data_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    // Rounds the values to the array's dtype, also in place, so that the formulas use the kernel's inputs.
    void upload(std::vector<double>& values) {
        std::vector<unsigned char> raw(bytes());
        for (int64_t i = 0; i < count_; ++i) {
            if (dtype_ == Dtype::float32) {
                const float v = static_cast<float>(values[i]);
                std::memcpy(&raw[4 * i], &v, 4);
                values[i] = v;
            } else if (dtype_ == Dtype::bfloat16) {
                const __nv_bfloat16 v = __float2bfloat16_rn(static_cast<float>(values[i]));
                std::memcpy(&raw[2 * i], &v, 2);
                values[i] = __bfloat162float(v);
            } else {
                const __half v = __float2half_rn(static_cast<float>(values[i]));
                std::memcpy(&raw[2 * i], &v, 2);
                values[i] = __half2float(v);
            }
        }
        check(cudaMemcpy(data_, raw.data(), bytes(), cudaMemcpyHostToDevice));
    }
    std::vector<double> download() const {
        std::vector<unsigned char> raw(bytes());
        check(cudaMemcpy(raw.data(), data_, bytes(), cudaMemcpyDeviceToHost));
        std::vector<double> values(count_);
        for (int64_t i = 0; i < count_; ++i) {
            if (dtype_ == Dtype::float32) {
                float v;
                std::memcpy(&v, &raw[4 * i], 4);
                values[i] = v;
            } else if (dtype_ == Dtype::bfloat16) {
                __nv_bfloat16 v;
                std::memcpy(static_cast<void*>(&v), &raw[2 * i], 2);
                values[i] = __bfloat162float(v);
            } else {
                __half v;
                std::memcpy(static_cast<void*>(&v), &raw[2 * i], 2);
                values[i] = __half2float(v);
            }
        }
        return values;
    }
    void* data() const { return data_; }
    float* floats() const { return static_cast<float*>(data_); }
    Dtype dtype() const { return dtype_; }

  private:
    size_t bytes() const { return count_ * size_of(dtype_); }

    void* data_ = nullptr;
    int64_t count_;
    Dtype dtype_;
};

template <class T>
class Integers {
  public:
    explicit Integers(std::vector<T> values) : count_(values.size()) {
        check(cudaMalloc(reinterpret_cast<void**>(&data_), count_ * sizeof(T)));
        check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Integers() { cudaFree(data_); }
    Integers(const Integers&) = delete;
    Integers& operator=(const Integers&) = delete;
    std::vector<T> download() const {
        std::vector<T> values(count_);
        check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }
    T* data() const { return data_; }

  private:
    T* data_ = nullptr;
    size_t count_;
};

std::mt19937 generator(1);

std::vector<double> random(int64_t count, double mean = 0.0, double deviation = 1.0) {
    std::normal_distribution<double> normal(mean, deviation);
    std::vector<double> values(count);
    for (double& v : values) v = normal(generator);
    return values;
}

const CudaPlace kPlace{0, nullptr};
bool all_good = true;

// Returns the largest error as a share of scale + relative * |truth|.
double share(const std::vector<double>& got, const std::vector<double>& truth, double scale, double relative) {
    double worst = got.size() == truth.size() ? 0.0 : INFINITY;
    for (size_t i = 0; i < got.size() && i < truth.size(); ++i) {
        const double error = std::fabs(got[i] - truth[i]) / (scale + relative * std::fabs(truth[i]));
        if (!(error <= worst)) worst = error;  // also for NaN
    }
    return worst;
}

void report(const std::string& name, double worst) {
    const bool good = worst <= 1.0;
    std::printf("%-5s %-100s %.2f of the bound\n", good ? "ok" : "WRONG", name.c_str(), worst);
    std::fflush(stdout);
    all_good &= good;
}

const char* name_of(Dtype dtype) {
    return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bfloat16 ? "bfloat16" : "float16";
}
double step_of(Dtype dtype) {
    return dtype == Dtype::float32 ? 2e-7 : dtype == Dtype::bfloat16 ? 1.0 / 128 : 1.0 / 1024;
}

// ---- philox_normal ----

double normal(uint64_t seed, uint32_t stream, uint32_t t, int64_t sample, int64_t e) {
    uint32_t w[4] = {static_cast<uint32_t>(e / 4), t, static_cast<uint32_t>(sample), counter_word3(sample, stream)};
    philox4x32_10<ScalarMath>(w, seed);
    const int pair = e % 4 / 2 * 2;
    const double radius = std::sqrt(-2.0 * std::log((w[pair] + 0.5) * 0x1p-32));
    const double angle = 2.0 * M_PI * (w[pair + 1] + 0.5) * 0x1p-32;
    return radius * (e % 2 ? std::sin(angle) : std::cos(angle));
}

void test_philox_normal(int64_t samples, int64_t elements) {
    Array out(samples * elements);
    const uint64_t seed = (uint64_t{1} << 63) + 5;
    const int64_t first = (int64_t{1} << 40) + 3;
    PhiloxNormalArgs args{};
    args.out = out.floats();
    args.samples = samples, args.elements = elements, args.seed = seed, args.stream = 2, args.t_all = 17;
    args.first = first;
    philox_normal_cuda(args, kPlace);
    std::vector<double> truth;
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t e = 0; e < elements; ++e) truth.push_back(normal(seed, 2, 17, first + i, e));
    report("philox_normal [" + std::to_string(samples) + ", " + std::to_string(elements) + "]",
           share(out.download(), truth, 4e-6, 0));
}

// ---- timestep_embedding ----

void test_timestep_embedding(int64_t count, int64_t dim, bool flip) {
    std::vector<int64_t> t(count);
    for (int64_t i = 0; i < count; ++i) t[i] = i * 37 % 1000;
    t[0] = 1000000;
    const Integers<int64_t> on_device(t);
    Array out(count * dim);
    TimestepEmbeddingArgs args{};
    args.out = out.floats(), args.t_int = on_device.data(), args.count = count, args.dim = dim;
    args.rate = std::log(10000.0) / (dim / 2 - 1), args.flip_sin_to_cos = flip;
    timestep_embedding_cuda(args, kPlace);
    std::vector<double> truth;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t k = 0; k < dim; ++k) {
            const double angle = t[i] * std::exp(-args.rate * (k % (dim / 2)));
            truth.push_back(k == dim / 2 * 2 ? 0.0 : (k < dim / 2) != flip ? std::sin(angle) : std::cos(angle));
        }
    report("timestep_embedding [" + std::to_string(count) + "] -> " + std::to_string(dim),
           share(out.download(), truth, 2e-6, 0));
}

// ---- ddpm_step ----

int64_t place(bool channels_last, int64_t i, int64_t c, int64_t p, int64_t channels, int64_t pixels) {
    return i * channels * pixels + (channels_last ? p * channels + c : c * pixels + p);
}

void test_ddpm_step(int64_t samples, int64_t channels, int64_t pixels, Dtype dtype, bool x_channels_last,
                    bool o_channels_last, bool learned, bool drawn, bool on_host) {
    const int64_t numel = samples * channels * pixels, o_channels = channels * (learned ? 2 : 1);
    std::vector<double> x = random(numel), o = random(samples * o_channels * pixels), last = random(numel),
                        z = random(numel);
    Array dx(numel), x_prev(numel), d_o(o.size(), dtype), dlast(numel), dz(numel), dx0(numel), next(numel, dtype);
    dx.upload(x), d_o.upload(o), dlast.upload(last), dz.upload(z);
    const double r[9] = {1.25, -0.5, 0.75, 0.25, -0.25, 0.125, 0.5, learned ? -4.0 : 0.0, learned ? -2.0 : 0.0};
    std::vector<double> table(27, NAN);
    for (int i = 0; i < 9; ++i) table[9 + i] = r[i];
    Array rows(27);
    rows.upload(table);
    std::vector<float> host_rows(table.begin(), table.end());
    const int64_t seed = -5, first = (int64_t{1} << 40) + 1;
    const std::vector<int64_t> start = {seed, first, 1, -1}, times = {-1, 999, -1};
    std::vector<int64_t> host_state = start, host_times = times;
    const Integers<int64_t> state(start), timesteps(times);
    DdpmStepArgs args{};
    args.x = dx.floats(), args.x_prev = x_prev.floats(), args.x_channels_last = x_channels_last;
    args.o = d_o.data(), args.o_dtype = dtype, args.o_channels_last = o_channels_last;
    args.x0_last = dlast.floats(), args.x0 = dx0.floats();
    args.next_input = next.data(), args.next_dtype = dtype, args.next_channels_last = o_channels_last;
    args.noise = drawn ? nullptr : dz.floats();
    args.samples = samples, args.channels = channels, args.o_channels = o_channels, args.pixels = pixels;
    args.rows = on_host ? host_rows.data() : rows.floats();
    args.timesteps = on_host ? host_times.data() : timesteps.data();
    args.state = on_host ? host_state.data() : state.data();
    args.table_rows = 3, args.table_on_host = on_host, args.clip = true, args.clip_bound = 1.0f;
    ddpm_step_cuda(args, kPlace);
    std::vector<double> truth(numel), truth0(numel), truth_next(numel);
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t p = 0; p < pixels; ++p) {
                const int64_t at = place(x_channels_last, i, c, p, channels, pixels);
                const double eps = o[place(o_channels_last, i, c, p, o_channels, pixels)];
                const double x0 = std::fmin(std::fmax(r[0] * x[at] + r[1] * eps, -1.0), 1.0);
                double sigma = r[6];
                if (learned) {
                    const double f = (o[place(o_channels_last, i, c + channels, p, o_channels, pixels)] + 1) / 2;
                    sigma *= std::exp((f * r[8] + (1 - f) * r[7]) / 2);
                }
                const double noise = drawn ? normal(seed, 1, 999, first + i, c * pixels + p) : z[at];
                truth0[at] = x0;
                truth[at] = r[2] * x0 + r[3] * x[at] + r[4] * last[at] + r[5] * eps + sigma * noise;
                truth_next[place(o_channels_last, i, c, p, channels, pixels)] = truth[at];
            }
    double worst = share(x_prev.download(), truth, 4e-6, 0);
    worst = std::fmax(worst, share(dx0.download(), truth0, 1e-6, 0));
    worst = std::fmax(worst, share(next.download(), truth_next, 4e-6, step_of(dtype)));
    if (!on_host && state.download() != std::vector<int64_t>{seed, first, 2, -1}) worst = INFINITY;
    report("ddpm_step [" + std::to_string(samples) + ", " + std::to_string(channels) + ", " + std::to_string(pixels) +
               "] " + name_of(dtype) + (x_channels_last ? ", x channels_last" : "") +
               (o_channels_last ? ", o channels_last" : "") + (learned ? ", learned variance" : "") +
               (drawn ? ", noise drawn" : "") + (on_host ? ", table on host" : ""),
           worst);
}

// ---- group_norm_silu, forward and backward ----

struct Vector {
    std::vector<double> values;
    Array array;

    Vector(int64_t count, Dtype dtype, double mean) : values(random(count, mean)), array(count, dtype) {
        array.upload(values);
    }
    ChannelVector view(int64_t stride) const { return {array.data(), array.dtype(), stride}; }
};

void test_group_norm_silu(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, Dtype dtype,
                          bool channels_last, bool full, double mean = 0.0) {
    const int64_t numel = samples * channels * pixels, width = channels / groups;
    std::vector<double> x = random(numel, mean), dy = random(numel);
    Array dx(numel, dtype), ddy(numel, dtype), y(numel, dtype), gradient(numel, dtype);
    dx.upload(x), ddy.upload(dy);
    const Vector weight(channels, Dtype::float32, 1), bias(channels, dtype, 0), add(samples * channels, dtype, 0),
        scale(channels, Dtype::float32, 0), shift(samples * channels, Dtype::float32, 0);
    Array mean_out(samples * groups), rstd_out(samples * groups), sum_g(samples * channels), sum_gx(samples * channels),
        sum_dx(samples * channels);
    const double eps = 1e-6;

    GroupNormSiluArgs args{};
    args.x = dx.data(), args.y = y.data(), args.dtype = dtype, args.channels_last = channels_last;
    args.samples = samples, args.channels = channels, args.pixels = pixels, args.groups = groups;
    args.weight = weight.view(0), args.bias = bias.view(0);
    if (full) args.add = add.view(channels), args.scale = scale.view(0), args.shift = shift.view(channels);
    args.eps = static_cast<float>(eps), args.silu = true;
    args.mean = mean_out.floats(), args.rstd = rstd_out.floats();
    const Array workspace(group_norm_silu_workspace(args, 0));
    args.workspace = workspace.floats();
    group_norm_silu_cuda(args, kPlace);

    GroupNormSiluBackwardArgs back{};
    back.dy = ddy.data(), back.x = dx.data(), back.dx = gradient.data(), back.dtype = dtype,
    back.channels_last = channels_last;
    back.samples = samples, back.channels = channels, back.pixels = pixels, back.groups = groups;
    back.weight = args.weight, back.bias = args.bias, back.add = args.add, back.scale = args.scale;
    back.shift = args.shift, back.silu = true, back.mean = args.mean, back.rstd = args.rstd;
    back.sum_g = sum_g.floats(), back.sum_g_xhat = sum_gx.floats(), back.sum_dx = sum_dx.floats();
    const Array back_workspace(group_norm_silu_backward_workspace(back, 0));
    back.workspace = back_workspace.floats();
    group_norm_silu_backward_cuda(back, kPlace);

    std::vector<double> truth(numel), truth_dx(numel), truth_g(samples * channels), truth_gx(samples * channels),
        truth_sum(samples * channels), size(samples * channels);
    double largest = 0.0, largest_dx = 0.0;
    for (int64_t i = 0; i < samples; ++i)
        for (int64_t g = 0; g < groups; ++g) {
            const auto for_all = [&](const auto& f) {
                for (int64_t c = g * width; c < (g + 1) * width; ++c)
                    for (int64_t p = 0; p < pixels; ++p)
                        f(place(channels_last, i, c, p, channels, pixels), c, i * channels + c);
            };
            const auto h = [&](int64_t at, int64_t ic) { return x[at] + (full ? add.values[ic] : 0.0); };
            const double count = static_cast<double>(width) * pixels;
            double m = 0.0, v = 0.0, a = 0.0, b = 0.0;
            for_all([&](int64_t at, int64_t, int64_t ic) { m += h(at, ic) / count; });
            for_all([&](int64_t at, int64_t, int64_t ic) { v += (h(at, ic) - m) * (h(at, ic) - m) / count; });
            const double rstd = 1.0 / std::sqrt(v + eps);
            const auto gain = [&](int64_t c) { return weight.values[c] * (full ? 1.0 + scale.values[c] : 1.0); };
            const auto z = [&](int64_t at, int64_t c, int64_t ic) {
                const double beta =
                    bias.values[c] * (full ? 1.0 + scale.values[c] : 1.0) + (full ? shift.values[ic] : 0.0);
                return (h(at, ic) - m) * rstd * gain(c) + beta;
            };
            const auto dz = [&](int64_t at, int64_t c, int64_t ic) {
                const double s = 1.0 / (1.0 + std::exp(-z(at, c, ic)));
                return dy[at] * s * (1.0 + z(at, c, ic) * (1.0 - s));
            };
            for_all([&](int64_t at, int64_t c, int64_t ic) {
                truth[at] = z(at, c, ic) / (1.0 + std::exp(-z(at, c, ic)));
                a += dz(at, c, ic) * gain(c) / count;
                b += dz(at, c, ic) * gain(c) * (h(at, ic) - m) * rstd / count;
            });
            for_all([&](int64_t at, int64_t c, int64_t ic) {
                const double xhat = (h(at, ic) - m) * rstd;
                truth_dx[at] = rstd * (dz(at, c, ic) * gain(c) - a - xhat * b);
                truth_g[ic] += dz(at, c, ic);
                truth_gx[ic] += dz(at, c, ic) * xhat;
                truth_sum[ic] += truth_dx[at];
                size[ic] += std::fabs(dz(at, c, ic)) * (1.0 + std::fabs(xhat)) + std::fabs(truth_dx[at]);
                largest = std::fmax(largest, std::fabs(xhat) * std::fabs(gain(c)));
                largest_dx = std::fmax(largest_dx, std::fabs(truth_dx[at]));
            });
        }
    double sums = 1.0;
    for (double s : size) sums = std::fmax(sums, s);
    const std::string name = "[" + std::to_string(samples) + ", " + std::to_string(channels) + ", " +
                             std::to_string(pixels) + "] / " + std::to_string(groups) + " " + name_of(dtype) +
                             (channels_last ? " channels_last" : " contiguous") + (full ? ", every input" : "");
    const double ulp = dtype == Dtype::float32 ? 0.0 : step_of(dtype);
    report("group_norm_silu " + name,
           share(y.download(), truth, 8e-7 * (5 + largest) + (ulp > 0 ? 1e-3 : 0), ulp + 2.5e-7));
    double worst = share(gradient.download(), truth_dx, 4e-6 * largest_dx, ulp);
    worst = std::fmax(worst, share(sum_g.download(), truth_g, 4e-6 * sums, 0));
    worst = std::fmax(worst, share(sum_gx.download(), truth_gx, 4e-6 * sums, 0));
    worst = std::fmax(worst, share(sum_dx.download(), truth_sum, 4e-6 * sums, 0));
    report("group_norm_silu_backward " + name, worst);
}

}  // namespace

int main(int count, char** words) try {
    const std::string only = count > 1 ? words[1] : "";
    const auto wanted = [&](const char* op) { return std::string(op).find(only) != std::string::npos; };
    const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
    const std::string failure = cuda_self_test(0);
    if (!failure.empty()) throw std::runtime_error(failure);
    if (wanted("philox_normal"))
        for (int64_t elements : {1, 7, 64, 1030}) test_philox_normal(3, elements);
    if (wanted("timestep_embedding")) {
        test_timestep_embedding(3, 128, false);
        test_timestep_embedding(37, 75, true);
        test_timestep_embedding(2, 600, false);
    }
    if (wanted("ddpm_step"))
        for (Dtype dtype : dtypes)
            for (int i = 0; i < 8; ++i) {
                test_ddpm_step(2, 3, 20, dtype, i & 1, i & 2, false, i & 4, false);
                test_ddpm_step(2, 3, 20, dtype, i & 1, i & 2, true, i & 4, false);
                test_ddpm_step(3, i & 4 ? 4 : 1, 36, dtype, i & 1, i & 2, false, true, true);
                test_ddpm_step(2, 5, 7, dtype, i & 1, i & 2, i & 4, true, false);
            }
    if (wanted("group_norm_silu")) {
        test_group_norm_silu(1, 16, 16384, 2, Dtype::bfloat16, true, true, 1.0);  // larger than a portable cluster
        test_group_norm_silu(2, 8, 50000, 4, Dtype::float16, true, true);         // larger than any: two stages, twice
        test_group_norm_silu(1, 960, 196, 32, Dtype::bfloat16, true, false);      // threads that do not form whole rows
        test_group_norm_silu(1, 320, 196, 2, Dtype::bfloat16, true, false);
        for (int64_t channels : {1500, 1750, 2049})  // numbers in shared memory, and too many for it
            for (bool channels_last : {true, false})
                test_group_norm_silu(2, channels, 3, 1, Dtype::float32, channels_last, true);
        for (Dtype dtype : dtypes)
            for (bool channels_last : {true, false}) {
                test_group_norm_silu(2, 64, 49, 32, dtype, channels_last, true);     // columns, two channels per group
                test_group_norm_silu(1, 128, 256, 32, dtype, channels_last, false);  // a cluster for each slice
                test_group_norm_silu(2, 96, 20, 8, dtype, channels_last, true);   // groups of 12 straddle the vectors
                test_group_norm_silu(1, 24, 33, 2, dtype, channels_last, false);  // pixels of 48 or 96 bytes
                test_group_norm_silu(2, 37, 6, 37, dtype, channels_last, true);   // no whole vectors in either layout
                test_group_norm_silu(1, 8, 4800, 1, dtype, channels_last, false, 3.0);  // a large group
                test_group_norm_silu(1, 2056, 3, 1, dtype, channels_last, true);        // more channels than the table
                test_group_norm_silu(1, 6, 651, 2, dtype, channels_last, false);        // single elements, in parts
                test_group_norm_silu(2, 6, 1, 2, dtype, channels_last, true);           // one pixel
            }
    }
    check(cudaDeviceSynchronize());
    std::puts(all_good ? "all right" : "WRONG RESULTS");
    return !all_good;
} catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
}
