// Parallel loops for the CPU kernels. Compiled with OpenMP but not linked to a runtime (see CMakeLists.txt): the
// symbols resolve to the runtime that torch has loaded. Without OpenMP the loops are serial.
//
// Everything is in an unnamed namespace, as in every header that the CPU kernels share: a kernel file is compiled once
// per instruction set, and a function with external linkage compiled for AVX-512 could be the one the linker keeps.
#pragma once

#include <cstdint>

namespace fastddpm {
namespace {

// The minimum work that is worth passing to another thread, in elements of a cheap kernel (about 10 us of one core).
constexpr int64_t kParallelElements = 8192;

// Calls body(i) for i in [0, count), in portions of `grain` consecutive indices. A single portion runs in the calling thread.
// The assignment of indices to threads is not fixed, so body must write only data of index i. The team always has the
// requested number of threads, because an OpenMP runtime whose team changes size ends threads and starts new ones.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
#ifdef _OPENMP
    if (threads > 1 && count > grain) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, grain)
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#else
    (void)threads;
#endif
    (void)grain;
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace
}  // namespace fastddpm
