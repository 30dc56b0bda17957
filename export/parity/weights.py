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
from sessa_deploy.contract import PRECISIONS, WEIGHT_FORMATS, Weights
from sessa_deploy.errors import ParityError
from sessa_deploy.export.graph.passes import TRANSPOSED
from sessa_deploy.export.graph.quantise import quantise, quantised, store_names

_KINDS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE, *(f.onnx for f in WEIGHT_FORMATS.values())}

_UNKNOWN_TO_NUMPY = (torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class WeightCheck:
    """Tensors compared, and one line for each that the graph does not hold: (name, what is there instead)."""

    tensors: int
    missing: tuple[tuple[str, str], ...]


def check_weights(
    model: Path, checkpoint: str | Path, precision: str, config: SessaConfig, given: SessaConfig | None = None, weights: Weights | None = None
) -> WeightCheck:
    """Look for every tensor of the checkpoint, cast to `precision`, among the float constants of an ONNX file.

    config: the bundle's; given: the checkpoint's, where it has none of its own; weights: the bundle's, where it stores some in 8 bits, whose values and
    scales must be those that the checkpoint's tensor gives.
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
    missing, eight = [], set(quantised(config, weights))
    for name, tensor in state.items():
        if weights is not None and name in eight:
            want = [_array(x) for x in quantise(tensor, weights.format)]
            parts = store_names(name)
            if any(named.get(part) != _digest(x) for part, x in zip(parts, want, strict=True)):
                found = {part: x for part, x in _constants(model) if part in parts}
                missing.append((name, quantised_fault(found.get(parts[0]), found.get(parts[1]), want[0], want[1], weights.format)))
            continue
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
    """(name, bits as unsigned integers) of every tensor of weights in an ONNX file, one at a time."""
    proto = onnx.load(str(model), load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.data_type in _KINDS:
            yield tensor.name, _bits(numpy_helper.to_array(tensor, base_dir=str(model.parent)))
    for node in proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.data_type in _KINDS:
                    yield node.output[0], _bits(numpy_helper.to_array(attribute.t, base_dir=str(model.parent)))


def quantised_fault(
    q: np.ndarray | None, scale: np.ndarray | None, want_q: np.ndarray, want_scale: np.ndarray, form: str
) -> str:
    """What is wrong with a matrix in 8 bits, and in which output channel. q, want_q (out, in), scale, want_scale (out,): bits; None: not in the graph."""
    if q is None or scale is None or q.shape != want_q.shape or scale.shape != want_scale.shape:
        return f"no values {want_q.shape} in {form} with a scale for each output channel in the graph"
    rows, scales = np.flatnonzero((q != want_q).any(axis=1)), np.flatnonzero(scale != want_scale)
    if len(rows):
        r = int(rows[0])
        from_where = [s for s in rows if (q[r] == want_q[s]).all()]
        values, wanted = (_values(x[r], form) for x in (q, want_q))
        wrong = np.flatnonzero(q[r] != want_q[r])
        others = f" ({len(rows)} channels differ)" if len(rows) > 1 else ""
        if from_where:
            return f"channel {r} holds the values of channel {from_where[0]}: rows are swapped{others}"
        if (values == -wanted).all():
            return f"channel {r} has the opposite sign{others}"
        c = int(wrong[0])
        what = "the opposite sign" if values[c] == -wanted[c] else f"{values[c]:g}, and should be {wanted[c]:g}"
        return f"channel {r}, input {c} is {what} ({len(wrong)} of {q.shape[1]} inputs differ){others}"
    held, wanted = scale.view(np.float32), want_scale.view(np.float32)
    c = int(scales[0])
    for shift, way in ((1, "before"), (-1, "behind")):
        if len(scales) > 1 and (scale[scales] == np.roll(want_scale, shift)[scales]).all():
            return f"the scales are off by one channel: channel {c} has that of the one {way} it ({len(scales)} channels differ)"
    return f"the scale of channel {c} is {held[c]:.6g}, and should be {wanted[c]:.6g} ({len(scales)} of {len(scale)} channels differ)"


def _values(bits: np.ndarray, form: str) -> np.ndarray:
    """The numbers that 8 bits stand for."""
    return torch.from_numpy(np.array(bits)).view(getattr(torch, WEIGHT_FORMATS[form].torch)).float().numpy()


def _array(x: Tensor) -> np.ndarray:
    x = x.detach().cpu().contiguous()
    return _bits(x.view({1: torch.uint8, 2: torch.int16}[x.itemsize]).numpy() if x.dtype in _UNKNOWN_TO_NUMPY else x.numpy())


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
