// The IPluginV3 shell, for TensorRT 10 and 11: it translates and checks, launcher.cpp does the work.
#include "shell.h"

#include <array>
#include <new>

namespace sessa
{
namespace
{

using namespace nvinfer1;

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    Plugin(Op const& op, Attributes const& attributes) noexcept
        : mOp(op)
        , mAttributes(attributes)
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
        return new (std::nothrow) Plugin(mOp, mAttributes);
    }

    // Core
    AsciiChar const* getPluginName() const noexcept override
    {
        return mOp.name;
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
        return counted(mOp, nbInputs, nbOutputs) ? 0 : -1;
    }
    int32_t getNbOutputs() const noexcept override
    {
        return mOp.outputs;
    }
    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        if (!counted(mOp, nbInputs, nbOutputs))
        {
            return -1;
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputTypes[i] = mOp.result(i).kind == Kind::kFloat ? DataType::kFLOAT : inputTypes[0];
        }
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t nbOutputs,
        IExprBuilder&) noexcept override
    {
        if (!counted(mOp, nbInputs, nbOutputs))
        {
            return -1;
        }
        for (int32_t i = 0; i < nbOutputs; ++i)
        {
            outputs[i].nbDims = 0;
            for (char const* letter = mOp.result(i).shape; *letter != 0; ++letter)
            {
                Source const source = sourceOf(mOp, *letter);
                outputs[i].d[outputs[i].nbDims++] = inputs[source.input].d[source.axis];
            }
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        bool const linear = nbInputs == mOp.inputs && nbOutputs == mOp.outputs && pos >= 0 && pos < nbInputs + nbOutputs && inOut[pos].desc.format == TensorFormat::kLINEAR;
        return linear && acceptsType(mOp, mAttributes, pos, inOut[pos].desc.type, inOut[0].desc.type);
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        Problem problem;
        problem.scale = mAttributes.scale;
        int64_t values[kMaxInputs][Dims::MAX_DIMS];
        Shape shapes[kMaxInputs];
        for (int32_t i = 0; i < mOp.inputs && i < nbInputs; ++i)
        {
            shapes[i] = shapeOf(in[i].max, values[i]);
        }
        std::string error;
        bool const known = nbInputs == mOp.inputs && storageOf(in[0].desc.type, problem.storage) && sizesOf(mOp, shapes, problem, error);
        return known ? workspaceSize(problem) : 0;
    }

    // Run time
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        Problem problem;
        std::string error;
        if (!counted(mOp, nbInputs, nbOutputs))
        {
            return -1;
        }
        return (describe(mOp, mAttributes, in, problem, error) && prepare(problem, error)) || complain(mOp, error) ? 0 : -1;
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override
    {
        std::string error;
        return enqueueOn(mOp, mAttributes, in, inputs, outputs, workspace, stream, error) || complain(mOp, error) ? 0 : -1;
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
    Op const& mOp;
    Attributes mAttributes;
    int32_t mStorage;
    int32_t mVersion{kStateVersion};
    std::array<PluginField, 3> mFields;
    PluginFieldCollection mCollection;
};

class Creator final : public IPluginCreatorV3One
{
public:
    explicit Creator(Op const& op) noexcept
        : mOp(op)
    {
    }
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
        return good || complain(mOp, error) ? new (std::nothrow) Plugin(mOp, attributes) : nullptr;
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
        return mOp.name;
    }
    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPluginVersion;
    }
    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kPluginNamespace;
    }

private:
    Op const& mOp;
};

} // namespace
} // namespace sessa

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept
{
    using sessa::Creator;
    using sessa::opAt;
    static Creator creators[] = {Creator(opAt(0)), Creator(opAt(1)), Creator(opAt(2)), Creator(opAt(3)), Creator(opAt(4)), Creator(opAt(5)),
        Creator(opAt(6)), Creator(opAt(7)), Creator(opAt(8)), Creator(opAt(9))};
    static nvinfer1::IPluginCreatorInterface* const listed[] = {&creators[0], &creators[1], &creators[2], &creators[3], &creators[4], &creators[5],
        &creators[6], &creators[7], &creators[8], &creators[9]};
    static_assert(sizeof(listed) / sizeof(listed[0]) == sessa::kOpCount, "a creator for every operation");
    nbCreators = sessa::kOpCount;
    return listed;
}
