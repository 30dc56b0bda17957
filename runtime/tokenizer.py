"""Text <-> token ids, and a decoder that streams text without ever breaking a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sessa_deploy.contract import TOKENIZER_FILE
from sessa_deploy.errors import UserError

if TYPE_CHECKING:
    from sessa_deploy.runtime.bundle import Bundle

END_OF_TEXT = "<|endoftext|>"
BYTE_VALUES = 256
_REPLACEMENT = "\ufffd"
# Tokens the general decoder holds back while its text ends in U+FFFD; a UTF-8 character has at most 4 bytes.
_MAX_HELD = 8


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[int, str]:
    """byte -> the printable character that stands for it in byte-level tokenizers (the alphabet GPT-2 introduced)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(BYTE_VALUES):
        if byte not in alphabet:
            alphabet[byte] = chr(BYTE_VALUES + len(alphabet) - len(printable))
    return alphabet


def byte_level_tokenizer() -> str:
    """The default tokenizer as tokenizers JSON: token id = byte value for 0..255, and 256 = <|endoftext|>; 257 tokens.

    `Tokenizer.from_json` here, or `tokenizers.Tokenizer.from_str`, reads it.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocab={char: byte for byte, char in sorted(byte_alphabet().items())}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    text: str = library.to_str()
    return text


class Tokenizer:
    """A tokenizers JSON file, opened for a language model: what text becomes depends on the text alone, whole and at any place of a conversation.

    path: the file, or a folder that holds tokenizer.json. Raises UserError if it is absent or not a tokenizers JSON.
    ignored: what the file asks for and does not get, in words: truncation, padding, dropout, and special tokens around every text.
    first: the special tokens that its post-processor puts before a text; `encode_first` puts them where a conversation begins, and nothing else does.
    """

    ignored: tuple[str, ...]
    first: tuple[int, ...]

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if path.is_dir():
            path = path / TOKENIZER_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("no tokenizer", got=f"{path} ({error})", allowed="a tokenizers JSON file",
                            fix=f"put a {TOKENIZER_FILE} into the checkpoint and run: sessa-deploy export") from None
        self._open(text, str(path))

    @classmethod
    def from_json(cls, text: str, source: str = TOKENIZER_FILE) -> Tokenizer:
        """Build from the JSON's text. Raises UserError if it is not a tokenizers JSON."""
        tokenizer = cls.__new__(cls)
        tokenizer._open(text, source)
        return tokenizer

    @classmethod
    def of(cls, bundle: Bundle) -> Tokenizer | None:
        """A bundle's tokenizer, of the very bytes that match the manifest; None if it has none."""
        if TOKENIZER_FILE not in bundle:
            return None
        return cls.from_json(bundle.read(TOKENIZER_FILE).decode("utf-8", "surrogateescape"), str(bundle.file(TOKENIZER_FILE)))

    def _open(self, text: str, source: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library: Any = Library.from_str(text)
            data = json.loads(text)
            added = {int(entry["id"]): bool(entry.get("special")) for entry in data.get("added_tokens") or []}
            self._byte_level = (data.get("decoder") or {}).get("type") == "ByteLevel"
            self._neutralise(data)
        except BaseException as error:  # the library raises bare Exception on any malformed file, and a PanicException beside Exception's tree
            if isinstance(error, MemoryError) or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
                raise
            raise UserError(f"{source} is not a tokenizers JSON that tokenizers {metadata.version('tokenizers')} reads", got=str(error)[:300],
                            fix="pip install -U tokenizers, or save it with tokenizers' Tokenizer.save") from None
        self._text = text
        self._special = frozenset(i for i, special in added.items() if special)
        self._added = frozenset(added)
        self._known: dict[int, bytes] = {}  # a token's bytes, once asked for
        self._bytes_of = {char: byte for byte, char in byte_alphabet().items()} if self._byte_level else {}

    def _neutralise(self, data: dict[str, Any]) -> None:
        """Undo what a file may ask for around the encoding itself, and remember it."""
        ignored = []
        if data.get("truncation"):
            ignored.append(f"truncation to {data['truncation'].get('max_length')} tokens")
            self._library.no_truncation()
        if data.get("padding"):
            fixed = data["padding"].get("strategy")
            ignored.append(f"padding to {fixed['Fixed']} tokens" if isinstance(fixed, dict) and "Fixed" in fixed else "padding")
            self._library.no_padding()
        if (data.get("model") or {}).get("dropout"):
            ignored.append(f"dropout of {data['model']['dropout']:g}")
            self._library.model.dropout = None
        self.first, last = self._around()
        self._surrounds = bool(self.first or last)
        if self.first:
            ignored.append(f"{self._names(self.first)} before every text (a conversation begins with it once)")
        if last:
            ignored.append(f"{self._names(last)} behind every text")
        self.ignored = tuple(ignored)

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the post-processor puts before and behind a text."""
        if self._library.post_processor is None:
            return (), ()
        for probe in ("a", "0", " ", "\u00e9"):  # the first that the vocabulary has a token for
            found = self._library.encode(probe)
            own = [at for at, special in enumerate(found.special_tokens_mask) if not special]
            if own:
                return tuple(found.ids[: own[0]]), tuple(found.ids[own[-1] + 1 :])
        return (), ()

    def _names(self, ids: Sequence[int]) -> str:
        return " ".join(str(self._library.id_to_token(i)) for i in ids)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs for its tokens: the largest id + 1, special ones included."""
        return int(max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)) + 1

    @property
    def ignored_line(self) -> str | None:
        """One line about what the file asks for and does not get; None where there is nothing to say."""
        return f"{TOKENIZER_FILE} asks for {', '.join(self.ignored)}: ignored, text is encoded whole and as it is" if self.ignored else None

    def to_json(self) -> str:
        """The tokenizers JSON it was made from."""
        return self._text

    def plain_json(self) -> str:
        """The tokenizers JSON without what `ignored` names, so that other programs encode with it as this one does."""
        plain = json.loads(self._library.to_str())
        if self._surrounds:
            plain["post_processor"] = None
        return json.dumps(plain, ensure_ascii=False)

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text (`<|endoftext|>`), or None."""
        found = self._library.token_to_id(token)
        return None if found is None else int(found)

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it (`<|endoftext|>`; bytes in a byte-level one stand there as its alphabet has them), or None."""
        found = self._library.id_to_token(int(token_id))
        return None if found is None else str(found)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` and nothing around them; special tokens written out in it are recognised.

        Raises UserError on text that UTF-8 cannot carry and on text that the vocabulary cannot.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError("the text is not valid Unicode", got=str(error), fix="pass UTF-8 text") from None
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a vocabulary without an unknown token raises a bare Exception
            raise UserError("the tokenizer cannot encode the text", got=str(error)[:300], fix="use a tokenizer that knows every character") from None
        return ids

    def encode_first(self, text: str, bos: int | None = None) -> list[int]:
        """Token ids of text that begins a conversation: the model's bos token (None: the tokenizer's own `first`) before it, unless it is written out there.
        """
        return self.begun(self.encode(text), bos)

    def begun(self, ids: Sequence[int], bos: int | None = None) -> list[int]:
        """Token ids that begin a conversation, with what `encode_first` puts before a text, unless they begin with it."""
        first = self.first if bos is None or bos in self.first else (bos,)
        return list(ids) if tuple(ids[: len(first)]) == first else [*first, *ids]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._library.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text

    def token_bytes(self, token: int) -> bytes | None:
        """Bytes a token stands for in a byte-level tokenizer (empty for a special token); None for another kind of tokenizer."""
        if not self._byte_level:
            return None
        found = self._known.get(token)
        if found is None:
            found = self._known[int(token)] = self._find_bytes(int(token))
        return found

    def _find_bytes(self, token: int) -> bytes:
        piece = None if token in self._special else self._library.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added or any(char not in self._bytes_of for char in piece):
            return str(piece).encode("utf-8")
        return bytes(self._bytes_of[char] for char in piece)

    def stream(self, context: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for tokens as they are generated; `context` is what precedes them (it decides about a leading space)."""
        return StreamDecoder(self, context)


class StreamDecoder:
    """Turns ids into text as they come: `push` returns what is certain by now, `flush` the rest.

    The pieces joined are the decoded text. A character whose bytes arrive in several tokens comes out whole, and U+FFFD only
    once no further byte can mend it.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The general path decodes a window whose first part was already handed out, since the text of a token may depend on its neighbours.
        self._shown: list[int] = [int(i) for i in context][-_MAX_HELD:]
        self._held: list[int] = []

    @property
    def held(self) -> bool:
        """Whether text of a token that was pushed is still to come."""
        return bool(self._held or self._utf8.getstate()[0])

    def push(self, token: int) -> str:
        """Text that token `token` completes; may be empty."""
        raw = self._tokenizer.token_bytes(token)
        if raw is not None:
            return self._utf8.decode(raw)
        self._held.append(int(token))
        text = self._pending()
        if not text or (text.endswith(_REPLACEMENT) and len(self._held) < _MAX_HELD):
            return ""
        self._shown, self._held = self._held, []
        return text

    def flush(self) -> str:
        """What is still held back, incomplete bytes as U+FFFD. The decoder is empty afterwards."""
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        if self._held:
            text += self._pending()
            self._shown, self._held = self._held, []
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode([*self._shown, *self._held])[len(before):]
