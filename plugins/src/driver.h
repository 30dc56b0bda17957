// The part of the CUDA driver that launches kernels, opened at run time: the library links neither libcuda nor libcudart.
#pragma once

#include "cubins.h"

#include <cstdint>
#include <string>
#include <vector>

struct CUstream_st;

namespace sessa
{

// Compute capability of the current context's device (90 for 9.0); 0 and a reason where there is no driver, device or context.
int32_t currentArch(std::string& error) noexcept;

// Loads `cubin` into the current context, unless it is there already. False and a reason on failure.
bool loadCubin(Cubin const& cubin, std::string& error) noexcept;

// How many programs of `cubin`, which is loaded, the current context's device holds at once; 0 if the driver does not say.
int64_t residentPrograms(Cubin const& cubin) noexcept;

// Argument values of one launch, in the kernel's order; Triton's two hidden pointers are added by `launch`, the first of them from `scratch`.
class Arguments
{
public:
    template <typename T>
    Arguments& add(T value)
    {
        static_assert(sizeof(T) <= sizeof(uint64_t), "an argument is a pointer or a scalar");
        uint64_t slot = 0;
        __builtin_memcpy(&slot, &value, sizeof(T));
        mValues.push_back(slot);
        return *this;
    }

    // Where the programs make tensor descriptors, Cubin::scratch bytes each.
    void scratch(char* memory) noexcept
    {
        mScratch = memory;
    }

    char* scratch() const noexcept
    {
        return mScratch;
    }

    std::vector<uint64_t>& values() noexcept
    {
        return mValues;
    }

private:
    std::vector<uint64_t> mValues;
    char* mScratch{};
};

constexpr int64_t kManyRows = INT64_MAX;

struct Grid
{
    int64_t x{1};
    int64_t y{1};
    int64_t z{1};
};

// Enqueues one kernel; neither allocates device memory nor synchronises once the cubin is loaded. False and a reason on failure.
// rows: B T. Up to Cubin::earlyRows of them its programs may be in place before the kernel ahead of it in the stream ends (kernels/device.py, begin).
bool launch(Cubin const& cubin, Grid grid, Arguments& arguments, CUstream_st* stream, std::string& error, int64_t rows = kManyRows) noexcept;

// Whether the last kernel that this thread has launched through `launch` is `kernel`, on this stream.
bool launchedLast(CUstream_st* stream, char const* kernel) noexcept;

// A function of the driver; nullptr where there is no driver, or none of that name.
void* driverFunction(char const* name) noexcept;

} // namespace sessa
