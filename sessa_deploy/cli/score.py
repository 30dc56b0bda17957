"""`sessa-deploy score`: how likely a bundle finds a text."""

from __future__ import annotations

import json
from typing import Any

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import PATH, POSITIVE_INT
from sessa_deploy.errors import UserError


@click.command("score", cls=inputs.JsonFlag)
@click.argument("bundle", type=PATH)
@click.option("--text", type=PATH, metavar="FILE", help="The text, UTF-8; - for standard input.")
@click.option("--ids", type=PATH, metavar="FILE",
              help="Token ids instead, separated by spaces or commas: for a bundle without a tokenizer. - for standard input.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@inputs.backend_option
@click.option("--capacity", type=POSITIVE_INT, help="Tokens of one window; default: the model's max_context.")
@click.option("--stride", type=POSITIVE_INT, help="Tokens from one window to the next, at most a window; default: half a window.")
@inputs.threads_option
def command(
    bundle: str, text: str | None, ids: str | None, as_json: bool, backend: str, capacity: int | None, stride: int | None, threads: int | None,
) -> None:
    """Score a text under BUNDLE: log-likelihood in nats, bits per byte, and perplexity per token.

    The text begins behind the model's first token, where it has one (bos); else its own first token is not scored. A text longer than a window is read in
    windows that overlap by a window less --stride; each token is scored once, in the first window that reaches it. A bundle exported with --all-logits is
    read in chunks, another one a token at a time.
    """
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.runtime.scoring import score
    from sessa_deploy.runtime.session import Session

    if (text is None) == (ids is None):
        raise UserError("score takes one text", got="both --text and --ids" if text is not None else "none", fix="give --text FILE, or --ids FILE")
    given: Any = inputs.read_text(text, "--text") if text is not None else inputs.parse_ids(inputs.read_text(str(ids), "--ids"), "--ids")
    with Session(bundle, backend, capacity=capacity, threads=threads) as session, count_progress("scoring") as progress:
        inputs.tell_ignored(session)
        found, name = score(session, given, stride, progress), session.backend.name
    if found.windows > 1:
        click.echo(f"note: the text is longer than a window: scored in {found.windows} windows of {found.window} tokens, {found.stride} tokens apart", err=True)
    if not found.first_scored:
        click.echo("note: the first token is not scored, as nothing precedes it", err=True)
    out = inputs.Writer()
    if as_json:
        out.write(json.dumps({**found.to_dict(), "backend": name}) + "\n")
        return
    density = "" if found.bits_per_byte is None else f"bits per byte: {found.bits_per_byte:.4f}\n"
    size = "" if found.bytes is None else f" of {found.bytes} bytes"
    out.write(f"log-likelihood: {found.log_likelihood:.4f} nats\n{density}perplexity: {found.perplexity:.4f} a token\ntokens: {found.tokens}{size}\n")
