"""`sessa-deploy influence`: how far back each layer of a checkpoint reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sessa_deploy.cli.options import COUNT, DEVICE, LAGS, PATH, PLACE, POSITIVE_INT, SEED, TEXT, Integer
from sessa_deploy.cli.output import JsonCommand, check_outputs, to_stdout, write_json
from sessa_deploy.errors import UserError, need


@click.command("influence", cls=JsonCommand)
@click.argument("checkpoint", type=PLACE)
@click.option("--prompt", type=TEXT, help="A text, encoded by the checkpoint's tokenizer; default: uniform token ids of --seed.")
@click.option("--tokens", type=PATH, metavar="FILE", help="Token ids instead, with white space between; - for standard input.")
@click.option("--sources", type=POSITIVE_INT, help="How many source positions: the first at 0, the rest log-spaced; default: 16, or as many as there are.")
@click.option("--lags", type=LAGS, metavar="N,N", help="Lags to list, as in 1,4,16; default: log-spaced.")
@click.option("--context", type=Integer(2), help="Tokens of the text, at most; default: all, and of random ones the model's max_context, 2048 at most.")
@click.option("--layer", type=COUNT, help="This layer alone, counted from 0; default: every layer.")
@click.option("--end-to-end", is_flag=True, help="Also ||dy_t/dx_tau|| through the layers with the routing free to move: float64, on the CPU.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random token ids and of --end-to-end's probes.")
@click.option("--config", type=PLACE, help="config.json of a checkpoint that has none beside it.")
@click.option("--device", type=DEVICE, metavar="auto|cpu|cuda|cuda:N", default="auto", show_default=True, help="auto is the first GPU where there is one.")
@click.option("--json", "json_file", type=PLACE, metavar="FILE", help="Write every figure as JSON; - for standard output.")
@click.option("--plot", type=PLACE, metavar="FILE", help="Draw the curves: a .png, .svg or .pdf file.")
def command(
    checkpoint: Path, prompt: str | None, tokens: str | None, sources: int | None, lags: tuple[int, ...] | None, context: int | None, layer: int | None,
    end_to_end: bool, seed: int, config: Path | None, device: str, json_file: Path | None, plot: Path | None,
) -> None:
    """Measure how far back the layers of CHECKPOINT reach: the influence K[t,tau] of an old token on every later one.

    Read the slope of log |K| against log lag, octave by octave: a power law keeps it, an exponential doubles it each time. A Transformer that attends evenly
    has 1/(t+1), slope -1.
    """
    need("torch", "safetensors")
    if prompt is not None and tokens is not None:
        raise UserError("--prompt and --tokens exclude each other", got="both", fix="give one of them")
    check_outputs({"--json": (json_file, "the figures"), "--plot": (plot, "the picture")})
    from sessa_deploy import influence
    from sessa_deploy.cli.inputs import parse_ids, read_text
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.train_options import find_device

    influence.refuse_bundle(checkpoint)
    if plot is not None:
        need("matplotlib")
        from sessa_deploy.influence_plot import plot_format, write_plot

        plot_format(plot)
    given = None if tokens is None else parse_ids(read_text(tokens, "--tokens"), "--tokens")

    def note(line: str) -> None:
        click.echo(f"note: {line}", err=True)

    model = influence.load(checkpoint, config, find_device(device), note)
    ids = influence.text_ids(checkpoint, model.config, prompt, given, context, seed, note)
    with count_progress("end to end", least=0) as progress:
        report = influence.measure(model, ids, sources, lags, layer, end_to_end, seed, progress)
    of = "the prompt" if prompt is not None else "the tokens given" if tokens is not None else f"uniform token ids, seed {seed}"
    report = {"checkpoint": str(checkpoint), "text": of, **report}
    if plot is not None:
        write_plot(plot, report, f"{checkpoint.name or checkpoint}: how far back its layers reach, on {of}")
    if json_file is not None:
        write_json(json_file, report, indent=1)
    if not to_stdout(json_file):
        _show(report, influence.even_attention(report["context"]))


def _show(report: dict[str, Any], even: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first = report["layers"][0]["sources"][0]
    shown = [o["from"] for o in first["slopes"] if o["from"] >= 4][-4:]
    terminal = Console().is_terminal
    table = Table(title=f"influence of the token at position 0, {report['context']} tokens: {report['text']}", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("layer", "gamma", "range", "eta", *(f"{lag}..{2 * lag - 1}" for lag in shown), "fit"):
        table.add_column(name, justify="right")
    table.add_column("tail")
    for layer in report["layers"]:
        gamma = layer["gamma"]
        table.add_row(str(layer["layer"]), f"{gamma['mean']:+.2f}", f"{gamma['min']:+.2f}..{gamma['max']:+.2f}", f"{layer['eta']:.3g}",
                      *_tail(layer["sources"][0], shown))
    if "end_to_end" in report:
        name = "all" if report["end_to_end"]["layer"] is None else str(report["end_to_end"]["layer"])
        table.add_row(f"{name}, end to end", "", "", "", *_tail(report["end_to_end"]["sources"][0], shown))
    table.add_section()
    table.add_row("even attention", "", "", "", *_tail(even, shown))
    Console(width=None if terminal else 120).print(table)
    click.echo("lags a..b: rms of K over them; fit: slope of log |K| against log lag from 64 on; even attention: a Transformer's 1/(t+1)")


def _tail(entry: dict[str, Any], shown: list[int]) -> list[str]:
    rms, fitted = {o["from"]: o["rms"] for o in entry["slopes"]}, entry["fit"]
    return [*(f"{rms[lag]:.1e}" for lag in shown), "-" if fitted is None else f"{fitted['slope']:+.2f}", entry["verdict"]]
