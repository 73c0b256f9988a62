// Runs CUDA device code on a CPU: g++ -x c++ -include cuda_on_cpu.h kernel.cu, with CUDA's own headers for the types.
//
// Each CUDA thread is a fiber. The blocks of a cluster run concurrently, and clusters run one after another. A fiber runs
// until it reaches a barrier or a warp collective. CUDA_ON_CPU_SEED shuffles the order of the fibers, so that a kernel with a
// race returns different results for different seeds. Shared memory is filled with NaNs at first, lies between fences for the
// address sanitizer, and ends with its block. A deadlock throws an exception that names the waiting thread.
//
// Kernels use only launch(), shared_memory<T>(), peer_shared(), cluster_arrive(), cluster_arrive_relaxed() and cluster_wait() of
// csrc/cuda/device.cuh, which this header implements. They use no inline PTX, no textures and no cp.async, and do not wait for
// another block outside a cluster.
//
// The environment variables CUDA_ON_CPU_{SEED,SMS,MAJOR,L2} set the order (0: by index), and the number of multiprocessors, the
// major compute capability and the bytes of L2 that the simulated device reports.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The host code checks the launch bounds of its kernels.
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace sim {

inline long setting(const char* name, long otherwise) {
    const char* value = std::getenv(name);
    return value && *value ? std::strtol(value, nullptr, 10) : otherwise;
}

enum class State { runs, at_block, at_cluster, at_warp, done };

struct Slot {
    unsigned char bytes[16];
};

struct Block {
    uint3 index;
    std::unique_ptr<char[]> shared;
    size_t size;
    bool gone;
    std::vector<Slot> slots[2];  // the values that the threads exchange within their warps
};

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf jump;
    void* fake_stack = nullptr;
    bool started = false;
    State state = State::runs;
    uint3 thread;
    Block* block = nullptr;
    int linear = 0;
    unsigned mask = 0;
    int parity = 0;
    int arrivals = 0;      // at the cluster's barrier
    bool relaxed = false;  // the last arrival had no fence
};

constexpr size_t kStack = 256 * 1024;
inline dim3 grid, block;
inline Fiber* me = nullptr;
inline Fiber host;  // the scheduler, on the caller's stack
inline std::vector<Block> blocks;
inline std::deque<Fiber> fibers;  // reused by later launches, because of their stacks
inline int live = 0;
inline const std::function<void()>* body = nullptr;
inline std::exception_ptr failure;

// If set, it is called instead of running a launch. plan.cpp uses it to find out how work is split.
inline void (*planned)(const void* kernel, int64_t grid, int block, int cluster, size_t shared) = nullptr;

// Switches by longjmp after both sides have started, because swapcontext makes a system call for the signal mask. The address
// sanitizer must be notified of every switch.
inline void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    static const void* host_bottom = nullptr;
    static size_t host_size = 0;
    if (&to == &host) {
        bottom = host_bottom, size = host_size;
    } else {
        bottom = to.stack.get(), size = kStack;
    }
    __sanitizer_start_switch_fiber(from.state == State::done ? nullptr : &from.fake_stack, bottom, size);
    swapcontext(&from.context, &to.context);
    if (&from == &host)
        __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
    else
        __sanitizer_finish_switch_fiber(from.fake_stack, &host_bottom, &host_size);
#else
    if (_setjmp(from.jump)) return;
    if (to.started || &to == &host) _longjmp(to.jump, 1);
    to.started = true;
    setcontext(&to.context);
#endif
}

inline void wait(State state, unsigned mask = 0) {
    me->state = state;
    me->mask = mask;
    change(*me, host);
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    try {
        (*body)();
    } catch (...) {
        failure = std::current_exception();
    }
    me->state = State::done;
    change(*me, host);
}

inline bool all(int first, int count, State state) {
    for (int i = first; i < first + count; ++i)
        if (fibers[i].state != state) return false;
    return true;
}

inline void resume(int first, int count) {
    for (int i = first; i < first + count; ++i) fibers[i].state = State::runs;
}

