#include "rows.h"

#include <memory>

namespace sessa
{
namespace
{

constexpr int64_t kSquare = kStepRows * kStepRows; // elements of a matrix of new rows among themselves

// route.py, steps_rows
bool fewRows(Problem const& p)
{
    return p.tokens >= 2 && p.tokens <= kStepRows && p.capacity > 0 && p.storage != Storage::kFloat;
}

bool narrow(Problem const& p)
{
    return p.width <= *(std::end(kRowsWidths) - 1);
}

bool narrowHeads(Problem const& p)
{
    return p.headWidth <= *(std::end(kRowsHeads) - 1);
}

// How the past of causal attention is split, and the parts' place.
struct CausalParts
{
    void layout(Problem const& p, Arena& arena, int64_t blockRows, int64_t most)
    {
        rows = blockRows;
        splits = stepSplits(p.capacity, rows, most);
        int64_t const parts = rowsOf(p) * p.heads * (1 + splits); // beside the splits the new rows
        part = arena.take(4 * parts * p.headWidth);
        stat = arena.take(8 * parts);
    }

    int64_t rows{}; // that a split takes at least
    int64_t splits{};
    char* part{};
    char* stat{};
};

struct FeedbackParts
{
    void layout(Problem const& p, Arena& arena, int64_t blockRows, int64_t most)
    {
        rows = blockRows;
        splits = stepSplits(p.capacity, rows, most);
        part = arena.take(4 * rowsOf(p) * splits * p.width);
        stat = arena.take(8 * rowsOf(p) * splits);
        scores = arena.take(4 * p.batch * kSquare);
    }

    // What the rows among themselves come to.
    void layoutSums(Problem const& p, Arena& arena)
    {
        add = arena.take(4 * rowsOf(p) * p.width);
        inverse = arena.take(4 * p.batch * kSquare);
    }

