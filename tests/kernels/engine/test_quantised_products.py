"""Products whose weights are 8 bits with a scale for each column: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule import check
from torch import Tensor

pytest.importorskip("triton")

from rows_cases import case as rows_case
from rows_cases import first as rows_first
from rows_cases import mixed as rows_mixed
from test_layer_kernels import DEVICE, random
from test_layer_kernels import pytestmark as pytestmark
from test_mixer import case, truth
from test_mixer_rows import SMALL

from sessa_deploy.contract import WEIGHT_FORMATS
from sessa_deploy.kernels.engine import layer, mixer, mixer_rows
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.spec import QUANTISED

HALF, BFLOAT = torch.float16, torch.bfloat16
Product = Callable[..., Tensor]


def quantised(columns: int, depth: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(8-bit weights (columns, depth), their scales, the weights as they are in float64): a column of zeros, one a thousand times the others, one negated."""
    weight = random(columns, depth, dtype=torch.float32, scale=0.3, seed=seed)
    weight[0], weight[1], weight[2] = 0.0, 1e3 * weight[1], weight[2].abs().neg()
    form = WEIGHT_FORMATS[kind]
    scale = weight.abs().amax(1) / form.largest
    steps = (weight / scale.clamp_min(1e-30)[:, None]).clamp(-form.largest, form.largest)
    values = (steps.round() if kind == "int8" else steps).to(getattr(torch, form.torch))
    return values, scale, values.double() * scale.double()[:, None]


