"""The error rule, once: err <= 2 * err_plain + floor, as maximum and as RMS, both against float64 (a support module, no tests).

err_plain is the error of `reference.plain` or `reference.plain_causal`, the textbook computation from the same inputs; the floor is 8 eps of the largest
float64 value for float32 and 1 eps otherwise. A yardstick that is not finite, or off by more than its limit, excuses nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FLOOR = {dtype: (8 if dtype == torch.float32 else 1) * eps for dtype, eps in EPS.items()}  # of the largest reference value
UNFIT = 0.05  # RMS error of the yardstick, of the RMS of the reference


def check(
    got: Tensor, exact: Tensor, plain: Tensor, storage: torch.dtype | None = None, name: str = "", scale: float | None = None, lost: float = 0.0,
    unfit: float = UNFIT,
) -> None:
    """Assert the rule for `got` on any device. exact: float64; plain: what the textbook computation gave. All of one shape.

    storage: the type whose rounding sets the floor, got's by default. scale: what the floor is taken of, the largest |exact| by default. lost: a further
    absolute allowance. unfit: how far plain may be off itself.
    """
    assert got.shape == exact.shape == plain.shape and exact.dtype == torch.float64, f"{name}: {got.shape}, {exact.shape}, {plain.shape}, {exact.dtype}"
    if not got.numel():
        return
    assert torch.isfinite(exact).all(), f"{name}: the float64 reference is not finite"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    floor = FLOOR[got.dtype if storage is None else storage] * (float(exact.abs().max()) if scale is None else scale) + lost
    error, error_plain = got.double() - exact, plain.double() - exact
    off = float(error_plain.square().mean().sqrt())
    assert off <= unfit * float(exact.square().mean().sqrt()) + floor, f"{name}: the yardstick itself is off by {off:.3g}"
    for measure, of in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        err, err_plain = float(of(error)), float(of(error_plain))
        assert err <= 2 * err_plain + floor, f"{name} {measure}: {err:.3g} > 2 * {err_plain:.3g} + {floor:.3g}"
