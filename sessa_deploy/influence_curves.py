"""Curves of influence against the lag: log-spaced positions, slopes by octave, power and exponential fits, and what the slopes say. numpy only.

A curve is a column: influence (T,) of one source tau on every target t, so that index tau + l is lag l (arXiv 2604.18580, section 2; the tail is in the
column view, looking back from one target it is not).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sessa_deploy.checks import integer

Array = NDArray[np.float64]
FIT_POINTS = 200  # log-spaced lags of a fit
FIT_FROM, FIT_SPAN = 64, 8  # a fit begins at lag max(FIT_FROM, FIT_SPAN tau): nearer, the slope of an ideal layer is not yet its exponent
VERDICT_FROM = 16  # lag from which an ideal layer's and a Transformer's slopes are constant
CONSTANT, DOUBLING, STEEPER = 1.3, 1.5, 1.15  # factors between slopes, see `verdict`
MAX_SOURCES = 4096


@dataclass(frozen=True)
class Fit:
    """Straight lines through log |K| at log-spaced lags in `lags` = (first, last).

    slope, intercept, r2: against log l, a power law l^slope; rate, exponential_r2: against l, an exponential e^(-rate l). A high r2 proves neither.
    """

    lags: tuple[int, int]
    points: int
    slope: float
    intercept: float
    r2: float
    rate: float
    exponential_r2: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "lags": list(self.lags)}


def log_spaced(low: int, high: int, count: int) -> list[int]:
    """At most `count` distinct integers low..high with both ends, even in the logarithm; [] where low > high. low >= 1."""
    if low > high:
        return []
    return sorted({round(x) for x in np.geomspace(low, high, count)} | {low, high})


def source_positions(count: int, tokens: int) -> list[int]:
    """`count` distinct source positions in 0..tokens-2: the first at 0, the rest log-spaced from 1 to the middle (further where there is no room).

    Raises UserError unless 1 <= count < tokens.
    """
    integer("the number of sources", count, 1, min(tokens - 1, MAX_SOURCES), fix="fewer --sources, or a longer --context")
    top = max(tokens // 2, count - 1)
    found = [0]
    for i, ideal in enumerate(np.geomspace(1, top, count - 1) if count > 1 else ()):
        latest = top - (count - 2 - i)  # leaves room for those that follow
        found.append(min(max(round(ideal), found[-1] + 1), latest))
    return found


def default_lags(tokens: int) -> list[int]:
    """Log-spaced lags 1..tokens-1, about eight an octave."""
    return log_spaced(1, tokens - 1, 8 * max(1, math.ceil(math.log2(tokens))))


def check_lags(lags: Sequence[int], tokens: int) -> list[int]:
    """`lags` as given. Raises UserError on one that no source of a text of `tokens` tokens has."""
    for lag in lags:
        integer("a lag", lag, 0, tokens - 1, f"an integer in 0..{tokens - 1}, below the {tokens} tokens of the text", "a longer --context, or smaller --lags")
    return [int(lag) for lag in lags]


def at_lags(curve: Array, source: int, lags: Sequence[int]) -> list[float | None]:
    """The curve at source + lag; None beyond its end."""
    return [float(curve[source + lag]) if source + lag < len(curve) else None for lag in lags]


def octave_slopes(curve: Array, source: int) -> list[dict[str, Any]]:
    """[{from, to, slope, rms}] for the octaves 1..2, 2..4, ... of lags: slope = log2 |K[2l] / K[l]|, None where one of them is zero or not finite; rms of
    K over lags l..2l-1, which a single odd token does not sway.

    A power law l^-b has the slope -b in every octave; e^(-r l) has -r l / ln 2, doubling from one to the next.
    """
    found: list[dict[str, Any]] = []
    lag = 1
    while source + 2 * lag < len(curve):
        near, far = abs(float(curve[source + lag])), abs(float(curve[source + 2 * lag]))
        known = 0.0 < near < math.inf and 0.0 < far < math.inf
        rms = float(np.sqrt(np.mean(np.square(curve[source + lag : source + 2 * lag]))))
        found.append({"from": lag, "to": 2 * lag, "slope": math.log2(far) - math.log2(near) if known else None, "rms": rms})
        lag *= 2
    return found


def rms_slopes(slopes: Sequence[dict[str, Any]]) -> list[tuple[int, float | None]]:
    """[(lag where two octaves meet, log2 of the ratio of their rms)], None where one is zero or not finite."""
    found: list[tuple[int, float | None]] = []
    for near, far in itertools.pairwise(slopes):
        known = 0.0 < near["rms"] < math.inf and 0.0 < far["rms"] < math.inf
        found.append((far["from"], math.log2(far["rms"]) - math.log2(near["rms"]) if known else None))
    return found


def _line(x: Array, y: Array) -> tuple[float, float, float]:
    """(slope, intercept, R^2) of a least-squares line."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    spread = float(dy @ dy)
    rest = dy - slope * dx
    return slope, float(y.mean() - slope * x.mean()), 1.0 - float(rest @ rest) / spread if spread > 0 else 1.0


