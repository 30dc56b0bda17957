// ONNX Runtime's C API as far as the library needs it, on plain structs. It has what the oldest supported version has and no more: whatever else is called
// is a null pointer.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

inline int32_t gHeld = 0; // objects of the API that were given out and not given back
struct Counted
{
    Counted() { ++gHeld; }
    Counted(Counted const&) { ++gHeld; }
    ~Counted() { --gHeld; }
};

struct OrtStatus : Counted
{
    std::string text;
};
struct OrtCustomOpDomain
{
    std::string name;
    std::vector<OrtCustomOp const*> ops;
};
struct OrtSessionOptions
{
    OrtCustomOpDomain* domain{};
};
struct OrtTensorTypeAndShapeInfo : Counted
{
    ONNXTensorElementDataType type{};
    std::vector<int64_t> dims;
    std::vector<std::string> names;
};
struct OrtTypeInfo : OrtTensorTypeAndShapeInfo
{
};
struct OrtValue
{
    OrtTensorTypeAndShapeInfo info;
    void* data{};
};
struct OrtMemoryInfo
{
};
struct OrtKernelInfo
{
    OrtMemoryInfo const* session{}; // what its session's allocator describes
    std::map<std::string, float> reals;
    std::map<std::string, int64_t> wholes;
    size_t inputs{};
};
struct Arena : Counted
{
    explicit Arena(OrtMemoryInfo const* of) : memory(of) {}
    OrtMemoryInfo const* memory;
};
struct OrtKernelContext
{
    std::vector<OrtValue> in;
    std::vector<OrtValue> out;
    void* stream{};
    void* workspace{};
    int64_t asked{}; // bytes of workspace
    bool refusing{};  // to give it
};

