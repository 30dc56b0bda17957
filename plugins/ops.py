"""Every operation of the plugin library as data: operands, attributes, limits. C++ reads it as ops.inc and limits.h, written by

    python -m sessa_deploy.plugins.ops --out DIR

which CMake runs. README.md has the mathematics. Standard library only.
"""

from __future__ import annotations

import argparse
import math
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sessa_deploy import contract, cuda_arch
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import limits

STATE_VERSION = contract.PLUGIN_STATE
MAX_INT = (1 << 63) - 1
MAX_FLOAT = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]

# Letter of a dimension -> what stands for it in a formula, its field in C++, what it is where an operation has none of it.
SIZES: dict[str, tuple[str, str, int]] = {
    "B": ("B", "batch", 1), "T": ("T", "tokens", 1), "P": ("P", "capacity", 0), "D": ("D", "width", 1), "H": ("Hq", "heads", 1), "K": ("Hkv", "kvHeads", 1),
    "C": ("d", "headWidth", 1), "N": ("N", "columns", 1), "E": ("E", "doubleWidth", 2), "J": ("J", "pairs", 1), "I": ("I", "one", 1),
    "R": ("R", "limbs", limits.ROTARY_LIMBS),
}  # fmt: skip
KINDS = {"": "storage", ":f": "float32", ":i": "int32"}


@dataclass(frozen=True)
class Operand:
    """A tensor: one letter of SIZES a dimension, a small one half of that size; kind: "storage", "float32" or "int32"."""

    name: str
    shape: str
    kind: str


@dataclass(frozen=True)
class Attribute:
    """A float attribute: above < value <= most, or exactly `absent`, which it is where a node does not give it."""

    name: str
    absent: float
    most: float
    allowed: str
    above: float = 0.0

    @property
    def field(self) -> str:
        head, *rest = self.name.split("_")
        return head + "".join(word.capitalize() for word in rest)

    def takes(self, value: float) -> bool:
        """Whether the plugin takes the value, rounded to float32 as a node holds it."""
        if not math.isfinite(value) or abs(value) > MAX_FLOAT:
            return False
        single = struct.unpack("<f", struct.pack("<f", value))[0]
        return single == self.absent or self.above < single <= self.most


@dataclass(frozen=True)
class Limit:
    """`of` and the other formulas are sums of products of letters and a leading number, e.g. "3D+2KC". With `equals`, `of` must be that; else
    least <= of <= most and a multiple of `multiple`."""

    what: str
    of: str
    least: int = 1
    most: int = MAX_INT
    multiple: str = "1"
    equals: str = ""

    @property
    def allowed(self) -> str:
        """In words; behind `equals` of other sizes the number is still to be put."""
        if self.equals:
            return pretty(self.equals)
        if self.multiple != "1":
            return f"a multiple of {pretty(self.multiple)} up to {self.most}"
        return f"at least {self.least}" if self.most == MAX_INT else f"{self.least} to {self.most}"

    @property
    def letters(self) -> set[str]:
        return set(re.findall("[A-Z]", f"{self.of} {self.multiple} {self.equals}"))

    def refusal(self, sizes: Mapping[str, int]) -> str | None:
        """Why these sizes are not taken, in the words of the plugin; None if they are."""
        got = evaluate(self.of, sizes)
        if self.equals:
            wanted = evaluate(self.equals, sizes)
            number = "" if self.equals.isdigit() else f" = {wanted}"
            return None if got == wanted else f"{self.what}: got {got}; allowed: {self.allowed}{number}"
        multiple = evaluate(self.multiple, sizes)
        good = self.least <= got <= self.most and multiple >= 1 and got % multiple == 0
        return None if good else f"{self.what}: got {got}; allowed: {self.allowed}"


