"""`sessa-deploy build`: a TensorRT engine into a bundle."""

from __future__ import annotations

import os
import shlex
import sys

import click

from sessa_deploy.cli.options import ARCHS, PATH, POSITIVE_INT, PRECISION, TARGET, Integer, OneOf


@click.command("build")
@click.argument("bundle", type=PATH)
@click.option("--for", "target", type=TARGET, help="TensorRT, or TensorRT for RTX; default: TensorRT, or the one that alone is installed.")
@click.option("--arch", "archs", type=ARCHS, help="Compute capabilities to build for, e.g. 86,89, without such a GPU here; with --for rtx only.")
@click.option("--max-batch", type=POSITIVE_INT, default=1, show_default=True, help="Sequences at once.")
@click.option("--max-context", type=POSITIVE_INT, help="Tokens the cache holds for each; default: the model's max_context.")
@click.option("--max-prompt", type=POSITIVE_INT, default=512, show_default=True,
              help="Tokens of one prefill step; longer prompts go in chunks. Larger steps are faster and take more memory.")
@click.option("--workspace", type=POSITIVE_INT, metavar="MIB", help="GPU memory TensorRT may take for scratch; default: what it likes.")
@click.option("--opt-level", type=Integer(0, 5), metavar="0..5", help="TensorRT's optimisation level; default: its own.")
@click.option("--precision", type=PRECISION, help="Only the graph's own; export decides the precision.")
@click.option("--layers", type=OneOf(("plugin", "tensorrt")), help="Who computes what stands around the attentions; default: the plugin, where it has kernels.")
@click.option("--plugin", type=PATH, help="Path of libsessa_plugin.so; default: where `plugin path` looks.")
@click.option("--force", is_flag=True, help="Build even if the bundle holds this very engine.")
@click.option("--verbose", is_flag=True, help="Show TensorRT's own messages.")
def command(
    bundle: str, target: str | None, archs: str | None, max_batch: int, max_context: int | None, max_prompt: int, workspace: int | None,
    opt_level: int | None, precision: str | None, layers: str | None, plugin: str | None, force: bool, verbose: bool,
) -> None:
    """Build a TensorRT engine of BUNDLE and put it into the bundle.

    It runs on GPUs of the same architecture with the same TensorRT version: this machine's, or with --for rtx those of --arch, and no GPU is needed
    here then. A killed build leaves the bundle as it was.
    """
    from pathlib import Path

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sessa_deploy.export.to_engine import build_engine

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task("checking the bundle", total=None)

            def progress(what: str, done: int, of: int) -> None:
                bars.update(task, description=what[:32], completed=done if of else 0, total=of or None)

            built = build_engine(bundle, max_batch, max_context, max_prompt, None if workspace is None else workspace << 20, opt_level, precision,
                                 Path(plugin) if plugin else None, force, verbose, progress, layers, target,
                                 [int(a) for a in archs.split(",")] if archs else None)
    except (KeyboardInterrupt, SystemExit) as stop:
        # TensorRT 8.6 cannot be told to stop: leave without waiting for its thread. The bundle is as it was.
        click.echo(f"{'interrupted' if isinstance(stop, KeyboardInterrupt) else 'terminated'}; the bundle is as it was", err=True)
        sys.stderr.flush()
        os._exit(130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0))
    info = built.info
    for line in built.notes:
        click.echo(line)
    state = f"built in {info.seconds:.0f} s" if built.fresh else "already there, nothing to do (--force builds anew)"
    click.echo(f"engine: {built.bundle.path}/{built.folder} ({info.plan_size / 2**20:.0f} MiB, {info.gpu}), {state}")
    click.echo(f"next: sessa-deploy run {shlex.quote(str(built.bundle.path))} --backend trt --prompt ...")
