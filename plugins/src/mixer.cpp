// A layer's mixer: causal attention o, f = o weight^T + bias, and s = f + gamma * feedback attention's sum. Its decode step is that of kernels/engine/mixer.py.
#include "beside.h"
#include "rows.h"

#include <memory>

namespace sessa
{
namespace
{

using namespace MixerInput;

// engine/spec.py, mixer_variant
std::string variant(Problem const& p)
{
    return covering(kMixerWidths, p.width) + "." + headVariant(p.headWidth, p.heads / p.kvHeads);
}

struct Step final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        bool const several = p.batch > 1 && p.width <= kMixerBroad; // engine/spec.py, batch_variant
        shared = several ? findCubin("mixer_batch_combine", arch, dtypeName(p.storage), headVariant(p.headWidth, 1).c_str()) : nullptr;
        char const* dtype = dtypeName(p.storage);
        partial = p.batch == 1 ? findCubin("mixer_step_partial", arch, dtype, (variant(p) + ".1").c_str()) : nullptr; // engine/spec.py, step_variants
        partial = partial != nullptr ? partial : findCubin("mixer_step_partial", arch, dtype, variant(p).c_str());
        combine = findCubin("mixer_step_combine", arch, dtype, p.batch == 1 ? "1" : p.width > kMixerBroad ? "wide" : "any"); // engine/spec.py, combine_variant
        Cubin const* const wide = p.width > kMixerBroad ? findCubin("mixer_step_combine", arch, dtype, kWideRow) : nullptr; // engine/mixer.py, step
        most = wide != nullptr ? kMixerMostB : 0;
        combine = wide != nullptr && p.batch == 1 ? wide : combine;
        return partial != nullptr && combine != nullptr && out.find("layer_out", arch, p, p.batch, p.width);
    }

    std::vector<Cubin const*> cubins() const override
    {
        std::vector<Cubin const*> all{partial, shared != nullptr ? shared : combine};
        auto const its = out.cubins();
        all.insert(all.end(), its.begin(), its.end());
        return all;
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        bool const broad = p.width > kMixerBroad && p.capacity <= kMixerShort; // launch/splits.py, least_rows
        rowsF = partial->tile("ROWS_F") * partial->tile("TILES_F") * (broad ? kMixerManyF : 1);
        rowsB = partial->tile("ROWS_B") * partial->tile("TILES_B") * (broad ? kMixerManyB : 1);
        splitsF = stepSplits(p.capacity, rowsF, combine->tile("BLOCK_F"));
        splitsB = stepSplits(p.capacity, rowsB, most > 0 ? most : combine->tile("BLOCK_B"));
        partF = arena.take(4 * p.batch * p.width * splitsF);
        statF = arena.take(8 * p.batch * p.heads * splitsF);
        partB = arena.take(4 * p.batch * p.width * splitsB);
        statB = arena.take(8 * p.batch * splitsB);
        o = arena.take(storageBytes(p) * p.batch * p.width);
        add = arena.take(4 * p.batch * p.width);
        out.layout(p, arena, p.width);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        int64_t const group = p.heads / p.kvHeads;
        int64_t const blocks = ceilDiv(p.kvHeads, partial->tile("HEADS_F")) * ceilDiv(group, partial->tile("GROUP_F"));
        int32_t const units = i32(p.headWidth / kHeadMultiple);
        int64_t programsF = 0;
        int64_t programsB = 0;
        share(p, blocks, programsF, programsB);
        Arguments first;
        for (auto const i : {kQ, kK, kV, kPastK, kPastV, kQB, kPastKb, kPastS, kPastLength})
        {
            first.add(t.in[i]);
        }
        first.add(partF).add(statF).add(partB).add(statB).add(i32(p.batch)).add(i32(splitsF)).add(i32(splitsB)).add(i32(p.capacity)).add(i32(p.kvHeads));
        first.add(i32(group)).add(units).add(i32(p.width)).add(scaleLog2(p.headWidth, 0.0F)).add(scaleLog2(p.width, 0.0F)).add(i32(programsF));
        Arguments second;
        second.add(partF).add(statF).add(partB).add(statB).add(t.in[kPastLength]).add(t.in[kGamma]).add(o).add(add);
        if (shared != nullptr)
        {
            second.add(i32(p.batch));
        }
        second.add(i32(p.capacity)).add(i32(splitsF)).add(i32(rowsF)).add(i32(splitsB)).add(i32(rowsB)).add(i32(p.heads)).add(units).add(i32(p.width));
        Arguments third;
        out.add(third.add(o), p, t, kWeight).add(t.in[kBias]).add(add).add(t.out).add(i32(p.batch)).add(i32(p.width));
        int64_t const tiles = ceilDiv(p.batch, out.kernel().tile("BM")) * ceilDiv(p.width, out.kernel().tile("BN"));
        // It reads the pasts before it waits; behind the projections alone is it known that nobody writes them.
        int64_t const rows = launchedLast(stream, "layer_project_gain") ? p.batch : kManyRows;
        return launch(*partial, {programsF + programsB, 1, 1}, first, stream, error, rows)
            && launch(shared != nullptr ? *shared : *combine, combination(p), second, stream, error, p.batch)
            && out.run(t, kWeight, tiles, third, stream, error, p.batch);
    }

