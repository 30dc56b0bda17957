#include "attributes.h"

#include "plan.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sessa
{
namespace
{

constexpr uint32_t kMagic = 0x41534553; // "SESA"

struct State
{
    uint32_t magic;
    int32_t version;
    int32_t storage;
    int32_t weights;
    Numbers numbers;
};
static_assert(sizeof(State) == kStateBytes, "nothing between the fields");

std::string shape(int64_t const* dims, int32_t rank)
{
    std::string text = "(";
    for (int32_t i = 0; i < rank; ++i)
    {
        text += (i == 0 ? "" : ",") + std::to_string(dims[i]);
    }
    return text + ")";
}

} // namespace

Op const& Attributes::form(Op const& op) const noexcept
{
    Op const* const other = weights == Weights::kStorage ? nullptr : quantised(op);
    return other == nullptr ? op : *other;
}

bool Attributes::check(Op const& op, std::string& error) const noexcept
try
{
    if (storage != Storage::kAny && storage != Storage::kFloat && storage != Storage::kHalf && storage != Storage::kBFloat16)
    {
        error = "attribute storage: got " + std::to_string(static_cast<int32_t>(storage)) + "; allowed: 1 (float32), 10 (float16), 16 (bfloat16), 0 (any)";
        return false;
    }
    bool const bytes = weights == Weights::kInt8 || weights == Weights::kFloat8;
    if (weights != Weights::kStorage && !(bytes && quantised(op) != nullptr))
    {
        return refuse(error, "attribute weights", std::to_string(static_cast<int32_t>(weights)),
            quantised(op) != nullptr ? "3 (int8), 17 (float8e4m3fn), 0 (the storage type)" : "0: it has no matrix of weights");
    }
    return sessa::check(op, numbers, error);
}
catch (...)
{
    return false;
}

std::string attributeNames(Op const& op)
{
    std::string names;
    for (int32_t i = 0; i < op.attributes; ++i)
    {
        names += std::string(op.attribute[i].name) + ", ";
    }
    return names + kFieldStorage + (quantised(op) != nullptr ? std::string(", ") + kFieldWeights : "");
}

bool refuseState(int32_t version, std::string& error) noexcept
try
{
    error = "serialised state: got version " + std::to_string(version) + "; allowed: " + std::to_string(kStateVersion)
        + "; the engine was built with another version of this library: sessa-deploy build BUNDLE --force";
    return false;
}
catch (...)
{
    return false;
}

void serialize(Attributes const& attributes, void* buffer) noexcept
{
    State const state{kMagic, static_cast<int32_t>(kStateVersion), static_cast<int32_t>(attributes.storage),
        static_cast<int32_t>(attributes.weights), attributes.numbers};
    std::memcpy(buffer, &state, sizeof(state));
}

bool deserialize(Op const& op, void const* data, size_t size, Attributes& attributes, std::string& error) noexcept
try
{
    State state{};
    if (data != nullptr)
    {
        std::memcpy(&state, data, std::min(size, sizeof(state)));
    }
    if (state.magic != kMagic)
    {
        error = "serialised state: got " + std::to_string(size) + " bytes that are none of this plugin's; sessa-deploy build BUNDLE --force";
        return false;
    }
    if (state.version != kStateVersion)
    {
        return refuseState(state.version, error);
    }
    if (size != sizeof(state))
    {
        error = "serialised state: got " + std::to_string(size) + " bytes; allowed: " + std::to_string(sizeof(state)) + "; sessa-deploy build BUNDLE --force";
        return false;
    }
    attributes = {state.numbers, static_cast<Storage>(state.storage), static_cast<Weights>(state.weights)};
    return attributes.check(op, error);
}
catch (...)
{
    return false;
}

bool sizesOf(Op const& op, Attributes const& attributes, Shape const* shapes, Problem& problem, std::string& error) noexcept
try
{
    std::string seen;
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        std::string const letters = op.operands[i].shape;
        if (shapes[i].rank != static_cast<int32_t>(letters.size()))
        {
            error = std::string(op.operands[i].name) + ": got shape " + shape(shapes[i].dims, shapes[i].rank) + "; allowed: rank "
                + std::to_string(letters.size());
            return false;
        }
        for (size_t a = 0; a < letters.size(); ++a)
        {
            auto const whole = capital(letters[a]);
            if (seen.find(whole) == std::string::npos)
            {
                seen += whole;
                problem.setDimension(letters[a], shapes[i].dims[a]);
            }
        }
    }
    problem.op = &op;
    problem.weights = attributes.weights;
    problem.numbers = attributes.numbers;
    return true;
}
catch (...)
{
    return false;
}

bool problemOf(Op const& op, Attributes const& attributes, Storage storage, Shape const* shapes, Problem& problem, std::string& error) noexcept
try
{
    if (!sizesOf(op, attributes, shapes, problem, error))
    {
        return false;
    }
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        std::string const letters = op.operands[i].shape;
        std::vector<int64_t> expected;
        for (char const letter : letters)
        {
            expected.push_back(problem.dimension(letter));
        }
        if (!std::equal(expected.begin(), expected.end(), shapes[i].dims))
        {
            error = std::string(op.operands[i].name) + ": got shape " + shape(shapes[i].dims, shapes[i].rank) + "; allowed: "
                + shape(expected.data(), shapes[i].rank) + " to match " + op.operands[0].name + " " + shape(shapes[0].dims, shapes[0].rank);
            return false;
        }
    }
    problem.storage = storage;
    return check(problem, error);
}
catch (...)
{
    return false;
}

} // namespace sessa
