"""Tables and pictures of finished runs: every figure beside its yardsticks and its ceiling, whatever it says about the paper."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import numpy as np
import torch
import training
from rich import box
from rich.console import Console
from rich.table import Table
from training import Machine, Setting

from sessa_deploy.files import write_whole
from sessa_deploy.influence import measure
from sessa_deploy.model import SessaLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine as machine_facts

if TYPE_CHECKING:
    from tasks import Task

COLOURS = {"sessa": "#7b2d8b", "no-feedback": "#c07bd0", "llama": "#2f6fb0", "mamba2": "#3f9b5f"}
SEED_LINES = ("-", "--", ":", "-.")
SUMMARY, TABLE, INFLUENCE = "summary.json", "table.json", "influence.json"
NOISE_TOKENS, PROBES = 512, 4
CLAIM = "What holds here holds at this size and budget, on this task; the paper's sizes are unknown, so nothing here reproduces its tables."


def line(result: dict[str, Any]) -> str:
    """A finished run in a few words."""
    if result["validation"] is None:
        return f"diverged at step {result['curve'][-1][0] if result['curve'] else 0}"
    found = ", ".join(f"{key} {value:.4f}" for key, value in result["validation"].items())
    tested = "; ".join(f"{point}: {_first(scores):.4f}" for point, scores in result.get("test", {}).items())
    return f"validation {found}{f'; test {tested}' if tested else ''}; {result['seconds']:.0f} s{'' if result['cuda_graph'] else ', no CUDA graph'}"


def _first(scores: dict[str, Any]) -> float:
    return float(next(scores[name] for name in ("accuracy", "bits", "loss") if name in scores))


def tested(folder: Path, task: str) -> list[Setting]:
    """The runs of a task that were tested, whatever command made them: of each size and number of steps every model at one rate, that of its best run by
    validation."""
    groups = defaultdict(list)
    for path in (folder / task).glob("*-steps*.json"):
        result = json.loads(path.read_text())
        if result.get("test"):
            setting = Setting(*(result[field.name] for field in dataclasses.fields(Setting)))
            groups[setting.model, setting.steps, setting.width, setting.layers].append((result["validation"]["loss"], setting))
    found = []
    for runs in groups.values():
        best = min(runs, key=lambda run: run[0])[1].lr
        found += [setting for _, setting in runs if setting.lr == best]
    return sorted(found, key=lambda s: (s.steps, s.width, s.layers or 0, models.MODELS.index(s.model), s.seed))


def write_task(folder: Path, task: Task, done: Sequence[Setting], rates: Mapping[str, Sequence[float]], search_steps: int) -> None:
    """summary.json of a task: mean and spread over the seeds of every finished model, what each run gave, yardsticks, data and machine. Models that `done` does
    not name are there too, with the runs of this size that earlier commands left in the folder."""
    path, first = folder / task.name / SUMMARY, done[0]
    held = json.loads(path.read_text()) if path.is_file() else {}
    named = {setting.model for setting in done}
    others = [s for s in tested(folder, task.name) if s.model not in named and (s.steps, s.width, s.layers) == (first.steps, first.width, first.layers)]
    done = sorted((*done, *others), key=lambda s: models.MODELS.index(s.model))
    found: dict[str, Any] = {}
    marks = task.yardsticks()
    for model in dict.fromkeys(setting.model for setting in done):
        runs = [training.finished(setting, folder) for setting in done if setting.model == model]
        kept = [run for run in runs if run is not None]
        tests = [run["test"] for run in kept if run.get("test")]
        points = {point: _spread([_first(test[point]) for test in tests]) for point in task.points} if tests else {}
        for point, scores in points.items():
            if task.better == "higher":
                scores["of the ceiling"] = scores["mean"] / max(marks[point].values())
        found[model] = {"parameters": kept[0]["parameters"], "lr": kept[0]["lr"], "points": points, "runs": kept,
                        "files": [s.stem for s in done if s.model == model]}
    earlier = held.get("rates", {})
    tried = {model: list(rates[model]) if model in rates and model in named else earlier.get(model, [entry["lr"]]) for model, entry in found.items()}
    made = next((run for entry in found.values() for run in entry["runs"] if "machine" in run), held)  # runs of another machine keep its name
    summary = {
        "task": task.name, "title": task.title, "metric": task.metric, "better": task.better, "points": list(task.points), "steps": first.steps,
        "batch": task.batch_size, "tokens of a batch": task.batch_size * task.length,
        "rates": tried, "rate search": f"seed 0, {search_steps} steps" if rates else held.get("rate search", "none"),
        "data": task.facts(), "yardsticks": marks, "models": found,
        "machine": made.get("machine") or machine_facts(), "versions": made.get("versions") or models.versions(),
    }
    write_whole(path, json.dumps(summary, indent=1) + "\n", "--out", "the summary")


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0, "seeds": len(values)}


def summaries(folder: Path) -> list[dict[str, Any]]:
    """Those of every task that has one."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{SUMMARY}"))]


