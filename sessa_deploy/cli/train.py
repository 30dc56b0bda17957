"""`sessa-deploy train`: train a model on a folder of text, or resume a run."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Any

import click

from sessa_deploy.cli.options import (
    COUNT,
    DEVICE,
    EXTENSIONS,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    POSITIVE_INT,
    SEED,
    TEXT,
    OneOf,
)
from sessa_deploy.process import launched, speaks

# What a resumed run may set anew; everything else is fixed by the run.
_RESUMABLE = {"resume", "out", "data", "device", "stop_at", "max_seconds", "save_every", "eval_every", "store", "batch_size", "shard", "compile",
              "activation_checkpointing", "cuda_graph", "log_to"}
_PREPARING = {"prepare", "data", "out", "tokenizer", "init_from", "init_config", "extensions", "held_out"}


@click.command("train")
@click.option("--data", type=PATH, help="Folder of text, one file, or what --prepare wrote.")
@click.option("--out", type=PATH, required=True, help="The run's folder; its checkpoint/ is what `export` takes. With --prepare: the token file.")
@click.option("--resume", is_flag=True, help="Continue the run in --out where it was saved last.")
@click.option("--prepare", is_flag=True, help="Write --data as the token file --out and end: a later --data that is mapped, for text beyond the memory.")
@click.option("--init-from", type=PATH, metavar="CHECKPOINT",
              help="Begin with the weights, shape, vocabulary and tokenizer of a checkpoint (whatever `export` takes) and a fresh optimizer.")
@click.option("--config", "init_config", type=PATH, help="config.json of an --init-from that has none beside it.")
@click.option("--steps", type=POSITIVE_INT, default=2000, show_default=True, help="Optimizer steps of the whole schedule.")
@click.option("--stop-at", type=POSITIVE_INT, help="Stop after this step; the schedule stays that of --steps.")
@click.option("--max-seconds", type=POSITIVE, help="End the schedule by the clock, if it comes before --steps.")
@click.option("--d-model", type=POSITIVE_INT, default=256, show_default=True, help="Width; a multiple of twice --n-heads.")
@click.option("--n-layers", type=POSITIVE_INT, default=4, show_default=True, help="Layers.")
@click.option("--n-heads", type=POSITIVE_INT, default=4, show_default=True, help="Query heads of the forward branch.")
@click.option("--n-kv-heads", type=POSITIVE_INT, help="Key/value heads of the forward branch, a divisor of --n-heads; default: --n-heads.")
@click.option("--gamma-max", type=FINITE, default=0.999, show_default=True, help="Bound of the feedback gain, between 0 and 1.")
@click.option("--tie-word-embeddings", is_flag=True, help="Share the embedding with the output head.")
@click.option("--context", type=POSITIVE_INT, default=256, show_default=True, help="Tokens of a training window.")
@click.option("--batch-size", type=POSITIVE_INT, default=16, show_default=True, help="Windows of a process's micro-batch.")
@click.option("--accumulate", type=POSITIVE_INT, default=1, show_default=True, help="Micro-batches of an optimizer step.")
@click.option("--global-batch", type=POSITIVE_INT, help="Windows of an optimizer step over all processes, a multiple of --batch-size times the processes; "
              "--accumulate follows from it.")
@click.option("--shard/--no-shard", default=False, help="Deal parameters, gradients and moments out over the processes (FSDP2), for models beyond one GPU.")
@click.option("--compile/--no-compile", default=False, help="torch.compile of the loss, and of one layer for all of them.")
@click.option("--activation-checkpointing/--no-activation-checkpointing", default=False,
              help="Compute each layer anew in the backward instead of keeping its activations: less memory, more time.")
@click.option("--cuda-graph/--no-cuda-graph", default=False,
              help="Replay a step as one CUDA graph: less time where small steps wait for the host, more memory. One process, on a GPU.")
@click.option("--lr", type=POSITIVE, default=2e-3, show_default=True, help="Peak learning rate; a cosine takes it to zero.")
@click.option("--warmup", type=COUNT, help="Steps of linear warm-up, 0 for none; default: 2% of --steps, at most 500.")
@click.option("--weight-decay", type=NOT_NEGATIVE, default=0.1, show_default=True, help="On matrices only.")
@click.option("--grad-clip", type=POSITIVE, default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random weights and of the order of the text.")
@click.option("--tokenizer", type=PATH, help="A tokenizers JSON; default: that of --init-from, or bytes.")
@click.option("--extensions", type=EXTENSIONS, metavar="EXT,EXT", help="Keep only files that end in these, as in py,md.")
@click.option("--held-out", type=FRACTION, default=0.05, show_default=True, help="Fraction of files held out.")
@click.option("--device", type=DEVICE, metavar="auto|cpu|cuda|cuda:N", default="auto", show_default=True, help="auto is the first GPU where there is one.")
@click.option("--precision", type=OneOf(("auto", "fp32", "bf16")), default="auto", show_default=True, help="bf16 autocast on a GPU, or float32.")
@click.option("--store", type=OneOf(("fp32", "fp16", "bf16")), default="fp32", show_default=True, help="Storage type of the checkpoint.")
@click.option("--eval-every", type=POSITIVE_INT, default=500, show_default=True, help="Steps between two looks at the held-out text.")
@click.option("--log-to", type=OneOf(("tensorboard", "wandb")), multiple=True, help="Send the curve there too; may be given for each.")
@click.option("--save-every", type=POSITIVE_INT, default=500, show_default=True, help="Steps between two saves.")
@click.option("--keep-sample", is_flag=True, help="Leave the first 64 KiB of the held-out text in the checkpoint: validate judges 8-bit weights on it.")
@click.option("--data-licence", type=TEXT, help="Licence of the text, for the card that says where a sample is from.")
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Train a model on any folder of text, byte by byte unless a tokenizer is given.

    The run's folder holds checkpoint/, checkpoint-best/ (by held-out bits), resume.pt, log.csv, loss.png and report.json. Ctrl-C and SIGTERM save;
    --resume continues the loss curve exactly (on a CPU).

    On several GPUs: torchrun --nproc-per-node N -m sessa_deploy train ...; any number of processes may resume what any other saved.
    """
    if launched():  # torch reads it once: it warns of each process that leaves before another, beside the one line that says why
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sessa_deploy.errors import UserError, need

    need("torch", "safetensors", "matplotlib", extra="train")
    from sessa_deploy.train import Interrupted, joined

    source = click.core.ParameterSource.COMMANDLINE
    explicit = {name for name in given if ctx.get_parameter_source(name) == source}
    fixed = sorted(explicit - _RESUMABLE)
    if given["resume"] and fixed:
        raise UserError("a resumed run keeps its settings", got=", ".join(map(_option, fixed)), fix="leave these options out")
    if not given["resume"] and given["data"] is None:
        raise UserError("there is nothing to train on", got="no --data", allowed="a folder of text", fix="--data FOLDER")
    folder = shlex.quote(str(given["out"]))
    preparing = given.pop("prepare")
    surplus = sorted(explicit - _PREPARING)
    if preparing and surplus:
        raise UserError("--prepare trains nothing", got=", ".join(map(_option, surplus)), fix="leave these options out")
    try:
        with joined() as group:
            if preparing:
                group.on_chief(lambda: _prepare(given))
                return
            _train(group, given, explicit)
    except Interrupted as stop:
        word = "interrupted" if stop.signal == signal.SIGINT else "terminated"
        _tell(f"{word}; saved at step {stop.step}, continue with: sessa-deploy train --resume --out {folder}")
        ctx.exit(128 + stop.signal)


