"""`sessa-deploy train`: train a model on a folder of text, or resume a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

# What a resumed run may set anew; everything else is fixed by the run.
_RESUMABLE = {"resume", "out", "data", "device", "stop_at", "max_seconds", "save_every", "eval_every", "store"}
_SHAPE = ("d_model", "n_layers", "n_heads", "n_kv_heads", "gamma_max", "tie_word_embeddings")


@click.command("train")
@click.option("--data", type=click.Path(), help="Folder of text (or one file).")
@click.option("--out", type=click.Path(), required=True, help="The run's folder; its checkpoint/ is what `export` takes.")
@click.option("--resume", is_flag=True, help="Continue the run in --out where it was saved last.")
@click.option("--steps", type=int, default=2000, show_default=True, help="Optimizer steps of the whole schedule.")
@click.option("--stop-at", type=int, help="Stop after this step; the schedule stays that of --steps.")
@click.option("--max-seconds", type=float, help="End the schedule by the clock, if it comes before --steps.")
@click.option("--d-model", type=int, default=256, show_default=True)
@click.option("--n-layers", type=int, default=4, show_default=True)
@click.option("--n-heads", type=int, default=4, show_default=True)
@click.option("--n-kv-heads", type=int, help="Key/value heads of the forward branch; default: --n-heads.")
@click.option("--gamma-max", type=float, default=0.999, show_default=True, help="Bound of the feedback gain.")
@click.option("--tie-word-embeddings", is_flag=True, help="Share the embedding with the output head.")
@click.option("--context", type=int, default=256, show_default=True, help="Tokens of a training window.")
@click.option("--batch-size", type=int, default=16, show_default=True, help="Windows of a micro-batch.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Micro-batches of an optimizer step.")
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Peak learning rate; a cosine takes it to zero.")
@click.option("--warmup", type=int, help="Steps of linear warm-up; default: 2% of --steps, at most 500.")
@click.option("--weight-decay", type=float, default=0.1, show_default=True, help="On matrices only.")
@click.option("--grad-clip", type=float, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--tokenizer", type=click.Path(), help="A tokenizers JSON; default: bytes.")
@click.option("--extensions", help="Keep only files that end in these, as in py,md.")
@click.option("--held-out", type=float, default=0.05, show_default=True, help="Fraction of files held out.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True, help="bf16 autocast on a GPU, or float32.")
@click.option("--store", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True, help="Storage type of the checkpoint.")
@click.option("--eval-every", type=int, default=500, show_default=True, help="Steps between two looks at the held-out text.")
@click.option("--save-every", type=int, default=500, show_default=True, help="Steps between two saves.")
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Train a model on any folder of text, byte by byte unless a tokenizer is given.

    The run's folder holds checkpoint/, resume.pt, log.csv, loss.png and report.json. Ctrl-C saves; --resume continues the loss curve exactly (on a CPU).
    """
    from sessa_deploy.errors import UserError
    from sessa_deploy.runtime.report import ignored_note
    from sessa_deploy.train import CHECKPOINT_DIR, TrainOptions, resume, start

    source = click.core.ParameterSource.COMMANDLINE
    explicit = {name for name in given if ctx.get_parameter_source(name) == source}
    stop_at, out = given.pop("stop_at"), given["out"]
    extensions = tuple(x for x in (given.pop("extensions") or "").split(",") if x)
    if given.pop("resume"):
        fixed = sorted(explicit - _RESUMABLE)
        if fixed:
            raise UserError("a resumed run keeps its settings", got=", ".join("--" + x.replace("_", "-") for x in fixed), fix="leave these options out")
        changes = {name: given[name] for name in explicit & _RESUMABLE if name in given and name != "out"}
        run = resume(out, **changes)
    else:
        if given["data"] is None:
            raise UserError("there is nothing to train on", got="no --data", allowed="a folder of text", fix="--data FOLDER")
        shape = {name: given.pop(name) for name in _SHAPE}
        run = start(TrainOptions(extensions=extensions, **given), **shape)
    note = ignored_note(run.tokenizer)
    if note:
        click.echo(note, err=True)
    report = _train(run, stop_at)
    _show(report)
    checkpoint = Path(out) / CHECKPOINT_DIR
    click.echo(f"checkpoint: {checkpoint}")
    click.echo(f"next: sessa-deploy export {checkpoint} --out {Path(out) / 'bundle'}")


def _train(run: Any, stop_at: int | None) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sessa_deploy.train import train

    corpus, config = run.corpus, run.config
    console = Console(stderr=True)
    console.print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters ({config.n_layers} layers of {config.d_model}), "
                  f"{corpus.train_bytes:,} bytes in {len(corpus.train_files)} files, {corpus.held_out_bytes:,} bytes in {len(corpus.held_out_files)} held out, "
                  f"on {run.device}", highlight=False)
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.1e}  {task.fields[held]}"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=1.0, step=run.step, loss=float("nan"), lr=0.0, held="")

        def on_row(row: Any, done: float) -> None:
            fields = {"step": row.step, "loss": row.loss, "lr": row.lr}
            if row.held_out is not None:
                fields["held"] = f"held out {row.held_out:.3f} bits/byte"
                if not console.is_terminal:
                    console.print(f"step {row.step}: loss {row.loss:.4f}, held out {row.held_out:.4f} bits per byte, {row.seconds:.0f} s", highlight=False)
            progress.update(task, completed=done, **fields)

        return train(run, stop_at, on_row)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("held-out text", "bits per byte", title=f"{report['steps']} steps, {report['tokens']:,} tokens, {report['seconds']:.0f} s")
    table.add_row("this checkpoint", f"{report['held_out_bits_per_byte']:.4f}")
    if report["xz_9_bits_per_byte"] is not None:
        table.add_row("xz -9", f"{report['xz_9_bits_per_byte']:.4f}")
    Console().print(table)
