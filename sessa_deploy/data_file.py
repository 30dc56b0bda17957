"""A corpus as one file of token ids, for text that does not fit into memory: written once by `prepare`, mapped by the runs that train on it.

The file is a safetensors file with the vectors "train" and "held_out" (U16 where every id fits, else I32); what belongs to them stands in its metadata.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sessa_deploy.data import (
    XZ_LIMIT,
    Corpus,
    byte_table,
    cut_of,
    list_files,
    no_text,
    no_utf8,
    reading_told,
    separator_of,
    split_files,
    xz_bits,
)
from sessa_deploy.errors import UserError
from sessa_deploy.files import whole
from sessa_deploy.runtime.tokenizer import Tokenizer
from sessa_deploy.safetensors_check import MAX_HEADER, Header, read_header

_MARK, _VERSION = "sessa_deploy.tokens", "1"
_BEGIN = f'{{"__metadata__":{{"format":"{_MARK}"'.encode()
_PIECE = 16 * 2**20  # bytes of text that are encoded at once; a longer document is cut between two lines where it has any
_SLACK = 4096  # bytes of the header for numbers that are not known when its room is set aside
_TYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4")}


@dataclass
class _Half:
    """One half of a corpus while it is written. pieces: where its text is, a list of (name, path, begin, end) in bytes."""

    pieces: list[tuple[str, Path, int, int]]
    tokens: int = 0
    size: int = 0


def is_token_file(path: str | Path) -> bool:
    """Whether `path` is a file that `prepare` wrote, as far as its beginning tells. Opens no pipe."""
    try:
        if not Path(path).is_file():
            return False
        with open(path, "rb") as file:
            return file.read(8 + len(_BEGIN))[8:] == _BEGIN
    except OSError:
        return False


def prepare(data: str | Path, out: str | Path, tokenizer: Tokenizer, held_out: float = 0.05, extensions: tuple[str, ...] = (),
            separator: int | None = None) -> Corpus:
    """Read, split and encode a folder of text, or one file, as `load_corpus` does, but piece by piece, into the file `out`; returns its corpus, mapped.

    The ids are those of `load_corpus`, but for documents above 16 MiB, which a tokenizer that joins lines may cut otherwise. Raises UserError on what
    `load_corpus` refuses, and where `out` cannot be written or is a file of another kind.
    """
    separator = separator_of(tokenizer) if separator is None else separator
    out, table = Path(out), byte_table(tokenizer)
    if out.exists() and not is_token_file(out):
        raise UserError("the file for the tokens is there already, and is none of ours", got=out, fix="choose another --out, or remove it")
    with reading_told(data):
        files, others = list_files(data, extensions)
        kept, skipped = _texts([(name, path) for name, path in files if path.resolve() != out.resolve()], utf8=table is None)
        if not kept:
            raise no_utf8(data) if skipped and table is None else no_text(data, len(skipped), others, extensions)
        halves = _split(kept, held_out)
        with whole(out, "--out", "the token file") as stream:
            if not stream.seekable():
                raise UserError("the token file cannot be written", got=f"{out} (no regular file)", fix="choose another --out")
            _write(stream, halves, skipped, tokenizer, table, separator)
    return open_tokens(out)[0]


def open_tokens(path: str | Path) -> tuple[Corpus, Tokenizer]:
    """The corpus of a token file, its ids mapped into memory, and its tokenizer. Raises UserError if the file is damaged or of another kind."""
    path = Path(path)
    header = read_header(path)
    meta = header.metadata
    if meta.get("format") != _MARK or meta.get("version") != _VERSION:
        raise UserError(f"{path} is no token file", got=f"{meta.get('format')} {meta.get('version')}", allowed=f"{_MARK} {_VERSION}",
                        fix="write it with: sessa-deploy train --prepare")
    try:
        train, tail = (_mapped(path, header, name) for name in ("train", "held_out"))
        numbers = {name: int(meta[name]) for name in ("train_bytes", "held_out_bytes", "train_files", "separator")}
        unnamed = [""] * numbers["train_files"]  # only how many there are is asked for
        held, skipped, xz = (json.loads(meta[name]) for name in ("held_out_files", "skipped_files", "xz_9_bits_per_byte"))
        corpus = Corpus(train, tail, numbers["train_bytes"], numbers["held_out_bytes"], unnamed, tuple(held), numbers["separator"], xz,
                        tuple(skipped), meta["tokens_sha256"])
        tokenizer = Tokenizer.from_json(meta["tokenizer"], source=f"the tokenizer in {path}")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no whole token file", got=f"{type(error).__name__}: {str(error)[:100]}",
                        fix="write it again with: sessa-deploy train --prepare") from None
    return corpus, tokenizer


def _mapped(path: Path, header: Header, name: str) -> np.memmap:
    info = header.tensors[name]
    data = header.file_size - max(x.end for x in header.tensors.values())
    return np.memmap(path, dtype=_TYPES[info.dtype], mode="c", offset=data + info.begin, shape=info.shape)  # never written; torch wants it to be possible


def _texts(files: list[tuple[str, Path]], utf8: bool) -> tuple[list[tuple[str, Path]], list[str]]:
    """(files of text, names of others). utf8: what is not UTF-8 is none."""
    kept, skipped = [], []
    for name, path in files:
        decoder, good, empty = codecs.getincrementaldecoder("utf-8")(), True, True
        with open(path, "rb") as file:
            while good and (block := file.read(_PIECE)):
                empty = False
                good = b"\0" not in block and not (utf8 and not _decodes(decoder, block))
        if good and utf8 and not _decodes(decoder, b"", final=True):
            good = False
        if not good:
            skipped.append(name)
        elif not empty:
            kept.append((name, path))
    return kept, skipped


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return True


def _split(files: list[tuple[str, Path]], fraction: float) -> tuple[_Half, _Half]:
    sizes = {name: path.stat().st_size for name, path in files}
    if len(files) == 1:
        (name, path), size = files[0], sizes[files[0][0]]
        if not 0.0 < fraction < 1.0 or size < 2:
            split_files([(name, path.read_bytes())], fraction)  # says what is wrong
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            cut = cut_of(name, content, fraction)
        return _Half([(name, path, 0, cut)]), _Half([(f"{name} (tail)", path, cut, size)])
    places = dict(files)
    train, tail = split_files([(name, b"") for name, _ in files], fraction)  # names alone decide
    return tuple(_Half([(name, places[name], 0, sizes[name]) for name, _ in half]) for half in (train, tail))  # type: ignore[return-value]


def _write(stream: BinaryIO | Any, halves: tuple[_Half, _Half], skipped: list[str], tokenizer: Tokenizer, table: np.ndarray | None, separator: int) -> None:
    kind = "U16" if tokenizer.vocab_size <= 2**16 and separator < 2**16 else "I32"
    meta = {"format": _MARK, "version": _VERSION, "tokenizer": tokenizer.to_json(), "separator": str(separator), "skipped_files": json.dumps(skipped),
            "held_out_files": json.dumps([name for name, *_ in halves[1].pieces])}
    room = (len(json.dumps(meta).encode()) + _SLACK) // 8 * 8
    if room > MAX_HEADER:
        raise UserError("the names of the files do not fit into a token file", got=f"{room:,} bytes", allowed=f"{MAX_HEADER:,}", fix="join small files")
    stream.write(struct.pack("<Q", room) + b" " * room)
    digest, tail = hashlib.sha256(), bytearray()
    for i, half in enumerate(halves):
        for ids, text in _encoded(half, tokenizer, table, separator):
            digest.update(ids.astype("<i4").tobytes())
            stream.write(ids.astype(_TYPES[kind]).tobytes())
            half.tokens, half.size = half.tokens + len(ids), half.size + len(text)
            if i == 1 and len(tail) <= XZ_LIMIT:
                tail += text
    xz = xz_bits(bytes(tail)) if halves[1].size <= XZ_LIMIT else None
    meta |= {"train_bytes": str(halves[0].size), "held_out_bytes": str(halves[1].size), "train_files": str(len(halves[0].pieces)),
             "xz_9_bits_per_byte": json.dumps(xz), "tokens_sha256": digest.hexdigest()}
    header: dict[str, Any] = {"__metadata__": meta}
    begin = 0
    for name, half in zip(("train", "held_out"), halves, strict=True):
        end = begin + half.tokens * _TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": [half.tokens], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= room
    stream.seek(8)
    stream.write(text)  # spaces behind it belong to the format
    stream.flush()


def _encoded(half: _Half, tokenizer: Tokenizer, table: np.ndarray | None, separator: int) -> Iterator[tuple[np.ndarray, bytes]]:
    """(ids, their text) of a half, piece by piece: a separator, and each document with one behind it."""
    end = np.array([separator], dtype=np.int32)
    yield end, b""
    for _, path, first, last in half.pieces:
        for text in _pieces(path, first, last, between_lines=table is None):
            ids = np.array(tokenizer.encode(text.decode("utf-8")), dtype=np.int32) if table is None else table[np.frombuffer(text, dtype=np.uint8)]
            yield ids, text
        yield end, b""


def _pieces(path: Path, first: int, last: int, between_lines: bool) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(first)
        kept = b""
        while block := file.read(min(_PIECE, last - file.tell())):
            kept += block
            done = file.tell() >= last
            cut = len(kept) if done or not between_lines else kept.rfind(b"\n") + 1
            if cut:
                yield kept[:cut]
                kept = kept[cut:]
        if kept:
            yield kept