def rows_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of a task's table: models, then yardsticks from the lowest on."""
    head = [summary["title"], *(f"{point}" for point in summary["points"]), "rate", "parameters", "seconds"]
    rows, marks = [], summary["yardsticks"]
    for model, found in summary["models"].items():
        cells = []
        for point in summary["points"]:
            score = found["points"].get(point)
            spread = f" ± {score['spread']:.3f}" if score is not None and score["seeds"] > 1 else ""
            known = score is not None and "of the ceiling" in score and max(marks[point].values()) < 1
            share = f" ({score['of the ceiling']:.0%} of the ceiling)" if known else ""
            cells.append("diverged" if score is None else f"{score['mean']:.3f}{spread}{share}")
        seconds = statistics.fmean(run["seconds"] for run in found["runs"])
        rows.append([models.TITLES[model], *cells, f"{found['lr']:g}", f"{found['parameters']['body']:,}", f"{seconds:.0f}"])
    names = sorted(marks[summary["points"][0]], key=lambda name: marks[summary["points"][0]][name])
    rows += [[name, *(f"{marks[point][name]:.3f}" for point in summary["points"]), "", "", ""] for name in names]
    return head, rows


def write_all(folder: Path, console: Console) -> None:
    """table.json, table.md and pictures of every task with a finished run; the tables printed too."""
    found = summaries(folder)
    if not found:
        console.print("no run was finished")
        return
    pages = [f"# Sessa beside a Transformer and Mamba-2\n\n{CLAIM}\n"]
    for summary in found:
        head, rows = rows_of(summary)
        count = len(summary["models"])
        table = Table(*head, title=_caption(summary), box=box.SIMPLE_HEAD, title_justify="left")
        for i, row in enumerate(rows):
            table.add_row(*row, style=None if i < count else "dim", end_section=i == count - 1)
        console.print(table)
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        pages.append(f"## {summary['title']}\n\n{_caption(summary)}\n\n" + "\n".join(lines) + "\n")
        _plot_losses(folder, summary)
        if any("lags" in scores for entry in summary["models"].values() for run in entry["runs"] for scores in (run.get("test") or {}).values()):
            _plot_lags(folder, summary)
    if (folder / INFLUENCE).is_file():
        _plot_influence(folder, json.loads((folder / INFLUENCE).read_text()))
    console.print(CLAIM)
    slim = [{**summary, "models": {m: {k: v for k, v in entry.items() if k != "runs"} for m, entry in summary["models"].items()}} for summary in found]
    write_whole(folder / TABLE, json.dumps(slim, indent=1) + "\n", "--out", "the table")
    write_whole(folder / "table.md", "\n".join(pages), "--out", "the table")


