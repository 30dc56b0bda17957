#include "launcher.h"

#include "plan.h"

#include <cstring>
#include <memory>

namespace sessa
{
namespace
{

constexpr int64_t kAlign = 16;

std::unique_ptr<Plan> planFor(Problem const& p)
{
    return std::unique_ptr<Plan>(p.op->family->plan(p));
}

// Whether the library holds the problem's binaries, for whichever device.
bool held(Problem const& p)
{
    bool any = false;
    auto const plan = planFor(p);
    for (size_t i = 0; !any && architectureAt(i) != 0; ++i)
    {
        any = plan->find(p, architectureAt(i));
    }
    return any;
}

bool missingCubin(Problem const& p, int32_t arch, std::string& error)
{
    if (p.weights == Weights::kFloat8 && arch < kFloat8Arch)
    {
        return refuse(error, "weights of float8e4m3fn", "sm_" + std::to_string(arch), "sm_" + std::to_string(kFloat8Arch) + " and later; int8 on any");
    }
    std::string others;
    for (Storage const storage : {Storage::kFloat, Storage::kHalf, Storage::kBFloat16})
    {
        Problem other = p;
        other.storage = storage;
        others += storage != p.storage && held(other) ? std::string(others.empty() ? "" : ", ") + dtypeName(storage) : "";
    }
    if (!others.empty() && !held(p))
    {
        error = "no kernel for " + productType(p) + "; allowed: " + others;
        return false;
    }
    error = "no kernel for sm_" + std::to_string(arch) + ", " + productType(p) + ": this library holds sm_" + architectures();
    if (std::find(std::begin(kArchs), std::end(kArchs), arch) != std::end(kArchs))
    {
        error += std::string("; rebuild it: ") + kBuildCommand + " --arch " + std::to_string(arch);
    }
    return false;
}

// The most that this problem, or one with fewer sequences, rows or past, takes on `arch`; steps of one and of several rows included.
size_t workspaceFor(Problem const& p, int32_t arch)
{
    size_t most = 0;
    for (int64_t const tokens : {int64_t{1}, std::min(p.tokens, kStepRows), p.tokens})
    {
        Problem one = p;
        one.tokens = tokens;
        auto const plan = planFor(one);
        if (plan->find(one, arch))
        {
            Arena arena(nullptr);
            plan->layout(one, arena, true);
            most = std::max(most, static_cast<size_t>(arena.used()));
        }
    }
    return most;
}

// False, and the reason as far as there is memory to say it.
bool say(std::string& error, MissingTile const& missing) noexcept
try
{
    error = missing.what();
    return false;
}
catch (...)
{
    return false;
}

bool aligned(char const* name, void const* pointer, bool needed, std::string& error)
{
    bool const good = (pointer != nullptr || !needed) && reinterpret_cast<uintptr_t>(pointer) % kAlign == 0;
    if (!good)
    {
        error = std::string(name) + " is null or not 16-byte aligned";
    }
    return good;
}

} // namespace

size_t workspaceSize(Problem const& p, std::string& error) noexcept
try
{
    if (!check(p, error))
    {
        return 0;
    }
    std::string ignored; // without a device
    if (int32_t const arch = currentArch(ignored); arch != 0)
    {
        return workspaceFor(p, arch);
    }
    size_t most = 0;
    for (size_t i = 0; architectureAt(i) != 0; ++i)
    {
        most = std::max(most, workspaceFor(p, architectureAt(i)));
    }
    return most;
}
catch (MissingTile const& missing)
{
    say(error, missing);
    return 0;
}
catch (...)
{
    return 0;
}

bool prepare(Problem const& p, std::string& error) noexcept
try
{
    int32_t const arch = check(p, error) ? currentArch(error) : 0;
    if (arch == 0)
    {
        return false;
    }
    auto const plan = planFor(p);
    if (!plan->find(p, arch))
    {
        return missingCubin(p, arch, error);
    }
    auto const cubins = plan->cubins();
    return std::all_of(cubins.begin(), cubins.end(), [&](Cubin const* c) { return loadCubin(*c, error); });
}
catch (MissingTile const& missing)
{
    return say(error, missing);
}
catch (...)
{
    return false;
}

void prepareAll(Op const& op, Storage storage, Weights weights) noexcept
try
{
    std::string ignored; // without a device this is no error yet; `run` will say so
    for (auto& problem : op.family->everything(storage))
    {
        problem.op = &op;
        problem.weights = weights;
        static_cast<void>(prepare(problem, ignored));
    }
}
catch (...)
{
    // out of memory: `run` loads what it needs
}

bool run(Problem const& p, Tensors const& t, void* workspace, CUstream_st* stream, std::string& error) noexcept
try
{
    int32_t const arch = check(p, error) ? currentArch(error) : 0;
    if (arch == 0)
    {
        return false;
    }
    for (int32_t i = 0; i < p.op->inputs; ++i)
    {
        auto const& operand = p.op->operands[i];
        if (!aligned(operand.name, t.in[i], p.capacity > 0 || std::strchr(operand.shape, 'P') == nullptr, error))
        {
            return false;
        }
    }
    auto const plan = planFor(p);
    if (!plan->find(p, arch))
    {
        return missingCubin(p, arch, error);
    }
    Arena arena(workspace);
    plan->layout(p, arena, false);
    for (int32_t i = 0; i < p.op->outputs; ++i)
    {
        if (!aligned(p.op->results[i].name, t.outs[i], true, error))
        {
            return false;
        }
    }
    return aligned("workspace", workspace, arena.used() > 0, error) && plan->run(p, t, stream, error);
}
catch (MissingTile const& missing)
{
    return say(error, missing);
}
catch (...)
{
    return false;
}

} // namespace sessa
