// The Python module fastddpm._C. Only this file depends on Python. A tensor is passed as a tuple (data_ptr, dtype code, numel)
// or None. `place` specifies the memory and the kernel's launch: the number of threads for the CPU, or (CUDA device index,
// address of the stream). Sizes and types are checked again here, and kernels do not check them. The GIL is released while a
// kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace fastddpm {
namespace {

constexpr int kInt64 = 3;  // the code after those of Dtype
const char* const kDtypeNames[] = {"float32", "bfloat16", "float16", "int64"};

struct Buffer {
    const char* name;
    void* data = nullptr;
    int dtype = 0;
    int64_t numel = 0;
    bool present = false;

    Buffer(const char* name, const py::object& argument) : name(name) {
        if (argument.is_none()) return;
        PyObject* tuple = argument.ptr();
        if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 3)
            throw py::type_error(std::string(name) + " must be a tuple (data_ptr, dtype, numel) or None");
        data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
        dtype = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, 1)));
        numel = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, 2));
        if (PyErr_Occurred()) throw py::error_already_set();
        if (dtype < 0 || dtype > kInt64) throw py::type_error(std::string(name) + " has an unknown dtype code");
        if (numel < 0 || (numel > 0 && !data)) throw py::value_error(std::string(name) + " has no data");
        present = true;
    }

    Buffer& required() {
        if (!present) throw py::type_error(std::string(name) + " is required");
        return *this;
    }
    Buffer& size(int64_t expected) {
        if (present && numel != expected)
            throw py::value_error(std::string(name) + " has " + std::to_string(numel) + " elements, expected " +
                                  std::to_string(expected));
        return *this;
    }
    Buffer& type(int expected) {
        if (present && dtype != expected)
            throw py::type_error(std::string(name) + " must be " + kDtypeNames[expected] + ", is " +
                                 kDtypeNames[dtype]);
        return *this;
    }
    Buffer& floating() {
        if (present && dtype == kInt64) throw py::type_error(std::string(name) + " must be of a floating dtype");
        return *this;
    }

    float* floats() { return static_cast<float*>(type(0).data); }
    int64_t* int64s() { return static_cast<int64_t*>(type(kInt64).data); }
    Dtype code() const { return static_cast<Dtype>(dtype); }
};

void check(bool ok, const char* message) {
    if (!ok) throw py::value_error(message);
}

struct Place {
    int threads = 1;
    bool on_cuda = false;
    CudaPlace cuda{};

    explicit Place(const py::object& place) {
        if (py::isinstance<py::int_>(place)) {
            threads = place.cast<int>();
            check(threads >= 1, "threads must be at least 1");
            return;
        }
        const auto [device, stream] = place.cast<std::pair<int, uintptr_t>>();
#ifndef FASTDDPM_CUDA
        throw py::value_error("fastddpm was built without CUDA kernels");
#endif
        on_cuda = true;
        cuda = {device, reinterpret_cast<void*>(stream)};
    }
};

// Calls <op>_cpu or <op>_cuda.
#ifdef FASTDDPM_CUDA
#define FASTDDPM_CALL(op, args, place)     \
    do {                                   \
        py::gil_scoped_release release;    \
        if ((place).on_cuda)               \
            op##_cuda(args, (place).cuda); \
        else                               \
            op##_cpu(args);                \
    } while (false)
#else
#define FASTDDPM_CALL(op, args, place)  \
    do {                                \
        py::gil_scoped_release release; \
        op##_cpu(args);                 \
    } while (false)
#endif

// The product of sizes. Throws if it overflows int64.
template <class... Rest>
int64_t product(int64_t first, Rest... rest) {
    int64_t result = first;
    bool overflow = first < 0;
    for (int64_t size : {static_cast<int64_t>(rest)...})
        overflow |= size < 0 || __builtin_mul_overflow(result, size, &result);
    check(!overflow, "sizes must not be negative, nor their product beyond int64");
    return result;
}

