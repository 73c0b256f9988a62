// The self-test of the CUDA kernels on a device.
#include <cmath>

#include "device.cuh"

namespace fastddpm {

void load_philox_normal();
void load_ddpm_step();
void load_group_norm_silu();
void load_group_norm_silu_backward();
void load_timestep_embedding();

namespace {

// Separate memory and a separate stream, because the caller's stream may be capturing a graph.
struct Scratch {
    float* memory = nullptr;
    cudaStream_t stream = nullptr;

    ~Scratch() {
        cudaFree(memory);
        if (stream) cudaStreamDestroy(stream);
    }
};

}  // namespace

std::string cuda_self_test(int device) try {
    DeviceScope scope(device);
    // Load the kernels now, because their first launch may be inside a graph's capture.
    load_philox_normal();
    load_ddpm_step();
    load_group_norm_silu();
    load_group_norm_silu_backward();
    load_timestep_embedding();
    Scratch scratch;
    check(cudaStreamCreateWithFlags(&scratch.stream, cudaStreamNonBlocking), "making a stream");
    check(cudaMalloc(reinterpret_cast<void**>(&scratch.memory), sizeof(float)), "allocating 4 bytes");
    PhiloxNormalArgs args{};
    args.out = scratch.memory;
    args.samples = args.elements = 1;
    philox_normal_cuda(args, {device, scratch.stream});
    float drawn = 0.0f;
    check(cudaMemcpyAsync(&drawn, scratch.memory, sizeof drawn, cudaMemcpyDeviceToHost, scratch.stream),
          "reading a result");
    check(cudaStreamSynchronize(scratch.stream), "running a kernel");
    const float expected = 0.991137680f;  // element 0 of sample 0, seed 0, t 0, stream 0
    if (!(std::fabs(drawn - expected) < 4e-6f))
        return "the first noise element is " + std::to_string(drawn) + " and should be " + std::to_string(expected);
    return "";
} catch (const std::exception& error) {
    return error.what();
}

}  // namespace fastddpm
