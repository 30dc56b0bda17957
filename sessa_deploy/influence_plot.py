"""The picture of an influence report: |K| against the lag, a panel a layer, and slopes by octave beneath."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole
from sessa_deploy.influence_curves import rms_slopes

FORMATS = ("png", "svg", "pdf")
MOST_PANELS, COLUMNS = 8, 4
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#b9bec7", "axes.grid": True, "grid.color": "#e8eaee",
    "axes.axisbelow": True, "xtick.color": "#4d535e", "ytick.color": "#4d535e", "axes.titlesize": 9.5, "axes.titlelocation": "left",
    "legend.frameon": False,
}
_TRANSFORMER, _FORWARD, _DEEP, _LAYERS = "#22262e", "#c2703d", "#a0309a", "viridis"


def plot_format(path: str | Path) -> str:
    """The format that a file's name asks for. Raises UserError on another one than png, svg and pdf."""
    found = Path(path).suffix.lower().lstrip(".")
    if found not in FORMATS:
        raise UserError("no such kind of picture", got=f"--plot {path}", allowed=", ".join(f".{x}" for x in FORMATS), fix="name a file such as influence.png")
    return found


def write_plot(path: str | Path, report: dict[str, Any], title: str) -> None:
    """Write the picture of a report of `influence.measure`. Raises UserError where it cannot be written."""
    write_whole(path, draw(report, title, plot_format(path)), "--plot", "the picture")


def draw(report: dict[str, Any], title: str, form: str = "png") -> bytes:
    """The picture's bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _shown(report["layers"])
    columns = min(COLUMNS, max(2, len(shown)))
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "sessa-influence"}):
        figure = Figure(figsize=(max(10.0, 3.1 * columns + 0.9), 2.9 * rows + 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [1.05])
        panels = [figure.add_subplot(grid[i // columns, i % columns] if len(shown) > 1 else grid[0, :]) for i in range(len(shown))]
        lowest = min((v for layer in shown for v in _heights(layer)), default=1e-6)
        for i, (panel, layer) in enumerate(zip(panels, shown, strict=True)):
            _panel(panel, layer)
            panel.set_ylim(max(lowest, 1e-9) / 2, 2.0)
            panel.set_xlim(0.9, 1.1 * report["context"])
            if i % columns:
                panel.tick_params(labelleft=False)
            else:
                panel.set_ylabel(r"$|K[\tau + l, \tau]|$")
            panel.set_xlabel("lag $l$, tokens")
        _legend(figure, shown, 5 if columns == COLUMNS else 3)
        _slopes(figure.add_subplot(grid[rows, : max(1, columns // 2)]), report)
        _gains(figure.add_subplot(grid[rows, max(1, columns // 2) :]), report)
        out = io.BytesIO()
        figure.savefig(out, format=form, dpi=130, metadata={"Date": None} if form == "svg" else {"CreationDate": None} if form == "pdf" else None)
    return out.getvalue()


def _shown(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every layer, or eight of them from first to last."""
    if len(layers) <= MOST_PANELS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]


def _points(entry: dict[str, Any], key: str = "influence") -> tuple[list[int], list[float]]:
    """(lags >= 1, |values|) of what is there and not zero."""
    pairs = [(lag, abs(v)) for lag, v in zip(entry["lags"], entry[key], strict=True) if lag >= 1 and v is not None and v != 0.0 and math.isfinite(v)]
    return [lag for lag, _ in pairs], [v for _, v in pairs]


def _heights(layer: dict[str, Any]) -> list[float]:
    first = layer["sources"][0]
    return [*_points(first, "transformer")[1], *sorted(_points(first)[1])[3:], *(v for entry in layer["sources"] for v in _octave_points(entry)[1])]


def _colour(place: float) -> Any:
    import matplotlib

    return matplotlib.colormaps[_LAYERS](0.92 * place)


def _place(source: int, last: int) -> float:
    return math.log1p(source) / math.log1p(last) if last else 0.0


