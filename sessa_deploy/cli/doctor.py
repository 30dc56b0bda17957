"""`sessa-deploy doctor`: what is installed, what is missing and the command that mends it."""

from __future__ import annotations

from typing import Any

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Show this machine's Python, packages, ONNX Runtime providers, GPUs and plugin library; what is missing comes with the command that mends it."""
    import json

    from sessa_deploy.runtime.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps(findings, indent=2))
        return
    _show(findings)


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
