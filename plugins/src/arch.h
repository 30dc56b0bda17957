// Which binary runs on which device: sessa_deploy/cuda_arch.py in C++. An architecture is a compute capability as an integer, 90 for 9.0.
#pragma once

#include "limits.h"

namespace sessa
{

// Later minors of a major run a binary, though not across desktop GPUs and Tegra, and not one compiled for an architecture's own features.
constexpr bool serves(int32_t compiled, int32_t device) noexcept
{
    return compiled == device
        || (compiled < kAccelerated && compiled / 10 == device / 10 && compiled < device && compiled != kTegra && device != kTegra);
}

} // namespace sessa
