#include "launcher.h"

#include "plan.h"

#include <cstring>
#include <memory>

namespace sessa
{
namespace
{

constexpr int64_t kAlign = 16;
constexpr int64_t kMaxIndex = 2147483647;

std::unique_ptr<Plan> planFor(Problem const& p)
{
    return std::unique_ptr<Plan>(p.op->plan(p));
}

bool missingCubin(Problem const& p, int32_t arch, std::string& error)
{
    error = "no kernel for sm_" + std::to_string(arch) + ", " + dtypeName(p.storage) + ": this library holds sm_" + architectures()
        + "; rebuild it: sessa-deploy plugin build --arch " + std::to_string(arch);
    return false;
}

// The most that this problem, or one with fewer sequences, rows or past, takes on `arch`; decode steps included.
size_t workspaceFor(Problem const& p, int32_t arch)
{
    size_t most = 0;
    for (int64_t const tokens : {int64_t{1}, p.tokens})
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

Op const& opAt(int32_t index) noexcept
{
    static Op const* const all[kOpCount]{&kFeedback, &kCausal, &kRotary, &kNorm, &kLinearHeads, &kLogits, &kTail, &kEnter, &kProjectGain, &kMixer};
    return *all[index];
}

int64_t* Problem::size(char letter) noexcept
{
    switch (letter)
    {
    case 'B': return &batch;
    case 'T': return &tokens;
    case 'P': return &capacity;
    case 'D': return &width;
    case 'H': return &heads;
    case 'K': return &kvHeads;
    case 'C': return &headWidth;
    case 'N': return &columns;
    case 'E': return &doubleWidth;
    case 'J': return &pairs;
    case 'I': return &one;
    case 'R': return &limbs;
    default: return nullptr;
    }
}

bool check(Problem const& p, std::string& error) noexcept
try
{
    if (p.storage != Storage::kFloat && p.storage != Storage::kHalf && p.storage != Storage::kBFloat16)
    {
        return refuse(error, "storage type", std::to_string(static_cast<int32_t>(p.storage)), "1 (float32), 10 (float16), 16 (bfloat16)");
    }
    std::string const sizes = std::to_string(p.batch) + ", " + std::to_string(p.tokens) + ", " + std::to_string(p.capacity);
    if (p.batch < 1 || p.tokens < 1 || p.capacity < 0)
    {
        return refuse(error, "batch, tokens, capacity", sizes, "at least 1, 1, 0");
    }
    if (p.batch > 65535 || p.tokens > kMaxIndex / 2 || p.capacity > kMaxIndex / 2)
    {
        return refuse(error, "batch, tokens, capacity", sizes, "a batch up to 65535, rows up to 2^30");
    }
    if (!std::isfinite(p.scale) || p.scale < 0)
    {
        return refuse(error, "scale", std::to_string(p.scale), "a finite positive number, or 0 for the width's -1/2 power");
    }
    return p.op->check(p, error);
}
catch (...)
{
    return false;
}

size_t workspaceSize(Problem const& p) noexcept
try
{
    std::string error;
    if (!check(p, error))
    {
        return 0;
    }
    if (int32_t const arch = currentArch(error); arch != 0)
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
catch (...)
{
    return false;
}

void prepareAll(Op const& op, Storage storage) noexcept
try
{
    std::string ignored; // without a device this is no error yet; `run` will say so
    for (auto const& problem : op.everything(storage))
    {
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
        if (!aligned(p.op->result(i).name, t.outs[i], true, error))
        {
            return false;
        }
    }
    return aligned("workspace", workspace, arena.used() > 0, error) && plan->run(p, t, stream, error);
}
catch (...)
{
    return false;
}

} // namespace sessa
