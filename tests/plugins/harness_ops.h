// What both harnesses know of the operations: the tables that the library itself is compiled with.
#pragma once

#include "launcher.h"

#include <cctype>
#include <cstdint>
#include <string>
#include <vector>

namespace sessa
{

inline Op const kOps[] = { // first all of them, then those that have one in their form for weights of 8 bits
#define SESSA_OP(identifier, ...) Op{__VA_ARGS__, nullptr},
#define SESSA_QUANTISED(identifier, ...) Op{__VA_ARGS__, nullptr},
#include "ops.inc"
#undef SESSA_OP
#undef SESSA_QUANTISED
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
        auto const capital = static_cast<char>(std::toupper(letter)); // a small letter is half of its size
        values.push_back(sizes[std::string(kLetters).find(capital)] / (letter == capital ? 1 : 2));
    }
    return values;
}

} // namespace sessa
