"""One model, every way to run it, side by side on one GPU: TensorRT, ONNX Runtime with our kernels and without, our PyTorch (eager, compiled, CUDA graph),
the official layers in eager.

    python benchmarks/compare.py --size 350M                                                  PyTorch alone, random weights
    python benchmarks/compare.py --bundle m350 --build /tmp/engines --trt-python python3.10   with TensorRT and ONNX Runtime on that bundle
    python benchmarks/compare.py --points large --peers trt ort-cuda --build /tmp/engines      another model, of 1.1B parameters, exported first

Milliseconds a decode step (host clock, token ids back on the host after each one), time to the first token of a long prompt, tokens a second, device
memory, and the share of the bandwidth floor: every weight and every valid cache row read once a step. Each peer is a process of its own under its own
interpreter and time limit; one that fails has a row with the reason. The official layers take part where their package `sessa` is importable.
Prints tables with ratios, writes compare.json and compare.png. `--device cpu` rehearses it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, run_logged
from compare_peer import Point
from random_bundle import SIZES, VOCABULARY, config_of
from rich import box
from rich.console import Console
from rich.table import Table

from sessa_deploy.config import SessaConfig

PEERS = {"official": "official layers, eager", "eager": "ours, eager", "compile": "ours, compiled", "graph": "ours, CUDA graph",
         "compile-graph": "ours, compiled, CUDA graph", "ort": "ONNX Runtime, plain", "ort-cuda": "ONNX Runtime, our kernels", "trt": "TensorRT"}  # fmt: skip
ORDER = ("trt", "ort-cuda", "graph", "official", "eager", "ort", "compile-graph", "compile")  # of running: if the budget ends, it ends with the least
COLOURS = dict(zip(PEERS, ("#8c8c8c", "#9ecae1", "#6baed6", "#3182bd", "#08519c", "#fdbe85", "#fd8d3c", "#31a354"), strict=True))
HERE = Path(__file__).parent
POINTS = ("decode", "short", "small", "batch", "ragged", "prefill")
LARGE, LARGE_SIZE = "large", "1.1B"
Rows = dict[str, dict[str, Any]]


def points(given: argparse.Namespace) -> list[Point]:
    """What is timed, points of one shape next to each other."""
    crowd = (given.context,) * given.batch
    ragged = (given.context, *(given.short,) * (given.batch - 1))
    found = [Point("decode", given.capacity, (given.context,)), Point("short", given.capacity, (given.short,)),
             Point("prefill", given.capacity, (0,), given.prompt), Point("small", 2 * given.short, (given.short,)),
             Point("batch", given.batch_capacity, crowd), Point("ragged", given.batch_capacity, ragged),
             Point(LARGE, given.capacity, (given.context,), size=LARGE_SIZE)]  # fmt: skip
    return [p for p in found if p.name in given.points]


def describe(p: Point) -> str:
    """A point in words: what is timed, sequences x cached tokens, and the caches' capacity."""
    if p.prompt:
        return f"prompt of {p.prompt} to first token, capacity {p.capacity}"
    where = f"1 x {max(p.contexts)} + {p.batch - 1} x {min(p.contexts)}" if len(set(p.contexts)) > 1 else f"{p.batch} x {p.contexts[0]}"
    return f"{p.size}{', ' if p.size else ''}decode {where}, capacity {p.capacity}"


def large_bundle(given: argparse.Namespace, precision: str) -> Path | None:
    """The bundle of the large model, made where there is none yet and --build says where; None where neither."""
    if given.large_bundle or not given.build or not {"trt", "ort", "ort-cuda"}.intersection(given.peers):
        return given.large_bundle  # type: ignore[no-any-return]
    out = Path(given.build, f"{LARGE_SIZE}-{precision}")
    if not out.exists():
        given.build.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [sys.executable, str(HERE / "random_bundle.py"), "--size", LARGE_SIZE, "--precision", precision, "--out", str(out),
                   "--max-context", str(given.capacity)]  # fmt: skip
        code = run_logged(command, Path(given.build, "large.log"), given.limit)
        print(f"{LARGE_SIZE} exported in {time.monotonic() - began:.0f} s" if code == 0 else f"{LARGE_SIZE}: exit code {code}, see {given.build}/large.log",
              flush=True)  # fmt: skip
    return out if out.exists() else None


