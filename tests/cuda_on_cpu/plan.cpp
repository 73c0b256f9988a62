// Prints how the host code of the CUDA kernels splits work, without running the kernels. Each line of stdin is a case, "op
// samples channels pixels", in bfloat16, channels_last, with 32 groups, as the networks call it. Each line of stdout is a
// launch, "line kernel blocks threads cluster shared". kernel is its address in this file; `nm` gives the name.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <string>

#include "kernels.h"

extern "C" const char __executable_start;

using namespace fastddpm;

namespace {

int line = 0;

void print(const void* kernel, int64_t blocks, int threads, int cluster, size_t shared) {
    std::printf("%d %tx %" PRId64 " %d %d %zu\n", line, static_cast<const char*>(kernel) - &__executable_start, blocks,
                threads, cluster, shared);
}

// Only the alignment of the pointers is used.
template <class T>
T* somewhere() {
    return reinterpret_cast<T*>(uintptr_t{1} << 12);
}

template <class Args>
Args norm(int64_t samples, int64_t channels, int64_t pixels) {
    Args args{};
    args.x = somewhere<void>();
    args.dtype = Dtype::bfloat16, args.channels_last = args.silu = true;
    args.samples = samples, args.channels = channels, args.pixels = pixels, args.groups = 32;
    return args;
}

void plan(const std::string& op, int64_t samples, int64_t channels, int64_t pixels) {
    const CudaPlace place{0, nullptr};
    if (op == "group_norm_silu") {
        group_norm_silu_cuda(norm<GroupNormSiluArgs>(samples, channels, pixels), place);
    } else if (op == "group_norm_silu_backward") {
        group_norm_silu_backward_cuda(norm<GroupNormSiluBackwardArgs>(samples, channels, pixels), place);
    } else if (op == "ddpm_step_") {
        DdpmStepArgs args{};
        args.samples = samples, args.channels = args.o_channels = channels, args.pixels = pixels;
        args.x = somewhere<float>(), args.x_prev = somewhere<float>(), args.o = somewhere<void>();
        args.o_dtype = args.next_dtype = Dtype::bfloat16, args.o_channels_last = args.next_channels_last = true;
        args.next_input = somewhere<void>();
        ddpm_step_cuda(args, place);
    } else if (op == "philox_normal") {
        PhiloxNormalArgs args{};
        args.out = somewhere<float>(), args.samples = samples, args.elements = channels * pixels;
        philox_normal_cuda(args, place);
    } else if (op == "timestep_embedding") {
        TimestepEmbeddingArgs args{};
        args.out = somewhere<float>(), args.t_int = somewhere<int64_t>(), args.count = samples, args.dim = channels;
        timestep_embedding_cuda(args, place);
    } else {
        throw std::runtime_error("line " + std::to_string(line) + ": there is no op " + op);
    }
}

}  // namespace

int main() try {
    sim::planned = print;
    std::string op;
    for (int64_t samples, channels, pixels; std::cin >> op >> samples >> channels >> pixels; ++line)
        plan(op, samples, channels, pixels);
} catch (const std::exception& error) {
    std::fprintf(stderr, "plan: %s\n", error.what());
    return 1;
}
