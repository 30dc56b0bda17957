"""The command line: a lazy group, so that `--help` imports no verb, no torch and no engine library."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from sessa_deploy import __version__
from sessa_deploy.errors import SessaError, packages_named

# verb -> (module in this package, one line for --help), in the order in which a user meets them.
VERBS: dict[str, str] = {
    "train": "Train a model on a folder of text, or resume a run.",
    "export": "Turn a checkpoint into a deployable bundle with one model.onnx.",
    "validate": "Prove a bundle's numbers against its checkpoint, rung by rung.",
    "build": "Build a TensorRT engine into a bundle.",
    "run": "Generate text from a bundle, streaming tokens.",
    "bench": "Measure first-token and inter-token latency of a bundle.",
    "inspect": "Show what a checkpoint, an ONNX file or a bundle holds.",
    "plugin": "Build, find and check the TensorRT plugin library.",
    "doctor": "Show what is installed, what is missing and how to mend it.",
}


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"sessa_deploy.cli.{cmd_name}").command
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

    Exit codes: 0 done, 1 the numbers disagree, 2 bad input, 130 interrupted.
    """


def main(args: list[str] | None = None) -> None:
    """Entry point. A SessaError becomes one line on stderr and its exit code; anything else is a bug and keeps its traceback."""
    try:
        with packages_named():
            code = cli.main(args=args, prog_name="sessa-deploy", standalone_mode=False)
        if isinstance(code, int) and code:  # what a verb gave to ctx.exit
            sys.exit(code)
    except SessaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            error.show()
        else:
            context = getattr(error, "ctx", None)
            more = f"; see: {context.command_path} --help" if context is not None else ""
            click.echo(f"error: {' '.join(error.format_message().split()).rstrip('.?')}{more}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
