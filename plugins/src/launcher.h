// Feedback attention on a CUDA stream, without TensorRT: shape checks, workspace size, choice of binary, launches.
//   s_t = f_t + gamma_t * sum_j softmax_j(q_t . k_j * scale) s_j     (arXiv 2604.18580, section 3; see ../README.md)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct CUstream_st;

namespace sessa
{

enum class Storage : int32_t // ONNX TensorProto.DataType
{
    kAny = 0,
    kFloat = 1,
    kHalf = 10,
    kBFloat16 = 16,
};

struct Problem
{
    int64_t batch{};
    int64_t tokens{};   // T new rows
    int64_t capacity{}; // P rows of past
    int64_t width{};    // D
    Storage storage{Storage::kAny};
    float scale{}; // 0: D^-1/2
};

struct Tensors
{
    void const* q{};           // (B,T,D)
    void const* k{};           // (B,T,D)
    void const* gamma{};       // (B,T) float32
    void const* f{};           // (B,T,D)
    void const* past_k{};      // (B,P,D)
    void const* past_s{};      // (B,P,D)
    void const* past_length{}; // (B) int32
    void* s{};                 // (B,T,D)
};

// Whether the kernels take this problem; if not, `error` says what is wrong, the value got and what is allowed.
bool check(Problem const& problem, std::string& error) noexcept;

// Bytes of scratch for this problem and every smaller one on the current device; where there is none, on any architecture in this library.
size_t workspaceSize(Problem const& problem) noexcept;

// Loads the binaries for this problem into the current context, so that `run` loads nothing (a stream may be captured by then).
bool prepare(Problem const& problem, std::string& error) noexcept;

// Enqueues the operation. Pointers are device pointers, 16-byte aligned; `workspace` holds workspaceSize bytes.
bool run(Problem const& problem, Tensors const& tensors, void* workspace, CUstream_st* stream, std::string& error) noexcept;

} // namespace sessa
