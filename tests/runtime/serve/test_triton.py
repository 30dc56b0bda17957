"""export-triton's folder, whole or not at all; and its model.py driven with a fake triton_python_backend_utils. The real server: test_live.py."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_model import NumpyBackend
from served import MODEL, SlowBackend, bundle, let_wait, one_is_cancelled, until

from sessa_deploy.cli import main
from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve import triton
from sessa_deploy.runtime.serve.triton import INPUTS, OUTPUTS
from sessa_deploy.runtime.serve.triton_export import export_triton
from sessa_deploy.runtime.session import Session

TYPES = {"STRING": object, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool}
FINAL = 1


class Tensor:
    def __init__(self, name: str, value: Any) -> None:
        assert isinstance(value, np.ndarray)
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._value


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = "INVALID_ARG", "UNAVAILABLE", "INTERNAL", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self.error = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error


class Request:
    """One request and all that comes of it."""

    def __init__(self, beside: dict[str, Any] | None = None, **inputs: Any) -> None:
        self._beside, self.responses, self.gone, self.done = beside or {}, [], False, threading.Event()
        types_of = {known.name: known.type for known in INPUTS}
        self._inputs = []
        for name, value in inputs.items():
            values = value if isinstance(value, list) else [value]
            raw = [x.encode() if isinstance(x, str) else x for x in values]
            self._inputs.append(Tensor(name, np.array(raw, dtype=TYPES[types_of[name]])))

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return json.dumps(self._beside)

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return self.gone

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response behind the last"
        for name in response.tensors:
            assert name in {known.name for known in OUTPUTS}
        self.responses.append(response)
        if flags == FINAL:
            self.done.set()

    def answer(self) -> tuple[str, list[int], str]:
        """(text, tokens, why it ended) of all responses together."""
        assert self.done.wait(60)
        assert all(response.error is None for response in self.responses), [str(response.error) for response in self.responses]
        tensors = [response.tensors for response in self.responses]
        assert all(found["finish_reason"][0] == b"" for found in tensors[:-1])
        return (b"".join(found["text_output"][0] for found in tensors).decode(), [int(t) for found in tensors for t in found["token_ids"]],
                tensors[-1]["finish_reason"][0].decode())

    def error(self) -> tuple[str, str]:
        assert self.done.wait(60)
        error = self.responses[-1].error
        assert error is not None
        return error.code, str(error)


@pytest.fixture(autouse=True)
def _utils(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = types.ModuleType("triton_python_backend_utils")
    utils.__dict__.update(Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse, TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("triton")
    return export_triton(bundle(root / "tiny"), root / "repository", slots=2, queue=2, queue_timeout=50.0)


def arguments(folder: Path, kind: str = "CPU", device: str = "0") -> dict[str, str]:
    """What the server gives to initialize(), read from config.pbtxt as it does."""
    text = (folder / "config.pbtxt").read_text()
    settings = dict(re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', text))
    return {"model_repository": str(folder), "model_version": "1", "model_name": folder.name, "model_instance_kind": kind, "model_instance_device_id": device,
            "model_config": json.dumps({"parameters": {name: {"string_value": value} for name, value in settings.items()}})}


def load(folder: Path, backend: Any, monkeypatch: pytest.MonkeyPatch, **more: str) -> Any:
    """TritonPythonModel as model.py gives it, initialized."""
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton, "open_slots", lambda *args: backend)
    model = module.TritonPythonModel()
    model.initialize(arguments(folder, **more))
    return model


@pytest.fixture
def model(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = load(exported, NumpyBackend(MODEL, 2), monkeypatch)
    yield found
    found.finalize()


class Paced(NumpyBackend):
    """Slow enough that tokens are sent one by one: those that are there at once go in one response."""

    def _forward(self, ids: Any, new: Any) -> Any:
        time.sleep(0.02)
        return super()._forward(ids, new)


def test_answers_are_those_of_solo_runs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(exported, Paced(MODEL, 2), monkeypatch)
    with Session(Bundle.open(exported / "1" / "bundle"), NumpyBackend(MODEL, 2), max_batch=2) as session:
        wanted = []
        for seed in range(4):
            session.reset()
            wanted.append(session.generate(["ab c"], 20, SamplingParams(temperature=0.7, seed=seed))[0])
    asked = [Request(text_input="ab c", max_tokens=20, temperature=0.7, seed=seed, stream=seed % 2 == 0) for seed in range(4)]
    assert model.execute(asked) is None
    for request, solo in zip(asked, wanted, strict=True):
        assert request.answer() == (solo.text, solo.tokens, solo.finish)
    assert len(asked[0].responses) > 1 and len(asked[1].responses) == 1
    model.finalize()


def test_ids_stops_and_log_probabilities(model: Any) -> None:
    whole = Request(text_input="ab c", max_tokens=20, temperature=0.0)
    model.execute([whole])
    text, tokens, _ = whole.answer()
    stop = next(text[at : at + 2] for at in range(4, len(text) - 1) if text[at : at + 2].isascii())
    same = Request(input_ids=list(b"ab c"), max_tokens=20, temperature=0.0, logprobs=2)
    cut = Request(text_input="ab c", temperature=0.0, max_tokens=20, stop=[stop])
    model.execute([same, cut])
    assert same.answer()[1] == tokens and cut.answer()[0] == text[: text.index(stop)] and cut.answer()[2] == "stop"
    tensors = same.responses[0].tensors
    assert tensors["logprobs"].shape == (20,) and tensors["top_token_ids"].shape == tensors["top_logprobs"].shape == (20, 2)
    assert (tensors["top_token_ids"][:, 0] == tensors["token_ids"]).all() and np.allclose(tensors["top_logprobs"][:, 0], tensors["logprobs"])


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("neither text_input nor input_ids", {}), ("both text_input and input_ids", {"text_input": "a", "input_ids": [97]}),
    ("top_p", {"text_input": "a", "top_p": 2.0}),
    ("temperature", {"text_input": "a", "temperature": -1.0}), ("capacity of 96", {"text_input": "a", "max_tokens": 97}), ("vocabulary", {"input_ids": [300]}),
    ("empty", {"input_ids": []}), ("no such input: got n", {"text_input": "a", "beside": {"n": 2, "triton_enable_empty_final_response": True}}),
    ("max_new_tokens", {"text_input": "a", "max_tokens": -1}), ("max_tokens has the wrong shape", {"text_input": "a", "max_tokens": [1, 2]}),
]


@pytest.mark.parametrize(("what", "inputs"), REFUSED, ids=[what for what, _ in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(model: Any, what: str, inputs: dict[str, Any]) -> None:
    asked = Request(**inputs)
    model.execute([asked])
    code, said = asked.error()
    assert code == "INVALID_ARG" and what in said, said


def test_full_queues_clients_that_go_and_steps_that_fail(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowBackend(1)
    found = load(exported, slow, monkeypatch)
    slow.open.clear()
    first, *crowd = (Request(text_input="a", max_tokens=90, stream=True) for _ in range(4))
    found.execute([first, *crowd])
    assert crowd[2].error()[0] == "UNAVAILABLE" and "waiting" in crowd[2].error()[1]
    first.gone = True
    until(lambda: one_is_cancelled(found._batcher))
    let_wait(found._batcher, 60)
    slow.open.set()
    assert first.error()[0] == "CANCELLED" and [other.error()[0] for other in crowd[:2]] == ["UNAVAILABLE"] * 2
    slow.broken = True
    failing = Request(text_input="a")
    found.execute([failing])
    assert failing.error()[0] == "INTERNAL" and "fell off" in failing.error()[1]
    slow.broken = False
    lost = Request(text_input="a", max_tokens=90, ignore_eos=True, stream=True)
    monkeypatch.setattr(lost, "send", lambda *args, **more: 1 / 0)  # the server has let go of it
    found.execute([lost])
    fine = Request(text_input="a", temperature=0.0, ignore_eos=True)
    found.execute([fine])
    assert len(fine.answer()[1]) == 16
    found.finalize()
    late = Request(text_input="a")
    found.execute([late])
    assert late.error()[0] == "UNAVAILABLE"


def test_an_instance_sees_its_gpu_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seen, device, wanted in (("", "1", "1"), ("4,5", "1", "5")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        load(exported, NumpyBackend(MODEL, 1), monkeypatch, kind="GPU", device=device).finalize()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted


def test_the_folder_appears_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = bundle(tmp_path / "made"), tmp_path / "repository"
    (out / "other").mkdir(parents=True)
    (out / "other" / "config.pbtxt").write_text('backend: "tensorrt"')
    main(["export-triton", str(made.path), "--out", str(out), "--name", "sessa", "--capacity", "64"])
    assert f"model: {out / 'sessa'}" in capsys.readouterr().out
    names = sorted(path.relative_to(out / "sessa").as_posix() for path in (out / "sessa").rglob("*") if path.is_file())
    assert names == sorted(["config.pbtxt", "1/model.py", "1/bundle/manifest.json", *(f"1/bundle/{name}" for name in made.names())])
    assert Bundle.open(out / "sessa/1/bundle").manifest == made.manifest and arguments(out / "sessa")["model_config"].count("string_value") == 4
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in (out / "sessa").rglob("*") if path.is_file())  # by copy
    export_triton(made, out, "sessa", slots=3)  # ours: replaced
    assert 'key: "slots" value { string_value: "3" }' in (out / "sessa/config.pbtxt").read_text()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for wrong, what in (({"name": "other"}, "something else stands"), ({"name": "../x"}, "no name"), ({"name": ""}, "no name"),
                        ({"backend": "cpu"}, "backend")):
        with pytest.raises(UserError, match=what):
            export_triton(made, out, **wrong)
    (made.path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        export_triton(made.path, out, "sessa")
    fine = bundle(tmp_path / "fine")
    monkeypatch.setattr("sessa_deploy.runtime.serve.triton_export.config_pbtxt", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_triton(fine, out, "sessa")
    with pytest.raises(ZeroDivisionError):
        export_triton(fine, out, "new")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before and sorted(x.name for x in out.iterdir()) == ["other", "sessa"]
    with pytest.raises(SystemExit) as stopped:
        main(["export-triton", str(fine.path), "--out", str(fine.path / "engines")])
    assert stopped.value.code == 2 and "inside a bundle" in capsys.readouterr().err


def test_a_changed_copy_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_triton(bundle(tmp_path / "tiny"), tmp_path / "repository")
    (folder / "1/bundle/model.onnx").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"model\.onnx"):
        load(folder, NumpyBackend(MODEL, 1), monkeypatch)