ChannelVector channel_vector(Buffer buffer, int64_t samples, int64_t channels) {
    ChannelVector vector;
    if (!buffer.present) return vector;
    buffer.floating();
    bool per_sample = buffer.numel != channels;
    if (per_sample) buffer.size(product(samples, channels));
    vector.data = buffer.data;
    vector.dtype = buffer.code();
    vector.sample_stride = per_sample ? channels : 0;
    return vector;
}

void philox_normal(const py::object& out_, int64_t samples, int64_t elements, uint64_t seed, int64_t stream,
                   const py::object& t_, int64_t t_all, const py::object& sample_, int64_t first,
                   const py::object& place_) {
    Buffer out("out", out_), t("t", t_), sample("sample", sample_);
    const Place place(place_);
    check(stream >= 0 && stream < 256, "stream must be in [0, 256)");
    check(t_all >= 0 && t_all < (int64_t{1} << 32), "t must be in [0, 2^32)");
    check(first >= 0, "first must not be negative");
    check(elements < (int64_t{1} << 34), "a sample has at most 2^34 elements");
    PhiloxNormalArgs args{};
    args.out = out.required().size(product(samples, elements)).floats();
    args.samples = samples;
    args.elements = elements;
    args.seed = seed;
    args.stream = static_cast<uint32_t>(stream);
    args.t = t.size(samples).int64s();
    args.t_all = t_all;
    args.sample = sample.size(samples).int64s();
    args.first = first;
    args.threads = place.threads;
    FASTDDPM_CALL(philox_normal, args, place);
}

void ddpm_step(const py::object& x_, const py::object& x_prev_, bool x_channels_last, const py::object& o_,
               bool o_channels_last, const py::object& x0_last_, const py::object& x0_, const py::object& next_input_,
               bool next_channels_last, const py::object& noise_, const py::object& rows_, const py::object& timesteps_,
               const py::object& state_, int64_t samples, int64_t channels, int64_t o_channels, int64_t pixels,
               const py::object& clip, bool table_on_host, const py::object& place_) {
    const Place place(place_);
    Buffer x("x", x_), x_prev("x_prev", x_prev_), o("o", o_), x0_last("x0_last", x0_last_), x0("x0", x0_);
    Buffer next_input("next_input", next_input_), noise("noise", noise_);
    Buffer rows("rows", rows_), timesteps("timesteps", timesteps_), state("state", state_);
    check(o_channels == channels || o_channels == 2 * channels, "o must have as many channels as x, or twice as many");
    const int64_t numel = product(samples, channels, pixels);
    check(numel == 0 || numel / samples < (int64_t{1} << 34), "a sample has at most 2^34 elements");
    DdpmStepArgs args{};
    args.x = x.required().size(numel).floats();
    args.x_prev = x_prev.required().size(numel).floats();
    args.x_channels_last = x_channels_last;
    args.o = o.required().size(product(samples, o_channels, pixels)).floating().data;
    args.o_dtype = o.code();
    args.o_channels_last = o_channels_last;
    args.x0_last = x0_last.size(numel).floats();
    args.x0 = x0.size(numel).floats();
    args.next_input = next_input.size(numel).floating().data;
    args.next_dtype = next_input.code();
    args.next_channels_last = next_channels_last;
    args.noise = noise.size(numel).floats();
    args.samples = samples;
    args.channels = channels;
    args.o_channels = o_channels;
    args.pixels = pixels;
    args.table_rows = timesteps.required().numel;
    args.timesteps = timesteps.int64s();
    args.rows = rows.required().size(product(args.table_rows, 9)).floats();
    args.state = state.required().size(4).int64s();
    args.clip = !clip.is_none();
    args.clip_bound = args.clip ? clip.cast<float>() : 0.0f;
    args.table_on_host = table_on_host || !place.on_cuda;
    args.threads = place.threads;
    if (args.table_on_host) {  // else the kernel checks the row index
        const int64_t row = args.state[2];
        if (row < 0 || row >= args.table_rows)
            throw py::value_error("state points at row " + std::to_string(row) + " of a table of " +
                                  std::to_string(args.table_rows));
        check(args.rows[9 * row + 4] == 0 || args.x0_last, "this row's c2 is not 0, so x0_last is required");
    }
    FASTDDPM_CALL(ddpm_step, args, place);
}

