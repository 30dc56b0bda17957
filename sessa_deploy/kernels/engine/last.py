"""What stands behind the last layer where the logits of one token a sequence are wanted: that row, its norm, the product with the head.

Which row it is stands in new_length, on the device. Picked by an engine's own operators it takes five kernels, and one more to give the logits their shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.engine import layer
from sessa_deploy.kernels.engine.pointwise import norm_row
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, launcher, pinned


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_last"))
def layer_norm_last(x, new_length, weight, bias, out, tokens, width, eps, BD: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (B,), BD >= D: LayerNorm of row new_length[b] - 1 of T of each sequence, x (B,T,D), to out (B,D); the first where new_length[b] is 0.

    new_length, which no kernel of a step writes, is read before the wait; whatever it holds, only rows of its sequence are read.
    """
    i_b = tl.program_id(0).to(tl.int64)
    last = tl.minimum(tl.maximum(tl.load(new_length + i_b), 1), tokens) - 1
    norm_row(x + (i_b * tokens + last) * width, weight, bias, out + i_b * width, width, eps, BD, PDL)


def norm_last(x: Tensor, new_length: Tensor, weight: Tensor, bias: Tensor, eps: float, early: int = 0) -> Tensor:
    """LayerNorm (B,D) of row new_length[b] - 1 of x (B,T,D), of the first where that is -1; new_length (B,) int32."""
    batch, tokens, width = x.shape
    out = torch.empty(batch, width, dtype=x.dtype, device=x.device)
    variant = table.width_variant("layer_norm_last", width)
    tiles = pinned(("layer_norm_last",), x.device, x.dtype, variant, early)["layer_norm_last"]
    run = launcher(layer_norm_last, x.device, x.dtype, tiles)
    run((batch,), *map(address, (x, new_length, weight, bias, out)), tokens, width, eps)
    return out


def last_logits(
    x: Tensor, new_length: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, early: int = 0, scale: Tensor | None = None
) -> Tensor:
    """Logits (B,N) float32 of `norm_last` and a head (N,D). A weight of int8 or float8_e4m3fn has a `scale` (N,) float32."""
    return layer.linear(norm_last(x, new_length, norm_weight, norm_bias, eps, early), weight, None, early, scale)
