"""`sessa-deploy build`: a TensorRT engine, or a graph prepared for ONNX Runtime, into a bundle."""

from __future__ import annotations

import shlex

import click

from sessa_deploy.cli.options import ARCHS, PATH, POSITIVE_INT, PRECISION, TARGET, Integer, OneOf
from sessa_deploy.process import leave


@click.command("build")
@click.argument("bundle", type=PATH)
@click.option("--for", "target", type=TARGET,
              help="TensorRT, TensorRT for RTX or ONNX Runtime on CUDA; default: TensorRT, or TensorRT for RTX where that alone is installed.")
@click.option("--arch", "archs", type=ARCHS, help="Compute capabilities to build for, e.g. 86,89, without such a GPU here; with --for rtx only.")
@click.option("--max-batch", type=POSITIVE_INT, default=1, show_default=True, help="Sequences at once.")
@click.option("--max-context", type=POSITIVE_INT, help="Tokens the cache holds for each; default: the model's max_context.")
@click.option("--max-prompt", type=POSITIVE_INT, default=512, show_default=True,
              help="Tokens of one prefill step; longer prompts go in chunks. Larger steps are faster and take more memory.")
@click.option("--workspace", type=POSITIVE_INT, metavar="MIB", help="GPU memory TensorRT may take for scratch; default: what it likes.")
@click.option("--opt-level", type=Integer(0, 5), metavar="0..5", help="TensorRT's optimisation level; default: its own.")
@click.option("--precision", type=PRECISION, help="Only the graph's own; export decides the precision.")
@click.option("--layers", type=OneOf(("plugin", "tensorrt", "ort")),
              help="Who computes what stands around the attentions; default: the plugin, where it has kernels.")
@click.option("--plugin", type=PATH, help="Path of libsessa_plugin.so; default: where `plugin path` looks.")
@click.option("--force", is_flag=True, help="Build even if the bundle holds this very engine.")
@click.option("--verbose", is_flag=True, help="Show TensorRT's own messages.")
@click.pass_context
def command(
    context: click.Context, bundle: str, target: str | None, archs: str | None, max_batch: int, max_context: int | None, max_prompt: int, workspace: int | None,
    opt_level: int | None, precision: str | None, layers: str | None, plugin: str | None, force: bool, verbose: bool,
) -> None:
    """Build a TensorRT engine of BUNDLE and put it into the bundle; or, with --for ort, its graph prepared for ONNX Runtime on CUDA.

    An engine runs on GPUs of the same architecture with the same TensorRT version: this machine's, or with --for rtx those of --arch, and no GPU is
    needed here then. What --for ort writes needs none either and runs on every GPU, with any batch and context, where libsessa_ort.so is
    (sessa-deploy plugin build --for ort). A killed build leaves the bundle as it was.
    """
    if target == "ort":
        _require_plain(context, bundle)
        _build_ort(bundle, layers, precision, force)
        return
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
        leave(130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0))
    info = built.info
    for line in built.notes:
        click.echo(line)
    state = f"built in {info.seconds:.0f} s" if built.fresh else "already there, nothing to do (--force builds anew)"
    click.echo(f"engine: {built.bundle.path}/{built.folder} ({info.plan_size / 2**20:.0f} MiB, {info.gpu}), {state}")
    click.echo(f"next: sessa-deploy run {shlex.quote(str(built.bundle.path))} --backend trt --prompt ...")


_ORT = ("bundle", "target", "layers", "precision", "force")  # what --for ort takes


def _require_plain(context: click.Context, bundle: str) -> None:
    """Raise UserError on an option that was given and says nothing to ONNX Runtime."""
    from click.core import ParameterSource

    from sessa_deploy.cli.options import given
    from sessa_deploy.errors import UserError
    from sessa_deploy.process import command as command_line

    asked = [p for p in context.command.params if p.name not in _ORT and context.get_parameter_source(str(p.name)) is not ParameterSource.DEFAULT]
    if asked:
        got = ", ".join(p.opts[0] if isinstance(p, click.Option) and p.is_flag else given(p, context.params[str(p.name)]) for p in asked)
        raise UserError("--for ort takes no option of TensorRT's: its graph serves any batch, context, prompt and GPU", got=got,
                        allowed="--layers, --precision, --force", fix=command_line("build", bundle, "--for", "ort"))


def _build_ort(bundle: str, layers: str | None, precision: str | None, force: bool) -> None:
    from sessa_deploy.cli.output import size
    from sessa_deploy.export.to_ort import build_ort

    built = build_ort(bundle, layers, precision, force)
    for line in built.notes:
        click.echo(line)
    state = "" if built.fresh else "; already there, nothing to do (--force builds anew)"
    click.echo(f"graph: {built.bundle.path}/{built.prepared.folder}, adds {size(built.prepared.added_bytes)} to the bundle{state}")
    click.echo(f"next: sessa-deploy run {shlex.quote(str(built.bundle.path))} --backend ort-cuda --prompt ...")
