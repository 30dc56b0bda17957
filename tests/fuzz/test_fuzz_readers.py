"""Whatever bytes lie in a file that somebody brought: it is read, or refused in one line; no traceback, no hang, no memory beyond the file's size by far."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sessa_deploy import contract
from sessa_deploy.checkpoint import load_for_export, read_state
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.ort import prepared
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer
from sessa_deploy.runtime.trt import plan as trt_plan
from sessa_deploy.safetensors_check import read_header

pytestmark = pytest.mark.timeout(60)
CONFIG = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257)
STATE = {k: v.detach().clone().contiguous() for k, v in SessaLM(CONFIG).state_dict().items()}
ENGINE = trt_plan.EngineInfo("k", "0" * 64, 4, "10.9.0", "sm_90", "gpu", "1", "fp32", 1, 8, 8, "0" * 64, 1.0)
ENGINE_NAME = "engines/sm_90-10.9.0-fp32/engine.json"
PREPARED = prepared.Prepared(
    "engines/ort-fp32", Path(), "fp32", (prepared.Weight("w", "model.onnx", 1, 4, 1, (1,)), prepared.Weight("x", "model.onnx", 0, 0, 1, (0, 2))),
    {"SessaTail": 1}, "plugin", [], "", 0, False, "k", contract.PLUGIN_STATE,
    {n: hashlib.sha256(b"graph").hexdigest() for n in ("model.onnx", "engines/ort-fp32/model.onnx")},
)  # fmt: skip
few = settings(derandomize=True, print_blob=False, deadline=60_000, max_examples=60, database=None, suppress_health_check=list(HealthCheck))

numbers = st.one_of(st.integers(), st.integers(-3, 300), st.sampled_from([2**31, 2**60, 2**64, -1, 10**400]), st.floats())
texts = st.one_of(st.text(max_size=8), st.sampled_from(["\ud800", "\x1b[2J", "a\nb", "../x", "[/b]", "model.onnx", "F32", ""]))
values = st.recursive(st.one_of(st.none(), st.booleans(), numbers, texts), lambda x: st.one_of(st.lists(x, max_size=4), st.dictionaries(texts, x, max_size=4)),
                      max_leaves=8)
# JSON that is hostile as a whole: deep, twice named, of too many digits, not UTF-8, with a byte order mark, with constants that JSON does not know.
HOSTILE = [b"", b"{", b"[" * 20_000, b'{"a":' * 20_000, b'{"a": 1, "a": 2}', b"1" * 5000, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"NaN", b'{"x": Infinity}',
           b'"\\ud800"', b"null", b"[]", b"3", b"\0" * 100, b"{}" * 2]


def one_line(error: UserError) -> None:
    text = str(error)
    assert "\n" not in text and len(text) < 10_000 and error.exit_code == 2
    text.encode("utf-8")


def harmless(read: Callable[[], Any], size: int) -> None:
    """Reads or refuses, with no more memory than a small multiple of the file's size."""
    tracemalloc.start()
    try:
        read()
    except UserError as error:
        one_line(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64 * size + (8 << 20), peak


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> bytes:
    """JSON near a valid one: one value somewhere in it replaced, removed or added; or hostile JSON; or a few bytes changed."""
    kind = draw(st.sampled_from(["value", "value", "value", "bytes", "hostile"]))
    if kind == "hostile":
        return draw(st.sampled_from(HOSTILE))
    data = json.loads(json.dumps(valid))
    if kind == "value":
        here = data
        while isinstance(here, dict) and here:
            key = draw(st.sampled_from(sorted(here)))
            if not isinstance(here[key], dict) or draw(st.booleans()):
                how = draw(st.integers(0, 5))
                if how == 0:
                    del here[key]
                elif how == 1:
                    here[draw(texts)] = draw(values)
                else:
                    here[key] = draw(values)
                break
            here = here[key]
        return json.dumps(data).encode()
    return mutate(draw, json.dumps(data).encode(), st.sampled_from(list(b'0123456789,:"{}[]-aeT\\\xff\0')))


def mutate(draw: st.DrawFn, raw: bytes, byte: st.SearchStrategy[int]) -> bytes:
    out = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        if out:
            out[draw(st.integers(0, len(out) - 1))] = draw(byte)
    cut = draw(st.sampled_from([None, None, None, "cut", "doubled"]))
    return bytes(out[: draw(st.integers(0, len(out)))]) if cut == "cut" else bytes(out * 2) if cut == "doubled" else bytes(out)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A whole checkpoint; each test writes one of its files."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "checkpoint"
        path.mkdir()
        CONFIG.save(path)
        (path / "model.safetensors").write_bytes(save(STATE))
        load_for_export(path)  # imports, outside the measured memory
        yield path


def with_file(folder: Path, name: str, raw: bytes, read: Callable[[Path], Any]) -> None:
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    try:
        (folder / name).write_bytes(raw)
        harmless(lambda: read(folder), max(len(raw), 20_000))
    finally:
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)


