#include "shell.h"

#include "cubins.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace sessa
{
namespace
{

using namespace nvinfer1;

ILoggerFinder* gFinder = nullptr;

} // namespace

char const* const kBuildCommand = "sessa-deploy plugin build";

bool storageOf(DataType type, Storage& storage) noexcept
{
    switch (type)
    {
    case DataType::kFLOAT: storage = Storage::kFloat; return true;
    case DataType::kHALF: storage = Storage::kHalf; return true;
#if NV_TENSORRT_MAJOR >= 9
    case DataType::kBF16: storage = Storage::kBFloat16; return true;
#endif
    default: return false;
    }
}

bool acceptsType(Op const& op, Attributes const& attributes, int32_t pos, DataType type, DataType q) noexcept
{
    if (pos == 0)
    {
        Storage storage{};
        return storageOf(type, storage) && (attributes.storage == Storage::kAny || attributes.storage == storage);
    }
    switch (pos < op.inputs ? op.operands[pos].kind : op.results[pos - op.inputs].kind)
    {
    case Kind::kFloat: return type == DataType::kFLOAT;
    case Kind::kInt: return type == DataType::kINT32;
    case Kind::kStorage: break;
    }
    return type == q;
}

bool counted(Op const& op, int32_t inputs, int32_t outputs) noexcept
try
{
    return (inputs == op.inputs && outputs == op.outputs)
        || complain(op,
            "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; allowed: " + std::to_string(op.inputs) + " and "
                + std::to_string(op.outputs));
}
catch (...)
{
    return false;
}

Source sourceOf(Op const& op, char letter) noexcept
{
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        char const* const found = std::strchr(op.operands[i].shape, letter);
        if (found != nullptr)
        {
            return {i, static_cast<int32_t>(found - op.operands[i].shape)};
        }
    }
    return {0, 0};
}

Shape shapeOf(Dims const& dims, int64_t (&values)[Dims::MAX_DIMS]) noexcept
{
    int32_t const rank = dims.nbDims < 0 ? 0 : dims.nbDims;
    for (int32_t a = 0; a < rank; ++a)
    {
        values[a] = dims.d[a];
    }
    return {values, rank};
}

bool describe(Op const& op, Attributes const& attributes, PluginTensorDesc const* in, Problem& problem, std::string& error) noexcept
try
{
    int64_t values[kMaxInputs][Dims::MAX_DIMS];
    Shape shapes[kMaxInputs];
    Storage storage{};
    for (int32_t i = 0; i < op.inputs; ++i)
    {
        if (!acceptsType(op, attributes, i, in[i].type, in[0].type))
        {
            error = "input " + std::to_string(i) + " (" + op.operands[i].name + ") has TensorRT type " + std::to_string(static_cast<int32_t>(in[i].type))
                + "; allowed: float32, float16 or bfloat16 as attribute storage says, statistics float32, lengths int32";
            return false;
        }
        shapes[i] = shapeOf(in[i].dims, values[i]);
    }
    storageOf(in[0].type, storage);
    return problemOf(op, attributes, storage, shapes, problem, error);
}
catch (...)
{
    return false;
}

size_t workspaceOf(Op const& op, Problem const& problem) noexcept
{
    std::string error;
    size_t const size = workspaceSize(problem, error);
    if (!error.empty())
    {
        complain(op, error);
    }
    return size;
}

bool enqueueOn(Op const& op, Attributes const& attributes, PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream, std::string& error) noexcept
{
    Problem problem;
    return describe(op, attributes, in, problem, error) && run(problem, {inputs, outputs[0], outputs}, workspace, stream, error);
}

