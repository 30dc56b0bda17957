"""Types of the command line's options: a value is read strictly, and one that is wrong is refused by the option's name before any work.

A number is what decimal ASCII spells: no spaces, underscores, hexadecimals or digits of other scripts, no NaN and no infinity.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sessa_deploy.contract import EXPORT_PRECISIONS, OPSETS, STEP_ROWS, WEIGHT_FORMATS
from sessa_deploy.errors import UserError

_INTEGER = re.compile(r"[+-]?[0-9]+\Z")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")
_CEILING = 2**31 - 1  # of every count: lengths are int32 in the graph
_SHOWN = 60  # characters of a wrong value that an error repeats


def given(param: click.Parameter | None, value: object) -> str:
    """An option and its value as they were typed, cut where that is long; the value alone for an argument."""
    text = str(value)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
    text = text if text and text.isprintable() and not any(c.isspace() for c in text) else repr(text)
    return f"{param.opts[0]} {text}" if isinstance(param, click.Option) else text


def refuse(param: click.Parameter | None, value: object, why: str, allowed: str, fix: str | None = None) -> UserError:
    """The error of a wrong value: `--top-p is out of range: got --top-p 2; allowed: a number in (0, 1]`."""
    name = (param.opts[0] if isinstance(param, click.Option) else param.human_readable_name) if param is not None else "the value"
    return UserError(f"{name} {why}", got=given(param, value), allowed=allowed, fix=fix)


class Integer(click.IntRange):
    """An integer in low..high, both included; without `high` up to the largest count there is."""

    name = "integer"

    def __init__(self, low: int, high: int | None = None, allowed: str | None = None) -> None:
        super().__init__(low, high)
        self.low, self.high = low, _CEILING if high is None else high
        self._allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, str)) or (isinstance(value, str) and not _INTEGER.match(value)):
            raise refuse(param, value, "is not an integer", self.allowed(0))
        # int() refuses thousands of digits, which are out of any range
        number = value if isinstance(value, int) else int(value) if len(value) <= 40 else self.low - 1 if value.startswith("-") else self.high + 1
        if not self.low <= number <= self.high:
            raise refuse(param, value, "is out of range", self.allowed(number))
        return number

    def allowed(self, number: int) -> str:
        """What an error says is allowed; the ceiling of all counts is told to those who met it only."""
        if self._allowed is not None:
            return self._allowed
        return f"an integer >= {self.low}" if self.max is None and number <= self.high else f"an integer in {self.low}..{self.high}"


class Seed(Integer):
    """A seed: what fits 64 bits."""

    def __init__(self) -> None:
        super().__init__(0, 2**64 - 1, "an integer in 0..2^64-1")

    def _describe_range(self) -> str:  # click would write twenty digits into every help text
        return "0<=x<2^64"


class Threads(Integer):
    """Threads of the CPU: as many as the process has cores, at most."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from sessa_deploy.runtime.environment import cores

        most = cores()  # asked now: it is the process's, not the machine's
        return Integer(1, most, f"an integer in 1..{most}, the cores this process may use").convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number between low and high; either end may be open."""

    name = "number"

    def __init__(self, low: float | None = None, high: float | None = None, low_open: bool = False, high_open: bool = False) -> None:
        super().__init__(low, high, min_open=low_open, max_open=high_open)

    def _describe_range(self) -> str:
        return "finite" if self.min is None and self.max is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (isinstance(value, str) and not _NUMBER.match(value)):
            raise refuse(param, value, "is not a finite number", self.allowed())
        number = float(value)
        low, high = -math.inf if self.min is None else self.min, math.inf if self.max is None else self.max
        inside = (low < number if self.min_open else low <= number) and (number < high if self.max_open else number <= high)
        if not inside or not math.isfinite(number):
            raise refuse(param, value, "is out of range", self.allowed())
        return number

    def allowed(self) -> str:
        """What an error says is allowed."""
        if self.min is not None and self.max is not None:
            return f"a number in {'(' if self.min_open else '['}{self.min:g}, {self.max:g}{')' if self.max_open else ']'}"
        return "a finite number" if self.min is None else f"a number {'>' if self.min_open else '>='} {self.min:g}, and finite"


class OneOf(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """One of a few words, written as they are."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(list(words))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            raise refuse(param, value, "is unknown", ", ".join(self.choices))
        return value


