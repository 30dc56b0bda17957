"""Launch the kernels of feedback attention and of a mixer's step once or twice, small: the short run for compute-sanitizer (a support module, no tests).

    compute-sanitizer --tool memcheck  python tests/kernels/sanitize.py [fp16|bf16|fp32 ...]
    compute-sanitizer --tool racecheck python tests/kernels/sanitize.py bf16
    compute-sanitizer --tool initcheck python tests/kernels/sanitize.py bf16

Buffers come from the driver one by one (PyTorch's caching allocator off), so that a step past the end of one is seen. The sequences are longer
than three blocks, have a ragged past, and one pass goes panel by panel. Needs a CUDA GPU; exit code 1 if a result is not finite.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from sessa_deploy.kernels.engine import layer, mixer, mixer_rows
from sessa_deploy.kernels.feedback import backward, forward, step
from sessa_deploy.kernels.launch.limits import PANEL_BYTES

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def once(dtype: torch.dtype, tokens: int, past: int, width: int, panel_bytes: int) -> bool:
    """Forward and backward at (2,tokens,width) over `past` rows of which sequence 0 has none, and a decode step; whether all is finite."""
    make = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(dtype).cuda()

    q, k, f, ds = (normal(2, tokens, width) for _ in range(4))
    gamma = (torch.rand(2, tokens, generator=make) * 1.998 - 0.999).cuda()
    past_k, past_s = normal(2, past, width), normal(2, past, width)
    length = torch.tensor([0, past], dtype=torch.int32).cuda()
    s, lse, low = forward.forward(q, k, gamma, f, past_k, past_s, length, need_lse=True, panel_bytes=panel_bytes)
    assert lse is not None
    grads = backward.backward(ds, q, k, gamma, f, s, lse, low, past_k, past_s, length, panel_bytes=panel_bytes)
    one = step.step(q[:, :1], k[:, :1], gamma[:, :1], f[:, :1], past_k, past_s, length)
    return all(bool(torch.isfinite(x.cpu()).all()) for x in (s, one, *grads))


def mixed(dtype: torch.dtype, batch: int, capacity: int, heads: int, width: int) -> bool:
    """Steps of one and of five rows of the mixer over pasts of different lengths, and the layer's entrance; whether all is finite."""
    make = torch.Generator().manual_seed(capacity)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(dtype).cuda()

    d, square, row = width // heads, normal(width, width), normal(width)
    q, k, v = (normal(batch, heads, d) for _ in range(3))
    past_k, past_v = (normal(batch, capacity, heads, d) for _ in range(2))
    past_kb, past_s = (normal(batch, capacity, width) for _ in range(2))
    length = torch.arange(batch, dtype=torch.int32).mul(7).clamp(max=capacity).cuda()
    length[-1] = capacity
    s = mixer.step(q, k, v, past_k, past_v, square, row, normal(batch, width), torch.rand(batch, generator=make).cuda(), past_kb, past_s, length)
    new = [normal(batch, 5, *shape) for shape in ((heads, d), (heads, d), (heads, d), (width,), (width,))]
    gamma = torch.rand(batch, 5, generator=make).cuda()
    several = mixer_rows.step(*new[:3], past_k, past_v, square, row, *new[3:], gamma, past_kb, past_s, length)
    h = layer.norm_enter(s, row, row, 1e-5, normal(2 * width, width), normal(2 * width))
    return all(bool(torch.isfinite(x.cpu()).all()) for x in (s, several, h))


def main() -> int:
    good = True
    for name in sys.argv[1:] or list(DTYPES):
        for tokens, past, width, panel_bytes in ((450, 70, 80, PANEL_BYTES), (300, 0, 1024, 1 << 10)):
            good &= once(DTYPES[name], tokens, past, width, panel_bytes)
        for batch, capacity, heads, width in ((1, 70, 5, 80), (40, 33, 16, 1024)) if name != "fp32" else ():
            good &= mixed(DTYPES[name], batch, capacity, heads, width)
    torch.cuda.synchronize()
    print("done" if good else "a result is not finite")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
