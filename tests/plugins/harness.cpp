// Stands in for TensorRT: opens the plugin library, creates the plugin and calls it through the interfaces an engine uses.
// Every function returns 0 for success; built by test_plugin.py against the headers of the TensorRT under test.
#include "harness_ops.h"

#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

using sessa::kOps;

DataType typeOf(int32_t onnx)
{
#if NV_TENSORRT_MAJOR >= 9
    return onnx == 1 ? DataType::kFLOAT : onnx == 10 ? DataType::kHALF : onnx == 16 ? DataType::kBF16 : DataType::kINT8;
#else
    return onnx == 1 ? DataType::kFLOAT : onnx == 10 ? DataType::kHALF : DataType::kINT8;
#endif
}

Dims dims(std::vector<int64_t> const& values)
{
    Dims d{};
    d.nbDims = static_cast<int32_t>(values.size());
    for (size_t i = 0; i < values.size(); ++i)
    {
        d.d[i] = values[i];
    }
    return d;
}

using sessa::Kind;

int32_t inputsOf(int32_t op)
{
    return kOps[op].inputs;
}

int32_t outputsOf(int32_t op)
{
    return kOps[op].outputs;
}

// Descriptions of the inputs and of the outputs.
std::vector<PluginTensorDesc> descriptions(int32_t op, int32_t onnx, int64_t const* shape)
{
    std::vector<PluginTensorDesc> all;
    for (auto const& operand : sessa::operandsOf(op))
    {
        PluginTensorDesc desc{};
        desc.dims = dims(sessa::dimensionsOf(operand, shape));
        desc.type = operand.kind == Kind::kFloat ? DataType::kFLOAT : operand.kind == Kind::kInt ? DataType::kINT32 : typeOf(onnx);
        desc.format = TensorFormat::kLINEAR;
        all.push_back(desc);
    }
    return all;
}

// The creator of an operation among those of a library; nullptr if it has none of that name.
template <typename Creator, typename Listed>
Creator* creatorOf(int32_t op, Listed const* listed, int32_t count)
{
    for (int32_t i = 0; i < count; ++i)
    {
        auto* creator = static_cast<Creator*>(listed[i]);
        if (std::string(creator->getPluginName()) == kOps[op].name)
        {
            return creator;
        }
    }
    return nullptr;
}

std::vector<DynamicPluginTensorDesc> dynamic(std::vector<PluginTensorDesc> const& all)
{
    std::vector<DynamicPluginTensorDesc> result;
    for (auto const& desc : all)
    {
        DynamicPluginTensorDesc one{};
        one.desc = desc;
        one.min = one.max = desc.dims;
        result.push_back(one);
    }
    return result;
}

} // namespace

#if NV_TENSORRT_MAJOR >= 10
using Handle = IPluginV3;
#else
using Handle = IPluginV2DynamicExt;
#endif

