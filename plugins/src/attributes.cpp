#include "attributes.h"

#include <cmath>
#include <cstring>

namespace sessa
{
namespace
{

constexpr uint32_t kMagic = 0x41534553; // "SESA"

struct State
{
    uint32_t magic;
    int32_t version;
    float scale;
    int32_t storage;
};
static_assert(sizeof(State) == kStateBytes, "the serialised state is 16 bytes");

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

bool Attributes::check(std::string& error) const noexcept
try
{
    if (!std::isfinite(scale) || scale < 0)
    {
        error = "attribute scale: got " + std::to_string(scale) + "; allowed: a finite positive number, or 0 for D^-1/2";
        return false;
    }
    if (storage != Storage::kAny && storage != Storage::kFloat && storage != Storage::kHalf && storage != Storage::kBFloat16)
    {
        error = "attribute storage: got " + std::to_string(static_cast<int32_t>(storage)) + "; allowed: 1 (float32), 10 (float16), 16 (bfloat16), 0 (any)";
        return false;
    }
    return true;
}
catch (...)
{
    return false;
}

void serialize(Attributes const& attributes, void* buffer) noexcept
{
    State const state{kMagic, kStateVersion, attributes.scale, static_cast<int32_t>(attributes.storage)};
    std::memcpy(buffer, &state, sizeof(state));
}

bool deserialize(void const* data, size_t size, Attributes& attributes, std::string& error) noexcept
try
{
    State state{};
    if (data == nullptr || size != sizeof(state))
    {
        error = "serialised state: got " + std::to_string(size) + " bytes; allowed: " + std::to_string(sizeof(state)) + "; rebuild the engine";
        return false;
    }
    std::memcpy(&state, data, sizeof(state));
    if (state.magic != kMagic || state.version != kStateVersion)
    {
        error = "serialised state: got version " + std::to_string(state.version) + "; allowed: " + std::to_string(kStateVersion) + "; rebuild the engine";
        return false;
    }
    attributes = {state.scale, static_cast<Storage>(state.storage)};
    return attributes.check(error);
}
catch (...)
{
    return false;
}

bool problemOf(Attributes const& attributes, Storage storage, int64_t const* const* dims, int32_t const* rank, Problem& problem, std::string& error) noexcept
try
{
    static constexpr int32_t kRanks[kInputs] = {3, 3, 2, 3, 3, 3, 1};
    static constexpr char const* kNames[kInputs] = {"q", "k", "gamma", "f", "past_k", "past_s", "past_length"};
    for (int32_t i = 0; i < kInputs; ++i)
    {
        if (rank[i] != kRanks[i])
        {
            error = std::string(kNames[i]) + ": got shape " + shape(dims[i], rank[i]) + "; allowed: rank " + std::to_string(kRanks[i]);
            return false;
        }
    }
    int64_t const b = dims[kQ][0];
    int64_t const t = dims[kQ][1];
    int64_t const d = dims[kQ][2];
    int64_t const p = dims[kPastK][1];
    int64_t const expected[kInputs][3] = {{b, t, d}, {b, t, d}, {b, t, 0}, {b, t, d}, {b, p, d}, {b, p, d}, {b, 0, 0}};
    for (int32_t i = 0; i < kInputs; ++i)
    {
        for (int32_t a = 0; a < rank[i]; ++a)
        {
            if (dims[i][a] != expected[i][a])
            {
                error = std::string(kNames[i]) + ": got shape " + shape(dims[i], rank[i]) + "; allowed: " + shape(expected[i], rank[i]) + " to match q "
                    + shape(dims[kQ], 3);
                return false;
            }
        }
    }
    problem = {b, t, p, d, storage, attributes.scale};
    return check(problem, error);
}
catch (...)
{
    return false;
}

} // namespace sessa