def _caption(summary: dict[str, Any]) -> str:
    counts = sorted({len(entry["runs"]) for entry in summary["models"].values()})
    seeds = f"{' or '.join(map(str, counts))} seed{'s' * (counts[-1] > 1)}"
    searched = {tuple(summary["rates"][model]) for model in summary["models"] if len(summary["rates"][model]) > 1}
    shown = f"rates {', '.join(f'{x:g}' for x in min(searched))}" if len(searched) == 1 else "each model's rates"
    rates = f"best of {shown} by validation ({summary['rate search']})" if searched else "rates as given"
    facts, scan = summary["machine"], "" if summary["versions"]["mamba_ssm"] else "; Mamba-2 by the PyTorch scan of transformers"
    lags = summary["data"].get("lags")
    reach = "" if lags is None else "; lags " + ", ".join(f"{point}: {low}..{high}" for point, (low, high) in lags.items())
    return (f"{summary['title']}: {summary['metric']} ({summary['better']} is better), {summary['steps']} steps of {summary['tokens of a batch']} tokens, "
            f"{seeds}, {rates}; {facts['gpu'] or facts['cpu']}, torch {facts['torch']}{scan}{reach}")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8eaee", "axes.axisbelow": True,
                         "axes.edgecolor": "#b9bec7", "legend.frameon": False, "font.size": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plot_losses(folder: Path, summary: dict[str, Any]) -> None:
    figure, (axis,) = _figure(7.0, 4.2)
    for model, entry in summary["models"].items():
        for i, run in enumerate(entry["runs"]):
            step, loss = np.array(run["curve"]).T if run["curve"] else (np.zeros(0), np.zeros(0))
            width = max(1, len(loss) // 60)
            smooth = np.convolve(loss, np.ones(width) / width, mode="valid") if len(loss) else loss
            axis.plot(step[len(step) - len(smooth) :], smooth, color=COLOURS[model], lw=1.6, ls=SEED_LINES[i % len(SEED_LINES)],
                      label=f"{models.TITLES[model]}, seed {run['seed']}")
    axis.set(xlabel="step", ylabel="training loss, nats an answer", title=f"{summary['title']}: {summary['batch']} examples a step")
    axis.legend()
    _save(figure, folder / summary["task"] / "loss.png")


def _plot_lags(folder: Path, summary: dict[str, Any]) -> None:
    """Accuracy against the lag: eighths of every test point's range, a line a seed, which may have learnt or not; partial rules as ticks."""
    figure, (axis,) = _figure(7.4, 4.7)
    axis.set_xscale("log")
    for model, entry in summary["models"].items():
        tests = [run["test"] for run in entry["runs"] if run.get("test")]
        for i, test in enumerate(tests):
            lags = {int(lag): y for point in summary["points"] for lag, y in test[point]["lags"].items()}
            axis.plot(sorted(lags), [lags[lag] for lag in sorted(lags)], color=COLOURS[model], marker="o", ms=3.0, lw=1.3, ls=SEED_LINES[i % len(SEED_LINES)],
                      label=f"{models.TITLES[model]}, seed {entry['runs'][i]['seed']}")
    low_high = summary["data"]["lags"]
    for point in summary["points"]:
        told = -1.0
        for name, height in sorted(summary["yardsticks"][point].items(), key=lambda pair: pair[1]):
            axis.plot(low_high[point], [height] * 2, color="#8a8f98", lw=0.9, ls=":")
            if point == summary["points"][-1] and height >= 0.1 and height > told + 0.03:
                told = height
                axis.annotate(name, (low_high[point][1], height), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7, color="#6a707a")
    axis.set_xlim(None, 2.1 * low_high[summary["points"][-1]][1])
    ticks = [round(sum(low_high[point]) / 2) for point in summary["points"]]
    axis.set_xticks(ticks, [f"{tick}\n{point}" for tick, point in zip(ticks, summary["points"], strict=True)])
    axis.set_xticks([], minor=True)
    axis.set(xlabel="lag, tokens", ylabel="accuracy", ylim=(-0.02, 1.04), title=f"{summary['title']}; dotted: what partial knowledge gives")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    _save(figure, folder / summary["task"] / "accuracy.png")


def write_influence(machine: Machine, console: Console) -> None:
    """influence.json: ||dy_t/dx_0|| of every model of the first task with finished runs, of its best seed by validation, before and after training, on the same
    noise; K of Sessa's layers."""
    found = summaries(machine.folder)
    if not found:
        return
    summary = next((s for s in found if s["task"].startswith("mqar")), found[0])
    path = machine.folder / INFLUENCE
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("task") != summary["task"]:
        known = {"task": summary["task"], "title": summary["title"], "tokens": NOISE_TOKENS, "models": {}}
    rows = next(iter(summary["models"].values()))["runs"][0]
    vocabulary = _vocabulary(summary, machine.folder)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, min(80, vocabulary), (1, NOISE_TOKENS)))
    for model, entry in summary["models"].items():
        run, file = min(zip(entry["runs"], entry["files"], strict=True), key=lambda pair: pair[0]["validation"]["loss"] if pair[0]["validation"] else np.inf)
        if file == known["models"].get(model, {}).get("file"):
            continue
        console.print(f"influence of {models.TITLES[model]}, seed {run['seed']}, before and after training", highlight=False)
        built = models.build(model, vocabulary, rows["width"], rows["layers"], seed=run["seed"])
        known["models"][model] = {"file": file, "seed": run["seed"]}
        for when in ("before", "after"):
            if when == "after":
                built.load_state_dict(torch.load(machine.folder / f"{file}.pt", map_location="cpu", weights_only=True))
            known["models"][model][when] = models.reach(built, ids, [0], PROBES)[:, 0].tolist()
            if isinstance(built, SessaLM) and model == "sessa":
                known["models"][model][f"layers {when}"] = [_slopes(layer) for layer in measure(built, ids[0].tolist(), 1)["layers"]]
    write_whole(path, json.dumps(known) + "\n", "--out", "the influence curves")


