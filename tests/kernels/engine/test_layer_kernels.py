"""The layer's kernels around its attentions against plain torch in float64: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from rule import EPS, check

triton = pytest.importorskip("triton")

from sessa_deploy.kernels.engine import layer  # noqa: E402
from sessa_deploy.kernels.launch.jit import interpreted  # noqa: E402
from sessa_deploy.rope import _limbs, rotate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # numpy, which interprets, has no bfloat16
ROWS = [1, 3, 33, 70] if DEVICE == "cpu" else [1, 3, 16, 33, 64, 70, 300, 2049]


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, depth: int = 1) -> None:
    """One rounding to the storage type, and float32 sums of `depth` terms."""
    scale = float(wanted.abs().max()) + 1e-30
    error = float((found.double() - wanted).abs().max()) / scale
    assert torch.isfinite(found).all() and error <= EPS[dtype] + 4 * depth**0.5 * 2.0**-23, error


DEEP = [(r, 80) for r in ROWS] + [(1, 560), (1, 1040), (33, 560)]  # rows, depth: the latter more than any tile takes at a time


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), DEEP)
def test_products(rows: int, depth: int, dtype: torch.dtype) -> None:
    columns = 112
    x, w, b = random(rows, depth, dtype=dtype), random(columns, depth, dtype=dtype), random(columns, dtype=dtype)
    close(layer.linear(x, w, b), x.double() @ w.double().T + b.double(), dtype, depth)
    logits = layer.linear(x, w, None)
    assert logits.dtype == torch.float32
    close(logits, x.double() @ w.double().T, torch.float32, depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), DEEP)
def test_tail(rows: int, depth: int, dtype: torch.dtype) -> None:
    s, h, x = (random(rows, n, dtype=dtype, seed=i) for i, n in enumerate((depth, 2 * depth, depth)))
    w, b = random(depth, depth, dtype=dtype), random(depth, dtype=dtype, seed=9)
    gated = (s.double() * h[:, depth:].double()).to(dtype).double()
    close(layer.tail(s, h, w, b, x), x.double() + gated @ w.double().T + b.double(), dtype, depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads"), [*((r, h) for r in ROWS for h in ((4, 2, 16), (2, 2, 24))), (2, (26, 1, 40))])
def test_projections(rows: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Five outputs, q and k turned, whatever part of a tile a head fills."""
    n_q, n_k, d = heads
    depth, kv = n_q * d, n_k * d
    a, w = random(rows, depth, dtype=dtype), random(3 * depth + 2 * kv, depth, dtype=dtype, scale=0.3)
    biases = tuple(random(n, dtype=dtype, seed=i) for i, n in enumerate((depth, kv, kv, 2 * depth)))
    angle = random(rows, d // 2, dtype=torch.float32, scale=3.0)
    cos, sin = angle.cos(), angle.sin()
    y = a.double() @ w.double().T + torch.cat(biases).double()
    q, k, v, q_b, k_b = y.split([depth, kv, kv, depth, depth], dim=-1)
    tables = [t.double().view(rows, 1, d // 2) for t in (cos, sin)]
    q, k = (rotate(x.view(rows, -1, d), *tables).reshape(rows, -1) for x in (q, k))
    gain, bias = random(depth, dtype=torch.float32, scale=0.1), torch.tensor([-0.4], device=DEVICE)
    h = torch.cat([a, torch.full_like(a, torch.nan)], -1)  # the gate's half is not looked at
    *parts, gamma = layer.project_gain(h, w, biases, cos, sin, gain, bias, 0.9)  # type: ignore[arg-type]
    for found, wanted in zip(parts, (q, k, v, q_b, k_b), strict=True):
        close(found, wanted, dtype, depth)
    close(gamma, 0.9 * torch.tanh(bias.double() + (a.double() * gain.double()).sum(-1)), torch.float32, depth)
    h[:, :depth], gain = 60.0, gain.abs() + 1
    assert torch.allclose(layer.project_gain(h, w, biases, cos, sin, gain, bias, 0.999)[-1], torch.tensor(0.999, device=DEVICE))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 80, 1024, 1040])
def test_norm(width: int, dtype: torch.dtype) -> None:
    rows = 5
    x, w, b = random(rows, width, dtype=dtype), random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2)
    wanted = torch.nn.functional.layer_norm(x.double(), (width,), w.double(), b.double(), 1e-5)
    close(layer.norm(x, w, b, 1e-5), wanted, dtype, 16)


