// Chooses, once per process, which build of the CPU kernels this machine runs. Every csrc/cpu/<op>.cpp is compiled
// once per instruction set into fastddpm::<variant>; this file is compiled for the baseline and defines <op>_cpu.
// FASTDDPM_CPU_VARIANT=generic|avx2|avx512 requests a particular one. It is an error if this machine cannot run it.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef FASTDDPM_X86_VARIANTS
#include <cpuid.h>
#endif

namespace fastddpm {

#define FASTDDPM_DECLARE(variant)                                    \
    namespace variant {                                              \
    void philox_normal(const PhiloxNormalArgs&);                     \
    void ddpm_step(const DdpmStepArgs&);                             \
    void group_norm_silu(const GroupNormSiluArgs&);                  \
    void group_norm_silu_backward(const GroupNormSiluBackwardArgs&); \
    void timestep_embedding(const TimestepEmbeddingArgs&);           \
    void winograd(const WinogradArgs&);                              \
    void winograd_weights(const WinogradWeightsArgs&);               \
    }

#define FASTDDPM_KERNELS(variant)       \
    {#variant,                          \
     variant::philox_normal,            \
     variant::ddpm_step,                \
     variant::group_norm_silu,          \
     variant::group_norm_silu_backward, \
     variant::timestep_embedding,       \
     variant::winograd,                 \
     variant::winograd_weights}

FASTDDPM_DECLARE(generic)
#ifdef FASTDDPM_X86_VARIANTS
FASTDDPM_DECLARE(avx2)
FASTDDPM_DECLARE(avx512)
#endif

namespace {

struct Kernels {
    const char* name;
    void (*philox_normal)(const PhiloxNormalArgs&);
    void (*ddpm_step)(const DdpmStepArgs&);
    void (*group_norm_silu)(const GroupNormSiluArgs&);
    void (*group_norm_silu_backward)(const GroupNormSiluBackwardArgs&);
    void (*timestep_embedding)(const TimestepEmbeddingArgs&);
    void (*winograd)(const WinogradArgs&);
    void (*winograd_weights)(const WinogradWeightsArgs&);
};

// Fastest first.
const Kernels variants[] = {
#ifdef FASTDDPM_X86_VARIANTS
    FASTDDPM_KERNELS(avx512),
    FASTDDPM_KERNELS(avx2),
#endif
    FASTDDPM_KERNELS(generic),
};

bool runs_here(const Kernels& variant) {
#ifdef FASTDDPM_X86_VARIANTS
    unsigned a, b, c = 0, d;
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;  // older compilers do not know its name
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    if (!std::strcmp(variant.name, "avx2")) return avx2;
    if (!std::strcmp(variant.name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(variant.name, "generic");
}

const Kernels& choose() {
    const char* wanted = std::getenv("FASTDDPM_CPU_VARIANT");
    std::string possible;
    for (const Kernels& variant : variants) {
        if (!runs_here(variant)) continue;
        if (!wanted || !*wanted || !std::strcmp(variant.name, wanted)) return variant;
        possible += possible.empty() ? variant.name : std::string(", ") + variant.name;
    }
    throw std::runtime_error("FASTDDPM_CPU_VARIANT=" + std::string(wanted) + " cannot run here; this machine runs " +
                             possible);
}

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace

void philox_normal_cpu(const PhiloxNormalArgs& args) { kernels().philox_normal(args); }
void ddpm_step_cpu(const DdpmStepArgs& args) { kernels().ddpm_step(args); }
void group_norm_silu_cpu(const GroupNormSiluArgs& args) { kernels().group_norm_silu(args); }
void group_norm_silu_backward_cpu(const GroupNormSiluBackwardArgs& args) { kernels().group_norm_silu_backward(args); }
void timestep_embedding_cpu(const TimestepEmbeddingArgs& args) { kernels().timestep_embedding(args); }
void winograd_cpu(const WinogradArgs& args) { kernels().winograd(args); }
void winograd_weights_cpu(const WinogradWeightsArgs& args) { kernels().winograd_weights(args); }
bool winograd_serves(Dtype dtype) {
#ifdef FASTDDPM_X86_VARIANTS
    if (dtype == Dtype::bfloat16) return !std::strcmp(kernels().name, "avx512") && __builtin_cpu_supports("avx512bf16");
#endif
    return dtype == Dtype::float32;
}
const char* cpu_variant() { return kernels().name; }

}  // namespace fastddpm
