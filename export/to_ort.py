"""A bundle's graph, prepared for ONNX Runtime with our operator library, into the same bundle. onnx and numpy; no torch, no ONNX Runtime, no GPU.

The nodes that the library computes lose their bodies, and of a 16-bit graph everything around the attentions becomes nodes of the library, as for
TensorRT. The graph takes any batch, context and chunk, and serves every GPU that the library has binaries for. Weights that stay as they are lie in the
bundle's own file; only those laid out anew are written beside the graph.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from sessa_deploy import contract
from sessa_deploy.errors import UserError
from sessa_deploy.export.engine import layers as engine_layers
from sessa_deploy.export.engine.graph import SMALL
from sessa_deploy.export.engine.prepare import (
    FLOAT32,
    PLUGIN,
    Target,
    all_logits,
    check_layers,
    check_precision,
    check_weights,
    plugin_nodes,
    prepare,
    unavailable,
)
from sessa_deploy.export.graph.passes import drop_weights
from sessa_deploy.export.graph.places import Place, places
from sessa_deploy.export.graph.writer import INLINE_LIMIT, Weight, external_tensor, write_model
from sessa_deploy.files import scratch
from sessa_deploy.plugins import ops
from sessa_deploy.reading import open_plain
from sessa_deploy.runtime.bundle import Bundle, add_files, hash_file
from sessa_deploy.runtime.device.buffers import check_rows
from sessa_deploy.runtime.ort import prepared as ort_prepared

RECIPE_VERSION = 1  # goes up when the same graph would be prepared otherwise
_WHY = "its kernels are the tuned ones; --layers ort gives ONNX Runtime's own"
# One product with a Split behind it cannot be captured as a CUDA graph: ONNX Runtime's unequal Split reads pointers from the host.
TARGET = Target("ONNX Runtime", "ONNX Runtime", contract.ORT_ENGINE, _WHY, ("--for", contract.ORT_ENGINE), one_message=False, one_projection=False,
                rotary=True)
LAYERS = (PLUGIN, TARGET.own)
_FLOATS = {p.onnx for p in contract.PRECISIONS.values()}
_FIRST = 64  # bytes; that are compared before all are


@dataclass(frozen=True)
class Built:
    """bundle: with the graph in it; fresh: False where it was there already; notes: which roads were taken that nobody asked for, and why, one line each."""

    bundle: Bundle
    prepared: ort_prepared.Prepared
    fresh: bool
    notes: tuple[str, ...] = ()


def build_ort(
    bundle: Bundle | str | Path, layers: str | None = None, precision: str | None = None, force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Built:  # fmt: skip
    """Prepare a bundle's graph for ONNX Runtime on CUDA with libsessa_ort.so, and put it into the bundle by rename, as engines/ort-<precision>.

    layers: who computes what stands around the attentions, "plugin" or "ort"; None: the library, where it has the kernels, which are of 16 bits. The rotary
    tables are the library's always. precision: refused unless it is the graph's own. A graph whose key is the same is kept unless `force`. The same
    bundle gives the same bytes anywhere. Raises UserError on a width that the library's kernels do not take, and on what is asked for and cannot be had.
    """
    report = progress or (lambda what, done, of: None)
    check_layers(LAYERS, layers)
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    check_weights(bundle, "the library for ONNX Runtime", layers)
    check_precision(bundle, precision)
    check_rows(bundle.config, bundle.precision, "ONNX Runtime with the library", "use --backend ort-cuda, which runs the plain graph")
    if layers == PLUGIN and bundle.precision == "fp32":
        raise unavailable(bundle, TARGET, FLOAT32)
    key, present = _key(bundle, layers or PLUGIN), _present(bundle)
    if present is not None and present.key == key and layers in (None, present.layers) and not force:
        return Built(bundle, present, fresh=False)
    report("preparing the graph", 0, 0)
    made, taken, notes = prepare(bundle, TARGET, layers)
    if made.inlined:
        op = made.inlined[0]
        raise UserError("the library has no kernels for this model's attentions", got=f"{op}, {made.reasons.get(op, 'which it does not bring')}",
                        fix="use --backend ort-cuda, which runs the plain graph")
    model, folder = made.model, ort_prepared.folder_for(bundle.precision)
    drop_weights(model.graph)
    _state_outputs(model, engine_layers.sizes(bundle.config))
    with scratch("sessa-ort-") as work:
        report("writing the graph", 0, 0)
        path = work / contract.MODEL_FILE
        anew = list(_lay_out(bundle, model))
        write_model(model, anew, path, inline_limit=0 if anew else INLINE_LIMIT)
        written = {f"{folder}/{p.name}": p for p in (path, path.with_name(contract.MODEL_DATA_FILE)) if p.is_file()}
        sums = {n: bundle.sha256(n) for n in (contract.MODEL_FILE, contract.MODEL_DATA_FILE) if n in bundle} | {n: hash_file(p) for n, p in written.items()}
        description = ort_prepared.Prepared(
            folder=folder, model=bundle.path / folder / contract.MODEL_FILE, precision=bundle.precision, weights=tuple(_table(path, folder)),
            ops=plugin_nodes(model), layers=taken, inlined=made.inlined, plugin_sha256="", added_bytes=0,
            all_logits=all_logits(model), key=key, state=contract.PLUGIN_STATE, files=sums,
        )  # fmt: skip
        files = {**written, f"{folder}/{ort_prepared.ENGINE_FILE}": description.to_json()}
        older = [n for n in bundle.names() if n.startswith(f"{folder}/") and n not in files]
        bundle = add_files(bundle, files, remove=older)
    found = ort_prepared.find(bundle)
    if found is None:
        raise RuntimeError(f"{folder} was written and is not there")
    return Built(bundle, found, fresh=True, notes=tuple(notes))


def _key(bundle: Bundle, layers: str) -> str:
    """sha256 of everything that shapes the graph."""
    graph = {name: bundle.sha256(name) for name in (contract.MODEL_FILE, contract.MODEL_DATA_FILE) if name in bundle}
    parts = {"recipe": RECIPE_VERSION, "graph": graph, "state": contract.PLUGIN_STATE, "precision": bundle.precision, "layers": layers}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _present(bundle: Bundle) -> ort_prepared.Prepared | None:
    try:
        return ort_prepared.find(bundle)
    except UserError:  # a description that cannot be read is replaced
        return None


def _state_outputs(model: ModelProto, sizes: dict[str, int]) -> None:
    """State type and shape of what our nodes give, so that nobody who reads the graph needs to know the operators. sizes: by the letters of `ops.SIZES`."""
    graph = model.graph
    dims = {x.name: list(x.dims) for x in graph.initializer}
    given = {x.name for x in graph.output}
    letters: dict[str, int | str] = {**sizes, "B": contract.DIM_BATCH, "T": contract.DIM_TOKENS, "P": contract.DIM_PAST}
    stated: list[ValueInfoProto] = []
    for node in (n for n in graph.node if n.domain == contract.DOMAIN):
        here, numbers = dict(letters), {a.name: a.i for a in node.attribute}
        op = ops.op(node.op_type).form(numbers.get(contract.ATTR_WEIGHTS, 0))
        for operand, name in zip(op.inputs, node.input, strict=True):
            here.update(zip(operand.shape, dims.get(name, ()), strict=False))
        kinds = {"storage": numbers[contract.ATTR_STORAGE], "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        stated += [helper.make_tensor_value_info(name, kinds[x.kind], [here[c] for c in x.shape]) for x, name in zip(op.outputs, node.output, strict=True)
                   if name not in given]  # fmt: skip
    del graph.value_info[:]
    graph.value_info.extend(stated)


def _lay_out(bundle: Bundle, model: ModelProto) -> Iterator[Weight]:
    """Point the graph's large floating initializers to the bundle's files where their bytes lie there, and take the others out, to be written anew."""
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    with ExitStack() as stack:
        known = _Known(bundle, stack)
        for tensor in tensors:
            size = len(tensor.raw_data)
            if tensor.data_location == TensorProto.EXTERNAL:
                place = known.named.get(tensor.name)
                if place is None or place.file != contract.MODEL_DATA_FILE:
                    raise UserError("the graph's weights lie elsewhere than in the bundle", got=f"{tensor.name} in {place.file if place else 'no file'}",
                                    fix=bundle.export_hint())
            elif tensor.data_type not in _FLOATS or size <= SMALL:
                model.graph.initializer.append(tensor)
                continue
            else:
                place = known.find(tensor)
            if place is None:
                yield Weight(tensor.name, tuple(tensor.dims), tensor.data_type, size, _given(tensor.raw_data))
            else:
                location = f"../../{place.file or contract.MODEL_FILE}"
                model.graph.initializer.append(external_tensor(tensor.name, tuple(tensor.dims), tensor.data_type, location, place.offset, place.size))


def _given(raw: bytes) -> Callable[[], memoryview]:
    return lambda: memoryview(raw)


class _Known:
    """The weights of the bundle's graph, where they are and what they hold."""

    def __init__(self, bundle: Bundle, stack: ExitStack) -> None:
        self.named = {p.name: p for p in places(bundle.model)}
        self.sized: dict[int, list[Place]] = {}
        self.files: dict[str, mmap.mmap] = {}
        for place in self.named.values():
            self.sized.setdefault(place.size, []).append(place)
            if place.file not in self.files:
                stream = stack.enter_context(open_plain(bundle.file(place.file or contract.MODEL_FILE)))
                self.files[place.file] = stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))

    def find(self, tensor: TensorProto) -> Place | None:
        """The weight whose bytes are the tensor's, of whatever type, if there is one: the one of its name before others."""
        raw = tensor.raw_data
        for place in sorted(self.sized.get(len(raw), []), key=lambda p: p.name != tensor.name):
            file, at = self.files[place.file], place.offset
            if file[at : at + _FIRST] == raw[:_FIRST] and file[at : at + place.size] == raw:
                return place
        return None


def _table(path: Path, folder: str) -> Iterator[ort_prepared.Weight]:
    """Every external initializer of the written graph, by the names of the bundle's files."""
    for place in places(path):
        if place.file:
            file = place.file.removeprefix("../../") if place.file.startswith("../../") else f"{folder}/{place.file}"
            yield ort_prepared.Weight(place.name, file, place.offset, place.size, place.kind, place.dims)
