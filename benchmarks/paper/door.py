"""How the commands of this folder end: an error of a user's is one line, as in `sessa-deploy`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from sessa_deploy.errors import SessaError, packages_named


def leave(main: Callable[[], int]) -> NoReturn:
    """Exit with main's code, an error's own, or 130 after Ctrl-C."""
    try:
        with packages_named():
            code = main()
    except SessaError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
