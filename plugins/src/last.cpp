// What stands behind the last layer where the logits of one token a sequence are wanted: kernels/engine/last.py.
#include "plan.h"

namespace sessa
{
namespace
{

struct LastLogits final : Plan
{
    static constexpr int32_t kWeight = LastLogitsInput::kWeight;

    bool find(Problem const& p, int32_t arch) override
    {
        norm = findCubinForWidth("layer_norm_last", arch, dtypeName(p.storage), i32(p.width));
        return norm != nullptr && matrix.find("layer_logits", arch, p, p.batch, p.columns, false);
    }

    std::vector<Cubin const*> cubins() const override
    {
        std::vector<Cubin const*> all{norm};
        auto const its = matrix.cubins();
        all.insert(all.end(), its.begin(), its.end());
        return all;
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        normal = arena.take(storageBytes(p) * p.batch * p.width);
        matrix.layout(p, arena, p.columns);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        auto const width = i32(p.width);
        Arguments first; // x, new_length and the norm's weights
        first.add(t.in[0]).add(t.in[1]).add(t.in[2]).add(t.in[3]).add(normal).add(i32(p.tokens)).add(width).add(p.numbers.epsilon);
        Arguments second;
        matrix.add(second.add(normal), p, t, kWeight).add(t.outs[0]).add(i32(p.batch)).add(width).add(i32(p.columns));
        int64_t const tiles = ceilDiv(p.batch, matrix.kernel().tile("BM")) * ceilDiv(p.columns, matrix.kernel().tile("BN"));
        return launch(*norm, {p.batch, 1, 1}, first, stream, error, p.batch) && matrix.run(t, kWeight, tiles, second, stream, error, p.batch);
    }

    Cubin const* norm{};
    Matrix matrix;
    char* normal{};
};

Plan* planLastLogits(Problem const&)
{
    return new LastLogits;
}

// Every number of rows, of which a sequence has one, and every width that selects binaries.
std::vector<Problem> everyLastLogits(Storage storage)
{
    std::vector<int64_t> widths(std::begin(kLayerWidths), std::end(kLayerWidths));
    widths.push_back(kWidthMultiple);
    for (int64_t const depth : kWholeDepths)
    {
        widths.push_back(depth + kWidthMultiple);
    }
    std::vector<Problem> all;
    for (int64_t const batch : {kRows[0], kRows[1], kRows[2], kRows[2] + 1})
    {
        for (int64_t const width : widths)
        {
            Problem p = smallest(kLastLogits, storage);
            p.batch = batch;
            p.width = width;
            p.columns = 80;
            all.push_back(p);
        }
    }
    return all;
}

} // namespace

Family const kLastLogitsFamily{planLastLogits, everyLastLogits};

} // namespace sessa
