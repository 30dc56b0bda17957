"""The errors a user can cause, each one line, each with the exit code the command line returns for it."""

from __future__ import annotations


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
            text += f": got {got}"
        if allowed is not None:
            text += f"; allowed: {allowed}"
        if fix is not None:
            text += f"; fix: {fix}"
        # One line, and names out of a hostile file can neither steer a terminal nor fail to encode.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split())))


class ParityError(SessaError):
    """The numbers disagree: a rung of `validate` failed, or a bundle does not hold the checkpoint's weights."""

    exit_code = 1
