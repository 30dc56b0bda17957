"""The errors a user can cause, each one line, each with the exit code the command line returns for it."""

from __future__ import annotations

_LONGEST = 4000  # characters of one line; what is longer came out of a hostile file


def one_line(text: str) -> str:
    """`text` on one line of printable characters, so that names out of a hostile file can neither steer a terminal nor fail to encode."""
    line = " ".join(text[: 2 * _LONGEST].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST // 4 else f"{text[:_LONGEST // 4]}..."


class SessaError(Exception):
    """Base of every error this package raises on purpose; `exit_code` is what the command line exits with."""

    exit_code = 2


class UserError(SessaError):
    """Bad input: what is wrong, the value got, what is allowed and how to mend it, as one line.

    >>> str(UserError("d_model is not divisible by n_heads", got="d_model=10, n_heads=4",
    ...               allowed="a multiple of n_heads", fix="change d_model in config.json"))
    'd_model is not divisible by n_heads: got d_model=10, n_heads=4; allowed: a multiple of n_heads; fix: change d_model in config.json'
    """

    def __init__(self, what: str, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        text = str(what)
        if got is not None:
            text += f": got {_short(got)}"
        if allowed is not None:
            text += f"; allowed: {allowed}"
        if fix is not None:
            text += f"; fix: {fix}"
        super().__init__(one_line(text))


class ParityError(SessaError):
    """The numbers disagree: a rung of `validate` failed, or a bundle does not hold the checkpoint's weights."""

    exit_code = 1