@pytest.mark.parametrize("head", [16, 64, 256])
def test_rotary_tables(head: int) -> None:
    """Those of rope.py, exact far out too."""
    limbs = torch.tensor(_limbs(head), device=DEVICE)
    length = torch.tensor([0, 7, 32000, 2**18 - 5], dtype=torch.int32, device=DEVICE)
    at = (length[:, None] + torch.arange(4, device=DEVICE)).double()
    angle = at[..., None] * 10000.0 ** (-2.0 * torch.arange(head // 2, device=DEVICE) / head).double()
    for found, wanted in zip(layer.rotary(length, limbs, 4), (angle.cos(), angle.sin()), strict=True):
        assert found.shape == wanted.shape and float((found.double() - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), DEEP)
def test_entrance(rows: int, depth: int, dtype: torch.dtype) -> None:
    """GELU on the left half of W_in's product, tiles that lie across the middle included."""
    x, w, b = random(rows, depth, dtype=dtype), random(2 * depth, depth, dtype=dtype, scale=0.3), random(2 * depth, dtype=dtype)
    y = (x.double() @ w.double().T + b.double()).to(dtype).double()
    close(layer.enter(x, w, b), torch.cat([torch.nn.functional.gelu(y[:, :depth]), y[:, depth:]], -1), dtype, 4 * depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), DEEP)
def test_output_projection(rows: int, depth: int, dtype: torch.dtype) -> None:
    """The product is rounded before the float32 sum is added, as if it had been stored."""
    x, w, b = random(rows, depth, dtype=dtype), random(depth, depth, dtype=dtype, scale=0.3), random(depth, dtype=dtype)
    add = random(rows, depth, dtype=torch.float32, seed=3)
    found = layer.out_add(x, w, b, add)
    close(found, (x.double() @ w.double().T + b.double()).to(dtype).double() + add.double(), dtype, depth * 4)
    if rows <= 16:  # with more, tiles and hence sums are others
        assert torch.equal(found, (layer.linear(x, w, b).float() + add).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth"), [(1, 16), (1, 80), (1, 1040), (2, 80)])
def test_norm_and_entrance(rows: int, depth: int, dtype: torch.dtype) -> None:
    """One kernel for one row, two for more: the same numbers as norm and entrance one after the other, of a row so small that epsilon counts."""
    x, scale, shift = random(rows, depth, dtype=dtype, scale=3e-3), random(depth, dtype=dtype, seed=1), random(depth, dtype=dtype, seed=2)
    w, b = random(2 * depth, depth, dtype=dtype, scale=0.3), random(2 * depth, dtype=dtype)
    normal = layer.norm(x, scale, shift, 1e-5)
    y = (normal.double() @ w.double().T + b.double()).to(dtype).double()
    wanted = torch.cat([torch.nn.functional.gelu(y[:, :depth]), y[:, depth:]], -1)
    found = layer.norm_enter(x, scale, shift, 1e-5, w, b)
    close(found, wanted, dtype, 16)
    assert (found == layer.enter(normal, w, b)).double().mean() > 0.9  # the norm is rounded before the product: nearly all elements agree to the bit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [80] if DEVICE == "cpu" else [80, 1024, 1040, 2048])
def test_a_row_among_16_has_the_bits_it_has_among_few(depth: int, dtype: torch.dtype) -> None:
    """Where weights are read ahead, rows are multiplied 8 at a time, up to 8 by binaries of their own; the numbers of both eights, and a NaN that stays in its
    row."""
    x, h, w, b = (random(*shape, dtype=dtype, scale=0.3) for shape in ((16, depth), (16, 2 * depth), (2 * depth, depth), (2 * depth,)))
    square, row, gain = w[:depth].contiguous(), b[:depth], random(depth, dtype=dtype, seed=1)

    def tail(n: int, x: torch.Tensor) -> torch.Tensor:
        return layer.tail(x[:n].contiguous(), h[:n].contiguous(), square, row, x[:n].contiguous())

    def entered(n: int, x: torch.Tensor) -> torch.Tensor:
        return layer.norm_enter(x[:n].contiguous(), gain, row, 1e-5, w, b)

    many, gains = random(5 * depth, depth, dtype=dtype, scale=0.1), random(depth, dtype=torch.float32, scale=0.1)
    turns, one = [random(16, depth // 2, dtype=torch.float32, seed=i) for i in (2, 3)], random(1, dtype=torch.float32)

    def projected(n: int, x: torch.Tensor) -> torch.Tensor:
        a = torch.cat([x[:n], h[:n, depth:]], 1)
        return torch.cat([y.view(n, -1) for y in layer.project_gain(a, many, (row, row, row, b), *(t[:n] for t in turns), gains, one, 0.999)], 1)

    bad = x.clone()
    bad[11] = torch.nan
    assert torch.equal(projected(5, x), projected(16, x)[:5])
    for operation in (tail, entered):
        whole = operation(16, x)
        assert torch.equal(operation(5, x), whole[:5]) and torch.equal(operation(13, x), whole[:13])
        found = operation(16, bad)
        assert torch.isnan(found[11]).all() and torch.equal(found[:11], whole[:11]) and torch.equal(found[12:], whole[12:])
    close(tail(16, x), x.double() + (x * h[:, depth:]).double() @ square.double().T + row.double(), dtype, depth)


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("depth", [80, 1040])
def test_weights_read_ahead_change_nothing(depth: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much of a row's product's weights its kernel reads before it waits for the row."""
    pinned = layer.pinned

    def other(names: tuple[str, ...], *rest: object) -> dict[str, dict[str, object]]:
        found = {name: dict(options) for name, options in pinned(names, *rest).items()}  # type: ignore[arg-type]
        for options in found.values():
            options |= {"AHEAD": ahead, "BK": 256}
        return found

    dtype = torch.float16
    x, w, b = random(1, depth, dtype=dtype), random(112, depth, dtype=dtype), random(112, dtype=dtype)
    monkeypatch.setattr(layer, "pinned", other)
    close(layer.linear(x, w, b), x.double() @ w.double().T + b.double(), dtype, depth)


@pytest.mark.parametrize(("tile", "depth"), [(1024, 80), (512, 560)])
def test_columns_that_are_a_warps_own(tile: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's product without sums across warps, columns in pairs: of a width that its tiles do not divide, gated, and turned."""
    pinned = layer.pinned

    def other(names: tuple[str, ...], *rest: object) -> dict[str, dict[str, object]]:
        found = {name: dict(options) for name, options in pinned(names, *rest).items()}  # type: ignore[arg-type]
        for options in found.values():
            options |= {"BN": 8, "BK": tile, "KS": tile // 256, "AHEAD": 1}
        return found

    dtype = torch.float16
    x, w, b = random(1, depth, dtype=dtype), random(depth, depth, dtype=dtype, scale=0.3), random(depth, dtype=dtype)
    few, h = random(20, depth, dtype=dtype), random(1, 2 * depth, dtype=dtype)
    monkeypatch.setattr(layer, "pinned", other)
    close(layer.linear(x, few, b[:20]), x.double() @ few.double().T + b[:20].double(), dtype, depth)
    gated = (x.double() * h[:, depth:].double()).to(dtype).double()
    close(layer.tail(x, h, w, b, x), x.double() + gated @ w.double().T + b.double(), dtype, depth)
    if depth > 80:  # projections are many programs
        return
    cos, sin = torch.rand(1, 4, device=DEVICE), torch.rand(1, 4, device=DEVICE)  # heads of 8
    zero, every = torch.zeros(depth, device=DEVICE), random(5 * depth, depth, dtype=dtype, scale=0.3)
    q = layer.project_gain(h, every, (b, b, b, torch.cat([b, b])), cos, sin, zero, zero[:1], 0.9).q
    pairs = (h[:, :depth].double() @ every[:depth].double().T + b.double()).view(-1, 4, 2)
    turned = torch.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], -1)
    close(q, turned.view(1, depth), dtype, depth * 4)


FORMS = [dict(BN=16, BK=128, KS=4, FORM=1), dict(BN=16, BK=128, KS=4, FORM=2), dict(BN=64, BK=64, KS=1, FORM=3),
         dict(BM=8, BN=16, BK=128, KS=4, FORM=0)]  # of product.py, and that of 8 rows without weights ahead  # fmt: skip


@pytest.mark.parametrize("tiles", FORMS, ids=lambda tiles: f"{tiles['FORM']} of {tiles.get('BM', 32)}")
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_forms_of_a_product_of_a_batch(tiles: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the 2x rule, in a depth and columns that fill no tile: rows have the bits that fewer of them have; one of 1e4 and one of zeros harm no other."""
    pinned = layer.pinned

    def other(names: tuple[str, ...], *rest: object) -> dict[str, dict[str, object]]:
        found = {name: dict(options) for name, options in pinned(names, *rest).items()}  # type: ignore[arg-type]
        return {name: {**o, "BM": 32, "AHEAD": 0, **tiles} if "FORM" in o else o for name, o in found.items()}

    rows, depth = 40, 208
    x, w, b = random(rows, depth, dtype=dtype), random(80, depth, dtype=dtype, scale=0.3), random(80, dtype=dtype)
    x[3, 5], x[6] = 1e4, 0.0
    monkeypatch.setattr(layer, "pinned", other)
    found = layer.linear(x, w, b)
    for i in range(rows):  # each by its own size
        check(found[i], x[i].double() @ w.double().T + b.double(), (x[i].float() @ w.float().T + b.float()).to(dtype))
    assert torch.equal(found[6], b) and torch.equal(layer.linear(x[:17].contiguous(), w, b), found[:17])
    if tiles["FORM"] == 3:  # takes both operands as they are
        return
    w, b = random(depth, depth, dtype=dtype, scale=0.3), random(depth, dtype=dtype)
    h, s = random(rows, 2 * depth, dtype=dtype), random(rows, depth, dtype=dtype)
    gated = (s.double() * h[:, depth:].double()).to(dtype)
    exact, plain = (s.to(t) + gated.to(t) @ w.to(t).T + b.to(t) for t in (torch.float64, torch.float32))
    check(layer.tail(s, h, w, b, s), exact, plain.to(dtype))
