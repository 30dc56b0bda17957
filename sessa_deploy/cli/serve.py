"""`sessa-deploy serve`: a bundle behind OpenAI's API, for many clients at once."""

from __future__ import annotations

from typing import Any

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import COUNT, NOT_NEGATIVE, PATH, PORT, POSITIVE, POSITIVE_INT, TEXT


@click.command("serve")
@click.argument("bundle", type=PATH)
@inputs.backend_option
@click.option("--slots", type=POSITIVE_INT, help="Requests that run at once; default: as many as the TensorRT engine takes, else 8.")
@click.option("--capacity", type=POSITIVE_INT, help="Tokens of a prompt and its answer together; default: the model's max_context.")
@inputs.threads_option
@click.option("--host", type=TEXT, default="127.0.0.1", show_default=True, help="Address to listen on. Another than this machine's own needs a key.")
@click.option("--port", type=PORT, default=8000, show_default=True, help="Port to listen on; 0 takes one that is free and says which.")
@click.option("--api-key", type=TEXT, metavar="KEY", help="What clients must send. Everyone on this machine sees a command line: SESSA_API_KEY is hidden.")
@click.option("--no-api-key", is_flag=True, help="Let everyone who reaches the address in.")
@click.option("--served-model-name", type=TEXT, metavar="NAME", help="The model's name for clients; default: the bundle's folder.")
@click.option("--queue", type=COUNT, default=256, show_default=True, help="Requests that may wait for a slot; the next one is told to try again (429).")
@click.option("--queue-timeout", type=POSITIVE, default=30.0, show_default=True, help="Seconds that a request may wait for a slot.")
@click.option("--timeout", type=POSITIVE, default=600.0, show_default=True, help="Seconds that a request may take in all.")
@click.option("--drain-timeout", type=NOT_NEGATIVE, default=30.0, show_default=True, help="Seconds that running requests have to end after SIGTERM.")
@click.option("--metrics/--no-metrics", default=True, show_default=True, help="Figures for Prometheus at /metrics.")
@click.option("--log-prompts", is_flag=True, help="Write what clients send into the log too.")
@click.pass_context
def command(ctx: click.Context, bundle: str, **options: Any) -> None:
    """Serve BUNDLE over HTTP as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models, /tokenize and /detokenize, with streaming.

    A page to try the model is at /, the API's at /docs, health at /health/live and /health/ready. SIGTERM or Ctrl-C lets running requests end; a second
    one ends them. Each request gets the text that it would get alone. Logs go to standard error, without prompts.
    """
    from sessa_deploy.errors import need

    need("fastapi", "uvicorn", "pydantic", "jinja2", "prometheus_client")
    from sessa_deploy.runtime.serve.lifecycle import ServeOptions, serve

    ctx.exit(serve(bundle, ServeOptions(**options), lambda line: click.echo(line, err=True)))
