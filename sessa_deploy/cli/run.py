"""`sessa-deploy run`: text from a bundle, streamed as it is drawn; several prompts together, or as JSON for programs."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import PATH, POSITIVE_INT
from sessa_deploy.errors import UserError
from sessa_deploy.process import command as command_line

if TYPE_CHECKING:
    from sessa_deploy.runtime.lookup import DraftStats
    from sessa_deploy.runtime.session import Session

_DEFAULT_TOKENS = 128
_TOGETHER = 8  # prompts in one batch: caches of this many sequences are taken at once
_KINDS = ("prompts", "files", "ids")


class _InOrder(inputs.JsonFlag):
    """Remembers in which order options of several kinds were given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, list(args))
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[__name__] = [param.name for param in order if param.name in _KINDS]
        return rest


@click.command("run", cls=_InOrder)
@click.argument("bundle", type=PATH)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; - reads it from standard input. Repeat it for several.")
@click.option("--prompt-file", "files", type=PATH, multiple=True, metavar="FILE",
              help="A file that holds one prompt, taken as it is, its last newline too; - for standard input. Repeat it for several.")
@click.option("--prompt-ids", "ids", multiple=True, metavar='"1 2 3"',
              help="A prompt as token ids, separated by spaces or commas; also for bundles without a tokenizer, which answer in ids. Repeat it for several.")
@click.option("--json", "as_json", is_flag=True,
              help="One JSON object a line and prompt: index, prompt, text, tokens, finish, first_token_ms, tokens_per_second; with --lookup also lookup.")
@click.option("--max-new-tokens", type=POSITIVE_INT, help="Stop after this many tokens; default: 128, or fewer where the capacity ends.")
@inputs.sampling_options
@inputs.backend_option
@inputs.stop_option
@inputs.lookup_option
@click.option("--capacity", type=POSITIVE_INT, help="Tokens the cache holds; default: the model's max_context.")
@inputs.threads_option
@click.pass_context
def command(
    ctx: click.Context, bundle: str, prompts: tuple[str, ...], files: tuple[str, ...], ids: tuple[str, ...], as_json: bool, max_new_tokens: int | None,
    backend: str, stop: tuple[str, ...], lookup: int | None, capacity: int | None, threads: int | None, **drawn: Any,
) -> None:
    """Generate text from BUNDLE. The text goes to standard output, a line of figures to standard error.

    Several prompts are generated together (with --lookup one after the other), each as if it were alone: with the same seed it draws the same text. Their
    texts appear in the order in which the prompts were given.
    """
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.engines import most_sequences
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.runtime.session import Session

    params = inputs.sampling(**drawn)
    given = _prompts(ctx, {"prompts": prompts, "files": files, "ids": ids})
    opened = Bundle.open(bundle)
    together = 1 if lookup else min(len(given), most_sequences(opened, backend) or _TOGETHER, _TOGETHER)
    with (count_progress("prompt") as progress,
          Session(opened, backend, together, capacity, threads=threads, progress=progress, lookup=lookup or 0) as session):
        jobs = [_Job(index, prompt, *_fitted(session, prompt, max_new_tokens)) for index, prompt in enumerate(given)]
        if stop and not session.has_tokenizer:
            _ = session.tokenizer  # says what is missing
        inputs.tell_ignored(session)
        out, start = inputs.Writer(), time.perf_counter()
        for at in range(0, len(jobs), together):
            batch = jobs[at : at + together]
            session.reset()
            _generate(session, batch, params, stop, out if len(jobs) == 1 and not as_json else None)
            for job in batch:
                job.drafts = session.drafts if lookup else None
                _show(job, session, out, as_json, len(jobs))
            if out.closed:
                return
        spent, name = time.perf_counter() - start, session.backend.name
    if len(jobs) == 1:
        job = jobs[0]
        rate = f"{job.rate:.1f} tokens/s after it" if job.rate is not None else "one token"
        click.echo(f"{name}: {len(job.ids)} prompt tokens, {len(job.tokens)} new; first token {job.first_ms:.1f} ms, {rate}; ended by {job.finish}"
                   f"{_told([job])}", err=True)
        return
    count = sum(len(job.tokens) for job in jobs)
    click.echo(f"{name}: {len(jobs)} prompts, {sum(len(job.ids) for job in jobs)} prompt tokens, {count} new; {count / spent:.1f} tokens/s in all, "
               f"{together} at once{_told(jobs)}", err=True)


