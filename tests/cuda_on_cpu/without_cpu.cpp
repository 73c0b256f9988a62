// Stubs of the CPU kernels that bindings.cpp requires, for the module that runs the CUDA kernels on a CPU.
#include <stdexcept>

#include "kernels.h"

namespace fastddpm {

#define FASTDDPM_WITHOUT(op, Args) \
    void op##_cpu(const Args&) { throw std::logic_error(#op "_cpu is not part of this module"); }

FASTDDPM_WITHOUT(philox_normal, PhiloxNormalArgs)
FASTDDPM_WITHOUT(ddpm_step, DdpmStepArgs)
FASTDDPM_WITHOUT(group_norm_silu, GroupNormSiluArgs)
FASTDDPM_WITHOUT(group_norm_silu_backward, GroupNormSiluBackwardArgs)
FASTDDPM_WITHOUT(timestep_embedding, TimestepEmbeddingArgs)
FASTDDPM_WITHOUT(winograd, WinogradArgs)
FASTDDPM_WITHOUT(winograd_weights, WinogradWeightsArgs)
bool winograd_serves(Dtype) { return false; }
const char* cpu_variant() { return "none"; }

}  // namespace fastddpm
