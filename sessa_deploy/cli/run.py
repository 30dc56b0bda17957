"""`sessa-deploy run`: text from a bundle, streamed as it is drawn."""

from __future__ import annotations

import os
import sys
import time

import click

from sessa_deploy.cli.options import BACKEND, COUNT, NOT_NEGATIVE, PATH, POSITIVE, POSITIVE_INT, PROBABILITY, SEED, SHARE, TEXT, THREADS

_DEFAULT_TOKENS = 128


@click.command("run")
@click.argument("bundle", type=PATH)
@click.option("--prompt", required=True, help="Text to continue; - reads it from standard input.")
@click.option("--max-new-tokens", type=POSITIVE_INT, help="Stop after this many tokens; default: 128, or fewer where the capacity ends.")
@click.option("--temperature", type=NOT_NEGATIVE, help="0 is greedy; default: 0, or 1 where --top-k, --top-p or --min-p is given.")
@click.option("--top-k", type=COUNT, default=0, help="Keep the k most likely tokens; 0 keeps all.")
@click.option("--top-p", type=PROBABILITY, default=1.0, help="Keep the smallest set of tokens with this probability.")
@click.option("--min-p", type=SHARE, default=0.0, help="Drop tokens less likely than this share of the most likely one.")
@click.option("--repetition-penalty", type=POSITIVE, default=1.0, help="Above 1: make tokens seen before less likely.")
@click.option("--seed", type=SEED, help="Of the random stream; the same seed draws the same text.")
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help="What runs the graph.")
@click.option("--stop", type=TEXT, multiple=True, help="End where this text appears; may be given several times.")
@click.option("--capacity", type=POSITIVE_INT, help="Tokens the cache holds; default: the model's max_context.")
@click.option("--threads", type=THREADS, help="CPU threads, no more than the cores there are; default: all.")
def command(
    bundle: str, prompt: str, max_new_tokens: int | None, temperature: float | None, top_k: int, top_p: float, min_p: float, repetition_penalty: float,
    seed: int | None, backend: str, stop: tuple[str, ...], capacity: int | None, threads: int | None,
) -> None:
    """Generate text from BUNDLE. The text goes to standard output, a line of figures to standard error."""
    from sessa_deploy.errors import UserError
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.runtime.sampling import SamplingParams
    from sessa_deploy.runtime.session import Session

    if temperature is None:
        temperature = 1.0 if top_k or top_p != 1.0 or min_p else 0.0
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8", got=str(error), fix="pass UTF-8 text") from None
    with count_progress("prompt") as progress, Session(bundle, backend, capacity=capacity, threads=threads, progress=progress) as session:
        if max_new_tokens is None:
            max_new_tokens = max(1, min(_DEFAULT_TOKENS, session.capacity - len(session.encode(prompt)) + 1))
        start = time.perf_counter()
        stream = session.stream(prompt, max_new_tokens, params, stop=stop)
        first, count, finish = start, 0, None
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        plain = not sys.stdout.isatty()
        try:
            for chunk in stream:
                first = time.perf_counter() if count == 0 else first
                count, finish = count + 1, chunk.finish
                sys.stdout.write(chunk.text if plain else _harmless(chunk.text))
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        end, prompt_tokens, name = time.perf_counter(), len(session.tokens()) - count, session.backend.name
    rate = f"{(count - 1) / (end - first):.1f} tokens/s after it" if count > 1 else "one token"
    click.echo(f"{name}: {prompt_tokens} prompt tokens, {count} new; first token {1e3 * (first - start):.1f} ms, {rate}; ended by {finish}", err=True)


def _harmless(text: str) -> str:
    """Control characters of a model's text made visible, so that they do not command the terminal."""
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else f"\\x{ord(c):02x}" for c in text)
