// An operation in a session of ONNX Runtime: attributes, types, shapes, workspace; launcher.cpp does the work.
#include "ort.h"

#include "plan.h"

#include <array>
#include <cstring>

namespace sessa::ort
{
namespace
{

std::string nameOf(ONNXTensorElementDataType type)
{
    switch (type)
    {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    default: return "ONNX type " + std::to_string(static_cast<int32_t>(type));
    }
}

// The node's name for a message, "" where it has none.
std::string nodeName(OrtApi const& api, OrtKernelInfo const& info)
{
    size_t size = 0;
    if (!answered(api, api.KernelInfo_GetNodeName(&info, nullptr, &size)) || size < 2)
    {
        return "";
    }
    std::string name(size, '\0');
    if (!answered(api, api.KernelInfo_GetNodeName(&info, name.data(), &size)))
    {
        return "";
    }
    return "node " + std::string(name.c_str()) + ": ";
}

// Whether the node has an attribute of that name which is no number of the right kind: the API has no word for that, so every other kind is tried.
bool otherwise(OrtApi const& api, OrtKernelInfo const& info, char const* name)
{
    float real = 0;
    int64_t whole = 0;
    size_t reals = 0;
    size_t wholes = 0;
    size_t characters = 0;
    bool const any[]{answered(api, api.KernelInfoGetAttribute_float(&info, name, &real)),
        answered(api, api.KernelInfoGetAttribute_int64(&info, name, &whole)),
        answered(api, api.KernelInfoGetAttribute_string(&info, name, nullptr, &characters)),
        answered(api, api.KernelInfoGetAttributeArray_float(&info, name, nullptr, &reals)) && reals > 0,
        answered(api, api.KernelInfoGetAttributeArray_int64(&info, name, nullptr, &wholes)) && wholes > 0};
    return any[0] || any[1] || any[2] || any[3] || any[4];
}

// What does not fit 32 bits is -1, which no attribute may be.
bool readInteger(OrtApi const& api, OrtKernelInfo const& info, char const* name, int32_t& value, std::string& error)
{
    int64_t found = 0;
    if (answered(api, api.KernelInfoGetAttribute_int64(&info, name, &found)))
    {
        value = found == static_cast<int32_t>(found) ? static_cast<int32_t>(found) : -1;
    }
    else if (otherwise(api, info, name))
    {
        error = std::string("attribute ") + name + ": allowed: one integer";
        return false;
    }
    return true;
}

bool readAttributes(OrtApi const& api, OrtKernelInfo const& info, Op const& op, Attributes& attributes, std::string& error)
{
    for (int32_t i = 0; i < op.attributes; ++i)
    {
        Attribute const& one = op.attribute[i];
        float value = 0;
        if (answered(api, api.KernelInfoGetAttribute_float(&info, one.name, &value)))
        {
            attributes.numbers.*one.field = value;
        }
        else if (otherwise(api, info, one.name))
        {
            error = std::string("attribute ") + one.name + ": allowed: one float32";
            return false;
        }
    }
    int32_t storage = static_cast<int32_t>(attributes.storage);
    int32_t weights = static_cast<int32_t>(attributes.weights);
    if (!readInteger(api, info, kFieldStorage, storage, error) || !readInteger(api, info, kFieldWeights, weights, error))
    {
        return false;
    }
    attributes.storage = static_cast<Storage>(storage);
    attributes.weights = static_cast<Weights>(weights);
    return attributes.check(op, error);
}

} // namespace

OrtStatus* refuse(OrtApi const& api, OrtErrorCode code, Op const& op, std::string const& text) noexcept
try
{
    return api.CreateStatus(code, (std::string(op.name) + ": " + (text.empty() ? "out of memory" : text)).c_str());
}
catch (...)
{
    return api.CreateStatus(ORT_FAIL, op.name);
}

ONNXTensorElementDataType typeOf(Operand const& operand, Storage storage) noexcept
{
    switch (operand.kind)
    {
    case Kind::kFloat: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case Kind::kInt: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case Kind::kStorage: break;
    }
    return static_cast<ONNXTensorElementDataType>(storage); // the numbers are ONNX's
}

void Inputs::add(OrtApi const& api, OrtTensorTypeAndShapeInfo const& info)
{
    ONNXTensorElementDataType type{};
    size_t rank = 0;
    must(api.GetTensorElementType(&info, &type));
    must(api.GetDimensionsCount(&info, &rank));
    mTypes.push_back(type);
    mRanks.push_back(static_cast<int32_t>(rank));
    mDims.resize(mDims.size() + rank);
    must(api.GetDimensions(&info, mDims.data() + mDims.size() - rank, rank));
}

std::vector<Shape> Inputs::shapes() const
{
    std::vector<Shape> found;
    int64_t const* at = mDims.data();
    for (int32_t const rank : mRanks)
    {
        found.push_back({at, rank});
        at += rank;
    }
    return found;
}

Kernel::Kernel(CustomOp const& custom, OrtApi const& api, OrtKernelInfo const& info)
    : mApi(api)
    , mCustom(custom)
    , mOp(&custom.op)
{
    std::string error;
    bool good = readAttributes(api, info, custom.op, mAttributes, error);
    mOp = &mAttributes.form(custom.op);
    size_t inputs = 0;
    must(api.KernelInfo_GetInputCount(&info, &inputs));
    if (good && inputs != static_cast<size_t>(mOp->inputs))
    {
        good = sessa::refuse(error, std::string("inputs with attribute ") + kFieldWeights + " = " + std::to_string(static_cast<int32_t>(mAttributes.weights)),
            std::to_string(inputs), std::to_string(mOp->inputs) + ", the last of them " + mOp->operands[mOp->inputs - 1].name);
    }
    // ONNX Runtime gives a CPU's lone float16 node to float32 kernels, with casts around it.
    bool const cast = !custom.device && custom.storage == Storage::kFloat && mAttributes.storage == Storage::kHalf;
    if (good && mAttributes.storage != Storage::kAny && mAttributes.storage != custom.storage && !cast)
    {
        error = std::string(custom.op.operands[0].name) + " is " + nameOf(static_cast<ONNXTensorElementDataType>(custom.storage)) + "; allowed: "
            + nameOf(static_cast<ONNXTensorElementDataType>(mAttributes.storage)) + ", as attribute " + kFieldStorage + " says";
    }
    if (!good || !error.empty())
    {
        must(refuse(api, ORT_INVALID_ARGUMENT, custom.op, nodeName(api, info) + error));
    }
    judge(info);
    if (custom.device)
    {
        mWorkspaces = Workspaces::ofSession(api, info);
    }
}

// Sizes that the graph leaves open, batch, rows and past that is, stand as their least. Where it says less there is nothing to judge before the first call.
void Kernel::judge(OrtKernelInfo const& info) const
{
    Op const& op = *mOp;
    Inputs inputs;
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        OrtTypeInfo* type = nullptr;
        OrtTensorTypeAndShapeInfo const* tensor = nullptr;
        if (!answered(mApi, mApi.KernelInfo_GetInputTypeInfo(&info, static_cast<size_t>(i), &type)))
        {
            return;
        }
        Held<OrtTypeInfo> const held(type, mApi.ReleaseTypeInfo);
        if (!answered(mApi, mApi.CastTypeInfoToTensorInfo(type, &tensor)) || tensor == nullptr)
        {
            return;
        }
        inputs.add(mApi, *tensor);
    }
    Problem sizes;
    std::string known;
    auto const shapes = inputs.shapes();
    std::vector<std::vector<int64_t>> filled;
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        std::string const letters = op.operands[i].shape;
        bool const ranked = shapes[i].rank == static_cast<int32_t>(letters.size());
        for (size_t a = 0; ranked && a < letters.size(); ++a)
        {
            if (shapes[i].dims[a] >= 0 && known.find(capital(letters[a])) == std::string::npos)
            {
                known += capital(letters[a]);
                sizes.setDimension(letters[a], shapes[i].dims[a]);
            }
        }
    }
    bool open = false;
    std::vector<Shape> judged;
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        std::string const letters = op.operands[i].shape;
        auto& dims = filled.emplace_back(shapes[i].dims, shapes[i].dims + shapes[i].rank);
        bool const unknown = dims.empty(); // a shape that is not known looks like a scalar's, and no operand is one
        dims.resize(unknown ? letters.size() : dims.size(), -1);
        for (size_t a = 0; a < letters.size() && a < dims.size(); ++a)
        {
            bool const said = known.find(capital(letters[a])) != std::string::npos;
            if (!said && std::strchr("BTP", letters[a]) == nullptr)
            {
                return;
            }
            open = open || !said;
            dims[a] = dims[a] >= 0 ? dims[a] : sizes.dimension(letters[a]);
        }
        judged.push_back({dims.data(), static_cast<int32_t>(dims.size())});
    }
    Problem problem;
    std::string error;
    if (!problemOf(op, mAttributes, mCustom.storage, judged.data(), problem, error))
    {
        bool const shown = open && error.find(" to match ") != std::string::npos;
        std::string const least = shown ? "; what the graph leaves open stands here as its least" : "";
        must(refuse(mApi, ORT_INVALID_ARGUMENT, op, nodeName(mApi, info) + error + least));
    }
}

