// Stands in for ONNX Runtime: registers the library's operations through a C API of its own and calls one node of them.
// The API has what the oldest supported version has and no more; whatever else is called is a null pointer. The functions are harness.cpp's, for this shell.
#include "harness_ops.h"

#include <onnxruntime_c_api.h>

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

namespace
{
int32_t gHeld = 0; // objects of the API that were given out and not given back
struct Counted
{
    Counted() { ++gHeld; }
    Counted(Counted const&) { ++gHeld; }
    ~Counted() { --gHeld; }
};
} // namespace

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
struct OrtKernelInfo
{
    std::map<std::string, float> reals;
    std::map<std::string, int64_t> wholes;
};
struct OrtMemoryInfo
{
};
struct Arena : Counted
{
};
struct OrtKernelContext
{
    std::vector<OrtValue> in;
    std::vector<OrtValue> out;
    void* stream{};
    void* workspace{};
    int64_t asked{-1};
    bool measuring{};
    bool freed{true};
};

namespace
{

OrtMemoryInfo gMemory;
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
    FILL(KernelInfo_GetInputTypeInfo, [](OrtKernelInfo const*, size_t, OrtTypeInfo** out) noexcept -> OrtStatus* {
        *out = new OrtTypeInfo; // a graph that says no shapes
        return nullptr;
    });
    FILL(CastTypeInfoToTensorInfo, [](OrtTypeInfo const* info, OrtTensorTypeAndShapeInfo const** out) noexcept -> OrtStatus* {
        *out = info;
        return nullptr;
    });
    FILL(ReleaseTypeInfo, release<OrtTypeInfo>);
    FILL(KernelInfoGetAllocator, [](OrtKernelInfo const*, OrtMemType type, OrtAllocator** out) noexcept -> OrtStatus* {
        *out = reinterpret_cast<OrtAllocator*>(new Arena);
        return type == OrtMemTypeDefault ? nullptr : absent();
    });
    FILL(ReleaseAllocator, [](OrtAllocator* allocator) noexcept { delete reinterpret_cast<Arena*>(allocator); });
    FILL(AllocatorGetInfo, [](OrtAllocator const*, OrtMemoryInfo const** out) noexcept -> OrtStatus* {
        *out = &gMemory;
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
    FILL(KernelContext_GetScratchBuffer, [](OrtKernelContext const* context, OrtMemoryInfo const* info, size_t bytes, void** out) noexcept -> OrtStatus* {
        gContext->asked = static_cast<int64_t>(bytes);
        gContext->freed = context->workspace == nullptr;
        *out = context->workspace;
        return context->measuring || info != &gMemory || bytes == 0 ? status(ORT_FAIL, "measured") : nullptr;
    });
    FILL(AllocatorFree, [](OrtAllocator*, void* data) noexcept -> OrtStatus* {
        gContext->freed = data == gContext->workspace;
        return nullptr;
    });
#undef FILL
    return api;
}

OrtApi const gApi = oldestApi();
uint32_t gNewest = 18; // version of the C API that the runtime has

OrtApi const* getApi(uint32_t version) noexcept
{
    return version <= gNewest ? &gApi : nullptr;
}

OrtApiBase const gBase{getApi, []() noexcept { return "1.17.3"; }};

using Register = OrtStatus* (*)(OrtSessionOptions*, OrtApiBase const*);

Register entry(char const* library)
{
    void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    return handle == nullptr ? nullptr : reinterpret_cast<Register>(dlsym(handle, "RegisterCustomOps"));
}

// True where there is none; else it is said and released.
bool well(OrtStatus* found)
{
    if (found != nullptr)
    {
        std::fprintf(stderr, "%s\n", found->text.c_str());
        delete found;
    }
    return found == nullptr;
}

struct Node
{
    std::vector<OrtCustomOp const*> ops; // of its name, for CUDA: one a storage type
    OrtKernelInfo info;
};

OrtCustomOp const* opFor(Node const& node, ONNXTensorElementDataType type)
{
    for (auto const* op : node.ops)
    {
        if (op->GetInputType(op, 0) == type)
        {
            return op;
        }
    }
    return node.ops.front(); // as no runtime would choose: the operation has to say it
}

ONNXTensorElementDataType typeOf(sessa::Operand const& operand, int32_t onnx)
{
    using sessa::Kind;
    return operand.kind == Kind::kFloat ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
        : operand.kind == Kind::kInt    ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
                                        : static_cast<ONNXTensorElementDataType>(onnx);
}

// One call of the node; `context` has been given everything but its tensors.
bool call(Node const& node, int32_t op, int32_t onnx, int64_t const* shape, void* const* pointers, OrtKernelContext& context)
{
    auto const operands = sessa::operandsOf(op);
    for (size_t i = 0; i < operands.size(); ++i)
    {
        OrtValue value;
        value.info.type = typeOf(operands[i], onnx);
        value.info.dims = sessa::dimensionsOf(operands[i], shape);
        value.data = pointers == nullptr ? nullptr : pointers[i];
        (i < static_cast<size_t>(sessa::kOps[op].inputs) ? context.in : context.out).push_back(value);
    }
    OrtCustomOp const* const custom = opFor(node, static_cast<ONNXTensorElementDataType>(onnx));
    void* kernel = nullptr;
    gContext = &context;
    bool good = well(custom->CreateKernelV2(custom, &gApi, &node.info, &kernel));
    if (good)
    {
        OrtStatus* const found = custom->KernelComputeV2(kernel, &context);
        good = context.measuring && found != nullptr ? (delete found, false) : well(found);
        custom->KernelDestroy(kernel);
    }
    context.in.clear();
    context.out.clear();
    gContext = nullptr;
    return good;
}

} // namespace

extern "C"
{

// What RegisterCustomOps says to a runtime whose newest C API is `newest`; "" where it takes it. text: at least 256 bytes.
void harness_register(char const* library, uint32_t newest, char* text)
{
    OrtSessionOptions options;
    gNewest = newest;
    OrtStatus* const found = entry(library)(&options, &gBase);
    gNewest = 18;
    std::snprintf(text, 256, "%s", found != nullptr ? found->text.c_str() : options.domain == nullptr ? "no domain" : "");
    delete found;
}

// How many objects of the API are held by nobody.
int32_t harness_held()
{
    return gHeld;
}

// A node with `storage`, where it is not negative, and one float attribute, where it has a name. nullptr where the library refuses it.
void* harness_create(char const* library, int32_t op, int32_t storage, char const* attribute, float value)
{
    Register const enter = entry(library);
    OrtSessionOptions options;
    if (enter == nullptr || !well(enter(&options, &gBase)) || options.domain->name != "sessa")
    {
        return nullptr;
    }
    auto* const node = new Node;
    for (auto const* custom : options.domain->ops)
    {
        char const* const provider = custom->GetExecutionProviderType(custom);
        if (std::string(custom->GetName(custom)) == sessa::kOps[op].name && provider != nullptr && std::string(provider) == "CUDAExecutionProvider"
            && custom->version == 18)
        {
            node->ops.push_back(custom);
        }
    }
    if (storage >= 0)
    {
        node->info.wholes["storage"] = storage;
    }
    if (attribute != nullptr)
    {
        node->info.reals[attribute] = value;
    }
    if (node->ops.size() == 3)
    {
        OrtCustomOp const* const custom = opFor(*node, static_cast<ONNXTensorElementDataType>(storage > 0 ? storage : 1));
        void* kernel = nullptr;
        if (well(custom->CreateKernelV2(custom, &gApi, &node->info, &kernel)))
        {
            custom->KernelDestroy(kernel);
            return node;
        }
    }
    delete node;
    return nullptr;
}

void harness_destroy(void* node)
{
    delete static_cast<Node*>(node);
}

// Bytes of workspace that a call of these shapes asks for: one that ends there.
int64_t harness_workspace(void* node, int32_t op, int32_t onnx, int64_t const* shape)
{
    OrtKernelContext context;
    context.measuring = true;
    call(*static_cast<Node*>(node), op, onnx, shape, nullptr, context);
    return context.asked < 0 ? 0 : context.asked;
}

// ONNX Runtime tells a kernel nothing before it calls it.
int32_t harness_shape(void*, int32_t, int32_t, int64_t const*)
{
    return 0;
}

// pointers: the inputs in order, the outputs, the workspace.
int32_t harness_enqueue(void* node, int32_t op, int32_t onnx, int64_t const* shape, void* const* pointers, void* stream)
{
    OrtKernelContext context;
    context.stream = stream;
    context.workspace = pointers[sessa::operandsOf(op).size()];
    bool const good = call(*static_cast<Node*>(node), op, onnx, shape, pointers, context);
    if (!context.freed)
    {
        std::fprintf(stderr, "the workspace was not given back\n");
    }
    return good && context.freed ? 0 : 1;
}

// Bit i: the operand at position i has the usual type in the operation for the storage type `onnx`.
int32_t harness_formats(void* node, int32_t op, int32_t onnx, int32_t)
{
    OrtCustomOp const* const custom = opFor(*static_cast<Node*>(node), static_cast<ONNXTensorElementDataType>(onnx));
    auto const operands = sessa::operandsOf(op);
    size_t const inputs = custom->GetInputTypeCount(custom);
    int32_t bits = 0;
    for (size_t i = 0; i < operands.size() && operands.size() == inputs + custom->GetOutputTypeCount(custom); ++i)
    {
        auto const type = i < inputs ? custom->GetInputType(custom, i) : custom->GetOutputType(custom, i - inputs);
        bits |= type == typeOf(operands[i], onnx) ? 1 << i : 0;
    }
    return bits;
}

} // extern "C"
