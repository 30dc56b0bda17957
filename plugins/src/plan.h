// What the operations' plans share: a plan finds its binaries, lays out its workspace and launches.
#pragma once

#include "cubins.h"
#include "driver.h"
#include "launcher.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string>
#include <vector>

namespace sessa
{

constexpr double kLog2E = 1.4426950408889634;

inline int64_t ceilDiv(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

inline int32_t i32(int64_t value)
{
    return static_cast<int32_t>(value);
}

inline char const* dtypeName(Storage storage)
{
    return storage == Storage::kFloat ? "fp32" : storage == Storage::kHalf ? "fp16" : "bf16";
}

// What the kernels that read weights are compiled for: launch/spec.py, QUANTISED.
inline std::string productType(Problem const& p)
{
    char const* const kind = p.weights == Weights::kInt8 ? ".i8" : p.weights == Weights::kFloat8 ? ".f8" : "";
    return std::string(dtypeName(p.storage)) + kind;
}

// Factor of the scores; scale 0: width^-1/2.
inline double scaleOf(int64_t width, float scale)
{
    return scale != 0.0F ? static_cast<double>(scale) : 1.0 / std::sqrt(static_cast<double>(width));
}

// The same for exp2.
inline float scaleLog2(int64_t width, float scale)
{
    return static_cast<float>(scaleOf(width, scale) * kLog2E);
}

inline int64_t storageBytes(Problem const& p)
{
    return p.storage == Storage::kFloat ? 4 : 2;
}

// A problem of smallest sizes, for `everything`.
inline Problem smallest(Op const& op, Storage storage)
{
    Problem p;
    p.op = &op;
    p.storage = storage;
    return p;
}

inline int64_t rowsOf(Problem const& p)
{
    return p.batch * p.tokens;
}

// The first of ascending `sizes` that covers `value`, as a variant's key; `beyond` where none does.
template <size_t N>
std::string covering(int64_t const (&sizes)[N], int64_t value, char const* beyond = "")
{
    auto const* const found = std::find_if(std::begin(sizes), std::end(sizes), [&](int64_t s) { return value <= s; });
    return found == std::end(sizes) ? beyond : std::to_string(*found);
}

// engine/spec.py, product_variant
inline std::string productVariant(int64_t rows, Weights weights)
{
    return weights == Weights::kStorage ? covering(kRows, rows, "any") : covering(kQuantisedRows, rows, "any");
}

constexpr char const* kWideRow = "1.wide"; // the variant for one row that is wider than kAheadDepths, with 8-bit weights than kWholeDepths

// engine/spec.py, ahead_variant: the binary in place of `variant` for rows so short that all their weights are read ahead, or other tiles pay, or for one wide
// row; null where there is none.
inline Cubin const* aheadCubin(char const* name, int32_t arch, Problem const& p, std::string const& variant)
{
    bool const one = variant == std::to_string(kRows[0]);
    bool const bytes = p.weights != Weights::kStorage;
    std::string const depth = one && bytes ? covering(kWholeDepths, p.width) : covering(kAheadDepths, p.width);
    if (depth.empty())
    {
        return one ? findCubin(name, arch, productType(p).c_str(), kWideRow) : nullptr;
    }
    bool const serves = one || !bytes; // of several rows, 8-bit weights have none
    return serves ? findCubin(name, arch, productType(p).c_str(), (variant == "any" ? depth : variant + "." + depth).c_str()) : nullptr;
}

// engine/spec.py, few_variant: the binary for 2 to kFewRows rows, which goes before any other; null where there is none.
inline Cubin const* fewCubin(char const* name, int32_t arch, Problem const& p, int64_t rows)
{
    bool const takes = rows > 1 && rows <= kFewRows && p.weights == Weights::kStorage;
    std::string const variant = std::to_string(kFewRows) + "." + covering(kAheadDepths, p.width, "wide");
    return takes ? findCubin(name, arch, dtypeName(p.storage), variant.c_str()) : nullptr;
}

// kernels/engine/layer_rows.py, chosen, without `variant` itself.
inline Cubin const* chosenCubin(char const* name, int32_t arch, Problem const& p, std::string const& variant, int64_t rows)
{
    Cubin const* const few = fewCubin(name, arch, p, rows);
    return few != nullptr ? few : aheadCubin(name, arch, p, variant);
}

// engine/spec.py, many_variant; null where there is none.
inline Cubin const* manyCubin(std::string const& name, int32_t arch, Problem const& p, int64_t elements)
{
    Cubin const* const small = elements < kManyWork ? findCubin(name.c_str(), arch, dtypeName(p.storage), "small") : nullptr;
    return small != nullptr ? small : findCubin(name.c_str(), arch, dtypeName(p.storage), "any");
}

// causal/spec.py, head_variant; group: query heads of one key/value head.
inline std::string headVariant(int64_t width, int64_t group)
{
    return covering(kHeadWidths, width) + (group == 1 ? "" : "x" + std::to_string(kGroup));
}

// launch/splits.py, step_splits
inline int64_t stepSplits(int64_t capacity, int64_t rows, int64_t most = kStepMaxSplits)
{
    return std::max<int64_t>(1, std::min(most, ceilDiv(capacity, rows)));
}

// Programs of a step's kernel that the device holds at once.
inline int64_t heldPrograms(Cubin const& partial)
{
    int64_t const held = residentPrograms(partial);
    return held > 0 ? held : kStepPrograms;
}

// launch/splits.py, step_programs: programs that share `pieces` splits of a batch in each of `blocks` blocks of heads.
inline int64_t stepPrograms(Cubin const& partial, int64_t pieces, int64_t blocks)
{
    return std::min(pieces, std::max<int64_t>(1, heldPrograms(partial) / blocks));
}

inline bool refuse(std::string& error, std::string const& what, std::string const& got, std::string const& allowed)
{
    error = what + ": got " + got + "; allowed: " + allowed;
    return false;
}

// Hands out 256-byte aligned pieces of a workspace; with a null base it only counts.
class Arena
{
public:
    explicit Arena(void* base)
        : mBase(static_cast<char*>(base))
    {
    }

    char* take(int64_t bytes)
    {
        char* const piece = mBase + mUsed;
        mUsed += ceilDiv(std::max<int64_t>(bytes, 1), 256) * 256;
        return piece;
    }

    int64_t used() const
    {
        return mUsed;
    }

private:
    char* mBase;
    int64_t mUsed{0};
};

// A matrix product with its weights. Those of 8 bits are widened into the workspace before a product of many rows: engine/spec.py, product_choice. Of still
// more rows, where the architecture has one, by a kernel whose programs, as many as the device holds, share the tiles: engine/spec.py, many_kernel.
class Matrix
{
public:
    // columns: of the product. widens: false for a kernel that reads 8 bits whatever the rows. False where the binaries are missing.
    bool find(char const* name, int32_t arch, Problem const& p, int64_t rows, int64_t columns, bool widens = true)
    {
        std::string const variant = productVariant(rows, p.weights);
        bool const many = p.weights != Weights::kStorage && variant == "any";
        std::string const most = std::to_string(*(std::end(kQuantisedRows) - 1));
        mKernel = chosenCubin(name, arch, p, variant, rows);
        mWiden = nullptr;
        mShared = false;
        if (mKernel != nullptr)
        {
            return true;
        }
        bool const widened = many && widens;
        bool const takes = rows > kManyProduct && columns % kWidthMultiple == 0 && (widened || p.weights == Weights::kStorage);
        mWiden = widened ? findCubin("layer_widen", arch, productType(p).c_str(), "any") : nullptr;
        mKernel = takes ? manyCubin(std::string(name) + "_many", arch, p, rows * columns) : nullptr;
        mShared = mKernel != nullptr;
        if (!mShared)
        {
            mKernel = widened ? findCubin(name, arch, dtypeName(p.storage), "any")
                              : findCubin(name, arch, productType(p).c_str(), many ? most.c_str() : variant.c_str());
        }
        return mKernel != nullptr && (mWiden != nullptr || !widened);
    }

    Cubin const& kernel() const
    {
        return *mKernel;
    }

    // Whether the programs share the tiles, and what else there is to do.
    bool shared() const
    {
        return mShared;
    }

    std::vector<Cubin const*> cubins() const
    {
        return mWiden == nullptr ? std::vector<Cubin const*>{mKernel} : std::vector<Cubin const*>{mKernel, mWiden};
    }

    // Of a matrix (columns, p.width).
    void layout(Problem const& p, Arena& arena, int64_t columns)
    {
        mCount = columns * p.width;
        mWide = mWiden == nullptr ? nullptr : arena.take(storageBytes(p) * mCount);
        mScratch = mShared ? arena.take(kManyPrograms * mKernel->scratch) : nullptr;
    }

    // Two arguments of the kernel: the matrix, which is operand `at`, and its scales; what stands for those that there are not is the matrix' address.
    Arguments& add(Arguments& arguments, Problem const& p, Tensors const& t, int32_t at) const
    {
        void const* const matrix = mWiden == nullptr ? t.in[at] : mWide;
        return arguments.add(matrix).add(p.weights == Weights::kStorage ? matrix : t.in[p.op->inputs - 1]);
    }

    // `programs` of the kernel, or those that share as many tiles, behind the widening of operand `at` where it needs one.
    bool run(Tensors const& t, int32_t at, int64_t programs, Arguments& a, CUstream_st* stream, std::string& error, int64_t rows) const
    {
        if (mWiden != nullptr)
        {
            Arguments first;
            first.add(t.in[at]).add(mWide).add(i32(mCount));
            if (!launch(*mWiden, {ceilDiv(mCount, mWiden->tile("BLOCK")), 1, 1}, first, stream, error, rows))
            {
                return false;
            }
        }
        a.scratch(mScratch);
        int64_t const most = mShared ? std::min(heldPrograms(*mKernel), kManyPrograms) : programs;
        return launch(*mKernel, {std::min(programs, most), 1, 1}, a, stream, error, rows);
    }

private:
    Cubin const* mKernel{};
    Cubin const* mWiden{};
    bool mShared{};
    char* mWide{};
    char* mScratch{};
    int64_t mCount{};
};

class Plan
{
public:
    virtual ~Plan() = default;

    // Looks up the binaries; false if one is missing for `arch`.
    virtual bool find(Problem const& p, int32_t arch) = 0;
    virtual std::vector<Cubin const*> cubins() const = 0;

    // After `find`. With `bound`, sizes that also hold for every smaller problem.
    virtual void layout(Problem const& p, Arena& arena, bool bound) = 0;

    // After `layout`.
    virtual bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const = 0;

    // `run` in three parts. The first is small; the second is what else does not need an operand that another plan computes (feedback attention's f).
    virtual bool runFirst(Problem const&, Tensors const&, CUstream_st*, std::string&) const
    {
        return true;
    }

    virtual bool runAhead(Problem const&, Tensors const&, CUstream_st*, std::string&) const
    {
        return true;
    }

    virtual bool runRest(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const
    {
        return run(p, t, stream, error);
    }
};

} // namespace sessa