// Releases every group of threads that has completely arrived. Returns false if there is none.
inline bool release() {
    const int threads = static_cast<int>(block.x);
    bool any = false;
    int arrivals = INT32_MAX;  // minimum over the blocks
    for (int i = 0; i < live; ++i) arrivals = std::min(arrivals, fibers[i].arrivals);
    for (int i = 0; i < live; ++i)
        if (fibers[i].state == State::at_cluster && fibers[i].arrivals <= arrivals) resume(i, 1), any = true;
    for (int first = 0; first < live; first += threads) {
        Block& done = blocks[first / threads];
        if (!done.gone && all(first, threads, State::done)) {
            std::memset(done.shared.get(), 0xff, done.size);  // a peer that still reads it reads NaNs
            done.gone = true;
        }
        if (all(first, threads, State::at_block)) resume(first, threads), any = true;
        for (int w = first; w < first + threads; w += 32) {
            const int lanes = std::min(32, first + threads - w);
            for (int l = 0; l < lanes; ++l) {
                const Fiber& fiber = fibers[w + l];
                if (fiber.state != State::at_warp) continue;
                const unsigned mask = fiber.mask;
                bool whole = lanes == 32 || mask >> lanes == 0;
                for (int i = 0; whole && i < lanes; ++i)
                    if (mask >> i & 1) whole = fibers[w + i].state == State::at_warp && fibers[w + i].mask == mask;
                if (!whole) continue;
                for (int i = 0; i < lanes; ++i)
                    if (mask >> i & 1) fibers[w + i].state = State::runs;
                any = true;
            }
        }
    }
    return any;
}

// Runs every ready thread of the blocks that do not sleep to its next barrier. Returns whether there was one.
inline bool run(const std::vector<int>& order, const std::vector<bool>& sleeps) {
    bool any = false;
    for (int i : order) {
        if (fibers[i].state != State::runs || sleeps[i / block.x]) continue;
        me = &fibers[i];
        change(host, fibers[i]);
        if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
        any = true;
    }
    return any;
}

constexpr size_t kFence = 4096;

inline void launch(int64_t blocks_of_grid, int threads, int cluster, size_t shared, const std::function<void()>& f) {
    if (blocks_of_grid < 1 || blocks_of_grid > INT32_MAX || threads < 1 || threads > 1024 || cluster < 1 ||
        cluster > 16 || blocks_of_grid % cluster || shared > 48 * 1024)
        throw std::runtime_error("cuda_on_cpu: invalid launch: " + std::to_string(blocks_of_grid) + " blocks of " +
                                 std::to_string(threads) + ", clusters of " + std::to_string(cluster) + ", " +
                                 std::to_string(shared) + " bytes of shared memory");
    grid = dim3(static_cast<unsigned>(blocks_of_grid)), block = dim3(threads), body = &f;
    const long seed = setting("CUDA_ON_CPU_SEED", 0);
    std::mt19937 random(static_cast<unsigned>(seed));
    live = cluster * threads;
    if (fibers.size() < size_t(live)) fibers.resize(live);
    std::vector<int> order(live);
    for (int i = 0; i < live; ++i) order[i] = i;
    for (int64_t first = 0; first < blocks_of_grid; first += cluster) {
        blocks.clear();
        blocks.resize(cluster);
        for (int r = 0; r < cluster; ++r) {
            Block& b = blocks[r];
            b.index = {static_cast<unsigned>(first + r), 0, 0}, b.size = shared, b.gone = false;
            b.shared.reset(new char[shared + kFence]);
            std::memset(b.shared.get(), 0xff, shared + kFence);  // a NaN in every format
#if defined(__SANITIZE_ADDRESS__)
            ASAN_POISON_MEMORY_REGION(b.shared.get() + shared, kFence);
#endif
            for (auto& slots : b.slots) slots.resize(threads);
            for (int t = 0; t < threads; ++t) {
                Fiber& fiber = fibers[r * threads + t];
                if (!fiber.stack) fiber.stack.reset(new char[kStack]);
                fiber.started = false, fiber.state = State::runs, fiber.fake_stack = nullptr, fiber.parity = 0;
                fiber.arrivals = 0, fiber.relaxed = false;
                fiber.block = &b, fiber.linear = t, fiber.thread = {static_cast<unsigned>(t), 0, 0};
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = kStack;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, entry, 0);
            }
        }
        // In each round some blocks sleep, so that the blocks of a cluster do not run in lockstep.
        std::vector<bool> sleeps(cluster);
        for (bool going = true; going;) {
            if (seed) {
                std::shuffle(order.begin(), order.end(), random);
                for (int r = 0; r < cluster; ++r) sleeps[r] = random() % 2;
            }
            bool ran = run(order, sleeps);
            if (!ran) ran = run(order, std::vector<bool>(cluster));
            going = release() || ran;
        }
        for (int i = 0; i < live; ++i) {
            const State state = fibers[i].state;
            if (state == State::done) continue;
            throw std::runtime_error("cuda_on_cpu: deadlock: block " + std::to_string(fibers[i].block->index.x) +
                                     " thread " + std::to_string(fibers[i].linear) + " waits at a " +
                                     (state == State::at_warp    ? "warp collective"
                                      : state == State::at_block ? "__syncthreads"
                                                                 : "cluster barrier") +
                                     " that others never reach");
        }
#if defined(__SANITIZE_ADDRESS__)
        for (Block& b : blocks) ASAN_UNPOISON_MEMORY_REGION(b.shared.get(), shared + kFence);
#endif
    }
    me = nullptr;
}