extern "C"
{

// A plugin made with `storage`, where it is not negative, `weights`, where they are not 0, and one float attribute, where it has a name; serialised and made again as an engine would.
// nullptr on failure.
void* harness_create(char const* library, int32_t op, int32_t storage, int32_t weights, char const* attribute, float value)
{
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
    {
        return nullptr;
    }
    std::vector<PluginField> fields;
    if (storage >= 0)
    {
        fields.emplace_back("storage", &storage, PluginFieldType::kINT32, 1);
    }
    if (weights != 0)
    {
        fields.emplace_back("weights", &weights, PluginFieldType::kINT32, 1);
    }
    if (attribute != nullptr)
    {
        fields.emplace_back(attribute, &value, PluginFieldType::kFLOAT32, 1);
    }
    PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    int32_t count = 0;
#if NV_TENSORRT_MAJOR >= 10
    auto* get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    auto const* const listed = get(count);
    auto* creator = creatorOf<IPluginCreatorV3One>(op, listed, count);
    IPluginV3* built = creator == nullptr ? nullptr : creator->createPlugin("x", &collection, TensorRTPhase::kBUILD);
    if (built == nullptr)
    {
        return nullptr;
    }
    auto* runtime = static_cast<IPluginV3OneRuntime*>(built->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto const* const held = runtime->getFieldsToSerialize();
    std::vector<PluginField> kept(held->fields, held->fields + held->nbFields);
    int32_t const before = 1; // the version of what engines held when every operation's attribute was called scale
    float const some = 0.5F;
    std::vector<PluginField> old{{"scale", &some, PluginFieldType::kFLOAT32, 1}, {"state", &before, PluginFieldType::kINT32, 1}};
    PluginFieldCollection all{held->nbFields, kept.data()};
    PluginFieldCollection former{2, old.data()};
    if (creator->createPlugin("x", &former, TensorRTPhase::kRUNTIME) != nullptr)
    {
        return nullptr;
    }
    IPluginV3* loaded = creator->createPlugin("x", &all, TensorRTPhase::kRUNTIME);
    delete built;
    return loaded;
#else
    auto* get = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(dlsym(handle, "getPluginCreators"));
    auto const* const listed = get(count);
    IPluginCreator* creator = creatorOf<IPluginCreator>(op, listed, count);
    auto* built = creator == nullptr ? nullptr : static_cast<IPluginV2DynamicExt*>(creator->createPlugin("x", &collection));
    if (built == nullptr)
    {
        return nullptr;
    }
    std::vector<char> state(built->getSerializationSize());
    built->serialize(state.data());
    built->destroy();
    char const* const old = "SESA\1\0\0\0\0\0\0\0\n\0\0\0"; // what version 1 held: magic, version, scale, storage
    if (creator->deserializePlugin("x", state.data(), state.size() - 1) != nullptr || creator->deserializePlugin("x", old, 16) != nullptr)
    {
        return nullptr; // a short state must be refused, and one of before
    }
    return static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("x", state.data(), state.size()));
#endif
}

void harness_destroy(void* plugin)
{
#if NV_TENSORRT_MAJOR >= 10
    delete static_cast<Handle*>(plugin);
#else
    static_cast<Handle*>(plugin)->destroy();
#endif
}

// Bit i of the result: the type at position i is accepted, when q has `onnx` and position i has the usual type.
int32_t harness_formats(void* plugin, int32_t op, int32_t onnx, int32_t linear)
{
    int64_t const shape[12] = {2, 3, 5, 32, 4, 2, 8, 48, 64, 4, 1, 4};
    auto all = descriptions(op, onnx, shape);
    int32_t const inputs = inputsOf(op);
    int32_t bits = 0;
    int32_t const outputs = outputsOf(op);
    for (int32_t i = 0; i < inputs + outputs; ++i)
    {
        all[i].format = linear != 0 ? TensorFormat::kLINEAR : TensorFormat::kCHW32;
#if NV_TENSORRT_MAJOR >= 10
        auto* build = static_cast<IPluginV3OneBuild*>(static_cast<Handle*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
        auto const descs = dynamic(all);
        bits |= build->supportsFormatCombination(i, descs.data(), inputs, outputs) ? 1 << i : 0;
#else
        bits |= static_cast<Handle*>(plugin)->supportsFormatCombination(i, all.data(), inputs, outputs) ? 1 << i : 0;
#endif
    }
    return bits;
}

int64_t harness_workspace(void* plugin, int32_t op, int32_t onnx, int64_t const* shape)
{
    auto const all = descriptions(op, onnx, shape);
    int32_t const inputs = inputsOf(op);
#if NV_TENSORRT_MAJOR >= 10
    auto* build = static_cast<IPluginV3OneBuild*>(static_cast<Handle*>(plugin)->getCapabilityInterface(PluginCapabilityType::kBUILD));
    auto const descs = dynamic(all);
    if (build->configurePlugin(descs.data(), inputs, descs.data() + inputs, outputsOf(op)) != 0)
    {
        return -1;
    }
    return static_cast<int64_t>(build->getWorkspaceSize(descs.data(), inputs, descs.data() + inputs, outputsOf(op)));
#else
    return static_cast<int64_t>(static_cast<Handle*>(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputsOf(op)));
#endif
}

// Tells the plugin its shapes, as TensorRT does outside a capture.
int32_t harness_shape(void* plugin, int32_t op, int32_t onnx, int64_t const* shape)
{
#if NV_TENSORRT_MAJOR >= 10
    auto const all = descriptions(op, onnx, shape);
    int32_t const inputs = inputsOf(op);
    auto* runtime = static_cast<IPluginV3OneRuntime*>(static_cast<Handle*>(plugin)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return runtime->onShapeChange(all.data(), inputs, all.data() + inputs, outputsOf(op));
#else
    static_cast<void>(op);
    static_cast<void>(onnx);
    static_cast<void>(shape);
    static_cast<Handle*>(plugin)->attachToContext(nullptr, nullptr, nullptr);
    return 0;
#endif
}

// pointers: the inputs in order, the outputs, the workspace.
int32_t harness_enqueue(void* plugin, int32_t op, int32_t onnx, int64_t const* shape, void* const* pointers, void* stream)
{
    auto const all = descriptions(op, onnx, shape);
    int32_t const inputs = inputsOf(op);
    void* const* const outputs = pointers + inputs;
    auto const cuda = static_cast<cudaStream_t>(stream);
#if NV_TENSORRT_MAJOR >= 10
    auto* runtime = static_cast<IPluginV3OneRuntime*>(static_cast<Handle*>(plugin)->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    return runtime->enqueue(all.data(), all.data() + inputs, pointers, outputs, pointers[inputs + outputsOf(op)], cuda);
#else
    return static_cast<Handle*>(plugin)->enqueue(all.data(), all.data() + inputs, pointers, outputs, pointers[inputs + outputsOf(op)], cuda);
#endif
}

} // extern "C"
