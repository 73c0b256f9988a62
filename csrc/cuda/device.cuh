// Shared by the CUDA kernels: launches, clusters and shared memory, device properties, vectors of the three dtypes.
//
// Kernels use only what tests/cuda_on_cpu can run on a CPU: launches through launch(), shared memory through
// shared_memory<T>(), peers of a cluster through the functions below, no inline PTX, and no waiting for another block outside
// the cluster's barrier. They are compiled with -fmad=false. A fused operation is an explicit fmaf, so that an element's
// arithmetic does not depend on its position.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

#ifndef CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastddpm {
namespace {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) {
        cudaGetLastError();  // clear the error, or the next call would report it again
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

constexpr int kPortableCluster = 8;  // cluster size that every device with clusters supports

#ifndef CUDA_ON_CPU
// kernel<<<grid, block, shared, stream>>>, with `cluster` consecutive blocks in a thread-block cluster. Not copyable, because
// the runtime gets the address of the attribute.
struct Launch {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};

    Launch(int64_t grid, int block, int cluster, size_t shared, void* stream) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.gridDim = dim3(static_cast<unsigned>(grid));
        config.blockDim = dim3(static_cast<unsigned>(block));
        config.dynamicSmemBytes = shared;
        config.stream = static_cast<cudaStream_t>(stream);
        config.attrs = &attribute;
        config.numAttrs = cluster > 1 ? 1 : 0;
    }
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster, size_t shared, void* stream,
            const Arguments&... arguments) {
    const Launch how(grid, block, cluster, shared, stream);
    if (cluster > kPortableCluster)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "asking for a cluster");
    check(cudaLaunchKernelEx(&how.config, kernel, arguments...), "launching a kernel");
}

template <class... Parameters>
int ask_for_largest_cluster(int device, void (*kernel)(Parameters...), int threads) {
    int major = 0, clusters = 0;
    cudaFuncAttributes attributes;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the capability");
    check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's attributes");
    // If the driver compiled older code for this device, that code has no clusters.
    if (major < 9 || attributes.ptxVersion < 90) return 1;
    const int most = 2 * kPortableCluster;
    const Launch how(most, threads, most, 48 << 10, nullptr);  // with the maximum shared memory of any kernel
    const bool large = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&clusters, kernel, &how.config) == cudaSuccess && clusters > 0;
    cudaGetLastError();  // a refusal is a valid result
    return large ? most : kPortableCluster;
}

// The maximum number of blocks in a cluster of the kernel: 1, 8, or 16 on some devices. Queried once.
template <class... Parameters>
int largest_cluster(int device, void (*kernel)(Parameters...), int threads) {
    static std::mutex mutex;
    static std::map<int, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) return found->second;
    return known[device] = ask_for_largest_cluster(device, kernel, threads);
}

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ __align__(16) unsigned char fastddpm_shared[];
    return reinterpret_cast<T*>(fastddpm_shared);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The address in block `rank` of the cluster that corresponds to p in this block's shared memory.
template <class T>
__device__ __forceinline__ T* peer_shared(T* p, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
}
// A cluster's barrier in two halves. Work between them hides the delay of the other blocks.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
// Arrives without a fence. This requires that the block has written nothing that other blocks read, and that its own reads
// precede a __syncthreads(). A fence would wait for all pending stores of the block.
__device__ __forceinline__ void cluster_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
#else
template <class T>
__device__ __forceinline__ T* peer_shared(T* p, int) {
    return p;
}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
#endif
#endif  // CUDA_ON_CPU

// ---- the device ----

// During its lifetime `device` is current, and this thread may load kernels and allocate memory while a stream is being
// captured. A kernel's first use may be inside a capture.
class DeviceScope {
  public:
    explicit DeviceScope(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        changes_ = before_ != device;
        if (changes_) check(cudaSetDevice(device), "choosing the device");
        check(cudaThreadExchangeStreamCaptureMode(&mode_), "asking to load kernels during a capture");
    }
    ~DeviceScope() {
        cudaThreadExchangeStreamCaptureMode(&mode_);
        if (changes_) cudaSetDevice(before_);
    }
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int before_ = 0;
    bool changes_ = false;
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline int64_t device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device's attribute");
    return value;
}