def _prepare(given: dict[str, Any]) -> None:
    from sessa_deploy.train import TrainOptions, prepare

    names = _PREPARING - {"prepare"}
    options = TrainOptions(**{**{name: given[name] for name in names}, "extensions": given["extensions"] or ()})
    corpus = prepare(options, lambda text: _tell(f"note: {text}"))
    click.echo(f"{len(corpus.train):,} tokens of {corpus.train_bytes:,} bytes in {len(corpus.train_files)} files, {len(corpus.held_out):,} tokens of "
               f"{corpus.held_out_bytes:,} bytes held out: {given['out']}")
    click.echo(f"next: sessa-deploy train --data {shlex.quote(str(given['out']))} --out RUN")


def _tell(text: str) -> None:
    """A line on stderr, of process 0 alone."""
    if speaks():
        click.echo(text, err=True)


def _train(group: Any, given: dict[str, Any], explicit: set[str]) -> None:
    from sessa_deploy.data_file import is_token_file
    from sessa_deploy.errors import UserError
    from sessa_deploy.runtime.report import ignored_note
    from sessa_deploy.train import BEST_DIR, CHECKPOINT_DIR, TrainOptions, resume, start, train
    from sessa_deploy.train_begin import SHAPE
    from sessa_deploy.train_hooks import hook, require

    stop_at, tools, out = given.pop("stop_at"), given.pop("log_to"), given["out"]
    for tool in tools:
        require(tool)
    given["extensions"] = given["extensions"] or ()
    if given.pop("resume"):
        run = resume(out, group, **{name: given[name] for name in explicit & _RESUMABLE if name in given and name != "out"})
        if stop_at is not None and stop_at <= run.step:
            _tell(f"note: --stop-at {stop_at} lies behind: the run is at step {run.step}, nothing is trained")
    else:
        own = sorted(explicit & {"held_out", "extensions"})
        if own and is_token_file(given["data"]):
            raise UserError("a token file is split already", got=", ".join(map(_option, own)), fix="leave these options out, or give them to --prepare")
        shape = {name: given.pop(name) for name in SHAPE}
        if given["init_from"] is not None:
            shape = {name: value for name, value in shape.items() if name in explicit}
        run = start(TrainOptions(**given), lambda text: _tell(f"note: {text}"), group, **shape)
    for note in (ignored_note(run.tokenizer), run.note()):
        if note:
            _tell(note)
    if not group.chief:
        train(run, stop_at)
        return
    hooks = [hook(tool, run) for tool in dict.fromkeys(tools)]
    try:
        report = _shown(run, stop_at, hooks)
    finally:
        for one in hooks:
            one.close()
    _show(report)
    checkpoint, best = Path(out) / CHECKPOINT_DIR, report["best"]
    click.echo(f"checkpoint: {checkpoint}")
    if best is not None and best["step"] < report["steps"]:
        click.echo(f"best by held-out text, at step {best['step']}: {Path(out) / BEST_DIR}")
    click.echo(f"next: sessa-deploy export {shlex.quote(str(checkpoint))} --out {shlex.quote(str(Path(out) / 'bundle'))}")


def _option(name: str) -> str:
    return {"init_config": "--config"}.get(name, "--" + name.replace("_", "-"))


def _shown(run: Any, stop_at: int | None, hooks: list[Any]) -> dict[str, Any]:
    """The report of a run that was trained under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from sessa_deploy.train import train

    corpus, config = run.corpus, run.config
    console = Console(stderr=True)
    console.print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters ({config.n_layers} layers of {config.d_model}), "
                  f"{corpus.train_bytes:,} bytes in {len(corpus.train_files)} files, {corpus.held_out_bytes:,} bytes in {len(corpus.held_out_files)} held out, "
                  f"on {run.where()}", highlight=False)
    columns = (TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.1e}  {task.fields[held]}"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=1.0, step=run.step, loss=float("nan"), lr=0.0, held="")

        def on_row(row: Any, done: float) -> None:
            for one in hooks:
                one(row, done)
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