    int64_t rows{};
    int64_t splits{};
    char* part{};
    char* stat{};
    char* scores{};
    char* add{};
    char* inverse{};
};

struct MixerRows final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        std::string const variant = covering(kRowsWidths, p.width) + "." + covering(kRowsHeads, p.headWidth); // engine/spec.py, mixer_rows_variants
        bool const few = p.tokens <= kFewRows;
        partial = few ? findCubin("mixer_rows_partial", arch, dtype, (variant + "." + std::to_string(kFewRows)).c_str()) : nullptr;
        partial = partial != nullptr ? partial : findCubin("mixer_rows_partial", arch, dtype, variant.c_str());
        combine = p.width > kMixerBroad ? findCubin("mixer_rows_combine", arch, dtype, "wide") : nullptr; // engine/spec.py, rows_combines
        combine = combine != nullptr ? combine : findCubin("mixer_rows_combine", arch, dtype, "any");
        out = chosenCubin("mixer_rows_out", arch, p, "any", p.tokens);
        out = out != nullptr ? out : findCubin("mixer_rows_out", arch, productType(p).c_str(), "any");
        return partial != nullptr && combine != nullptr && out != nullptr;
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {partial, combine, out};
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        f.layout(p, arena, partial->tile("ROWS_F"), combine->tile("MOST_F"));
        b.layout(p, arena, partial->tile("ROWS_B"), combine->tile("MOST_B"));
        o = arena.take(storageBytes(p) * rowsOf(p) * p.width);
        b.layoutSums(p, arena);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        using namespace MixerInput;
        int64_t const group = p.heads / p.kvHeads;
        int64_t const programs = (1 + f.splits) * ceilDiv(p.heads, partial->tile("HEADS_F"));
        int32_t const units = i32(p.headWidth / kHeadMultiple);
        Arguments first;
        for (auto const i : {kQ, kK, kV, kPastK, kPastV, kQB, kKB, kPastKb, kPastS, kPastLength})
        {
            first.add(t.in[i]);
        }
        first.add(f.part).add(f.stat).add(b.part).add(b.stat).add(b.scores).add(i32(p.tokens)).add(i32(f.splits)).add(i32(b.splits)).add(i32(p.capacity));
        first.add(i32(p.kvHeads)).add(i32(group)).add(units).add(i32(p.width)).add(scaleLog2(p.headWidth, 0.0F)).add(scaleLog2(p.width, 0.0F));
        first.add(i32(programs));
        Arguments second;
        second.add(f.part).add(f.stat).add(b.part).add(b.stat).add(b.scores).add(t.in[kPastLength]).add(t.in[kGamma]).add(o).add(b.add).add(b.inverse);
        second.add(i32(p.tokens)).add(i32(p.capacity)).add(i32(f.splits)).add(i32(f.rows)).add(i32(b.splits)).add(i32(b.rows));
        second.add(i32(p.heads)).add(units).add(i32(p.width));
        Arguments third;
        third.add(o).add(t.in[kWeight]).add(t.in[p.weights == Weights::kStorage ? kWeight : kWeightScale]).add(t.in[kBias]).add(b.add).add(b.inverse);
        third.add(t.out).add(i32(p.tokens)).add(i32(p.width));
        int64_t const sums = ceilDiv(p.tokens * p.heads, combine->tile("NF")) * ceilDiv(p.headWidth, combine->tile("DF"))
            + ceilDiv(p.tokens, combine->tile("NB")) * ceilDiv(p.width, combine->tile("DB"));
        // It reads the pasts before it waits; behind the projections alone is it known that nobody writes them.
        bool const early = p.tokens <= kFewRows || p.width <= kRowsWidths[0]; // engine/spec.py, rows_early
        int64_t const rows = early && launchedLast(stream, "layer_project_gain") ? rowsOf(p) : kManyRows;
        return launch(*partial, {programs + 1 + b.splits, p.batch, 1}, first, stream, error, rows)
            && launch(*combine, {1 + sums, p.batch, 1}, second, stream, error, rowsOf(p))
            && launch(*out, {ceilDiv(p.width, out->tile("BN")), p.batch, 1}, third, stream, error, rowsOf(p));
    }

    Cubin const* partial{};
    Cubin const* combine{};
    Cubin const* out{};
    CausalParts f;
    FeedbackParts b;
    char* o{};
};

struct FeedbackRows final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        partial = findCubinForWidth("feedback_rows_partial", arch, dtype, i32(p.width));
        combine = findCubin("feedback_rows_combine", arch, "fp32", "any");
        finish = findCubin("feedback_rows_finish", arch, dtype, "any");
        return partial != nullptr && combine != nullptr && finish != nullptr;
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {partial, combine, finish};
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        b.layout(p, arena, partial->tile("BLOCK_R"), combine->tile("BLOCK_S"));
        b.layoutSums(p, arena);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        using namespace FeedbackInput;
        auto const width = i32(p.width);
        int64_t const stride = p.capacity * p.width;
        Arguments first;
        first.add(t.in[kQ]).add(t.in[kK]).add(t.in[kPastK]).add(t.in[kPastS]).add(t.in[kPastLength]).add(b.part).add(b.stat).add(b.scores);
        first.add(stride).add(width).add(stride).add(width).add(i32(p.tokens)).add(i32(b.splits)).add(i32(p.capacity)).add(width);
        first.add(scaleLog2(p.width, p.numbers.scale));
        Arguments second;
        second.add(b.part).add(b.stat).add(b.scores).add(t.in[kPastLength]).add(t.in[kGamma]).add(b.add).add(b.inverse);
        second.add(i32(p.tokens)).add(i32(p.capacity)).add(i32(b.splits)).add(i32(b.rows)).add(width);
        Arguments third;
        third.add(t.in[kF]).add(b.add).add(b.inverse).add(t.out).add(i32(p.tokens)).add(width);
        int64_t const sums = ceilDiv(p.tokens, combine->tile("BLOCK_N")) * ceilDiv(p.width, combine->tile("BLOCK_D"));
        return launch(*partial, {1 + b.splits, p.batch, 1}, first, stream, error, rowsOf(p))
            && launch(*combine, {1 + sums, p.batch, 1}, second, stream, error, rowsOf(p))
            && launch(*finish, {ceilDiv(p.width, finish->tile("BLOCK_D")), p.batch, 1}, third, stream, error, rowsOf(p));
    }

    Cubin const* partial{};
    Cubin const* combine{};
    Cubin const* finish{};
    FeedbackParts b;
};