@dataclass(frozen=True)
class Op:
    """An operation of the library; input 0 settles the storage type."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: tuple[Attribute, ...]
    limits: tuple[Limit, ...]

    @property
    def identifier(self) -> str:
        """What stands for it in C++: "Feedback" for SessaFeedbackAttention."""
        return self.name.removeprefix("Sessa").removesuffix("Attention")

    @property
    def attribute_names(self) -> tuple[str, ...]:
        names = (*(a.name for a in self.attributes), contract.ATTR_STORAGE)
        return names if self.quantised is None else (*names, contract.ATTR_WEIGHTS)

    @property
    def quantised(self) -> Op | None:
        """The form that an op with a matrix of weights (N,D) has where attribute `weights` is not 0; None for the others.

        The matrix is bytes, two to an element of the storage type: (N,D / 2). Behind all other operands come its scales (N,), float32.
        """
        at = next((i for i, x in enumerate(self.inputs) if x.name == contract.WEIGHT and len(x.shape) == 2 and x.shape.isupper()), None)
        if at is None:
            return None
        shape = self.inputs[at].shape
        rows, packed = shape[0], Operand(contract.WEIGHT, shape[0] + shape[1].lower(), "storage")
        scales = Operand(contract.WEIGHT_SCALE, rows, "float32")
        return replace(self, inputs=(*self.inputs[:at], packed, *self.inputs[at + 1 :], scales))

    def form(self, weights: int = 0) -> Op:
        """What a node with this value of attribute `weights` is: the op itself, or `quantised`. Raises UserError where the op has no such form."""
        if weights not in self._weights:
            allowed = ", ".join(map(str, self._weights))
            raise UserError(f"attribute {contract.ATTR_WEIGHTS} of {self.name} is out of range", got=str(weights), allowed=allowed)
        return self.quantised if weights and self.quantised is not None else self

    @property
    def _weights(self) -> tuple[int, ...]:
        return (0, *(f.onnx for f in contract.WEIGHT_FORMATS.values())) if self.quantised is not None else (0,)

    def refusal(self, sizes: Mapping[str, int]) -> str | None:
        """The first limit that these sizes (letter -> size) break, as one line; None if there is none. A limit on a size that is not given is not judged."""
        judged = (limit.refusal(sizes) for limit in self.limits if limit.letters <= set(sizes))
        return next((r for r in judged if r is not None), None)

    def node_attributes(self, storage: int, weights: int = 0, **numbers: float) -> dict[str, float | int]:
        """The attributes of a node. storage, weights: ONNX type numbers, the latter of `form`.

        Raises UserError on a value out of range, TypeError on a name that is none of this op's.
        """
        self.form(weights)
        known = {a.name: a for a in self.attributes}
        for name, value in numbers.items():
            if name not in known:
                raise TypeError(f"{self.name} has no attribute {name}; it has {', '.join(self.attribute_names)}")
            if not known[name].takes(value):
                raise UserError(f"attribute {name} of {self.name} is out of range", got=f"{value:g}", allowed=known[name].allowed)
        return {**numbers, contract.ATTR_STORAGE: storage, **({contract.ATTR_WEIGHTS: weights} if weights else {})}


def pretty(formula: str) -> str:
    """A formula as people write it: "3D+2KC" is "3 D + 2 Hkv d"."""
    return " + ".join(" ".join(SIZES[x][0] if x in SIZES else x for x in re.findall(r"\d+|[A-Z]", term)) for term in formula.split("+"))


def evaluate(formula: str, sizes: Mapping[str, int]) -> int:
    """The value of a formula."""
    return sum(math.prod(int(x) if x.isdigit() else sizes[x] for x in re.findall(r"\d+|[A-Z]", term)) for term in formula.split("+"))


def _operands(names: Sequence[str], shapes: str) -> tuple[Operand, ...]:
    found = []
    for name, text in zip(names, shapes.split(), strict=True):
        shape, colon, kind = text.partition(":")
        found.append(Operand(name, shape, KINDS[colon + kind]))
    return tuple(found)


def _op(name: str, inputs: str | Sequence[str], shapes: str, outputs: str | Sequence[str], results: str, limits: Sequence[Limit] = (),
        attributes: Sequence[Attribute] = ()) -> Op:  # fmt: skip
    names, given = (x.split() if isinstance(x, str) else x for x in (inputs, outputs))
    return Op(name, _operands(names, shapes), _operands(given, results), tuple(attributes), (*_COMMON, *limits))


SCALE = Attribute(contract.ATTR_SCALE, 0.0, MAX_FLOAT, "a finite number above 0, or 0 for the width's -1/2 power")
EPSILON = Attribute("epsilon", struct.unpack("<f", struct.pack("<f", 1e-5))[0], MAX_FLOAT, "a finite number above 0")
GAMMA_MAX = Attribute("gamma_max", struct.unpack("<f", struct.pack("<f", 0.999))[0], 1.0, "a number above 0, up to 1")
ATTRIBUTES = (SCALE, EPSILON, GAMMA_MAX)

_COMMON = (Limit("batch B", "B", 1, limits.MAX_GRID), Limit("new rows T", "T", 1, limits.MAX_ROWS), Limit("rows of past P", "P", 0, limits.MAX_ROWS))
_MULTIPLE = str(contract.WIDTH_MULTIPLE)
_ROW = Limit("width D", "D", contract.WIDTH_MULTIPLE, contract.MAX_WIDTH, _MULTIPLE)  # a program holds a row
_DEPTH = Limit("width D", "D", contract.WIDTH_MULTIPLE, limits.LAYER_MAX_DEPTH, _MULTIPLE)
_DOUBLE = Limit("width of h", "E", equals="2D")
_HEADS = (Limit("heads Hkv", "K", 1, limits.MAX_GRID), Limit("heads Hq", "H", 1, limits.MAX_GRID, "K"))
_SPLIT = Limit("heads x head width", "HC", equals="D")


def _head(widest: int) -> Limit:
    return Limit("head width d", "C", limits.HEAD_MULTIPLE, widest, str(limits.HEAD_MULTIPLE))


_DESCRIBED = {
    op.name: op
    for op in (
        _op(contract.FEEDBACK_OP, contract.FEEDBACK_INPUTS, "BTD BTD BT:f BTD BPD BPD B:i", contract.FEEDBACK_OUTPUTS, "BTD", [_ROW], [SCALE]),
        _op(contract.CAUSAL_OP, contract.CAUSAL_INPUTS, "BTHC BTKC BTKC BPKC BPKC B:i", contract.CAUSAL_OUTPUTS, "BTHC",
            [*_HEADS, _head(limits.HEAD_MAX_WIDTH)], [SCALE]),
        _op(contract.ROTARY_OP, "x past_length limbs", "BTD B:i RJ:f", "cos sin", "BTJ:f BTJ:f",
            [Limit("rows of limbs", "R", equals=str(limits.ROTARY_LIMBS)), Limit("pairs d / 2", "J", 1, limits.ROTARY_MAX_PAIRS)]),
        _op(contract.NORM_OP, "x weight bias", "BTD D D", "y", "BTD", [_ROW], [EPSILON]),
        _op(contract.LINEAR_HEADS_OP, "x weight bias", "BTHC ND N", "y", "BTN", [_DEPTH, _SPLIT]),
        _op(contract.LOGITS_OP, "x weight", "BTD ND", "logits", "BTN:f", [_DEPTH]),
        _op(contract.TAIL_OP, "x s h weight bias", "BTD BTD BTE DD D", "y", "BTD", [_DEPTH, _DOUBLE]),
        _op(contract.NORM_ENTER_OP, "x norm_weight norm_bias weight bias", "BTD D D ED E", "h", "BTE", [_ROW, _DOUBLE], [EPSILON]),
        _op(contract.PROJECT_GAIN_OP, "h weight bias_q bias_k bias_v bias_fb cos sin gain gain_bias", "BTE ND HC KC KC E BTJ:f BTJ:f D:f I:f",
            "q k v q_b k_b gamma", "BTHC BTKC BTKC BTD BTD BT:f",
            [_DEPTH, _SPLIT, _DOUBLE, _head(limits.LAYER_MAX_DEPTH), Limit("head width d", "C", equals="2J"),
             Limit("Hkv x head width", "KC", contract.WIDTH_MULTIPLE, limits.LAYER_MAX_DEPTH, _MULTIPLE), Limit("rows of weight", "N", equals="3D+2KC"),
             Limit("elements of gain_bias", "I", equals="1")], [GAMMA_MAX]),
        _op(contract.MIXER_OP, "q k v past_k past_v weight bias q_b k_b gamma past_kb past_s past_length",
            "BTHC BTKC BTKC BPKC BPKC DD D BTD BTD BT:f BPD BPD B:i", "s", "BTD", [_ROW, _head(limits.MIXER_HEADS[-1]), _SPLIT, *_HEADS]),
        _op(contract.LAST_LOGITS_OP, "x new_length norm_weight norm_bias weight", "BTD B:i D D ND", "logits", "BN:f", [_ROW], [EPSILON]),
    )
}  # fmt: skip
OPS = tuple(_DESCRIBED[name] for name in contract.ENGINE_OPS)


def op(name: str) -> Op:
    """The description of one operation; KeyError names the known ones."""
    if name not in _DESCRIBED:
        raise KeyError(f"no operation {name!r}; known: {', '.join(_DESCRIBED)}")
    return _DESCRIBED[name]


# --- C++

_CPP_KINDS = {"storage": "kStorage", "float32": "kFloat", "int32": "kInt"}
_HEAD = "// Written by sessa_deploy.plugins.ops from its tables, for the build it lies in.\n"


def ops_inc() -> str:
    """SESSA_SIZE(letter, field, start), SESSA_ATTRIBUTE(field, absent), SESSA_OP(identifier, Op's members...) and, for the form of an operation that has one,
    SESSA_QUANTISED of the same, for the C++ preprocessor."""
    lines = [_HEAD, "#ifdef SESSA_SIZE\n", *(f"SESSA_SIZE('{k}', {field}, {start})\n" for k, (_, field, start) in SIZES.items()), "#endif\n"]
    lines += ["#ifdef SESSA_ATTRIBUTE\n", *(f"SESSA_ATTRIBUTE({a.field}, {_float(a.absent)})\n" for a in ATTRIBUTES), "#endif\n"]
    for macro, described in (("SESSA_OP", OPS), ("SESSA_QUANTISED", tuple(o.quantised for o in OPS if o.quantised is not None))):
        lines += [f"#ifdef {macro}\n", *(f"{macro}({one.identifier}, {_members(one)})\n" for one in described), "#endif\n"]
    return "".join(lines)


def _members(one: Op) -> str:
    """What Op holds in C++, but for its family."""
    operands = ["{" + ", ".join(f'{{"{x.name}", "{x.shape}", Kind::{_CPP_KINDS[x.kind]}}}' for x in part) + "}" for part in (one.inputs, one.outputs)]
    attributes = ", ".join(f'{{"{a.name}", &Numbers::{a.field}, {_float(a.above)}, {_float(a.most)}, "{a.allowed}"}}' for a in one.attributes)
    bounds = ",\n    ".join(f'{{"{x.what}", "{x.of}", {x.least}, {x.most}, "{x.multiple}", "{x.equals}", "{x.allowed}"}}' for x in one.limits)
    counts = ", ".join(map(str, (len(one.inputs), len(one.outputs), len(one.attributes), len(one.limits))))
    return f'"{one.name}", {counts},\n    {operands[0]},\n    {operands[1]},\n    {{{attributes}}},\n    {{{bounds}}}'


def limits_h() -> str:
    """Constants that the plans share with the kernels' Python side, and the positions of each operation's operands."""
    numbers = {
        "MaxInputs": max(len((o.quantised or o).inputs) for o in OPS), "MaxOutputs": max(len(o.outputs) for o in OPS),
        "MaxAttributes": max(len(o.attributes) for o in OPS),
        "MaxLimits": max(len(o.limits) for o in OPS), "StateVersion": STATE_VERSION, "OrtApi": contract.ORT_API,
        "Tegra": cuda_arch.TEGRA, "Accelerated": cuda_arch.ACCELERATED,
        "StepPrograms": limits.STEP_PROGRAMS, "StepMaxSplits": limits.STEP_MAX_SPLITS, "WideWork": limits.WIDE_WORK, "PanelBytes": limits.PANEL_BYTES,
        "WideColumns": limits.WIDE_COLUMNS, "LongWork": limits.LONG_WORK, "FewWork": limits.FEW_WORK,
        "PackPrograms": limits.PACK_PROGRAMS, "ScorePrograms": limits.SCORE_PROGRAMS, "ScoreColumns": limits.SCORE_COLUMNS,
        "PastRows": limits.PAST_ROWS, "PastWork": limits.PAST_WORK,
        "StepRows": contract.STEP_ROWS, "FewRows": contract.FEW_ROWS, "HeadMultiple": limits.HEAD_MULTIPLE, "Group": limits.GROUP, "Single": limits.SINGLE_ROWS,
        "WidthMultiple": contract.WIDTH_MULTIPLE, "ManyProduct": limits.MANY_ROWS, "ManyWork": limits.MANY_WORK,
        "ManyPrograms": limits.MANY_PROGRAMS,
        "Float8Arch": limits.FLOAT8_ARCH, "MixerBroad": limits.MIXER_BROAD, "MixerShort": limits.MIXER_SHORT,
        "MixerManyF": limits.MIXER_MANY_F, "MixerManyB": limits.MIXER_MANY_B, "MixerMostB": limits.MIXER_MOST_B,
    }  # fmt: skip
    lists = {
        "Archs": cuda_arch.ARCHS, "Rows": limits.PRODUCT_ROWS, "QuantisedRows": limits.QUANTISED_ROWS, "AheadDepths": (limits.AHEAD_DEPTH,),
        "WholeDepths": limits.WHOLE_DEPTHS,
        "HeadWidths": limits.HEAD_WIDTHS, "LayerWidths": limits.LAYER_WIDTHS,
        "MixerWidths": limits.MIXER_WIDTHS, "MixerHeads": limits.MIXER_HEADS, "RowsWidths": limits.ROWS_WIDTHS, "RowsHeads": limits.ROWS_HEADS,
        "StepWidths": limits.FEEDBACK_WIDTHS,
    }  # fmt: skip
    texts = {"PluginVersion": contract.PLUGIN_VERSION, "PluginNamespace": contract.PLUGIN_NAMESPACE, "Domain": contract.DOMAIN}
    lines = [_HEAD, "#pragma once\n\n#include <cstdint>\n\nnamespace sessa\n{\n\n"]
    lines += [f'constexpr char const* k{name} = "{text}";\n' for name, text in texts.items()]
    lines += [f"constexpr int64_t k{name} = {value};\n" for name, value in numbers.items()]
    for one in OPS:
        positions = ", ".join(_cpp_name(x.name) for x in (one.quantised or one).inputs)
        lines.append(f"namespace {one.identifier}Input\n{{\nenum : int32_t // positions of its operands\n{{\n    {positions}\n}};\n}}\n")
    lines += [f"constexpr int64_t k{name}[] = {{{', '.join(map(str, values))}}};\n" for name, values in lists.items()]
    return "".join([*lines, "\n} // namespace sessa\n"])


def _cpp_name(name: str) -> str:
    """past_k is kPastK."""
    return "k" + "".join(word.capitalize() for word in name.split("_"))


def _float(value: float) -> str:
    return f"{value!r}F" if math.isfinite(value) else "0.0F"


def write(out: Path) -> list[Path]:
    """Write ops.inc and limits.h into a folder (made if absent), each only where it changed, so that nothing is compiled for nothing."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (("ops.inc", ops_inc()), ("limits.h", limits_h())):
        path = out / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sessa_deploy.plugins.ops", description="Write the operations' tables for the plugin's C++.")
    parser.add_argument("--out", type=Path, required=True, help="folder for ops.inc and limits.h")
    for path in write(parser.parse_args(argv).out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
