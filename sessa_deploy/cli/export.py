"""`sessa-deploy export`: turn a checkpoint into a deployable bundle."""

from __future__ import annotations

import shlex

import click

from sessa_deploy.cli.options import NAMES, OPSET, PATH, PRECISION, WEIGHTS


@click.command("export")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="The bundle's folder; an older bundle there is replaced in one step.")
@click.option("--precision", type=PRECISION, default="fp32", show_default=True, help="Storage type of weights, caches and activations.")
@click.option("--opset", type=OPSET, default=17, show_default=True, help="ONNX opset of the graph, 17 to 23; TensorRT 8.6 reads 17.")
@click.option("--config", "config_file", type=PATH, help="config.json of a checkpoint that has none beside it.")
@click.option("--weights", type=WEIGHTS, help="Store the matrices in 8 bits, one scale an output channel; fp8 needs --opset 19.")
@click.option("--keep", type=NAMES, metavar="NAME,NAME", help="Leave these in --precision: lm_head, layers.3, mixer.q_proj, layers.3.W_in.")
@click.option("--all-logits", is_flag=True, help="Logits (B,T,V) of every position instead of the last one's.")
def command(checkpoint: str, out: str, precision: str, opset: int, config_file: str | None, weights: str | None, keep: tuple[str, ...] | None,
            all_logits: bool) -> None:
    """Export CHECKPOINT (a folder, .safetensors, .pt, .pth, .bin or .ckpt) as a bundle: model.onnx, tokenizer.json and a manifest with checksums.

    One model.onnx serves ONNX Runtime as it is and TensorRT through the plugin. The same checkpoint and versions of torch and onnxscript give
    the same bytes on any machine; the manifest names the versions.
    """
    from sessa_deploy.errors import need
    from sessa_deploy.files import refuse_inside_bundle

    refuse_inside_bundle(out, "--out", "the bundle", itself=False)
    need("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from sessa_deploy.config import SessaConfig
    from sessa_deploy.export.to_onnx import export_bundle

    console = Console(stderr=True)
    labels = {"reading": "reading the checkpoint", "tracing": "tracing the model", "writing": "writing model.onnx"}
    notes: list[str] = []
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {what: bars.add_task(label, total=None, start=False) for what, label in labels.items()}

        def progress(what: str, share: float) -> None:
            bars.start_task(tasks[what])
            # No one knows how far reading and tracing are: their bars pulse until they are done.
            bars.update(tasks[what], total=1.0 if what == "writing" or share >= 1.0 else None, completed=share)

        config = SessaConfig.load(config_file, notes.append) if config_file else None
        path = export_bundle(checkpoint, out, precision, opset, all_logits, progress, config, note=notes.append, weights=weights,
                             keep=keep or ())
    for line in notes:
        click.echo(f"note: {line}", err=True)
    click.echo(f"bundle: {path}")
    more = f" --config {shlex.quote(config_file)}" if config_file else ""
    click.echo(f"next: sessa-deploy validate {shlex.quote(str(path))} --checkpoint {shlex.quote(checkpoint)}{more}")
