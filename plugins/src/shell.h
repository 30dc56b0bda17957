// What the two shells share of TensorRT: types, fields, the log.
#pragma once

#include "attributes.h"

#include <NvInferRuntime.h>

#include <array>
#include <deque>
#include <string>
#include <vector>

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

// Whether there is a tensor at `pos`, inputs first, of an operation with so many inputs and outputs.
inline bool exists(Op const& op, int32_t pos, int32_t inputs, int32_t outputs) noexcept
{
    return inputs == op.inputs && outputs == op.outputs && pos >= 0 && pos < inputs + outputs;
}

// Whether there are as many inputs and outputs as the operation has; a message if not.
bool counted(Op const& op, int32_t inputs, int32_t outputs) noexcept;

// The problem that these inputs pose. False and a reason if the kernels do not take it.
bool describe(Op const& op, Attributes const& attributes, nvinfer1::PluginTensorDesc const* in, Problem& problem, std::string& error) noexcept;

// Bytes of workspace; 0 and a message where the problem is not taken.
size_t workspaceOf(Op const& op, Problem const& problem) noexcept;

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

// Attributes of `op` from a field collection, checked. serialised: the fields are an engine's, of which the version is looked at first. False and a reason
// otherwise.
bool readFields(Op const& op, nvinfer1::PluginFieldCollection const* fc, bool serialised, Attributes& attributes, std::string& error) noexcept;

// The fields of an operation: its float attributes, `storage` and, where it has a matrix, `weights`; with `attributes` their values, which must outlive this, and `state`.
class Fields
{
public:
    explicit Fields(Op const& op, Attributes const* attributes = nullptr) noexcept;
    Fields(Fields const&) = delete;
    Fields& operator=(Fields const&) = delete;

    nvinfer1::PluginFieldCollection const* get() const noexcept
    {
        return &mCollection;
    }

private:
    std::array<nvinfer1::PluginField, kMaxAttributes + 3> mFields{};
    int32_t mStorage{};
    int32_t mWeights{};
    int32_t mVersion{static_cast<int32_t>(kStateVersion)};
    nvinfer1::PluginFieldCollection mCollection{};
};

// A creator for every operation, in the order of ops.inc.
template <typename Creator, typename Interface>
Interface* const* creators(int32_t& count) noexcept
try
{
    struct All
    {
        std::deque<Creator> made;
        std::vector<Interface*> listed;

        All()
        {
            for (int32_t i = 0; i < kOpCount; ++i)
            {
                listed.push_back(&made.emplace_back(opAt(i)));
            }
        }
    };
    static All const* const all = new All; // never destroyed: the registry may ask for them until the process ends
    count = kOpCount;
    return all->listed.data();
}
catch (...)
{
    count = 0;
    return nullptr;
}

// Says on the log what is wrong; returns false, so that a caller can return it.
bool complain(Op const& op, std::string const& error) noexcept;

} // namespace sessa
