"""The kernels around a decode step, out of one of our libraries (or a folder that `python -m sessa_deploy.plugins.lower` wrote)."""

from __future__ import annotations

import ctypes
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from sessa_deploy.cuda_arch import mend, nearest
from sessa_deploy.errors import UserError
from sessa_deploy.reading import load_library

APPEND, END, DRAFT = "decode_append", "decode_end", "decode_draft"
_PARAMS = {APPEND: 5, END: 13, DRAFT: 8}
_BUILD = "sessa-deploy plugin build"


@dataclass(frozen=True)
class Image:
    """A cubin and how to launch what is in it. shared: bytes; params: all parameters, Triton's hidden ones included."""

    data: bytes
    entry: str
    warps: int
    shared: int
    params: int
    splits: int  # of the vocabulary; 0 where the kernel has none
    early: bool = False  # whether it waits for the kernel before it by itself


class _Cubin(ctypes.Structure):
    """SessaCubin of plugins/src/door.cpp."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("entry", ctypes.c_char_p), ("warps", ctypes.c_int32),
                ("shared", ctypes.c_int32), ("params", ctypes.c_int32)]


def images(source: Path, arch: int, build: str = _BUILD) -> dict[str, Image]:
    """The kernels for a GPU of compute capability `arch` (90 for 9.0), from libsessa_plugin.so, libsessa_ort.so or a folder of cubins.

    build: the command that builds that library. Raises UserError if the source is damaged, older than this version, or carries nothing for that GPU.
    """
    find = _from_folder if source.is_dir() else _from_library
    found = {APPEND: find(source, APPEND, arch, build)}
    for name in (END, DRAFT):
        try:
            found[name] = find(source, name, arch, build)
        except _NoBinary:  # the other is there
            raise UserError("the decode kernels are of another version", got=f"no {name} in {source}", allowed="kernels of this version", fix=build) from None
    if found[END].splits < 1:
        raise UserError(f"the binary of {END} has no tile SPLITS", got=str(source), allowed="kernels of this version", fix=build)
    for name, count in _PARAMS.items():
        more, wanted = found[name].params - found[APPEND].params, count - _PARAMS[APPEND]  # Triton's hidden ones are as many in each
        if more != wanted:
            raise UserError(f"the binary of {name} is of another version", got=f"{more:+d} parameters against {APPEND} in {source}", allowed=f"{wanted:+d}",
                            fix=build)
    return found


def _from_library(path: Path, name: str, arch: int, build: str) -> Image:
    try:
        library = load_library(path)
        find, tile = library.sessaFindCubin, library.sessaCubinTile
    except (OSError, AttributeError) as error:
        raise UserError("the plugin library holds no decode kernels", got=f"{path} ({error})", fix=build) from None
    cubin, key = _Cubin(), (name.encode(), ctypes.c_int32(arch), b"fp32", b"any")
    if not find(*key, ctypes.byref(cubin)):
        raise _no_binary(path, name, arch, build)
    return Image(ctypes.string_at(cubin.data, cubin.size), cubin.entry.decode(), cubin.warps, cubin.shared, cubin.params,
                 max(tile(*key, b"SPLITS"), 0), tile(*key, b"PDL") > 0)


def _from_folder(path: Path, name: str, arch: int, build: str) -> Image:
    try:
        rows = json.loads((path / "cubins.json").read_text(encoding="utf-8"))["cubins"]
        mine = {int(r["arch"]): r for r in rows if r["kernel"] == name}
        best = nearest(mine, arch)
        if best is None:
            raise _no_binary(path, name, arch, build)
        row = mine[best]
        data = (path / row["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise UserError("a cubin does not match its checksum", got=str(path / row["file"]), fix=f"python -m sessa_deploy.plugins.lower --out {path}")
        return Image(data, row["entry"], row["num_warps"], row["shared"], len(row["params"]), int(row["tiles"].get("SPLITS", 0)),
                     bool(row["tiles"].get("PDL")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("that folder holds no cubins", got=f"{path} ({error})", fix=f"python -m sessa_deploy.plugins.lower --out {path}") from None


class _NoBinary(UserError):
    """There is none of that name."""


def _no_binary(path: Path, name: str, arch: int, build: str) -> _NoBinary:
    return _NoBinary(f"no binary of {name} for this GPU", got=f"sm_{arch} in {path}", fix=mend(arch).replace(_BUILD, build))