// Two alternating slots are sufficient, because no thread can be two exchanges ahead.
template <class T>
T exchange(unsigned mask, T v, int from) {
    static_assert(sizeof(T) <= sizeof(Slot), "");
    std::vector<Slot>& slots = me->block->slots[me->parity ^= 1];
    const int lane = me->linear % 32, warp = me->linear - lane;
    if (!(mask >> lane & 1)) throw std::runtime_error("cuda_on_cpu: a warp collective's caller is not in its own mask");
    std::memcpy(&slots[me->linear], &v, sizeof v);
    wait(State::at_warp, mask);
    if (from >= 0 && from < 32 && mask >> from & 1) std::memcpy(&v, &slots[warp + from], sizeof v);
    return v;
}

}  // namespace sim

#define threadIdx (sim::me->thread)
#define blockIdx (sim::me->block->index)
#define blockDim (sim::block)
#define gridDim (sim::grid)

inline void __syncthreads() { sim::wait(sim::State::at_block); }
inline void __syncwarp(unsigned mask = ~0u) { sim::wait(sim::State::at_warp, mask); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x) {
    return sim::exchange(mask, v, sim::me->linear % 32 ^ x);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int d) {
    const int lane = sim::me->linear % 32;
    return sim::exchange(mask, v, lane + d < 32 ? lane + d : lane);
}
template <class T>
T atomicAdd(T* p, T v) {
    return std::exchange(*p, *p + v);
}
template <class T>
T atomicExch(T* p, T v) {
    return std::exchange(*p, v);
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
    return std::exchange(*p, *p == expected ? v : *p);
}
template <class T>
void __stcg(T* p, T v) {
    *p = v;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f && !std::isinf(b) ? 0.0f : a / b; }

namespace fastddpm {
namespace {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster, size_t shared, void*,
            const Arguments&... arguments) {
    if (sim::planned) return sim::planned(reinterpret_cast<const void*>(kernel), grid, block, cluster, shared);
    sim::launch(grid, block, cluster, shared, [&] { kernel(arguments...); });
}
template <class... Parameters>
int largest_cluster(int, void (*)(Parameters...), int) {
    const long major = sim::setting("CUDA_ON_CPU_MAJOR", 9);
    return major < 9 ? 1 : major <= 10 ? 16 : 8;
}
template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(sim::me->block->shared.get());
}
template <class T>
T* peer_shared(T* p, int rank) {
    if (sim::me->relaxed)
        throw std::runtime_error("cuda_on_cpu: block " + std::to_string(sim::me->block->index.x) + " thread " +
                                 std::to_string(sim::me->linear) + " reads its cluster's memory after an arrival " +
                                 "without a fence");
    char* const mine = sim::me->block->shared.get();
    return reinterpret_cast<T*>(sim::blocks.at(rank).shared.get() + (reinterpret_cast<char*>(p) - mine));
}
inline void cluster_arrive() { ++sim::me->arrivals, sim::me->relaxed = false; }
inline void cluster_arrive_relaxed() { ++sim::me->arrivals, sim::me->relaxed = true; }
inline void cluster_wait() { sim::wait(sim::State::at_cluster); }

}  // namespace
}  // namespace fastddpm

// ---- the functions of the CUDA runtime that the kernels' host code calls ----

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of cuda_on_cpu"; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            return *value = sim::setting("CUDA_ON_CPU_SMS", 132), cudaSuccess;
        case cudaDevAttrL2CacheSize:
            return *value = sim::setting("CUDA_ON_CPU_L2", 1 << 20), cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            return *value = sim::setting("CUDA_ON_CPU_MAJOR", 9), cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
    return kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
inline cudaError_t cudaMalloc(void** p, size_t size) { return *p = std::malloc(size), cudaSuccess; }
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
    if (size) std::memcpy(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    if (size) std::memcpy(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
