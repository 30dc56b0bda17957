#include "beside.h"

#include "driver.h"

#include <cstdint>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

namespace sessa
{
namespace
{

// What is used of cuda.h.
using Result = int;
using Context = void*;
using Event = void*;
constexpr unsigned kNonBlocking = 1;      // CU_STREAM_NON_BLOCKING: the default stream waits for it by events alone
constexpr unsigned kNoTiming = 2;         // CU_EVENT_DISABLE_TIMING
constexpr int kRelaxed = 2;               // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr uintptr_t kStreamPerThread = 2; // CU_STREAM_PER_THREAD: one handle, a stream of each thread's

struct Streams
{
    Result (*current)(Context*){};
    Result (*create)(CUstream_st**, unsigned, int){};
    Result (*createEvent)(Event*, unsigned){};
    Result (*record)(Event, CUstream_st*){};
    Result (*wait)(CUstream_st*, Event, unsigned){};
    Result (*exchangeMode)(int*){}; // may be null
    bool good{};
};

template <typename F>
bool bind(char const* name, F& target)
{
    target = reinterpret_cast<F>(driverFunction(name));
    return target != nullptr;
}

Streams const& streams()
{
    static Streams const instance = [] {
        Streams s;
        s.good = bind("cuCtxGetCurrent", s.current) && bind("cuStreamCreateWithPriority", s.create) && bind("cuEventCreate", s.createEvent)
            && bind("cuEventRecord", s.record) && bind("cuStreamWaitEvent", s.wait);
        static_cast<void>(bind("cuThreadExchangeStreamCaptureMode", s.exchangeMode));
        return s;
    }();
    return instance;
}

// The stream beside another, and the events that lead there and back.
struct Side
{
    CUstream_st* stream{};
    Event begun{};
    Event ended{};
};

// By (context, stream, the thread whose stream that is). They stay until the context goes.
struct Sides
{
    std::mutex mutex;
    std::map<std::tuple<Context, CUstream_st*, std::thread::id>, Side> of;
};

Sides& sides()
{
    static Sides* const instance = new Sides; // never destroyed: the driver may be gone by then
    return *instance;
}

Side make()
{
    int mode = kRelaxed; // a capture that goes on elsewhere forbids nothing here
    bool const exchanged = streams().exchangeMode != nullptr && streams().exchangeMode(&mode) == 0;
    Side side;
    bool const good = streams().createEvent(&side.begun, kNoTiming) == 0 && streams().createEvent(&side.ended, kNoTiming) == 0
        && streams().create(&side.stream, kNonBlocking, 0) == 0;
    if (exchanged)
    {
        static_cast<void>(streams().exchangeMode(&mode));
    }
    return good ? side : Side{};
}

// Without a stream where the driver gives none.
Side sideOf(CUstream_st* stream)
{
    Context context{};
    if (!streams().good || streams().current(&context) != 0 || context == nullptr)
    {
        return {};
    }
    auto const owner = reinterpret_cast<uintptr_t>(stream) == kStreamPerThread ? std::this_thread::get_id() : std::thread::id();
    std::lock_guard<std::mutex> const lock(sides().mutex);
    Side& side = sides().of[{context, stream, owner}];
    if (side.stream == nullptr)
    {
        side = make();
    }
    return side;
}

} // namespace

CUstream_st* fork(CUstream_st* stream) noexcept
try
{
    Side const side = sideOf(stream);
    bool const forked = side.stream != nullptr && streams().record(side.begun, stream) == 0 && streams().wait(side.stream, side.begun, 0) == 0;
    return forked ? side.stream : stream;
}
catch (...)
{
    return stream;
}

bool join(CUstream_st* stream, CUstream_st* side, std::string& error) noexcept
try
{
    if (side == stream)
    {
        return true;
    }
    Event const ended = sideOf(stream).ended;
    bool const joined = ended != nullptr && streams().record(ended, side) == 0 && streams().wait(stream, ended, 0) == 0;
    error = joined ? error : "a stream cannot wait for the one beside it";
    return joined;
}
catch (...)
{
    return false;
}

} // namespace sessa
