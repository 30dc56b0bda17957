"""A checkpoint's tokenizer.json, judged against the model: it is one, and it knows no token that the model lacks. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.contract import TOKENIZER_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.reading import JSON_LIMIT, read_plain
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer


def read_tokenizer(folder: Path, config: SessaConfig, note: Note | None = None) -> bytes | None:
    """The tokenizer.json of a checkpoint's folder, else the byte-level one if the vocabulary is its size, else None.

    note: hears of what the file asks for and does not get. Raises UserError if the file cannot be read, is no tokenizers JSON, or does not fit the
    model (see `check_tokenizer`).
    """
    path = folder / TOKENIZER_FILE
    if os.path.lexists(path):
        content = read_plain(path, JSON_LIMIT)
        line = check_tokenizer(content, config.vocab_size, path).ignored_line
        if line and note is not None:
            note(line)
        return content
    text = byte_level_tokenizer()
    return text.encode() if Tokenizer.from_json(text).vocab_size == config.vocab_size else None


def check_tokenizer(content: bytes, vocab_size: int, source: str | Path) -> Tokenizer:
    """`content`, opened. Raises UserError unless it is a tokenizers JSON whose ids are below `vocab_size`; fewer tokens than rows (padding) are right."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not a tokenizers JSON", got=str(error), allowed="UTF-8", fix="save it with tokenizers' Tokenizer.save") from None
    tokenizer = Tokenizer.from_json(text, str(source))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{source} has more tokens than the model", got=f"{tokenizer.vocab_size} tokens", allowed=f"at most vocab_size {vocab_size}",
                        fix="put the tokenizer there that the model was trained with")
    return tokenizer
