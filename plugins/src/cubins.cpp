#include "cubins.h"

#include "arch.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_map>
#include <vector>

// cubins_data.S, written by CMake, holds the bytes of binary i between sessa_cubin_<i> and sessa_cubin_<i>_end.
extern "C"
{
#define SESSA_CUBIN(index, ...)                                                                                        \
    extern unsigned char const sessa_cubin_##index[];                                                                  \
    extern unsigned char const sessa_cubin_##index##_end[];
#include "cubins.inc"
#undef SESSA_CUBIN
}

namespace sessa
{
namespace
{

#define SESSA_CUBIN(index, file, kernel, arch, dtype, variant, entry, warps, shared, scratch, params, early, share, ...)               \
    Cubin{kernel, arch, dtype, variant, entry, warps, shared, scratch, params, early, share, {{__VA_ARGS__}}, sessa_cubin_##index,     \
        static_cast<size_t>(sessa_cubin_##index##_end - sessa_cubin_##index)},
Cubin const kCubins[] = {
#include "cubins.inc"
};
#undef SESSA_CUBIN

// The binaries of a kernel: every enqueue looks for some, among hundreds.
std::vector<Cubin const*> const& binariesOf(char const* kernel)
{
    using Index = std::unordered_map<std::string_view, std::vector<Cubin const*>>;
    static Index const* const index = [] {
        auto* const made = new Index; // never destroyed: a library may be asked until the process ends
        for (auto const& c : kCubins)
        {
            (*made)[c.kernel].push_back(&c);
        }
        return made;
    }();
    static std::vector<Cubin const*> const* const none = new std::vector<Cubin const*>;
    auto const found = index->find(kernel);
    return found == index->end() ? *none : found->second;
}

} // namespace

int32_t const* Cubin::findTile(char const* name) const noexcept
{
    for (auto const& t : tiles)
    {
        if (t.name != nullptr && std::strcmp(t.name, name) == 0)
        {
            return &t.value;
        }
    }
    return nullptr;
}

int32_t Cubin::tile(char const* name) const
{
    int32_t const* const found = findTile(name);
    if (found == nullptr)
    {
        throw MissingTile(std::string(kernel) + " for sm_" + std::to_string(arch) + ", " + dtype + ", variant " + variant + " has no tile " + name
            + ": the kernels in this library are of another version; rebuild it: " + kBuildCommand);
    }
    return *found;
}

Cubin const* findCubin(char const* kernel, int32_t arch, char const* dtype, char const* variant) noexcept
try
{
    Cubin const* best = nullptr;
    for (auto const* c : binariesOf(kernel))
    {
        bool const same = std::strcmp(c->dtype, dtype) == 0 && std::strcmp(c->variant, variant) == 0;
        if (same && serves(c->arch, arch) && (best == nullptr || c->arch > best->arch))
        {
            best = c;
        }
    }
    return best;
}
catch (...)
{
    return nullptr;
}

Cubin const* findCubinForWidth(char const* kernel, int32_t arch, char const* dtype, int32_t width) noexcept
try
{
    char const* best = nullptr;
    for (auto const* c : binariesOf(kernel))
    {
        if (std::atoi(c->variant) >= width && (best == nullptr || std::atoi(c->variant) < std::atoi(best)))
        {
            best = c->variant;
        }
    }
    return best == nullptr ? nullptr : findCubin(kernel, arch, dtype, best);
}
catch (...)
{
    return nullptr;
}

std::string architectures()
{
    std::set<int32_t> seen;
    std::string text;
    for (auto const& c : kCubins)
    {
        if (seen.insert(c.arch).second)
        {
            text += (text.empty() ? "" : ", ") + std::to_string(c.arch);
        }
    }
    return text;
}

int32_t architectureAt(size_t index) noexcept
{
    int32_t last = 0;
    for (size_t i = 0; i <= index; ++i)
    {
        int32_t next = 0;
        for (auto const& c : kCubins)
        {
            next = c.arch > last && (next == 0 || c.arch < next) ? c.arch : next;
        }
        if (next == 0)
        {
            return 0;
        }
        last = next;
    }
    return last;
}

} // namespace sessa
