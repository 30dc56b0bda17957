// The Triton kernels this library carries, compiled ahead of time by sessa_deploy.plugins.lower and embedded by CMake.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sessa
{

struct Tile
{
    char const* name;
    int32_t value;
};

struct Cubin
{
    char const* kernel;  // e.g. "feedback_step_partial"
    int32_t arch;        // compute capability, 90 for 9.0
    char const* dtype;   // storage: "fp32", "fp16", "bf16"
    char const* variant; // key of the pinned tiles
    char const* entry;   // symbol of the kernel
    int32_t warps;
    int32_t shared;  // bytes of dynamic shared memory
    int32_t scratch; // bytes of global memory that a program makes tensor descriptors in, at Triton's first hidden pointer
    int32_t params; // number of parameters, Triton's two hidden pointers included
    int32_t earlyRows; // rows B T up to which it may start before its predecessor ends (launch/table.py, early); 0: never
    int32_t sharedShare; // percent of a multiprocessor's shared memory that it wishes for (launch/table.py, shared_share); 0: what the driver chooses
    std::array<Tile, 16> tiles;
    unsigned char const* data;
    size_t size;

    // Value of a constexpr tile. Throws MissingTile if the kernel has none of that name.
    int32_t tile(char const* name) const;

    // The same; nullptr where there is none.
    int32_t const* findTile(char const* name) const noexcept;
};

// The command that builds this library, for messages; each shell says its own.
extern char const* const kBuildCommand;

// A plan asks a binary for a tile that it was not lowered with: kernels and plugin are of different versions.
class MissingTile : public std::runtime_error
{
public:
    using std::runtime_error::runtime_error;
};

// The binary for a device of compute capability `arch`, the latest that `serves` it. nullptr: none.
Cubin const* findCubin(char const* kernel, int32_t arch, char const* dtype, char const* variant) noexcept;

// The variant of a width-keyed kernel that covers `width` at least; nullptr: none, or no binary for `arch`.
Cubin const* findCubinForWidth(char const* kernel, int32_t arch, char const* dtype, int32_t width) noexcept;

// Architectures this library carries, e.g. "80, 86, 90"; for messages.
std::string architectures();

// One architecture it carries, to size a workspace by where there is no device; 0 if it carries nothing. Ascending with `index`.
int32_t architectureAt(size_t index) noexcept;

} // namespace sessa
