// The IPluginV3 shell, for TensorRT 10 and 11: it translates and checks, launcher.cpp does the work.
#include "shell.h"

#include <array>
#include <new>

namespace sessa
{
namespace
{

using namespace nvinfer1;

int32_t status(bool good, std::string const& error) noexcept
{
    return good || complain(error) ? 0 : -1;
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    explicit Plugin(Attributes const& attributes) noexcept
        : mAttributes(attributes)
        , mStorage(static_cast<int32_t>(attributes.storage))
        , mFields{PluginField{kFieldScale, &mAttributes.scale, PluginFieldType::kFLOAT32, 1},
              PluginField{kFieldStorage, &mStorage, PluginFieldType::kINT32, 1}, PluginField{kFieldState, &mVersion, PluginFieldType::kINT32, 1}}
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
    {
    }
    Plugin(Plugin const&) = delete;
    Plugin& operator=(Plugin const&) = delete;

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override
    {
        return new (std::nothrow) Plugin(mAttributes);
    }

    // Core
    AsciiChar const* getPluginName() const noexcept override
    {
        return kPluginName;
    }
    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPluginVersion;
    }
    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }

    // Build
    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        return counted(nbInputs, nbOutputs) ? 0 : -1;
    }
    int32_t getNbOutputs() const noexcept override
    {
        return 1;
    }
    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        if (!counted(nbInputs, nbOutputs))
        {
            return -1;
        }
        outputTypes[0] = inputTypes[kQ];
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t nbOutputs,
        IExprBuilder&) noexcept override
    {
        if (!counted(nbInputs, nbOutputs))
        {
            return -1;
        }
        outputs[0] = inputs[kQ];
        return 0;
    }
    bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        bool const linear = nbInputs == kInputs && nbOutputs == 1 && pos >= 0 && pos <= kInputs && inOut[pos].desc.format == TensorFormat::kLINEAR;
        return linear && acceptsType(mAttributes, pos, inOut[pos].desc.type, inOut[kQ].desc.type);
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        Problem problem;
        problem.scale = mAttributes.scale;
        if (nbInputs != kInputs || in[kQ].max.nbDims != 3 || in[kPastK].max.nbDims != 3 || !storageOf(in[kQ].desc.type, problem.storage))
        {
            return 0;
        }
        problem.batch = in[kQ].max.d[0];
        problem.tokens = in[kQ].max.d[1];
        problem.width = in[kQ].max.d[2];
        problem.capacity = in[kPastK].max.d[1];
        return workspaceSize(problem);
    }

    // Run time
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        Problem problem;
        std::string error;
        if (!counted(nbInputs, nbOutputs))
        {
            return -1;
        }
        return status(describe(mAttributes, in, problem, error) && prepare(problem, error), error);
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override
    {
        Problem problem;
        std::string error;
        Tensors const tensors{inputs[kQ], inputs[kK], inputs[kGamma], inputs[kF], inputs[kPastK], inputs[kPastS], inputs[kPastLength], outputs[0]};
        return status(describe(mAttributes, in, problem, error) && run(problem, tensors, workspace, stream, error), error);
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        return clone();
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mCollection;
    }

private:
    static bool counted(int32_t nbInputs, int32_t nbOutputs) noexcept
    {
        return (nbInputs == kInputs && nbOutputs == 1) || complain(wrongCounts(nbInputs, nbOutputs));
    }

    Attributes mAttributes;
    int32_t mStorage;
    int32_t mVersion{kStateVersion};
    std::array<PluginField, 3> mFields;
    PluginFieldCollection mCollection;
};

class Creator final : public IPluginCreatorV3One
{
public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fc, TensorRTPhase phase) noexcept override
    try
    {
        Attributes attributes;
        std::string error;
        int32_t version = 0;
        bool good = readFields(fc, attributes, phase == TensorRTPhase::kRUNTIME ? &version : nullptr, error);
        if (good && phase == TensorRTPhase::kRUNTIME && version != kStateVersion)
        {
            good = false;
            error = "serialised state: got version " + std::to_string(version) + "; allowed: " + std::to_string(kStateVersion) + "; rebuild the engine";
        }
        return good || complain(error) ? new (std::nothrow) Plugin(attributes) : nullptr;
    }
    catch (...)
    {
        return nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return fieldNames();
    }
    AsciiChar const* getPluginName() const noexcept override
    {
        return kPluginName;
    }
    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPluginVersion;
    }
    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }
};

} // namespace
} // namespace sessa

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept
{
    static sessa::Creator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    nbCreators = 1;
    return creators;
}
