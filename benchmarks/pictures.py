"""The pictures of the READMEs: python benchmarks/pictures.py [--bundle BUNDLE --checkpoint CHECKPOINT]

road.png           from a checkpoint to tokens, and which verb takes each step
decode_chart.png   milliseconds a decode step of every way to run one model, from results/compare.json
errors.png         what every output of a bundle used of its limit, as `validate` finds it (with --bundle and --checkpoint)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS
from compare import PEERS

CHART = "decode_chart.png"
SHOWN = {"decode": "1 sequence at 4096 tokens", "batch": "32 sequences at 4096 tokens"}
OURS, OTHERS, PLAIN = "#2b8a57", "#5b8fc7", "#a3a9b3"


def bars(found: dict[str, Any], point: str) -> list[tuple[str, float, str]]:
    """(name, ms, colour) of the peers that reached a point, the slowest first."""
    rows = found["points"][point]
    colours = {"trt": OURS, "official": PLAIN}
    reached = [(PEERS[peer], row["p50_ms"], colours.get(peer, OTHERS)) for peer, row in rows.items() if "p50_ms" in row]
    return sorted(reached, key=lambda bar: -bar[1])


def draw_decode(source: Path, target: Path) -> None:
    """Bars on a logarithmic scale, one panel a point, the bandwidth floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(source.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 2.9), layout="constrained")
    for axis, (point, title) in zip(axes, SHOWN.items(), strict=True):
        shown = bars(found, point)
        names, times, colours = zip(*shown, strict=True)
        axis.barh(names, times, color=colours, height=0.68)
        for place, ms in enumerate(times):
            axis.annotate(f"{ms:.3g} ms", (ms, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
        floor = next((row["floor_ms"] for row in found["points"][point].values() if "floor_ms" in row), None)
        if floor is not None:
            axis.axvline(floor, color="#333", lw=1, ls="--")
            axis.annotate("bandwidth floor", (floor, len(times) - 0.4), xytext=(3, 0), textcoords="offset points", fontsize=8, color="#333")
        axis.set(xscale="log", title=title, xlim=(min(filter(None, (*times, floor))) / 1.6, 4 * max(times)), ylim=(-0.6, len(times) + 0.1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("ms a step, logarithmic; lower is better")
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


STOPS = (("checkpoint", "safetensors, .pt"), ("model", "PyTorch, float64"), ("model.onnx", "one file"), ("engine", "ONNX Runtime\nor TensorRT"),
         ("session", "caches, batches"), ("tokens", "text, scores"))  # fmt: skip
VERBS = ("load", "export", "build", "open", "run\nchat\nscore")
RUNGS = ((1, "float64: the truth"), (2, "PyTorch at the\nbundle's precision"), (3, "the engine: prefill,\ndecode, chunks, ragged"),
         (4, "the session:\ngreedy tokens"))  # fmt: skip


def draw_road(target: Path) -> None:
    """The stops in a row, the verb above each arrow, and below what `validate` compares at each stop."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure, axis = plt.subplots(figsize=(11, 2.7), layout="constrained")
    wide, step = 1.16, 1.9
    for i, (name, what) in enumerate(STOPS):
        box = FancyBboxPatch((i * step, 0), wide, 0.9, boxstyle="round,pad=0.03,rounding_size=0.1", fc="#eef4fb" if i < 5 else "#e6f3ec", ec="#5b8fc7", lw=1.2)
        axis.add_patch(box)
        axis.text(i * step + wide / 2, 0.66, name, ha="center", va="center", fontsize=11, weight="bold", color="#22303f")
        axis.text(i * step + wide / 2, 0.27, what, ha="center", va="center", fontsize=8, color="#4d535e")
    for i, verb in enumerate(VERBS):
        start, end = i * step + wide + 0.06, (i + 1) * step - 0.06
        axis.annotate("", (end, 0.45), (start, 0.45), arrowprops={"arrowstyle": "-|>", "color": "#22303f", "lw": 1.4})
        axis.text((start + end) / 2, 0.58, verb, ha="center", va="bottom", fontsize=8.5, family="monospace", color="#2b8a57")
    for i, what in RUNGS:
        axis.plot([i * step + wide / 2] * 2, [-0.06, -0.42], color="#c07a1c", lw=1)
        axis.text(i * step + wide / 2, -0.48, what, ha="center", va="top", fontsize=8, color="#8a5a14")
    axis.plot([step + wide / 2, 4 * step + wide / 2], [-0.24, -0.24], color="#c07a1c", lw=1)
    axis.text(0.9, -0.24, "validate", ha="right", va="center", fontsize=9.5, family="monospace", color="#c07a1c", weight="bold")
    axis.plot([0.95, step + wide / 2], [-0.24, -0.24], color="#c07a1c", lw=1)
    axis.set(xlim=(-0.15, 5 * step + wide + 0.15), ylim=(-0.95, 1.1))
    axis.axis("off")
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


def draw_errors(bundle: Path, checkpoint: Path, target: Path) -> None:
    """What each output of a bundle used of its limit, the worst case of each, with the real `validate`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sessa_deploy.contract import CACHE_FIELDS
    from sessa_deploy.export import parity

    report = parity.validate(bundle, checkpoint)
    places = [*((i, field) for i in range(report.config.n_layers) for field in CACHE_FIELDS), (None, "logits")]
    figure, axis = plt.subplots(figsize=(11, 2.9), layout="constrained")
    names = {"torch": "PyTorch", "ort": "ONNX Runtime"}
    worst: dict[str, dict[tuple[int | None, str], float]] = {}
    for c in report.worst():
        found = worst.setdefault(c.rung, {})
        found[c.layer, c.field] = max(c.score, found.get((c.layer, c.field), 0.0))
    width = 0.8 / max(1, len(worst))
    for i, (rung, shares) in enumerate(worst.items()):
        x = [at + (i - (len(worst) - 1) / 2) * width for at in range(len(places))]
        axis.bar(x, [100 * shares.get(place, 0.0) for place in places], width=width, color=(OTHERS, OURS)[i % 2], label=names.get(rung, rung))
    axis.axhline(100, color="#c62f3b", lw=1.2, ls="--")
    axis.annotate("what is allowed: twice the textbook's own rounding error", (0, 100), xytext=(2, -11), textcoords="offset points", fontsize=8,
                  color="#c62f3b")
    axis.set_xticks(range(len(places)), [field for _, field in places])
    for layer in range(report.config.n_layers):
        middle = layer * len(CACHE_FIELDS) + (len(CACHE_FIELDS) - 1) / 2
        axis.annotate(f"layer {layer}", (middle, 0), xytext=(0, -28), textcoords="offset points", ha="center", xycoords=("data", "axes fraction"), fontsize=8.5)
    axis.set(ylabel="% of the limit", ylim=(0, 112), title=f"demo, {report.precision}: worst case of {len(report.comparisons):,} comparisons with float64")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=2, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    figure.savefig(target, dpi=130, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of compare.json and of the pictures")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    draw_road(given.results / "road.png")
    draw_decode(given.results / "compare.json", given.results / CHART)
    if given.bundle and given.checkpoint:
        draw_errors(given.bundle, given.checkpoint, given.results / "errors.png")
