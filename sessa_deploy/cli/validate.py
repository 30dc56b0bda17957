"""sessa-deploy validate: prove a bundle's numbers against its checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sessa_deploy.cli.options import BACKEND, NOT_NEGATIVE, PATH, PLACE, POSITIVE_INT, SEED
from sessa_deploy.cli.output import check_outputs, to_stdout, write_json, write_text
from sessa_deploy.errors import ParityError, SessaError, UserError, need
from sessa_deploy.files import check_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sessa_deploy.export.parity.process import Progress
    from sessa_deploy.export.parity.verdict import Report


@click.command("validate", short_help="Prove a bundle's numbers against its checkpoint, rung by rung.")
@click.argument("bundle", type=PLACE)
@click.option("--checkpoint", type=PLACE, help="The checkpoint the bundle was exported from.")
@click.option("--config", type=PLACE, help="config.json of a checkpoint that has none beside it.")
@click.option("--backend", "backends", type=BACKEND, multiple=True, default=("auto",), show_default=True, metavar="NAME",
              help="Engine to judge: auto, ort, ort-cuda or trt. Repeat it for several.")
@click.option("--json", "json_file", type=PLACE, help="Write every figure as JSON; - for standard output.")
@click.option("--report", "report_file", type=PLACE, help="Write one HTML file with plots and tables.")
@click.option("--dump", type=PLACE, metavar="DIR",
              help="Keep cases and tensors in DIR. Without --checkpoint: run the engines only, for a later --compare.")
@click.option("--compare", type=PLACE, metavar="DIR", help="Judge the tensors in DIR, dumped by another machine or interpreter.")
@click.option("--python", "python", type=PLACE, help="Interpreter for the engines' rungs, where they need another one.")
@click.option("--length", "lengths", multiple=True, type=POSITIVE_INT, help="Judge a prefill of this many tokens too, even beyond max_context. Repeat it.")
@click.option("--text", "texts", type=PATH, multiple=True, metavar="FILE",
              help="Judge a text too, encoded by the bundle's tokenizer; - for standard input. Weights in 8 bits are "
                   "judged on it; default: the checkpoint's held_out.txt.")
@click.option("--max-loss", type=NOT_NEGATIVE, metavar="PERCENT",
              help="Of weights in 8 bits: more bits per byte than the original ones may cost; default: 0.5 for int8, 1 for fp8.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of the token ids.")
@click.option("--record/--no-record", "record", default=True, show_default=True, help="Write parity.json into the bundle.")
def command(
    bundle: Path, checkpoint: Path | None, config: Path | None, backends: tuple[str, ...], json_file: Path | None, report_file: Path | None,
    dump: Path | None, compare: Path | None, python: Path | None, lengths: tuple[int, ...], texts: tuple[str, ...], max_loss: float | None, seed: int,
    record: bool,
) -> None:
    """Prove the numbers of BUNDLE against its checkpoint, rung by rung.

    Runs the model in float64, at the bundle's precision and in the engine on the same cases (prefill, decode, chunked, ragged, poisoned
    caches), and names the first output that diverges. A bundle with weights in 8 bits gets two verdicts: exactness, of the weights as they are stored, and
    worth, against the original ones on text. Exit code 0: passed, 1: failed, 2: bad input.
    """
    _check(checkpoint, dump, compare)
    if texts and compare is not None and not _eight_bits(bundle):
        raise UserError("--text and --compare exclude each other", got="both", allowed="the cases that were dumped", fix="give --text where --dump is given")
    check_outputs({"--json": (json_file, "the figures"), "--report": (report_file, "the report")})
    if dump is not None:
        check_folder(dump, "--dump", "the folder of tensors")
    if report_file is not None:
        need("matplotlib")
    from rich.console import Console

    from sessa_deploy.cli.inputs import encoded_texts, read_texts
    from sessa_deploy.export import parity
    from sessa_deploy.export.parity.process import ProcessLaunch

    notes, launch = Console(stderr=True), ProcessLaunch(python)
    given = read_texts(texts)
    judged = {} if compare is not None else encoded_texts(bundle, given)
    if checkpoint is None:
        assert dump is not None  # _check
        with _Bars(notes) as progress:
            rungs = parity.dump_engines(bundle, dump, backends, seed=seed, launch=launch, progress=progress, also=lengths, texts=judged)
        click.echo(f"dumped: {', '.join(rungs)} in {dump}")
        click.echo(f"next: sessa-deploy validate {shlex.quote(str(bundle))} --checkpoint CHECKPOINT --compare {shlex.quote(str(dump))}")
        return
    aside = to_stdout(json_file) or to_stdout(report_file)  # standard output then holds nothing but the file
    try:
        with _Bars(notes) as progress:
            report = parity.validate(bundle, checkpoint, backends, dump=dump, elsewhere=compare, seed=seed, launch=launch, progress=progress, also=lengths,
                                     config=config, texts=judged, worth_texts=given, max_loss=max_loss)
    except ParityError as error:
        line = f"parity: FAILED at {error}"
        _deliver(False, [*_writes(json_file, {"passed": False, "line": line}), lambda: click.echo(line, err=aside)])
        return
    writes = _writes(json_file, report.to_dict())
    if report_file is not None:
        from sessa_deploy.export.parity.report import render

        writes.append(lambda: write_text(report_file, render(report), "--report", "the report"))
    if record:
        try:
            parity.record(bundle, report)
        except (OSError, UserError) as error:
            click.echo(f"note: parity.json was not written into the bundle: {error}", err=True)
    _deliver(report.passed, [*writes, lambda: _show(report, Console(stderr=aside, width=None if notes.is_terminal else 120), aside)])


def _eight_bits(bundle: Path) -> bool:
    """Whether a bundle stores matrices in 8 bits, which are judged on text whatever tensors are compared; no bundle does."""
    from sessa_deploy.runtime.bundle import Bundle

    try:
        return Bundle.open(bundle, verify=False).weights is not None
    except UserError:  # which is told where the bundle is opened
        return False


def _check(checkpoint: Path | None, dump: Path | None, compare: Path | None) -> None:
    """Refuse options that would be passed over without a word."""
    context = click.get_current_context()
    given = {p.opts[0] for p in context.command.params if context.get_parameter_source(p.name or "") == click.core.ParameterSource.COMMANDLINE}
    if dump is not None and compare is not None:
        raise UserError("--dump and --compare exclude each other", got="both", fix="give one of them")
    if checkpoint is None and dump is None:
        raise UserError("validate needs the checkpoint", got="no --checkpoint", fix="add --checkpoint CHECKPOINT, or --dump DIR to run the engines only")
    idle = given & {"--backend", "--python", "--length", "--seed"} if compare is not None else set()
    if idle:
        raise UserError("--compare judges tensors that are there", got=", ".join(sorted(idle)), fix="give these options where the tensors are dumped")
    idle = given & {"--json", "--report", "--config", "--max-loss"} if checkpoint is None else set()
    if idle:
        raise UserError("without a checkpoint nothing is judged", got=", ".join(sorted(idle)), fix="add --checkpoint CHECKPOINT, or leave these options out")


def _writes(json_file: Path | None, data: dict[str, Any]) -> list[Callable[[], None]]:
    return [] if json_file is None else [lambda: write_json(json_file, data, indent=1)]


def _deliver(passed: bool, steps: Sequence[Callable[[], None]]) -> None:
    """Take every step whatever happens to the others: the verdict is said and the exit code is its own, though a file cannot be written."""
    failed: list[SessaError] = []
    for step in steps:
        try:
            step()
        except SessaError as error:
            failed.append(error)
        except SystemExit as stop:  # whoever read standard output has gone
            if stop.code:
                raise
    for told in failed:
        click.echo(f"error: {told}", err=True)
    if not passed or failed:
        sys.exit(2 if passed else 1)


def _show(report: Report, console: Console, aside: bool) -> None:
    from sessa_deploy.export.parity.engines import KERNELS

    console.print(_table(report))
    for name, info in report.rungs.items():
        if KERNELS in info["versions"]:
            click.echo(f"{name}: kernels of {info['versions'][KERNELS]}", err=aside)
    if report.failure is not None and report.failure.hint:
        click.echo(f"where to look: {report.failure.hint}", err=aside)
    for line in (*report.verdicts(), report.line()):
        click.echo(line, err=aside)


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
