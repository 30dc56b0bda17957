"""sessa-deploy validate: prove a bundle's numbers against its checkpoint."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sessa_deploy.errors import ParityError, UserError, need

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sessa_deploy.export.parity_process import Progress
    from sessa_deploy.export.parity_verdict import Report


@click.command("validate", short_help="Prove a bundle's numbers against its checkpoint, rung by rung.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The checkpoint the bundle was exported from.")
@click.option("--backend", "backends", multiple=True, default=("auto",), show_default=True, metavar="NAME",
              help="Engine to judge: auto, ort, ort-cuda or trt. Repeat it for several.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every figure as JSON.")
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Write one HTML file with plots and tables.")
@click.option("--dump", type=click.Path(path_type=Path), metavar="DIR",
              help="Keep cases and tensors in DIR. Without --checkpoint: run the engines only, for a later --compare.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="DIR", help="Judge the tensors in DIR, dumped by another machine or interpreter.")
@click.option("--python", "python", type=click.Path(path_type=Path), help="Interpreter for the engines' rungs, where they need another one.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=1), help="Judge a prefill of this many tokens too. Repeat it for several.")
@click.option("--seed", default=0, show_default=True, help="Seed of the token ids.")
@click.option("--record/--no-record", "record", default=True, show_default=True, help="Write parity.json into the bundle.")
def command(
    bundle: Path, checkpoint: Path | None, backends: tuple[str, ...], json_file: Path | None, report_file: Path | None, dump: Path | None,
    compare: Path | None, python: Path | None, lengths: tuple[int, ...], seed: int, record: bool,
) -> None:
    """Prove the numbers of BUNDLE against its checkpoint, rung by rung.

    Runs the model in float64, at the bundle's precision and in the engine on the same cases (prefill, decode, chunked, ragged, poisoned
    caches), and names the first output that diverges. Exit code 0: passed, 1: failed, 2: bad input.
    """
    if dump is not None and compare is not None:
        raise UserError("--dump and --compare exclude each other", got="both", fix="give one of them")
    if report_file is not None:
        need("matplotlib")
    from rich.console import Console

    from sessa_deploy.export import parity
    from sessa_deploy.export.parity_cases import LENGTHS
    from sessa_deploy.export.parity_process import ProcessLaunch

    notes = Console(stderr=True)
    all_lengths, launch = (*LENGTHS, *lengths), ProcessLaunch(python)
    if checkpoint is None:
        if dump is None:
            raise UserError("validate needs the checkpoint", got="no --checkpoint", fix="add --checkpoint CHECKPOINT, or --dump DIR to run the engines only")
        with _Bars(notes) as progress:
            rungs = parity.dump_engines(bundle, dump, backends, seed=seed, lengths=all_lengths, launch=launch, progress=progress)
        click.echo(f"dumped: {', '.join(rungs)} in {dump}")
        click.echo(f"next: sessa-deploy validate {bundle} --checkpoint CHECKPOINT --compare {dump}")
        return
    try:
        with _Bars(notes) as progress:
            report = parity.validate(bundle, checkpoint, backends, dump=dump, elsewhere=compare, lengths=all_lengths, seed=seed, launch=launch,
                                     progress=progress)
    except ParityError as error:
        click.echo(f"parity: FAILED at {error}")
        sys.exit(1)
    if json_file is not None:
        _write(json_file, json.dumps(report.to_dict(), indent=1) + "\n")
    if report_file is not None:
        from sessa_deploy.export.parity_report import write_report

        write_report(report, report_file)
    if record:
        try:
            parity.record(bundle, report)
        except (OSError, UserError) as error:
            click.echo(f"note: parity.json was not written into the bundle: {error}", err=True)
    Console(width=None if notes.is_terminal else 120).print(_table(report))
    if report.failure is not None and report.failure.hint:
        click.echo(f"where to look: {report.failure.hint}")
    click.echo(report.line())
    if not report.passed:
        sys.exit(1)


class _Bars:
    """A progress bar a rung on stderr; silent where that is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True,
                              disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self._advance

    def __exit__(self, *caught: object) -> None:
        self._bars.stop()

    def _advance(self, rung: str, done: int, of: int) -> None:
        if rung not in self._tasks:
            self._tasks[rung] = self._bars.add_task(rung, total=of)
        self._bars.update(self._tasks[rung], completed=done)  # type: ignore[arg-type]


def _table(report: Report) -> Table:
    """Layers down, rungs across: the largest share of its limit that any output of the layer used, in any case."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"share of the limit used, worst case ({report.precision})", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("")
    for rung, mode in report.judged:
        table.add_column(f"{rung}\n{mode}", justify="right")
    worst = report.worst()
    for layer in [*range(report.config.n_layers), None]:
        row = []
        for pair in report.judged:
            found = [c for c in worst if (c.rung, c.mode) == pair and c.layer == layer]
            if not found:
                row.append("-")
                continue
            c = max(found, key=lambda c: (c.verdict != "pass", c.score))
            row.append(f"{c.score:.0%} {c.field if layer is not None else ''}".strip() if c.verdict == "pass" else f"[bold red]{c.score:.3g}x {c.field}[/]")
        table.add_row("logits" if layer is None else f"layer {layer}", *row)
    table.add_section()
    tokens = {(t.rung, t.mode): t for t in report.tokens}
    table.add_row("greedy", *(f"{tokens[p].agree}/{tokens[p].steps}" for p in report.judged))
    kl = {p: max((c.kl for c in report.comparisons if (c.rung, c.mode) == p and c.kl is not None), default=None) for p in report.judged}
    table.add_row("KL, nats", *("-" if kl[p] is None else f"{kl[p]:.1e}" for p in report.judged))
    return table


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise UserError("the figures cannot be written", got=f"{path} ({error.strerror})", fix="choose another --json FILE") from None
