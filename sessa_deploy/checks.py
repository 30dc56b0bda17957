"""Numbers as users give them: Python's own, numpy's, or anything that is one. Standard library only."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable

from sessa_deploy.errors import UserError


def as_integer(value: object) -> int | None:
    """An integer of any library (a numpy scalar, a tensor of one element) as Python's; None for everything else, booleans included."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_flag(value: object) -> bool | None:
    """True or False of Python or numpy as Python's; None for everything else, 0 and 1 included."""
    numpys = "bool" in str(getattr(value, "dtype", "")) and getattr(value, "shape", None) == ()
    return bool(value) if isinstance(value, bool) or numpys else None


def as_number(value: object) -> float | None:
    """A real number of any library as Python's float; None for everything else, booleans included."""
    if isinstance(value, bool):
        return None
    found = value if isinstance(value, numbers.Real) else as_integer(value)
    try:
        return None if found is None else float(found)
    except OverflowError:
        return None


def integer(name: str, value: object, low: int, high: int | None = None, allowed: str | None = None, fix: str | None = None) -> int:
    """`value` as an int in low..high (no upper end where None). Raises UserError otherwise."""
    found = as_integer(value)
    if found is None or found < low or (high is not None and found > high):
        raise UserError(f"{name} is out of range", got=repr(value), fix=fix,
                        allowed=allowed or (f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"))
    return found


def outside_vocabulary(token: object, vocab_size: int) -> UserError:
    """What to tell a user of a token id that the model does not have."""
    return UserError("a token id is outside the vocabulary", got=token, allowed=f"0..{vocab_size - 1}", fix="encode the prompt with the bundle's tokenizer")


def check_tokens(tokens: Iterable[int], vocab_size: int) -> None:
    """Raise UserError on the first id that the model does not have."""
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise outside_vocabulary(wrong, vocab_size)
