"""`sessa-deploy inspect` on checkpoints, ONNX files and bundles, whole and broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command import call
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from sessa_deploy.checkpoint import save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

CONFIG = SessaConfig(d_model=16, n_layers=2, n_heads=2, vocab_size=257)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(SessaLM(CONFIG), tmp_path / "ckpt", dtype="fp16")


def small_onnx(path: Path, external: bool = False) -> Path:
    weight = numpy_helper.from_array(np.ones(4, np.float32), "w")
    node = helper.make_node("SessaFeedbackAttention", ["x"], ["y"], domain="sessa", name="fb", scale=0.25, storage=1)
    add = helper.make_node("Add", ["y", "w"], ["z"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node, add], "g", [value("x", TensorProto.FLOAT, ["B", 4])], [value("z", TensorProto.FLOAT, ["B", 4])], [weight])
    body = helper.make_function("sessa", "SessaFeedbackAttention", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 17)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("sessa", 1)], functions=[body])
    onnx.save(model, str(path), save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def as_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_checkpoint_table_and_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", checkpoint) == 0
    text = capsys.readouterr().out
    total = sum(p.numel() for p in SessaLM(CONFIG).parameters())
    assert f"{total:,}" in text and "d_model" in text and "embedding.weight" in text and "more" in text and text.rstrip().endswith("verified")
    assert call("inspect", checkpoint, "--json") == 0
    found = as_json(capsys)
    assert found["kind"] == "checkpoint" and found["verified"] is True and found["parameters"] == total
    assert found["dtypes"] == {"F16": len(found["tensors"]) - 4, "F32": 4} and found["config"]["d_model"] == 16
    assert [t["shape"] for t in found["tensors"] if t["name"] == "layers.0.mixer.gamma_bias"] == [[]]


def test_broken_and_partial_checkpoints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    assert call("inspect", checkpoint) == 2
    assert "n_layers is 3 and the tensors say 2" in capsys.readouterr().err
    assert call("inspect", checkpoint, "--no-verify") == 0
    capsys.readouterr()
    assert call("inspect", checkpoint, "--json") == 2
    assert as_json(capsys)["verified"] is False
    (checkpoint / "config.json").unlink()
    assert call("inspect", checkpoint) == 2  # as export says; the weights are still worth a look
    shown = capsys.readouterr()
    assert "no model configuration" in shown.err and "embedding.weight" in shown.out
    CONFIG.save(tmp_path)
    assert call("inspect", checkpoint, "--config", tmp_path / "config.json") == 0
    capsys.readouterr()
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:-1])
    assert call("inspect", checkpoint) == 2
    assert "truncated" in capsys.readouterr().err
    torch.save({"ln.weight": torch.zeros(4)}, tmp_path / "layer.pt")
    assert call("inspect", tmp_path / "layer.pt") == 2
    shown = capsys.readouterr()
    assert "no language model" in shown.err and "ln.weight" in shown.out


def edited(folder: Path, **keys: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **keys}))


def reweighted(folder: Path, **tensors: Any) -> None:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors")


def replaced(folder: Path, name: str, content: bytes | None = None) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(content)


BAD: dict[str, Callable[[Path], Any]] = {
    "another shape": lambda f: edited(f, n_layers=3), "an unknown key": lambda f: edited(f, rope_scaling=2), "a head too many": lambda f: edited(f, n_heads=3),
    "an end outside": lambda f: edited(f, eos_token_id=[1, 257]), "no config": lambda f: (f / "config.json").unlink(),
    "a config that is none": lambda f: replaced(f, "config.json", b"["), "a pipe for a config": lambda f: replaced(f, "config.json"),
    "a generation config that is none": lambda f: replaced(f, "generation_config.json", b"\xff"),
    "any JSON as a tokenizer": lambda f: replaced(f, "tokenizer.json", b'{"a": 1}'), "a pipe for a tokenizer": lambda f: replaced(f, "tokenizer.json"),
    "an empty tokenizer": lambda f: replaced(f, "tokenizer.json", b""), "a tokenizer too large": lambda f: (
        edited(f, vocab_size=200), reweighted(f, **{n: torch.zeros(200, 16) for n in ("embedding.weight", "lm_head.weight")}),
        replaced(f, "tokenizer.json", byte_level_tokenizer().encode())),
    "a truncated file": lambda f: replaced(f, "model.safetensors", (f / "model.safetensors").read_bytes()[:-1]),
    "an empty file": lambda f: replaced(f, "model.safetensors", b""), "a pipe": lambda f: replaced(f, "model.safetensors"),
    "a pointer": lambda f: replaced(f, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "NaN": lambda f: reweighted(f, **{"norm.bias": torch.full((16,), torch.nan)}), "integers": lambda f: reweighted(f, **{"norm.bias": torch.zeros(16).int()}),
    "beyond float32": lambda f: reweighted(f, **{"norm.bias": torch.full((16,), 1e300, dtype=torch.float64)}),
    "a tensor too many": lambda f: reweighted(f, extra=torch.zeros(1)), "no weights": lambda f: (f / "model.safetensors").unlink(),
    "layers alone": lambda f: save_file({"layers.0.ln.weight": torch.zeros(16)}, f / "model.safetensors"),
    "two indexes": lambda f: (f / "model.safetensors.index.json").write_text("{}"),
    "a shard without an index": lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
    "a pickle that is none": lambda f: (replaced(f, "pytorch_model.bin", b"x"), (f / "model.safetensors").unlink()),
    "a pickle of code": lambda f: (torch.save(SessaLM(CONFIG), f / "m.pt"), (f / "model.safetensors").unlink()),
    "a link to nothing": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("absent")),
    "a folder for a file": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
}


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", BAD)
def test_inspect_and_export_agree(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    BAD[what](checkpoint)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert call("export", checkpoint, "--out", tmp_path / "out" / "bundle") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and sorted(str(p) for p in tmp_path.rglob("*")) == before
    for options in ((), ("--json",)):
        assert call("inspect", checkpoint, *options) == 2
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["model.pt", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("more", [(), ("--no-verify",)])
def test_junk_in_a_weights_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, more: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(b"junk")
    assert call("inspect", tmp_path / name, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and name in said and said.count("\n") == 1


def test_shards_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_checkpoint(SessaLM(CONFIG), tmp_path / "c", max_shard_bytes=10_000)
    assert call("inspect", path, "--json") == 0
    found = as_json(capsys)
    assert len(found["files"]) > 2 and {t["file"] for t in found["tensors"]} == set(found["files"])


def test_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_onnx(tmp_path / "model.onnx")
    assert call("inspect", path) == 0
    text = capsys.readouterr().out
    for word in ("ai.onnx 17, sessa 1", "sessa::SessaFeedbackAttention", "storage=1", "scale=0.25", "B, 4"):
        assert word in text
    assert call("inspect", path, "--json") == 0
    found = as_json(capsys)
    assert found["opsets"] == {"ai.onnx": 17, "sessa": 1} and found["functions"][0]["nodes"] == 1 and found["parameters"] == {"FLOAT": 4}
    assert found["inputs"] == [{"name": "x", "dtype": "FLOAT", "dims": ["B", 4]}] and found["custom_nodes"][0]["attributes"] == {"scale": 0.25, "storage": 1}


def test_onnx_external_data_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_onnx(tmp_path / "model.onnx", external=True)
    assert call("inspect", path, "--json") == 0
    assert as_json(capsys)["external_data"] == {"model.onnx.data": 16}
    (tmp_path / "model.onnx.data").unlink()
    assert call("inspect", path) == 2
    assert "external data is missing: model.onnx.data" in capsys.readouterr().err
    path.write_bytes(b"not a protobuf at all")
    assert call("inspect", path) == 2
    assert "is no ONNX model" in capsys.readouterr().err


def test_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_onnx(tmp_path / "m.onnx")
    write_bundle(tmp_path / "bundle", {"model.onnx": model}, CONFIG, "fp32", {"torch": "2.13"})
    assert call("inspect", tmp_path / "bundle") == 0
    text = capsys.readouterr().out
    assert "model.onnx" in text and "fp32" in text and text.rstrip().endswith("verified")
    data = bytearray((tmp_path / "bundle" / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bundle" / "model.onnx").write_bytes(data)
    assert call("inspect", tmp_path / "bundle") == 2
    shown = capsys.readouterr()
    assert "model.onnx does not match its checksum" in shown.err and "FAILED" in shown.out
    assert call("inspect", tmp_path / "bundle", "--no-verify") == 0
    capsys.readouterr()
    (tmp_path / "bundle" / "manifest.json").write_text("{")
    assert call("inspect", tmp_path / "bundle") == 2


def test_nothing_to_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("x")
    cases = ((tmp_path / "nowhere", "nothing to inspect"), (tmp_path / "a.txt", "nothing to inspect"), (tmp_path, "neither a checkpoint nor a bundle"))
    for path, words in cases:
        assert call("inspect", path) == 2
        assert words in capsys.readouterr().err