// What the forward and the backward of group_norm_silu have in common.
template <class Args>
void fill_group_norm(Args& args, const py::object& x_, bool channels_last, const py::object& weight,
                     const py::object& bias, const py::object& add, const py::object& scale, const py::object& shift,
                     int64_t samples, int64_t channels, int64_t pixels, int64_t groups, bool silu,
                     const py::object& workspace_, const Place& place) {
    Buffer x("x", x_), workspace("workspace", workspace_);
    check(groups >= 1 && channels % groups == 0, "groups must divide channels");
    args.x = x.required().size(product(samples, channels, pixels)).floating().data;
    args.dtype = x.code();
    args.channels_last = channels_last;
    args.samples = samples;
    args.channels = channels;
    args.pixels = pixels;
    args.groups = groups;
    args.weight = channel_vector(Buffer("weight", weight).required().size(channels), samples, channels);
    args.bias = channel_vector(Buffer("bias", bias).required().size(channels), samples, channels);
    args.add = channel_vector(Buffer("add", add), samples, channels);
    args.scale = channel_vector(Buffer("scale", scale), samples, channels);
    args.shift = channel_vector(Buffer("shift", shift), samples, channels);
    args.silu = silu;
    args.workspace = workspace.floats();
    args.threads = place.threads;
}

#ifdef FASTDDPM_CUDA
void check_workspace(const py::object& given, int64_t needed) {
    Buffer workspace("workspace", given);
    if (needed > 0 && workspace.required().numel < needed)
        throw py::value_error("workspace has " + std::to_string(workspace.numel) + " elements, expected at least " +
                              std::to_string(needed));
}
#endif

void group_norm_silu(const py::object& x, const py::object& y_, bool channels_last, const py::object& mean_,
                     const py::object& rstd_, const py::object& weight, const py::object& bias, const py::object& add,
                     const py::object& scale, const py::object& shift, int64_t samples, int64_t channels,
                     int64_t pixels, int64_t groups, float eps, bool silu, const py::object& workspace,
                     const py::object& place_) {
    const Place place(place_);
    Buffer y("y", y_), mean("mean", mean_), rstd("rstd", rstd_);
    GroupNormSiluArgs args{};
    fill_group_norm(args, x, channels_last, weight, bias, add, scale, shift, samples, channels, pixels, groups, silu,
                    workspace, place);
    args.y = y.required().size(samples * channels * pixels).type(static_cast<int>(args.dtype)).data;
    args.mean = mean.required().size(product(samples, groups)).floats();
    args.rstd = rstd.required().size(product(samples, groups)).floats();
    args.eps = eps;
#ifdef FASTDDPM_CUDA
    if (place.on_cuda) check_workspace(workspace, group_norm_silu_workspace(args, place.cuda.device));
#endif
    FASTDDPM_CALL(group_norm_silu, args, place);
}

// (h, a, b) [3, samples, channels], channels_last, with group_norm_silu(x) = silu((x + h) * a + b).
void group_norm_coefficients(const py::object& x, const py::object& coefficients_, const py::object& weight,
                             const py::object& bias, const py::object& add, const py::object& scale,
                             const py::object& shift, int64_t samples, int64_t channels, int64_t pixels, int64_t groups,
                             float eps, int threads) {
    Buffer coefficients("coefficients", coefficients_);
    GroupNormSiluArgs args{};
    const py::object none = py::none();
    fill_group_norm(args, x, true, weight, bias, add, scale, shift, samples, channels, pixels, groups, true, none,
                    Place(py::int_(threads)));
    args.coefficients = coefficients.required().size(product(3, samples, channels)).floats();
    args.eps = eps;
    py::gil_scoped_release release;
    group_norm_silu_cpu(args);
}