def _slopes(layer: dict[str, Any]) -> dict[str, Any]:
    """What the picture needs of a layer's K: rms by octaves of lags, and mean gamma."""
    octaves = [(o["from"] * 2**0.5, o["rms"]) for o in layer["sources"][0]["slopes"] if o["rms"] > 0]
    return {"layer": layer["layer"], "gamma": layer["gamma"]["mean"], "lags": [x for x, _ in octaves], "rms": [y for _, y in octaves]}


def _vocabulary(summary: dict[str, Any], folder: Path) -> int:
    file = next(iter(summary["models"].values()))["files"][0]
    state = torch.load(folder / f"{file}.pt", map_location="cpu", weights_only=True, mmap=True)
    return next(int(x.shape[0]) for name, x in state.items() if "lm_head" in name)


def _octaves(curve: Sequence[float]) -> tuple[list[float], list[float]]:
    """(middles, rms) of the octaves of lags 1.., as shares of lag 0."""
    values, x, y, lag = np.asarray(curve), [], [], 1
    while 2 * lag <= len(values):
        x.append(lag * 2**0.5)
        y.append(float(np.sqrt(np.mean(np.square(values[lag : 2 * lag]))) / values[0]))
        lag *= 2
    return x, y


def _plot_influence(folder: Path, found: dict[str, Any]) -> None:
    """End to end, all models, before and after training; and K of Sessa's layers likewise."""
    sessa = found["models"].get("sessa")
    figure, axes = _figure(12.0 if sessa else 6.8, 4.4, 2 if sessa else 1)
    for model, curves in found["models"].items():
        axes[0].plot(*_octaves(curves["before"]), color=COLOURS[model], lw=1.0, ls="--")
        axes[0].plot(*_octaves(curves["after"]), color=COLOURS[model], lw=1.9, marker="o", ms=3.5, label=f"{models.TITLES[model]}, seed {curves['seed']}")
    lag = np.array([1.5, found["tokens"] / 1.5])
    axes[0].plot(lag, 0.5 / lag, color="#22262e", lw=0.9, ls=":", label="slope -1")
    axes[0].set(xscale="log", yscale="log", xlabel="lag, tokens", ylabel=r"$\|dy_t/dx_0\|$ beside that at lag 0, rms of an octave",
                title=f"{found['title']}, end to end on noise: dashed before training")
    axes[0].legend(fontsize=8.5)
    if sessa:
        import matplotlib

        for when, style in (("before", {"lw": 1.0, "ls": "--"}), ("after", {"lw": 1.8, "marker": "o", "ms": 3.5})):
            for i, layer in enumerate(sessa[f"layers {when}"]):
                colour = matplotlib.colormaps["plasma"](0.8 * i / max(1, len(sessa[f"layers {when}"]) - 1))
                axes[1].plot(layer["lags"], layer["rms"], color=colour, **style,
                             label=f"layer {layer['layer']}, mean γ {layer['gamma']:+.2f}" if when == "after" else None)
        axes[1].plot(lag, 1.0 / (1.0 + lag), color="#22262e", lw=1.2, ls=":", label="even attention, 1/(t+1)")
        axes[1].set(xscale="log", yscale="log", xlabel="lag, tokens", ylabel=r"$|K[t, 0]|$, rms of an octave",
                    title="feedback of Sessa's layers: dashed before training")
        axes[1].legend(fontsize=8.5)
    _save(figure, folder / "influence.png")
