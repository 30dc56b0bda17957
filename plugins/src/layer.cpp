// A layer around its attentions: norm, matrix products with what surrounds them, GELU and gain. For engines that would do this work in float32.
#include "plan.h"

namespace sessa
{
namespace
{

constexpr int64_t kMultiple = 16;
constexpr int64_t kMaxWidth = 4096;
constexpr int64_t kHeadMultiple = 8;
constexpr int64_t kMaxDepth = 65536;
constexpr int64_t kWidths[] = {1024, 2048, 4096}; // launch_layer.WIDTHS
constexpr int64_t kSingle = 32;                   // layer.SINGLE
constexpr float kEps = 1e-5F;
constexpr float kGammaMax = 0.999F;

float epsOf(Problem const& p)
{
    return p.scale != 0.0F ? p.scale : kEps;
}

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

// A matrix product over all rows of the batch.
struct Product : Single
{
    using Single::Single;

    bool find(Problem const& p, int32_t arch) override
    {
        kernel = findCubin(name, arch, dtypeName(p.storage), productVariant(rowsOf(p)).c_str());
        return kernel != nullptr;
    }

    int64_t columnTiles(int64_t columns) const
    {
        return ceilDiv(columns, kernel->tile("BN"));
    }

    // others: programs beside those of the tiles.
    bool launchTiles(Problem const& p, int64_t tiles, Arguments& a, CUstream_st* stream, std::string& error, int64_t others = 0) const
    {
        return launch(*kernel, {ceilDiv(rowsOf(p), kernel->tile("BM")) * tiles + others, 1, 1}, a, stream, error, rowsOf(p));
    }
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
        a.add(t.in[0]).add(t.in[1]).add(t.in[2]).add(t.outs[0]).add(i32(p.width)).add(epsOf(p));
        return launch(*kernel, {rowsOf(p), 1, 1}, a, stream, error, rowsOf(p));
    }
};

struct Linear final : Product
{
    Linear()
        : Product("layer_linear")
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        a.add(t.in[0]).add(t.in[1]).add(t.in[2]).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width)).add(i32(p.columns));
        return launchTiles(p, columnTiles(p.columns), a, stream, error);
    }
};

struct Logits final : Product
{
    Logits()
        : Product("layer_logits")
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a;
        a.add(t.in[0]).add(t.in[1]).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width)).add(i32(p.columns));
        return launchTiles(p, columnTiles(p.columns), a, stream, error);
    }
};

struct Tail final : Product
{
    Tail()
        : Product("layer_tail")
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        Arguments a; // s, h, weight, bias, x
        a.add(t.in[1]).add(t.in[2]).add(t.in[3]).add(t.in[4]).add(t.in[0]).add(t.outs[0]).add(i32(rowsOf(p))).add(i32(p.width));
        return launchTiles(p, columnTiles(p.width), a, stream, error);
    }
};

// One row goes through a kernel of its own, which norms it too.
struct Enter final : Plan
{
    bool find(Problem const& p, int32_t arch) override
    {
        char const* dtype = dtypeName(p.storage);
        auto const width = i32(p.width);
        bool const one = rowsOf(p) == 1;
        norm = findCubinForWidth(one ? "layer_norm_enter" : "layer_norm", arch, dtype, width);
        product = one ? norm : findCubin("layer_enter", arch, dtype, productVariant(rowsOf(p)).c_str());
        return norm != nullptr && product != nullptr;
    }

    void layout(Problem const& p, Arena& arena, bool) override
    {
        normal = arena.take(storageBytes(p) * rowsOf(p) * p.width);
    }

    std::vector<Cubin const*> cubins() const override
    {
        return {norm, product};
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        auto const width = i32(p.width);
        int64_t const rows = rowsOf(p);
        int64_t const tiles = ceilDiv(p.doubleWidth, product->tile("BN"));
        Arguments first; // x and the norm's weights, and for one row all there is
        first.add(t.in[0]).add(t.in[1]).add(t.in[2]);
        if (product == norm)
        {
            first.add(t.in[3]).add(t.in[4]).add(t.outs[0]).add(width).add(epsOf(p));
            return launch(*norm, {tiles, 1, 1}, first, stream, error, rows);
        }
        first.add(normal).add(width).add(epsOf(p));
        Arguments second;
        second.add(normal).add(t.in[3]).add(t.in[4]).add(t.outs[0]).add(i32(rows)).add(width);
        return launch(*norm, {rows, 1, 1}, first, stream, error, rows)
            && launch(*product, {ceilDiv(rows, product->tile("BM")) * tiles, 1, 1}, second, stream, error, rows);
    }