    // Programs that add splits: those of one sequence's columns for each, or as many as share the tasks of all (mixer_batch.py, tasks).
    Grid combination(Problem const& p) const
    {
        int64_t const lanes = (shared != nullptr ? shared : combine)->tile("BLOCK_D");
        int64_t const most = p.heads * ceilDiv(p.headWidth, lanes) + ceilDiv(p.width, lanes);
        if (shared == nullptr)
        {
            return {most, p.batch, 1};
        }
        int64_t const few = ceilDiv(p.heads, shared->tile("HEADS")) + ceilDiv(p.width, shared->tile("SPAN"));
        return {std::min(p.batch * std::max(few, most), heldPrograms(*shared)), 1, 1};
    }

    // launch/splits.py, shares: programs for causal and for feedback attention.
    void share(Problem const& p, int64_t blocks, int64_t& programsF, int64_t& programsB) const
    {
        int64_t const held = heldPrograms(*partial);
        int64_t const piecesF = p.batch * splitsF;
        int64_t const piecesB = p.batch * splitsB;
        programsF = piecesF * blocks;
        programsB = piecesB;
        if (programsF + programsB > held)
        {
            int64_t const widthF = p.kvHeads * p.headWidth;
            int64_t const each = std::min(piecesF, std::max<int64_t>(1, held * widthF / (widthF + p.width) / blocks));
            programsB = std::min(piecesB, std::max<int64_t>(1, held - each * blocks));
            programsF = blocks * std::min(piecesF, std::max(each, (held - programsB) / blocks));
        }
    }

    Cubin const* shared{}; // in place of `combine`, where several sequences share its programs
    Cubin const* partial{};
    Cubin const* combine{};
    Matrix out;
    int64_t most{}; // splits of feedback attention, where the tiles do not say it
    int64_t rowsF{}; // that a split takes at least
    int64_t rowsB{};
    int64_t splitsF{};
    int64_t splitsB{};
    char* partF{};
    char* statF{};
    char* partB{};
    char* statB{};
    char* o{};
    char* add{};
};

