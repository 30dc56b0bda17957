// Feedback attention: s_t = f_t + gamma_t * sum_j softmax_j(q_t . k_j * scale) s_j     (arXiv 2604.18580, section 3)
#include "rows.h"

namespace sessa
{
namespace
{

using namespace FeedbackInput;

struct Step final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        partial = findCubinForWidth("feedback_step_partial", arch, dtype, static_cast<int32_t>(p.width));
        combine = findCubin("feedback_step_combine", arch, dtype, "128");
        return partial != nullptr && combine != nullptr;
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        rows = partial->tile("BLOCK_R") * partial->tile("TILES");
        splits = stepSplits(p.capacity, rows);
        part = arena.take(4 * p.batch * splits * p.width);
        stat = arena.take(8 * p.batch * splits);
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {partial, combine};
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        auto const width = static_cast<int32_t>(p.width);
        auto const capacity = static_cast<int32_t>(p.capacity);
        int64_t const stride = p.capacity * p.width;
        Arguments first;
        first.add(t.in[kQ]).add(t.in[kPastK]).add(t.in[kPastS]).add(t.in[kPastLength]).add(part).add(stat);
        first.add(stride).add(width).add(stride).add(width).add(i32(p.batch)).add(i32(splits)).add(capacity).add(width);
        first.add(scaleLog2(p.width, p.numbers.scale));
        Arguments second;
        second.add(part).add(stat).add(t.in[kPastLength]).add(t.in[kGamma]).add(t.in[kF]).add(t.out);
        second.add(capacity).add(static_cast<int32_t>(splits)).add(i32(rows)).add(width);
        return launch(*partial, {stepPrograms(*partial, p.batch * splits, 1), 1, 1}, first, stream, error, p.batch)
            && launch(*combine, {p.batch, ceilDiv(width, combine->tile("BLOCK_D")), 1}, second, stream, error, p.batch);
    }

    Cubin const* partial{};
    Cubin const* combine{};
    int64_t rows{}; // that a split takes at least
    int64_t splits{};
    char* part{};
    char* stat{};
};

