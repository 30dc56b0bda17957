"""The rule of parity and its figures, in numpy: err <= 2 * err_plain + floor, both against float64, as RMS and as maximum.

err_plain is the error of the textbook computation at the same precision (kernels.reference.plain in the same model). The floor is
8 eps(float32) of the output for fp32 and 1 eps(storage) otherwise. A yardstick that is itself not finite or off by more than 5% makes the precision
unfit for the checkpoint: it never passes by comparison.

The yardstick of an output is the larger of its error in the case at hand and its error pooled over all cases: the two rows of a short case are too
small a sample of rounding to be one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sessa_deploy.contract import CACHE_FIELDS, PRECISIONS

FACTOR = 2.0
UNFIT = 0.05
NEAR_TIE = 10.0  # a top-2 gap below this many measured logit errors excuses another token
PASS, FAIL, UNFIT_VERDICT = "pass", "fail", "unfit"


def floor_eps(precision: str) -> float:
    """The floor relative to the size of an output."""
    return (8.0 if precision in ("fp32", "fp64") else 1.0) * PRECISIONS[precision].eps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One output of one rung on one case against float64.

    rms_error, plain_rms, limit_rms: RMS errors relative to the RMS of the output. max_error, plain_max, limit_max: largest absolute errors, and
    ref_max the largest value. plain_*: the yardstick, see the module. score: the larger share of the two limits that was used; above 1 fails.
    tolerance: the smallest tolerance relative to ref_max that would pass; factor: the smallest multiple of err_plain that would. kl, agreement:
    logits only (nats, share of equal greedy tokens). first_bad: (sequence, position) of the first row beyond limit_max; first_cosine: cosine
    between that row and what it should be.
    """

    rung: str
    mode: str
    case: str
    layer: int | None
    field: str
    verdict: str
    reason: str
    rows: int
    ref_max: float
    max_error: float
    plain_max: float
    limit_max: float
    rms_error: float
    plain_rms: float
    limit_rms: float
    score: float
    tolerance: float
    factor: float
    cosine: float
    kl: float | None = None
    agreement: float | None = None
    first_bad: tuple[int, int] | None = None
    first_cosine: float | None = None

    @property
    def output(self) -> str:
        """"layer 2 s" or "logits"."""
        return self.field if self.layer is None else f"layer {self.layer} {self.field}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts outputs in the order in which a forward pass computes them."""
        return (1 << 30, 0) if self.layer is None else (self.layer, CACHE_FIELDS.index(self.field))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers that are not finite as strings."""
        return {key: plain_number(value) for key, value in dataclasses.asdict(self).items()}


def plain_number(value: Any) -> Any:
    """A float rounded to six figures, or its name where JSON has no number for it; tuples as lists; anything else unchanged."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return list(value) if isinstance(value, tuple) else value


def _size(x: np.ndarray) -> tuple[float, float]:
    """(largest magnitude, RMS) of x, NaN if anything in it is not finite."""
    if not x.size:
        return 0.0, 0.0
    peak = float(np.abs(x).max())
    if not math.isfinite(peak):
        return math.nan, math.nan
    return peak, float(peak * np.sqrt(np.mean(np.square(x / peak)))) if peak else 0.0


def _share(part: float, whole: float) -> float:
    """part / whole where 0 / 0 is 0 and NaN is infinitely much."""
    if part == 0:
        return 0.0
    return part / whole if math.isfinite(part) and whole > 0 else math.inf


def _beyond(error: float, floor: float, yardstick: float) -> float:
    """How many yardsticks an error is above its floor, 0 if it is below."""
    return 0.0 if error <= floor else _share(error - floor, yardstick)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two arrays taken as vectors; 1 for two zero vectors."""
    (peak_a, _), (peak_b, _) = _size(a), _size(b)
    if peak_a == 0 and peak_b == 0:
        return 1.0
    if not (peak_a > 0 and peak_b > 0):
        return math.nan
    a, b = a.ravel() / peak_a, b.ravel() / peak_b
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, float64."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, x: np.ndarray) -> float:
    """Largest KL(reference || x) over rows of logits, in nats."""
    p, q = log_softmax(reference), log_softmax(x.astype(np.float64))
    return float(max(0.0, (np.exp(p) * (p - q)).sum(-1).max())) if np.isfinite(q).all() else math.nan


@dataclasses.dataclass
class Yardstick:
    """Errors of the textbook computation for one output, pooled over cases: RMS relative to the output's, largest relative to its largest value."""

    error_squares: float = 0.0
    value_squares: float = 0.0
    max_ratio: float = 0.0

    def add(self, reference: np.ndarray, plain: np.ndarray) -> None:
        """Take another case in."""
        with np.errstate(all="ignore"):
            (ref_max, ref_rms), (error_max, error_rms) = _size(reference), _size(plain.astype(np.float64) - reference)
        self.error_squares += error_rms**2 * reference.size
        self.value_squares += ref_rms**2 * reference.size
        ratio = _share(error_max, ref_max)
        self.max_ratio = max(self.max_ratio, ratio)

    @property
    def rms_ratio(self) -> float:
        """Pooled RMS error / pooled RMS, infinite if anything was not finite."""
        return math.sqrt(_share(self.error_squares, self.value_squares))


