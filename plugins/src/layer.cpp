// A layer around its attentions: norm, matrix products with what surrounds them, GELU and gain. For engines that would do this work in float32.
#include "plan.h"

namespace sessa
{
namespace
{

// One kernel, no workspace.
struct Single : Plan
{
    explicit Single(char const* kernelName)
        : name(kernelName)
    {
    }

    void layout(Problem const&, Arena&, bool) override {}

    std::vector<Cubin const*> cubins() const override
    {
        return {kernel};
    }

    char const* name;
    Cubin const* kernel{};
};

// A kernel whose program holds one row.
struct Row : Single
{
    using Single::Single;

    bool find(Problem const& p, int32_t arch) override
    {
        kernel = findCubinForWidth(name, arch, dtypeName(p.storage), i32(p.width));
        return kernel != nullptr;
    }
};

// A matrix product over all rows of the batch; its matrix is operand `weight`.
struct Product : Plan
{
    Product(char const* kernelName, int32_t weightOperand, bool alwaysWidens = true)
        : name(kernelName)
        , weight(weightOperand)
        , widens(alwaysWidens)
    {
    }

    bool find(Problem const& p, int32_t arch) override
    {
        return matrix.find(name, arch, p, rowsOf(p), columns(p), widens);
    }

    std::vector<Cubin const*> cubins() const override
    {
        return matrix.cubins();
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        matrix.layout(p, arena, columns(p));
    }

    // Of the matrix.
    virtual int64_t columns(Problem const& p) const
    {
        return p.width;
    }

    Arguments& addMatrix(Arguments& a, Problem const& p, Tensors const& t) const
    {
        return matrix.add(a, p, t, weight);
    }

    int64_t columnTiles(int64_t across) const
    {
        return ceilDiv(across, matrix.kernel().tile("BN"));
    }

    // others: programs beside those of the tiles.
    bool launchTiles(
        Problem const& p, Tensors const& t, int64_t tiles, Arguments& a, CUstream_st* stream, std::string& error, int64_t others = 0) const
    {
        return matrix.run(t, weight, ceilDiv(rowsOf(p), matrix.kernel().tile("BM")) * tiles + others, a, stream, error, rowsOf(p));
    }

    char const* name;
    int32_t weight;
    bool widens;
    Matrix matrix;
};

struct Rotary final : Single
{
    Rotary()
        : Single("layer_rotary")
    {
    }

    bool find(Problem const&, int32_t arch) override
    {
        kernel = findCubin(name, arch, "fp32", "any");
        return kernel != nullptr;
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        a.add(t.in[1]).add(t.in[2]).add(t.outs[0]).add(t.outs[1]).add(i32(p.tokens)).add(i32(p.pairs));
        return launch(*kernel, {p.tokens, p.batch, 1}, a, stream, error, rowsOf(p));
    }
};

struct Norm final : Row
{
    Norm()
        : Row("layer_norm")
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        a.add(t.in[0]).add(t.in[1]).add(t.in[2]).add(t.outs[0]).add(i32(p.width)).add(p.numbers.epsilon);
        return launch(*kernel, {rowsOf(p), 1, 1}, a, stream, error, rowsOf(p));
    }
};

struct Linear final : Product
{
    Linear()
        : Product("layer_linear", 1)
    {
    }

    int64_t columns(Problem const& p) const override
    {
        return p.columns;
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        addMatrix(a.add(t.in[0]), p, t).add(t.in[2]).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width)).add(i32(p.columns));
        return launchTiles(p, t, columnTiles(p.columns), a, stream, error);
    }
};

// Widened, the vocabulary's matrix would be the largest buffer of all, and many rows of logits are rare.
struct Logits final : Product
{
    Logits()
        : Product("layer_logits", 1, false)
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        addMatrix(a.add(t.in[0]), p, t).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width)).add(i32(p.columns));
        return launchTiles(p, t, columnTiles(p.columns), a, stream, error);
    }
};

