"""The command line: a lazy group, so that `--help` imports no verb, no torch and no engine library."""

from __future__ import annotations

import contextlib
import errno
import importlib
import re
import sys
from typing import Any

import click

from sessa_deploy import __version__
from sessa_deploy.cli.streams import guarded
from sessa_deploy.errors import SessaError, UserError, packages_named
from sessa_deploy.process import end_with_the_others, ending_cleanly, launched, leave, speaks

_SIGNALS = (129, 143)  # SIGHUP, SIGTERM
_SPACE = "free space there, or name another place"
_MENDS = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EACCES: "look at the permissions, or name another place", errno.EROFS: "name another place",
          errno.EMFILE: "allow more open files: ulimit -n 4096", errno.ENOMEM: "take a machine with more memory", errno.EIO: "look at the disk"}
_NO_MEMORY = re.compile(r"^OutOfMemoryError|can't allocate memory|bad_alloc|[Oo]ut of memory|Failed to allocate memory|CUDA_ERROR_OUT_OF_MEMORY")

# verb -> (module in this package, one line for --help), in the order in which a user meets them.
VERBS: dict[str, str] = {
    "train": "Train a model on a folder of text, or resume a run.",
    "export": "Turn a checkpoint into a deployable bundle with one model.onnx.",
    "validate": "Prove a bundle's numbers against its checkpoint, rung by rung.",
    "build": "Build an engine for TensorRT, or a graph for ONNX Runtime on CUDA, into a bundle.",
    "run": "Generate text from a bundle, streaming tokens.",
    "chat": "Talk to a bundle: turns continue one text on the caches it has.",
    "serve": "Serve a bundle to many clients at once, over OpenAI's API.",
    "score": "Score a text: log-likelihood, bits per byte, perplexity.",
    "bench": "Measure first-token and inter-token latency of a bundle.",
    "influence": "Measure how far back the layers of a checkpoint reach.",
    "inspect": "Show what a checkpoint, an ONNX file or a bundle holds.",
    "export-triton": "Write a bundle as a model of a Triton Inference Server.",
    "plugin": "Build, find and check the libraries of kernels for TensorRT and ONNX Runtime.",
    "doctor": "Show what is installed, what is missing and how to mend it.",
}


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"sessa_deploy.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and name not in VERBS and not name.startswith("-"):
            ctx.fail(f"no such verb {name!r}; one of: {', '.join(VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="sessa-deploy")
def cli() -> None:
    """Sessa, deployable: checkpoint -> model -> ONNX -> engine -> session -> tokens.

    Exit codes: 0 done, 1 the numbers disagree, 2 bad input or a machine that lacks something, 130 interrupted, 143 terminated.
    """


def main(args: list[str] | None = None) -> None:
    """Entry point. What a user or a machine can cause becomes one line on stderr and an exit code; anything else is a bug and keeps its traceback."""
    with ending_cleanly():
        code = _guarded(args)
        if code and launched():
            end_with_the_others()
    if args is None and launched():  # gloo's threads: a collective that another process breaks off may end at any moment
        leave(code)
    if code:
        sys.exit(code)


def _guarded(args: list[str] | None) -> int:
    code = 0
    try:
        with guarded():
            code = _run(args)
    except SessaError as error:  # standard output could not take what was still to be printed
        _say(f"error: {error}")
        code = code or error.exit_code
    except SystemExit as stop:  # or its reader has gone
        code = code or int(stop.code or 0)
    return code


def _run(args: list[str] | None) -> int:
    """The exit code of one command, its error said."""
    try:
        with packages_named():
            code = cli.main(args=args, prog_name="sessa-deploy", standalone_mode=False)
        return code if isinstance(code, int) else 0  # what a verb gave to ctx.exit
    except SessaError as error:
        _say(f"error: {error}")
        return error.exit_code
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
        else:
            context = getattr(error, "ctx", None)
            more = f"; see: {context.command_path} --help" if context is not None else ""
            _say(f"error: {' '.join(error.format_message().split()).rstrip('.?')}{more}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return 130
    except SystemExit as stop:
        if stop.code in _SIGNALS:
            _say("terminated")
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except (OSError, MemoryError, RecursionError, RuntimeError) as error:
        told = _machine_error(error)
        if told is None:
            raise
        _say(f"error: {told}")
        return told.exit_code


def _machine_error(error: Exception) -> UserError | None:
    """What a machine lacks, as one line: disk, permission, memory. None for a bug of ours."""
    if isinstance(error, OSError) and not isinstance(error, UnicodeError):
        places = [str(x) for x in (error.filename, error.filename2) if x is not None]
        return UserError(error.strerror or str(error), got=" -> ".join(places) or None, fix=_MENDS.get(error.errno or 0))
    if isinstance(error, RecursionError):
        return UserError("the input is nested too deeply", got=str(error) or None, allowed="a file that a person or a tool would write")
    if isinstance(error, MemoryError) or _NO_MEMORY.search(f"{type(error).__name__}: {error}"):
        return UserError("there is not enough memory", got=str(error)[:300] or None, fix="ask for less at once, or take a machine with more memory")
    return None


def _say(line: str) -> None:
    if not speaks():  # of several processes the first one speaks for all
        return
    with contextlib.suppress(OSError):  # where even stderr takes nothing there is nobody to tell
        click.echo(line, err=True)
