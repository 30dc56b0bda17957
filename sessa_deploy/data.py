"""Text for training: any folder of files, split by file into training and held-out text, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.tokenizer import END_OF_TEXT, Tokenizer

XZ_LIMIT = 64 * 2**20  # bytes of held-out text beyond which the xz yardstick is not computed


@dataclass(frozen=True)
class Corpus:
    """Token ids of a folder of text. Documents are separated by `separator`, with one before the first.

    train, held_out: (N,) int32. train_bytes, held_out_bytes: bytes of text behind them. held_out_files: names, in order.
    skipped: names of files that are not text. xz_bits_per_byte: `xz -9` on the held-out files concatenated, None if there is too much of it.
    digest: the fingerprint, where a token file tells it; train and held_out are then mapped into memory, of the file's own integer type.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_bytes: int
    held_out_bytes: int
    train_files: Sequence[str]
    held_out_files: Sequence[str]
    separator: int
    xz_bits_per_byte: float | None = None
    skipped: tuple[str, ...] = field(default=())
    digest: str | None = None

    def fingerprint(self) -> str:
        """SHA-256 over the tokens of both halves as int32: what a resumed run must find unchanged."""
        if self.digest is not None:
            return self.digest
        digest = hashlib.sha256(self.train.tobytes())
        digest.update(self.held_out.tobytes())
        return digest.hexdigest()


def read_files(folder: str | Path, extensions: Sequence[str] = (), without: str | Path | None = None) -> tuple[list[tuple[str, bytes]], list[str]]:
    """([(name, content)], skipped names) of the text files under a folder, or of one file; names are relative, with slashes, in sorted order.

    Hidden files and folders, links and empty files are left out; a file with a NUL byte counts as binary and is skipped. What `folder` itself is may be a
    link. extensions: keep only these (`py`, `.md`); () keeps all. without: a folder below, left out. Raises UserError if nothing is left, or if a file
    or folder cannot be read.
    """
    found, skipped = [], []
    with reading_told(folder):
        files, others = list_files(folder, extensions, without)
        for name, path in files:
            content = path.read_bytes()
            if b"\0" in content:
                skipped.append(name)
            elif content:
                found.append((name, content))
    if not found:
        raise no_text(folder, len(skipped), others, extensions)
    return found, skipped


def list_files(folder: str | Path, extensions: Sequence[str] = (), without: str | Path | None = None) -> tuple[list[tuple[str, Path]], int]:
    """([(name, path)] in sorted order, how many other extensions ruled out) of the files that `read_files` reads. OSError where that cannot be seen."""
    root, away = Path(folder), None if without is None else os.path.realpath(without)
    wanted = _endings(extensions)
    found, others = [], 0
    kind = os.stat(root).st_mode
    if not stat.S_ISDIR(kind) and not stat.S_ISREG(kind):
        raise UserError("the data is neither a folder nor a file", got=f"--data {root}", allowed="a folder of text files, or one of them")
    for path in [root] if stat.S_ISREG(kind) else _below(root, away):
        if path != root and (path.is_symlink() or not path.is_file()):
            continue
        if wanted and not path.name.lower().endswith(wanted):
            others += 1
            continue
        found.append((path.name if path == root else path.relative_to(root).as_posix(), path))
    return sorted(found), others


def _endings(extensions: Sequence[str]) -> tuple[str, ...]:
    return tuple("." + e.lower().lstrip(".") for e in extensions)


@contextlib.contextmanager
def reading_told(root: str | Path) -> Iterator[None]:
    """Turns an OSError of reading a text into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError("no such data", got=error.filename or root, allowed="a folder of text files") from None
    except OSError as error:
        raise UserError("the data cannot be read", got=f"{error.filename or root} ({error.strerror})", allowed="files that this user may read",
                        fix="correct its permissions, or take it out of the folder") from None


def no_text(root: str | Path, binary: int, others: int, extensions: Sequence[str]) -> UserError:
    """What to say where nothing is left to read."""
    seen = [f"{binary} binary files"] + ([f"{others} files that do not end in {', '.join(_endings(extensions))}"] if extensions else [])
    return UserError("no text in the data folder", got=f"--data {root}, {', '.join(seen)}", allowed="files of text",
                     fix="check --data and --extensions" if extensions else "check --data")


def _below(root: Path, away: str | None) -> Iterator[Path]:
    """The files in a folder and its folders, hidden ones and `away` left out; OSError on a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(root, onerror=fail):
        folders[:] = [x for x in folders if not x.startswith(".") and os.path.realpath(Path(place, x)) != away]
        yield from (Path(place, x) for x in files if not x.startswith("."))


def is_held_out(name: str, fraction: float) -> bool:
    """Whether a file belongs to the held-out `fraction`: its name's SHA-256 decides, so the split is the same everywhere and survives new files."""
    return _rank(name) < fraction


