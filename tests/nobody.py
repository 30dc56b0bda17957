"""Work done by a user whom permissions stop, whoever runs the tests."""

from __future__ import annotations

import os
from collections.abc import Callable


def as_nobody(work: Callable[[], str]) -> str:
    """The text that `work` returns, run in a child that is not root where this process is."""
    if os.geteuid() != 0:
        return work()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setegid(65534)
            os.seteuid(65534)
            os.write(write, work().encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return text