def fit(curve: Array, source: int, low: int | None = None, high: int | None = None, points: int = FIT_POINTS) -> Fit | None:
    """The fits over lags low..high, by default max(64, 8 tau) up to the last; None where fewer than 3 lags have a finite logarithm."""
    low = max(FIT_FROM, FIT_SPAN * source) if low is None else low
    last = len(curve) - 1 - source
    lags = np.array(log_spaced(low, last if high is None else min(high, last), points), dtype=np.int64)
    values = np.abs(np.asarray(curve, dtype=np.float64)[source + lags]) if len(lags) else np.zeros(0)
    seen = (values > 0) & np.isfinite(values)
    if seen.sum() < 3:
        return None
    lags, logs = lags[seen], np.log(values[seen])
    slope, intercept, r2 = _line(np.log(lags.astype(np.float64)), logs)
    rate, _, exponential_r2 = _line(lags.astype(np.float64), logs)
    return Fit((int(lags[0]), int(lags[-1])), len(lags), slope, intercept, r2, -rate, exponential_r2)


def verdict(slopes: Sequence[dict[str, Any]], source: int = 0) -> str:
    """What the slopes between octaves (of their rms) from lag max(16, 8 tau) on say.

    "power": they stay within a factor of 1.3 (1/(t+1) does too). "exponential": each is steeper than the one before by 1.5 or more (it doubles).
    "steepening": the last is the steepest by 1.15 or more. "irregular": none of these, or K rises somewhere. "none": no influence. "too short": fewer than
    three octaves.
    """
    seen = [slope for lag, slope in rms_slopes(slopes) if lag >= 2 * max(VERDICT_FROM, FIT_SPAN * source)]
    if len(seen) < 2:
        return "too short"
    if all(slope is None for slope in seen):
        return "none"
    falls = [-slope for slope in seen if slope is not None]
    if len(falls) < len(seen) or min(falls) <= 0:
        return "irregular"
    if max(falls) <= CONSTANT * min(falls):
        return "power"
    if all(far >= DOUBLING * near for near, far in itertools.pairwise(falls)):
        return "exponential"
    return "steepening" if falls[-1] >= STEEPER * max(falls[:-1]) else "irregular"


def describe(curve: Array, source: int, lags: Sequence[int]) -> dict[str, Any]:
    """source, lags, influence at them (signed; null beyond the text), slopes, fit and verdict of one column, as plain values."""
    slopes, fitted = octave_slopes(curve, source), fit(curve, source)
    return {"source": source, "lags": list(lags), "influence": at_lags(curve, source, lags), "slopes": slopes,
            "fit": None if fitted is None else fitted.to_dict(), "verdict": verdict(slopes, source)}