bool readFields(Op const& op, PluginFieldCollection const* fc, bool serialised, Attributes& attributes, std::string& error) noexcept
try
{
    int32_t const count = fc == nullptr ? 0 : fc->nbFields;
    auto const named = [](PluginField const& field) { return std::string(field.name == nullptr ? "" : field.name); };
    auto const holds = [](PluginField const& field, PluginFieldType type) { return field.type == type && field.length == 1 && field.data != nullptr; };
    int32_t version = 0;
    for (int32_t i = 0; serialised && i < count; ++i)
    {
        if (named(fc->fields[i]) == kFieldState && holds(fc->fields[i], PluginFieldType::kINT32))
        {
            std::memcpy(&version, fc->fields[i].data, sizeof(version));
        }
    }
    if (serialised && version != kStateVersion)
    {
        return refuseState(version, error);
    }
    for (int32_t i = 0; i < count; ++i)
    {
        PluginField const& field = fc->fields[i];
        std::string const name = named(field);
        auto const* const found = std::find_if(op.attribute, op.attribute + op.attributes, [&](Attribute const& a) { return name == a.name; });
        bool const real = found != op.attribute + op.attributes;
        bool const weights = name == kFieldWeights && quantised(op) != nullptr;
        if (!real && !weights && name != kFieldStorage && (name != kFieldState || !serialised))
        {
            error = "attribute " + name + " is unknown; allowed: " + attributeNames(op);
            return false;
        }
        if (!holds(field, real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32))
        {
            error = "attribute " + name + ": allowed: one " + (real ? "float32" : "int32");
            return false;
        }
        if (real)
        {
            std::memcpy(&(attributes.numbers.*found->field), field.data, sizeof(float));
        }
        else if (name == kFieldStorage)
        {
            std::memcpy(&attributes.storage, field.data, sizeof(attributes.storage));
        }
        else if (weights)
        {
            std::memcpy(&attributes.weights, field.data, sizeof(attributes.weights));
        }
    }
    if (!kHasBFloat16 && attributes.storage == Storage::kBFloat16)
    {
        error = "attribute storage: got 16 (bfloat16); allowed: 1 (float32), 10 (float16), 0 (any); TensorRT 8.6 has no bfloat16";
        return false;
    }
    return attributes.check(op, error);
}
catch (...)
{
    return false;
}

Fields::Fields(Op const& op, Attributes const* attributes) noexcept
{
    int32_t count = 0;
    for (int32_t i = 0; i < op.attributes; ++i)
    {
        void const* const value = attributes == nullptr ? nullptr : &(attributes->numbers.*op.attribute[i].field);
        mFields[count++] = PluginField{op.attribute[i].name, value, PluginFieldType::kFLOAT32, 1};
    }
    mStorage = attributes == nullptr ? 0 : static_cast<int32_t>(attributes->storage);
    mFields[count++] = PluginField{kFieldStorage, attributes == nullptr ? nullptr : &mStorage, PluginFieldType::kINT32, 1};
    if (quantised(op) != nullptr)
    {
        mWeights = attributes == nullptr ? 0 : static_cast<int32_t>(attributes->weights);
        mFields[count++] = PluginField{kFieldWeights, attributes == nullptr ? nullptr : &mWeights, PluginFieldType::kINT32, 1};
    }
    if (attributes != nullptr)
    {
        mFields[count++] = PluginField{kFieldState, &mVersion, PluginFieldType::kINT32, 1};
    }
    mCollection = {count, mFields.data()};
}

bool complain(Op const& op, std::string const& error) noexcept
try
{
    std::string const text = std::string(op.name) + ": " + (error.empty() ? "out of memory" : error);
    ILogger* const logger = gFinder == nullptr ? nullptr : gFinder->findLogger();
    if (logger != nullptr)
    {
        logger->log(ILogger::Severity::kERROR, text.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
    return false;
}
catch (...)
{
    std::fprintf(stderr, "%s: out of memory\n", op.name);
    return false;
}

} // namespace sessa

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    sessa::gFinder = finder;
}

// Major version of the TensorRT whose headers this library was compiled with: the only one that may load it (plugins/library.py asks).
extern "C" __attribute__((visibility("default"))) int32_t sessaTensorRTMajor() noexcept
{
    return NV_TENSORRT_MAJOR;
}
