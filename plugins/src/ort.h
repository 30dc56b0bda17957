// What the shell for ONNX Runtime is made of: calls of its C API, and the operations' kernels.
#pragma once

#include "attributes.h"

#include <onnxruntime_c_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace sessa::ort
{

// The oldest C API with all that is used here (KernelInfoGetAllocator came last); later ones keep it.
constexpr uint32_t kApiVersion = kOrtApi;
static_assert(ORT_API_VERSION >= kApiVersion, "the header is of an older ONNX Runtime");

// An operation for one storage type and one execution provider, as ONNX Runtime knows it.
struct CustomOp : OrtCustomOp
{
    CustomOp(OrtApi const& runtime, Op const& operation, Storage type, bool cuda) noexcept;

    OrtApi const& api;
    Op const& op;
    Storage storage;
    bool device; // of the CUDA provider; else of the CPU's, which takes the node, looks at it and refuses to run it
};

// What a call of the API answered if it went wrong.
struct Failed
{
    OrtStatus* status;
};

inline void must(OrtStatus* status)
{
    if (status != nullptr)
    {
        throw Failed{status};
    }
}

// Whether a question was answered; that it was not is no error.
inline bool answered(OrtApi const& api, OrtStatus* status) noexcept
{
    api.ReleaseStatus(status);
    return status == nullptr;
}

OrtStatus* refuse(OrtApi const& api, OrtErrorCode code, Op const& op, std::string const& text) noexcept;

// The status that `body` returns or throws: nothing leaves an entry of the library but that.
template <typename Body>
OrtStatus* guarded(OrtApi const& api, Body body) noexcept
try
{
    return body();
}
catch (Failed const& failed)
{
    return failed.status;
}
catch (...)
{
    return api.CreateStatus(ORT_FAIL, "libsessa_ort.so: out of memory");
}

// An object of the API that goes with its scope.
template <typename T>
using Held = std::unique_ptr<T, void (*)(T*)>;

// The type of an operand once the storage type is settled.
ONNXTensorElementDataType typeOf(Operand const& operand, Storage storage) noexcept;

// Types and shapes of the inputs of a node or of a call, in their order; -1: a dimension that is not known.
class Inputs
{
public:
    void add(OrtApi const& api, OrtTensorTypeAndShapeInfo const& info);

    // As many as were added.
    std::vector<Shape> shapes() const;

    ONNXTensorElementDataType type(int32_t index) const
    {
        return mTypes[static_cast<size_t>(index)];
    }

private:
    std::vector<ONNXTensorElementDataType> mTypes;
    std::vector<int32_t> mRanks;
    std::vector<int64_t> mDims; // of one input after the other
};

// Tells the graph the outputs' shapes, numbers and names, where the inputs' say them.
void inferShapes(OrtApi const& api, Op const& op, OrtShapeInferContext& context);

// What the calls on a stream use, one after another.
struct Workspace
{
    std::mutex mutex; // held while an operation is enqueued, so that the kernels of two do not mix
    std::vector<void*> blocks;
    size_t size{}; // of the last block, the largest
};

// A workspace for each stream of a session, which all its nodes share: kept, since addresses that a captured graph holds must stay its own.
class Workspaces
{
public:
    // The session's of this node; it lives as long as one of the session's nodes holds it. Throws Failed.
    static std::shared_ptr<Workspaces> ofSession(OrtApi const& api, OrtKernelInfo const& info);

    Workspaces(OrtApi const& api, Held<OrtAllocator> allocator) noexcept;
    Workspaces(Workspaces const&) = delete;
    Workspaces& operator=(Workspaces const&) = delete;
    ~Workspaces();

    Workspace& of(void* stream);

    // Sees to it that the last block has at least `bytes`; the caller holds the mutex. False and a reason where there is no memory.
    bool grow(Workspace& workspace, size_t bytes, std::string& error);

private:
    OrtApi const& mApi;
    Held<OrtAllocator> mAllocator; // the session's on its device
    std::mutex mMutex;
    std::map<void*, Workspace> mStreams;
};

// An operation in a session.
class Kernel
{
public:
    // Reads the node's attributes and judges the shapes that the graph knows. Throws Failed.
    Kernel(CustomOp const& custom, OrtApi const& api, OrtKernelInfo const& info);
    Kernel(Kernel const&) = delete;
    Kernel& operator=(Kernel const&) = delete;

    // Enqueues the operation on the context's stream. Any number of threads may be here at once.
    OrtStatus* compute(OrtKernelContext& context) const;

    OrtApi const& api() const noexcept
    {
        return mApi;
    }

private:
    void judge(OrtKernelInfo const& info) const;

    OrtApi const& mApi;
    CustomOp const& mCustom;
    Attributes mAttributes;
    Op const* mOp; // the custom operation's, in the form that the attributes give it
    std::shared_ptr<Workspaces> mWorkspaces; // null on a CPU
};

} // namespace sessa::ort
