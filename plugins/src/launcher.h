// The operations on a CUDA stream, without TensorRT: what they take, workspace size, choice of binaries, launches. Their mathematics: ../README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

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

struct Op;

struct Problem
{
    Op const* op{};
    int64_t batch{1};
    int64_t tokens{1};   // T new rows
    int64_t capacity{};  // P rows of past
    int64_t width{1};    // D, d of one head of causal attention
    int64_t heads{1};    // Hq
    int64_t kvHeads{1};  // Hkv
    Storage storage{Storage::kAny};
    float scale{}; // of the scores, 0: width^-1/2; eps of a norm, gamma_max of a gain, 0: their defaults
    int64_t headWidth{1};   // d, where width is D
    int64_t columns{1};     // N of a product
    int64_t doubleWidth{2}; // 2 D
    int64_t pairs{1};       // d / 2
    int64_t one{1};
    int64_t limbs{4};

    // The size that a letter of Operand::shape stands for: B batch, T new rows, P rows of past, D width, H query heads, K key/value heads, C head width,
    // N columns, E 2 D, J pairs, I one, R limbs; nullptr for an unknown letter.
    int64_t* size(char letter) noexcept;
};

enum class Kind : int32_t
{
    kStorage, // the storage type
    kFloat,
    kInt,
};

constexpr int32_t kMaxInputs = 13;
constexpr int32_t kMaxOutputs = 6;

struct Operand
{
    char const* name;
    char const* shape; // one letter a dimension, see Problem::size
    Kind kind;
};

class Plan;

// One operation: input 0 settles the storage type. `results` may be left out: then there is one output of input 0's shape and type.
struct Op
{
    char const* name; // of the plugin
    int32_t inputs;
    Operand operands[kMaxInputs];
    bool (*check)(Problem const&, std::string& error);     // limits of this operation's own
    Plan* (*plan)(Problem const&);                         // how to compute it; the caller owns the result
    std::vector<Problem> (*everything)(Storage storage);   // problems that between them use every binary for a storage type
    int32_t outputs{1};
    Operand results[kMaxOutputs]{};

    Operand result(int32_t index) const noexcept
    {
        return results[index].shape != nullptr ? results[index] : Operand{"output", operands[0].shape, Kind::kStorage};
    }
};

extern Op const kFeedback;
extern Op const kCausal;
extern Op const kRotary;
extern Op const kNorm;
extern Op const kLinearHeads;
extern Op const kLogits;
extern Op const kTail;
extern Op const kEnter;
extern Op const kProjectGain;
extern Op const kMixer;
constexpr int32_t kOpCount = 10;
Op const& opAt(int32_t index) noexcept;

struct Tensors
{
    void const* const* in{}; // in the order of Op::operands
    void* out{}; // the first output
    void* const* outs{};
};

// Whether the kernels take this problem; if not, `error` says what is wrong, the value got and what is allowed.
bool check(Problem const& problem, std::string& error) noexcept;

// Bytes of scratch for this problem and every smaller one on the current device; where there is none, on any architecture in this library.
size_t workspaceSize(Problem const& problem) noexcept;

// Loads the binaries for this problem into the current context, so that `run` loads nothing (a stream may be captured by then).
bool prepare(Problem const& problem, std::string& error) noexcept;

// The same for every binary the operation may need with this storage type.
void prepareAll(Op const& op, Storage storage) noexcept;

// Enqueues the operation. Pointers are device pointers, 16-byte aligned; `workspace` holds workspaceSize bytes.
bool run(Problem const& problem, Tensors const& tensors, void* workspace, CUstream_st* stream, std::string& error) noexcept;

} // namespace sessa
