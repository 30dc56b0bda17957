#include "shell.h"

#include <cstdio>
#include <cstring>

namespace sessa
{
namespace
{

using namespace nvinfer1;

ILoggerFinder* gFinder = nullptr;

} // namespace

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
    switch (pos < op.inputs ? op.operands[pos].kind : op.result(pos - op.inputs).kind)
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
            "got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs; allowed: " + std::to_string(op.inputs) + " and " + std::to_string(op.outputs));
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

bool enqueueOn(Op const& op, Attributes const& attributes, PluginTensorDesc const* in, void const* const* inputs, void* const* outputs, void* workspace,
    cudaStream_t stream, std::string& error) noexcept
{
    Problem problem;
    return describe(op, attributes, in, problem, error) && run(problem, {inputs, outputs[0], outputs}, workspace, stream, error);
}

bool readFields(PluginFieldCollection const* fc, Attributes& attributes, int32_t* version, std::string& error) noexcept
try
{
    for (int32_t i = 0; fc != nullptr && i < fc->nbFields; ++i)
    {
        PluginField const& field = fc->fields[i];
        std::string const name = field.name == nullptr ? "" : field.name;
        bool const real = name == kFieldScale;
        if (!real && name != kFieldStorage && (name != kFieldState || version == nullptr))
        {
            error = "attribute " + name + " is unknown; allowed: scale, storage";
            return false;
        }
        if (field.type != (real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32) || field.length != 1 || field.data == nullptr)
        {
            error = "attribute " + name + ": allowed: one " + (real ? "float32" : "int32");
            return false;
        }
        int32_t integer = 0;
        std::memcpy(real ? static_cast<void*>(&attributes.scale) : &integer, field.data, 4);
        if (name == kFieldStorage)
        {
            attributes.storage = static_cast<Storage>(integer);
        }
        else if (name == kFieldState)
        {
            *version = integer;
        }
    }
    if (!kHasBFloat16 && attributes.storage == Storage::kBFloat16)
    {
        error = "attribute storage: got 16 (bfloat16); allowed: 1 (float32), 10 (float16), 0 (any); TensorRT 8.6 has no bfloat16";
        return false;
    }
    return attributes.check(error);
}
catch (...)
{
    return false;
}

PluginFieldCollection const* fieldNames() noexcept
{
    static PluginField const fields[] = {{kFieldScale, nullptr, PluginFieldType::kFLOAT32, 1}, {kFieldStorage, nullptr, PluginFieldType::kINT32, 1}};
    static PluginFieldCollection const collection{2, fields};
    return &collection;
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
