#include "driver.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace sessa
{
namespace
{

// What is used of cuda.h; the driver's ABI has kept these since CUDA 4.
using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr int kComputeMajor = 75;
constexpr int kComputeMinor = 76;
constexpr int kMultiprocessors = 16;
constexpr int kMaxDynamicShared = 8;
constexpr int kPreferredShared = 9; // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
constexpr int kStaticShared = 48 * 1024;
constexpr int kMostShared = 1; // CU_FUNC_CACHE_PREFER_SHARED
constexpr int kProgrammaticSerialization = 6; // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kDependentSince = 12030;        // first driver that keeps the attribute in a captured stream

// CUlaunchAttribute and CUlaunchConfig.
struct LaunchAttribute
{
    int id;
    char pad[4];
    union
    {
        char bytes[64];
        int allowed;
    } value;
};

struct LaunchConfig
{
    unsigned grid[3];
    unsigned block[3];
    unsigned shared;
    CUstream_st* stream;
    LaunchAttribute* attributes;
    unsigned count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "as cuda.h lays them out");

struct Driver
{
    Result (*ctxGetCurrent)(Context*){};
    Result (*ctxGetDevice)(int*){};
    Result (*deviceGetAttribute)(int*, int, int){};
    Result (*moduleLoadData)(Module*, void const*){};
    Result (*moduleGetFunction)(Function*, Module, char const*){};
    Result (*funcSetAttribute)(Function, int, int){};
    Result (*launchKernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream_st*, void**, void**){};
    Result (*getErrorName)(Result, char const**){};
    Result (*occupancy)(int*, Function, int, size_t){}; // may be null
    Result (*funcSetCacheConfig)(Function, int){};      // may be null
    Result (*launchKernelEx)(LaunchConfig const*, Function, void**, void**){}; // null where kernels cannot start before their predecessor ends
    std::string missing; // why the driver cannot be used, empty if it can
};

void* openDriver()
{
    static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return library;
}

template <typename F>
void bind(void* library, char const* name, F& target, std::string& missing)
{
    target = reinterpret_cast<F>(dlsym(library, name));
    if (target == nullptr)
    {
        missing = std::string("libcuda.so.1 has no ") + name;
    }
}

Driver const& driver()
{
    static Driver const instance = [] {
        Driver d;
        void* library = openDriver();
        if (library == nullptr)
        {
            d.missing = "libcuda.so.1 cannot be opened: install the NVIDIA driver";
            return d;
        }
        bind(library, "cuCtxGetCurrent", d.ctxGetCurrent, d.missing);
        bind(library, "cuCtxGetDevice", d.ctxGetDevice, d.missing);
        bind(library, "cuDeviceGetAttribute", d.deviceGetAttribute, d.missing);
        bind(library, "cuModuleLoadData", d.moduleLoadData, d.missing);
        bind(library, "cuModuleGetFunction", d.moduleGetFunction, d.missing);
        bind(library, "cuFuncSetAttribute", d.funcSetAttribute, d.missing);
        bind(library, "cuLaunchKernel", d.launchKernel, d.missing);
        bind(library, "cuGetErrorName", d.getErrorName, d.missing);
        Result (*version)(int*){};
        int found = 0;
        std::string ignored;
        bind(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", d.occupancy, ignored);
        bind(library, "cuFuncSetCacheConfig", d.funcSetCacheConfig, ignored);
        bind(library, "cuDriverGetVersion", version, ignored);
        char const* const wanted = std::getenv("SESSA_PDL");
        bool const off = wanted != nullptr && std::strcmp(wanted, "0") == 0;
        if (!off && version != nullptr && version(&found) == 0 && found >= kDependentSince)
        {
            bind(library, "cuLaunchKernelEx", d.launchKernelEx, ignored);
        }
        return d;
    }();
    return instance;
}

bool failed(Result result, char const* what, std::string& error)
{
    if (result == 0)
    {
        return false;
    }
    char const* name = nullptr;
    driver().getErrorName(result, &name);
    error = std::string(what) + " failed: " + (name == nullptr ? "unknown error" : name) + " (" + std::to_string(result) + ")";
    return true;
}

// Of this thread.
struct Launched
{
    CUstream_st* stream{};
    Cubin const* cubin{};
};
thread_local Launched launched;

struct Kernel
{
    Function function{};
    int64_t resident{};
};

// Kernels by (context, binary). They stay until the context goes: an engine that is rebuilt finds them again.
struct Loaded
{
    std::mutex mutex;
    std::map<std::pair<Context, Cubin const*>, Kernel> kernels;
};

Loaded& loaded()
{
    static Loaded* const instance = new Loaded; // never destroyed: the driver may be gone by then
    return *instance;
}

bool getContext(Context& context, std::string& error)
{
    if (!driver().missing.empty())
    {
        error = driver().missing;
        return false;
    }
    if (failed(driver().ctxGetCurrent(&context), "cuCtxGetCurrent", error))
    {
        return false;
    }
    if (context == nullptr)
    {
        error = "no CUDA context is current in this thread";
        return false;
    }
    return true;
}

int64_t countResident(Cubin const& cubin, Function function)
{
    int each = 0;
    int device = 0;
    int multiprocessors = 0;
    bool const known = driver().occupancy != nullptr && driver().occupancy(&each, function, cubin.warps * 32, static_cast<size_t>(cubin.shared)) == 0
        && driver().ctxGetDevice(&device) == 0 && driver().deviceGetAttribute(&multiprocessors, kMultiprocessors, device) == 0;
    return known ? int64_t{each} * multiprocessors : 0;
}

bool getKernel(Cubin const& cubin, Kernel& kernel, std::string& error)
{
    Context context{};
    if (!getContext(context, error))
    {
        return false;
    }
    std::lock_guard<std::mutex> const lock(loaded().mutex);
    auto const found = loaded().kernels.find({context, &cubin});
    if (found != loaded().kernels.end())
    {
        kernel = found->second;
        return true;
    }
    Module module{};
    std::string const name = std::string(cubin.kernel) + " for sm_" + std::to_string(cubin.arch);
    if (failed(driver().moduleLoadData(&module, cubin.data), ("loading " + name).c_str(), error)
        || failed(driver().moduleGetFunction(&kernel.function, module, cubin.entry), ("finding " + name).c_str(), error))
    {
        return false;
    }
    bool const large = cubin.shared > kStaticShared;
    if (large && failed(driver().funcSetAttribute(kernel.function, kMaxDynamicShared, cubin.shared), ("reserving shared memory of " + name).c_str(), error))
    {
        return false;
    }
    if (large && driver().funcSetCacheConfig != nullptr)
    {
        // As Triton does where it launches them. Left to itself the driver sets apart what each needs, and a kernel whose share is not its neighbour's waits
        // until a multiprocessor is empty. A wish too.
        driver().funcSetCacheConfig(kernel.function, kMostShared);
    }
    if (cubin.sharedShare > 0)
    {
        driver().funcSetAttribute(kernel.function, kPreferredShared, cubin.sharedShare); // a wish: a driver that refuses goes without
    }
    kernel.resident = countResident(cubin, kernel.function);
    loaded().kernels[{context, &cubin}] = kernel;
    return true;
}

} // namespace

int32_t currentArch(std::string& error) noexcept
try
{
    Context context{};
    int device = 0;
    int major = 0;
    int minor = 0;
    if (!getContext(context, error) || failed(driver().ctxGetDevice(&device), "cuCtxGetDevice", error)
        || failed(driver().deviceGetAttribute(&major, kComputeMajor, device), "cuDeviceGetAttribute", error)
        || failed(driver().deviceGetAttribute(&minor, kComputeMinor, device), "cuDeviceGetAttribute", error))
    {
        return 0;
    }
    return major * 10 + minor;
}
catch (...)
{
    return 0;
}

bool loadCubin(Cubin const& cubin, std::string& error) noexcept
try
{
    Kernel kernel;
    return getKernel(cubin, kernel, error);
}
catch (...)
{
    return false;
}

int64_t residentPrograms(Cubin const& cubin) noexcept
try
{
    Kernel kernel;
    std::string ignored;
    return getKernel(cubin, kernel, ignored) ? kernel.resident : 0;
}
catch (...)
{
    return 0;
}

bool launch(Cubin const& cubin, Grid grid, Arguments& arguments, CUstream_st* stream, std::string& error, int64_t rows) noexcept
try
{
    constexpr int64_t kGridX = 2147483647;
    constexpr int64_t kGridYZ = 65535;
    constexpr uintptr_t kDescriptor = 128; // bytes of one, and its alignment: elsewhere the copy would read another
    Kernel kernel;
    if (cubin.scratch > 0 && (arguments.scratch() == nullptr || reinterpret_cast<uintptr_t>(arguments.scratch()) % kDescriptor != 0))
    {
        error = std::string(cubin.kernel) + " makes tensor descriptors, in memory that is null or not " + std::to_string(kDescriptor) + "-byte aligned";
        return false;
    }
    arguments.add(arguments.scratch()).add<void*>(nullptr); // Triton's global scratch and that of its profiler, which no kernel uses
    auto& values = arguments.values();
    if (static_cast<int32_t>(values.size()) != cubin.params)
    {
        error = std::string(cubin.kernel) + " takes " + std::to_string(cubin.params) + " parameters, got " + std::to_string(values.size());
        return false;
    }
    if (grid.x < 1 || grid.x > kGridX || grid.y < 1 || grid.y > kGridYZ || grid.z < 1 || grid.z > kGridYZ)
    {
        error = std::string(cubin.kernel) + " would need a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
        return false;
    }
    if (!getKernel(cubin, kernel, error))
    {
        return false;
    }
    std::vector<void*> pointers;
    pointers.reserve(values.size());
    for (auto& value : values)
    {
        pointers.push_back(&value);
    }
    Result result = 0;
    if (rows <= cubin.earlyRows && driver().launchKernelEx != nullptr)
    {
        LaunchAttribute dependent{};
        dependent.id = kProgrammaticSerialization;
        dependent.value.allowed = 1;
        LaunchConfig const config{{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)},
            {static_cast<unsigned>(cubin.warps) * 32, 1, 1}, static_cast<unsigned>(cubin.shared), stream, &dependent, 1};
        result = driver().launchKernelEx(&config, kernel.function, pointers.data(), nullptr);
    }
    else
    {
        result = driver().launchKernel(kernel.function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z),
            static_cast<unsigned>(cubin.warps) * 32, 1, 1, static_cast<unsigned>(cubin.shared), stream, pointers.data(), nullptr);
    }
    launched = {stream, &cubin};
    return !failed(result, (std::string("launching ") + cubin.kernel).c_str(), error);
}
catch (...)
{
    return false;
}

void* driverFunction(char const* name) noexcept
{
    void* const library = openDriver();
    return library == nullptr ? nullptr : dlsym(library, name);
}

bool launchedLast(CUstream_st* stream, char const* kernel) noexcept
{
    return launched.cubin != nullptr && launched.stream == stream && std::strcmp(launched.cubin->kernel, kernel) == 0;
}

} // namespace sessa