// Loads a kernel's code onto the device. Otherwise its first launch would, and that may be inside a graph's capture.
template <class Kernel>
void load_kernel(Kernel* kernel) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "loading a kernel");
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- vectors ----

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ void from_float(float v, float& out) { out = v; }
__device__ __forceinline__ void from_float(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(float v, __half& out) { out = __float2half_rn(v); }

// V adjacent elements, loaded and stored at once. The array must be indexed by constants to stay in registers. Lanes of
// 2 bytes are stored in pairs in words, as the conversions require.
template <class T, int V>
struct Pack {
    static constexpr int kWords = sizeof(T) * V / 4;
    static_assert(kWords == 2 || kWords == 4, "");
    using Memory = std::conditional_t<kWords == 4, uint4, uint2>;
    uint32_t words[kWords];

    __device__ __forceinline__ void load(const T* p) {
        const Memory m = *reinterpret_cast<const Memory*>(p);
        words[0] = m.x, words[1] = m.y;
        if constexpr (kWords == 4) words[2] = m.z, words[3] = m.w;
    }
    __device__ __forceinline__ void store(T* p) const {
        Memory m;
        m.x = words[0], m.y = words[1];
        if constexpr (kWords == 4) m.z = words[2], m.w = words[3];
        __stcg(reinterpret_cast<Memory*>(p), m);  // written this way, the compiler does not split the store
    }
    __device__ __forceinline__ float get(int i) const;
    __device__ __forceinline__ void put(int i, float v0, float v1);  // lanes i, even, and i + 1
};

template <class T>
struct Pack<T, 1> {
    T value;

    __device__ __forceinline__ void load(const T* p) { value = *p; }
    __device__ __forceinline__ void store(T* p) const { *p = value; }
    __device__ __forceinline__ float get(int) const { return to_float(value); }
    __device__ __forceinline__ void put(int, float v) { from_float(v, value); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
}

template <class T, int V>
__device__ __forceinline__ float Pack<T, V>::get(int i) const {
    if constexpr (sizeof(T) == 4) {
        return bits_as<float>(words[i]);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        return bits_as<float>(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
        const __half2 pair = bits_as<__half2>(words[i / 2]);
        return i % 2 ? __high2float(pair) : __low2float(pair);
    }
}

template <class T, int V>
__device__ __forceinline__ void Pack<T, V>::put(int i, float v0, float v1) {
    if constexpr (sizeof(T) == 4) {
        words[i] = bits_as<uint32_t>(v0);
        words[i + 1] = bits_as<uint32_t>(v1);
    } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
        words[i / 2] = bits_as<uint32_t>(__floats2bfloat162_rn(v0, v1));
    } else {
        words[i / 2] = bits_as<uint32_t>(__floats2half2_rn(v0, v1));
    }
}

// The bits and the value of element `at` of an array whose dtype is known at run time. The two are separate, so that several
// loads can start before the first is used.
__device__ __forceinline__ uint32_t load_bits(const void* p, Dtype dtype, int64_t at) {
    return dtype == Dtype::float32 ? static_cast<const uint32_t*>(p)[at] : static_cast<const uint16_t*>(p)[at];
}
__device__ __forceinline__ float of_bits(uint32_t bits, Dtype dtype) {
    if (dtype == Dtype::float32) return bits_as<float>(bits);
    if (dtype == Dtype::bfloat16) return bits_as<float>(bits << 16);
    return to_float(bits_as<__half>(static_cast<uint16_t>(bits)));
}
__device__ __forceinline__ float load_any(const void* p, Dtype dtype, int64_t at) {
    return of_bits(load_bits(p, dtype, at), dtype);
}

__device__ __forceinline__ void store_any(void* p, Dtype dtype, int64_t at, float v) {
    if (dtype == Dtype::float32)
        static_cast<float*>(p)[at] = v;
    else if (dtype == Dtype::bfloat16)
        from_float(v, static_cast<__nv_bfloat16*>(p)[at]);
    else
        from_float(v, static_cast<__half*>(p)[at]);
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace
}  // namespace fastddpm
