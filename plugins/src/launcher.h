// The operations on a CUDA stream, without TensorRT: what they take, workspace size, choice of binaries, launches. Their mathematics: ../README.md.
// What an operation is stands in ../ops.py, which writes ops.inc; how it is computed in its family's file.
#pragma once

#include "limits.h"

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

enum class Weights : int32_t // of an operation with a matrix of weights; ONNX TensorProto.DataType
{
    kStorage = 0,
    kInt8 = 3,
    kFloat8 = 17, // E4M3FN
};

// The float attributes of all operations, each of which has some of them.
struct Numbers
{
#define SESSA_ATTRIBUTE(field, absent) float field{absent};
#include "ops.inc"
#undef SESSA_ATTRIBUTE
};

struct Op;

// The letter of the size that a letter of Operand::shape stands for, or for half of.
char capital(char letter) noexcept;

struct Problem
{
    Op const* op{};
    Storage storage{Storage::kAny};
    Weights weights{Weights::kStorage};
    Numbers numbers;
#define SESSA_SIZE(letter, field, start) int64_t field{start};
#include "ops.inc"
#undef SESSA_SIZE

    // The size that a letter of Operand::shape stands for; nullptr for an unknown letter.
    int64_t* size(char letter) noexcept;
    int64_t const* size(char letter) const noexcept;

    // A dimension that a letter of Operand::shape stands for: a small letter is half of its size.
    int64_t dimension(char letter) const noexcept;
    void setDimension(char letter, int64_t value) noexcept;
};

enum class Kind : int32_t
{
    kStorage, // the storage type
    kFloat,
    kInt,
};

struct Operand
{
    char const* name;
    char const* shape; // one letter a dimension, see Problem::dimension
    Kind kind;
};

// above < value <= most, or exactly what it is where a node does not give it.
struct Attribute
{
    char const* name;
    float Numbers::*field;
    float above;
    float most;
    char const* allowed;

    bool takes(float value) const noexcept;
};

// ops.Limit: formulas over the letters of Problem::size.
struct Limit
{
    char const* what;
    char const* of;
    int64_t least;
    int64_t most;
    char const* multiple;
    char const* equals; // "" or what `of` must be
    char const* allowed;
};

class Plan;

// How an operation is computed.
struct Family
{
    Plan* (*plan)(Problem const&);                       // the caller owns the result
    std::vector<Problem> (*everything)(Storage storage); // problems that between them use every binary for a storage type
};

// One operation: input 0 settles the storage type.
struct Op
{
    char const* name; // of the plugin
    int32_t inputs;
    int32_t outputs;
    int32_t attributes;
    int32_t limits;
    Operand operands[kMaxInputs];
    Operand results[kMaxOutputs];
    Attribute attribute[kMaxAttributes];
    Limit limit[kMaxLimits];
    Family const* family;
};

// kFeedback, kCausal, ... and what its family's file says of each: kFeedbackFamily, ...
#define SESSA_OP(identifier, ...)                                                                                                                    \
    extern Op const k##identifier;                                                                                                                   \
    extern Family const k##identifier##Family;
#include "ops.inc"
#undef SESSA_OP

#define SESSA_OP(identifier, ...) +1
constexpr int32_t kOpCount = 0
#include "ops.inc"
    ;
#undef SESSA_OP
Op const& opAt(int32_t index) noexcept;

// An operation's form for weights of 8 bits (ops.Op.quantised), which is such a form's own too; nullptr where it has no matrix of weights.
Op const* quantised(Op const& op) noexcept;

struct Tensors
{
    void const* const* in{}; // in the order of Op::operands
    void* out{}; // the first output
    void* const* outs{};
};

// Whether the kernels take this problem; if not, `error` says what is wrong, the value got and what is allowed.
bool check(Problem const& problem, std::string& error) noexcept;

// Whether every attribute of the operation is in its range; if not, `error` says so.
bool check(Op const& op, Numbers const& numbers, std::string& error) noexcept;

// Bytes of scratch for this problem and every smaller one on the current device; where there is none, on any architecture in this library.
// 0 and a reason where the problem is not taken.
size_t workspaceSize(Problem const& problem, std::string& error) noexcept;

// Loads the binaries for this problem into the current context, so that `run` loads nothing (a stream may be captured by then).
bool prepare(Problem const& problem, std::string& error) noexcept;

// The same for every binary the operation may need with these types.
void prepareAll(Op const& op, Storage storage, Weights weights) noexcept;

// Enqueues the operation. Pointers are device pointers, 16-byte aligned; `workspace` holds workspaceSize bytes, and begins at a multiple of 128 where kernels
// make tensor descriptors in it (as every allocator of a GPU's memory gives it).
bool run(Problem const& problem, Tensors const& tensors, void* workspace, CUstream_st* stream, std::string& error) noexcept;

} // namespace sessa