    Cubin const* norm{};
    Cubin const* product{};
    char* normal{};
};

struct ProjectGain final : Product
{
    ProjectGain()
        : Product("layer_project_gain")
    {
    }

    bool run(Problem const& p, Tensors const& t, CUstream_st* stream, std::string& error) const override
    {
        int64_t const kvWidth = p.kvHeads * p.headWidth;
        Arguments a;
        for (int32_t i = 0; i < 10; ++i)
        {
            a.add(t.in[i]);
        }
        for (int32_t i = 0; i < 6; ++i)
        {
            a.add(t.outs[i]);
        }
        a.add(i32(rowsOf(p))).add(i32(p.width)).add(i32(kvWidth)).add(i32(p.headWidth / kHeadMultiple)).add(p.scale != 0.0F ? p.scale : kGammaMax);
        int64_t const tile = kernel->tile("BM");
        int64_t const gains = tile <= kSingle ? rowsOf(p) : ceilDiv(rowsOf(p), tile);
        return launchTiles(p, 3 * columnTiles(p.width) + 2 * columnTiles(kvWidth), a, stream, error, gains);
    }
};

bool checkDepth(Problem const& p, int64_t most, std::string& error)
{
    bool const good = p.width >= kMultiple && p.width <= most && p.width % kMultiple == 0;
    return good || refuse(error, "width D", std::to_string(p.width), "a multiple of 16 up to " + std::to_string(most));
}

bool checkRow(Problem const& p, std::string& error)
{
    return checkDepth(p, kMaxWidth, error);
}

bool checkProduct(Problem const& p, std::string& error)
{
    return checkDepth(p, kMaxDepth, error);
}

bool checkDouble(Problem const& p, std::string& error)
{
    return p.doubleWidth == 2 * p.width || refuse(error, "width of h", std::to_string(p.doubleWidth), "2 D = " + std::to_string(2 * p.width));
}

bool checkRotary(Problem const& p, std::string& error)
{
    constexpr int64_t most = 128; // launch_table_layer.json
    return (p.limbs == 4 || refuse(error, "rows of limbs", std::to_string(p.limbs), "4"))
        && ((p.pairs >= 1 && p.pairs <= most) || refuse(error, "pairs d / 2", std::to_string(p.pairs), "1 to 128"));
}

bool checkTail(Problem const& p, std::string& error)
{
    return checkProduct(p, error) && checkDouble(p, error);
}

bool checkHeads(Problem const& p, std::string& error)
{
    return checkProduct(p, error)
        && (p.heads * p.headWidth == p.width || refuse(error, "heads x head width", std::to_string(p.heads * p.headWidth), "D = " + std::to_string(p.width)));
}

bool checkProject(Problem const& p, std::string& error)
{
    int64_t const kvWidth = p.kvHeads * p.headWidth;
    return checkHeads(p, error) && checkDouble(p, error)
        && (p.headWidth % kHeadMultiple == 0 || refuse(error, "head width d", std::to_string(p.headWidth), "a multiple of 8"))
        && (p.headWidth == 2 * p.pairs || refuse(error, "pairs of cos and sin", std::to_string(p.pairs), "half a head's width " + std::to_string(p.headWidth)))
        && (p.columns == 3 * p.width + 2 * kvWidth
            || refuse(error, "rows of weight", std::to_string(p.columns), "3 D + 2 Hkv d = " + std::to_string(3 * p.width + 2 * kvWidth)));
}

bool checkEnter(Problem const& p, std::string& error)
{
    return checkRow(p, error) && checkDouble(p, error);
}

bool checkProjectGain(Problem const& p, std::string& error)
{
    return checkProject(p, error) && (p.one == 1 || refuse(error, "elements of gain_bias", std::to_string(p.one), "1"));
}

template <typename P>
Plan* make(Problem const&)
{
    return new P;
}

std::vector<Problem> onlyRotary(Storage storage)
{
    Problem p;
    p.op = &kRotary;
    p.storage = storage;
    return {p};
}

