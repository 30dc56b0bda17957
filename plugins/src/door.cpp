// A C door to the library: the runtime launches some of its kernels itself around a decode step (runtime/device/kernels.py), and asks whose it is (library.py).
#include "cubins.h"
#include "launcher.h"

extern "C"
{

struct SessaCubin // mirrored in Python; append only
{
    unsigned char const* data;
    size_t size;
    char const* entry;
    int32_t warps;
    int32_t shared; // bytes of dynamic shared memory
    int32_t params; // Triton's two hidden pointers included
};

// 1 and *out filled where the library carries this kernel for a device of compute capability `arch`, else 0.
__attribute__((visibility("default"))) int32_t sessaFindCubin(
    char const* kernel, int32_t arch, char const* dtype, char const* variant, SessaCubin* out) noexcept
{
    sessa::Cubin const* const found
        = kernel == nullptr || dtype == nullptr || variant == nullptr || out == nullptr ? nullptr : sessa::findCubin(kernel, arch, dtype, variant);
    if (found == nullptr)
    {
        return 0;
    }
    *out = SessaCubin{found->data, found->size, found->entry, found->warps, found->shared, found->params};
    return 1;
}

// Value of a pinned tile of that kernel; -1 if there is none, which the caller must look at.
__attribute__((visibility("default"))) int32_t sessaCubinTile(
    char const* kernel, int32_t arch, char const* dtype, char const* variant, char const* tile) noexcept
{
    sessa::Cubin const* const found
        = kernel == nullptr || dtype == nullptr || variant == nullptr || tile == nullptr ? nullptr : sessa::findCubin(kernel, arch, dtype, variant);
    int32_t const* const value = found == nullptr ? nullptr : found->findTile(tile);
    return value == nullptr ? -1 : *value;
}

// Name of operation number `index` of this library; nullptr past the last.
__attribute__((visibility("default"))) char const* sessaOpName(int32_t index) noexcept
{
    return index >= 0 && index < sessa::kOpCount ? sessa::opAt(index).name : nullptr;
}

// What the operations mean: what was built for others is not for this library, though names and types be the same.
__attribute__((visibility("default"))) int32_t sessaStateVersion() noexcept
{
    return static_cast<int32_t>(sessa::kStateVersion);
}

} // extern "C"
