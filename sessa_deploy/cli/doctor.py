"""`sessa-deploy doctor`: what is installed, what is missing and the command that mends it."""

from __future__ import annotations

from typing import Any

import click

from sessa_deploy.cli.options import FILE, PATH
from sessa_deploy.cli.output import JsonCommand, check_outputs, to_stdout, write_json


@click.command("doctor", cls=JsonCommand)
@click.argument("bundle", type=PATH, required=False)
@click.option("--json", "json_file", type=FILE, metavar="[FILE]", help="Print the findings as JSON instead, or write them to a file too.")
def command(bundle: str | None, json_file: str | None) -> None:
    """Show this machine's Python, packages, ONNX Runtime providers, GPUs and the road to TensorRT; what is missing comes with the command that mends it.

    With BUNDLE, also which of its TensorRT engines would load here.
    """
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.doctor import examine

    check_outputs({"--json": (json_file, "the findings")})
    findings = examine(None if bundle is None else Bundle.open(bundle, verify=False))
    if not to_stdout(json_file):
        _show(findings)
    if json_file is not None:
        write_json(json_file, findings, "the findings")


def _show(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="sessa-deploy doctor")
    for name in ("for", "what", "found"):
        table.add_column(name, overflow="fold")
    colours = {"ok": "green", "missing": "red", "optional": "yellow"}
    for check in findings["checks"]:
        table.add_row(check["use"], check["name"], f"[{colours[check['state']]}]{escape(check['found'])}[/]")
    console.print(table)
    for check in findings["checks"]:
        if check["mend"]:
            console.print(f"{check['name']}: {check['mend']}", style=colours[check["state"]], highlight=False, markup=False, soft_wrap=True)
    console.print("ready: " + ", ".join(findings["ready"] or ["nothing yet"]), highlight=False, soft_wrap=True)
