// Kernels with deliberate mistakes that cuda_on_cpu must detect. Usage: planted NAME. The exit status is 0 if it did not.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace fastddpm {
namespace {

// Every thread writes its number, and reads the numbers of its neighbour and of a thread in the cluster's other block.
__global__ void neighbour(float* out, std::string bug) {
    float* values = shared_memory<float>();
    const int i = threadIdx.x, n = blockDim.x, at = blockIdx.x * n + i;
    values[bug == "shared memory's end" ? i + 1 : i] = static_cast<float>(at);
    if (bug == "a divergent barrier" ? i < n / 2 : bug != "a missing barrier") __syncthreads();
    float sum = values[(i + 1) % n];
    if (bug == "a collective without a lane" && i % 32 == 7) return;
    sum += bug == "memory nobody wrote" ? values[n] : __shfl_xor_sync(0xffffffffu, sum, 1);
    if (bug == "an arrival without a fence")
        cluster_arrive_relaxed();
    else
        cluster_arrive();
    if (bug != "a missing cluster barrier") cluster_wait();
    sum += *peer_shared(values + i, 1 - blockIdx.x);
    cluster_arrive();
    if (bug == "a block gone too early")
        sum += *peer_shared(values + i, 1 - blockIdx.x);
    else
        cluster_wait();
    out[bug == "an array's end" ? at + n : at] = sum;
}

}  // namespace
}  // namespace fastddpm

int main(int, char** words) try {
    using namespace fastddpm;
    const std::string bug = words[1];
    std::vector<float> first;
    bool same = true;
    for (int seed = 0; seed < 6; ++seed) {
        setenv("CUDA_ON_CPU_SEED", std::to_string(seed).c_str(), 1);
        std::vector<float> out(128);
        launch(neighbour, 2, 64, 2, (64 + (bug == "memory nobody wrote")) * sizeof(float), nullptr, out.data(), bug);
        if (seed == 0) first = out;
        same &= first == out;  // false for NaN
    }
    std::puts(same ? "always the same" : "not always the same");
    return !same;
} catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
}
