"""`sessa-deploy inspect`: show what a checkpoint, an ONNX file or a bundle holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from sessa_deploy.cli.options import FILE, PATH
from sessa_deploy.cli.output import JsonCommand, check_outputs, size, to_stdout, write_json
from sessa_deploy.contract import ORT_ENGINE
from sessa_deploy.errors import one_line


@click.command("inspect", cls=JsonCommand)
@click.argument("path", type=PATH)
@click.option("--json", "json_file", type=FILE, metavar="[FILE]", help="Print JSON instead of tables, or write it to a file too.")
@click.option("--all", "show_all", is_flag=True, help="List every tensor and node; otherwise the first of them.")
@click.option("--config", "config_file", type=PATH, help="config.json of a checkpoint that has none beside it.")
@click.option("--no-verify", is_flag=True, help="Skip loading the checkpoint, or checking the bundle's checksums.")
def command(path: str, json_file: str | None, show_all: bool, config_file: str | None, no_verify: bool) -> None:
    """Show what PATH holds: a checkpoint (folder, .safetensors, .pt, .ckpt), an .onnx file or a bundle.

    Exits with 2 when `export` would refuse a checkpoint, in the same words, or when a bundle does not match its manifest.
    """
    from sessa_deploy.describe import describe
    from sessa_deploy.errors import UserError

    check_outputs({"--json": (json_file, "the findings")})
    found = describe(path, verify=not no_verify, config_file=config_file)
    if found["kind"] == "bundle" and found["engines"] and found["verified"] is not False:
        from sessa_deploy.runtime import environment
        from sessa_deploy.runtime.bundle import Bundle
        from sessa_deploy.runtime.doctor import engine_here
        from sessa_deploy.runtime.ort.prepared import describe as describe_prepared

        bundle = Bundle.open(path, verify=False)
        found |= describe_prepared(bundle)
        if any(not name.startswith(f"{ORT_ENGINE}-") for name in found["engines"]):
            found["engine_here"] = engine_here(bundle, environment.gpus())
    for line in found.get("notes", ()):
        click.echo(f"note: {line}", err=True)
    if not to_stdout(json_file):
        _show(found, show_all)
    if json_file is not None:
        write_json(json_file, found, "the findings")
    if found["verified"] is False:
        raise UserError(found["problem"])


def _show(found: dict[str, Any], show_all: bool) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    {"checkpoint": _checkpoint, "onnx": _onnx, "bundle": _bundle}[found["kind"]](console, found, None if show_all else 24)
    good = "complete" if found["kind"] == "onnx" else "verified"
    verdict = {True: f"[green]{good}[/]", False: "[red]FAILED[/]", None: "not verified"}[found["verified"]]
    console.print(f"{verdict}{': ' if found.get('problem') else ''}", end="")
    console.print(found.get("problem") or "", markup=False, highlight=False, soft_wrap=True)


def _facts(console: Any, title: str, facts: dict[str, object]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(one_line(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(escape(one_line(str(name))), escape(one_line(str(value))))
    console.print(table)


def _rows(console: Any, title: str, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]], limit: int | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows[:limit]:
        table.add_row(*(escape(one_line(str(x))) for x in row))
    if limit is not None and len(rows) > limit:
        table.add_row(f"and {len(rows) - limit} more", *[""] * (len(columns) - 1), style="dim")
    console.print(table)


def _config(config: dict[str, Any] | None) -> dict[str, object]:
    hidden = ("model_type", "architectures")
    return {"config": "none"} if not isinstance(config, dict) else {k: v for k, v in config.items() if k not in hidden and v is not None}


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in values.items()) or "none"


def _checkpoint(console: Any, found: dict[str, Any], limit: int | None) -> None:
    _facts(console, f"checkpoint {found['path']}", {
        "parameters": f"{found['parameters']:,} ({_pairs(found['parts'])})", "tensors by dtype": _pairs(found["dtypes"]),
        "size": f"{size(found['bytes'])} in {', '.join(found['files'])}", "tokenizer": "tokenizer.json" if found["tokenizer"] else "none",
        "chat template": found["chat_template"] or "none",
        **_config(found["config"]),
    })
    rows = [(t["name"], t["dtype"], tuple(t["shape"]), size(t["bytes"]), t["file"]) for t in found["tensors"]]
    _rows(console, "tensors", ("name", "dtype", "shape", "size", "file"), rows, limit)


def _onnx(console: Any, found: dict[str, Any], limit: int | None) -> None:
    _facts(console, f"ONNX {found['path']}", {
        "opsets": _pairs(found["opsets"]), "IR version": found["ir_version"], "producer": found["producer"] or "unknown", "nodes": f"{found['nodes']:,}",
        "initializers": f"{found['initializers']:,} ({_pairs(found['parameters'])})", "size": size(found["bytes"]),
        "external data": ", ".join(f"{k} {size(v)}" for k, v in found["external_data"].items()) or "none", "ops": _pairs(found["ops"]),
    })
    for title in ("inputs", "outputs"):
        _rows(console, title, ("name", "dtype", "dims"), [(v["name"], v["dtype"], ", ".join(map(str, v["dims"])) or "scalar") for v in found[title]], limit)
    if found["functions"]:
        rows = [(f"{f['domain']}::{f['name']}", f["nodes"], ", ".join(f["inputs"]), _pairs(f["opsets"])) for f in found["functions"]]
        _rows(console, "functions", ("name", "nodes", "inputs", "opsets"), rows, None)
    if found["custom_nodes"]:
        nodes = [(n["op"], n["name"], ", ".join(f"{k}={v:.6g}" for k, v in n["attributes"].items())) for n in found["custom_nodes"]]
        _rows(console, "nodes outside the standard domains", ("op", "name", "attributes"), nodes, limit)


def _engine(here: dict[str, Any] | None) -> dict[str, object]:
    """Which engine would load on this machine, or why none."""
    if here is None:
        return {}
    fix = f"; fix: {here['mend']}" if here["mend"] else ""
    return {"engine for this machine": here["engine"] or f"none: {here['why']}{fix}"}


def _prepared(found: dict[str, Any]) -> dict[str, object]:
    """What a graph prepared for ONNX Runtime holds, or why it is not used."""
    here = found.get("prepared")
    if here is None:
        return {}
    if here["why"]:
        return {"for ONNX Runtime": f"none: {here['why']}; fix: {here['mend']}"}
    eight = f", weights in 8 bits {size(here['eight_bytes'])}" if here["eight_bytes"] else ""
    return {"for ONNX Runtime": f"{here['folder']}, layers by {'the library' if here['layers'] == 'plugin' else 'ONNX Runtime'} ({_pairs(here['ops'])}){eight}"}


def _weights(found: dict[str, Any]) -> dict[str, object]:
    """How matrices are stored where not in the precision, and what they take."""
    said, sizes = found.get("weights"), found.get("weight_bytes")
    if not isinstance(said, dict):
        return {}
    kept = said.get("kept") or []
    facts: dict[str, object] = {"weights": f"{said.get('format')}, one scale an output channel"
                                           + (f"; kept in the precision: {', '.join(map(str, kept))}" if kept else "")}
    if sizes and sizes["ratio"]:
        facts["in 8 bits"] = f"{size(sizes['eight'])} with scales, {sizes['ratio']:.3f} x of {found['precision']}"
        facts["all weights"] = f"{size(sizes['total'])}, {sizes['total_ratio']:.3f} x of {found['precision']}"
    return facts


def _bundle(console: Any, found: dict[str, Any], limit: int | None) -> None:
    versions = found["versions"] if isinstance(found["versions"], dict) else {}
    _facts(console, f"bundle {found['path']}", {
        "precision": found["precision"], **_weights(found),
        "opset": found["opset"], "schema": found["schema_version"], "size": size(found["bytes"]),
        "chat template": found["chat_template"] or "none",
        "engines": ", ".join(f"{n} (adds {size(found['engine_bytes'][n])})" for n in found["engines"]) or "none",
        **_engine(found.get("engine_here")), **_prepared(found), "versions": _pairs(versions), **_config(found["config"]),
    })
    rows = [(name, size(e.get("size")), str(e.get("sha256"))[:16]) for name, e in found["files"].items()]
    _rows(console, "files", ("name", "size", "sha256"), rows, limit)