struct CausalRows final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        partial = findCubin("causal_rows_partial", arch, dtype, covering(kRowsHeads, p.headWidth).c_str());
        combine = findCubin("causal_rows_combine", arch, dtype, "any");
        return partial != nullptr && combine != nullptr;
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {partial, combine};
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        f.layout(p, arena, partial->tile("BLOCK_R"), combine->tile("BLOCK_S"));
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        using namespace CausalInput;
        int64_t const group = p.heads / p.kvHeads;
        int64_t const row = p.kvHeads * p.headWidth / kHeadMultiple;
        int32_t const units = i32(p.headWidth / kHeadMultiple);
        Arguments first;
        first.add(t.in[kQ]).add(t.in[kK]).add(t.in[kV]).add(t.in[kPastK]).add(t.in[kPastV]).add(t.in[kPastLength]).add(f.part).add(f.stat);
        first.add(p.capacity * row).add(i32(row)).add(p.capacity * row).add(i32(row)).add(i32(p.tokens)).add(i32(f.splits)).add(i32(p.capacity));
        first.add(i32(p.kvHeads)).add(i32(group)).add(units).add(scaleLog2(p.headWidth, p.numbers.scale));
        Arguments second;
        second.add(f.part).add(f.stat).add(t.in[kPastLength]).add(t.out).add(i32(p.tokens)).add(i32(p.capacity)).add(i32(f.splits)).add(i32(f.rows));
        second.add(i32(p.heads)).add(units);
        return launch(*partial, {(1 + f.splits) * ceilDiv(p.heads, partial->tile("BLOCK_H")), p.batch, 1}, first, stream, error, rowsOf(p))
            && launch(*combine, {ceilDiv(p.tokens * p.heads, combine->tile("BLOCK_N")), ceilDiv(p.headWidth, combine->tile("BLOCK_D")), p.batch}, second,
                stream, error, rowsOf(p));
    }

    Cubin const* partial{};
    Cubin const* combine{};
    CausalParts f;
};

// The first of two that finds its binaries.
struct Either final : Plan
{
    Either(Plan* one, Plan* other)
        : first(one)
        , second(other)
    {
    }

    bool find(Problem const& p, int32_t arch) override
    {
        chosen = first->find(p, arch) ? first.get() : second.get();
        return chosen == first.get() || second->find(p, arch);
    }

    std::vector<Cubin const*> cubins() const override
    {
        return chosen->cubins();
    }

    void layout(Problem const& p, Arena& arena, bool bound) override
    {
        chosen->layout(p, arena, bound);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        return chosen->run(p, t, stream, error);
    }

    std::unique_ptr<Plan> first;
    std::unique_ptr<Plan> second;
    Plan* chosen{};
};

} // namespace

Plan* rowsOrMixer(Problem const& p, Plan* other)
{
    return fewRows(p) && narrow(p) && narrowHeads(p) ? new Either(new MixerRows, other) : other;
}

Plan* rowsOrFeedback(Problem const& p, Plan* other)
{
    return fewRows(p) && narrow(p) ? new Either(new FeedbackRows, other) : other;
}

Plan* rowsOrCausal(Problem const& p, Plan* other)
{
    return fewRows(p) && narrowHeads(p) ? new Either(new CausalRows, other) : other;
}

} // namespace sessa
