"""The command line, called in this process (a support module, no tests)."""

from __future__ import annotations

from sessa_deploy.cli import main


def call(*args: object) -> int:
    """The exit code of `sessa-deploy ARGS`."""
    try:
        main([str(a) for a in args])
    except SystemExit as done:
        return int(done.code or 0)
    return 0