void group_norm_silu_backward(const py::object& dy_, const py::object& x, const py::object& dx_, bool channels_last,
                              const py::object& mean_, const py::object& rstd_, const py::object& weight,
                              const py::object& bias, const py::object& add, const py::object& scale,
                              const py::object& shift, const py::object& sum_g_, const py::object& sum_g_xhat_,
                              const py::object& sum_dx_, int64_t samples, int64_t channels, int64_t pixels,
                              int64_t groups, bool silu, const py::object& workspace, const py::object& place_) {
    const Place place(place_);
    Buffer dy("dy", dy_), dx("dx", dx_), mean("mean", mean_), rstd("rstd", rstd_);
    Buffer sum_g("sum_g", sum_g_), sum_g_xhat("sum_g_xhat", sum_g_xhat_), sum_dx("sum_dx", sum_dx_);
    GroupNormSiluBackwardArgs args{};
    fill_group_norm(args, x, channels_last, weight, bias, add, scale, shift, samples, channels, pixels, groups, silu,
                    workspace, place);
    const int64_t numel = samples * channels * pixels;
    const int dtype = static_cast<int>(args.dtype);
    args.dy = dy.required().size(numel).type(dtype).data;
    args.dx = dx.required().size(numel).type(dtype).data;
    args.mean = mean.required().size(product(samples, groups)).floats();
    args.rstd = rstd.required().size(product(samples, groups)).floats();
    args.sum_g = sum_g.required().size(product(samples, channels)).floats();
    args.sum_g_xhat = sum_g_xhat.required().size(product(samples, channels)).floats();
    args.sum_dx = sum_dx.required().size(product(samples, channels)).floats();
#ifdef FASTDDPM_CUDA
    if (place.on_cuda) check_workspace(workspace, group_norm_silu_backward_workspace(args, place.cuda.device));
#endif
    FASTDDPM_CALL(group_norm_silu_backward, args, place);
}

#ifdef FASTDDPM_CUDA
// Floats of workspace that a call of group_norm_silu, or its backward, needs, wherever x lies. x: its buffer, for the
// dtype.
int64_t norm_workspace(bool backward, const py::object& x_, bool channels_last, int64_t samples, int64_t channels,
                       int64_t pixels, int64_t groups, int device) {
    Buffer x("x", x_);
    auto fill = [&](auto args) {
        args.dtype = x.required().floating().code();
        args.channels_last = channels_last;
        args.samples = samples;
        args.channels = channels;
        args.pixels = pixels;
        args.groups = groups;
        return args;
    };
    return backward ? group_norm_silu_backward_workspace(fill(GroupNormSiluBackwardArgs{}), device)
                    : group_norm_silu_workspace(fill(GroupNormSiluArgs{}), device);
}
#endif

void timestep_embedding(const py::object& out_, const py::object& t_, int64_t count, int64_t dim, double rate,
                        bool flip, const py::object& place_) {
    const Place place(place_);
    Buffer out("out", out_), t("t", t_);
    check(dim >= 2, "dim must be at least 2");
    TimestepEmbeddingArgs args{};
    args.out = out.required().size(product(count, dim)).floats();
    t.required().size(count);
    if (t.dtype == kInt64)
        args.t_int = t.int64s();
    else
        args.t_float = t.floats();
    args.count = count;
    args.dim = dim;
    args.rate = rate;
    args.flip_sin_to_cos = flip;
    args.threads = place.threads;
    FASTDDPM_CALL(timestep_embedding, args, place);
}

void check_winograd(int64_t channels, int64_t outputs, int dtype, int threads) {
    check(channels > 0 && outputs > 0 && channels % 32 == 0 && outputs % 32 == 0,
          "channels and outputs must be divisible by 32, and not 0");
    if (!winograd_serves(static_cast<Dtype>(dtype)))
        throw py::type_error("this processor has no Winograd convolution in that dtype");
    check(threads >= 1, "threads must be at least 1");
}

