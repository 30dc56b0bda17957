"""Official-style state dicts in .pt files: names as others write them, and pickles that are not to be trusted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import CONFIG, model_of, refused, same

from sessa_deploy import official
from sessa_deploy.checkpoint import load_checkpoint, load_layers, read_state
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLayer


def renamed(layer: str = "layers", prefix: str = "", embedding: str = "embedding", norm: str = "norm", head: str = "lm_head") -> dict[str, torch.Tensor]:
    state = {}
    for name, x in model_of().state_dict().items():
        first, rest = name.split(".", 1)
        state[prefix + {"layers": layer, "embedding": embedding, "norm": norm, "lm_head": head}[first] + "." + rest] = x
    return state


@pytest.mark.parametrize("names", [
    {}, {"layer": "blocks"}, {"prefix": "model."}, {"prefix": "module."}, {"prefix": "_orig_mod."}, {"prefix": "module._orig_mod.model."},
    {"layer": "h", "embedding": "wte", "norm": "ln_f"}, {"embedding": "embed_tokens", "head": "head"}, {"layer": "model.layers", "embedding": "model.tok_emb"},
    {"layer": "backbone.blocks", "norm": "final_norm", "head": "output"}, {"norm": "ln"},
], ids=str)
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_names_and_wrappers(tmp_path: Path, names: dict[str, str], wrap: str | None) -> None:
    state: Any = renamed(**names)
    torch.save(state if wrap is None else {wrap: state, "epoch": 3, "optimizer": {"lr": 1.0}}, tmp_path / "m.pt")
    same(load_checkpoint(tmp_path / "m.pt", CONFIG), model_of())
    CONFIG.save(tmp_path)
    same(load_checkpoint(tmp_path / "m.pt"), model_of())
    same(load_checkpoint(tmp_path), model_of())  # the only weights in a folder


def test_compiled_layers_and_buffers(tmp_path: Path) -> None:
    state = {name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in model_of().state_dict().items()}
    for i in range(2):
        state[f"layers.{i}.mixer.rope_inv_freq"] = torch.zeros(2)
        state[f"layers.{i}.mixer.causal_mask_f_full"] = torch.zeros(4, 4, dtype=torch.bool)
        state[f"layers.{i}.mixer.causal_mask_fb_full"] = torch.zeros(4, 4, dtype=torch.bool)
    torch.save(state, tmp_path / "m.pth")
    same(load_checkpoint(tmp_path / "m.pth", CONFIG), model_of())
    other = SessaConfig(d_model=16, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=21)
    refused(tmp_path / "m.pth", "n_heads does not fit", "head width 4", config=other)


@pytest.mark.parametrize("prefix", ["", "layer.", "module.", "_orig_mod.", "0.", "layers.0.", "net.sessa."])
def test_a_bare_layer(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    layer = SessaLayer(16, 2).eval()
    torch.save({prefix + name: x for name, x in layer.state_dict().items()}, tmp_path / "layer.pt")
    (loaded,) = load_layers(tmp_path / "layer.pt", n_heads=2)
    x = torch.randn(1, 7, 16)
    assert torch.equal(loaded(x), layer(x))
    refused(tmp_path / "layer.pt", "no language model")


def test_golden_parameters_are_a_layer(golden: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    c, tensors = golden
    state = {name.removeprefix("param."): x for name, x in tensors.items() if name.startswith("param.")}
    torch.save(state, tmp_path / "layer.pt")
    (layer,) = load_layers(tmp_path / "layer.pt", n_heads=c["n_heads"], gamma_max=c["gamma_max"], use_forward_rope=c["use_forward_rope"],
                           layer_norm_eps=c["ln_eps"], dtype="fp64")
    y = layer(tensors["x"].double())
    want = tensors["y"]
    assert float((y.detach() - want).norm() / want.norm()) < 1e-10


def test_names_that_cannot_be_told_apart(tmp_path: Path) -> None:
    state = renamed()
    torch.save({**state, "module.norm.weight": state["norm.weight"]}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "norm.weight", config=CONFIG)
    torch.save({**state, "decoder.blocks.0.ln.weight": state["norm.weight"]}, tmp_path / "b.pt")
    refused(tmp_path / "b.pt", "more than one stack of layers", config=CONFIG)
    torch.save({**state, "wte.weight": state["embedding.weight"]}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", "embedding.weight twice", config=CONFIG)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    mark, path = tmp_path / "pwned", tmp_path / "m.pt"
    payload = {**renamed(), "x": Bomb(mark)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"x": Bomb(mark)}))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=writer == "torch")
    text = refused(path, "nothing was executed", config=CONFIG)
    assert "system" in text and not mark.exists()


def test_whole_modules_and_other_objects_are_refused(tmp_path: Path) -> None:
    torch.save(model_of(), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "code or objects", "SessaLM", config=CONFIG)
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds no state dict", config=CONFIG)
    torch.save({"step": 3, "a": torch.zeros(1)}, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt", "not dense tensors", "'step'", config=CONFIG)
    torch.save({"ln.weight": torch.eye(3).to_sparse()}, tmp_path / "sparse.pt")
    refused(tmp_path / "sparse.pt", "not dense tensors", config=CONFIG)


def test_damaged_pickles(tmp_path: Path) -> None:
    torch.save(renamed(), tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2], whole[:-30], b"\x80\x02." + whole[100:200]):
        (tmp_path / "m.pt").write_bytes(data)
        refused(tmp_path / "m.pt", "cannot be read as a state dict", config=CONFIG)


def test_integers_and_nan_in_a_pickle(tmp_path: Path) -> None:
    state = renamed()
    torch.save({**state, "norm.bias": torch.zeros(16, dtype=torch.int64)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "norm.bias is int64", config=CONFIG)
    torch.save({**state, "norm.bias": torch.full((16,), torch.nan)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "NaN or Inf", "norm.bias", config=CONFIG)
    torch.save(state, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "no model configuration", "vocab_size=21")


def test_an_old_torch_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(renamed(), tmp_path / "m.pt")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    refused(tmp_path / "m.pt", "too old", "2.9.1", "torch >= 2.10", config=CONFIG)
    assert official.torch_version("2.13.0a0+git") == (2, 13) and official.torch_version("3.0") >= official.MIN_TORCH


def test_half_a_model_says_what_is_missing(tmp_path: Path) -> None:
    state = renamed()
    del state["lm_head.weight"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        read_state(tmp_path / "m.pt", CONFIG)
