"""State dicts as others write them: read without running code, their names mapped to this model's.

Recognised: a whole model or a stack of layers under any one prefix (`layers.0.`, `blocks.3.`, `model.layers.0.`), a bare layer (`ln.weight`, ...),
the wrappers `module.` and `_orig_mod.` at any depth, and `state_dict` / `model` / `module` around the dict itself, as trainers write it.
"""

from __future__ import annotations

import contextlib
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sessa_deploy.errors import UserError
from sessa_deploy.reading import open_plain
from sessa_deploy.safetensors_check import shorten

LAYER_TENSORS = (
    "ln.weight", "ln.bias", "W_in.weight", "W_in.bias", "mixer.q_proj.weight", "mixer.q_proj.bias", "mixer.k_proj.weight", "mixer.k_proj.bias",
    "mixer.v_proj.weight", "mixer.v_proj.bias", "mixer.proj_fb.weight", "mixer.proj_fb.bias", "mixer.out_proj.weight", "mixer.gamma_bias",
    "mixer.gamma_ctx.weight", "W_out.weight", "W_out.bias",
)
ROPE_BUFFER = "mixer.rope_inv_freq"
IGNORED_BUFFERS = (ROPE_BUFFER, "mixer.causal_mask_f_full", "mixer.causal_mask_fb_full")
_ALIASES = {
    "embedding": ("embedding", "embeddings", "embed", "emb", "embed_tokens", "tok_embeddings", "tok_emb", "token_embedding", "token_emb", "wte"),
    "norm": ("norm", "final_norm", "norm_f", "ln_f", "ln_out", "ln_final", "final_ln", "out_norm", "norm_out", "final_layernorm", "final_layer_norm"),
    "lm_head": ("lm_head", "head", "output", "output_head", "unembed", "unembedding"),
}
_MODEL_NAME = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
_NOISE = ("module", "_orig_mod")
_LAYER = re.compile(r"^(?:(?P<prefix>.+)\.)?(?P<name>" + "|".join(re.escape(n) for n in (*LAYER_TENSORS, *IGNORED_BUFFERS)) + ")$")
_MODEL = re.compile(r"^(?:.+\.)?(?P<module>\w+)\.(?P<kind>weight|bias)$")
_INDEX = re.compile(r"^(?P<stack>.*?)\.?(?P<index>\d+)(?P<inner>(?:\.[A-Za-z_]\w*)*)$")
MIN_TORCH = (2, 10)
MAX_NAME = 512  # characters of a tensor's name
_DAMAGED = "copy or download the file again"
_GLOBALS_WITHIN = 1 << 20  # bytes of a refused pickle that are searched for the name to blame


