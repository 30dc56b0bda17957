"""Every option and argument of every verb, walked by a table: below its range, at its ends, beyond them, and in every odd spelling.

A new option needs a row here, or `test_every_option_has_a_row` fails. A row says what is taken (by parsing: no verb runs) and what is refused with exit
code 2 and one line that names the option and the value.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from sessa_deploy.cli import cli, main

CORES = len(os.sched_getaffinity(0))
MOST = 2**31 - 1
ODD = ["", " ", "abc", "nan", "NaN", "inf", "-inf", " 5", "5 ", "5\n", "0x10", "\u0663", "\u00bd", "1_000", "1,5", "1e", "+", "-", "None", "5;ls", "\x1b[31m5"]


@dataclass(frozen=True)
class Row:
    """taken: text and the value it is read as. refused: while parsing. late: refused by the verb, once it sees what is there."""

    taken: tuple[tuple[str, Any], ...] = ()
    refused: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    flag: bool = False
    alone: bool = False  # its value may be left out


def integer(low: int, high: int | None = None) -> Row:
    top = MOST if high is None else high
    taken = {low, min(low + 1, top), top}
    beyond = [low - 1, -1 if low >= 0 else low - 1, low - 10**30, top + 1, 10**20 + top, 10**30]
    return Row((*((str(x), x) for x in sorted(taken)), (f"+{top}", top), (f"00{low}", low)),
               (*ODD, *map(str, sorted(set(beyond))), "1.0", "1e3", "-0.5", "9" * 5000, "-" + "9" * 5000))


def number(taken: list[float], refused: list[float], late: tuple[str, ...] = ()) -> Row:
    return Row(tuple((repr(x), x) for x in taken), (*ODD, *map(repr, refused), "1e999", "-1e999", "1" + "0" * 400), late)


def choice(*words: str) -> Row:
    return Row(tuple((x, x) for x in words), ("", " ", words[0].upper(), words[0] + "x", f" {words[0]}", words[0] + "\n", ",".join(words)))


def place(*late: str) -> Row:
    return Row((("some/place", "some/place"), ("a b", "a b"), ("\u00fc", "\u00fc")), ("", "x" * 300, "a/" * 3000, "a\0b"), late)


def text(*refused: str) -> Row:
    return Row((("x", "x"), ("- 5", "- 5")), refused)


FLAG = Row(flag=True)
JSON = Row(place().taken, place().refused, alone=True)
FREE = text()  # any text, the empty one too, is the verb's to judge
SEED = integer(0, 2**64 - 1)
THREADS = integer(1, CORES)
COUNT, FROM_ZERO, DRAFTED = integer(1), integer(0), integer(1, 15)
BACKEND = choice("auto", "ort", "ort-cuda", "trt")
POSITIVE = number([1e-300, 0.5, 3.0, 1e300], [0.0, -0.0, -1e-300, -1.0])
NOT_NEGATIVE = number([0.0, 1e-300, 1e300], [-1e-300, -1.0])
MAJOR = Row((("8", 8), ("10", 10), ("11", 11)), ("", "7", "9", "12", "0", "-8", "8.0", "ten", " 8", "1e1"))
TARGET = choice("tensorrt", "rtx", "ort")
ARCHS = Row((("90", "90"), ("80,86", "80,86")), ("", ",", "90,", "sm_90", "9.0", "75", "90,75", " 90", "90;86", "9" * 500))
DEVICE = Row(tuple((x, x) for x in ("auto", "cpu", "cuda", "cuda:0", "cuda:7")),
             ("", " ", "mps", "meta", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:\u0663", "xla", "toaster", "cuda:" + "9" * 20,
              "cpu\n"),
             ("cuda:999",))
SAMPLING = {
    "--temperature": NOT_NEGATIVE, "--top-k": FROM_ZERO, "--top-p": number([1e-300, 0.5, 1.0], [0.0, -0.5, 1.0000001, 2.0]),
    "--min-p": number([0.0, 0.5, 0.999999], [-1e-9, 1.0, 2.0]), "--repetition-penalty": POSITIVE, "--seed": SEED,
}

TABLE: dict[str, dict[str, Row]] = {
    "train": {
        "--data": place("nowhere", "/dev/null"), "--out": place("/dev/null", "text/a.txt", "/proc/run"), "--resume": FLAG, "--prepare": FLAG,
        "--init-from": place("nowhere", "text"), "--config": place(), "--steps": COUNT, "--stop-at": COUNT, "--max-seconds": POSITIVE,
        "--d-model": COUNT, "--n-layers": COUNT, "--n-heads": COUNT,
        "--n-kv-heads": COUNT, "--gamma-max": number([0.5, -3.0], [], ("0", "1", "-1", "1.5")), "--tie-word-embeddings": FLAG, "--context": COUNT,
        "--batch-size": COUNT, "--accumulate": COUNT,
        "--global-batch": COUNT, "--shard": FLAG, "--compile": FLAG, "--activation-checkpointing": FLAG, "--cuda-graph": FLAG, "--lr": POSITIVE,
        "--warmup": FROM_ZERO, "--weight-decay": NOT_NEGATIVE, "--grad-clip": POSITIVE,
        "--seed": SEED, "--tokenizer": place("nowhere", "text", "text/a.txt"),
        "--extensions": Row((("py", ("py",)), (".py,md", ("py", "md")), ("tar.gz, txt", ("tar.gz", "txt"))),
                            ("", " ", ",", "py,", ",py", "py,,md", ".", "a/b"), ("rs",)),
        "--held-out": number([1e-9, 0.5, 0.999999], [0.0, 1.0, -0.1, 1.5]),
        "--device": DEVICE,
        "--precision": choice("auto", "fp32", "bf16"), "--store": choice("fp32", "fp16", "bf16"), "--eval-every": COUNT, "--save-every": COUNT,
        "--keep-sample": FLAG, "--data-licence": text(""),
        "--log-to": choice("tensorboard", "wandb"),
    },
    "export": {
        "CHECKPOINT": place("nowhere"), "--out": place(), "--precision": choice("fp32", "fp16", "bf16"), "--opset": integer(17, 23),
        "--config": place("nowhere"), "--all-logits": FLAG, "--weights": choice("int8", "fp8"),
        "--keep": Row((("lm_head", ("lm_head",)), ("layers.0, mixer.q_proj", ("layers.0", "mixer.q_proj"))),
                      ("", " ", ",", "lm_head,", ",x", "a,,b", "a\nb"), ("nope",)),
    },
    "validate": {
        "BUNDLE": place("nowhere"), "--checkpoint": place(), "--config": place(), "--backend": BACKEND, "--json": place(),
        "--report": place(), "--dump": place(), "--compare": place(), "--python": place(), "--length": COUNT, "--text": place("nowhere"),
        "--max-loss": NOT_NEGATIVE, "--seed": SEED, "--record": FLAG,
    },
    "build": {
        "BUNDLE": place(), "--max-batch": COUNT, "--max-context": COUNT, "--max-prompt": COUNT, "--workspace": COUNT, "--opt-level": integer(0, 5),
        "--precision": choice("fp32", "fp16", "bf16"), "--layers": choice("plugin", "tensorrt", "ort"), "--plugin": place(), "--force": FLAG, "--verbose": FLAG,
        "--for": TARGET, "--arch": ARCHS,
    },
    "run": {
        "BUNDLE": place("nowhere"), "--prompt": FREE, "--prompt-file": place("nowhere"),
        "--prompt-ids": Row((("1 2 3", "1 2 3"), ("[1, 2]", "[1, 2]")), ("", " ", "x", "1.5", "-1", "1e3", "0x10", "\u0663", "1;2", "9" * 5000)),
        "--json": FLAG, "--max-new-tokens": COUNT, **SAMPLING, "--backend": BACKEND, "--stop": text(""), "--capacity": COUNT, "--threads": THREADS,
        "--lookup": DRAFTED,
    },
    "chat": {
        "BUNDLE": place("nowhere"), "--max-new-tokens": COUNT, **SAMPLING, "--backend": BACKEND, "--stop": text(""), "--capacity": COUNT, "--threads": THREADS,
        "--lookup": DRAFTED, "--plain": FLAG,
    },
    "score": {
        "BUNDLE": place("nowhere"), "--text": place("nowhere"), "--ids": place(), "--json": FLAG, "--backend": BACKEND, "--capacity": COUNT, "--stride": COUNT,
        "--threads": THREADS,
    },
    "serve": {
        "BUNDLE": place("nowhere"), "--backend": BACKEND, "--slots": COUNT, "--capacity": COUNT, "--threads": THREADS, "--host": text(""),
        "--port": integer(0, 65535), "--api-key": text(""), "--no-api-key": FLAG, "--served-model-name": text(""), "--queue": FROM_ZERO,
        "--queue-timeout": POSITIVE, "--timeout": POSITIVE, "--drain-timeout": NOT_NEGATIVE, "--metrics": FLAG, "--log-prompts": FLAG,
    },
    "bench": {
        "BUNDLE": place("nowhere"), "--json": place("."), "--backend": BACKEND, "--batch": COUNT, "--prompt-tokens": COUNT, "--window": COUNT, "--steps": COUNT,
        "--seconds": NOT_NEGATIVE, "--max-seconds": NOT_NEGATIVE, "--capacity": COUNT, "--threads": THREADS, "--bandwidth": POSITIVE,
        "--lookup": DRAFTED, "--prompt-file": place("nowhere"),
    },
    "export-triton": {
        "BUNDLE": place("nowhere"), "--out": place(), "--name": Row((("x", "x"), ("a-1", "a-1")), ("",), (" ", "a/b", "..", "-a", "\u00fc", "a b")),
        "--backend": BACKEND, "--slots": COUNT, "--capacity": COUNT, "--queue": FROM_ZERO, "--queue-timeout": POSITIVE, "--threads": THREADS,
    },
    "influence": {
        "CHECKPOINT": place("nowhere"), "--prompt": text(""), "--tokens": place("nowhere"), "--sources": COUNT, "--layer": FROM_ZERO,
        "--lags": Row((("1", (1,)), ("0,4,16", (0, 4, 16)), ("16,1", (16, 1))),
                      (*(x for x in ODD if x != "1,5"), ",", "1,", ",1", "1,,2", "1, 2", "-1", "1,-1", "1.5", "1;2", str(2**31), "9" * 5000)),
        "--context": integer(2), "--end-to-end": FLAG, "--seed": SEED, "--config": place(), "--device": DEVICE, "--json": JSON,
        "--plot": place(),
    },
    "inspect": {"PATH": place("nowhere"), "--config": place(), "--json": JSON, "--all": FLAG, "--no-verify": FLAG},
    "plugin build": {
        "--tensorrt-include": place(), "--cuda-include": place(), "--onnxruntime-include": place(), "--cubins": place(), "--out": place(),
        "--arch": ARCHS, "--for": TARGET, "--tensorrt": MAJOR,
    },
    "plugin path": {"--tensorrt": MAJOR, "--for": TARGET},
    "plugin check": {"PATH": place("nowhere"), "--tensorrt": MAJOR, "--for": TARGET},
    "doctor": {"BUNDLE": place("nowhere"), "--json": JSON},
}

# What completes a command line, so that the value under test is all that is wrong with it; text/ is there, with a little text.
COMPLETE: dict[str, dict[str, str]] = {
    "train": {"--data": "text", "--out": "run"}, "export": {"CHECKPOINT": "checkpoint", "--out": "bundle"},
    "validate": {"BUNDLE": "bundle", "--checkpoint": "checkpoint"}, "build": {"BUNDLE": "bundle"},
    "run": {"BUNDLE": "bundle", "--prompt": "x"}, "chat": {"BUNDLE": "bundle"}, "score": {"BUNDLE": "bundle", "--text": "text/a.txt"},
    "serve": {"BUNDLE": "bundle"}, "bench": {"BUNDLE": "bundle"}, "export-triton": {"BUNDLE": "bundle", "--out": "repository"},
    "influence": {"CHECKPOINT": "checkpoint"}, "inspect": {"PATH": "checkpoint"},
}


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every verb, subcommands included, as it is typed."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            assert not [p for p in command.params if not p.is_eager], "an option of a group needs rows too: teach this test"
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands())


def name_of(param: click.Parameter) -> str:
    return param.opts[0] if isinstance(param, click.Option) else str(param.human_readable_name).upper()


def params(verb: str) -> dict[str, click.Parameter]:
    return {name_of(p): p for p in COMMANDS[verb].params}


def line(verb: str, option: str, value: str | None) -> list[str]:
    """The arguments behind the verb: what completes it, and the option (alone if value is None) or argument under test."""
    rest = {k: v for k, v in COMPLETE.get(verb, {}).items() if k != option}
    found = [x for k, v in rest.items() if k.startswith("-") for x in (k, v)] + [v for k, v in rest.items() if not k.startswith("-")]
    if option.startswith("-"):
        return [*found, option] if value is None else [*found, option, value]
    assert value is not None
    return [*found, value]


ROWS = [pytest.param(verb, option, row, id=f"{verb} {option}") for verb, rows in TABLE.items() for option, row in rows.items()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{'abcd'[i]}.txt").write_text("a line of text\n" * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def refusal(here: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """The one line of a command that is refused with exit code 2 and leaves nothing behind."""
    before = listing(here)
    with pytest.raises(SystemExit) as done:
        main(args)
    seen = capsys.readouterr()
    assert done.value.code == 2, (args, seen)
    assert seen.err.startswith("error: ") and seen.err.endswith("\n") and seen.err.count("\n") == 1 and seen.out == "", (args, seen)
    assert seen.err.strip().isprintable() and len(seen.err) < 1000 and listing(here) == before, (args, seen.err)
    return seen.err


def test_every_option_has_a_row() -> None:
    assert {verb: sorted(params(verb)) for verb in COMMANDS} == {verb: sorted(rows) for verb, rows in TABLE.items()}


def test_every_option_says_what_it_is() -> None:
    silent = [f"{verb} {name}" for verb in COMMANDS for name, p in params(verb).items() if isinstance(p, click.Option) and not p.help]
    assert not silent and all(command.help or command.short_help for command in COMMANDS.values())


@pytest.mark.parametrize(("verb", "option", "row"), ROWS)
def test_what_is_taken(here: Path, verb: str, option: str, row: Row) -> None:
    param, command = params(verb)[option], COMMANDS[verb]
    assert param.name is not None and isinstance(param, click.Option) is option.startswith("-")
    if row.flag:
        assert isinstance(param, click.Option)
        for name in (*param.opts, *param.secondary_opts):
            assert command.make_context(verb, [*line(verb, option, None)[:-1], name]).params[param.name] is (name in param.opts)
        return
    assert row.taken
    for given, value in row.taken:
        found = command.make_context(verb, line(verb, option, given)).params[param.name]
        found = found[0] if param.multiple else found  # type: ignore[attr-defined,unused-ignore]
        assert (str(found) if isinstance(found, Path) else found) == value and type(found) in (type(value), type(Path())), (given, found)
    default = param.get_default(click.Context(command))
    if isinstance(default, (int, float, str)) and not isinstance(default, bool):  # what is the default may be typed
        assert command.make_context(verb, line(verb, option, str(default))).params[param.name] == default


@pytest.mark.parametrize(("verb", "option", "row"), ROWS)
def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str], verb: str, option: str, row: Row) -> None:
    if row.flag:
        assert option in refusal(here, capsys, [*verb.split(), *line(verb, option, None)[:-1], f"{option}=1"])
        return
    if option.startswith("-") and not row.alone:
        assert option in refusal(here, capsys, [*verb.split(), *line(verb, option, None)])  # and no value behind it
    for given in (*row.refused, *row.late):
        error = refusal(here, capsys, [*verb.split(), *line(verb, option, given)])
        assert not option.startswith("-") or option in error or given in row.late, (given, error)
        shown = given[:40] if given.isprintable() and given.strip() == given and given else repr(given)
        assert shown[:40] in error, (given, error)
        assert given in row.late or "allowed: " in error, (given, error)


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_unknown_options_surplus_and_missing_arguments(here: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "--frobnicate" in refusal(here, capsys, [*verb.split(), "--frobnicate"])
    complete = line(verb, "--none", None)[:-1]
    places = sum(isinstance(p, click.Argument) for p in COMMANDS[verb].params) - sum(not x.startswith("-") for x in COMPLETE.get(verb, {}))
    assert "surplus" in refusal(here, capsys, [*verb.split(), *complete, *["x"] * places, "surplus"])
    for name in COMPLETE.get(verb, {}):
        if params(verb)[name].required:
            short = {k: v for k, v in COMPLETE[verb].items() if k != name}
            args = [x for k, v in short.items() if k.startswith("-") for x in (k, v)] + [v for k, v in short.items() if not k.startswith("-")]
            assert name in refusal(here, capsys, [*verb.split(), *args])


@pytest.mark.parametrize("args", [[], ["frobnicate"], [""], ["--frobnicate"], ["plugin", "frobnicate"], ["train", "--resume", "--no-such"]])
def test_no_verb_and_unknown_verbs(here: Path, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    if args:
        assert (args[-1] or "''") in refusal(here, capsys, args)
        return
    with pytest.raises(SystemExit) as done:
        main(args)
    assert done.value.code == 2 and "Commands" in "".join(capsys.readouterr())


def test_abbreviated_options_are_the_ones_they_begin() -> None:
    """click takes no abbreviations, so that a new option changes no script."""
    with pytest.raises(click.NoSuchOption):
        COMMANDS["train"].make_context("train", ["--out", "x", "--max-sec", "3"])