class TensorRtMajor(OneOf):
    """TensorRT's major version, as an int."""

    def __init__(self) -> None:
        super().__init__(("8", "10", "11"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return int(super().convert(str(value), param, ctx))


class Place(click.Path):
    """A path that can be one: not empty, without NUL, no longer than the file system takes. Whether anything is there is the verb's to say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = os.fspath(value)
        if not text or "\0" in text:
            raise refuse(param, value, "is no path", "the path of a file or folder")
        try:
            os.lstat(text)
        except (OSError, UnicodeEncodeError) as error:
            if isinstance(error, UnicodeEncodeError) or error.errno == errno.ENAMETOOLONG:
                raise refuse(param, value, "is no path", "a path that the file system takes") from None
        return super().convert(value, param, ctx)


class Words(click.ParamType):
    """Text that is not empty."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            raise refuse(param, value, "is empty", "text of one character or more")
        return value


class Extensions(click.ParamType):
    """File name extensions with commas between, as in `py,md`: a tuple of them, without dots before."""

    name = "ext,ext"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = [x.strip().lstrip(".") for x in value.split(",")]
        if not all(found) or any(set(x) & set("/\0") for x in found):
            raise refuse(param, value, "is no list of extensions", "extensions with commas between, as in py,md")
        return tuple(found)


class Names(click.ParamType):
    """Names with commas between: a tuple of them. Whether there is anything of that name is the verb's to say."""

    name = "name,name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = [x.strip() for x in value.split(",")]
        if not all(x and x.isprintable() for x in found):
            raise refuse(param, value, "is no list of names", "names with commas between, as in lm_head,layers.0")
        return tuple(found)


class Lags(click.ParamType):
    """Lags with commas between, as in `1,4,16`: a tuple of integers >= 0, in the order given."""

    name = "integer,integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        parts = value.split(",")
        if not all(re.fullmatch(r"[0-9]{1,10}", part) and int(part) <= _CEILING for part in parts):
            raise refuse(param, value, "is no list of lags", "integers >= 0 with commas between, as in 1,4,16")
        return tuple(int(part) for part in parts)


class Archs(click.ParamType):
    """Compute capabilities with commas between, as in `90,86`, each one that kernels are lowered for; the text as it was given."""

    name = "arch,arch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from sessa_deploy.cuda_arch import ARCHS

        known = [str(arch) for arch in ARCHS]
        if not set(value.split(",")) <= set(known):
            raise refuse(param, value, "is no list of compute capabilities", f"some of {','.join(known)}")
        return value


class Device(click.ParamType):
    """The name of a device to train on. Whether that GPU exists is seen when the run starts."""

    name = "auto|cpu|cuda|cuda:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
            raise UserError("no such device", got=given(param, value), allowed="auto, cpu, cuda, or cuda:N for GPU number N")
        return value


POSITIVE_INT = Integer(1)
COUNT = Integer(0)
DRAFTED = Integer(1, STEP_ROWS - 1)  # beside the token before them
PORT = Integer(0, 65535)
FINITE = Number()
POSITIVE = Number(0.0, low_open=True)
NOT_NEGATIVE = Number(0.0)
PROBABILITY = Number(0.0, 1.0, low_open=True)  # (0, 1]
SHARE = Number(0.0, 1.0, high_open=True)  # [0, 1)
FRACTION = Number(0.0, 1.0, low_open=True, high_open=True)  # (0, 1)
SEED = Seed()
THREADS = Threads()
OPSET = Integer(OPSETS[0], OPSETS[-1], f"{OPSETS[0]} to {OPSETS[-1]}")
PRECISION = OneOf(EXPORT_PRECISIONS)
WEIGHTS = OneOf(tuple(WEIGHT_FORMATS))
NAMES = Names()
BACKEND = OneOf(("auto", "ort", "ort-cuda", "trt"))
TENSORRT_MAJOR = TensorRtMajor()
TARGET = OneOf(("tensorrt", "rtx", "ort"))
PATH = Place()
PLACE = Place(path_type=Path)
FILE = Place(dir_okay=False)
TEXT = Words()
LAGS = Lags()
ARCHS = Archs()
EXTENSIONS = Extensions()
DEVICE = Device()
