"""Checkpoints: what loads, what is refused and in which words."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sessa_deploy.checkpoint import load_checkpoint, load_layers, read_state, save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

CONFIG = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=21)


def model_of(config: SessaConfig = CONFIG, seed: int = 0) -> SessaLM:
    torch.manual_seed(seed)
    model = SessaLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def model() -> SessaLM:
    return model_of()


@pytest.fixture
def folder(tmp_path: Path, model: SessaLM) -> Path:
    return save_checkpoint(model, tmp_path / "ckpt")


def rewrite(folder: Path, change: Any, config: SessaConfig | None = None) -> Path:
    """Load the raw tensors of a folder, let `change(dict)` alter them, write them back."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def refused(path: Path, *words: str, config: SessaConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, config)
    text = str(caught.value)
    assert "\n" not in text and caught.value.exit_code == 2
    for word in words:
        assert word in text, text
    return text


def same(a: SessaLM, b: SessaLM) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def test_round_trip_is_exact_and_the_folder_is_plain(folder: Path, model: SessaLM) -> None:
    same(load_checkpoint(folder), model)
    same(load_checkpoint(folder / "model.safetensors"), model)
    assert sorted(x.name for x in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert os.stat(folder / "model.safetensors").st_mode & 0o777 == 0o644
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(load_checkpoint(folder)(ids), model(ids))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp64"])
def test_storage_types_and_float32_on_load(tmp_path: Path, model: SessaLM, dtype: str) -> None:
    path = save_checkpoint(model, tmp_path / "c", dtype=dtype)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype]
    _, state = read_state(path)
    assert state["layers.0.W_in.weight"].dtype == kind
    # gamma is never rounded below float32, in no file
    assert state["layers.0.mixer.gamma_bias"].dtype == (torch.float64 if dtype == "fp64" else torch.float32)
    loaded = load_checkpoint(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.embedding.weight, model.embedding.weight.to(kind).float())
    low = load_checkpoint(path, dtype="bf16")
    assert low.lm_head.weight.dtype == torch.bfloat16 and low.layers[1].mixer.gamma_ctx.weight.dtype == torch.float32
    assert load_checkpoint(path, dtype=torch.float64).layers[1].mixer.gamma_bias.dtype == torch.float64


def test_shards_and_index(tmp_path: Path, model: SessaLM) -> None:
    path = save_checkpoint(model, tmp_path / "c", max_shard_bytes=4000)
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 3 and all(x.stat().st_size < 8000 for x in shards) and not (path / "model.safetensors").exists()
    same(load_checkpoint(path), model)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    save_checkpoint(model, path)  # one file again: no stale shard or index stays
    assert sorted(x.name for x in path.iterdir()) == ["config.json", "model.safetensors"]


def test_overwriting_keeps_other_plain_files_and_refuses_other_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "MODEL_CARD.md").write_text("card")
    other = model_of(seed=1)
    save_checkpoint(other, folder, tokenizer=None)
    same(load_checkpoint(folder), other)
    assert (folder / "MODEL_CARD.md").read_text() == "card"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a checkpoint folder"):
        save_checkpoint(other, tmp_path / "home")
    (folder / "sub").mkdir()
    with pytest.raises(UserError, match="sub"):
        save_checkpoint(other, folder)


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(folder: Path, model: SessaLM) -> None:
    bad = model_of(seed=2)
    bad.layers[0].W_in.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=r"layers\.0\.W_in\.weight"):
        save_checkpoint(bad, folder)
    bad.layers[0].W_in.weight.data[0, 0] = 1e30
    with pytest.raises(UserError, match="overflows float16"):
        save_checkpoint(bad, folder, dtype="fp16")
    same(load_checkpoint(folder), model)
    assert [x.name for x in folder.parent.iterdir()] == [folder.name]


