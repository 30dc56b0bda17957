// A second stream beside the one that an operation is given, for work that leaves multiprocessors idle.
#pragma once

#include <string>

struct CUstream_st;

namespace sessa
{

// A stream that goes on beside `stream` from where that one stands; `stream` itself where the driver gives none, and then all is one after the other.
// It belongs to `stream` alone, for as long as its context lives, so that a captured stream's is captured with it.
CUstream_st* fork(CUstream_st* stream) noexcept;

// `stream` goes on when what was launched on `side`, which `fork` gave for it, has ended. False and a reason on failure.
bool join(CUstream_st* stream, CUstream_st* side, std::string& error) noexcept;

} // namespace sessa