namespace
{

OrtMemoryInfo gMemory;
int32_t gBlocks = 0; // of workspace that are given out
OrtKernelContext* gContext = nullptr; // of the call under way

OrtStatus* status(OrtErrorCode, char const* text) noexcept
{
    auto* const made = new OrtStatus;
    made->text = text;
    return made;
}

OrtStatus* absent() noexcept
{
    return status(ORT_FAIL, "no such attribute");
}

template <typename T>
void release(T* object) noexcept
{
    delete object;
}

template <typename T>
OrtStatus* attribute(std::map<std::string, T> const& all, char const* name, T* out)
{
    auto const found = all.find(name);
    if (found == all.end())
    {
        return absent();
    }
    *out = found->second;
    return nullptr;
}

OrtApi oldestApi() noexcept
{
    OrtApi api{};
// Nothing that came after the oldest version: the position of what it brought last is the end.
#define FILL(name, ...)                                                                                                                              \
    static_assert(offsetof(OrtApi, name) <= offsetof(OrtApi, KernelInfoGetAllocator), "a later version's");                                          \
    api.name = __VA_ARGS__
    FILL(CreateStatus, status);
    FILL(ReleaseStatus, release<OrtStatus>);
    FILL(CreateCustomOpDomain, [](char const* name, OrtCustomOpDomain** out) noexcept -> OrtStatus* {
        *out = new OrtCustomOpDomain{name, {}};
        return nullptr;
    });
    FILL(ReleaseCustomOpDomain, release<OrtCustomOpDomain>);
    FILL(CustomOpDomain_Add, [](OrtCustomOpDomain* domain, OrtCustomOp const* op) noexcept -> OrtStatus* {
        domain->ops.push_back(op);
        return nullptr;
    });
    FILL(AddCustomOpDomain, [](OrtSessionOptions* options, OrtCustomOpDomain* domain) noexcept -> OrtStatus* {
        options->domain = domain;
        return nullptr;
    });
    FILL(KernelInfoGetAttribute_float, [](OrtKernelInfo const* info, char const* name, float* out) noexcept { return attribute(info->reals, name, out); });
    FILL(KernelInfoGetAttribute_int64, [](OrtKernelInfo const* info, char const* name, int64_t* out) noexcept { return attribute(info->wholes, name, out); });
    FILL(KernelInfoGetAttribute_string, [](OrtKernelInfo const*, char const*, char*, size_t*) noexcept { return absent(); });
    FILL(KernelInfoGetAttributeArray_float, [](OrtKernelInfo const*, char const*, float*, size_t*) noexcept { return absent(); });
    FILL(KernelInfoGetAttributeArray_int64, [](OrtKernelInfo const*, char const*, int64_t*, size_t*) noexcept { return absent(); });
    FILL(KernelInfo_GetNodeName, [](OrtKernelInfo const*, char*, size_t* size) noexcept -> OrtStatus* {
        *size = 1; // a node without a name
        return nullptr;
    });
    FILL(KernelInfo_GetInputCount, [](OrtKernelInfo const* info, size_t* out) noexcept -> OrtStatus* {
        *out = info->inputs;
        return nullptr;
    });
    FILL(KernelInfo_GetInputTypeInfo, [](OrtKernelInfo const*, size_t, OrtTypeInfo** out) noexcept -> OrtStatus* {
        *out = new OrtTypeInfo; // a graph that says no shapes
        return nullptr;
    });
    FILL(CastTypeInfoToTensorInfo, [](OrtTypeInfo const* info, OrtTensorTypeAndShapeInfo const** out) noexcept -> OrtStatus* {
        *out = info;
        return nullptr;
    });
    FILL(ReleaseTypeInfo, release<OrtTypeInfo>);
    FILL(KernelInfoGetAllocator, [](OrtKernelInfo const* info, OrtMemType type, OrtAllocator** out) noexcept -> OrtStatus* {
        *out = reinterpret_cast<OrtAllocator*>(new Arena(info->session != nullptr ? info->session : &gMemory));
        return type == OrtMemTypeDefault ? nullptr : absent();
    });
    FILL(ReleaseAllocator, [](OrtAllocator* allocator) noexcept { delete reinterpret_cast<Arena*>(allocator); });
    FILL(AllocatorGetInfo, [](OrtAllocator const* allocator, OrtMemoryInfo const** out) noexcept -> OrtStatus* {
        *out = reinterpret_cast<Arena const*>(allocator)->memory;
        return nullptr;
    });
    FILL(GetTensorTypeAndShape, [](OrtValue const* value, OrtTensorTypeAndShapeInfo** out) noexcept -> OrtStatus* {
        *out = new OrtTensorTypeAndShapeInfo(value->info);
        return nullptr;
    });
    FILL(ReleaseTensorTypeAndShapeInfo, release<OrtTensorTypeAndShapeInfo>);
    FILL(GetTensorElementType, [](OrtTensorTypeAndShapeInfo const* info, ONNXTensorElementDataType* out) noexcept -> OrtStatus* {
        *out = info->type;
        return nullptr;
    });
    FILL(GetDimensionsCount, [](OrtTensorTypeAndShapeInfo const* info, size_t* out) noexcept -> OrtStatus* {
        *out = info->dims.size();
        return nullptr;
    });
    FILL(GetDimensions, [](OrtTensorTypeAndShapeInfo const* info, int64_t* out, size_t count) noexcept -> OrtStatus* {
        for (size_t i = 0; i < count; ++i)
        {
            out[i] = info->dims[i];
        }
        return nullptr;
    });
    FILL(GetTensorMutableData, [](OrtValue* value, void** out) noexcept -> OrtStatus* {
        *out = value->data;
        return nullptr;
    });
    FILL(KernelContext_GetInput, [](OrtKernelContext const* context, size_t index, OrtValue const** out) noexcept -> OrtStatus* {
        *out = &context->in[index];
        return nullptr;
    });
    FILL(KernelContext_GetOutput, [](OrtKernelContext* context, size_t index, int64_t const* dims, size_t count, OrtValue** out) noexcept -> OrtStatus* {
        if (context->out[index].info.dims != std::vector<int64_t>(dims, dims + count))
        {
            return status(ORT_FAIL, "an output of the wrong shape was asked for");
        }
        *out = &context->out[index];
        return nullptr;
    });
    FILL(KernelContext_GetGPUComputeStream, [](OrtKernelContext const* context, void** out) noexcept -> OrtStatus* {
        *out = context->stream;
        return nullptr;
    });
    FILL(GetErrorMessage, [](OrtStatus const* found) noexcept { return found->text.c_str(); });
    FILL(AllocatorAlloc, [](OrtAllocator*, size_t bytes, void** out) noexcept -> OrtStatus* {
        gContext->asked = static_cast<int64_t>(bytes);
        *out = gContext->refusing || bytes == 0 ? nullptr : gContext->workspace;
        gBlocks += *out == nullptr ? 0 : 1;
        return gContext->refusing || bytes == 0 ? status(ORT_FAIL, "the arena is full") : nullptr;
    });
    FILL(AllocatorFree, [](OrtAllocator*, void* block) noexcept -> OrtStatus* {
        gBlocks -= block == nullptr ? 0 : 1;
        return nullptr;
    });
#undef FILL
    return api;
}

} // namespace