def work(peer: str, given: argparse.Namespace, config: SessaConfig, precision: str, folder: Path, limit: float,
         others: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run one peer's process for at most `limit` seconds; what it wrote, and for each point it did not reach the reason. others: size of another model than
    the run's -> what is different in the job."""
    python = {"trt": given.trt_python, "ort": given.ort_python, "ort-cuda": given.ort_python}.get(peer) or sys.executable
    wanted = points(given)
    if "compile" in peer:
        wanted.sort(key=lambda p: (p.size, p.prompt))  # what takes longest to compile comes last
    job = {"peer": peer, "config": config.to_dict(), "precision": precision, "points": [asdict(p) for p in wanted],
           "trt_bundles": [str(b) for b in given.trt_bundle], "others": others,
           **{k: None if getattr(given, k) is None else str(getattr(given, k)) for k in ("bundle", "checkpoint", "build", "device")},
           **{k: getattr(given, k) for k in ("warmup", "seconds", "steps", "max_seconds", "prefills", "opt_level", "max_prompt")}}  # fmt: skip
    (folder / f"{peer}.job.json").write_text(json.dumps(job))
    out, log = folder / f"{peer}.json", folder / f"{peer}.log"
    began = time.monotonic()
    code = run_logged([str(python), str(HERE / "compare_worker.py"), str(folder / f"{peer}.job.json"), str(out)], log, limit)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = (said[-1][:300] if said else "it said nothing") + (f" (exit code {code})" if code not in (0, 127) else "")
    if code == 124:
        reason = f"not reached in {limit:.0f} s"
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"points": {}}
    for p in wanted:
        result["points"].setdefault(p.name, {"error": reason})
    return result | {"seconds": time.monotonic() - began}


def figures(found: dict[str, dict[str, Any]], given: argparse.Namespace, bandwidth: float | None) -> dict[str, Rows]:
    """point -> peer -> figures, with floors and ratios."""
    table: dict[str, Rows] = {}
    for p in points(given):
        rows = {peer: dict(found[peer]["points"][p.name]) for peer in given.peers}
        for row in (r for r in rows.values() if "error" not in r):
            if bandwidth and row["bytes_per_step"]:
                row["floor_ms"] = 1e3 * row["bytes_per_step"] / bandwidth
                row["share_of_floor"] = row["floor_ms"] / row["p50_ms"]
            for other in ("official", "graph"):
                if "p50_ms" in rows.get(other, {}):
                    row[f"times_faster_than_{other}"] = rows[other]["p50_ms"] / row["p50_ms"]
        table[p.name] = rows
    return table


def goals(table: dict[str, Rows]) -> list[tuple[str, str, str, dict[str, float]]]:
    """(what, must, aim, peer -> found) of the figures that the model of 350M parameters in fp16 is to reach on an H200."""

    def each(name: str, key: str) -> dict[str, float]:
        return {peer: row[key] for peer, row in table.get(name, {}).items() if row.get(key) is not None}

    def beside(name: str) -> dict[str, float]:
        found = each(name, "p50_ms")
        return {"ort-cuda": found["ort-cuda"] / found["trt"]} if "ort-cuda" in found and "trt" in found else {}

    short, small = each("short", "p50_ms"), each("small", "p50_ms")
    return [
        ("decode, ms a token", "<= 0.56", "<= 0.45", each("decode", "p50_ms")),
        ("decode at the short context, ms a token", "<= 0.40", "<= 0.33", short),
        (f"{LARGE_SIZE}, share of the floor", ">= 0.65", ">= 0.78", each(LARGE, "share_of_floor")),
        ("large capacity against small, same context", "<= 1.3", "<= 1.05", {k: short[k] / small[k] for k in short if k in small}),
        ("batch, share of the floor", ">= 0.83", ">= 0.88", each("batch", "share_of_floor")),
        ("ragged batch, share of its floor", ">= 0.52", ">= 0.65", each("ragged", "share_of_floor")),
        ("prompt to first token, ms", "<= 32", "<= 26", each("prefill", "p50_ms")),
        ("prefill, times faster than the official layers", ">= 8", ">= 15", each("prefill", "times_faster_than_official")),
        ("decode, times faster than ours as a CUDA graph", ">= 1", ">= 1.3", each("decode", "times_faster_than_graph")),
        ("ort-cuda: decode, times TensorRT's ms", "<= 1.4", "<= 1.05", beside("decode")),
        ("ort-cuda: decode at the short context, times TensorRT's ms", "<= 1.5", "<= 1.05", beside("short")),
        ("ort-cuda: prompt, times TensorRT's ms", "<= 1.25", "<= 1", beside("prefill")),
    ]