def both(compute: Callable[[torch.dtype], Tensor], storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a function of the type that is computed in gives in float64, and in float32 rounded once."""
    return compute(torch.float64), compute(torch.float32).to(storage)


@pytest.mark.parametrize(("rows", "kind", "dtype"), [(1, "int8", HALF), (1, "fp8", BFLOAT), (5, "int8", BFLOAT), (5, "fp8", HALF), (40, "int8", HALF),
                                                     (40, "fp8", BFLOAT), (100, "int8", BFLOAT), (100, "fp8", HALF)])  # fmt: skip
def test_products(rows: int, kind: str, dtype: torch.dtype) -> None:
    """The 2x rule against float64 with the weights as they are; columns and depth that fill no tile."""
    columns, depth = 80, 2064 if rows == 1 else 336
    w, scale, exact = quantised(columns, depth, kind)
    x, bias = random(rows, depth, dtype=dtype), random(columns, dtype=dtype)
    check(layer.linear(x, w, bias, scale=scale), *both(lambda t: x.to(t) @ exact.to(t).T + bias.to(t), dtype), scale=1.0)
    logits = layer.linear(x, w, None, scale=scale)
    assert logits.dtype == torch.float32 and not logits[:, 0].any()
    check(logits[:, 2:], *both(lambda t: x.to(t) @ exact.to(t).T[:, 2:], torch.float32), scale=float(depth) ** 0.5)


@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_every_byte_is_read_as_what_it_is(rows: int, kind: str) -> None:
    """All 256, but the two of fp8 that are no numbers: -128, which no symmetric rounding makes, subnormals and both zeros too; bit for bit in float32."""
    depth = 256
    w = torch.arange(depth, dtype=torch.int16).to(torch.uint8).roll(3).view(getattr(torch, WEIGHT_FORMATS[kind].torch)).repeat(16, 1).to(DEVICE)
    values = w.float().nan_to_num(0.0)
    w = torch.where(w.view(torch.uint8) & 0x7F == 0x7F, torch.zeros_like(w.view(torch.uint8)), w.view(torch.uint8)).view(w.dtype) if kind == "fp8" else w
    scale = torch.arange(16, dtype=torch.float32, device=DEVICE) * 0.37
    for dtype, first in ((HALF, 0), (BFLOAT, 40)):
        x = torch.eye(depth, dtype=dtype, device=DEVICE).roll(first, 0)[:rows]
        assert torch.equal(layer.linear(x, w, None, scale=scale), values.T.roll(first, 0)[:rows] * scale)
    assert kind == "fp8" or float(values.min()) == -128


def tail(rows: int, d: int, w: Any, scale: Any, dtype: torch.dtype) -> tuple[Product, Product]:
    s, h, x, bias = random(rows, d, dtype=dtype), random(rows, 2 * d, dtype=dtype), random(rows, d, dtype=dtype, seed=3), random(d, dtype=dtype)
    gated = (s.double() * h[:, d:].double()).to(dtype)
    return lambda: layer.tail(s, h, w, bias, x, scale=scale), lambda t, w: x.to(t) + gated.to(t) @ w.T + bias.to(t)


def out_add(rows: int, d: int, w: Any, scale: Any, dtype: torch.dtype) -> tuple[Product, Product]:
    x, bias, add = random(rows, d, dtype=dtype), random(d, dtype=dtype), random(rows, d, dtype=torch.float32, seed=3)
    return lambda: layer.out_add(x, w, bias, add, scale=scale), lambda t, w: (x.to(t) @ w.T + bias.to(t)).to(dtype).to(t) + add.to(t)


def norm_enter(rows: int, d: int, w: Any, scale: Any, dtype: torch.dtype) -> tuple[Product, Product]:
    x, gain, shift, bias = random(rows, d, dtype=dtype), random(d, dtype=dtype, seed=1), random(d, dtype=dtype, seed=2), random(2 * d, dtype=dtype)
    normal = layer.norm(x, gain, shift, 1e-5)

    def reference(t: torch.dtype, w: Tensor) -> Tensor:
        y = normal.to(t) @ w.T + bias.to(t)
        return torch.cat([torch.nn.functional.gelu(y[:, :d].to(dtype).to(t)), y[:, d:]], -1)

    return lambda: layer.norm_enter(x, gain, shift, 1e-5, w, bias, scale=scale), reference


def project(rows: int, d: int, w: Any, scale: Any, dtype: torch.dtype) -> tuple[Product, Product]:
    h = random(rows, 2 * d, dtype=dtype)
    biases: Any = tuple(random(n, dtype=dtype, seed=i) for i, n in enumerate((d, d // 2, d // 2, 2 * d)))
    cos, sin = torch.ones(rows, 8, device=DEVICE), torch.zeros(rows, 8, device=DEVICE)
    gain, one = random(d, dtype=torch.float32), torch.zeros(1, device=DEVICE)
    return (lambda: torch.cat(layer.project_gain(h, w, biases, cos, sin, gain, one, 0.9, scale=scale)[:-1], -1),
            lambda t, w: h[:, :d].to(t) @ w.T + torch.cat(biases).to(t))  # fmt: skip


@pytest.mark.parametrize(("operation", "factor"), [(tail, 1), (out_add, 1), (norm_enter, 2), (project, 4)], ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize(("rows", "kind", "dtype"), [(1, "fp8", HALF), (40, "int8", HALF), (70, "fp8", BFLOAT)])
def test_operations(operation: Any, factor: int, rows: int, kind: str, dtype: torch.dtype) -> None:
    """Each finds its columns' own scales: those of the joined projections, those on either side of the entrance's middle."""
    d = 48
    w, scale, exact = quantised(factor * d, d, kind, seed=5)
    found, reference = operation(rows, d, w, scale, dtype)
    exactly, plain = both(lambda t: reference(t, exact.to(t)), dtype)
    check(found(), exactly, plain)


@pytest.mark.parametrize("operation", [tail, out_add, norm_enter, project], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    ("d", "tile", "kind", "dtype"),
    [(80, (16, 128), "int8", HALF), (80, (16, 128), "fp8", BFLOAT), (144, (64, 256), "fp8", HALF), (144, (16, 256), "int8", HALF),
     (144, (64, 256), "int8", BFLOAT)],
)  # fmt: skip
def test_a_row_by_matrix_instructions(
    operation: Any, d: int, tile: tuple[int, int], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few weights, which are widened before the wait, and more; with a warp's sums in one part of the depth and in two."""
    pinned = layer.pinned

    def other(names: tuple[str, ...], *rest: Any) -> Any:
        changed, more = dict(zip(("BN", "BK", "KS", "num_warps"), (*tile, 2, 2), strict=True)), {"AHEAD": 1}
        return {name: o if name == "layer_norm" else {**o, **changed, **(more if "AHEAD" in o else {})} for name, o in pinned(names, *rest).items()}

    factor = {"norm_enter": 2, "project": 4}.get(operation.__name__, 1)
    w, scale, exact = quantised(factor * d, d, kind, seed=5)
    found, reference = operation(1, d, w, scale, dtype)
    monkeypatch.setattr(layer, "pinned", other)
    exactly, plain = both(lambda t: reference(t, exact.to(t)), dtype)
    check(found(), exactly, plain)


@pytest.mark.parametrize(
    ("tile", "kind", "dtype"), [((16, 256), "fp8", BFLOAT), ((16, 512), "int8", HALF), ((8, 1024), "fp8", HALF), ((64, 512), "int8", BFLOAT)]
)
def test_every_part_of_a_rows_depth_is_added_once(tile: tuple[int, int], kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp's sums in two, four and eight parts of the depth, and of more weights in one; elements in all of them, columns and depth that fill no tile. What
    is no number in the last reaches every column."""
    pinned, (width, most), columns = layer.pinned, tile, 40

    def other(names: tuple[str, ...], *rest: Any) -> dict[str, dict[str, Any]]:
        return {name: {**options, "BN": width, "BK": most, "KS": 2, "AHEAD": 1, "num_warps": 2} for name, options in pinned(names, *rest).items()}

    monkeypatch.setattr(layer, "pinned", other)
    depth = most - 16
    w, scale, exact = quantised(columns, depth, kind, seed=9)
    x = random(1, depth, dtype=dtype)
    logits = layer.linear(x, w, None, scale=scale)
    assert not logits[:, 0].any()
    check(logits[:, 2:], *both(lambda t: x.to(t) @ exact.to(t).T[:, 2:], torch.float32), scale=float(depth) ** 0.5)
    for bad in (float("nan"), float("inf")):
        x[0, -1] = bad
        assert not torch.isfinite(layer.linear(x, w, None, scale=scale)).any()


@pytest.mark.parametrize(("kind", "tile"), [("int8", {"BN": 32, "BK": 128, "KS": 4}), ("fp8", {"BN": 16, "BK": 128, "KS": 8})])
def test_columns_as_the_long_side(kind: str, tile: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 17 to 64 rows whose warps widen columns of their own: rows have the bits that fewer of them have, whatever stands in the others; an element
    of 1e4, in a depth and columns that fill no tile, costs the others of its row nothing, and what cancels in a sum is gone from it."""
    rows, depth, columns = 40, 336, 80
    pinned = layer.pinned

    def other(names: tuple[str, ...], *rest: Any) -> dict[str, dict[str, Any]]:
        return {name: {**options, **tile, "BM": 32} for name, options in pinned(names, *rest).items()}

    monkeypatch.setattr(layer, "pinned", other)
    w, scale, _ = quantised(columns, depth, kind, seed=7)
    scale[1] /= 1e3
    pairs = torch.arange(0, depth, 2, device=DEVICE)
    w.view(torch.uint8)[9, pairs + 1] = w.view(torch.uint8)[9, pairs]
    exact = w.double() * scale.double()[:, None]
    x, bias = random(rows, depth, dtype=HALF), random(columns, dtype=HALF)
    x[3, 5], x[4, depth - 1], x[6] = 1e4, -1e4, 0.0
    x[7, 1::2] = -x[7, ::2]
    found = layer.linear(x, w, bias, scale=scale)
    for i in range(rows):  # each by its own size
        check(found[i], *both(lambda t, i=i: x[i].to(t) @ exact.to(t).T + bias.to(t), HALF))  # type: ignore[misc]
    assert torch.equal(found[6], bias) and torch.equal(found[7, 9], bias[9])
    assert torch.equal(layer.linear(x[:17].contiguous(), w, bias, scale=scale), found[:17])
    bad = x.clone()
    bad[11], bad[12, 0] = float("nan"), float("inf")
    again = layer.linear(bad, w, bias, scale=scale)
    assert torch.isnan(again[11]).all() and torch.equal(again[:11], found[:11]) and torch.equal(again[13:], found[13:])


def test_a_row_whose_mean_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm that takes both sums at once: rows far from zero, and with an element far from all others first or last, keep to the 2x rule; NaN and Inf
    reach every column."""
    d = 48
    pinned = layer.pinned
    changed = {"BN": 32, "BK": 128, "KS": 2, "num_warps": 2}
    monkeypatch.setattr(layer, "pinned", lambda names, *rest: {n: o if n == "layer_norm" else {**o, **changed} for n, o in pinned(names, *rest).items()})
    w, scale, exact = quantised(2 * d, d, "int8", seed=5)
    gain, shift, bias = random(d, dtype=HALF, seed=1), random(d, dtype=HALF, seed=2), random(2 * d, dtype=HALF)
    off = random(1, d, dtype=HALF) + 300.0
    spike, last = random(1, d, dtype=HALF), random(1, d, dtype=HALF)
    spike[0, 0], last[0, -1] = 3e4, -3e4
    for x in (off, spike, last, torch.full_like(off, 7.0)):

        def reference(t: torch.dtype, x: Tensor = x) -> Tensor:
            normal = torch.nn.functional.layer_norm(x.to(t), (d,), gain.to(t), shift.to(t), 1e-5).to(HALF).to(t)
            y = normal @ exact.to(t).T + bias.to(t)
            return torch.cat([torch.nn.functional.gelu(y[:, :d].to(HALF).to(t)), y[:, d:]], -1)

        check(layer.norm_enter(x, gain, shift, 1e-5, w, bias, scale=scale), *both(reference, HALF))
    for bad in (float("nan"), float("inf")):
        spike[0, 5] = bad
        assert torch.isnan(layer.norm_enter(spike, gain, shift, 1e-5, w, bias, scale=scale)).all()


def test_a_mixers_step() -> None:
    a = case(2, 2, 24, 24, [24, 7])
    w, scale, exact = quantised(48, 48, "int8")
    scale[1] /= 1e3
    exact[1] /= 1e3
    wanted = truth({**a, "weight": exact})
    s = mixer.step(**{**a, "weight": w}, scale=scale)
    assert float((s.double() - wanted).abs().max()) <= 4e-3 * float(wanted.abs().max())


@pytest.mark.parametrize(("kind", "dtype"), [("int8", BFLOAT), ("fp8", HALF)])
def test_a_mixers_step_of_several_rows(kind: str, dtype: torch.dtype) -> None:
    """The 2x rule against float64 with the weights as they are, and bits that do not depend on the rows behind."""
    a = rows_case(3, 3, 16, 24, [24, 7], 5, DEVICE, dtype=dtype)
    w, scale, exact = quantised(48, 48, kind)
    scale[1] /= 1e3
    exact[1] /= 1e3
    s = mixer_rows.step(**{**a, "weight": w}, scale=scale, tiles=SMALL)
    check(s, *(rows_mixed({**a, "weight": exact}, work) for work in (torch.float64, torch.float32)))
    assert torch.equal(mixer_rows.step(**{**rows_first(a, 3), "weight": w}, scale=scale, tiles=SMALL), s[:, :3])


def test_a_rows_matrix_instructions_have_what_they_ask_for() -> None:
    """One row with KS > 1: of 8-bit weights a warp for each of the sums, and the deepest row of the variant at once; of 16 bits KS columns a warp."""
    entries = [(key, entry) for key, entry in table._entries().items() if key[0].startswith("layer_") and entry.get("KS", 1) > 1]
    found = 0
    for (name, _, dtype, variant), entry in entries:
        if entry.get("BM", 1) > 1 or name == "layer_norm_enter_rows":
            continue
        if not dtype.endswith(tuple(QUANTISED)):
            assert entry["BN"] == entry["KS"] * entry["num_warps"] and entry["AHEAD"] == 1
            continue
        found += 1
        most = int(variant.removeprefix("1.")) if name != "layer_norm_enter" else int(variant)
        assert entry["KS"] == entry["num_warps"] and entry["BK"] >= 64 * entry["KS"] and entry["BN"] >= 8
        assert entry["BK"] >= most and entry.get("AHEAD", 1) == 1
    assert found
