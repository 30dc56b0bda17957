// The IPluginV3 shell, for TensorRT 10 and 11: it translates and checks, launcher.cpp does the work.
#include "shell.h"

#include <new>

namespace sessa
{
namespace
{

using namespace nvinfer1;

// What a plugin and its creator say alike.
template <typename Interface>
class Named : public Interface
{
public:
    explicit Named(Op const& op) noexcept
        : mOp(op)
    {
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

protected:
    Op const& mOp;
};

class Plugin final : public IPluginV3, public Named<IPluginV3OneCore>, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    Plugin(Op const& op, Attributes const& attributes) noexcept
        : Named(attributes.form(op))
        , mAttributes(attributes)
        , mFields(op, &mAttributes)
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
            outputTypes[i] = mOp.results[i].kind == Kind::kFloat ? DataType::kFLOAT : inputTypes[0];
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
            for (char const* letter = mOp.results[i].shape; *letter != 0; ++letter)
            {
                Source const source = sourceOf(mOp, *letter);
                outputs[i].d[outputs[i].nbDims++] = inputs[source.input].d[source.axis];
            }
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        return exists(mOp, pos, nbInputs, nbOutputs) && inOut[pos].desc.format == TensorFormat::kLINEAR
            && acceptsType(mOp, mAttributes, pos, inOut[pos].desc.type, inOut[0].desc.type);
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t) const noexcept override
    {
        Problem problem;
        int64_t values[kMaxInputs][Dims::MAX_DIMS];
        Shape shapes[kMaxInputs];
        for (int32_t i = 0; i < mOp.inputs && i < nbInputs; ++i)
        {
            shapes[i] = shapeOf(in[i].max, values[i]);
        }
        std::string error;
        bool const known = nbInputs == mOp.inputs && storageOf(in[0].desc.type, problem.storage) && sizesOf(mOp, mAttributes, shapes, problem, error);
        return known ? workspaceOf(mOp, problem) : 0;
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
        return mFields.get();
    }

private:
    Attributes mAttributes;
    Fields mFields;
};

class Creator final : public Named<IPluginCreatorV3One>
{
public:
    explicit Creator(Op const& op) noexcept
        : Named(op)
        , mFields(op)
    {
    }
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fc, TensorRTPhase phase) noexcept override
    {
        Attributes attributes;
        std::string error;
        bool const good = readFields(mOp, fc, phase == TensorRTPhase::kRUNTIME, attributes, error);
        return good || complain(mOp, error) ? new (std::nothrow) Plugin(mOp, attributes) : nullptr;
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return mFields.get();
    }

private:
    Fields mFields;
};

} // namespace
} // namespace sessa

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept
{
    return sessa::creators<sessa::Creator, nvinfer1::IPluginCreatorInterface>(nbCreators);
}