// Of many rows the gate goes ahead of the product: kernels/engine/layer_many.py.
struct Tail final : Product
{
    Tail()
        : Product("layer_tail", 3)
    {
    }

    bool find(Problem const& p, int32_t arch) override
    {
        bool const found = Product::find(p, arch);
        gate = matrix.shared() ? findCubin("layer_gate", arch, dtypeName(p.storage), "any") : nullptr;
        return found && (gate != nullptr || !matrix.shared());
    }

    std::vector<Cubin const*> cubins() const override
    {
        std::vector<Cubin const*> all = Product::cubins();
        all.insert(all.end(), gate == nullptr ? 0 : 1, gate);
        return all;
    }

    void layout(Problem const& p, Arena& arena, bool bound) override
    {
        gated = gate == nullptr ? nullptr : arena.take(storageBytes(p) * rowsOf(p) * p.width);
        Product::layout(p, arena, bound);
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a; // s, h, weight, bias, x
        if (gate == nullptr)
        {
            a.add(t.in[1]).add(t.in[2]);
        }
        else
        {
            Arguments first;
            first.add(t.in[1]).add(t.in[2]).add(gated).add(i32(rowsOf(p))).add(i32(p.width));
            if (!launch(*gate, {ceilDiv(rowsOf(p), gate->tile("BT")), ceilDiv(p.width, gate->tile("BD")), 1}, first, stream, error))
            {
                return false;
            }
            a.add(gated);
        }
        addMatrix(a, p, t).add(t.in[4]).add(t.in[0]).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width));
        return launchTiles(p, t, columnTiles(p.width), a, stream, error);
    }

    Cubin const* gate{};
    char* gated{};
};

// One row goes through a kernel of its own, which norms it too; so do a few where there is one for them.
struct Enter final : Plan
{
    static constexpr int32_t kWeight = 3;

    bool find(Problem const& p, int32_t arch) override
    {
        auto const width = i32(p.width);
        one = rowsOf(p) == 1;
        both = one ? findCubinForWidth("layer_norm_enter", arch, productType(p).c_str(), width)
            : rowsOf(p) <= kRows[1] ? chosenCubin("layer_norm_enter_rows", arch, p, "any", rowsOf(p))
                                    : nullptr;
        norm = one || both != nullptr ? nullptr : findCubinForWidth("layer_norm", arch, dtypeName(p.storage), width);
        return both != nullptr || (norm != nullptr && matrix.find("layer_enter", arch, p, rowsOf(p), p.doubleWidth));
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        if (both != nullptr)
        {
            return;
        }
        normal = arena.take(storageBytes(p) * rowsOf(p) * p.width);
        matrix.layout(p, arena, p.doubleWidth);
    }

    std::vector<Cubin const*> cubins() const override
    {
        if (both != nullptr)
        {
            return {both};
        }
        std::vector<Cubin const*> all{norm};
        auto const its = matrix.cubins();
        all.insert(all.end(), its.begin(), its.end());
        return all;
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        auto const width = i32(p.width);
        int64_t const rows = rowsOf(p);
        Arguments first; // x and the norm's weights, and all there is where one kernel does both
        first.add(t.in[0]).add(t.in[1]).add(t.in[2]);
        if (both != nullptr)
        {
            if (one)
            {
                matrix.add(first, p, t, kWeight).add(t.in[4]).add(t.outs[0]);
            }
            else
            {
                first.add(t.in[kWeight]).add(t.in[4]).add(t.outs[0]).add(i32(rows));
            }
            first.add(width).add(p.numbers.epsilon);
            return launch(*both, {ceilDiv(p.doubleWidth, both->tile("BN")), 1, 1}, first, stream, error, rows);
        }
        first.add(normal).add(width).add(p.numbers.epsilon);
        Arguments second;
        matrix.add(second.add(normal), p, t, kWeight).add(t.in[4]).add(t.outs[0]).add(i32(rows)).add(width);
        int64_t const tiles = ceilDiv(rows, matrix.kernel().tile("BM")) * ceilDiv(p.doubleWidth, matrix.kernel().tile("BN"));
        return launch(*norm, {rows, 1, 1}, first, stream, error, rows) && matrix.run(t, kWeight, tiles, second, stream, error, rows);
    }

