// The shell for ONNX Runtime, by its C API: it says what operations there are and hands calls on to their kernels.
#include "ort.h"

#include "cubins.h"

#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <new>

namespace sessa
{
char const* const kBuildCommand = "sessa-deploy plugin build --for ort";
} // namespace sessa

namespace sessa::ort
{
namespace
{

constexpr char const* kProvider = "CUDAExecutionProvider";

CustomOp const& of(OrtCustomOp const* op) noexcept
{
    return *static_cast<CustomOp const*>(op);
}

char const* name(OrtCustomOp const* op) noexcept
{
    return of(op).op.name;
}

char const* provider(OrtCustomOp const* op) noexcept
{
    return of(op).device ? kProvider : nullptr;
}

// With the scales of weights in 8 bits, which a node may leave out.
Op const& longest(OrtCustomOp const* op) noexcept
{
    Op const* const other = quantised(of(op).op);
    return other == nullptr ? of(op).op : *other;
}

size_t inputCount(OrtCustomOp const* op) noexcept
{
    return static_cast<size_t>(longest(op).inputs);
}

size_t outputCount(OrtCustomOp const* op) noexcept
{
    return static_cast<size_t>(of(op).op.outputs);
}

ONNXTensorElementDataType inputType(OrtCustomOp const* op, size_t index) noexcept
{
    return typeOf(longest(op).operands[index], of(op).storage);
}

ONNXTensorElementDataType outputType(OrtCustomOp const* op, size_t index) noexcept
{
    return typeOf(of(op).op.results[index], of(op).storage);
}

OrtCustomOpInputOutputCharacteristic required(OrtCustomOp const*, size_t) noexcept
{
    return INPUT_OUTPUT_REQUIRED;
}

OrtCustomOpInputOutputCharacteristic requiredOfAll(OrtCustomOp const* op, size_t index) noexcept
{
    return index < static_cast<size_t>(of(op).op.inputs) ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

OrtMemType onDevice(OrtCustomOp const*, size_t) noexcept
{
    return OrtMemTypeDefault;
}

int one(OrtCustomOp const*) noexcept
{
    return 1;
}

OrtStatus* create(OrtCustomOp const* op, OrtApi const* api, OrtKernelInfo const* info, void** kernel) noexcept
{
    return guarded(*api, [&]() -> OrtStatus* {
        *kernel = new Kernel(of(op), *api, *info);
        return nullptr;
    });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) noexcept
{
    auto const& asked = *static_cast<Kernel const*>(kernel);
    return guarded(asked.api(), [&] { return asked.compute(*context); });
}

void destroy(void* kernel) noexcept
{
    delete static_cast<Kernel*>(kernel);
}

OrtStatus* infer(OrtCustomOp const* op, OrtShapeInferContext* context) noexcept
{
    // What goes wrong is judged again, and said, when the kernel is made: ONNX Runtime neither reads nor frees a status from here.
    of(op).api.ReleaseStatus(guarded(of(op).api, [&]() -> OrtStatus* {
        inferShapes(of(op).api, of(op).op, *context);
        return nullptr;
    }));
    return nullptr;
}

// The operations for one ONNX Runtime; they and their domain stay as long as the process, for sessions may.
struct Domain
{
    std::deque<CustomOp> ops;
    OrtCustomOpDomain* handle{};
};

OrtCustomOpDomain* domainOf(OrtApi const& api)
{
    static std::mutex* const mutex = new std::mutex;
    static auto* const domains = new std::map<OrtApi const*, Domain>;
    std::lock_guard<std::mutex> const lock(*mutex);
    Domain& domain = (*domains)[&api];
    if (domain.handle != nullptr)
    {
        return domain.handle;
    }
    domain.ops.clear();
    OrtCustomOpDomain* made = nullptr;
    must(api.CreateCustomOpDomain(kDomain, &made));
    Held<OrtCustomOpDomain> held(made, api.ReleaseCustomOpDomain);
    for (bool const device : {true, false})
    {
        for (int32_t i = 0; i < kOpCount; ++i)
        {
            for (Storage const storage : {Storage::kFloat, Storage::kHalf, Storage::kBFloat16})
            {
                must(api.CustomOpDomain_Add(made, &domain.ops.emplace_back(api, opAt(i), storage, device)));
            }
        }
    }
    domain.handle = held.release();
    return domain.handle;
}

} // namespace

CustomOp::CustomOp(OrtApi const& runtime, Op const& operation, Storage type, bool cuda) noexcept
    : OrtCustomOp{}
    , api(runtime)
    , op(operation)
    , storage(type)
    , device(cuda)
{
    version = kApiVersion; // the fields that this version reads and that are not here may be null: no versions of an operation, no output in an input's place
    GetName = sessa::ort::name;
    GetExecutionProviderType = provider;
    GetInputType = inputType;
    GetInputTypeCount = inputCount;
    GetOutputType = outputType;
    GetOutputTypeCount = outputCount;
    GetInputCharacteristic = requiredOfAll;
    GetOutputCharacteristic = required;
    GetInputMemoryType = onDevice;
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = one;
    CreateKernelV2 = create;
    KernelComputeV2 = sessa::ort::compute;
    KernelDestroy = destroy;
    InferOutputShapeFn = infer;
}

void inferShapes(OrtApi const& api, Op const& plain, OrtShapeInferContext& context)
{
    struct Dimension
    {
        int64_t value{-1};
        std::string name;
    };
    std::map<char, Dimension> known;
    ONNXTensorElementDataType storage{}; // of the node, whichever of its operations was asked
    size_t count = 0;
    must(api.ShapeInferContext_GetInputCount(&context, &count));
    Op const* const other = quantised(plain);
    Op const& op = other != nullptr && count == static_cast<size_t>(other->inputs) ? *other : plain;
    for (size_t i = 0; i < count && i < static_cast<size_t>(op.inputs); ++i)
    {
        OrtTensorTypeAndShapeInfo* info = nullptr; // the context's
        size_t rank = 0;
        must(api.ShapeInferContext_GetInputTypeShape(&context, i, &info));
        must(i == 0 ? api.GetTensorElementType(info, &storage) : nullptr);
        must(api.GetDimensionsCount(info, &rank));
        char const* const letters = op.operands[i].shape;
        if (rank != std::strlen(letters))
        {
            continue;
        }
        std::vector<int64_t> values(rank);
        std::vector<char const*> names(rank);
        must(api.GetDimensions(info, values.data(), rank));
        must(api.GetSymbolicDimensions(info, names.data(), rank));
        for (size_t a = 0; a < rank; ++a)
        {
            Dimension& dimension = known[letters[a]];
            dimension.value = dimension.value >= 0 ? dimension.value : values[a];
            dimension.name = dimension.name.empty() && names[a] != nullptr ? names[a] : dimension.name;
        }
    }
    for (int32_t i = 0; i < op.outputs; ++i)
    {
        std::vector<int64_t> values;
        std::vector<char const*> names;
        bool whole = true;
        for (char const* letter = op.results[i].shape; *letter != 0; ++letter)
        {
            Dimension const& dimension = known[*letter];
            values.push_back(dimension.value);
            names.push_back(dimension.value >= 0 ? "" : dimension.name.c_str());
            whole = whole && (dimension.value >= 0 || !dimension.name.empty());
        }
        if (!whole)
        {
            continue; // a dimension without number and name has no form here, and a name made up might be another's
        }
        OrtTensorTypeAndShapeInfo* info = nullptr;
        must(api.CreateTensorTypeAndShapeInfo(&info));
        Held<OrtTensorTypeAndShapeInfo> const held(info, api.ReleaseTensorTypeAndShapeInfo);
        must(api.SetTensorElementType(info, typeOf(op.results[i], static_cast<Storage>(storage))));
        must(api.SetDimensions(info, values.data(), values.size()));
        must(api.SetSymbolicDimensions(info, names.data(), names.size()));
        must(api.ShapeInferContext_SetOutputTypeShape(&context, static_cast<size_t>(i), info));
    }
}

} // namespace sessa::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base) noexcept
{
    using namespace sessa::ort;
    OrtApi const* const api = base->GetApi(kApiVersion);
    if (api == nullptr)
    {
        // What makes a status is in every version, at the same place.
        OrtApi const* const oldest = base->GetApi(1);
        return oldest == nullptr ? nullptr : guarded(*oldest, [&] {
            std::string const text = std::string("libsessa_ort.so: got ONNX Runtime ") + base->GetVersionString()
                + "; allowed: 1." + std::to_string(kApiVersion) + " or later; fix: pip install --upgrade onnxruntime-gpu";
            return oldest->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
        });
    }
    return guarded(*api, [&] { return api->AddCustomOpDomain(options, domainOf(*api)); });
}

// The version of the C API that this library asks ONNX Runtime for (plugins/library.py asks).
extern "C" __attribute__((visibility("default"))) int32_t sessaOrtApiVersion() noexcept
{
    return static_cast<int32_t>(sessa::ort::kApiVersion);
}
