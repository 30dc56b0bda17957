"""Writing a checkpoint folder: whole or not at all, in shards above a size, in any storage type."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sessa_deploy.checkpoint_files import INDEX_FILE, WEIGHTS_FILE
from sessa_deploy.checkpoint_tokenizer import check_tokenizer
from sessa_deploy.config import CONFIG_FILE
from sessa_deploy.contract import PRECISIONS, TOKENIZER_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLM
from sessa_deploy.reading import JSON_LIMIT, read_plain
from sessa_deploy.runtime.publish import Staging, is_staging, locked
from sessa_deploy.safetensors_check import shorten

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
GAMMA_TENSORS = ("mixer.gamma_bias", "mixer.gamma_ctx.weight")
CARD_FILE = "MODEL_CARD.md"
MAX_SHARD_BYTES = 5 * 10**9
_OWN_FILES = re.compile(r"^(config\.json|tokenizer\.json|model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors)$")


def save_checkpoint(
    model: SessaLM, folder: str | Path, dtype: torch.dtype | str | None = None, tokenizer: str | Path | Any | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, card: str | None = None,
) -> Path:
    """Write config.json and model.safetensors (shards and an index above max_shard_bytes) into `folder`, which appears whole or not at all.

    dtype: storage type, by default the parameters' own; gamma's two parameters are stored in float32 at least. tokenizer: the path or text of a
    tokenizers JSON, or a tokenizers.Tokenizer. card: text of MODEL_CARD.md, None writes none. An existing checkpoint folder is replaced, its other plain
    files kept. Returns the folder. Raises UserError if the folder holds something else or cannot be written, if a weight is not finite or overflows
    dtype, or if the tokenizer does not fit; the folder is then as it was.
    """
    folder, storage = Path(folder).absolute(), None if dtype is None else storage_dtype(dtype)
    kept = _kept_files(folder)
    state = {name: x.detach() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    texts = {} if card is None else {CARD_FILE: card}
    if tokenizer is not None:
        texts[TOKENIZER_FILE] = _tokenizer_text(tokenizer, model.config.vocab_size)
    try:
        with Staging(folder) as staging:
            model.config.save(staging.folder)
            for name, text in texts.items():
                (staging.folder / name).write_text(text, encoding="utf-8")
            _write_weights(staging.folder, state, storage, max_shard_bytes)
            for file in kept:
                if file.name not in texts:
                    shutil.copy2(file, staging.folder / file.name)
            with locked(folder):
                stale = [x.name for x in folder.iterdir() if _OWN_FILES.match(x.name) and not (staging.folder / x.name).exists()] if folder.is_dir() else []
                staging.publish(CONFIG_FILE, stale)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        fix = "free space there" if "space" in reason.lower() or "quota" in reason.lower() else "name another folder"
        raise UserError("the checkpoint cannot be written", got=f"{folder} ({reason})", fix=fix) from None
    return folder


def _write_weights(folder: Path, state: Mapping[str, Tensor], storage: torch.dtype | None, max_shard_bytes: int) -> None:
    def stored(name: str, x: Tensor) -> torch.dtype:
        kind = storage or x.dtype
        return torch.float32 if name.endswith(GAMMA_TENSORS) and kind.itemsize < 4 else kind

    groups: list[list[str]] = [[]]
    total = used = 0
    for name, x in state.items():
        size = x.numel() * stored(name, x).itemsize
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used, total = used + size, total + size
    files = [WEIGHTS_FILE] if len(groups) == 1 else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        tensors = {name: cast(name, state[name], stored(name, state[name])).cpu().contiguous() for name in group}
        require_finite("the model", tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, group in zip(files, groups, strict=True) for name in group}}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _kept_files(folder: Path) -> list[Path]:
    """Plain files of an existing checkpoint folder that a new checkpoint does not replace; UserError if it is no checkpoint folder."""
    if not folder.exists() and not folder.is_symlink():
        return []
    if not folder.is_dir() or folder.is_symlink():
        raise UserError("the checkpoint's place is taken", got=f"{folder} is not a plain folder", fix="name another folder")
    entries = sorted(x for x in folder.iterdir() if not is_staging(x))
    strange = [x.name for x in entries if x.is_symlink() or not x.is_file()]
    if entries and (strange or not (folder / CONFIG_FILE).is_file()):
        raise UserError(f"{folder} is not a checkpoint folder and is not overwritten", got=shorten(strange or [x.name for x in entries]),
                        allowed="a new or empty folder, or an older checkpoint", fix="name another folder")
    return [x for x in entries if not _OWN_FILES.match(x.name) or x.name == TOKENIZER_FILE]


def _tokenizer_text(tokenizer: Any, vocab_size: int) -> str:
    if hasattr(tokenizer, "to_str"):
        text, source = tokenizer.to_str(pretty=True), "the tokenizer"
    else:
        text, source = str(tokenizer), "the tokenizer"
        if not text.lstrip().startswith("{"):
            source = text
            try:
                text = read_plain(tokenizer, JSON_LIMIT).decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError("the tokenizer cannot be read", got=error, allowed="a tokenizers JSON file") from None
    check_tokenizer(text.encode("utf-8", "surrogatepass"), vocab_size, source)
    return text if text.endswith("\n") else text + "\n"


def storage_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from itself, its name or "fp32", "fp16", "bf16", "fp64"; None is float32. UserError on any other."""
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        name = PRECISIONS[dtype].torch if dtype in PRECISIONS else dtype.removeprefix("torch.")
        dtype = getattr(torch, name, dtype)
    if dtype not in FLOATS:
        raise UserError("no such storage type", got=dtype, allowed=", ".join(PRECISIONS))
    return dtype  # type: ignore[return-value]


def cast(name: str, x: Tensor, storage: torch.dtype) -> Tensor:
    """x in `storage`, gamma's two parameters in float32 at least; UserError if a finite weight overflows it."""
    if name.endswith(GAMMA_TENSORS) and storage.itemsize < 4:
        storage = torch.float32
    out = x.to(storage)
    if storage.itemsize < x.dtype.itemsize and not all_finite(out):
        raise UserError(f"{name} overflows {storage}".replace("torch.", ""), got=f"largest magnitude {x.abs().max().item():.3g}",
                        fix="use bf16 or fp32")
    return out


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or Inf; one pass without temporaries, since a finite sum proves it and only an overflowing one needs the exact look."""
    total = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(x).all())


def require_finite(source: str | Path, state: Mapping[str, Tensor]) -> None:
    """UserError naming the tensors that hold NaN or Inf."""
    bad = [name for name, x in state.items() if not all_finite(x)]
    if bad:
        raise UserError(f"{source} holds NaN or Inf", got=f"in {shorten(bad)}", allowed="finite weights")
