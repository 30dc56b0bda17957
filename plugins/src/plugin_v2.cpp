// The IPluginV2DynamicExt shell, for TensorRT 8.6: it translates and checks, launcher.cpp does the work.
#include "shell.h"

#include <new>

namespace sessa
{
namespace
{

using namespace nvinfer1;

// What a plugin and its creator say alike: the version, and the namespace that TensorRT may set.
template <typename Interface>
class Named : public Interface
{
public:
    explicit Named(Op const& op) noexcept
        : mOp(op)
    {
    }
    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kPluginVersion;
    }
    void setPluginNamespace(AsciiChar const* pluginNamespace) noexcept override
    try
    {
        mNamespace = pluginNamespace == nullptr ? "" : pluginNamespace;
    }
    catch (...)
    {
        complain(mOp, "out of memory");
    }
    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }

protected:
    Op const& mOp;
    std::string mNamespace{kPluginNamespace};
};

class Plugin final : public Named<IPluginV2DynamicExt>
{
public:
    Plugin(Op const& op, Attributes const& attributes) noexcept
        : Named(attributes.form(op))
        , mAttributes(attributes)
    {
    }

    // IPluginV2
    AsciiChar const* getPluginType() const noexcept override
    {
        return mOp.name;
    }
    int32_t getNbOutputs() const noexcept override
    {
        return mOp.outputs;
    }
    int32_t initialize() noexcept override
    {
        return 0;
    }
    void terminate() noexcept override {}
    size_t getSerializationSize() const noexcept override
    {
        return kStateBytes;
    }
    void serialize(void* buffer) const noexcept override
    {
        sessa::serialize(mAttributes, buffer);
    }
    void destroy() noexcept override
    {
        delete this;
    }

    // IPluginV2Ext: the type asked for here is float whatever comes, the format is settled later; `storage` is what the graph says.
    DataType getOutputDataType(int32_t index, DataType const* inputTypes, int32_t nbInputs) const noexcept override
    {
        if (mOp.results[index].kind == Kind::kFloat)
        {
            return DataType::kFLOAT;
        }
        switch (mAttributes.storage)
        {
        case Storage::kFloat: return DataType::kFLOAT;
        case Storage::kHalf: return DataType::kHALF;
        default: return nbInputs > 0 ? inputTypes[0] : DataType::kFLOAT;
        }
    }

    // IPluginV2DynamicExt
    IPluginV2DynamicExt* clone() const noexcept override
    {
        auto* const copy = new (std::nothrow) Plugin(mOp, mAttributes);
        if (copy != nullptr)
        {
            copy->setPluginNamespace(mNamespace.c_str());
        }
        return copy;
    }
    DimsExprs getOutputDimensions(int32_t index, DimsExprs const* inputs, int32_t, IExprBuilder&) noexcept override
    {
        DimsExprs dims{};
        for (char const* letter = mOp.results[index].shape; *letter != 0; ++letter)
        {
            Source const source = sourceOf(mOp, *letter);
            dims.d[dims.nbDims++] = inputs[source.input].d[source.axis];
        }
        return dims;
    }
    bool supportsFormatCombination(int32_t pos, PluginTensorDesc const* inOut, int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        return exists(mOp, pos, nbInputs, nbOutputs) && inOut[pos].format == TensorFormat::kLINEAR
            && acceptsType(mOp, mAttributes, pos, inOut[pos].type, inOut[0].type);
    }
    void configurePlugin(DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override
    {
        counted(mOp, nbInputs, nbOutputs);
    }
    size_t getWorkspaceSize(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*, int32_t) const noexcept override
    {
        Problem problem;
        std::string error;
        if (nbInputs != mOp.inputs || !describe(mOp, mAttributes, in, problem, error))
        {
            return 0;
        }
        // Called outside a capture, with the largest shapes at build time and the current ones at run time: the binaries are loaded here.
        Problem step = problem;
        step.tokens = 1;
        static_cast<void>(prepare(problem, error) && prepare(step, error));
        return workspaceOf(mOp, problem);
    }
    int32_t enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream) noexcept override
    {
        std::string error;
        return enqueueOn(mOp, mAttributes, in, inputs, outputs, workspace, stream, error) || complain(mOp, error) ? 0 : 1;
    }
    void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept override
    {
        // A new execution context: load every binary it can need now, so that enqueue may be captured from the first call on.
        if (mAttributes.storage == Storage::kFloat || mAttributes.storage == Storage::kHalf)
        {
            prepareAll(mOp, mAttributes.storage, mAttributes.weights);
        }
    }

private:
    Attributes mAttributes;
};

class Creator final : public Named<IPluginCreator>
{
public:
    explicit Creator(Op const& op) noexcept
        : Named(op)
        , mFields(op)
    {
    }
    AsciiChar const* getPluginName() const noexcept override
    {
        return mOp.name;
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return mFields.get();
    }
    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const* fc) noexcept override
    {
        Attributes attributes;
        std::string error;
        return readFields(mOp, fc, false, attributes, error) || complain(mOp, error) ? make(attributes) : nullptr;
    }
    IPluginV2* deserializePlugin(AsciiChar const*, void const* serialData, size_t serialLength) noexcept override
    {
        Attributes attributes;
        std::string error;
        return deserialize(mOp, serialData, serialLength, attributes, error) || complain(mOp, error) ? make(attributes) : nullptr;
    }

private:
    IPluginV2* make(Attributes const& attributes) const noexcept
    {
        auto* const plugin = new (std::nothrow) Plugin(mOp, attributes);
        if (plugin != nullptr)
        {
            plugin->setPluginNamespace(mNamespace.c_str());
        }
        return plugin;
    }

    Fields mFields;
};

} // namespace
} // namespace sessa

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) noexcept
{
    return sessa::creators<sessa::Creator, nvinfer1::IPluginCreator>(nbCreators);
}
