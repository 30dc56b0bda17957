#include "launcher.h"

#include "cubins.h"
#include "driver.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace sessa
{
namespace
{

constexpr int64_t kAlign = 16;
constexpr int64_t kMaxWidth = 4096;
constexpr int64_t kMaxIndex = 2147483647;
constexpr int64_t kMaxSplits = 128;             // launch.STEP_MAX_SPLITS
constexpr int64_t kPanelBytes = int64_t{1} << 30; // feedback_fwd.PANEL_BYTES
constexpr double kLog2E = 1.4426950408889634;

int64_t ceilDiv(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

char const* dtypeName(Storage storage)
{
    return storage == Storage::kFloat ? "fp32" : storage == Storage::kHalf ? "fp16" : "bf16";
}

double scaleOf(Problem const& p)
{
    return p.scale != 0.0F ? static_cast<double>(p.scale) : 1.0 / std::sqrt(static_cast<double>(p.width));
}

// Hands out 256-byte aligned pieces of a workspace; with a null base it only counts.
class Arena
{
public:
    explicit Arena(void* base)
        : mBase(static_cast<char*>(base))
    {
    }

    char* take(int64_t bytes)
    {
        char* const piece = mBase + mUsed;
        mUsed += ceilDiv(std::max<int64_t>(bytes, 1), 256) * 256;
        return piece;
    }

    int64_t used() const
    {
        return mUsed;
    }

private:
    char* mBase;
    int64_t mUsed{0};
};

struct Step
{
    Cubin const* partial{};
    Cubin const* combine{};
    int64_t splits{};
    char* part{};
    char* stat{};

    bool find(Problem const& p, int32_t arch)
    {
        char const* dtype = dtypeName(p.storage);
        partial = findCubinForWidth("feedback_step_partial", arch, dtype, static_cast<int32_t>(p.width));
        combine = findCubin("feedback_step_combine", arch, dtype, "128");
        return partial != nullptr && combine != nullptr;
    }

    void layout(Problem const& p, Arena& arena, bool)
    {
        splits = std::max<int64_t>(1, std::min(kMaxSplits, ceilDiv(p.capacity, partial->tile("BLOCK_R"))));
        part = arena.take(4 * p.batch * splits * p.width);
        stat = arena.take(8 * p.batch * splits);
    }

    std::vector<Cubin const*> cubins() const
    {
        return {partial, combine};
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const
    {
        auto const width = static_cast<int32_t>(p.width);
        auto const capacity = static_cast<int32_t>(p.capacity);
        int64_t const stride = p.capacity * p.width;
        Arguments first;
        first.add(t.q).add(t.past_k).add(t.past_s).add(t.past_length).add(part).add(stat);
        first.add(stride).add(width).add(stride).add(width).add(capacity).add(width).add(static_cast<float>(scaleOf(p) * kLog2E));
        Arguments second;
        second.add(part).add(stat).add(t.past_length).add(t.gamma).add(t.f).add(t.s);
        second.add(capacity).add(static_cast<int32_t>(splits)).add(partial->tile("BLOCK_R")).add(width);
        return launch(*partial, {p.batch, splits, 1}, first, stream, error)
            && launch(*combine, {p.batch, ceilDiv(width, combine->tile("BLOCK_D")), 1}, second, stream, error);
    }
};

// Prefill and chunks: routing tiles, block inverses, then the solve as one dataflow kernel, panel by panel (see feedback_fwd.py).
struct Forward
{
    Cubin const* pack{};
    Cubin const* scores{};
    Cubin const* combine{};
    Cubin const* solve{};
    int64_t pastTiles{}, tiles{}, columns{}, rows{}, panels{}, tilesN{}, syncs{};
    char *e{}, *peak{}, *total{}, *rowPeak{}, *gain{}, *x{}, *inverse{}, *inverseLow{}, *near{}, *nearLow{}, *nearScale{}, *w{}, *wLow{}, *scales{}, *lse{},
        *sync{};

    bool find(Problem const& p, int32_t arch)
    {
        char const* dtype = dtypeName(p.storage);
        pack = findCubin("feedback_pack", arch, dtype, "fwd");
        scores = findCubin("feedback_scores", arch, dtype, "fwd");
        combine = findCubin("feedback_combine", arch, dtype, "fwd");
        solve = findCubin("feedback_solve", arch, dtype, "fwd");
        return pack != nullptr && scores != nullptr && combine != nullptr && solve != nullptr;
    }

    std::vector<Cubin const*> cubins() const
    {
        return {pack, scores, combine, solve};
    }

    // With `bound`, sizes that also hold for every smaller problem: fewer columns make taller panels.
    void layout(Problem const& p, Arena& arena, bool bound)
    {
        bool const split = p.storage != Storage::kFloat;
        int64_t const work = split ? 2 : 4;
        int64_t const tile = solve->tile("BT");
        int64_t const group = scores->tile("NB"); // column tiles a program of the scores kernel makes
        int64_t const scoreRows = std::max<int64_t>(scores->tile("BM"), tile * group);
        pastTiles = ceilDiv(p.capacity, tile * group) * group;
        tiles = pastTiles + ceilDiv(p.tokens, tile * group) * group;
        columns = tiles * tile;
        int64_t const fit = kPanelBytes / (p.batch * columns * work) / scoreRows * scoreRows;
        int64_t const allRows = ceilDiv(p.tokens, scoreRows) * scoreRows;
        rows = bound ? allRows : std::min(std::max(fit, scoreRows), allRows);
        panels = ceilDiv(p.tokens, bound ? scoreRows : rows);
        int64_t const panelBytes = work * p.batch * rows * columns;
        int64_t const boundBytes = std::min(panelBytes, std::max(kPanelBytes, work * p.batch * scoreRows * columns));
        tilesN = ceilDiv(p.width, solve->tile("BN"));
        syncs = panels + p.batch * tilesN;
        e = arena.take(bound ? boundBytes : panelBytes);
        peak = arena.take(4 * p.batch * tiles * rows);
        total = arena.take(4 * p.batch * tiles * rows);
        rowPeak = arena.take(4 * p.batch * rows);
        gain = arena.take(4 * p.batch * rows);
        x = arena.take(4 * p.batch * rows * tile);
        inverse = split ? arena.take(2 * p.batch * rows * tile) : x;
        inverseLow = split ? arena.take(2 * p.batch * rows * tile) : x;
        near = arena.take(2 * work * p.batch * rows * tile); // products with the two nearest blocks
        nearLow = arena.take(2 * work * p.batch * rows * tile);
        nearScale = arena.take(2 * 4 * p.batch * rows);
        w = arena.take(work * p.batch * columns * p.width);
        wLow = split ? arena.take(work * p.batch * columns * p.width) : w;
        scales = arena.take(4 * p.batch * tiles * tilesN);
        lse = arena.take(4 * p.batch * p.tokens);
        sync = arena.take(4 * syncs);
    }

    // Programs that cover the routing tiles of `rowTiles` tiles of rows in groups (feedback_tiles.grouped_size).
    static int64_t groupedSize(int64_t rowTiles, int64_t base, int64_t rows, int64_t columns, int64_t group)
    {
        int64_t const n = ceilDiv(rowTiles, group);
        int64_t const step = group * rows / columns;
        return group * (base * n + step * n * (n + 1) / 2);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const
    {
        auto const i32 = [](int64_t v) { return static_cast<int32_t>(v); };
        int64_t const tile = solve->tile("BT");
        Arguments packing;
        packing.add(t.past_s).add(t.past_length).add(w).add(wLow).add(scales).add(i32(p.capacity)).add(i32(p.width)).add(i32(columns));
        if (pastTiles > 0 && !launch(*pack, {pastTiles, tilesN, p.batch}, packing, stream, error))
        {
            return false;
        }
        for (int64_t panel = 0; panel < panels; ++panel)
        {
            int64_t const row0 = panel * rows;
            int64_t const here = std::min(rows, p.tokens - row0);
            int64_t const blocks = ceilDiv(here, tile);
            int64_t const scoreRows = scores->tile("BM");
            int64_t const group = scores->tile("NB");
            int64_t const grid
                = groupedSize(ceilDiv(here, scoreRows), (pastTiles + row0 / tile) / group, scoreRows, tile * group, scores->tile("GROUP"));
            Arguments a;
            a.add(t.q).add(t.k).add(pastTiles > 0 ? t.past_k : t.k).add(t.past_length).add(lse).add(sync).add(e).add(peak).add(total).add(sync);
            a.add(i32(p.tokens)).add(i32(p.capacity)).add(i32(p.width)).add(i32(columns)).add(i32(rows)).add(i32(pastTiles)).add(i32(tiles));
            a.add(i32(row0)).add(i32(panel > 0 ? 0 : syncs)).add(static_cast<float>(scaleOf(p)));
            Arguments b;
            b.add(e).add(peak).add(total).add(t.gamma).add(t.past_length).add(rowPeak).add(gain).add(lse).add(x).add(inverse).add(inverseLow);
            b.add(near).add(nearLow).add(nearScale).add(i32(p.tokens)).add(i32(columns)).add(i32(rows)).add(i32(pastTiles)).add(i32(tiles)).add(i32(row0));
            b.add(i32(p.batch)).add(i32(blocks));
            Arguments c;
            c.add(e).add(peak).add(rowPeak).add(gain).add(inverse).add(inverseLow).add(near).add(nearLow).add(nearScale).add(t.f).add(t.s);
            c.add(w).add(wLow).add(scales).add(t.past_length).add(sync).add(i32(p.tokens)).add(i32(p.width)).add(i32(columns)).add(i32(rows));
            c.add(i32(pastTiles)).add(i32(tiles)).add(i32(row0)).add(i32(p.batch)).add(i32(panel)).add(i32(panels));
            if (!launch(*scores, {grid, p.batch, 1}, a, stream, error) || !launch(*combine, {blocks, p.batch, 1}, b, stream, error)
                || !launch(*solve, {blocks * p.batch * tilesN, 1, 1}, c, stream, error))
            {
                return false;
            }
        }
        return true;
    }
};

// Calls `act` with the plan for this problem, Step for one new row and Forward for more.
template <typename Act>
auto withPlan(Problem const& p, Act act)
{
    if (p.tokens == 1)
    {
        Step step;
        return act(step);
    }
    Forward forward;
    return act(forward);
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
        most = std::max(most, withPlan(one, [&](auto& plan) -> size_t {
            if (!plan.find(one, arch))
            {
                return 0;
            }
            Arena arena(nullptr);
            plan.layout(one, arena, true);
            return static_cast<size_t>(arena.used());
        }));
    }
    return most;
}

} // namespace

bool check(Problem const& p, std::string& error) noexcept
try
{
    auto const refuse = [&](std::string const& what, std::string const& got, std::string const& allowed) {
        error = what + ": got " + got + "; allowed: " + allowed;
        return false;
    };
    if (p.storage != Storage::kFloat && p.storage != Storage::kHalf && p.storage != Storage::kBFloat16)
    {
        return refuse("storage type", std::to_string(static_cast<int32_t>(p.storage)), "1 (float32), 10 (float16), 16 (bfloat16)");
    }
    if (p.width < kAlign || p.width > kMaxWidth || p.width % kAlign != 0)
    {
        return refuse("width D", std::to_string(p.width), "a multiple of 16 up to 4096");
    }
    if (p.batch < 1 || p.tokens < 1 || p.capacity < 0)
    {
        return refuse("batch, tokens, capacity", std::to_string(p.batch) + ", " + std::to_string(p.tokens) + ", " + std::to_string(p.capacity), "at least 1, 1, 0");
    }
    if (p.batch > 65535 || p.tokens > kMaxIndex / 2 || p.capacity > kMaxIndex / 2)
    {
        return refuse("batch, tokens, capacity", std::to_string(p.batch) + ", " + std::to_string(p.tokens) + ", " + std::to_string(p.capacity),
            "a batch up to 65535, rows up to 2^30");
    }
    if (!std::isfinite(p.scale) || p.scale < 0)
    {
        return refuse("scale", std::to_string(p.scale), "a finite positive number, or 0 for D^-1/2");
    }
    return true;
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
    return withPlan(p, [&](auto& plan) {
        if (!plan.find(p, arch))
        {
            return missingCubin(p, arch, error);
        }
        auto const cubins = plan.cubins();
        return std::all_of(cubins.begin(), cubins.end(), [&](Cubin const* c) { return loadCubin(*c, error); });
    });
}
catch (...)
{
    return false;
}

bool run(Problem const& p, Tensors const& t, void* workspace, CUstream_st* stream, std::string& error) noexcept
try
{
    int32_t const arch = check(p, error) ? currentArch(error) : 0;
    if (arch == 0)
    {
        return false;
    }
    struct Named
    {
        char const* name;
        void const* pointer;
        bool needed;
    };
    bool const past = p.capacity > 0;
    for (auto const& n : {Named{"q", t.q, true}, Named{"k", t.k, true}, Named{"gamma", t.gamma, true}, Named{"f", t.f, true},
             Named{"past_k", t.past_k, past}, Named{"past_s", t.past_s, past}, Named{"past_length", t.past_length, true}, Named{"s", t.s, true},
             Named{"workspace", workspace, true}})
    {
        if ((n.pointer == nullptr && n.needed) || reinterpret_cast<uintptr_t>(n.pointer) % kAlign != 0)
        {
            error = std::string(n.name) + " is null or not 16-byte aligned";
            return false;
        }
    }
    return withPlan(p, [&](auto& plan) {
        if (!plan.find(p, arch))
        {
            return missingCubin(p, arch, error);
        }
        Arena arena(workspace);
        plan.layout(p, arena, false);
        return plan.run(p, t, stream, error);
    });
}
catch (...)
{
    return false;
}

} // namespace sessa
