// What the shells share: names, the operations' attributes, their serialised form.
#pragma once

#include "launcher.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace sessa
{

constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";
constexpr char const* kFieldScale = "scale";
constexpr char const* kFieldStorage = "storage";
constexpr char const* kFieldState = "state"; // version of the serialised form, present in what an engine holds
constexpr int32_t kStateVersion = 1;

struct Attributes
{
    float scale{0.0F};                // 0: width^-1/2
    Storage storage{Storage::kAny};   // kAny: whatever q has

    bool check(std::string& error) const noexcept;
};

// 16 bytes: magic, version, scale, storage. The plugin's name stands beside it in an engine.
constexpr size_t kStateBytes = 16;
void serialize(Attributes const& attributes, void* buffer) noexcept;
bool deserialize(void const* data, size_t size, Attributes& attributes, std::string& error) noexcept;

// Dimensions of one input; `rank` entries.
struct Shape
{
    int64_t const* dims{};
    int32_t rank{};
};

// The sizes of a problem from its inputs' dimensions, each from the first input that has it. False and a reason if a rank is wrong.
bool sizesOf(Op const& op, Shape const* shapes, Problem& problem, std::string& error) noexcept;

// The same, with every dimension compared and the limits checked.
bool problemOf(Op const& op, Attributes const& attributes, Storage storage, Shape const* shapes, Problem& problem, std::string& error) noexcept;

} // namespace sessa
