// What the shells share: the operations' attributes, their serialised form, problems from shapes.
#pragma once

#include "launcher.h"

#include <cstddef>
#include <cstdint>
#include <string>

namespace sessa
{

constexpr char const* kFieldStorage = "storage"; // an attribute of every operation
constexpr char const* kFieldWeights = "weights"; // of those with a matrix of weights
constexpr char const* kFieldState = "state";     // version of the serialised form, present in what an engine holds

struct Attributes
{
    Numbers numbers;
    Storage storage{Storage::kAny}; // kAny: whatever q has
    Weights weights{Weights::kStorage};

    // What the operation is with these: itself, or its form for weights of 8 bits.
    Op const& form(Op const& op) const noexcept;

    bool check(Op const& op, std::string& error) const noexcept;
};

// The names of an operation's attributes, the float ones first; for messages.
std::string attributeNames(Op const& op);

// False, and that a serialised state of another version needs a new engine.
bool refuseState(int32_t version, std::string& error) noexcept;

// Magic, version, storage, weights, numbers. The plugin's name stands beside it in an engine.
constexpr size_t kStateBytes = 16 + sizeof(Numbers);
void serialize(Attributes const& attributes, void* buffer) noexcept;
bool deserialize(Op const& op, void const* data, size_t size, Attributes& attributes, std::string& error) noexcept;

// Dimensions of one input; `rank` entries.
struct Shape
{
    int64_t const* dims{};
    int32_t rank{};
};

// A problem's attributes, and its sizes from its inputs' dimensions, each from the first input that has it. False and a reason if a rank is wrong.
bool sizesOf(Op const& op, Attributes const& attributes, Shape const* shapes, Problem& problem, std::string& error) noexcept;

// The same, with every dimension compared and the limits checked.
bool problemOf(Op const& op, Attributes const& attributes, Storage storage, Shape const* shapes, Problem& problem, std::string& error) noexcept;

} // namespace sessa
