"""`sessa-deploy chat`: a conversation with a bundle, kept on the session's caches from turn to turn."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from sessa_deploy.cli import inputs
from sessa_deploy.cli.options import PATH, POSITIVE_INT
from sessa_deploy.errors import UserError

if TYPE_CHECKING:
    from sessa_deploy.runtime.session import Session
    from sessa_deploy.runtime.template import ChatTemplate

_DEFAULT_TOKENS = 128
_HELP = "/reset begins anew, /more lets the answer go on, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@click.command("chat")
@click.argument("bundle", type=PATH)
@click.option("--max-new-tokens", type=POSITIVE_INT, default=_DEFAULT_TOKENS, show_default=True, help="Longest answer, in tokens.")
@inputs.sampling_options
@inputs.backend_option
@inputs.stop_option
@inputs.lookup_option
@click.option("--capacity", type=POSITIVE_INT, help="Tokens the conversation may have; default: the model's max_context.")
@click.option("--plain", is_flag=True, help="Leave the bundle's chat template out: each turn is the text as it is.")
@inputs.threads_option
def command(
    bundle: str, max_new_tokens: int, backend: str, stop: tuple[str, ...], capacity: int | None, plain: bool, lookup: int | None,
    threads: int | None, **drawn: Any,
) -> None:
    """Talk to BUNDLE: every line is a turn, and the model goes on behind it.

    A bundle's chat template is put around the turns, as `serve` does. Where there is none, or with --plain, a turn is plain text: the first answer is what
    `run --prompt` gives, and each later turn stands on a line of its own behind the answer before. Only new tokens are computed. /reset begins anew, /more
    lets the last answer go on, /quit or the end of the input ends. Lines may also come from a pipe. With --seed, turn n draws from seed + n - 1.
    """
    from sessa_deploy.runtime.report import count_progress
    from sessa_deploy.runtime.session import Session
    from sessa_deploy.runtime.template import ChatTemplate

    params = inputs.sampling(**drawn)
    with (count_progress("prompt") as progress,
          Session(bundle, backend, capacity=capacity, threads=threads, progress=progress, lookup=lookup or 0) as session):
        _ = session.tokenizer  # a conversation needs text
        inputs.tell_ignored(session)
        chat = _Chat(session, max_new_tokens, params, stop, None if plain else ChatTemplate.of(session.bundle))
        if sys.stdin.isatty():
            click.echo(f"{session.backend.name}, {session.capacity} tokens of context; {_HELP}", err=True)
        for line in _lines():
            if line == "/quit":
                break
            try:
                chat.turn(line)
            except UserError as error:
                if chat.out.closed:  # not the turn is at fault
                    raise
                click.echo(f"error: {error}", err=True)
            if chat.out.closed:
                break


class _Chat:
    """The conversation on sequence 0 of a session. messages: what was said, where a template renders it."""

    def __init__(self, session: Session, max_new_tokens: int, params: Any, stop: tuple[str, ...], template: ChatTemplate | None = None) -> None:
        self.session, self.most, self.params, self.stop, self.out, self.template = session, max_new_tokens, params, stop, inputs.Writer(), template
        self.turns, self.ends_line = 0, True
        self.messages: list[dict[str, str]] = []
        ends = template.ends(session.tokenizer) if template is not None else ()
        self.ends = (*session.config.eos_token_ids, *ends)

    def turn(self, line: str) -> None:
        """Do what a line says. Raises UserError on a turn that cannot be taken; the conversation is then as it was."""
        begun = bool(self.session.tokens())
        if line == "/help":
            click.echo(_HELP, err=True)
        elif line == "/reset":
            self.session.reset()
            self.turns, self.ends_line, self.messages = 0, True, []
        elif line == "/more":
            if begun:
                self._answer([])
        elif line.strip() and self.template is not None:
            self._answer(self._rendered(self.template, line), line)
        elif line.strip():
            self._answer(self.session.encode(line if self.ends_line or not begun else "\n" + line))

    def _rendered(self, template: ChatTemplate, line: str) -> list[int]:
        """Tokens that stand behind the session's own once a turn is added; the session begins anew where what it holds is rendered otherwise now."""
        session = self.session
        ids, held = session.tokenizer.encode(template.render([*self.messages, {"role": "user", "content": line}])), session.tokens()
        if len(ids) > session.capacity:
            raise self._full(f"{len(ids)} tokens of conversation, this turn's included")
        if ids[: len(held)] == held and len(ids) > len(held):
            return ids[len(held) :]
        session.reset()
        return ids

    def _full(self, got: str) -> UserError:
        return UserError("the context is full", got=got, allowed=f"{self.session.capacity} tokens", fix="/reset begins anew; a larger --capacity holds more")

    def _answer(self, ids: list[int], line: str | None = None) -> None:
        session = self.session
        left = session.capacity + 1 - len(session.tokens()) - len(ids)  # the last token drawn needs no row in the cache
        if left < 1:
            raise self._full(f"{len(session.tokens())} tokens of conversation and {len(ids)} of this turn")
        seed = self.params.seed
        params = self.params if seed is None else dataclasses.replace(self.params, seed=seed + self.turns)
        self.turns += 1
        text, finish = "", None
        with _interruptible() as stopped:
            for chunk in session.stream([ids], min(self.most, left), params, self.ends, self.stop):
                text, finish = text + chunk.text, chunk.finish
                self.out.write(chunk.text)
                if stopped or self.out.closed:
                    break
        self.ends_line = text.endswith("\n")
        if line is not None:
            self.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
        elif self.messages:
            self.messages[-1]["content"] += text
        self.out.write("\n")
        if len(session.tokens()) > session.capacity:
            click.echo(f"note: the context is full ({session.capacity} tokens): /reset begins anew; a larger --capacity holds more", err=True)
        elif stopped:
            click.echo("note: stopped; /more goes on", err=True)
        elif finish == "length" and sys.stdin.isatty():
            click.echo(f"note: cut after {min(self.most, left)} tokens; /more goes on", err=True)


def _lines() -> Iterator[str]:
    """Turns: typed at a prompt, or from a pipe."""
    if not sys.stdin.isatty():
        for number, raw in enumerate(sys.stdin.buffer, start=1):
            try:
                yield raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"line {number} of standard input is not UTF-8", got=str(error), fix="pass UTF-8 text") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - makes input() edit and remember lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D ends)", err=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C inside the block fills the list that is yielded, so that no step is torn apart; pressed again it ends the program."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
