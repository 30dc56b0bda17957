"""Checkpoints: a folder of config.json and safetensors, or a state dict in a .pt file; strict on the way in, whole on the way out.

Nothing half right is loaded: every refusal is one UserError that names the tensors to blame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sessa_deploy.checkpoint_files import INDEX_FILE, WEIGHTS_FILE, read_layout
from sessa_deploy.checkpoint_layout import Layout, locate
from sessa_deploy.checkpoint_save import FLOATS, cast, require_finite, save_checkpoint, storage_dtype
from sessa_deploy.checkpoint_tokenizer import read_tokenizer
from sessa_deploy.config import CONFIG_FILE, Note, SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLayer, SessaLM
from sessa_deploy.official import LAYER_TENSORS, map_names
from sessa_deploy.safetensors_check import shorten

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "expected_shapes", "load_checkpoint", "load_for_export", "load_layers", "read_state", "save_checkpoint"]


def load_checkpoint(
    path: str | Path, config: SessaConfig | None = None, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
    note: Note | None = None, change: Callable[[str, Tensor], Tensor] | None = None,
) -> SessaLM:
    """A whole model, in eval mode, from a checkpoint folder, a .safetensors file or a .pt, .pth, .bin or .ckpt state dict (see checkpoint_layout).

    config: by default the config.json in the folder, or beside the file. dtype: a torch dtype or "fp32", "fp16", "bf16", "fp64"; by default
    float32, whatever the file stores. gamma's two parameters stay float32 (float64 in a float64 model). note: hears a line of
    each thing that was passed over or taken from elsewhere. change: what to take in place of a tensor, given its name and its values as stored; with it a
    tied head is a tensor of its own. Raises UserError (see `read_state`).
    """
    config, state = read_state(path, config, note)
    storage = storage_dtype(dtype)
    with torch.device("meta"):
        model = SessaLM(config)
    taken = change or (lambda name, x: x)
    model.load_state_dict({name: cast(name, taken(name, x), storage).to(device) for name, x in _drain(state)}, strict=True, assign=True)
    if config.tie_word_embeddings and change is None:
        model.lm_head.weight = model.embedding.weight
    return model.eval()


def load_for_export(path: str | Path, config: SessaConfig | None = None, note: Note | None = None) -> tuple[SessaLM, bytes | None]:
    """(model, tokenizers JSON or None) of a checkpoint that may become a bundle: what `export` takes and what `inspect` calls verified.

    Raises UserError like `load_checkpoint`, and on a tokenizer.json that is none, or that knows tokens which the model does not.
    """
    model = load_checkpoint(path, config, note=note)
    return model, read_tokenizer(locate(path).folder, model.config, note)


def load_layers(
    path: str | Path, config: SessaConfig | None = None, *, n_heads: int | None = None, n_kv_heads: int | None = None, gamma_max: float = 0.999,
    use_forward_rope: bool = True, layer_norm_eps: float = 1e-5, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None,
) -> list[SessaLayer]:
    """The Sessa layers, in eval mode, of a file that may hold nothing else (the official code ships a layer and no language model).

    The shape comes from `config`, from a config.json beside the file, or from n_heads and the flags after it; d_model, the number of layers and
    n_kv_heads are read off the tensors. Raises UserError like `read_state`.
    """
    path = Path(path)
    layout = locate(path)
    raw, names, rope = _read(path, layout)
    layer_names = {name: raw_name for name, raw_name in names.items() if name.startswith("layers.")}
    found = _shape_facts(layer_names, raw)
    if not found["n_layers"]:
        raise UserError(f"{path} holds no Sessa layer", got=shorten(sorted(names)) or "no tensors")
    if config is None and n_heads is None and os.path.lexists(layout.folder / CONFIG_FILE):
        config = SessaConfig.load(layout.folder)
    if config is None:
        if n_heads is None:
            raise UserError(f"the shape of the layers in {path} is not known", got="neither a configuration nor n_heads",
                            fix="give n_heads (and n_kv_heads, gamma_max, ...), or put a config.json beside the file")
        kv = n_kv_heads
        if kv is None and n_heads >= 1 and found["d_model"] % n_heads == 0:
            kv = max(1, found["kv_width"] * n_heads // found["d_model"])
        config = SessaConfig(d_model=found["d_model"], n_layers=found["n_layers"], n_heads=n_heads, vocab_size=1, n_kv_heads=kv, gamma_max=gamma_max,
                             use_forward_rope=use_forward_rope, layer_norm_eps=layer_norm_eps)
    expected = {name: shape for name, shape in expected_shapes(config).items() if name.startswith("layers.")}
    state = _checked(path, config, expected, layer_names, raw, rope)
    storage = storage_dtype(dtype)
    layers = []
    for i in range(config.n_layers):
        with torch.device("meta"):
            layer = SessaLayer(config.d_model, config.n_heads, config.n_kv_heads, config.gamma_max, config.use_forward_rope, config.layer_norm_eps)
        own = {name.split(".", 2)[2]: cast(name, x, storage).to(device) for name, x in state.items() if name.startswith(f"layers.{i}.")}
        layer.load_state_dict(own, strict=True, assign=True)
        layers.append(layer.eval())
    return layers


def read_state(path: str | Path, config: SessaConfig | None = None, note: Note | None = None) -> tuple[SessaConfig, dict[str, Tensor]]:
    """(configuration, tensors by this model's names, in the dtypes of the file) of a checkpoint, proven complete, well shaped and finite.

    With tie_word_embeddings, lm_head.weight is the embedding's tensor. Raises UserError, one line, on: a missing or unknown file or configuration;
    missing, unexpected or misshapen tensors; a dtype that is not floating point; a damaged safetensors file or index, a missing shard, a shard's name that
    leaves the folder, a tensor in the wrong shard; a pickle that carries code; a Git LFS pointer; NaN or Inf.
    """
    path = Path(path)
    layout = locate(path)
    if note is not None:
        for line in layout.notes:
            note(line)
    raw, names, rope = _read(path, layout)
    _refuse_layers_only(path, names)
    if config is None:
        beside = layout.folder / CONFIG_FILE
        if not os.path.lexists(beside):
            facts = ", ".join(f"{k}={v}" for k, v in _shape_facts(names, raw).items() if v)
            raise UserError(f"no model configuration for {path}", got=f"no {beside} (the tensors say {facts})",
                            allowed="a config.json in the checkpoint's folder", fix="write one beside the weights, or give it with --config FILE")
        config = SessaConfig.load(layout.folder, note)
    layers = _shape_facts(names, raw)["n_layers"]
    if config.n_layers > layers + 1000:  # before a list of everything that is missing is made
        raise UserError(f"{path} does not fit its configuration", got=f"n_layers is {config.n_layers} and the tensors say {layers}")
    return config, _checked(path, config, expected_shapes(config), names, raw, rope)


def expected_shapes(config: SessaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model; with tie_word_embeddings, lm_head.weight is not among them."""
    width, kv = config.d_model, config.kv_heads * config.head_dim
    rows = {"W_in": 2 * width, "W_out": width, "mixer.q_proj": width, "mixer.k_proj": kv, "mixer.v_proj": kv, "mixer.proj_fb": 2 * width,
            "mixer.out_proj": width}
    layer: dict[str, tuple[int, ...]] = {"ln.weight": (width,), "ln.bias": (width,), "mixer.gamma_bias": (), "mixer.gamma_ctx.weight": (1, width)}
    for name in LAYER_TENSORS:
        module, kind = name.rsplit(".", 1)
        if module in rows:
            layer[name] = (rows[module], width) if kind == "weight" else (rows[module],)
    if config.n_heads == 1:
        del layer["mixer.out_proj.weight"]
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, width), "norm.weight": (width,), "norm.bias": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return {f"layers.{i}.{name}": layer[name] for i in range(config.n_layers) for name in LAYER_TENSORS if name in layer} | shapes


