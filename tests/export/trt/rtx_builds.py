"""Builds engines with TensorRT for RTX's real builder and prints what it said, as JSON; run by test_rtx.py in a process of its own, which may crash.

Input, one JSON object: {"plugin": the library, "any_major": true where it was compiled with other headers, "traces": the run's traced graphs,
"cases": {name: {...}}}. A case is a model ("checkpoint", or "config" of a random one) and how to export and build it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from sessa_deploy import contract
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import SessaError
from sessa_deploy.export import to_engine
from sessa_deploy.export.to_onnx import export_onnx
from sessa_deploy.export.trt import check
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.trt import api

sys.path.insert(0, str(Path(__file__).parents[2]))
from traces import share

ARCHS = [80, 86]
exported: dict[str, Path] = {}


def model_of(case: dict[str, Any], folder: Path) -> tuple[SessaConfig, Path]:
    """(config, model.onnx), exported once for all cases that share it."""
    import torch

    from sessa_deploy.checkpoint import load_for_export
    from sessa_deploy.model import SessaLM

    options = {k: case[k] for k in ("precision", "opset", "all_logits", "inline_limit", "weights", "keep") if k in case}
    key = json.dumps([case.get("checkpoint"), case.get("config"), options])
    if "checkpoint" in case:
        config = SessaConfig.load(Path(case["checkpoint"]))
    else:
        config = SessaConfig(**case["config"])
    if key not in exported:
        torch.manual_seed(3)
        loaded = load_for_export(Path(case["checkpoint"])) if "checkpoint" in case else SessaLM(config)
        model = loaded if isinstance(loaded, SessaLM) else next(x for x in loaded if isinstance(x, SessaLM))
        (folder / str(len(exported))).mkdir()
        exported[key] = export_onnx(model, folder / str(len(exported)) / contract.MODEL_FILE, **options)
    return config, exported[key]


def matrices(model: Path, plan: bytes) -> dict[str, list[bool]]:
    """Matrix in 8 bits -> whether a plan holds its values, and its scales, byte for byte and output channel after output channel."""
    graph = onnx.load(model).graph
    held = {t.name: t.raw_data in plan for t in graph.initializer if t.name.endswith((contract.QUANTISED, contract.SCALE))}
    names = [n.removesuffix(contract.QUANTISED) for n in held if n.endswith(contract.QUANTISED)]
    return {n: [held[n + contract.QUANTISED], held[n + contract.SCALE]] for n in names}


def build(case: dict[str, Any], plugin: Path, folder: Path) -> dict[str, Any]:
    """One engine: what it holds, its layers, and which tensors of the parsed network are not of the graph's type."""
    config, model = model_of(case, folder)
    sources = {p.name: p for p in (model, model.with_name(contract.MODEL_DATA_FILE)) if p.is_file()}
    small = contract.Weights(case["weights"], tuple(f"{name}.weight" for name in case.get("keep", ()))) if "weights" in case else None
    bundle = write_bundle(Path(tempfile.mkdtemp(dir=folder)) / "bundle", dict(sources), config, case["precision"], {}, case.get("opset", 17), weights=small)
    seen: dict[str, Any] = {}
    real_logger, real_parse = api.logger, to_engine.parse

    def logger(trt: Any, verbose: bool = False) -> Any:
        seen["log"] = real_logger(trt, verbose)
        return seen["log"]

    def parse(trt: Any, network: Any, log: Any, prepared: Any, path: Path) -> Any:
        parser = real_parse(trt, network, log, prepared, path)
        kinds = {trt.float32: 1, trt.float16: 10, trt.bfloat16: 16}
        found = {}
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            found |= {x.name: kinds.get(x.dtype) for j in range(layer.num_outputs) if (x := layer.get_output(j)) is not None}
        floats = {n: t for n, t in prepared.types.items() if t in (1, 10, 16) and n in found}
        seen["checked"], seen["single"] = len(floats), sum(t == 1 for t in floats.values())
        seen["wrong_types"] = [f"{n}: graph {t}, network {found[n]}" for n, t in floats.items() if found[n] != t]
        seen["inputs"] = {x.name: str(x.dtype).rpartition(".")[2] for x in (network.get_input(i) for i in range(network.num_inputs))}
        seen["plugin_nodes"] = [n.name for n in prepared.model.graph.node if n.domain == contract.DOMAIN]
        seen["direct"] = prepared.direct
        return parser

    api.logger, to_engine.parse = logger, parse
    try:
        built = to_engine.build_engine(bundle, 2, 64, 16, layers=case.get("layers"), plugin=plugin, target="rtx", archs=case.get("archs", ARCHS))
    except SessaError as error:
        return {"error": f"{error} / {' / '.join(seen['log'].lines[-3:]) if 'log' in seen else ''}"}
    finally:
        api.logger, to_engine.parse = real_logger, real_parse
    if small is not None:
        seen["matrices"] = matrices(model, built.bundle.file(f"{built.folder}/model.plan").read_bytes())
    text = seen.pop("log").layers
    listed = check.layers(text)
    return {**seen, "folder": built.folder, "info": json.loads(built.info.to_json()), "layers": [[x.name, x.kind, x.inputs] for x in listed],
            "external": contract.MODEL_DATA_FILE in sources}


def main() -> None:
    asked = json.loads(sys.stdin.read())
    if asked["any_major"]:
        library.require_major = lambda seen, major: None  # headers of another major, for tests alone: seen to build
    share(Path(asked["traces"]))
    with tempfile.TemporaryDirectory() as folder:
        for name, case in asked["cases"].items():
            print(json.dumps({name: build(case, Path(asked["plugin"]), Path(folder))}), flush=True)


if __name__ == "__main__":
    main()
