// What the two shells share of TensorRT: types, fields, the log.
#pragma once

#include "attributes.h"

#include <NvInferRuntime.h>

#include <array>
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

// Whether the tensor at `pos` (7 inputs, then s) may have this type, the types before it being settled: q as the attribute says, gamma float32,
// past_length int32, everything else like q.
bool acceptsType(Attributes const& attributes, int32_t pos, nvinfer1::DataType type, nvinfer1::DataType q) noexcept;

// The problem that these seven inputs pose. False and a reason if the kernels do not take it.
bool describe(Attributes const& attributes, nvinfer1::PluginTensorDesc const* in, Problem& problem, std::string& error) noexcept;

// Attributes from a field collection, checked; version, where asked for, is that of a serialised state (0: none). False and a reason otherwise.
bool readFields(nvinfer1::PluginFieldCollection const* fc, Attributes& attributes, int32_t* version, std::string& error) noexcept;

// The fields a creator names: scale, storage.
nvinfer1::PluginFieldCollection const* fieldNames() noexcept;

// Says on the log what is wrong; returns false, so that a caller can return it.
bool complain(std::string const& error) noexcept;

std::string wrongCounts(int32_t inputs, int32_t outputs);

} // namespace sessa