def _drain(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The items of a dict, each dropped from it once handed out, so that a cast needs room for one tensor, not for all."""
    for name in list(state):
        yield name, state.pop(name)


def _read(path: Path, layout: Layout) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Raw tensors, canonical -> raw names, and the rope buffers, of whatever kind of checkpoint `path` is."""
    raw = read_layout(layout)
    return raw, *map_names(raw, path)


def _shape_facts(names: Mapping[str, str], raw: Mapping[str, Tensor]) -> dict[str, int]:
    """What shapes say about a configuration: d_model, n_layers, kv_width, vocab_size; 0 where they say nothing."""

    def size(name: str, dim: int) -> int:
        x = raw[names[name]] if name in names else None
        return int(x.shape[dim]) if x is not None and x.dim() > dim else 0

    numbers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    first = f"layers.{min(numbers, default=0)}"
    width = size(f"{first}.ln.weight", 0) or size(f"{first}.W_out.bias", 0)
    kv_width, vocab_size = size(f"{first}.mixer.k_proj.weight", 0), size("embedding.weight", 0)
    return {"d_model": width, "n_layers": max(numbers, default=-1) + 1, "kv_width": kv_width, "vocab_size": vocab_size}


def _refuse_layers_only(path: Path, names: Mapping[str, str]) -> None:
    has = {name.split(".")[0] for name in names}
    if has == {"layers"}:
        raise UserError(f"{path} holds layers and no language model", got="no embedding.weight, norm.weight, norm.bias, lm_head.weight",
                        allowed="a whole model", fix="use load_layers, or add these tensors")


def _checked(
    path: Path, config: SessaConfig, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str], raw: dict[str, Tensor], rope: Mapping[str, str]
) -> dict[str, Tensor]:
    facts = _shape_facts(names, raw)
    tied = "lm_head.weight" if config.tie_word_embeddings and "lm_head.weight" in names else None
    wanted = {"d_model": config.d_model, "n_layers": config.n_layers, "kv_width": config.kv_heads * config.head_dim, "vocab_size": config.vocab_size}
    disagree = [f"{key} is {wanted[key]} and the tensors say {value}" for key, value in facts.items() if value and value != wanted[key]
                and (key != "vocab_size" or "embedding.weight" in expected)]
    missing = [name for name in expected if name not in names]
    unexpected = [raw_name for name, raw_name in names.items() if name not in expected and name != tied]
    misshapen = [f"{names[name]} is {tuple(raw[names[name]].shape)} and should be {shape}" for name, shape in expected.items()
                 if name in names and tuple(raw[names[name]].shape) != shape]
    problems = [f"{kind} {shorten(found, limit)}" for kind, found, limit in
                (("configured", disagree, 4), ("missing", missing, 6), ("unexpected", unexpected, 6), ("misshapen", misshapen, 3)) if found]
    if problems:
        raise UserError(f"{path} does not fit its configuration", got="; ".join(problems), allowed="exactly the tensors the configuration describes")
    wrong = [f"{names[name]} is {raw[names[name]].dtype}".replace("torch.", "") for name in names if raw[names[name]].dtype not in FLOATS]
    if wrong:
        raise UserError(f"{path} holds weights that are not floating point", got=shorten(wrong), allowed="float64, float32, float16, bfloat16")
    for raw_name in rope.values() if config.use_forward_rope else ():
        if raw[raw_name].numel() * 2 != config.head_dim:
            raise UserError(f"n_heads does not fit {path}", got=f"n_heads={config.n_heads}, head width {config.head_dim}",
                            allowed=f"head width {raw[raw_name].numel() * 2}, which {raw_name} was made for")
    state = {name: raw[names[name]] for name in expected}
    require_finite(path, state)
    if config.tie_word_embeddings and "embedding.weight" in state:
        if tied and not torch.equal(raw[names[tied]].to(state["embedding.weight"].dtype), state["embedding.weight"]):
            raise UserError(f"{path} has an lm_head of its own", got="lm_head.weight differs from embedding.weight",
                            allowed="equal tensors with tie_word_embeddings", fix="set tie_word_embeddings to false")
        state["lm_head.weight"] = state["embedding.weight"]
    return state