OrtStatus* Kernel::compute(OrtKernelContext& context) const
{
    Op const& op = *mOp;
    if (!mCustom.device)
    {
        return refuse(mApi, ORT_NOT_IMPLEMENTED, op,
            "got CPUExecutionProvider; allowed: CUDAExecutionProvider, for NVIDIA GPUs; fix: name that provider when the session is made (pip install "
            "onnxruntime-gpu), or run the bundle's model.onnx without this library");
    }
    Inputs inputs;
    std::array<void const*, kMaxInputs> in{};
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        OrtValue const* value = nullptr;
        OrtTensorTypeAndShapeInfo* info = nullptr;
        void* data = nullptr;
        must(mApi.KernelContext_GetInput(&context, static_cast<size_t>(i), &value));
        if (value == nullptr)
        {
            return refuse(mApi, ORT_INVALID_ARGUMENT, op, std::string(op.operands[i].name) + " is missing");
        }
        must(mApi.GetTensorTypeAndShape(value, &info));
        Held<OrtTensorTypeAndShapeInfo> const held(info, mApi.ReleaseTensorTypeAndShapeInfo);
        inputs.add(mApi, *info);
        ONNXTensorElementDataType const wanted = typeOf(op.operands[i], mCustom.storage);
        if (inputs.type(i) != wanted)
        {
            return refuse(mApi, ORT_INVALID_ARGUMENT, op,
                std::string(op.operands[i].name) + " is " + nameOf(inputs.type(i)) + "; allowed: " + nameOf(wanted));
        }
        must(mApi.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
        in[static_cast<size_t>(i)] = data;
    }
    Problem problem;
    std::string error;
    if (!problemOf(op, mAttributes, mCustom.storage, inputs.shapes().data(), problem, error))
    {
        return refuse(mApi, ORT_INVALID_ARGUMENT, op, error);
    }
    std::array<void*, kMaxOutputs> outs{};
    for (int32_t i = 0; i < op.outputs; ++i)
    {
        std::vector<int64_t> dims;
        for (char const* letter = op.results[i].shape; *letter != 0; ++letter)
        {
            dims.push_back(problem.dimension(*letter));
        }
        OrtValue* value = nullptr;
        must(mApi.KernelContext_GetOutput(&context, static_cast<size_t>(i), dims.data(), dims.size(), &value));
        must(mApi.GetTensorMutableData(value, &outs[static_cast<size_t>(i)]));
    }
    void* stream = nullptr;
    must(mApi.KernelContext_GetGPUComputeStream(&context, &stream));
    size_t const bytes = workspaceSize(problem, error);
    if (!error.empty())
    {
        return refuse(mApi, ORT_FAIL, op, error);
    }
    Tensors const tensors{in.data(), outs[0], outs.data()};
    auto* const cuda = static_cast<CUstream_st*>(stream);
    if (bytes == 0)
    {
        return run(problem, tensors, nullptr, cuda, error) ? nullptr : refuse(mApi, ORT_FAIL, op, error);
    }
    Workspace& workspace = mWorkspaces->of(stream);
    std::lock_guard<std::mutex> const lock(workspace.mutex);
    bool const ran = mWorkspaces->grow(workspace, bytes, error) && run(problem, tensors, workspace.blocks.back(), cuda, error);
    return ran ? nullptr : refuse(mApi, ORT_FAIL, op, error);
}

} // namespace sessa::ort