def show(table: dict[str, Rows], found: dict[str, dict[str, Any]], given: argparse.Namespace, config: SessaConfig, title: str) -> None:
    """The tables, failures with their reasons below."""
    console = Console(width=140)
    view = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    for name in ("", "p50 ms", "p95 ms", "tokens/s", "official/it", "graph/it", "of the floor", "GiB"):
        view.add_column(name, justify="right" if name else "left", no_wrap=True)

    def number(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, form)

    failures: dict[str, list[str]] = {}
    for p in points(given):
        floor = next((row["floor_ms"] for row in table[p.name].values() if "floor_ms" in row), None)
        view.add_section()
        view.add_row(f"[bold]{describe(p)}[/]", *[""] * 5, f"[bold]{floor:.3f} ms[/]" if floor else "")
        for peer, row in table[p.name].items():
            if "error" in row:
                failures.setdefault(f"{PEERS[peer]}: {row['error']}", []).append(p.name)
                view.add_row(f"  {PEERS[peer]}", "failed")
                continue
            view.add_row(f"  {PEERS[peer]}", number(row, "p50_ms", ".3f"), number(row, "p95_ms", ".3f"),
                         number(row, "tokens_per_second", ".0f"), number(row, "times_faster_than_official", ".2f"),
                         number(row, "times_faster_than_graph", ".2f"), number(row, "share_of_floor", ".0%"), number(row, "device_bytes", ".2f", 2.0**-30))
    console.print(view, highlight=False)
    for reason, names in failures.items():
        console.print(f"{', '.join(names)}: {reason}", highlight=False, markup=False, soft_wrap=True)
    for peer, result in found.items():
        where, notes = result.get("environment", {}), result.get("notes", {})
        library = {"trt": "tensorrt", "ort": "onnxruntime", "ort-cuda": "onnxruntime"}.get(peer, "")
        versions = {"python": where.get("python"), library: where.get("packages", {}).get(library), **notes}
        console.print(f"{PEERS[peer]}: {', '.join(f'{n} {v}' for n, v in versions.items() if v)}", highlight=False, markup=False, soft_wrap=True)
    if (config.d_model, config.n_layers) == SIZES["350M"][:2]:
        view = Table(title="to reach in fp16 on an H200, with TensorRT", title_justify="left", box=box.SIMPLE)
        for name in ("", "must", "aim", *(PEERS[peer] for peer in PEERS if peer in given.peers and peer != "official")):
            view.add_column(name, justify="right" if name else "left")
        for what, must, aim, values in goals(table):
            view.add_row(what, must, aim, *(f"{values[peer]:.3g}" if peer in values else "-" for peer in PEERS if peer in given.peers and peer != "official"))
        console.print(view, highlight=False)


