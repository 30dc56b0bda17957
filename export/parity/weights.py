"""Does a bundle's graph hold the checkpoint's weights? Every tensor, bit for bit, whatever the exporter named or transposed it.

This catches what numbers may miss (one element of an embedding row that no case reads), and it names the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from sessa_deploy.checkpoint import read_state
from sessa_deploy.checkpoint_save import cast
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import PRECISIONS
from sessa_deploy.errors import ParityError
from sessa_deploy.export.graph.passes import TRANSPOSED

_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


@dataclass(frozen=True)
class WeightCheck:
    """Tensors compared, and one line for each that the graph does not hold: (name, what is there instead)."""

    tensors: int
    missing: tuple[tuple[str, str], ...]


def check_weights(model: Path, checkpoint: str | Path, precision: str, config: SessaConfig, given: SessaConfig | None = None) -> WeightCheck:
    """Look for every tensor of the checkpoint, cast to `precision`, among the float constants of an ONNX file.

    config: the bundle's; given: the checkpoint's, where it has none of its own.
    A tensor must equal the constant of its own name (transposed, where the name says so); without one, any of equal or transposed bytes will do.
    Raises UserError like checkpoint.read_state, ParityError if the checkpoint's shape is not the bundle's.
    """
    own, state = read_state(checkpoint, given)
    require_same_shape(config, own, checkpoint)
    storage = getattr(torch, PRECISIONS[precision].torch)
    seen: set[bytes] = set()
    names: dict[str, tuple[int, ...]] = {}
    named: dict[str, bytes] = {}
    for name, x in _constants(model):
        names[name], named[name] = x.shape, _digest(x)
        seen |= {_digest(form) for form in _forms(x)}
    missing = []
    for name, tensor in state.items():
        x = _array(cast(name, tensor, storage))
        if name in named:
            held = named[name] == _digest(x)
        elif name + TRANSPOSED in named:
            held = named[name + TRANSPOSED] == _digest(x.T)
        else:
            held = _digest(x) in seen
        if not held:
            missing.append((name, _closest(model, name, x, names)))
    return WeightCheck(len(state), tuple(missing))


def require_same_shape(bundle: SessaConfig, checkpoint: SessaConfig, path: str | Path) -> None:
    """Raise ParityError unless two configurations fix the same arithmetic."""
    free = {"max_context", "bos_token_id", "eos_token_id", "pad_token_id"}
    mine, theirs = bundle.to_dict(), checkpoint.to_dict()
    differ = [f"{key} {theirs[key]} (the bundle: {mine[key]})" for key in mine if key not in free and mine[key] != theirs[key]]
    if differ:
        raise ParityError(f"configuration: {Path(path).name} is not the checkpoint of this bundle: it has {', '.join(differ)}")


def _constants(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, bits as unsigned integers) of every float tensor in an ONNX file, one at a time."""
    proto = onnx.load(str(model), load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_type in _FLOATS:
            yield tensor.name, _bits(numpy_helper.to_array(tensor, base_dir=str(model.parent)))
    for node in proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type in _FLOATS:
                    yield node.output[0], _bits(numpy_helper.to_array(attribute.t, base_dir=str(model.parent)))


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu().contiguous()
    return _bits(x.view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.numpy())


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(x.shape).view(f"u{x.dtype.itemsize}")


def _forms(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return (x, x.T) if x.ndim == 2 and 1 not in x.shape else (x,)


def _digest(x: np.ndarray) -> bytes:
    """Identifies bytes and element width; the shape is left out, because an exporter may add or drop axes of length 1."""
    return hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16, person=str(x.dtype.itemsize).encode()).digest()


def _closest(model: Path, name: str, x: np.ndarray, names: dict[str, tuple[int, ...]]) -> str:
    """Says what the graph holds in place of a tensor: the constant of its name, or the one that differs in the fewest elements."""
    alike = {n for n, shape in names.items() if sorted(s for s in shape if s != 1) == sorted(s for s in x.shape if s != 1)}
    if not alike:
        return "no constant of its shape in the graph"
    best, best_name = x.size + 1, ""
    for other, y in _constants(model):
        if other in alike and y.dtype == x.dtype:
            for form in _forms(y):
                differ = int(np.count_nonzero(form.reshape(-1) != x.reshape(-1))) if form.size == x.size else x.size
                if differ < best or (differ == best and other.endswith(name)):
                    best, best_name = differ, other
    return f"{best} of {x.size} elements differ from the nearest constant, {best_name}" if best_name else "no constant of its shape and type in the graph"
