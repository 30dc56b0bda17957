// The workspaces of a session of ONNX Runtime.
#include "ort.h"

#include <algorithm>

namespace sessa::ort
{
namespace
{

// Bytes from the session's arena; nullptr and a reason where it has none. (KernelContext_GetScratchBuffer ends the process then: it throws where it may not.)
void* allocate(OrtApi const& api, OrtAllocator& allocator, size_t bytes, std::string& error)
{
    void* block = nullptr;
    OrtStatus* const status = api.AllocatorAlloc(&allocator, bytes, &block);
    if (status != nullptr || block == nullptr)
    {
        error = "no memory for a workspace of " + std::to_string(bytes) + " bytes" + (status == nullptr ? "" : std::string(": ") + api.GetErrorMessage(status));
    }
    api.ReleaseStatus(status);
    return block;
}

} // namespace

Workspaces::Workspaces(OrtApi const& api, Held<OrtAllocator> allocator) noexcept
    : mApi(api)
    , mAllocator(std::move(allocator))
{
}

Workspaces::~Workspaces()
{
    for (auto const& [stream, workspace] : mStreams)
    {
        for (void* const block : workspace.blocks)
        {
            answered(mApi, mApi.AllocatorFree(mAllocator.get(), block));
        }
    }
}

std::shared_ptr<Workspaces> Workspaces::ofSession(OrtApi const& api, OrtKernelInfo const& info)
{
    OrtAllocator* allocator = nullptr;
    OrtMemoryInfo const* memory = nullptr;
    must(api.KernelInfoGetAllocator(&info, OrtMemTypeDefault, &allocator));
    Held<OrtAllocator> held(allocator, api.ReleaseAllocator);
    must(api.AllocatorGetInfo(allocator, &memory));
    // Every node is given a handle of its own; what it describes lies in the session's one allocator.
    static std::mutex* const mutex = new std::mutex;
    static auto* const sessions = new std::map<OrtMemoryInfo const*, std::weak_ptr<Workspaces>>;
    std::lock_guard<std::mutex> const lock(*mutex);
    auto& known = (*sessions)[memory];
    auto found = known.lock();
    if (found == nullptr)
    {
        found = std::make_shared<Workspaces>(api, std::move(held));
        known = found;
    }
    for (auto one = sessions->begin(); one != sessions->end();)
    {
        one = one->second.expired() ? sessions->erase(one) : std::next(one);
    }
    return found;
}

Workspace& Workspaces::of(void* stream)
{
    std::lock_guard<std::mutex> const lock(mMutex);
    return mStreams[stream];
}

bool Workspaces::grow(Workspace& workspace, size_t bytes, std::string& error)
{
    if (bytes <= workspace.size)
    {
        return true;
    }
    workspace.blocks.reserve(workspace.blocks.size() + 1);
    size_t size = std::max(bytes, workspace.size + workspace.size / 2); // so that lengths that go up one by one do not leave a block each
    void* block = allocate(mApi, *mAllocator, size, error);
    if (block == nullptr && size > bytes)
    {
        size = bytes;
        block = allocate(mApi, *mAllocator, size, error);
    }
    if (block == nullptr)
    {
        return false;
    }
    error.clear();
    workspace.blocks.push_back(block); // the others stay: a captured graph may hold their addresses
    workspace.size = size;
    return true;
}

} // namespace sessa::ort
