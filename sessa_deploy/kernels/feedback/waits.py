"""Who takes which tile of a solve, and how a program waits for those before it."""

import triton
import triton.language as tl

ASKS = tl.constexpr(not triton.knobs.runtime.interpret)  # whether there are threads that can look for themselves: the interpreter knows no assembly


@triton.jit
def take_ticket(p_ticket, tiles_n, B):
    """(column tile, sequence, rank of the row block) of the next tile of a solve, in the order of the counter at p_ticket."""
    ticket = tl.atomic_add(p_ticket, 1, sem="relaxed", scope="gpu")
    return ticket % tiles_n, ((ticket // tiles_n) % B).to(tl.int64), ticket // (tiles_n * B)


@triton.jit
def wait_for(p_done, tiles):
    """Spin until the counter reaches `tiles`; returns what it reads."""
    ready = tl.atomic_add(p_done, 0, sem="acquire", scope="gpu")
    while ready < tiles:
        ready = tl.atomic_add(p_done, 0, sem="acquire", scope="gpu")
    return ready


@triton.jit
def wait_each(p_done, tiles):
    """Spin until the counter reaches `tiles`, every thread for itself, so that no barrier stands between it and what follows.

    Returns `tiles`: by what each of them reads, threads would part ways at a later barrier."""
    if ASKS:
        tl.inline_asm_elementwise(
            "{\n.reg .pred p;\nagain:\nld.global.gpu.acquire.b32 $0, [$1];\nsetp.lt.s32 p, $0, $2;\n@p bra again;\n}", "=&r,l,r",
            [p_done.to(tl.int64, bitcast=True), tiles], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        wait_for(p_done, tiles)
    return tiles


@triton.jit
def wait_one(p_done, tiles, at):
    """Spin until the counter reaches `tiles`, one thread for all, without a barrier each time it looks. Returns `at` (int64, a multiple of 16): what is to be
    read then is known before, and comes out of the wait so that nobody works it out behind it."""
    if ASKS:
        at = tl.inline_asm_elementwise(
            "{\n.reg .pred p, q;\n.reg .s32 t;\nmov.b64 $0, $3;\nmov.u32 t, %tid.x;\nsetp.ne.s32 q, t, 0;\n@q bra over;\nagain:\n"
            "ld.global.gpu.acquire.b32 t, [$1];\nsetp.lt.s32 p, t, $2;\n@p bra again;\nover:\n}", "=&l,l,r,l",
            [p_done.to(tl.int64, bitcast=True), tiles, at], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
    else:
        wait_for(p_done, tiles)
    return tl.multiple_of(at, 16)