def torch_version(text: str | None = None) -> tuple[int, int]:
    """(major, minor) of a torch version string, by default of the one installed."""
    found = re.match(r"(\d+)\.(\d+)", text or torch.__version__)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def load_pickle(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt / .pth state dict by their raw names; nothing in the file is executed.

    Raises UserError if torch is older than 2.10 (earlier weights_only readers had holes), if the file is damaged or carries code, or if what it
    holds is not a state dict of dense tensors.
    """
    path = Path(path)
    if torch_version() < MIN_TORCH:
        raise UserError("this torch is too old to read a .pt file safely", got=torch.__version__, allowed="torch >= 2.10",
                        fix="pip install -U torch, or convert the file to safetensors")
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise UserError(f"{path} cannot be read as a state dict", got="an empty file", allowed="a file written by torch.save", fix=_DAMAGED)
        _refuse_bombs(file, path, size)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a pickle's protocol, of TypedStorage: nothing that who brought the file can act on
                data = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle may raise anything; every one of them is a refusal
            raise _refusal(path, error) from None
    for _ in range(len(_WRAPPERS)):
        inner = next((data[key] for key in _WRAPPERS if isinstance(data, Mapping) and isinstance(data.get(key), Mapping)), None)
        if inner is None:
            break
        data = inner
    if not isinstance(data, Mapping) or not data:
        raise UserError(f"{path} holds no state dict", got=type(data).__name__, allowed="a dict of tensors, or one under 'state_dict' or 'model'")
    odd = [repr(k) if isinstance(k, str) else type(k).__name__ for k, v in data.items() if not isinstance(k, str) or not _is_dense(v)]
    if odd:
        raise UserError(f"{path} holds entries that are not dense tensors", got=shorten(odd), allowed="a state dict: names to tensors",
                        fix="torch.save(model.state_dict(), path)")
    spread = [k for k, v in data.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if spread:  # a few bytes may claim to be any number of elements
        raise UserError(f"{path} holds tensors that repeat their elements", got=shorten(spread), allowed="tensors with every element in the file",
                        fix="save x.contiguous() of each")
    return dict(data)


def _is_dense(x: object) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_quantized and not x.is_nested and x.device.type == "cpu"


def _refuse_bombs(file: BinaryIO, path: Path, size: int) -> None:
    """Refuse an archive whose records are larger than the file: torch.save neither compresses them nor has two share their bytes."""
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            total = sum(record.file_size for record in archive.infolist())
    except Exception:  # a damaged archive, of which torch says what is wrong
        return
    finally:
        file.seek(0)
    if total > size:
        raise UserError(f"{path} holds more than its size", got=f"{total} bytes in a file of {size}", allowed="an archive that is not compressed",
                        fix="save it again with torch.save")


def _refusal(path: Path, error: Exception) -> UserError:
    text = " ".join(str(error).split()).split("WeightsUnpickler error: ")[-1].split("Trying to load ")[-1].split(" Check the documentation")[0]
    found = re.search(r"GLOBAL ([\w.]+)|(TorchScript)", text)
    names = [found.group(1) or "a TorchScript archive"] if found else _globals(path)
    if names:
        fix = "save model.state_dict() as safetensors or with torch.save"
        if path.suffix == ".ckpt":
            fix = "where you trust the file: torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'model.pt')"
        return UserError(f"{path} carries code or objects other than tensors, nothing was executed", got=shorten(names), allowed="a pickle of plain tensors",
                         fix=fix)
    return UserError(f"{path} cannot be read as a state dict", got=f"{type(error).__name__}: {text[:160]}", allowed="a file written by torch.save",
                     fix=_DAMAGED)


def _globals(path: Path) -> list[str]:
    """Names that a bare pickle would import, read off its instructions without following any."""
    names: list[str] = []
    words: list[str] = []
    with open_plain(path) as file, warnings.catch_warnings(), contextlib.suppress(Exception):  # it ends where the pickle is damaged
        warnings.simplefilter("ignore")
        for instruction, value, _ in pickletools.genops(file.read(_GLOBALS_WITHIN)):
            if instruction.name in ("GLOBAL", "INST"):
                names.append(str(value).replace(" ", "."))
            elif instruction.name == "STACK_GLOBAL":
                names.append(".".join(words[-2:]))
            elif isinstance(value, str):
                words.append(value)
    return list(dict.fromkeys(names))


def map_names(state: Mapping[str, Any], source: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """(canonical name -> raw name, ignored rope buffers' `layers.{i}` -> raw name) of a state dict.

    Raises UserError listing names that belong to no Sessa model, two names for one tensor, or more than one stack of layers.
    """
    long = [raw[:40] + "..." for raw in state if len(raw) > MAX_NAME]
    if long:
        raise UserError(f"{source} holds names too long for a tensor", got=shorten(long), allowed=f"at most {MAX_NAME} characters")
    plain = {".".join(part for part in raw.split(".") if part not in _NOISE): raw for raw in state}
    if len(plain) != len(state):
        raise UserError(f"{source} holds the same tensor under two names", got=shorten(sorted(set(state) - set(plain.values()))))
    found: list[tuple[str, str]] = []
    stacks: dict[str, str] = {}
    bare: list[tuple[str, str, str]] = []
    unknown: list[str] = []
    rope: dict[str, str] = {}
    for name, raw in plain.items():
        layer = _LAYER.match(name)
        index = _INDEX.match(layer["prefix"]) if layer and layer["prefix"] else None
        if layer and index:
            stacks.setdefault(f"{index['stack']}.*{index['inner']}", raw)
            if layer["name"] in IGNORED_BUFFERS:
                if layer["name"] == ROPE_BUFFER:
                    rope[f"layers.{int(index['index'])}"] = raw
            else:
                found.append((f"layers.{int(index['index'])}.{layer['name']}", raw))
        elif layer:
            bare.append((layer["prefix"] or "", layer["name"], raw))
        elif (model := _MODEL.match(name)) and model["module"] in _MODEL_NAME:
            found.append((f"{_MODEL_NAME[model['module']]}.{model['kind']}", raw))
        else:
            unknown.append(raw)
    if len(stacks) > 1:
        raise UserError(f"{source} holds more than one stack of layers", got=shorten(sorted(stacks.values())), allowed="one prefix for all layers")
    for prefix, name, raw in bare:
        if stacks and name in ("ln.weight", "ln.bias"):  # beside a stack, a lone `ln` is the final norm
            found.append((name.replace("ln.", "norm."), raw))
        elif stacks:
            unknown.append(raw)
        elif prefix != bare[0][0]:
            raise UserError(f"{source} holds more than one bare layer", got=f"{bare[0][2]}, {raw}", allowed="numbered layers, layers.0. and on")
        elif name not in IGNORED_BUFFERS:
            found.append((f"layers.0.{name}", raw))
        elif name == ROPE_BUFFER:
            rope["layers.0"] = raw
    numbers = {int(name.split(".")[1]) for name, _ in found if name.startswith("layers.")}
    gaps = [i for i in range(len(numbers)) if i not in numbers]
    if gaps:
        raise UserError(f"{source} lacks layers", got=f"no layer {shorten(gaps)} before layer {max(numbers)}", allowed="layers numbered from 0")
    if unknown:
        raise UserError(f"{source} holds unexpected tensors", got=shorten(sorted(unknown)), allowed="those of Sessa layers, embedding, norm and lm_head")
    names: dict[str, str] = {}
    for name, raw in found:
        if name in names:
            raise UserError(f"{source} holds {name} twice", got=f"{names[name]}, {raw}")
        names[name] = raw
    return names, rope
