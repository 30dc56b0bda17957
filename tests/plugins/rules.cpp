// The library's own rules without TensorRT and without real kernels: which binary serves which device, which sizes and attributes an operation takes,
// what becomes of a tile that is missing. Built with causal.cpp and driver.cpp and a cubins.inc of the test's.
#include "arch.h"
#include "cubins.cpp"
#include "launcher.cpp"
#include "ops.cpp"

extern "C"
{
// The bytes that the assembly file holds in the library.
unsigned char const sessa_cubin_0[1]{};
unsigned char const sessa_cubin_0_end[1]{};
}

namespace sessa
{
char const* const kBuildCommand = "sessa-deploy plugin build";

#define SESSA_OP(identifier, ...) __attribute__((weak)) extern Family const k##identifier##Family{nullptr, nullptr};
#include "ops.inc"
#undef SESSA_OP
} // namespace sessa

extern "C"
{

int32_t rules_serves(int32_t compiled, int32_t device)
{
    return sessa::serves(compiled, device) ? 1 : 0;
}

// sizes: in the order of ops.inc. text: at least 256 bytes, "" where the operation takes them.
void rules_check(int32_t op, int64_t const* sizes, char* text)
{
    sessa::Problem p;
    p.op = &sessa::opAt(op);
    p.storage = sessa::Storage::kHalf;
#define SESSA_SIZE(letter, field, start) p.field = *sizes++;
#include "ops.inc"
#undef SESSA_SIZE
    std::string error;
    bool const good = sessa::check(p, error);
    std::snprintf(text, 256, "%s", good ? "" : error.c_str());
}

// Bytes of workspace of a prompt in causal attention; text as above.
int64_t rules_workspace(char* text)
{
    sessa::Problem p = sessa::smallest(sessa::kCausal, sessa::Storage::kHalf);
    p.headWidth = 64;
    std::string error;
    auto const size = static_cast<int64_t>(sessa::workspaceSize(p, error));
    std::snprintf(text, 256, "%s", error.c_str());
    return size;
}

// What is said of a launch without programs of a kernel that makes three tensor descriptors at `address`.
void rules_descriptors(int64_t address, char* text)
{
    sessa::Cubin cubin = sessa::kCubins[0];
    cubin.scratch = 3 * 128;
    cubin.params = 2;
    sessa::Arguments arguments;
    arguments.scratch(reinterpret_cast<char*>(address));
    std::string error;
    sessa::launch(cubin, {0, 1, 1}, arguments, nullptr, error);
    std::snprintf(text, 256, "%s", error.c_str());
}

// Whether the operation takes the value of its float attribute `index`.
int32_t rules_takes(int32_t op, int32_t index, float value)
{
    return sessa::opAt(op).attribute[index].takes(value) ? 1 : 0;
}

char const* rules_name(int32_t op)
{
    return op < sessa::kOpCount ? sessa::opAt(op).name : "";
}

} // extern "C"