// Prefill and chunks: the three operations.
struct Chunk final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        causal = part(p, kCausal);
        linear = part(p, p.weights == Weights::kStorage ? kLinearHeads : *quantised(kLinearHeads));
        linear.columns = p.width;
        feedback = part(p, kFeedback);
        plans.clear();
        for (Problem const* one : {&causal, &linear, &feedback})
        {
            plans.emplace_back(one->op->family->plan(*one));
            if (!plans.back()->find(*one, arch))
            {
                return false;
            }
        }
        return true;
    }

    std::vector<Cubin const*> cubins() const override
    {
        std::vector<Cubin const*> all;
        for (auto const& plan : plans)
        {
            auto const its = plan->cubins();
            all.insert(all.end(), its.begin(), its.end());
        }
        return all;
    }

    void layout(Problem const& p, Arena& arena, bool bound) override
    {
        o = arena.take(storageBytes(p) * p.batch * p.tokens * p.width);
        f = arena.take(storageBytes(p) * p.batch * p.tokens * p.width);
        plans[0]->layout(causal, arena, bound);
        plans[1]->layout(linear, arena, bound);
        plans[2]->layout(feedback, arena, bound);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        void const* const forCausal[] = {t.in[kQ], t.in[kK], t.in[kV], t.in[kPastK], t.in[kPastV], t.in[kPastLength]};
        void const* const forLinear[] = {o, t.in[kWeight], t.in[kBias], p.weights == Weights::kStorage ? nullptr : t.in[kWeightScale]};
        void const* const forFeedback[] = {t.in[kQB], t.in[kKB], t.in[kGamma], f, t.in[kPastKb], t.in[kPastS], t.in[kPastLength]};
        // What feedback attention does before it needs f is large kernels with few programs at their ends and small ones: they fill causal attention's end,
        // which is launched ahead of them and so has all multiprocessors until then. The packing of a past, few programs, is launched first.
        CUstream_st* const side = fork(stream);
        void* const outs[] = {t.out};
        Tensors const feedbacks{forFeedback, t.out, outs};
        bool const good = plans[2]->runFirst(feedback, feedbacks, side, error) && runPart(0, causal, forCausal, o, stream, error)
            && plans[2]->runAhead(feedback, feedbacks, side, error) && runPart(1, linear, forLinear, f, stream, error);
        return join(stream, side, error) && good && plans[2]->runRest(feedback, feedbacks, stream, error);
    }

    static Problem part(Problem const& p, Op const& op)
    {
        Problem one = p;
        one.op = &op;
        return one;
    }

    bool runPart(size_t index, Problem const& p, void const* const* in, void* out, CUstream_st* stream, std::string& error) const
    {
        void* const outs[] = {out};
        return plans[index]->run(p, {in, out, outs}, stream, error);
    }

    Problem causal;
    Problem linear;
    Problem feedback;
    std::vector<std::unique_ptr<Plan>> plans;
    char* o{};
    char* f{};
};

Plan* planMixer(Problem const& p)
{
    return p.tokens == 1 ? static_cast<Plan*>(new Step) : rowsOrMixer(p, new Chunk);
}

// Every width, head and number of rows that selects binaries.
std::vector<Problem> everyMixer(Storage storage)
{
    std::vector<Problem> all;
    Problem p = smallest(kMixer, storage);
    p.capacity = 1;
    for (int64_t const width : kMixerWidths)
    {
        for (int64_t const head : kMixerHeads)
        {
            for (int64_t const group : {int64_t{1}, kGroup})
            {
                p.width = width;
                p.headWidth = head;
                p.heads = width / head;
                p.kvHeads = p.heads / group;
                for (int64_t const rows : {kRows[0], kRows[1], kRows[2], kRows[2] + 1, kManyProduct + 1})
                {
                    p.batch = rows;
                    p.tokens = 1;
                    all.push_back(p);
                    std::swap(p.batch, p.tokens);
                    p.tokens = std::max<int64_t>(p.tokens, 2);
                    all.push_back(p);
                }
            }
        }
    }
    p.width = 256; // wide tiles of the solve
    p.headWidth = 64;
    p.heads = p.kvHeads = 4;
    p.tokens = kWideWork / p.width;
    p.batch = kWideColumns / p.width;
    all.push_back(p);
    p.batch = 1; // and those in between, with scores whose programs share the tiles
    p.tokens = std::max({kFewWork / p.width, kPastRows, kPastWork});
    all.push_back(p);
    return all;
}

} // namespace

Family const kMixerFamily{planMixer, everyMixer};

} // namespace sessa