@few
@given(raw=changed(CONFIG.to_dict()))
@example(raw=b'{"d_model": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 257, "layer_norm_eps": 1' + b"0" * 400 + b"}")
@example(raw=b'{"d_model": 8, "n_layers": 1000000000000, "n_heads": 2, "vocab_size": 257}')
@example(raw=b'{"d_model": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 257, "eos_token_id": [[1], {"a": 2}]}')
def test_config(folder: Path, raw: bytes) -> None:
    with_file(folder, "config.json", raw, load_for_export)


@few
@given(raw=changed({"eos_token_id": [1, 2], "temperature": 0.7}))
def test_generation_config(folder: Path, raw: bytes) -> None:
    with_file(folder, "generation_config.json", raw, load_for_export)


HEADER = json.loads(save(STATE)[8 : 8 + struct.unpack("<Q", save(STATE)[:8])[0]])


@few
@given(header=changed(HEADER), length=st.one_of(st.none(), st.sampled_from([0, 7, 2**31, 2**60, 2**64 - 1])))
@example(header=json.dumps({"a": {"dtype": "F32", "shape": [2**47] * 100_000, "data_offsets": [0, 4]}}).encode(), length=None)
@example(header=b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', length=None)
def test_safetensors_header(folder: Path, header: bytes, length: int | None) -> None:
    data = save(STATE)
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    raw = struct.pack("<Q", len(header) if length is None else length) + header + body
    with_file(folder, "model.safetensors", raw, lambda f: (read_header(f / "model.safetensors"), read_state(f)))


@few
@given(raw=changed({"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(STATE, "a.safetensors")}))
@example(raw=json.dumps({"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(3000)}}).encode())
def test_index(folder: Path, raw: bytes) -> None:
    shards = folder.parent / "sharded"
    if not shards.exists():
        shards.mkdir()
        CONFIG.save(shards)
        (shards / "a.safetensors").write_bytes(save(STATE))
    with_file(shards, "model.safetensors.index.json", raw, load_for_export)


@few
@given(raw=changed({**json.loads(byte_level_tokenizer()), "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}))
def test_tokenizer(folder: Path, raw: bytes) -> None:
    with_file(folder, "tokenizer.json", raw, load_for_export)


# Pickles ---------------------------------------------------------------------------------------------------------------------------


def archive(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as written:
        for name, content in records.items():
            written.writestr(name, content)
    return out.getvalue()


def saved(value: Any, new: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


SMALL = {"ln.weight": torch.zeros(8), "ln.bias": torch.ones(8)}
RECORDS = {r.filename: zipfile.ZipFile(io.BytesIO(saved(SMALL))).read(r) for r in zipfile.ZipFile(io.BytesIO(saved(SMALL))).infolist()}


@few
@given(data=st.data(), kind=st.sampled_from(["zip", "record", "record", "legacy", "bytes"]))
def test_pickle(folder: Path, data: st.DataObject, kind: str) -> None:
    byte = st.integers(0, 255)
    if kind == "record":  # the pickle within the archive, so that checksums of the archive do not hide it
        name = next(n for n in RECORDS if n.endswith("data.pkl"))
        raw = archive({**RECORDS, name: data.draw(st.composite(lambda draw: mutate(draw, RECORDS[name], byte))())})
    elif kind == "bytes":
        raw = data.draw(st.binary(max_size=300))
    else:
        raw = data.draw(st.composite(lambda draw: mutate(draw, saved(SMALL, new=kind == "zip"), byte))())
    with_pickle(folder, raw)


def with_pickle(folder: Path, raw: bytes) -> None:
    with_file(folder, "m.pt", raw, lambda f: read_state(f / "m.pt"))


def spread() -> Any:
    return torch.zeros(1).as_strided((2**40,), (0,))


@pytest.mark.parametrize("raw", [
    saved({"ln.weight": spread()}), archive({**RECORDS, "archive/data/9": b"\0" * (64 << 20)}, zipfile.ZIP_DEFLATED),
    saved({"ln.weight": torch.zeros(2, device="meta")}), saved({("a",) * 3: torch.zeros(1)}), saved({"1" * 100_000 + "!.ln.weight": torch.zeros(1)}),
    saved({"layers." + "9" * 5000 + ".ln.weight": torch.zeros(1)}), saved({"layers." + "9" * 500 + ".ln.weight": torch.zeros(1)}),
    saved({"a": torch.zeros(1, dtype=torch.complex64)}), saved({"state_dict": {"state_dict": {"state_dict": {}}}}),
    saved({"ln.weight": torch.zeros(2).to_sparse()}), saved(torch.zeros(3)), saved("text"), saved({}),
], ids=["spread", "bomb", "meta", "tuple", "long", "digits", "layer", "complex", "wrapped", "sparse", "tensor", "text", "empty"])
def test_pickles_that_claim_more_than_they_hold(folder: Path, raw: bytes) -> None:
    (folder / "m.pt").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read_state(folder / "m.pt")
    one_line(caught.value)
    with_pickle(folder, raw)


# Bundles ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    with tempfile.TemporaryDirectory() as place:
        files = {"model.onnx": b"graph", "tokenizer.json": b"{}", ENGINE_NAME: ENGINE.to_json(), f"{PREPARED.folder}/model.onnx": b"graph",
                 f"{PREPARED.folder}/engine.json": PREPARED.to_json()}
        yield write_bundle(Path(place) / "b", files, CONFIG, "fp32", {"torch": "2"})


MANIFEST = {"schema_version": 1, "config": CONFIG.to_dict(), "precision": "fp32", "opset": 17, "versions": {"torch": "2"},
            "files": {"model.onnx": {"sha256": hashlib.sha256(b"graph").hexdigest(), "size": 5}, "tokenizer.json": {
                "sha256": hashlib.sha256(b"{}").hexdigest(), "size": 2}}}


@few
@given(raw=changed(MANIFEST))
@example(raw=b"NaN")
@example(raw=b"null")
@example(raw=b"[]")
def test_manifest(bundle: Bundle, raw: bytes) -> None:
    from sessa_deploy.describe import describe_bundle

    with_file(bundle.path, "manifest.json", raw, Bundle.open)
    with_file(bundle.path, "manifest.json", raw, describe_bundle)


@few
@given(raw=changed(json.loads(ENGINE.to_json())))
@example(raw=b"NaN")
@example(raw=b"null")
@example(raw=b"[]")
def test_engine(bundle: Bundle, raw: bytes) -> None:
    def read(_: Path) -> None:
        entry = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
        found = Bundle(bundle.path, {**bundle.manifest, "files": {**bundle.manifest["files"], ENGINE_NAME: entry}})
        for info in trt_plan.engines(found).values():
            assert all(isinstance(x, int) for x in (info.max_batch, info.capacity, info.max_prompt)) and math.isfinite(info.capacity)

    with_file(bundle.path, ENGINE_NAME, raw, read)


@few
@given(raw=changed(json.loads(PREPARED.to_json())))
@example(raw=b"NaN")
@example(raw=b"null")
@example(raw=b"[]")
@example(raw=PREPARED.to_json())
def test_prepared_graph(bundle: Bundle, raw: bytes) -> None:
    name = f"{PREPARED.folder}/engine.json"

    def read(_: Path) -> None:
        entry = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
        found = Bundle(bundle.path, {**bundle.manifest, "files": {**bundle.manifest["files"], name: entry}})
        seen = prepared.find(found)
        assert seen is not None and all(w.offset + w.size <= 5 and w.file == "model.onnx" for w in seen.weights)
        assert all(x.nbytes == w.size for w, x in zip(seen.weights, prepared.weights(found, seen).values(), strict=True))

    with_file(bundle.path, name, raw, read)
    if raw == PREPARED.to_json():
        read(bundle.path)


@few
@given(raw=changed({"schema": 1, "seed": 0, "chosen_by": "seed", "digest": "0", "cases": [{"name": "a", "kind": "prefill", "steps": 1}]}))
def test_parity_cases(bundle: Bundle, raw: bytes) -> None:
    from sessa_deploy.export.parity.cases import build_cases, load_cases, save_cases
    from sessa_deploy.export.parity.rungs import read_header as rung_header

    folder = bundle.path.parent / "dump"
    if not folder.exists():
        save_cases(build_cases(CONFIG, 0, (4,)), folder)
        (folder / "ort").mkdir()
        shutil.copy(folder / "cases.json", folder / "ort" / "rung.json")
    with_file(folder, "cases.json", raw, load_cases)
    with_file(folder / "ort", "header.json", raw, lambda f: rung_header(f.parent, "ort"))
