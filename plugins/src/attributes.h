// What the shells share: names, the operation's attributes, their serialised form, the log.
#pragma once

#include "launcher.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace sessa
{

constexpr char const* kPluginName = "SessaFeedbackAttention";
constexpr char const* kPluginVersion = "1";
constexpr char const* kPluginNamespace = "";
constexpr char const* kFieldScale = "scale";
constexpr char const* kFieldStorage = "storage";
constexpr char const* kFieldState = "state"; // version of the serialised form, present in what an engine holds
constexpr int32_t kStateVersion = 1;

// Inputs in order: q, k, gamma, f, past_k, past_s, past_length; one output s.
enum Input : int32_t
{
    kQ,
    kK,
    kGamma,
    kF,
    kPastK,
    kPastS,
    kPastLength,
    kInputs
};

struct Attributes
{
    float scale{0.0F};                // 0: D^-1/2
    Storage storage{Storage::kAny};   // kAny: whatever q has

    bool check(std::string& error) const noexcept;
};

// 16 bytes: magic, version, scale, storage.
constexpr size_t kStateBytes = 16;
void serialize(Attributes const& attributes, void* buffer) noexcept;
bool deserialize(void const* data, size_t size, Attributes& attributes, std::string& error) noexcept;

// Dimensions of the inputs as given; tells what is wrong with them, or fills `problem`. dims[i] has rank[i] entries.
bool problemOf(Attributes const& attributes, Storage storage, int64_t const* const* dims, int32_t const* rank, Problem& problem, std::string& error) noexcept;

} // namespace sessa
