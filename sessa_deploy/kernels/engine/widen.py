"""Weights of 8 bits as the 16 or 32 bits that hold each of their values exactly."""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.launch.jit import interpreted

# Of four int8 q in a word at a time: u = q + 128 is put below the exponent of a power of two whose last place is 1, and the sum with 128 taken off again.
# Exact, and several times as fast as the conversion from an integer, of which a multiprocessor makes a quarter as many as sums.
_FLOAT32 = tl.constexpr("""{
.reg .b32 u, a, b, c, d;
xor.b32 u, $4, 0x80808080;
prmt.b32 a, u, 0x4B000000, 0x7440;
prmt.b32 b, u, 0x4B000000, 0x7441;
prmt.b32 c, u, 0x4B000000, 0x7442;
prmt.b32 d, u, 0x4B000000, 0x7443;
sub.f32 $0, a, 0f4B000080;
sub.f32 $1, b, 0f4B000080;
sub.f32 $2, c, 0f4B000080;
sub.f32 $3, d, 0f4B000080;
}""")
_FLOAT16 = tl.constexpr("""{
.reg .b32 u, a, b, m;
xor.b32 u, $2, 0x80808080;
mov.b32 m, 0x64806480;
prmt.b32 a, u, 0x64646464, 0x4140;
prmt.b32 b, u, 0x64646464, 0x4342;
sub.f16x2 $0, a, m;
sub.f16x2 $1, b, m;
}""")
# 8 bits do not fit below bfloat16's exponent of 128: 128 + the low seven, less 128, or less 256 where the sign is set.
_BFLOAT16 = tl.constexpr("""{
.reg .b32 a, b, c, d, m;
mov.b32 m, 0xBF80BF80;
prmt.b32 a, $2, 0x43434343, 0x4140;
prmt.b32 b, $2, 0x43434343, 0x4342;
and.b32 c, a, 0x43804380;
and.b32 d, b, 0x43804380;
and.b32 a, a, 0x437F437F;
and.b32 b, b, 0x437F437F;
fma.rn.bf16x2 $0, c, m, a;
fma.rn.bf16x2 $1, d, m, b;
}""")
# Of four E4M3, whose exponent and fraction stand at the end of bfloat16's; that of 2^120 is what their biases differ by. NaN is no weight.
_BFLOAT16_E4M3 = tl.constexpr("""{
.reg .b32 a, b, c, d, m, z;
mov.b32 m, 0x7B807B80;
mov.b32 z, 0x80008000;
prmt.b32 a, $2, 0, 0x1404;
prmt.b32 b, $2, 0, 0x3424;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
and.b32 c, c, 0x07F007F0;
and.b32 d, d, 0x07F007F0;
lop3.b32 a, a, z, c, 0xEA;
lop3.b32 b, b, z, d, 0xEA;
fma.rn.bf16x2 $0, a, m, z;
fma.rn.bf16x2 $1, b, m, z;
}""")
BITS = tl.constexpr(not interpreted())  # by the PTX above; the interpreter, which knows none, converts


@triton.jit
def wide(b_w, kind: tl.constexpr):
    """b_w in float32, float16 or bfloat16, `kind`, which hold every value of 8 bits exactly."""
    if BITS & (b_w.dtype == tl.int8):
        if kind == tl.float32:
            b_w = tl.inline_asm_elementwise(_FLOAT32, "=f,=f,=f,=f,r", [b_w], tl.float32, True, 4)
        elif kind == tl.float16:
            b_w = tl.inline_asm_elementwise(_FLOAT16, "=r,=r,r", [b_w], tl.float16, True, 4)
        else:
            b_w = tl.inline_asm_elementwise(_BFLOAT16, "=r,=r,r", [b_w], tl.bfloat16, True, 4)
    elif BITS & (b_w.dtype.primitive_bitwidth == 8) & (kind == tl.bfloat16):
        b_w = tl.inline_asm_elementwise(_BFLOAT16_E4M3, "=r,=r,r", [b_w], tl.bfloat16, True, 4)
    else:
        b_w = b_w.to(kind)
    return b_w