    bool one{};
    Cubin const* both{}; // norm and entrance in one
    Cubin const* norm{};
    Matrix matrix;
    char* normal{};
};

struct ProjectGain final : Product
{
    ProjectGain()
        : Product("layer_project_gain", 1)
    {
    }

    int64_t columns(Problem const& p) const override
    {
        return 3 * p.width + 2 * p.kvHeads * p.headWidth;
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        int64_t const kvWidth = p.kvHeads * p.headWidth;
        Arguments a;
        addMatrix(a.add(t.in[0]), p, t);
        for (int32_t i = 2; i < 10; ++i)
        {
            a.add(t.in[i]);
        }
        for (int32_t i = 0; i < 6; ++i)
        {
            a.add(t.outs[i]);
        }
        a.add(i32(rowsOf(p))).add(i32(p.width)).add(i32(kvWidth)).add(i32(p.headWidth / kHeadMultiple)).add(p.numbers.gammaMax);
        int64_t const tile = matrix.kernel().tile("BM");
        int64_t const gains = matrix.shared() ? 0 : tile <= kSingle ? rowsOf(p) : ceilDiv(rowsOf(p), tile);
        return launchTiles(p, t, 3 * columnTiles(p.width) + 2 * columnTiles(kvWidth), a, stream, error, gains);
    }
};

template <typename P>
Plan* make(Problem const&)
{
    return new P;
}

std::vector<Problem> onlyRotary(Storage storage)
{
    return {smallest(kRotary, storage)};
}

// Every width of a kernel that holds rows.
template <Op const& op>
std::vector<Problem> everyWidth(Storage storage)
{
    std::vector<Problem> all;
    for (int64_t const width : kLayerWidths)
    {
        Problem p = smallest(op, storage);
        p.width = width;
        p.doubleWidth = 2 * width;
        all.push_back(p);
    }
    return all;
}

// Every number of rows that selects a product's tiles, and depths on either side of what selects others (engine/spec.py, few_variant and ahead_variant).
template <Op const& op>
std::vector<Problem> everyRows(Storage storage)
{
    std::vector<Problem> all;
    for (int64_t const tokens : {kRows[0], kFewRows, kRows[1], kRows[2], kRows[2] + 1, kManyProduct + 1, kManyWork / 16})
    {
        for (int64_t const width : {int64_t{16}, kWholeDepths[0] + 16, kWholeDepths[1] + 16}) // the first depth is that of kAheadDepths
        {
            Problem p = smallest(op, storage);
            p.tokens = tokens;
            p.width = width;
            p.doubleWidth = 2 * width;
            p.headWidth = 16;
            p.pairs = 8;
            p.heads = width / p.headWidth;
            p.columns = 3 * width + 2 * p.kvHeads * p.headWidth;
            all.push_back(p);
        }
    }
    return all;
}

std::vector<Problem> everyEnter(Storage storage)
{
    std::vector<Problem> all = everyRows<kNormEnter>(storage);
    for (int64_t const tokens : {1, 2})
    {
        for (Problem p : everyWidth<kNormEnter>(storage))
        {
            p.tokens = tokens;
            all.push_back(p);
        }
    }
    return all;
}

} // namespace

// Of SessaRotary's x only the shape is taken.
Family const kRotaryFamily{make<Rotary>, onlyRotary};
Family const kNormFamily{make<Norm>, everyWidth<kNorm>};
Family const kLinearHeadsFamily{make<Linear>, everyRows<kLinearHeads>};
Family const kLogitsFamily{make<Logits>, everyRows<kLogits>};
Family const kTailFamily{make<Tail>, everyRows<kTail>};
Family const kNormEnterFamily{make<Enter>, everyEnter};
Family const kProjectGainFamily{make<ProjectGain>, everyRows<kProjectGain>};

} // namespace sessa
