"""The pictures of a parity report, as SVG: error by layer, error by position, headroom."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sessa_deploy.contract import CACHE_FIELDS
from sessa_deploy.errors import packages_named
from sessa_deploy.export.parity.metrics import UNFIT, Comparison
from sessa_deploy.export.parity.rungs import ORACLE, PLAIN
from sessa_deploy.export.parity.verdict import FP16_MAX, Report

COLOURS = {PLAIN: "#8a8f98", "torch": "#3b6fb6", "ort": "#e07b39", "ort-cuda": "#3f9b5f", "trt": "#9a5fb0"}
FAILED = "#c62f3b"
_TINY = 1e-17


def _pyplot() -> Any:
    with packages_named():
        import matplotlib
    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _figure(width: float, height: float, columns: int = 1, ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    plt = _pyplot()
    with plt.rc_context({"font.size": 9, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b9bec7",
                         "axes.grid": True, "grid.color": "#e8eaee", "axes.axisbelow": True, "xtick.color": "#4d535e", "ytick.color": "#4d535e"}):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), width_ratios=ratios, layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _svg(figure: Any) -> bytes:
    plt, out = _pyplot(), io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "sessa-parity"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return out.getvalue()


def _finite(value: float) -> float:
    return value if math.isfinite(value) and value > 0 else (_TINY if value == 0 else math.nan)


def error_by_layer(report: Report) -> bytes:
    """RMS error of every output in the order of a forward pass, worst case of each, beside the yardstick and the limit."""
    layers = report.config.n_layers
    figure, (axis,) = _figure(min(13.0, 5.5 + 0.9 * layers), 3.6)
    by_pair: dict[tuple[str, str], dict[tuple[int | None, str], Comparison]] = {}
    for c in report.worst():
        by_pair.setdefault((c.rung, c.mode), {})[c.layer, c.field] = c
    slots = [(i, f) for i in range(layers) for f in CACHE_FIELDS]
    ticks: list[tuple[int | None, str]] = [*slots, (None, "logits")]
    shown = next(iter(by_pair.values()))
    x = np.arange(len(ticks))
    limit = [_finite(shown[t].limit_rms) if t in shown else math.nan for t in ticks]
    axis.plot(x, limit, color=FAILED, lw=1.1, ls="--", label="limit", drawstyle="steps-mid")
    axis.plot(x, [_finite(shown[t].plain_rms) if t in shown else math.nan for t in ticks], color=COLOURS[PLAIN], lw=1.6, marker="s", ms=3.4, label="yardstick")
    marks = {"graph": "o", "session": "x", "greedy": "+", "eager": "d"}
    heights = [c.rms_error for c in report.worst() if math.isfinite(c.rms_error)]
    top = 2.0 * max([_TINY, *heights, *(v for v in limit if math.isfinite(v))])  # where errors that are not finite are marked
    for (rung, mode), found in by_pair.items():
        y = [_finite(found[t].rms_error) if t in found else math.nan for t in ticks]
        axis.plot(x, y, color=COLOURS.get(rung, "#222"), lw=1.0, alpha=0.85, marker=marks[mode], ms=4.5, label=f"{rung}, {mode}")
        for place, tick in enumerate(ticks):
            if tick in found and found[tick].verdict != "pass":
                height = y[place] if math.isfinite(y[place]) else top
                axis.plot(place, height, marker="o", ms=10, mfc="none", mec=FAILED, mew=1.6)
    axis.set_yscale("log")
    if report.precision != "fp32":
        axis.axhline(UNFIT, color=FAILED, lw=0.8, ls=":")
        axis.text(x[-1], UNFIT, "precision unfit above", color=FAILED, fontsize=7.5, ha="right", va="bottom")
    many = layers > 8
    axis.set_xticks(x if not many else x[:: len(CACHE_FIELDS)])
    axis.set_xticklabels([f for _, f in ticks] if not many else [str(t[0]) if t[0] is not None else "logits" for t in ticks[:: len(CACHE_FIELDS)]],
                         rotation=0 if many else 90, fontsize=7.5)
    for i in range(0, layers, 2):
        axis.axvspan(i * 4 - 0.5, i * 4 + 3.5, color="#f4f6f9", zorder=-2)
    if not many:
        for i in range(layers):
            axis.text(i * 4 + 1.5, 1.01, f"layer {i}", transform=axis.get_xaxis_transform(), ha="center", fontsize=8, color="#4d535e")
    axis.set_xlim(-0.6, len(ticks) - 0.4)
    axis.set_ylabel("RMS error / RMS of the output")
    axis.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def error_by_position(report: Report, case: str) -> bytes:
    """Left: the worst layer's error of s at every position, for every rung. Right: error of the last rung by layer and position."""
    found = report.positions[case]
    figure, (left, right) = _figure(11.5, 3.3, 2, (1.15, 1.0))
    for rung, layers in found.items():
        rows = np.array([layers[i] for i in sorted(layers)], dtype=np.float64)
        if rows.size:
            worst = np.where(np.isfinite(rows).all(0), rows.max(0), np.nan)
            left.plot(np.maximum(worst, _TINY), color=COLOURS.get(rung, "#222"), lw=1.5 if rung == PLAIN else 1.1, alpha=0.9,
                      label="yardstick" if rung == PLAIN else rung, marker="." if rows.shape[1] < 4 else None)
    left.set_yscale("log")
    left.set_xlabel("position")
    left.set_ylabel("RMS error of s, worst layer")
    left.legend(fontsize=7.5, frameon=False, ncols=len(found), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    rung = list(found)[-1]
    rows = np.array([found[rung][i] for i in sorted(found[rung])], dtype=np.float64)
    with np.errstate(all="ignore"):
        picture = right.imshow(np.log10(np.maximum(np.where(np.isfinite(rows), rows, np.nan), _TINY)), aspect="auto", cmap="viridis", interpolation="nearest")
    right.grid(False)
    right.set_facecolor("#f3c6c9")
    right.set_xlabel(f"position ({rung}; not finite in red)" if not np.isfinite(rows).all() else f"position ({rung})")
    right.set_ylabel("layer")
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=right, label="log10 of the error of s")
    return _svg(figure)


def headroom(report: Report) -> bytes:
    """Largest |s| and |s*g| of every layer in float64, against the largest number fp16 holds."""
    rows = report.headroom[ORACLE]
    figure, (axis,) = _figure(min(13.0, 5.0 + 0.35 * report.config.n_layers), 2.6)
    x = np.arange(report.config.n_layers)
    for shift, key, colour in ((-0.19, "s", "#3b6fb6"), (0.19, "s*g", "#e07b39")):
        axis.bar(x + shift, [_finite(float(v)) for v in rows[key]], width=0.36, color=colour, label=f"max |{key}|")
    axis.axhline(FP16_MAX, color=FAILED, lw=1.1, ls="--", label="fp16 ends at 65504")
    axis.set_yscale("log")
    axis.set_xlabel("layer")
    axis.set_xticks(x if len(x) <= 32 else x[::4])
    axis.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)
