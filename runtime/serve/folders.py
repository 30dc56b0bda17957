"""Folders that other engines read, written from a bundle: each appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sessa_deploy.config import CONFIG_FILE, GENERATION_CONFIG_FILE
from sessa_deploy.contract import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.reading import parse_json
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.publish import Staging, locked
from sessa_deploy.runtime.template import ChatTemplate
from sessa_deploy.runtime.tokenizer import Tokenizer


@contextlib.contextmanager
def whole_folder(target: Path, marker: str, what: str) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends well; else the target is as it was. The caller has seen that it may be replaced.

    marker: the file without which the folder is nothing. what: its name in errors. Raises UserError where the disk refuses.
    """
    target = Path(os.path.realpath(target))
    try:
        with Staging(target) as staging:
            yield staging.folder
            with locked(target):
                staging.publish(marker)
    except OSError as error:
        raise UserError(f"{what} cannot be written", got=f"{target} ({error.strerror or error})", fix="free space there, or name another place") from None


def hugging_face_files(bundle: Bundle, context: int) -> dict[str, bytes]:
    """The files that programs of Hugging Face's make read beside a model, name -> contents: config.json, generation_config.json, tokenizer.json and
    tokenizer_config.json, whose chat_template is the bundle's.

    context: tokens of a sequence, prompt and answer. tokenizer.json encodes as this package does: whole, without padding, and without special tokens
    around a text. Raises UserError if the bundle has no tokenizer.
    """
    if TOKENIZER_FILE not in bundle:
        raise UserError(f"the bundle has no {TOKENIZER_FILE}", got=str(bundle.path), allowed="a bundle that takes text",
                        fix=f"put a {TOKENIZER_FILE} into the checkpoint and run: sessa-deploy export")
    config, tokenizer, template = bundle.config, Tokenizer.of(bundle), ChatTemplate.of(bundle)
    assert tokenizer is not None
    ends = list(dict.fromkeys((*config.eos_token_ids, *(() if template is None else template.ends(tokenizer)))))
    special = {"bos_token": config.bos_token_id, "eos_token": ends[0] if ends else None, "pad_token": config.pad_token_id}
    settings: dict[str, Any] = {name: tokenizer.token(token) for name, token in special.items() if token is not None}
    if TOKENIZER_CONFIG_FILE in bundle:
        settings |= parse_json(bundle.read(TOKENIZER_CONFIG_FILE), bundle.file(TOKENIZER_CONFIG_FILE))
    if template is not None:
        settings["chat_template"] = template.text
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False, "add_bos_token": False}
    shape = {**config.to_dict(), "eos_token_id": ends or None, "max_position_embeddings": context, "hidden_size": config.d_model,
             "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": ends or None, "pad_token_id": config.pad_token_id}
    found = {CONFIG_FILE: shape, GENERATION_CONFIG_FILE: {name: value for name, value in ids.items() if value is not None},
             TOKENIZER_CONFIG_FILE: settings}
    files = {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace") for name, value in found.items()}
    return files | {TOKENIZER_FILE: tokenizer.plain_json().encode("utf-8", "surrogateescape")}


def write_hugging_face(bundle: Bundle, context: int, target: Path | None = None) -> Path:
    """A folder of `hugging_face_files`: `target`, or one in the user's cache that every process with the same files shares. Returns its path.

    An older folder of such files is replaced. Raises UserError if something else stands at `target`, and as `hugging_face_files` does.
    """
    files = hugging_face_files(bundle, context)
    if target is None:
        import platformdirs

        digest = hashlib.sha256(b"".join(name.encode() + b"\0" + hashlib.sha256(files[name]).digest() for name in sorted(files))).hexdigest()
        target = Path(platformdirs.user_cache_dir("sessa-deploy", appauthor=False)) / "hugging-face" / digest[:16]
    if _holds(target, files):
        return target
    if os.path.lexists(target):
        strange = sorted(set(os.listdir(target)) - set(files)) if target.is_dir() else [target.name]
        if strange:
            raise UserError("the folder for the Hugging Face files holds something else", got=f"{', '.join(strange[:6])} in {target}",
                            allowed="an empty folder, or one that this program wrote", fix="name another place")
    with whole_folder(target, CONFIG_FILE, "the folder of Hugging Face files") as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return target


def _holds(target: Path, files: Mapping[str, bytes]) -> bool:
    try:
        return all((target / name).read_bytes() == data for name, data in files.items())
    except OSError:
        return False