// Prefill and chunks: routing tiles, block inverses, then the solve as one dataflow kernel, panel by panel (see kernels/feedback/forward.py).
struct Forward final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        // feedback/spec.py, solver and solve_variant
        char const* const halves = "feedback_solve_halves";
        bool const halved = findCubin(halves, arch, dtype, "fwd") != nullptr;
        char const* const solver = halved ? halves : "feedback_solve";
        bool const few = halved && rowsOf(p) * p.width < kFewWork && findCubin(solver, arch, dtype, "few") != nullptr;
        bool const many = rowsOf(p) * p.width >= (halved ? kLongWork : kWideWork) || (halved && p.batch * p.width >= kWideColumns);
        bool const wide = !few && many && findCubin(solver, arch, dtype, "wide") != nullptr;
        narrow = findCubin(solver, arch, dtype, "fwd");
        pack = findCubin("feedback_pack", arch, dtype, wide ? "wide" : "fwd");
        scores = findCubin("feedback_scores", arch, dtype, p.capacity > 0 ? "past" : "fwd");
        bool const large = p.capacity > 0 && p.tokens >= kPastRows && rowsOf(p) >= kPastWork; // feedback/spec.py, scores_past
        shared = large ? findCubin("feedback_scores_past", arch, dtype, "fwd") : nullptr;
        bool const half = p.storage == Storage::kHalf;
        nearPrograms = half ? 2 : 4; // a block: for each of the two nearest tiles one, or one for half of its rows
        combination = {findCubin(half ? "feedback_inverse_half" : "feedback_inverse", arch, dtype, "fwd"),
            findCubin(half ? "feedback_near_half" : "feedback_near", arch, dtype, "fwd")};
        if (combination[0] == nullptr || combination[1] == nullptr) // which stand in for the combination where their tiles are pinned
        {
            combination = {findCubin("feedback_combine", arch, dtype, "fwd")};
        }
        solve = few || wide ? findCubin(solver, arch, dtype, few ? "few" : "wide") : narrow;
        return pack != nullptr && scores != nullptr && combination[0] != nullptr && solve != nullptr;
    }

    std::vector<Cubin const*> cubins() const override
    {
        std::vector<Cubin const*> all{pack, scores, solve};
        all.insert(all.end(), combination.begin(), combination.end());
        all.insert(all.end(), shared == nullptr ? 0 : 1, shared);
        return all;
    }

    // With `bound`, sizes that also hold for every smaller problem: fewer columns make taller panels, fewer rows narrower tiles.
    void layout(Problem const& p, Arena& arena, bool bound) override
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
        tilesN = ceilDiv(p.width, (bound && narrow != nullptr ? narrow : solve)->tile("BN"));
        syncs = panels + p.batch * tilesN;
        e = arena.take(bound ? boundBytes : panelBytes);
        peak = arena.take(4 * p.batch * tiles * rows);
        total = arena.take(4 * p.batch * tiles * rows);
        rowPeak = arena.take(4 * p.batch * rows);
        gain = arena.take(4 * p.batch * rows);
        x = arena.take(4 * p.batch * rows * tile);
        inverse = split ? arena.take(2 * p.batch * rows * tile) : x;
        inverseLow = split ? arena.take(2 * p.batch * rows * tile) : x;
        int64_t const kept = combination.size() > 1 ? 3 : 2; // products with the two nearest blocks; behind them the inverse itself, as one half
        near = arena.take(kept * work * p.batch * rows * tile);
        nearLow = arena.take(2 * work * p.batch * rows * tile);
        nearScale = arena.take(kept * 4 * p.batch * rows);
        w = arena.take(work * p.batch * columns * p.width);
        wLow = split ? arena.take(work * p.batch * columns * p.width) : w;
        scales = arena.take(4 * p.batch * tiles * tilesN);
        lse = arena.take(4 * p.batch * p.tokens);
        sync = arena.take(4 * syncs);
    }

    // Programs that cover the routing tiles of `rowTiles` tiles of rows in groups (feedback/tiles.py, grouped_size).
    static int64_t groupedSize(int64_t rowTiles, int64_t base, int64_t rows, int64_t columns, int64_t group)
    {
        int64_t const n = ceilDiv(rowTiles, group);
        int64_t const step = group * rows / columns;
        return group * (base * n + step * n * (n + 1) / 2);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        return runFirst(p, t, stream, error) && runAhead(p, t, stream, error) && runRest(p, t, stream, error);
    }

    // What the solve reads of the past.
    bool runFirst(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments packing;
        packing.add(t.in[kPastS]).add(t.in[kPastLength]).add(w).add(wLow).add(scales).add(i32(p.capacity)).add(i32(p.width)).add(i32(columns));
        return pastTiles == 0 || launch(*pack, {std::min(pastTiles, kPackPrograms), tilesN, p.batch}, packing, stream, error);
    }

    // Of the first panel all but the solve, the only kernel that reads f.
    bool runAhead(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        return route(p, t, 0, stream, error);
    }

    bool runRest(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        for (int64_t panel = 0; panel < panels; ++panel)
        {
            int64_t const row0 = panel * rows;
            Arguments c;
            c.add(e).add(peak).add(rowPeak).add(gain).add(inverse).add(inverseLow).add(near).add(nearLow).add(nearScale).add(t.in[kF]).add(t.out).add(t.out);
            c.add(w).add(wLow).add(scales).add(t.in[kPastLength]).add(sync).add(i32(p.tokens)).add(i32(p.width)).add(i32(columns)).add(i32(rows));
            c.add(i32(pastTiles)).add(i32(tiles)).add(i32(row0)).add(i32(p.batch)).add(i32(panel)).add(i32(panels)).add(0); // 0: keep nothing for a backward
            if ((panel > 0 && !route(p, t, panel, stream, error)) || !launch(*solve, {blocksOf(p, panel) * p.batch * tilesN, 1, 1}, c, stream, error))
            {
                return false;
            }
        }
        return true;
    }

    int64_t blocksOf(Problem const& p, int64_t panel) const
    {
        return ceilDiv(std::min(rows, p.tokens - panel * rows), solve->tile("BT"));
    }

    // The routing tiles of a panel and the inverses of its blocks.
    bool route(Problem const& p, Tensors const& t, int64_t panel, CUstream_st* stream, std::string& error) const
    {
        int64_t const tile = solve->tile("BT");
        int64_t const row0 = panel * rows;
        int64_t const blocks = blocksOf(p, panel);
        int64_t const scoreRows = scores->tile("BM");
        int64_t const group = scores->tile("NB");
        // feedback/forward.py, live_grid
        auto const programs = [&](int64_t past) {
            int64_t const rowTiles = ceilDiv(std::min(rows, p.tokens - row0), scoreRows);
            return groupedSize(rowTiles, (past + row0 / tile) / group, scoreRows, tile * group, scores->tile("GROUP"));
        };
        int64_t const grid = std::min(programs(pastTiles), std::max(programs(0), kScorePrograms));
        bool const many = shared != nullptr && (panels == 1 || rows % kScoreColumns == 0); // feedback/forward.py, score_launches
        Arguments a;
        a.add(t.in[kQ]).add(t.in[kK]).add(pastTiles > 0 ? t.in[kPastK] : t.in[kK]).add(t.in[kPastLength]).add(lse);
        if (!many)
        {
            a.add(sync);
        }
        a.add(e).add(peak).add(total).add(sync);
        a.add(i32(p.tokens)).add(i32(p.capacity)).add(i32(p.width)).add(i32(columns)).add(i32(rows)).add(i32(pastTiles)).add(i32(tiles));
        a.add(i32(row0)).add(i32(panel > 0 ? 0 : syncs)).add(static_cast<float>(scaleOf(p.width, p.numbers.scale)));
        Arguments b;
        b.add(e).add(peak).add(total).add(t.in[kGamma]).add(t.in[kPastLength]).add(rowPeak).add(gain).add(lse).add(x).add(inverse).add(inverseLow);
        b.add(near).add(nearLow).add(nearScale).add(i32(p.tokens)).add(i32(columns)).add(i32(rows)).add(i32(pastTiles)).add(i32(tiles)).add(i32(row0));
        b.add(i32(p.batch)).add(i32(blocks));
        bool good = many ? shareScores(p, row0, blocks, a, stream, error) : launch(*scores, {grid, p.batch, 1}, a, stream, error);
        for (size_t i = 0; good && i < combination.size(); ++i)
        {
            Arguments same = b; // a launch adds to them
            good = launch(*combination[i], {blocks, p.batch, i == 0 ? 1 : nearPrograms}, same, stream, error);
        }
        return good;
    }

    // feedback/many.py, ManyScores: the programs that the device holds share the tiles, of 128 rows in pairs. Their descriptors are made where the inverses
    // will be: in x, of kManyPrograms rows but for a panel of very many columns, then in both halves of the inverses behind it too.
    bool shareScores(Problem const& p, int64_t row0, int64_t blocks, Arguments& a, CUstream_st* stream, std::string& error) const
    {
        int64_t const pairs = ceilDiv(blocks, 2);
        int64_t const base = row0 / kScoreColumns;
        int64_t const each = pairs * (pairs + 1) + 2 * base * pairs;
        int64_t const most = p.batch * (each + blocks * ceilDiv(p.capacity, kScoreColumns));
        a.add(i32(p.batch)).add(i32(each)).add(i32(base));
        a.scratch(x);
        return launch(*shared, {std::min({most, heldPrograms(*shared), kManyPrograms}), 1, 1}, a, stream, error);
    }

    Cubin const* pack{};
    Cubin const* scores{};
    Cubin const* shared{}; // in place of `scores`, where there is much work
    Cubin const* solve{};
    Cubin const* narrow{}; // the solve of fewer rows
    std::vector<Cubin const*> combination;
    int64_t pastTiles{}, tiles{}, columns{}, rows{}, panels{}, tilesN{}, syncs{}, nearPrograms{};
    char *e{}, *peak{}, *total{}, *rowPeak{}, *gain{}, *x{}, *inverse{}, *inverseLow{}, *near{}, *nearLow{}, *nearScale{}, *w{}, *wLow{}, *scales{}, *lse{},
        *sync{};
};

Plan* planFeedback(Problem const& p)
{
    return p.tokens == 1 ? static_cast<Plan*>(new Step) : rowsOrFeedback(p, new Forward);
}

std::vector<Problem> everyFeedback(Storage storage)
{
    std::vector<Problem> all;
    auto const add = [&](int64_t tokens, int64_t width) {
        Problem p = smallest(kFeedback, storage);
        p.tokens = tokens;
        p.capacity = 1;
        p.width = width;
        all.push_back(p);
    };
    add(std::max(kPastRows, kPastWork), 256); // scores whose programs share the tiles
    add(kStepRows + 1, 256); // narrow tiles of the solve, which in halves are those of few
    add(kFewWork / 256, 256);
    add(kWideWork / 256, 256);
    all.back().batch = kWideColumns / 256;
    add(kStepRows + 1, 256);
    all.back().capacity = 0;
    for (int64_t const width : kRowsWidths)
    {
        add(kStepRows, width);
    }
    for (int64_t const width : kStepWidths)
    {
        add(1, width);
    }
    return all;
}

} // namespace

Family const kFeedbackFamily{planFeedback, everyFeedback};

} // namespace sessa
