// Causal attention with a cache: o_t = sum_j softmax_j(q_t . k_j * scale) v_j over past rows j < past_length[b] and new rows j <= t.
#include "rows.h"

namespace sessa
{
namespace
{

using namespace CausalInput;

// Batch and row stride of both pasts, like every width in units of kHeadMultiple.
void addStrides(Problem const& p, Arguments& a)
{
    int64_t const row = p.kvHeads * p.headWidth / kHeadMultiple;
    a.add(p.capacity * row).add(i32(row)).add(p.capacity * row).add(i32(row));
}

struct Step final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        partial = findCubin("causal_step_partial", arch, dtype, headVariant(p.headWidth, p.heads / p.kvHeads).c_str());
        combine = findCubin("causal_step_combine", arch, dtype, "any");
        return partial != nullptr && combine != nullptr;
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        rows = partial->tile("BLOCK_R") * partial->tile("TILES");
        splits = stepSplits(p.capacity, rows, combine->tile("BLOCK_S"));
        part = arena.take(4 * p.batch * p.heads * splits * p.headWidth);
        stat = arena.take(8 * p.batch * p.heads * splits);
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {partial, combine};
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        int64_t const group = p.heads / p.kvHeads;
        int64_t const blocks = ceilDiv(p.kvHeads, partial->tile("BLOCK_H")) * ceilDiv(group, partial->tile("BLOCK_G"));
        int32_t const units = i32(p.headWidth / kHeadMultiple);
        Arguments first;
        first.add(t.in[kQ]).add(t.in[kK]).add(t.in[kV]).add(t.in[kPastK]).add(t.in[kPastV]).add(t.in[kPastLength]).add(part).add(stat);
        addStrides(p, first);
        first.add(i32(p.batch)).add(i32(splits)).add(i32(p.capacity)).add(i32(p.kvHeads)).add(i32(group)).add(units);
        first.add(scaleLog2(p.headWidth, p.numbers.scale));
        Arguments second;
        second.add(part).add(stat).add(t.in[kPastLength]).add(t.out);
        second.add(i32(p.capacity)).add(i32(splits)).add(i32(rows)).add(units);
        return launch(*partial, {blocks, stepPrograms(*partial, p.batch * splits, blocks), 1}, first, stream, error, p.batch)
            && launch(*combine, {p.heads, ceilDiv(p.headWidth, combine->tile("BLOCK_D")), p.batch}, second, stream, error, p.batch);
    }

    Cubin const* partial{};
    Cubin const* combine{};
    int64_t rows{}; // that a split takes at least
    int64_t splits{};
    char* part{};
    char* stat{};
};

struct Prefill final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        kernel = findCubin("causal_prefill", arch, dtypeName(p.storage), headVariant(p.headWidth, 1).c_str());
        return kernel != nullptr;
    }

    void layout(Problem const&, Arena&, bool) override {}

    std::vector<Cubin const*> cubins() const override
    {
        return {kernel};
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        a.add(t.in[kQ]).add(t.in[kK]).add(t.in[kV]).add(t.in[kPastK]).add(t.in[kPastV]).add(t.in[kPastLength]).add(t.out);
        addStrides(p, a);
        a.add(i32(p.tokens)).add(i32(p.capacity)).add(i32(p.heads / p.kvHeads)).add(i32(p.headWidth / kHeadMultiple));
        a.add(scaleLog2(p.headWidth, p.numbers.scale));
        return launch(*kernel, {ceilDiv(p.tokens, kernel->tile("BM")), p.heads, p.batch}, a, stream, error);
    }

    Cubin const* kernel{};
};

Plan* planCausal(Problem const& p)
{
    return p.tokens == 1 ? static_cast<Plan*>(new Step) : rowsOrCausal(p, new Prefill);
}

std::vector<Problem> everyCausal(Storage storage)
{
    std::vector<Problem> all;
    for (int64_t const width : kHeadWidths)
    {
        for (int64_t const heads : {int64_t{1}, kGroup})
        {
            for (int64_t const tokens : {int64_t{1}, kStepRows, kStepRows + 1})
            {
                Problem p = smallest(kCausal, storage);
                p.tokens = tokens;
                p.capacity = 1;
                p.headWidth = width;
                p.heads = heads;
                all.push_back(p);
            }
        }
    }
    return all;
}

} // namespace

Family const kCausalFamily{planCausal, everyCausal};

} // namespace sessa