@dataclass
class _Job:
    """One prompt and what came of it. first_ms: from the start of its batch to its first token."""

    index: int
    prompt: str | list[int]
    ids: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    first_ms: float = 0.0
    rate: float | None = None
    drafts: DraftStats | None = None


def _prompts(ctx: click.Context, given: dict[str, tuple[str, ...]]) -> list[str | list[int]]:
    """What the three options hold, in the order in which they were given."""
    if not any(given.values()):
        raise UserError("there is nothing to continue", got="no prompt", allowed='--prompt TEXT, --prompt-file FILE or --prompt-ids "1 2 3"',
                        fix=f"add one of them; for a conversation: {command_line('chat', ctx.params['bundle'])}")
    inputs.one_stdin((*given["prompts"], *given["files"]))
    left = {kind: iter(values) for kind, values in given.items()}
    found: list[str | list[int]] = []
    for kind in ctx.meta[__name__]:
        value = next(left[kind])
        if kind == "ids":
            found.append(inputs.parse_ids(value, "--prompt-ids"))
        else:
            found.append(inputs.read_text(value, "--prompt-file") if kind == "files" or value == "-" else value)
    return found


def _fitted(session: Session, prompt: str | list[int], max_new_tokens: int | None) -> tuple[list[int], int]:
    """(token ids, new tokens) of a prompt. Raises UserError unless both fit."""
    if max_new_tokens is None:
        max_new_tokens = max(1, min(_DEFAULT_TOKENS, session.capacity - len(session.encode(prompt)) + 1))
    return session.check(prompt, max_new_tokens), max_new_tokens


def _generate(session: Session, batch: list[_Job], params: Any, stop: tuple[str, ...], out: inputs.Writer | None) -> None:
    """Run a batch to its end, streaming to `out` where there is one."""
    start = time.perf_counter()
    first, last = [start] * len(batch), [start] * len(batch)
    for chunk in session.stream([job.ids for job in batch], [job.limit for job in batch], params, stop=stop):
        job, now = batch[chunk.row], time.perf_counter()
        first[chunk.row] = first[chunk.row] if job.tokens else now
        last[chunk.row] = now
        job.tokens.append(chunk.token)
        job.text += chunk.text
        job.finish = chunk.finish
        if out is not None:
            out.write(chunk.text if session.has_tokenizer else f"{' ' if len(job.tokens) > 1 else ''}{chunk.token}")
            if out.closed:
                return
    if out is not None:
        out.write("\n")
    for job, begun, ended in zip(batch, first, last, strict=True):
        job.first_ms = 1e3 * (begun - start)
        job.rate = (len(job.tokens) - 1) / (ended - begun) if ended > begun else None


def _show(job: _Job, session: Session, out: inputs.Writer, as_json: bool, of: int) -> None:
    if as_json:
        out.write(json.dumps({
            "index": job.index, "prompt": job.prompt, "text": job.text if session.has_tokenizer else None, "tokens": job.tokens, "finish": job.finish,
            "first_token_ms": round(job.first_ms, 3), "tokens_per_second": None if job.rate is None else round(job.rate, 3),
            **({} if job.drafts is None else {"lookup": job.drafts.to_dict()}),
        }) + "\n")
    elif of > 1:
        text = job.text if session.has_tokenizer else " ".join(map(str, job.tokens))
        shown = job.prompt if isinstance(job.prompt, str) else " ".join(map(str, job.prompt))
        out.write(f"{chr(10) if job.index else ''}==> {job.index + 1} of {of}: {_one_line(shown)} <==\n{text}\n")


def _told(jobs: list[_Job]) -> str:
    """What drafts brought, for the line of figures; nothing without --lookup."""
    found = [job.drafts for job in jobs if job.drafts is not None]
    return f"; lookup: {sum(found[1:], found[0])}" if found else ""


def _one_line(text: str, width: int = 60) -> str:
    """Text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