// Every width of a kernel that holds rows.
template <Op const& op>
std::vector<Problem> everyWidth(Storage storage)
{
    std::vector<Problem> all;
    for (int64_t const width : kWidths)
    {
        Problem p;
        p.op = &op;
        p.width = width;
        p.doubleWidth = 2 * width;
        p.storage = storage;
        all.push_back(p);
    }
    return all;
}

// Every number of rows that selects a product's tiles.
template <Op const& op>
std::vector<Problem> everyRows(Storage storage)
{
    std::vector<Problem> all;
    for (int64_t const tokens : {kRows[0], kRows[1], kRows[2], kRows[2] + 1})
    {
        Problem p;
        p.op = &op;
        p.tokens = tokens;
        p.width = p.headWidth = 16;
        p.doubleWidth = 32;
        p.pairs = 8;
        p.columns = 80;
        p.storage = storage;
        all.push_back(p);
    }
    return all;
}

std::vector<Problem> everyEnter(Storage storage)
{
    std::vector<Problem> all = everyRows<kEnter>(storage);
    for (int64_t const tokens : {1, 2})
    {
        for (Problem p : everyWidth<kEnter>(storage))
        {
            p.tokens = tokens;
            all.push_back(p);
        }
    }
    return all;
}

} // namespace

// Of x only the shape is taken.
Op const kRotary{"SessaRotary", 3, {{"x", "BTD", Kind::kStorage}, {"past_length", "B", Kind::kInt}, {"limbs", "RJ", Kind::kFloat}}, checkRotary,
    make<Rotary>, onlyRotary, 2, {{"cos", "BTJ", Kind::kFloat}, {"sin", "BTJ", Kind::kFloat}}};

Op const kNorm{"SessaNorm", 3, {{"x", "BTD", Kind::kStorage}, {"weight", "D", Kind::kStorage}, {"bias", "D", Kind::kStorage}}, checkRow, make<Norm>,
    everyWidth<kNorm>, 1, {{"y", "BTD", Kind::kStorage}}};

Op const kLinearHeads{"SessaLinearHeads", 3, {{"x", "BTHC", Kind::kStorage}, {"weight", "ND", Kind::kStorage}, {"bias", "N", Kind::kStorage}}, checkHeads,
    make<Linear>, everyRows<kLinearHeads>, 1, {{"y", "BTN", Kind::kStorage}}};

Op const kLogits{"SessaLogits", 2, {{"x", "BTD", Kind::kStorage}, {"weight", "ND", Kind::kStorage}}, checkProduct, make<Logits>, everyRows<kLogits>, 1,
    {{"logits", "BTN", Kind::kFloat}}};

Op const kTail{"SessaTail", 5,
    {{"x", "BTD", Kind::kStorage}, {"s", "BTD", Kind::kStorage}, {"h", "BTE", Kind::kStorage}, {"weight", "DD", Kind::kStorage},
        {"bias", "D", Kind::kStorage}},
    checkTail, make<Tail>, everyRows<kTail>, 1, {{"y", "BTD", Kind::kStorage}}};

Op const kEnter{"SessaNormEnter", 5,
    {{"x", "BTD", Kind::kStorage}, {"norm_weight", "D", Kind::kStorage}, {"norm_bias", "D", Kind::kStorage}, {"weight", "ED", Kind::kStorage},
        {"bias", "E", Kind::kStorage}},
    checkEnter, make<Enter>, everyEnter, 1, {{"h", "BTE", Kind::kStorage}}};

Op const kProjectGain{"SessaProjectGain", 10,
    {{"h", "BTE", Kind::kStorage}, {"weight", "ND", Kind::kStorage}, {"bias_q", "HC", Kind::kStorage}, {"bias_k", "KC", Kind::kStorage},
        {"bias_v", "KC", Kind::kStorage}, {"bias_fb", "E", Kind::kStorage}, {"cos", "BTJ", Kind::kFloat}, {"sin", "BTJ", Kind::kFloat},
        {"gain", "D", Kind::kFloat}, {"gain_bias", "I", Kind::kFloat}},
    checkProjectGain, make<ProjectGain>, everyRows<kProjectGain>, 6,
    {{"q", "BTHC", Kind::kStorage}, {"k", "BTKC", Kind::kStorage}, {"v", "BTKC", Kind::kStorage}, {"q_b", "BTD", Kind::kStorage},
        {"k_b", "BTD", Kind::kStorage}, {"gamma", "BT", Kind::kFloat}}};

} // namespace sessa