def test_tokenizer_is_checked_and_copied(tmp_path: Path) -> None:
    config = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257)
    path = save_checkpoint(model_of(config), tmp_path / "c", tokenizer=byte_level_tokenizer())
    again = save_checkpoint(model_of(config), tmp_path / "d", tokenizer=path / "tokenizer.json")
    assert (again / "tokenizer.json").read_text() == (path / "tokenizer.json").read_text()
    save_checkpoint(model_of(config, 1), path)
    assert (path / "tokenizer.json").exists()  # kept when none is given
    with pytest.raises(UserError, match="more tokens than the model"):
        save_checkpoint(model_of(), tmp_path / "e", tokenizer=byte_level_tokenizer())
    with pytest.raises(UserError, match="not a tokenizers JSON"):
        save_checkpoint(model_of(config), tmp_path / "e", tokenizer="{}")


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    config = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=21, tie_word_embeddings=True)
    model = model_of(config)
    path = save_checkpoint(model, tmp_path / "c")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in list(file.keys())
    loaded = load_checkpoint(path)
    assert loaded.lm_head.weight is loaded.embedding.weight
    same(loaded, model)
    rewrite(path, lambda s: s.update({"lm_head.weight": s["embedding.weight"].clone()}))
    assert load_checkpoint(path).lm_head.weight is not None
    rewrite(path, lambda s: s.update({"lm_head.weight": s["embedding.weight"] + 1}))
    refused(path, "lm_head", "tie_word_embeddings")


# What does not fit ---------------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["layers.1.W_out.bias"], state["norm.weight"]
        state["lm_head.bias"] = torch.zeros(21)
        state["layers.0.W_in.weight"] = state["layers.0.W_in.weight"].T

    refused(rewrite(folder, change), "missing layers.1.W_out.bias, norm.weight", "unexpected lm_head.bias",
            "layers.0.W_in.weight is (16, 32) and should be (32, 16)")


def test_unknown_names_and_long_lists(folder: Path) -> None:
    extra = {f"vision.tower.{c}": torch.zeros(1) for c in "abcdefghijkl"}
    text = refused(rewrite(folder, lambda s: s.update(extra)), "unexpected", "vision.tower.a", "(+6 more)")
    assert len(text) < 500


@pytest.mark.parametrize(("field", "value", "words"), [
    ("d_model", 32, ("d_model is 32 and the tensors say 16",)),
    ("n_layers", 3, ("n_layers is 3 and the tensors say 2", "missing layers.2.ln.weight")),
    ("n_layers", 10**12, ("n_layers is 1000000000000",)),
    ("vocab_size", 22, ("vocab_size is 22 and the tensors say 21",)),
    ("n_kv_heads", 4, ("kv_width is 16 and the tensors say 8",)),
    ("n_heads", 3, ("d_model is not divisible by n_heads",)),
    ("n_heads", 16, ("head width", "odd")),
    ("gamma_max", 1.0, ("gamma_max is out of range",)),
    ("gamma_max", 0, ("gamma_max is out of range",)),
    ("n_head", 4, ("unknown keys", "n_head")),
])
def test_configuration_that_does_not_fit(folder: Path, field: str, value: Any, words: tuple[str, ...]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, *words)


def test_names_of_a_hostile_configuration_stay_on_one_harmless_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "a\nb\x1b[2J\ud800": 1}))
    text = refused(folder, "unknown keys")
    assert text.isprintable()
    text.encode("utf-8")


def test_one_head_has_no_out_proj(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_heads": 1, "n_kv_heads": 1}))
    refused(folder, "unexpected", "layers.0.mixer.out_proj.weight")


def test_nan_inf_and_integers_are_named(folder: Path) -> None:
    refused(rewrite(folder, lambda s: s["layers.1.mixer.gamma_bias"].fill_(torch.nan)), "NaN or Inf", "layers.1.mixer.gamma_bias")
    refused(rewrite(folder, lambda s: s["lm_head.weight"][3, 5].fill_(-torch.inf)), "lm_head.weight")
    refused(rewrite(folder, lambda s: s.update({"norm.bias": torch.zeros(16, dtype=torch.int32)})), "norm.bias is I32", "floating point")


def test_absent_things(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "nowhere", "no such checkpoint")
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path / "a.txt", "is no checkpoint")
    (folder / "config.json").rename(tmp_path / "config.bak")
    refused(folder, "no model configuration", "d_model=16", "n_layers=2")
    same(load_checkpoint(folder, CONFIG), model_of())
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights")


# Damaged files -------------------------------------------------------------------------------------------------------------------


