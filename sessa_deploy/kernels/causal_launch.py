"""Which kernel causal attention with a cache takes on a GPU: the decode step for one new row, tiles for more."""

from __future__ import annotations

from torch import Tensor

from sessa_deploy.kernels.feedback_launch import DTYPE_NAMES
from sessa_deploy.kernels.launch_causal import HEAD_WIDTHS, MULTIPLE

MAX_BATCH = MAX_HEADS = 65535  # grid limits


def takes(q: Tensor) -> bool:
    """Whether the kernels take q (B,T,Hq,d): at most 32 bits, d a multiple of 8 up to 256, batch and heads within the grid's limits."""
    batch, _, heads, width = q.shape
    return q.dtype in DTYPE_NAMES and width % MULTIPLE == 0 and 0 < width <= HEAD_WIDTHS[-1] and batch <= MAX_BATCH and heads <= MAX_HEADS


def forward(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """o (B,T,Hq,d) by the Triton kernels; shapes and meaning as in `ops.causal_attention`, for inputs that `takes` accepts."""
    if q.shape[1] == 1:
        from sessa_deploy.kernels import causal_step

        return causal_step.step(q, k, v, past_k, past_v, past_length)
    from sessa_deploy.kernels import causal_prefill

    return causal_prefill.prefill(q, k, v, past_k, past_v, past_length)