void winograd(const py::object& x_, const py::object& coefficients_, const py::object& weights_,
              const py::object& bias_, const py::object& residual_, const py::object& y_, bool upsample,
              int64_t samples, int64_t height, int64_t width, int64_t channels, int64_t outputs, int threads) {
    Buffer x("x", x_), weights("weights", weights_), bias("bias", bias_), residual("residual", residual_), y("y", y_);
    Buffer coefficients("coefficients", coefficients_);
    check_winograd(channels, outputs, weights.required().dtype, threads);
    check(height > 0 && width > 0 && height % 2 == 0 && width % 2 == 0, "height and width must be even, and not 0");
    for (Buffer* v : {&x, &y})  // float32, or the products' dtype
        if (v->required().dtype != 0) v->type(weights.dtype);
    const int shrink = upsample ? 2 : 1;
    WinogradArgs args{};
    args.x = x.size(product(samples, height / shrink, width / shrink, channels)).data;
    args.x_dtype = x.code();
    args.y_dtype = y.code();
    args.coefficients = coefficients.size(product(3, samples, channels)).floats();
    args.upsample = upsample;
    args.weights = weights.size(product(upsample ? 9 : 16, outputs, channels)).data;
    args.bias = bias.size(outputs).floats();
    args.y = y.size(product(samples, height, width, outputs)).data;
    args.residual = residual.type(y.dtype).size(y.numel).data;
    args.dtype = weights.code();
    args.samples = samples;
    args.height = height;
    args.width = width;
    args.channels = channels;
    args.outputs = outputs;
    args.threads = threads;
    py::gil_scoped_release release;
    winograd_cpu(args);
}

void winograd_weights(const py::object& weight_, const py::object& packed_, bool upsample, int64_t outputs,
                      int64_t channels, int threads) {
    Buffer weight("weight", weight_), packed("packed", packed_);
    check_winograd(channels, outputs, packed.required().dtype, threads);
    WinogradWeightsArgs args{};
    args.weight = weight.required().size(product(9, outputs, channels)).floats();
    args.packed = packed.size(product(upsample ? 9 : 16, outputs, channels)).data;
    args.upsample = upsample;
    args.dtype = packed.code();
    args.outputs = outputs;
    args.channels = channels;
    args.threads = threads;
    py::gil_scoped_release release;
    winograd_weights_cpu(args);
}

py::dict build_info() {
    py::dict info;
    info["version"] = FASTDDPM_VERSION;
    info["compiler"] = FASTDDPM_COMPILER;
    info["openmp"] = FASTDDPM_OPENMP != 0;
    info["cpu_variants"] = py::str(FASTDDPM_CPU_VARIANTS).attr("split")();
    info["cuda"] = *FASTDDPM_CUDA_REASON == '\0';
    info["cuda_reason"] = FASTDDPM_CUDA_REASON;
    info["cuda_compiler"] = FASTDDPM_CUDA_COMPILER;
    info["cuda_archs"] = py::str(FASTDDPM_CUDA_ARCHS).attr("split")();
    return info;
}

}  // namespace
}  // namespace fastddpm

#ifndef FASTDDPM_MODULE
#define FASTDDPM_MODULE _C
#endif

PYBIND11_MODULE(FASTDDPM_MODULE, module) {
    using namespace fastddpm;
    module.def("philox_normal", &philox_normal);
    module.def("ddpm_step", &ddpm_step);
    module.def("group_norm_silu", &group_norm_silu);
    module.def("group_norm_coefficients", &group_norm_coefficients);
    module.def("group_norm_silu_backward", &group_norm_silu_backward);
    module.def("timestep_embedding", &timestep_embedding);
    module.def("winograd", &winograd);
    module.def("winograd_weights", &winograd_weights);
    module.def("winograd_serves", [](const char* dtype) {
        for (int code : {0, 1})
            if (std::string(dtype) == kDtypeNames[code]) return winograd_serves(static_cast<Dtype>(code));
        return false;
    });
    module.def("cpu_variant", &cpu_variant);
    module.def("build_info", &build_info);
#ifdef FASTDDPM_CUDA
    module.def("norm_workspace", &norm_workspace);
    module.def("cuda_self_test", &cuda_self_test, py::call_guard<py::gil_scoped_release>());
#endif
}