def raw_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(("header", "data", "words"), [
    ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "a and b overlap"),
    ({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8, "overlap"),
    ({"a": entry(0, 8), "b": entry(12, 16)}, b"\0" * 16, "hole between a and b"),
    ({"a": entry(4, 8)}, b"\0" * 8, "hole between the header and a"),
    ({"a": entry(0, 8)}, b"\0" * 12, "bytes behind the last tensor"),
    ({"a": entry(0, 16)}, b"\0" * 12, "truncated"),
    ({"a": entry(0, 8, [3])}, b"\0" * 8, "wrong size"),
    ({"a": entry(0, 8, [-2])}, b"\0" * 8, "impossible shape"),
    ({"a": entry(0, 8, [2**40, 2**40])}, b"\0" * 8, "impossible shape"),
    ({"a": entry(8, 0, [2])}, b"\0" * 8, "impossible data_offsets"),
    ({"a": entry(0, 8, dtype="F31")}, b"\0" * 8, "unknown dtype"),
    ({"a": {"dtype": "F32"}}, b"", "not described"),
    ({"a\x1b[2J": entry(0, 8)}, b"\0" * 8, "not printable"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    (b'{"a": 1, "a": 2}', b"", "twice"),
    (b"[]", b"", "not a JSON object"),
    (b"{", b"", "not JSON"),
    (b"\xff\xfe", b"", "not JSON"),
])
def test_damaged_headers(folder: Path, header: Any, data: bytes, words: str) -> None:
    raw_file(folder / "model.safetensors", header, data)
    refused(folder, "not a whole safetensors file", words)


def test_every_truncation_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "not a whole safetensors file")
    path.write_bytes(struct.pack("<Q", 2**40) + whole[8:])
    refused(folder, "header is too large")


def test_shards_that_do_not_fit_the_index(tmp_path: Path, model: SessaLM) -> None:
    path = save_checkpoint(model, tmp_path / "c", max_shard_bytes=4000)
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    names, shards = list(index["weight_map"]), sorted(set(index["weight_map"].values()))

    def with_map(change: dict[str, str]) -> None:
        index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], **change}}))

    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((path / shards[0]).read_bytes())
    names_outside = ("../outside.safetensors", str(outside), "a/../../outside.safetensors", "..\\outside.safetensors", "C:\\outside.safetensors")
    for name in names_outside:
        with_map({n: name for n in names if index["weight_map"][n] == shards[0]})
        refused(path, "outside the checkpoint's folder")
    (path / "link.safetensors").symlink_to(outside)  # a link within the folder is followed: its content is what counts
    with_map({n: "link.safetensors" for n in names if index["weight_map"][n] == shards[0]})
    same(load_checkpoint(path), model)
    first, last = names[0], next(n for n in names if index["weight_map"][n] == shards[-1])
    with_map({first: shards[-1]})
    refused(path, f"{first} is in the wrong shard")
    with_map({"extra.weight": shards[0]})
    refused(path, "lacks tensors", "extra.weight")
    index_file.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != last}}))
    refused(path, "does not place there", last)
    for text in ("[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        index_file.write_text(text)
        refused(path, "model.safetensors.index.json")
    with_map({})
    same(load_checkpoint(path), model)
    (path / shards[1]).unlink()
    refused(path, "lacks shards", shards[1])
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")
    refused(path, "one of them")


def test_layers_only_needs_load_layers(tmp_path: Path, model: SessaLM) -> None:
    state = {k: v for k, v in model.state_dict().items() if k.startswith("layers.")}
    save_file(state, tmp_path / "layers.safetensors")
    refused(tmp_path / "layers.safetensors", "holds layers and no language model", "embedding.weight", "lm_head.weight", "load_layers")
    layers = load_layers(tmp_path / "layers.safetensors", n_heads=4)
    assert len(layers) == 2 and layers[0].mixer.n_kv_heads == 2
    x = torch.randn(2, 5, 16)
    assert torch.equal(layers[1](x), model.layers[1](x))
    with pytest.raises(UserError, match="n_heads"):
        load_layers(tmp_path / "layers.safetensors")
    with pytest.raises(UserError, match="not divisible"):
        load_layers(tmp_path / "layers.safetensors", n_heads=3)
    with pytest.raises(UserError, match="out_proj"):
        load_layers(tmp_path / "layers.safetensors", n_heads=1)
    CONFIG.save(tmp_path)
    assert len(load_layers(tmp_path / "layers.safetensors")) == 2


def test_gaps_between_layers(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [n for n in state if n.startswith("layers.1.")]:
            state[name.replace("layers.1.", "layers.987654321987.")] = state.pop(name)

    refused(rewrite(folder, change), "lacks layers", "no layer 1 before layer 987654321987")


def test_random_damage_is_refused_or_harmless(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(8 + struct.unpack("<Q", whole[:8])[0])] = rng.choice(b'0123456789,:"{}[]-aT\xff')
        path.write_bytes(data)
        try:
            same(load_checkpoint(folder), model_of())
        except UserError as error:
            assert str(error).isprintable()
