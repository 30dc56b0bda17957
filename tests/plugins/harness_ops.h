// What both harnesses know of the operations: the tables that the library itself is compiled with.
#pragma once

#include "launcher.h"

#include <cstdint>
#include <string>
#include <vector>

namespace sessa
{

inline Op const kOps[] = {
#define SESSA_OP(identifier, ...) Op{__VA_ARGS__, nullptr},
#include "ops.inc"
#undef SESSA_OP
};
inline char const kLetters[] = { // the order of a test's sizes
#define SESSA_SIZE(letter, field, start) letter,
#include "ops.inc"
#undef SESSA_SIZE
    0};

// Inputs, then outputs.
inline std::vector<Operand> operandsOf(int32_t op)
{
    std::vector<Operand> all(kOps[op].operands, kOps[op].operands + kOps[op].inputs);
    all.insert(all.end(), kOps[op].results, kOps[op].results + kOps[op].outputs);
    return all;
}

inline std::vector<int64_t> dimensionsOf(Operand const& operand, int64_t const* sizes)
{
    std::vector<int64_t> values;
    for (char const letter : std::string(operand.shape))
    {
        values.push_back(sizes[std::string(kLetters).find(letter)]);
    }
    return values;
}

} // namespace sessa
