// Kernels with mistakes, each of which cuda_on_cpu has to find: planted NAME. Exit status 0 where it didn't.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace fastddpm {
namespace {

// Every thread writes its number and reads its neighbour's.
__global__ void neighbour(float* out, std::string bug) {
    float* values = shared_memory<float>();
    const int i = threadIdx.x, n = blockDim.x;
    values[bug == "shared memory's end" ? i + 1 : i] = static_cast<float>(i);
    if (bug == "a divergent barrier" ? i < n / 2 : bug != "a missing barrier") __syncthreads();
    const float next = values[(i + 1) % n];
    if (bug == "a collective without a lane" && i % 32 == 7) return;
    const float sum = bug == "memory nobody wrote" ? values[n] : __shfl_xor_sync(0xffffffffu, next, 1);
    out[bug == "an array's end" ? i + n : i] = next + sum;
}

}  // namespace
}  // namespace fastddpm

int main(int, char** words) try {
    using namespace fastddpm;
    const std::string bug = words[1];
    std::vector<float> first(64), again(64);
    for (std::vector<float>* out : {&first, &again}) {
        setenv("CUDA_ON_CPU_SEED", out == &first ? "0" : "3", 1);
        launch(neighbour, 1, 64, 1, (64 + (bug == "memory nobody wrote")) * sizeof(float), nullptr, out->data(), bug);
    }
    const bool same = first == again;  // which NaNs are not
    std::puts(same ? "the same twice" : "not the same twice");
    return !same;
} catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
}
