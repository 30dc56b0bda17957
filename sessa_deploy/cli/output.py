"""Where a verb's JSON goes: into a file, or to standard output with nothing beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sessa_deploy.errors import UserError
from sessa_deploy.files import check_target, write_whole

STDOUT = "-"


class JsonCommand(click.Command):
    """A verb whose --json takes a file, `-` for standard output, or nothing, which is standard output too; the verb's own arguments are served first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = list(args)
        valued = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag and not p.count for name in p.opts}
        wanted = sum(isinstance(p, click.Argument) and p.required for p in self.params)
        ended = args.index("--") if "--" in args else len(args)
        words = sum(1 for i, word in enumerate(args) if word != "--" and (i > ended or word == STDOUT or not word.startswith("-"))
                    and (i == 0 or i > ended or args[i - 1] not in valued or args[i - 1] == "--json"))
        for i, word in enumerate(args[:ended]):
            after = args[i + 1] if i + 1 < len(args) else "--"
            if word == "--json" and after != STDOUT and (after.startswith("-") or words <= wanted):
                args.insert(i + 1, STDOUT)
                break
        return super().parse_args(ctx, args)


def to_stdout(target: str | Path | None) -> bool:
    """Whether an output option says standard output."""
    return target is not None and str(target) == STDOUT


def check_outputs(outputs: Mapping[str, tuple[str | Path | None, str]]) -> None:
    """Raise UserError, before any work, if a file that an option names cannot be written; outputs: option -> (its value, what goes there)."""
    seen: dict[str, str] = {}
    for option, (target, what) in outputs.items():
        if target is None:
            continue
        if not to_stdout(target):
            check_target(target, option, what)
        place = STDOUT if to_stdout(target) else os.path.realpath(target)
        if place in seen and not place.startswith("/dev/"):
            raise UserError(f"{seen[place]} and {option} go to the same place", got=target, fix=f"choose another {option}")
        seen[place] = option


def write_json(target: str | Path, data: Any, what: str = "the figures", indent: int = 2) -> None:
    """Write `data` where --json says. Raises UserError if that fails."""
    write_text(target, json.dumps(data, indent=indent) + "\n", "--json", what)


def write_text(target: str | Path, text: str, option: str, what: str) -> None:
    """Write text where an option says. Raises UserError if that fails, SystemExit(0) where whoever read it has gone."""
    if to_stdout(target):
        click.echo(text, nl=False)
        return
    try:
        write_whole(target, text, option, what)
    except BrokenPipeError:
        raise SystemExit(0) from None


def size(count: int | None) -> str:
    """Bytes as a user reads them; None is a file that is not there."""
    if count is None:
        return "missing"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
