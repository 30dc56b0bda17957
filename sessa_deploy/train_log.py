"""What a training run leaves behind besides weights: log.csv, loss.png and report.json, each replaced whole."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sessa_deploy.errors import UserError
from sessa_deploy.files import write_whole

LOG_FILE, PLOT_FILE, REPORT_FILE = "log.csv", "loss.png", "report.json"


@dataclass(frozen=True)
class Row:
    """One optimizer step. loss: nats per token; grad_norm: before clipping; held_out: bits per byte where it was measured; seconds: since the start."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    held_out: float | None
    seconds: float


def write_log(folder: Path, rows: Sequence[Row]) -> None:
    """log.csv with one line a step; numbers are written so that they read back bit for bit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Row)])
    for row in rows:
        writer.writerow(["" if v is None else repr(v) for v in asdict(row).values()])
    write_whole(folder / LOG_FILE, text.getvalue(), "--out", "the log")


def read_log(folder: Path) -> list[Row]:
    """The rows of log.csv, [] where there is none. Raises UserError if it is no log."""
    path = folder / LOG_FILE
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [Row(int(r["step"]), float(r["loss"]), float(r["lr"]), float(r["grad_norm"]), int(r["tokens"]),
                        float(r["held_out"]) if r["held_out"] else None, float(r["seconds"])) for r in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read", got=f"{type(error).__name__}: {str(error)[:120]}", allowed="the log that train wrote",
                        fix="remove it (the curve so far is lost, the run is not)") from None


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """report.json: what was trained on what, for how long, and the held-out figure beside xz."""
    write_whole(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n", "--out", "the report")


def write_plot(folder: Path, rows: Sequence[Row], bytes_per_token: float, xz_bits_per_byte: float | None, final: float) -> None:
    """loss.png: training and held-out bits per byte against the step, what was stored at the end as a star, xz -9 as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    to_bits = 1.0 / (0.6931471805599453 * bytes_per_token)
    steps = [r.step for r in rows]
    bits = [r.loss * to_bits for r in rows]
    width = max(1, len(bits) // 200)
    smooth = [sum(bits[max(0, i - width + 1) : i + 1]) / len(bits[max(0, i - width + 1) : i + 1]) for i in range(len(bits))]
    axes.plot(steps, bits, color="tab:blue", alpha=0.2, linewidth=0.6)
    axes.plot(steps, smooth, color="tab:blue", label="training")
    held = [(r.step, r.held_out) for r in rows if r.held_out is not None]
    if held:
        axes.plot([s for s, _ in held], [h for _, h in held], "o-", color="tab:orange", markersize=3, label="held out, windows side by side")
    if steps:
        axes.plot(steps[-1:], [final], "*", color="tab:red", markersize=10, label=f"held out, stored, half-overlapping windows: {final:.3f}")
    if xz_bits_per_byte is not None:
        axes.axhline(xz_bits_per_byte, color="tab:gray", linestyle="--", label=f"xz -9 on the held-out files: {xz_bits_per_byte:.3f}")
    # The first steps' drop would flatten all that follows.
    low = min([*smooth, *(h for _, h in held if h is not None), xz_bits_per_byte or float("inf"), final], default=0.0)
    axes.set_ylim(max(0.0, low - 0.2), min(max(bits, default=8.0), low + 3.0) + 0.2)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_whole(folder / PLOT_FILE, png.getvalue(), "--out", "the plot")
