"""The errors a user can cause, each one line, each with the exit code the command line returns for it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator

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


# Which extra of this package brings a library; what stands nowhere here comes with every install.
EXTRA_OF = {
    "torch": "export", "onnx": "export", "onnx_ir": "export", "onnxscript": "export", "safetensors": "export", "matplotlib": "export", "triton": "train",
    "transformers": "paper", "onnxruntime": "ort", "tensorrt": "tensorrt", "tensorrt_rtx": "rtx",
    "dynamo": "dynamo", "fastapi": "serve", "uvicorn": "serve", "pydantic": "serve", "jinja2": "serve", "prometheus_client": "serve",
}
_ALWAYS = ("click", "numpy", "platformdirs", "rich", "tokenizers")


def install_command(module: str, extra: str | None = None) -> str:
    """The command that installs the library `module` as this package wants it; extra: the one that serves the work at hand, where several bring it.

    >>> install_command("torch"), install_command("rich")
    ("pip install 'sessa-deploy[export]'", 'pip install sessa-deploy')
    """
    return f"pip install 'sessa-deploy[{extra or EXTRA_OF[module]}]'" if module in EXTRA_OF else "pip install sessa-deploy"


class MissingPackage(UserError, ImportError):
    """A library that an extra brings is absent, or cannot be imported."""


def missing_package(error: ImportError) -> MissingPackage | None:
    """What to tell a user about a failed import, or None where it is not about a library of ours to name: such an error is a bug."""
    if isinstance(error, MissingPackage):
        return error
    root = (error.name or "").partition(".")[0]
    known = (*EXTRA_OF, *_ALWAYS)
    if root not in known:
        words = re.findall(r"\w+", str(error))
        root = next((name for name in known if name in words), "")
    if not root or root == "sessa_deploy":
        return None
    why = " ".join(str(error).split()) or f"{type(error).__name__} without a message: built for another version of a library it needs"
    return MissingPackage(f"this needs the package {root}, which cannot be imported", got=why, fix=install_command(root))


def need(*modules: str, extra: str | None = None) -> None:
    """Raise MissingPackage for the first of `modules` that is not installed, before any work is done. Imports none of them. extra: as install_command."""
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise MissingPackage(f"this needs the package {module}", got="it is not installed", fix=install_command(module, extra))


@contextlib.contextmanager
def packages_named() -> Iterator[None]:
    """Turn the failed import of a library inside into MissingPackage. A context manager, and a decorator of functions that import as they run."""
    try:
        yield
    except ImportError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        raise missing from None
