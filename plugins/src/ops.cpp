// The operations as ops.inc describes them, and what of that needs no plan: sizes by letter, attributes, limits.
#include "plan.h"

#include <cctype>
#include <cmath>
#include <cstring>

namespace sessa
{

#define SESSA_OP(identifier, ...) Op const k##identifier{__VA_ARGS__, &k##identifier##Family};
#include "ops.inc"
#undef SESSA_OP

Op const& opAt(int32_t index) noexcept
{
    static Op const* const all[kOpCount]{
#define SESSA_OP(identifier, ...) &k##identifier,
#include "ops.inc"
#undef SESSA_OP
    };
    return *all[index];
}

#define SESSA_QUANTISED(identifier, ...) Op const k##identifier##Quantised{__VA_ARGS__, &k##identifier##Family};
#include "ops.inc"
#undef SESSA_QUANTISED

Op const* quantised(Op const& op) noexcept
{
    static Op const* const all[]{
#define SESSA_QUANTISED(identifier, ...) &k##identifier##Quantised,
#include "ops.inc"
#undef SESSA_QUANTISED
    };
    auto const* const found = std::find_if(std::begin(all), std::end(all), [&](Op const* one) { return std::strcmp(one->name, op.name) == 0; });
    return found == std::end(all) ? nullptr : *found;
}

int64_t const* Problem::size(char letter) const noexcept
{
    switch (letter)
    {
#define SESSA_SIZE(letter, field, start)                                                                                                             \
    case letter: return &field;
#include "ops.inc"
#undef SESSA_SIZE
    default: return nullptr;
    }
}

int64_t* Problem::size(char letter) noexcept
{
    return const_cast<int64_t*>(static_cast<Problem const*>(this)->size(letter));
}

char capital(char letter) noexcept
{
    return static_cast<char>(std::toupper(static_cast<unsigned char>(letter))); // defined for those and for no negative char
}

int64_t Problem::dimension(char letter) const noexcept
{
    auto const whole = capital(letter);
    return *size(whole) / (letter == whole ? 1 : 2);
}

void Problem::setDimension(char letter, int64_t value) noexcept
{
    auto const whole = capital(letter);
    *size(whole) = value * (letter == whole ? 1 : 2);
}

namespace
{

// A sum of products of sizes and numbers, e.g. "3D+2KC" (ops.evaluate).
int64_t evaluate(char const* formula, Problem const& p)
{
    int64_t sum = 0;
    int64_t product = 1;
    for (char const* at = formula; *at != 0;)
    {
        if (*at == '+')
        {
            sum += product;
            product = 1;
            ++at;
        }
        else if (*at >= '0' && *at <= '9')
        {
            char* end = nullptr;
            product *= std::strtoll(at, &end, 10);
            at = end;
        }
        else
        {
            product *= *p.size(*at++);
        }
    }
    return sum + product;
}

bool keeps(Limit const& limit, Problem const& p, std::string& error)
{
    int64_t const got = evaluate(limit.of, p);
    if (*limit.equals != 0)
    {
        int64_t const wanted = evaluate(limit.equals, p);
        bool const number = std::strspn(limit.equals, "0123456789") == std::strlen(limit.equals);
        return got == wanted || refuse(error, limit.what, std::to_string(got), limit.allowed + (number ? "" : " = " + std::to_string(wanted)));
    }
    int64_t const multiple = evaluate(limit.multiple, p);
    bool const good = limit.least <= got && got <= limit.most && multiple >= 1 && got % multiple == 0;
    return good || refuse(error, limit.what, std::to_string(got), limit.allowed);
}

} // namespace

bool Attribute::takes(float value) const noexcept
{
    return value == Numbers{}.*field || (above < value && value <= most);
}

bool check(Op const& op, Numbers const& numbers, std::string& error) noexcept
try
{
    for (int32_t i = 0; i < op.attributes; ++i)
    {
        Attribute const& one = op.attribute[i];
        if (!one.takes(numbers.*one.field))
        {
            char got[32];
            std::snprintf(got, sizeof(got), "%g", static_cast<double>(numbers.*one.field));
            return refuse(error, std::string("attribute ") + one.name, got, one.allowed);
        }
    }
    return true;
}
catch (...)
{
    return false;
}

bool check(Problem const& p, std::string& error) noexcept
try
{
    if (p.storage != Storage::kFloat && p.storage != Storage::kHalf && p.storage != Storage::kBFloat16)
    {
        return refuse(error, "storage type", std::to_string(static_cast<int32_t>(p.storage)), "1 (float32), 10 (float16), 16 (bfloat16)");
    }
    for (int32_t i = 0; i < p.op->limits; ++i)
    {
        if (!keeps(p.op->limit[i], p, error))
        {
            return false;
        }
    }
    return check(*p.op, p.numbers, error);
}
catch (...)
{
    return false;
}

} // namespace sessa
