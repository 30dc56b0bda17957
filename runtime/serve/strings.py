"""Tokens as the strings and bytes that log probabilities are told with."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sessa_deploy.runtime.tokenizer import Tokenizer

_METASPACE = "\u2581"


class TokenStrings:
    """What tokens are called. tokenizer: None where a bundle has none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._strings: dict[int, str] = {}

    def string(self, token: int) -> str:
        """A token as log probabilities name it: its text, or bytes:\\x.. where its bytes are no whole characters; token_id:N without a tokenizer."""
        if token not in self._strings:
            raw = self.raw(token)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._strings[token] = text if self._tokenizer is not None else f"token_id:{token}"
        return self._strings[token]

    def raw(self, token: int) -> bytes:
        """A token's bytes; none without a tokenizer."""
        if self._tokenizer is None:
            return b""
        raw, piece = self._tokenizer.token_bytes(token), self._tokenizer.token(token)
        if raw or piece is None:
            return raw or b""
        if raw is None and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # a byte of a vocabulary with byte fallback
            return codecs.decode(piece[3:5], "hex") if all(c in "0123456789ABCDEFabcdef" for c in piece[3:5]) else piece.encode()
        return piece.replace(_METASPACE, " ").encode("utf-8", "replace")