def compare(
    reference: np.ndarray, plain: np.ndarray, x: np.ndarray, rows: np.ndarray, precision: str, rung: str, mode: str, case: str, layer: int | None, field: str,
    pooled: Yardstick | None = None,
) -> Comparison:
    """Judge x (R,...) by the rule. reference: float64; plain: the yardstick here, pooled: over all cases; rows (R,2): sequence and position of each row."""
    base: dict[str, Any] = {"rung": rung, "mode": mode, "case": case, "layer": layer, "field": field, "rows": len(reference)}
    if x.shape != reference.shape:
        nan = math.nan
        return Comparison(**base, verdict=FAIL, reason=f"shape {x.shape} where {reference.shape} is due", ref_max=nan, max_error=nan, plain_max=nan,
                          limit_max=nan, rms_error=nan, plain_rms=nan, limit_rms=nan, score=math.inf, tolerance=nan, factor=nan, cosine=nan)
    with np.errstate(all="ignore"):
        error, yardstick = x.astype(np.float64) - reference, plain.astype(np.float64) - reference
        (ref_max, ref_rms), (max_error, rms), (plain_max, plain_rms) = (_size(z) for z in (reference, error, yardstick))
        if pooled is not None and math.isfinite(plain_max):
            plain_max, plain_rms = max(plain_max, pooled.max_ratio * ref_max), max(plain_rms, pooled.rms_ratio * ref_rms)
        floor = floor_eps(precision)
        limit_max, limit_rms = FACTOR * plain_max + floor * ref_max, FACTOR * plain_rms + floor * ref_rms
        score = max(_share(max_error, limit_max), _share(rms, limit_rms))
        factor = max(_beyond(max_error, floor * ref_max, plain_max), _beyond(rms, floor * ref_rms, plain_rms))
        by_row = np.abs(error).reshape(len(error), -1).max(-1) if error.size else np.zeros(len(error))
        bad = np.flatnonzero(~(by_row <= limit_max))
        extra: dict[str, Any] = {}
        if layer is None:
            extra = {"kl": kl_divergence(reference, x), "agreement": float(np.mean(x.argmax(-1) == reference.argmax(-1)))}
        angle = cosine(reference, x.astype(np.float64))
    verdict, reason = PASS, ""
    if not _share(plain_rms, ref_rms) <= UNFIT:
        verdict, reason = UNFIT_VERDICT, f"precision unfit: the yardstick itself is off by {_share(plain_rms, ref_rms):.2%}, more than {UNFIT:.0%}"
    elif not score <= 1:
        verdict, reason = FAIL, "not finite" if not math.isfinite(max_error) else f"{score:.3g} times the limit"
    return Comparison(
        **base, verdict=verdict, reason=reason, ref_max=ref_max, max_error=max_error, plain_max=plain_max, limit_max=limit_max,
        rms_error=_share(rms, ref_rms), plain_rms=_share(plain_rms, ref_rms), limit_rms=_share(limit_rms, ref_rms), score=score,
        tolerance=_share(max_error, ref_max), factor=factor, cosine=angle,
        first_bad=(int(rows[bad[0], 0]), int(rows[bad[0], 1])) if len(bad) else None,
        first_cosine=cosine(reference[bad[0]], x[bad[0]].astype(np.float64)) if len(bad) else None, **extra)


def position_errors(reference: np.ndarray, x: np.ndarray) -> list[float]:
    """RMS error of each row of x (R,...) relative to the RMS of the whole reference."""
    scale = _size(reference)[1] or 1.0
    with np.errstate(all="ignore"):
        error = (x.astype(np.float64) - reference).reshape(len(reference), -1)
        return [float(v) for v in np.sqrt(np.mean(np.square(error), axis=1)) / scale]


@dataclasses.dataclass(frozen=True)
class TokenCheck:
    """Greedy tokens of one rung: steps compared, steps that agree, excused near ties and real disagreements, each as plain values."""

    rung: str
    mode: str
    steps: int
    agree: int
    logit_error: float
    near_ties: list[dict[str, Any]]
    disagreements: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {key: plain_number(value) for key, value in dataclasses.asdict(self).items()}


def check_tokens(
    rung: str, mode: str, parts: list[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]], logit_error: float | None = None
) -> TokenCheck:
    """Compare greedy tokens, teacher-forced, over cases given as (name, logit_rows (N,3), float64 logits, rung's logits, rung's tokens).

    A token may differ where the float64 gap between the best two logits is under 10 times the rung's largest logit error (logit_error
    where it has no logits); the step is listed.
    """
    errors = [float(np.abs(x - reference).max()) for _, _, reference, x, _ in parts
              if x is not None and x.shape == reference.shape and np.isfinite(x).all()]
    worst = max(errors, default=math.inf) if logit_error is None else logit_error
    steps = agree = 0
    ties: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    for name, rows, reference, _, tokens in parts:
        best = reference.argmax(-1)
        top = np.partition(reference, -2, axis=-1)[:, -2:] if reference.shape[-1] > 1 else np.stack([reference[:, 0] - math.inf, reference[:, 0]], axis=-1)
        gap = top[:, 1] - top[:, 0]
        steps += len(best)
        same = best == tokens[: len(best)] if len(tokens) == len(best) else np.zeros(len(best), dtype=bool)
        agree += int(same.sum())
        for i in np.flatnonzero(~same):
            entry = {"case": name, "step": int(rows[i, 0]), "sequence": int(rows[i, 1]), "position": int(rows[i, 2]), "expected": int(best[i]),
                     "got": int(tokens[i]) if i < len(tokens) else None, "gap": plain_number(float(gap[i]))}
            (ties if gap[i] < NEAR_TIE * worst and np.isfinite(worst) else wrong).append(entry)
    return TokenCheck(rung, mode, steps, agree, worst, ties, wrong)


