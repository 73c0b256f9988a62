// The complete native interface. Kernels take raw pointers, sizes and layouts, and include no torch or Python headers.
// bindings.cpp fills these structs from checked buffers, and kernels do not check them again. All pointers refer to memory of
// the host or CUDA device that runs the kernel, unless a field's comment specifies otherwise.
//
// Layouts: a tensor [samples, channels, pixels] is either contiguous (pixels run fastest, "NCHW") or
// channels_last (channels run fastest, "NHWC"), always dense.
#pragma once

#include <cstdint>
#ifdef FASTDDPM_CUDA
#include <string>
#endif

namespace fastddpm {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// The device and stream of a CUDA launch. Launches are asynchronous.
struct CudaPlace {
    int device;
    void* stream;  // a cudaStream_t
};

// Per-channel vector: [channels] (sample_stride = 0) or [samples, channels] (sample_stride = channels).
struct ChannelVector {
    const void* data = nullptr;  // null: absent
    Dtype dtype = Dtype::float32;
    int64_t sample_stride = 0;
};

// out[i, e] = the e-th standard normal of (seed, stream, t_i, sample_i); see common/philox.h.
struct PhiloxNormalArgs {
    float* out;  // [samples, elements], elements in C*H*W order
    int64_t samples;
    int64_t elements;
    uint64_t seed;
    uint32_t stream;
    const int64_t* t;  // [samples], or null: t_all for every sample
    int64_t t_all;
    const int64_t* sample;  // [samples], or null: first + i
    int64_t first;
    int threads;  // here and below: number of threads of the CPU kernels
};

// One reverse step with the row that state points at (a, b, c0, c1, c2, d, sigma, lv_lo, lv_hi):
//   x0     = clamp(a*x + b*o, -clip, clip)            NaN is preserved
//   x_prev = c0*x0 + c1*x + c2*x0_last + d*o + sigma*exp((f*lv_hi + (1-f)*lv_lo)/2)*z,  f = (v+1)/2
// v is the second half of o's channels. It is read only if o has 2*channels and (lv_lo, lv_hi) != (0, 0).
// Terms with coefficient 0 are not read.
struct DdpmStepArgs {
    const float* x;        // [samples, channels, pixels]
    float* x_prev;         // same; may be x itself (in place)
    bool x_channels_last;  // layout of x, x_prev, x0, x0_last and noise
    const void* o;         // [samples, o_channels, pixels]
    Dtype o_dtype;
    bool o_channels_last;
    const float* x0_last;  // null if every row has c2 = 0; may be x0 itself
    float* x0;             // null: not stored
    void* next_input;      // null: not stored; x_prev in the network's dtype and layout
    Dtype next_dtype;
    bool next_channels_last;
    const float* noise;  // null: the kernel draws it from Philox stream 1
    int64_t samples;
    int64_t channels;
    int64_t o_channels;  // channels or 2*channels
    int64_t pixels;
    const float* rows;         // [S, 9]
    const int64_t* timesteps;  // [S]
    int64_t table_rows;        // S
    int64_t* state;            // (seed's bits, first, row index, first bad row or -1); row index advances by one
    bool table_on_host;        // CUDA: rows, timesteps and state are host memory, read by the call and not written
    bool clip;
    float clip_bound;
    int threads;
};

// y = act(((x + add - mean) * rstd * weight + bias) * (1 + scale) + shift), act = SiLU or identity.
struct GroupNormSiluArgs {
    const void* x;  // [samples, channels, pixels]
    void* y;        // same layout
    Dtype dtype;    // of x and y
    bool channels_last;
    int64_t samples;
    int64_t channels;
    int64_t pixels;
    int64_t groups;
    ChannelVector weight, bias;       // [channels]
    ChannelVector add, scale, shift;  // optional
    float eps;
    bool silu;
    // [samples, groups]: the mean of (x + add) minus its group's first element, so that a large mean costs no accuracy.
    float* mean;
    float* rstd;  // [samples, groups]
    // CPU: if not null, (h, a, b) [3, samples, channels] with y = act((x + h) * a + b), instead of y, mean and rstd.
    float* coefficients;
    float* workspace;  // CUDA: group_norm_silu_workspace() floats
    int threads;
};

// With z the value before the activation and g = dL/dz (SiLU recomputed from x):
//   sum_g[n, c] = sum_p g,   sum_g_xhat[n, c] = sum_p g*xhat,   sum_dx[n, c] = sum_p dx
// The caller computes the gradients of weight, bias, scale, shift and add from them. No atomics: reruns are bit-identical.
struct GroupNormSiluBackwardArgs {
    const void* dy;  // layout and dtype of x
    const void* x;
    void* dx;
    Dtype dtype;
    bool channels_last;
    int64_t samples;
    int64_t channels;
    int64_t pixels;
    int64_t groups;
    ChannelVector weight, bias, add, scale, shift;
    bool silu;
    const float* mean;  // as the forward stored it, relative to the group's first element
    const float* rstd;
    float* sum_g;       // [samples, channels]
    float* sum_g_xhat;  // [samples, channels]
    float* sum_dx;      // [samples, channels]
    float* workspace;   // CUDA: group_norm_silu_backward_workspace() floats
    int threads;
};

// out[i, :] = [sin(t_i f), cos(t_i f), 0 if dim is odd] (cos first if flipped), f_k = exp(-rate * k).
struct TimestepEmbeddingArgs {
    float* out;            // [count, dim]
    const int64_t* t_int;  // [count], or null
    const float* t_float;  // [count], or null
    int64_t count;
    int64_t dim;
    double rate;
    bool flip_sin_to_cos;
    int threads;
};

// y = w * x + bias + residual: a 3x3 convolution, stride 1, padding 1, by Winograd's F(2x2, 3x3), in channels_last.
// In float32, or in bfloat16 if winograd_serves returns true. With bfloat16, x and y may each still be float32.
struct WinogradArgs {
    const void* x;  // [samples, height, width, channels], sides even, channels divisible by 32
    bool upsample;  // w * x2 instead, x2 being x upsampled by 2 (nearest); x: [samples, height/2, width/2, channels]
    void* y;        // [samples, height, width, outputs], outputs divisible by 32
    const void* residual;       // like y, may be y; null: 0
    Dtype dtype;                // of the products and weights
    Dtype x_dtype, y_dtype;     // y_dtype is also the residual's
    const float* coefficients;  // of group_norm_silu; if not null, the convolution is that of silu((x + h) * a + b)
    const void* weights;        // as winograd_weights stored them
    const float* bias;          // [outputs]; null: 0
    int64_t samples;
    int64_t height;
    int64_t width;
    int64_t channels;
    int64_t outputs;
    int threads;
};

// The transformed weights of the convolution above, in an order that depends on the instruction set.
struct WinogradWeightsArgs {
    const float* weight;  // [outputs, channels, 3, 3]
    void* packed;         // [16 * outputs * channels], with upsample 9 * outputs * channels
    bool upsample;
    Dtype dtype;  // of packed
    int64_t outputs;
    int64_t channels;
    int threads;
};

void philox_normal_cpu(const PhiloxNormalArgs&);
void ddpm_step_cpu(const DdpmStepArgs&);
void group_norm_silu_cpu(const GroupNormSiluArgs&);
void group_norm_silu_backward_cpu(const GroupNormSiluBackwardArgs&);
void timestep_embedding_cpu(const TimestepEmbeddingArgs&);
void winograd_cpu(const WinogradArgs&);
void winograd_weights_cpu(const WinogradWeightsArgs&);
bool winograd_serves(Dtype);

#ifdef FASTDDPM_CUDA
// Each function launches on `place` and throws std::runtime_error if CUDA reports an error. All may be captured in a graph.
void philox_normal_cuda(const PhiloxNormalArgs&, CudaPlace);
void ddpm_step_cuda(const DdpmStepArgs&, CudaPlace);
void group_norm_silu_cuda(const GroupNormSiluArgs&, CudaPlace);
void group_norm_silu_backward_cuda(const GroupNormSiluBackwardArgs&, CudaPlace);
void timestep_embedding_cuda(const TimestepEmbeddingArgs&, CudaPlace);

// The number of workspace floats that a call with these sizes needs on this device. 0 for most.
int64_t group_norm_silu_workspace(const GroupNormSiluArgs&, int device);
int64_t group_norm_silu_backward_workspace(const GroupNormSiluBackwardArgs&, int device);

// Empty if the CUDA kernels work on this device, else the reason why not. Draws one noise element to test it.
std::string cuda_self_test(int device);
#endif

// The instruction set that the CPU kernels run on this machine: "avx512", "avx2" or "generic".
const char* cpu_variant();

}  // namespace fastddpm
