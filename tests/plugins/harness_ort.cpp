// Stands in for ONNX Runtime: registers the library's operations through a C API of its own and calls one node of them.
// The functions are harness.cpp's, for this shell; built by the tests against the header of the ONNX Runtime under test.
#include "fake_ort.h"
#include "harness_ops.h"

#include <dlfcn.h>

#include <cstdio>

namespace
{

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

// One call of a kernel of the node; `context` has been given everything but its tensors.
bool call(OrtCustomOp const& custom, void* kernel, int32_t op, int32_t onnx, int64_t const* shape, void* const* pointers, OrtKernelContext& context)
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
    gContext = &context;
    return well(custom.KernelComputeV2(kernel, &context));
}

// The same, of a session that is made for it.
bool callOnce(Node const& node, int32_t op, int32_t onnx, int64_t const* shape, void* const* pointers, OrtKernelContext& context)
{
    OrtCustomOp const* const custom = opFor(node, static_cast<ONNXTensorElementDataType>(onnx));
    void* kernel = nullptr;
    bool good = well(custom->CreateKernelV2(custom, &gApi, &node.info, &kernel));
    if (good)
    {
        good = call(*custom, kernel, op, onnx, shape, pointers, context);
        custom->KernelDestroy(kernel);
    }
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

// A node with `storage`, where it is not negative, `weights`, where they are not 0, and one float attribute, where it has a name. nullptr where the library refuses it.
void* harness_create(char const* library, int32_t op, int32_t storage, int32_t weights, char const* attribute, float value)
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
    if (weights != 0)
    {
        node->info.wholes["weights"] = weights;
    }
    node->info.inputs = static_cast<size_t>(sessa::kOps[op].inputs);
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

// Bytes of workspace that a call of these shapes asks for: one that ends there, saying so.
int64_t harness_workspace(void* node, int32_t op, int32_t onnx, int64_t const* shape)
{
    OrtKernelContext context;
    context.refusing = true;
    callOnce(*static_cast<Node*>(node), op, onnx, shape, nullptr, context);
    return context.asked;
}

// Two nodes of one session, called in turn: call i with shapes[i] on streams[i]. asked[i]: bytes of workspace that it asked the arena for. Returns how many
// blocks the session holds then, or -1 if some are left when it is gone.
int32_t harness_session(void* node, int32_t op, int32_t onnx, int32_t calls, int64_t const* shapes, int64_t const* streams, int64_t* asked)
{
    constexpr int32_t kSizes = sizeof(sessa::kLetters) - 1;
    OrtCustomOp const* const custom = opFor(*static_cast<Node*>(node), static_cast<ONNXTensorElementDataType>(onnx));
    void* kernels[2]{};
    for (auto& kernel : kernels)
    {
        static_cast<void>(well(custom->CreateKernelV2(custom, &gApi, &static_cast<Node*>(node)->info, &kernel)));
    }
    for (int32_t i = 0; i < calls; ++i)
    {
        OrtKernelContext context;
        context.stream = reinterpret_cast<void*>(streams[i]);
        context.workspace = &context; // there is no driver that would look at it
        call(*custom, kernels[i % 2], op, onnx, shapes + i * kSizes, nullptr, context);
        asked[i] = context.asked;
    }
    int32_t const held = gBlocks;
    custom->KernelDestroy(kernels[0]);
    bool const kept = gBlocks == held;
    custom->KernelDestroy(kernels[1]);
    return kept && gBlocks == 0 ? held : -1;
}

// A node of each of two sessions, called on one stream: bit 0: each asked the arena; bit 1: one's end takes its own block alone; bit 2: another session whose
// allocator lies where one that ended had its own asks anew; bit 3: nothing is left.
int32_t harness_sessions(void* node, int32_t op, int32_t onnx, int64_t const* shape)
{
    OrtCustomOp const* const custom = opFor(*static_cast<Node*>(node), static_cast<ONNXTensorElementDataType>(onnx));
    OrtMemoryInfo memory[2];
    auto const open = [&](int32_t session) {
        OrtKernelInfo info = static_cast<Node*>(node)->info;
        info.session = &memory[session];
        void* kernel = nullptr;
        static_cast<void>(well(custom->CreateKernelV2(custom, &gApi, &info, &kernel)));
        return kernel;
    };
    auto const asks = [&](void* kernel) {
        OrtKernelContext context;
        context.stream = node;
        context.workspace = &context;
        call(*custom, kernel, op, onnx, shape, nullptr, context);
        return context.asked > 0;
    };
    void* const first = open(0);
    void* const second = open(1);
    int32_t good = asks(first) && asks(second) && !asks(first) && gBlocks == 2 ? 1 : 0;
    custom->KernelDestroy(first);
    good |= gBlocks == 1 && !asks(second) ? 2 : 0;
    void* const third = open(0);
    good |= asks(third) && gBlocks == 2 ? 4 : 0;
    custom->KernelDestroy(second);
    custom->KernelDestroy(third);
    return good | (gBlocks == 0 ? 8 : 0);
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
    return callOnce(*static_cast<Node*>(node), op, onnx, shape, pointers, context) && gBlocks == 0 ? 0 : 1;
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
