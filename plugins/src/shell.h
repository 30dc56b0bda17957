// What the two shells share of TensorRT: types, fields, the log.
#pragma once

#include "attributes.h"

#include <NvInferRuntime.h>

#include <string>

namespace sessa
{

#if NV_TENSORRT_MAJOR >= 9
constexpr bool kHasBFloat16 = true;
#else
constexpr bool kHasBFloat16 = false; // TensorRT 8.6
#endif

// The storage type of a tensor; false for a type the kernels do not store.
bool storageOf(nvinfer1::DataType type, Storage& storage) noexcept;

// Whether the tensor at `pos` (the inputs, then the output) may have this type, q's being settled: q as the attribute says, the output and the other
// operands of the storage type like q, the rest float32 or int32.
bool acceptsType(Op const& op, Attributes const& attributes, int32_t pos, nvinfer1::DataType type, nvinfer1::DataType q) noexcept;

// Whether there are as many inputs and outputs as the operation has; a message if not.
bool counted(Op const& op, int32_t inputs, int32_t outputs) noexcept;

// The problem that these inputs pose. False and a reason if the kernels do not take it.
bool describe(Op const& op, Attributes const& attributes, nvinfer1::PluginTensorDesc const* in, Problem& problem, std::string& error) noexcept;

// Describes the inputs and enqueues the operation. False and a reason on failure.
bool enqueueOn(Op const& op, Attributes const& attributes, nvinfer1::PluginTensorDesc const* in, void const* const* inputs, void* const* outputs,
    void* workspace, cudaStream_t stream, std::string& error) noexcept;

// Where an output's dimension comes from: the first input that has its letter, and the axis there.
struct Source
{
    int32_t input;
    int32_t axis;
};
Source sourceOf(Op const& op, char letter) noexcept;

// The dimensions of `dims` in 64 bits; `values` must outlive the result.
Shape shapeOf(nvinfer1::Dims const& dims, int64_t (&values)[nvinfer1::Dims::MAX_DIMS]) noexcept;

// Attributes from a field collection, checked; version, where asked for, is that of a serialised state (0: none). False and a reason otherwise.
bool readFields(nvinfer1::PluginFieldCollection const* fc, Attributes& attributes, int32_t* version, std::string& error) noexcept;

// The fields a creator names: scale, storage.
nvinfer1::PluginFieldCollection const* fieldNames() noexcept;

// Says on the log what is wrong; returns false, so that a caller can return it.
bool complain(Op const& op, std::string const& error) noexcept;

} // namespace sessa