def _rank(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2.0**64


def split_files(files: Sequence[tuple[str, bytes]], fraction: float) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    """(training, held-out) files. Neither is empty: of two or more files at least one goes each way; a single file is cut, its tail held out."""
    if not 0.0 < fraction < 1.0:
        raise UserError("the held-out fraction is out of range", got=fraction, allowed="a number in (0, 1)")
    if len(files) == 1:
        name, content = files[0]
        cut = cut_of(name, content, fraction)
        return [(name, content[:cut])], [(f"{name} (tail)", content[cut:])]
    held = {name for name, _ in files if is_held_out(name, fraction)}
    ranked = sorted((name for name, _ in files), key=_rank)
    held = (held or {ranked[0]}) - ({ranked[-1]} if len(held) == len(files) else set())
    return [x for x in files if x[0] not in held], [x for x in files if x[0] in held]


def cut_of(name: str, content: bytes | mmap.mmap, fraction: float) -> int:
    """Where the tail of a single file begins that is held out: after a line where there is one, between two characters of UTF-8 in any case."""
    if len(content) < 2:
        raise UserError("too little text to hold any of it out", got=f"{len(content)} byte in {name}", allowed="2 bytes or more", fix="give more text")
    most = min(len(content) - 1, max(1, int(len(content) * (1 - fraction))))
    cut = content.rfind(b"\n", 0, most) + 1 or most
    # one has at most 4 bytes, and those after its first are 10xxxxxx
    near = [at for at in (*range(cut, max(0, cut - 4), -1), *range(cut + 1, min(len(content), cut + 4))) if content[at] & 0xC0 != 0x80]
    return near[0] if near else cut


def byte_table(tokenizer: Tokenizer) -> np.ndarray | None:
    """(256,) int32 token id of every byte when the tokenizer knows bytes and nothing longer, else None."""
    table = np.full(256, -1, dtype=np.int32)
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        if piece is None or len(piece) > 1:
            return None
        if piece:
            table[piece[0]] = token
    return None if (table < 0).any() else table


def load_corpus(folder: str | Path, tokenizer: Tokenizer, held_out: float = 0.05, extensions: Sequence[str] = (),
                separator: int | None = None, without: str | Path | None = None) -> Corpus:
    """Read, split and encode a folder of text. A byte-level tokenizer takes any bytes; another one needs UTF-8 and files that are not are skipped.

    separator: the token between documents; None takes the tokenizer's own. without: a folder below that is left out. Raises UserError on no text or what
    cannot be read, a fraction outside (0, 1), or a tokenizer without a token to separate documents.
    """
    files, skipped = read_files(folder, extensions, without)
    table = byte_table(tokenizer)
    if table is None:
        odd = {name for name, content in files if not _is_utf8(content)}
        skipped, files = sorted([*skipped, *odd]), [x for x in files if x[0] not in odd]
        if not files:
            raise no_utf8(folder)
    separator = separator_of(tokenizer) if separator is None else separator
    halves = split_files(files, held_out)
    train, tail = (_encode(half, tokenizer, table, separator) for half in halves)
    text = b"".join(content for _, content in halves[1])
    xz = xz_bits(text) if len(text) <= XZ_LIMIT else None
    return Corpus(train, tail, sum(len(c) for _, c in halves[0]), len(text), tuple(n for n, _ in halves[0]), tuple(n for n, _ in halves[1]), separator,
                  xz, tuple(skipped))


def separator_of(tokenizer: Tokenizer) -> int:
    """The token that a tokenizer has to stand between documents. Raises UserError where it has none."""
    found = next((i for i in map(tokenizer.token_id, (END_OF_TEXT, "</s>", "<eos>", "[SEP]")) if i is not None), None)
    if found is None:
        raise UserError("the tokenizer has no token to separate documents", allowed=f"one of {END_OF_TEXT}, </s>, <eos>, [SEP]",
                        fix="add one to the tokenizers JSON")
    return found


def no_utf8(folder: str | Path) -> UserError:
    """What to say where a tokenizer that needs UTF-8 finds none."""
    return UserError("no UTF-8 text in the data folder", got=folder, fix="use the byte-level tokenizer (leave --tokenizer out)")


def xz_bits(text: bytes) -> float | None:
    """Bits per byte of `xz -9` on a text, None of an empty one."""
    return len(lzma.compress(text, preset=9)) * 8 / len(text) if text else None


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _encode(files: Sequence[tuple[str, bytes]], tokenizer: Tokenizer, table: np.ndarray | None, separator: int) -> np.ndarray:
    end = np.array([separator], dtype=np.int32)
    pieces = [end]
    for _, content in files:
        if table is not None:
            pieces.append(table[np.frombuffer(content, dtype=np.uint8)])
        else:
            pieces.append(np.array(tokenizer.encode(content.decode("utf-8")), dtype=np.int32))
        pieces.append(end)
    return np.concatenate(pieces)


class Batches:
    """Windows of `context` + 1 tokens, every window of the text once an epoch, in an order and at a phase that depend on (seed, epoch) alone.

    Batch number i is a function of i, so that a resumed run needs no state but its step. Raises UserError when the text is too short.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch_size: int, seed: int) -> None:
        self.context, self.batch_size, self.seed, self.length = context, batch_size, seed, len(tokens)
        self.windows = (len(tokens) - 1) // context - 1  # one is lost to the phase
        if self.windows < 1:
            raise UserError("too little training text for the context", got=f"{len(tokens)} tokens", allowed=f"more than {2 * context + 1} tokens",
                            fix="give more text or a smaller --context")
        self._order = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        phase = int(rng.integers(0, self.context))
        return phase + self.context * rng.permutation(self.windows)

    def starts(self, number: int) -> np.ndarray:
        """(B,) int64: where the windows of batch `number` begin in the text."""
        picks = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        return np.array([self._order(int(p) // self.windows)[int(p) % self.windows] for p in picks], dtype=np.int64)