def _octave_points(entry: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(middles of the octaves of lags, rms of K in them), zeros left out."""
    seen = [o for o in entry["slopes"] if 0.0 < o["rms"] < math.inf]
    return [o["from"] * math.sqrt(2.0) for o in seen], [o["rms"] for o in seen]


def _panel(panel: Any, layer: dict[str, Any]) -> None:
    sources = layer["sources"]
    last = sources[-1]["source"]
    panel.set_xscale("log")
    panel.set_yscale("log")
    for entry in reversed(sources[1:]):
        panel.plot(*_octave_points(entry), color=_colour(_place(entry["source"], last)), lw=0.9, alpha=0.8)
    panel.plot(*_points(sources[0]), color=_colour(0.0), lw=0.7, alpha=0.35)
    panel.plot(*_octave_points(sources[0]), color=_colour(0.0), lw=2.2, marker="o", ms=3.5)
    panel.plot(*_points(sources[0], "forward"), color=_FORWARD, lw=0.9, ls=":")
    panel.plot(*_points(sources[0], "transformer"), color=_TRANSFORMER, lw=1.2, ls="--")
    fitted, gamma = sources[0]["fit"], layer["gamma"]
    told = "" if fitted is None else f"slope {fitted['slope']:+.2f},  "
    panel.set_title(f"layer {layer['layer']}:  {told}mean γ {gamma['mean']:+.2f}")


def _legend(figure: Any, shown: Sequence[dict[str, Any]], across: int) -> None:
    """What the lines are, beneath the picture."""
    from matplotlib.lines import Line2D

    last = shown[0]["sources"][-1]["source"]
    lines = [Line2D([], [], color=_colour(0.0), lw=2.2, marker="o", ms=3.5), Line2D([], [], color=_colour(0.0), lw=0.7, alpha=0.35),
             Line2D([], [], color=_TRANSFORMER, lw=1.2, ls="--"), Line2D([], [], color=_FORWARD, lw=0.9, ls=":")]
    words = ["source at 0, rms of an octave", "source at 0, single targets", "even attention, 1/(t+1)", "forward attention's weight of it"]
    if last:
        lines.insert(2, Line2D([], [], color=_colour(1.0), lw=0.9))
        words.insert(2, f"later sources, up to {last}")
    figure.legend(lines, words, loc="outside lower left", ncols=across, fontsize=8.5)


def _slopes(axis: Any, report: dict[str, Any]) -> None:
    """Slopes by octave of the source at position 0, every layer, and end to end where it was measured."""
    axis.set_xscale("log", base=2)
    layers = report["layers"]
    for i, layer in enumerate(layers):
        _octaves(axis, layer["sources"][0], color=_colour(i / max(1, len(layers) - 1)), label=f"layer {layer['layer']}" if len(layers) <= MOST_PANELS else None)
    if "end_to_end" in report:
        _octaves(axis, report["end_to_end"]["sources"][0], color=_DEEP, lw=2.0, label="end to end")
    axis.axhline(-1.0, color=_TRANSFORMER, lw=1.2, ls="--")
    axis.axhline(0.0, color="#b9bec7", lw=0.8)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -4.0), min(high, 1.5))
    axis.set_title("slope by octave, source at 0; flat: power law, doubling: exponential")
    axis.set_xlabel("lag $l$, tokens")
    axis.set_ylabel("slope of the octaves' rms")
    if len(layers) <= MOST_PANELS:
        axis.legend(fontsize=8, ncols=2 if len(layers) > 3 else 1)


def _octaves(axis: Any, entry: dict[str, Any], **style: Any) -> None:
    seen = [(lag, slope) for lag, slope in rms_slopes(entry["slopes"]) if slope is not None]
    axis.plot([lag for lag, _ in seen], [slope for _, slope in seen], marker="o", ms=3.5, **{"lw": 1.2, **style})


def _gains(axis: Any, report: dict[str, Any]) -> None:
    """gamma's range a layer, and how many tokens a row attends to."""
    layers = report["layers"]
    x = [layer["layer"] for layer in layers]
    colours = [_colour(i / max(1, len(layers) - 1)) for i in range(len(layers))]
    low, high = ([layer["gamma"][key] for layer in layers] for key in ("min", "max"))
    axis.bar(x, [b - a for a, b in zip(low, high, strict=True)], bottom=low, width=0.5, color=colours, alpha=0.35)
    axis.scatter(x, [layer["gamma"]["mean"] for layer in layers], c=colours, s=36, zorder=3)
    for i, layer in enumerate(layers if len(layers) <= MOST_PANELS else ()):
        told = f"attends to {layer['support']['mean']:.3g} of {report['context'] - 1}\nη {layer['eta']:.3g}"
        axis.annotate(told, (x[i], low[i]), xytext=(0, -4), textcoords="offset points", ha="center", va="top", fontsize=7.5, color="#4d535e")
    axis.axhline(0.0, color="#b9bec7", lw=0.8)
    axis.set_ylim(min(-0.5, *low) - 0.45, 1.08)
    axis.set_xlim(min(x) - 0.6, max(x) + 0.6)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(r"feedback gain $\gamma$: range over the text, dot at the mean")
    axis.set_xlabel("layer")
