"""`sessa-deploy export-triton`: a bundle as a model of a Triton Inference Server."""

from __future__ import annotations

import shlex

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import COUNT, PATH, POSITIVE, POSITIVE_INT, TEXT


@click.command("export-triton")
@click.argument("bundle", type=PATH)
@click.option("--out", type=PATH, required=True, help="The model repository; its other models are left alone.")
@click.option("--name", type=TEXT, help="The model's name; default: that of the bundle's folder. A model of export-triton's there is replaced in one step.")
@inputs.backend_option
@click.option("--slots", type=POSITIVE_INT, help="Requests that run at once; default: as many as the TensorRT engine takes, else 8.")
@click.option("--capacity", type=POSITIVE_INT, help="Tokens of prompt and answer together; default: the model's max_context.")
@click.option("--queue", type=COUNT, default=256, show_default=True, help="Requests that may wait for a slot; the next one is refused.")
@click.option("--queue-timeout", type=POSITIVE, default=30.0, show_default=True, help="Seconds that a request may wait for a slot.")
@inputs.threads_option
def command(
    bundle: str, out: str, name: str | None, backend: str, slots: int | None, capacity: int | None, queue: int, queue_timeout: float, threads: int | None,
) -> None:
    """Write BUNDLE as a model for a stock Triton Inference Server with its python backend: config.pbtxt, model.py and a checked copy of the bundle.

    The python that Triton runs needs this package and the engine's library. Answers stream (decoupled mode); requests share one batcher.
    """
    from sessa_deploy.files import refuse_inside_bundle
    from sessa_deploy.runtime.serve.triton_export import export_triton

    refuse_inside_bundle(out, "--out", "the model repository")
    path = export_triton(bundle, out, name, backend, slots, capacity, queue, queue_timeout, threads)
    click.echo(f"model: {path}")
    click.echo(f"next: tritonserver --model-repository {shlex.quote(str(path.parent))}")