def plot(table: dict[str, Rows], given: argparse.Namespace, title: str, path: Path) -> None:
    """One panel a point: a bar a peer, milliseconds on a log axis, the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = points(given)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.5 * lines), squeeze=False, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    peers = [peer for peer in PEERS if peer in given.peers]
    for axis, p in zip(axes.flat, shown, strict=False):
        rows = table[p.name]
        for x, peer in enumerate(peers):
            ms = rows[peer].get("p50_ms")
            if ms is None:
                axis.text(x, 0.02, "none", transform=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=7, color="#a00000")
                continue
            axis.bar(x, ms, color=COLOURS[peer], width=0.8)
            axis.text(x, ms, f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}", ha="center", va="bottom", fontsize=8)
        floor = next((row["floor_ms"] for row in rows.values() if "floor_ms" in row), None)
        if floor:
            axis.axhline(floor, color="black", linestyle="--", linewidth=1)
        axis.set_title(describe(p) + (f"\nfloor {floor:.3g} ms (dashed)" if floor else ""), fontsize=9)
        axis.set(yscale="log", ylabel="ms", xlim=(-0.6, len(peers) - 0.4))
        axis.margins(y=0.15)
        axis.set_xticks(range(len(peers)), [PEERS[peer] for peer in peers], fontsize=7, rotation=25, ha="right", rotation_mode="anchor")
        axis.grid(True, axis="y", alpha=0.25)
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def model(given: argparse.Namespace) -> tuple[SessaConfig, str]:
    """(config, precision): the bundle's, the checkpoint's, or that of the given sizes."""
    for place in (given.bundle, *given.trt_bundle):
        if place is not None:
            manifest = json.loads(Path(place, "manifest.json").read_text())
            return SessaConfig.from_dict(manifest["config"]), str(manifest["precision"])
    if given.checkpoint:
        return SessaConfig.load(given.checkpoint), given.precision
    width, layers, heads = SIZES[given.size]
    return SessaConfig(d_model=given.d_model or width, n_layers=given.n_layers or layers, n_heads=given.n_heads or heads, vocab_size=given.vocabulary,
                       max_context=given.capacity), given.precision  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="350M", help="random weights of this size, unless a bundle or checkpoint is given")
    for name in ("--d-model", "--n-layers", "--n-heads"):
        add(name, type=int, help="instead of the size's")
    add("--vocabulary", type=int, default=VOCABULARY)
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp16", help="unless a bundle says it")
    add("--checkpoint", type=Path, help="weights of the PyTorch peers")
    add("--bundle", type=Path, help="for ONNX Runtime, with the library where `build --for ort` was run on it, and for TensorRT where it has a fitting engine")
    add("--trt-bundle", type=Path, action="append", default=[], help="a bundle with an engine; may be given several times")
    add("--build", type=Path, help="build the engines, and the graph for ort-cuda, that are missing in copies of the bundle in this folder")
    add("--opt-level", type=int, help="of those builds")
    add("--max-prompt", type=int, default=8192, help="tokens of a prefill step of those builds, all sequences together")
    add("--trt-python", help="interpreter, or a script that starts it, of the TensorRT peer")
    add("--ort-python", help="of both ONNX Runtime peers")
    add("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    add("--points", nargs="+", choices=[*POINTS, LARGE], default=list(POINTS), help=f"{LARGE}: one sequence of a model of {LARGE_SIZE} parameters")
    add("--large-bundle", type=Path, help="bundle of that model; default: one with random weights, made in --build and kept there")
    for name, value in (("--capacity", 32768), ("--context", 4096), ("--short", 128), ("--batch", 32), ("--batch-capacity", 8192), ("--prompt", 8192)):
        add(name, type=int, default=value)
    add("--warmup", type=float, default=0.2, help="seconds before steps count")
    add("--seconds", type=float, default=3.0, help="time at least this long")
    add("--steps", type=int, default=1000, help="and this many steps,")
    add("--max-seconds", type=float, default=15.0, help="but no longer than this")
    add("--prefills", type=int, default=5)
    add("--limit", type=float, default=600.0, help="seconds a peer may take in all")
    add("--budget", type=float, default=3600.0, help="seconds all peers may take together")
    add("--bandwidth", type=float, help="GB/s of the memory; default: measured by a copy")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.peers = [peer for peer in PEERS if peer in given.peers]
    return given


def main() -> None:
    given = parse()
    config, precision = model(given)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    began = time.monotonic()
    others: dict[str, dict[str, Any]] = {}
    if LARGE in given.points:
        large = large_bundle(given, precision)
        others[LARGE_SIZE] = {"config": config_of(LARGE_SIZE, max_context=given.capacity).to_dict(), "bundle": large and str(large), "trt_bundles": [],
                              "checkpoint": None, "build": given.build and str(given.build / LARGE_SIZE)}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for peer in sorted(given.peers, key=ORDER.index):
            limit = min(given.limit, given.budget - (time.monotonic() - began))
            found[peer] = work(peer, given, config, precision, Path(folder), max(limit, 0.0), others)
            reached = sum("error" not in row for row in found[peer]["points"].values())
            print(f"{PEERS[peer]}: {reached} of {len(found[peer]['points'])} points in {found[peer]['seconds']:.0f} s", flush=True)
    measured = [float(result["bandwidth"]) for result in found.values() if result.get("bandwidth")]
    bandwidth = 1e9 * given.bandwidth if given.bandwidth else max(measured, default=None)
    table = figures(found, given, bandwidth)
    where = next((result["environment"] for result in found.values() if "environment" in result), {})
    gpu = where["gpus"][0]["name"] if where.get("gpus") else given.device
    title = f"d_model {config.d_model}, {config.n_layers} layers, {config.n_heads} heads, vocabulary {config.vocab_size}, {precision}, {gpu}"
    title += f", copies at {bandwidth / 1e12:.2f} TB/s" if bandwidth else ""
    places = ("bundle", "trt_bundle", "large_bundle", "checkpoint", "build", "out")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items() if k not in places}
    (given.out / "compare.json").write_text(json.dumps({
        "schema_version": 1, "config": config.to_dict(), "precision": precision, "bandwidth": bandwidth, "settings": settings,
        "peers": {peer: {k: result.get(k) for k in ("environment", "notes", "seconds")} for peer, result in found.items()}, "points": table,
        "goals": [{"what": what, "must": must, "aim": aim, "found": values} for what, must, aim, values in goals(table)],
    }, indent=1) + "\n")  # fmt: skip
    show(table, found, given, config, title)
    plot(table, given, title, given.out / "compare.png")
    print(given.out / "compare.json")


if __name__ == "__main__":
    main()
