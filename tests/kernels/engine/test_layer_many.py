"""The layer's products by tensor descriptors: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1). Here they begin at far fewer rows than in use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_layer_kernels import DEVICE, DTYPES, random
from test_layer_kernels import pytestmark as pytestmark
from test_layer_kernels import test_entrance as entrance
from test_layer_kernels import test_products as products
from test_layer_kernels import test_projections as projections
from test_layer_kernels import test_tail as tail
from test_quantised_products import quantised

from sessa_deploy.kernels.engine import layer, layer_many, spec
from sessa_deploy.kernels.launch import jit

FEW = 64
ROWS = [(70, 80), (270, 272), (129, 16)] if DEVICE == "cpu" else [(70, 80), (300, 1040), (129, 16), (2049, 1024), (8192, 2048)]  # rows, depth


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels by descriptors that ran."""
    if DEVICE == "cuda" and not jit.available("layer_linear_many", torch.device("cuda", 0), torch.float16, "any"):
        pytest.skip("no tiles for this GPU")
    names: list[str] = []
    run = layer_many.run

    def noted(name: str, *of: Any) -> None:
        names.append(name)
        run(name, *of)

    monkeypatch.setattr(spec, "MANY_ROWS", FEW)
    monkeypatch.setattr(layer_many, "run", noted)
    return names


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), ROWS)
@pytest.mark.parametrize(("check", "kernel"), [(products, "layer_linear_many"), (tail, "layer_tail_many"), (entrance, "layer_enter_many")])
def test_products(
    check: Callable[..., None], kernel: str, rows: int, depth: int, dtype: torch.dtype, small: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of the others: sizes that fill no tile, more tiles than programs, one step of depth; small tiles and large."""
    monkeypatch.setattr(spec, "MANY_WORK", 1 << 40 if small else 0)
    check(rows, depth, dtype)
    assert launched == [kernel]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads"), [(70, (4, 2, 16)), (129, (3, 1, 64)), (270, (2, 2, 24))])
def test_projections(rows: int, heads: tuple[int, int, int], dtype: torch.dtype, launched: list[str]) -> None:
    projections(rows, heads, dtype)
    assert launched == ["layer_project_gain_many"] * 2


@pytest.mark.parametrize("programs", [1, 3])
def test_rows_keep_their_bits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's result depends on no other row, NaN and Inf included, nor on how many there are or how many programs share the tiles."""
    monkeypatch.setattr(spec, "MANY_WORK", 0)
    depth, dtype = 144, DTYPES[0]
    x, h, w = random(200, depth, dtype=dtype), random(200, 2 * depth, dtype=dtype), random(5 * depth, depth, dtype=dtype, scale=0.3)
    bias = random(5 * depth, dtype=dtype)
    angles, gain, one = random(200, 8, dtype=torch.float32), random(depth, dtype=torch.float32), torch.zeros(1, device=DEVICE)

    def outputs(rows: int) -> list[torch.Tensor]:
        a, b = x[:rows].contiguous(), h[:rows].contiguous()
        biases = tuple(bias[:n] for n in (depth, depth, depth, 2 * depth))
        turned = layer.project_gain(b, w, biases, angles[:rows].contiguous(), angles[:rows].contiguous(), gain, one, 0.9)  # type: ignore[arg-type]
        return [layer.linear(a, w, bias), layer.enter(a, w[: 2 * depth], bias), layer.tail(a, b, w[:depth], bias, a), *turned]

    whole = outputs(200)
    monkeypatch.setattr(layer_many, "MANY_PROGRAMS", programs)
    bad = torch.arange(200, device=DEVICE) % 7 == 3
    x[bad], h[bad] = torch.nan, torch.inf
    for found, wanted in zip(outputs(131), whole, strict=True):
        assert torch.equal(found[~bad[:131]], wanted[:131][~bad[:131]])


def test_weights_of_8_bits_are_widened_first(launched: list[str]) -> None:
    rows, depth, dtype = 80, 96, DTYPES[0]
    w, scale, exact = quantised(depth, depth, "int8")
    x, bias = random(rows, depth, dtype=dtype), random(depth, dtype=dtype)
    found, wanted = layer.linear(x, w, bias, scale=scale), x.double() @ exact.T + bias.double()
    assert launched == ["layer_linear_many"]
    assert float(((found.double() - wanted).abs() / wanted.abs().amax(0).clamp_min(1.0)).max()) < 2e-3


def test_where_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many rows, of weights of 16 bits, where a kernel and the architecture's tiles are there, and rows of the result begin at 16 bytes."""
    monkeypatch.undo()
    most = spec.MANY_ROWS
    assert not spec.many_kernel("layer_linear", most + 1, 104, "") and spec.many_kernel("layer_linear", most + 1, 112, "")
    assert [spec.many_variant("layer_tail_many", n, 1024) for n in (2048, 3072)] == ["small", "any"]
    assert spec.many_variant("layer_enter_many", 1, 16) == "any"
    assert spec.many_kernel("layer_tail", most + 1, 64, "") == "layer_tail_many" and not spec.many_kernel("layer_tail", most, 64, "")
    assert not spec.many_kernel("layer_tail", most + 1, 64, ".i8") and not spec.many_kernel("layer_out", most + 1, 64, "")
