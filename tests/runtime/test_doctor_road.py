"""doctor on the road to a TensorRT engine: which TensorRT, which library, and the one command that is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime import doctor, environment
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.trt import api
from sessa_deploy.runtime.trt import plan as trt_plan

LIBRARY = {"path": "/x/libsessa_plugin.so", "major": 11, "archs": [80, 86, 89, 90, 120]}
H100, RTX3090, TURING = ([{"arch": f"sm_{n}"}] for n in (90, 86, 75))


@pytest.fixture
def road(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """(installed versions by product, GPUs, what the library's probe answers) -> findings by product."""

    def make(installed: dict[str, str | None], gpus: list[dict[str, Any]], library: Any = LIBRARY, error: str | None = None) -> dict[str, dict[str, Any]]:
        def probe(code: str) -> tuple[Any, str | None]:
            for product in api.PRODUCTS:
                if f"load({product.name!r})" in code:
                    return installed[product.name], "libnvinfer.so.11: cannot open shared object file"
            return library, error

        monkeypatch.setattr(api, "importable", lambda product: product.modules[0] if product.name in installed else None)
        monkeypatch.setattr(environment, "probe", probe)
        return {one["name"]: one for one in doctor.tensorrt_road(gpus)}

    return make


@pytest.mark.parametrize(
    ("installed", "gpus", "library", "error", "name", "mend", "ready"),
    [({}, RTX3090, LIBRARY, None, "tensorrt", "pip install 'sessa-deploy[tensorrt]'", ""),
     ({}, [], LIBRARY, None, "rtx", "pip install 'sessa-deploy[rtx]'", ""),
     ({"tensorrt": None}, H100, LIBRARY, None, "tensorrt", "it cannot be imported (libnvinfer.so.11", ""),
     ({"tensorrt": "11.4.0"}, H100, None, "no TensorRT plugin library for TensorRT 11; fix: sessa-deploy plugin build --tensorrt 11", "tensorrt",
      "sessa-deploy plugin build --tensorrt 11", ""),
     ({"tensorrt": "11.4.0"}, H100, LIBRARY, None, "tensorrt", "", "build and run with trt"), ({"tensorrt": "11.4.0"}, [], LIBRARY, None, "tensorrt", "", ""),
     ({"tensorrt": "11.4.0"}, TURING, LIBRARY, None, "tensorrt", "use --backend ort", ""),
     ({"rtx": "1.7.1.116"}, [], LIBRARY, None, "rtx", "", "build --for rtx ahead of time"),
     ({"rtx": "1.7.1.116"}, RTX3090, LIBRARY, None, "rtx", "", "build --for rtx and run with trt"),
     ({"rtx": "1.7.1.116"}, H100, LIBRARY, None, "rtx", "pip install 'sessa-deploy[tensorrt]', and --for tensorrt", "build --for rtx ahead of time")],
)  # fmt: skip
def test_the_one_command_that_is_missing(road: Callable[..., Any], installed: dict[str, str | None], gpus: list[Any], library: Any, error: str | None,
                                         name: str, mend: str, ready: str) -> None:
    found = road(installed, gpus, library, error)[name]
    assert found["mend"].startswith(mend) and bool(found["mend"]) == bool(mend) and found["ready"] == ready
    assert found["found"] == installed.get(name)
    assert bool(found["refused"]) == (name == "rtx" and gpus == H100) and ("sm_90" in found["refused"]) == bool(found["refused"])


ORT_LIBRARY = {"path": "/x/libsessa_ort.so", "archs": [80, 86, 90]}


@pytest.mark.parametrize(
    ("library", "error", "gpus", "found", "mend"),
    [(ORT_LIBRARY, None, H100, "/x/libsessa_ort.so, sm_80, 86, 90", ""), (ORT_LIBRARY, None, [], "/x/libsessa_ort.so, sm_80, 86, 90", ""),
     (None, "no library of kernels for ONNX Runtime: got x; fix: sessa-deploy plugin build --for ort", H100, "not installed",
      "sessa-deploy plugin build --for ort"),
     (None, "it printed no answer", [], "not installed", "sessa-deploy plugin build --for ort"),
     (ORT_LIBRARY, None, [{"arch": "sm_120"}], "/x/libsessa_ort.so, sm_80, 86, 90", "sessa-deploy plugin build --for ort --arch 120"),
     (ORT_LIBRARY, None, TURING, "/x/libsessa_ort.so, sm_80, 86, 90", "use --backend ort; the kernels are compiled for ")],
)  # fmt: skip
def test_the_library_for_onnx_runtime_is_one_row(monkeypatch: pytest.MonkeyPatch, library: Any, error: str | None, gpus: list[Any], found: str,
                                                 mend: str) -> None:
    monkeypatch.setattr(environment, "probe", lambda code: (library, error))
    row = doctor.ort_library(gpus)
    assert row["found"] == found and row["mend"].startswith(mend) and bool(row["mend"]) == bool(mend)
    assert row["state"] == ("optional" if mend else "ok")
    monkeypatch.setattr(environment, "gpus", lambda: [{"index": 0, "name": "a card", "memory": 1 << 34, **gpu} for gpu in gpus])
    monkeypatch.setattr(doctor, "_providers", lambda *given: [])
    monkeypatch.setattr(doctor, "tensorrt_road", lambda gpus: [])
    assert row in doctor.examine()["checks"]


def test_every_probe_runs() -> None:
    """In a fresh interpreter, as doctor asks: an answer, or an error of ours in words, and never a slip in the question."""
    for code in (doctor._ORT_LIBRARY, doctor._LIBRARY.format(major=11), doctor._WHY_NO_CUDA, doctor._IMPORTS.format(name="tensorrt")):
        answer, error = environment.probe(code)
        assert answer is not None or re.match(r"sessa_deploy\.errors\.\w+: ", str(error)), error


def test_an_installed_tensorrt_without_pips_records_is_installed(road: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python imports counts, not what pip wrote down."""
    road({"tensorrt": "8.6.0"}, [])
    found = [c for c in doctor.examine()["checks"] if c["name"] == "TensorRT"]
    assert [(c["found"], c["state"]) for c in found] == [("8.6.0", "ok")]


def test_which_engine_of_a_bundle_would_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = trt_plan.EngineInfo("k", "0" * 64, 4, "1.7.1.116", "rtx-80_86", "gpu", "1", "fp32", 1, 8, 8, "0" * 64, 1.0, product="rtx", archs=[80, 86])
    folder = f"engines/rtx-80_86-{info.tensorrt}-fp32"
    bundle = write_bundle(tmp_path / "b", {"model.onnx": b"x", f"{folder}/model.plan": b"plan", f"{folder}/engine.json": info.to_json()},
                          SessaConfig(16, 1, 2, 61), "fp32", {})  # fmt: skip
    for version, gpus, engine, why, mend in (
        ("1.7.1.116", RTX3090, folder, "", ""), (None, RTX3090, None, "TensorRT for RTX is not installed", "pip install 'sessa-deploy[rtx]'"),
        ("1.7.1.116", [], None, "there is no CUDA GPU here", "run it where there is one of sm_80, 86"),
        ("1.7.1.116", H100, None, "TensorRT for RTX does not support this compute capability: sm_90", "pip install 'sessa-deploy[tensorrt]'"),
        ("1.8.0.1", RTX3090, None, "another TensorRT version: built with 1.7.1.116", "sessa-deploy build"),
        ("1.7.1.116", [{"arch": "sm_89"}], None, "another GPU architecture: built for sm_80, sm_86, this GPU is sm_89", "sessa-deploy build")):
        monkeypatch.setattr(api, "installed_version", lambda product, v=version: v if product.name == "rtx" else None)
        found = doctor.engine_here(bundle, gpus)
        assert found["engine"] == engine and why in found["why"] and found["mend"].startswith(mend), found
