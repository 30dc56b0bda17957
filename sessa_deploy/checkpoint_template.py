"""A checkpoint's chat template, as Hugging Face's tools write it: chat_template.jinja, or chat_template in tokenizer_config.json. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sessa_deploy.config import Note, SessaConfig
from sessa_deploy.contract import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.reading import JSON_LIMIT, read_json, read_plain
from sessa_deploy.runtime.template import SPECIAL_TOKENS, ChatTemplate, decoded
from sessa_deploy.runtime.tokenizer import Tokenizer

_LIMIT = 1 << 20  # bytes of a template; the longest in use have some ten thousand
_SPECIAL_FILE = "special_tokens_map.json"
_DEFAULT = "default"


def read_template(folder: Path, config: SessaConfig, tokenizer: bytes | None, note: Note | None = None) -> dict[str, bytes]:
    """What a bundle carries of a checkpoint's chat template, file name -> contents; nothing where there is none.

    chat_template.jinja comes before tokenizer_config.json's chat_template, of whose named templates "default" is taken. tokenizer: the bundle's, without
    which a template is passed over. Raises UserError if one of the files cannot be read, or the template is broken (see ChatTemplate.prove).
    """
    settings = _object(folder / TOKENIZER_CONFIG_FILE)
    path = folder / TEMPLATE_FILE
    if os.path.lexists(path):
        text, source = decoded(read_plain(path, _LIMIT), str(path)), str(path)
    else:
        text, source = _of_settings(settings.get("chat_template"), str(folder / TOKENIZER_CONFIG_FILE)), f"{folder / TOKENIZER_CONFIG_FILE}: chat_template"
    if not text:
        return {}
    if tokenizer is None:
        if note is not None:
            note(f"{source} is passed over: without a tokenizer there is no chat")
        return {}
    special = _special(settings, folder, config, Tokenizer.from_json(tokenizer.decode("utf-8", "surrogateescape")))
    ChatTemplate(text, special, source).prove()
    return {TEMPLATE_FILE: text.encode("utf-8"), TOKENIZER_CONFIG_FILE: (json.dumps(special, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")}


def _of_settings(found: Any, source: str) -> str:
    """The text of tokenizer_config.json's chat_template; "" where there is none."""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if found and _DEFAULT not in named:
            raise UserError(f"{source} has no default chat template", got=f"templates named {', '.join(map(str, named)) or 'nothing'}",
                            allowed="one named default")
        found = named.get(_DEFAULT)
    if found is not None and not isinstance(found, str):
        raise UserError(f"{source} has a chat_template that is no text", got=type(found).__name__, allowed="a jinja2 template")
    if found is not None and len(found) > _LIMIT:
        raise UserError(f"{source} has a chat_template that is too large", got=f"{len(found)} characters", allowed=f"at most {_LIMIT}")
    return found or ""


def _special(settings: dict[str, Any], folder: Path, config: SessaConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that a template may name: the tokenizer's own, else those of the model's configuration."""
    older, found = _object(folder / _SPECIAL_FILE), {}
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None), "pad_token": config.pad_token_id}
    for name in SPECIAL_TOKENS:
        value = settings.get(name) or older.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        token = ids.get(name)
        if isinstance(value, str):
            found[name] = value
        elif token is not None and (text := tokenizer.token(token)) is not None:
            found[name] = text
    return found


def _object(path: Path) -> dict[str, Any]:
    """A JSON object's file; {} where there is none. Raises UserError on anything else there."""
    if not os.path.lexists(path):
        return {}
    data = read_json(path, JSON_LIMIT)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object", got=type(data).__name__, allowed="what a tokenizer's save_pretrained writes")
    return data
