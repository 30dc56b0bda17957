"""What verbs that run a bundle read from the command line: texts, token ids, and where figures as JSON go."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from sessa_deploy.cli.options import BACKEND, COUNT, DRAFTED, NOT_NEGATIVE, POSITIVE, PROBABILITY, SEED, SHARE, TEXT, THREADS
from sessa_deploy.errors import UserError

_LEAST_TEXT, _LONGEST_TOKEN = 1 << 20, 64  # characters, of a text that is judged: more are not encoded than the context takes
_NUMBERS = re.compile(r"\s*\[?\s*(\d+(?:[\s,]+\d+)*)[\s,]*\]?\s*", re.ASCII)


class JsonFlag(click.Command):
    """A command whose --json is a flag, and may be written `--json -` as on verbs that can also write a file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [arg for at, arg in enumerate(args) if not (arg == "-" and args[at - 1 : at] == ["--json"])])


def backend_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--backend of a verb that opens a session."""
    return click.option("--backend", type=BACKEND, default="auto", show_default=True, help="What runs the graph.")(command)


def threads_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--threads of a verb that opens a session."""
    return click.option("--threads", type=THREADS, help="CPU threads, no more than the cores there are; default: all.")(command)


def lookup_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--lookup of a verb that generates."""
    return click.option("--lookup", type=DRAFTED, metavar="N", default=None,
                        help="Prompt lookup: verify up to N tokens (1 to 15) of what followed the last ones earlier in the text in one step, where that pays. "
                             "The same text, faster where it repeats itself. Needs a bundle exported with --all-logits.")(command)


def stop_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--stop, several times."""
    return click.option("--stop", type=TEXT, multiple=True, help="End where this text appears; may be given several times.")(command)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How tokens are drawn, as `sampling` takes it."""
    for option in reversed((
        click.option("--temperature", type=NOT_NEGATIVE, help="0 is greedy; default: 0, or 1 where --top-k, --top-p or --min-p is given."),
        click.option("--top-k", type=COUNT, default=0, help="Keep the k most likely tokens; 0 keeps all."),
        click.option("--top-p", type=PROBABILITY, default=1.0, help="Keep the smallest set of tokens with this probability."),
        click.option("--min-p", type=SHARE, default=0.0, help="Drop tokens below this share of the most likely one's chance."),
        click.option("--repetition-penalty", type=POSITIVE, default=1.0, help="Above 1: make tokens seen before less likely."),
        click.option("--seed", type=SEED, help="Of the random stream; the same seed draws the same text."),
    )):
        command = option(command)
    return command


def sampling(temperature: float | None, top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int | None) -> Any:
    """SamplingParams of `sampling_options`."""
    from sessa_deploy.runtime.sampling import SamplingParams

    if temperature is None:
        temperature = 1.0 if top_k or top_p != 1.0 or min_p else 0.0
    return SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, seed)


def read_text(name: str, option: str) -> str:
    """The text of a file, or of standard input where the name is -, byte by byte as it stands there. Raises UserError if it is no UTF-8 or unreadable."""
    where = "standard input" if name == "-" else name
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8", got=str(error), fix="pass UTF-8 text") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be read", got=getattr(error, "strerror", None) or str(error), fix=f"name a file of text for {option}") from None


def one_stdin(names: Iterable[str]) -> None:
    """Raise UserError where standard input is named more than once: it is read to its end by the first."""
    if list(names).count("-") > 1:
        raise UserError("standard input is given twice", got="- more than once", allowed="one text from standard input", fix="put the others into files")


def parse_ids(text: str, option: str) -> list[int]:
    """Token ids separated by spaces or commas, in brackets or not. Raises UserError on anything else."""
    found = _NUMBERS.fullmatch(text)
    if found is None or len(max(re.split(r"[\s,]+", found[1]), key=len)) > 18:
        raise UserError(f"{option} is no list of token ids", got=repr(text if len(text) <= 60 else text[:57] + "..."),
                        allowed='whole numbers separated by spaces or commas: "1 2 3"')
    return [int(number) for number in re.split(r"[\s,]+", found[1])]


def tell_ignored(session: Any) -> None:
    """Say on standard error, once, what the bundle's tokenizer.json asks for and does not get."""
    from sessa_deploy.runtime.report import ignored_note

    note = ignored_note(session.tokenizer) if session.has_tokenizer else None
    if note:
        click.echo(note, err=True)


def read_texts(files: tuple[str, ...]) -> dict[str, str]:
    """Name -> text of the files of --text. Raises UserError on one that cannot be read, and on standard input given twice."""
    one_stdin(files)
    return {name: read_text(name, "--text") for name in files}


def encoded_texts(bundle: str | Path, texts: Mapping[str, str]) -> dict[str, list[int]]:
    """text-1, text-2, ... -> token ids of texts, by their files' names, as a bundle's tokenizer encodes them, cut to the model's context with a note on
    standard error.

    Raises UserError on a text that is empty, and on a bundle without a tokenizer.
    """
    if not texts:
        return {}
    from sessa_deploy.contract import TOKENIZER_FILE
    from sessa_deploy.runtime.bundle import Bundle
    from sessa_deploy.runtime.report import ignored_note
    from sessa_deploy.runtime.tokenizer import Tokenizer

    opened, found = Bundle.open(bundle), {}
    tokenizer, config = Tokenizer(opened.file(TOKENIZER_FILE)), opened.config
    notes = [ignored_note(tokenizer)]
    for number, name in enumerate(texts, start=1):
        text = texts[name][: max(_LEAST_TEXT, _LONGEST_TOKEN * config.max_context)]
        more = "more than " if len(text) < len(texts[name]) else ""
        ids = tokenizer.encode_first(text, config.bos_token_id)
        if not ids or not text:  # with a first token of the model's there would be something to judge
            raise UserError("the text is empty", got=name, allowed="at least one token", fix="name a file of text for --text")
        wrong = next((token for token in ids if token >= config.vocab_size), None)
        if wrong is not None:
            raise UserError("the text has a token outside the vocabulary", got=wrong, allowed=f"0..{config.vocab_size - 1}",
                            fix="export with the tokenizer the model was trained with")
        if len(ids) > config.max_context:
            notes.append(f"note: text-{number} ({name}): the first {config.max_context} of its {more}{len(ids)} tokens are judged (max_context)")
        found[f"text-{number}"] = ids[: config.max_context]
    for note in filter(None, notes):
        click.echo(note, err=True)
    return found


def harmless(text: str) -> str:
    """Control characters of a model's text made visible, so that they do not command the terminal."""
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0) else f"\\x{ord(c):02x}" for c in text)


class Writer:
    """Writes to standard output; on a terminal, control characters are made visible. `closed` once whoever read has had enough."""

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
        self._plain, self.closed = not sys.stdout.isatty(), False

    def write(self, text: str) -> None:
        """Show text at once."""
        if self.closed:
            return
        try:
            sys.stdout.write(text if self._plain else harmless(text))
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.closed = True
        except UserError:  # of a disk that is full, say: nothing more can be shown
            self.closed = True
            raise
