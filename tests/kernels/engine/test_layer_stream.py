"""The products of one and of a few wide rows through shared memory, beside those that they stand for; what they read before they wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from sessa_deploy.kernels import device  # noqa: E402
from sessa_deploy.kernels.engine import layer, layer_stream_rows, mixer_rows  # noqa: E402
from sessa_deploy.kernels.launch import jit, table  # noqa: E402
from sessa_deploy.kernels.launch.jit import interpreted  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
D, KV, HEAD, ROWS = 1040, 80, 80, 5


def broader(tiles: dict[str, Any]) -> dict[str, Any]:
    return tiles | {name: value for name, value in (("BN", 128), ("EACH", 3)) if name in tiles}


@pytest.fixture(autouse=True)
def broad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of many columns, of which the interpreter has fewer to make."""
    tiles = table.tiles
    if interpreted():
        monkeypatch.setattr(table, "tiles", lambda name, *at: broader(tiles(name, *at)))
        jit.pinned.cache_clear()
    yield
    jit.pinned.cache_clear()


def random(*shape: int, scale: float = 1.0, kind: torch.dtype = torch.float16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(kind).to(DEVICE)


def calls(rows: int) -> dict[str, Callable[[], Any]]:
    """Name of a stream -> what launches it, or, without streams, the kernel that it stands for."""
    x, h, s, add = random(rows, D), random(rows, 2 * D), random(rows, D), random(rows, D, kind=torch.float32)
    wide, square, every = (random(n, D, scale=D**-0.5) for n in (2 * D, D, 3 * D + 2 * KV))
    bias, gain = random(2 * D), random(D, kind=torch.float32, scale=D**-0.5)
    angle = random(rows, HEAD // 2, kind=torch.float32, scale=3.0)
    biases = bias[:D], bias[:KV], bias[KV : 2 * KV], bias
    rows_ = "" if rows == 1 else "_rows"
    return {
        f"layer_norm_enter{rows_}_stream": lambda: layer.norm_enter(x, bias[:D], bias[D:], 1e-5, wide, bias),
        f"layer_tail{rows_}_stream": lambda: layer.tail(s, h, square, bias[:D], x),
        f"layer_project_gain{rows_}_stream": lambda: layer.project_gain(h, every, biases, angle.cos(), angle.sin(), gain, gain[:1], 0.9),
        **({"layer_out_stream": lambda: layer.out_add(x, square, bias[:D], add)} if rows == 1 else {}),
    }


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_stream_computes_what_the_kernel_does_that_it_stands_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[str]()
    launcher = layer.launcher
    for module in (layer, layer.layer_rows):
        monkeypatch.setattr(module, "launcher", lambda fn, *rest: ran.append(fn.__name__) or launcher(fn, *rest))  # type: ignore[func-returns-value]
    for name, call in calls(rows).items():
        found = call()
        assert ran.pop() == name
        with monkeypatch.context() as patch:
            patch.setattr(layer_stream_rows, "stream", lambda *_: (None, ""))
            wanted = call()
        assert ran.pop() != name
        for mine, other in zip(found, wanted, strict=True):
            assert torch.isfinite(mine).all() and float((mine.double() - other.double()).abs().max()) <= 2e-3 * float(other.double().abs().max()), name


def test_the_output_projection_of_a_few_rows_solves_each_sequence() -> None:
    batch, tokens = 2, 3
    x, add, weight, bias = random(batch, tokens, D), random(batch, tokens, D, kind=torch.float32), random(D, D, scale=D**-0.5), random(D)
    inverse = torch.eye(16, device=DEVICE) + random(batch, 16, 16, kind=torch.float32, scale=0.1).tril(-1)
    found = []
    for fn, variant in ((layer_stream_rows.mixer_rows_out_stream, "2048"), (mixer_rows.mixer_rows_out, "any")):
        options = jit.pinned((fn.__name__,), DEVICE, torch.float16, variant)[fn.__name__]
        out = torch.full_like(x, torch.nan)
        programs = triton.cdiv(triton.cdiv(D, options["BN"]), options.get("EACH", 1))
        arguments = (x, weight, weight, bias, add, inverse, out)
        jit.launcher(fn, DEVICE, torch.float16, options)((programs, batch), *map(jit.address, arguments), tokens, D)
        found.append(out.double())
    assert torch.isfinite(found[0]).all() and float((found[0] - found[1]).abs().max()) <= 2e-3 * float(found[1].abs().max())


def test_a_row_does_not_depend_on_those_behind_it() -> None:
    x, h, s = random(ROWS, D), random(ROWS, 2 * D), random(ROWS, D)
    w, b = random(D, D, scale=D**-0.5), random(D)
    whole = layer.tail(s, h, w, b, x)
    s[3:] = torch.nan
    assert torch.equal(layer.tail(s, h, w, b, x)[:3], whole[:3]) and torch.equal(layer.tail(s[:2], h[:2], w, b, x[:2]), whole[:2])


@pytest.mark.skipif(not interpreted(), reason="the interpreter alone shows who reads what before the wait")
def test_nothing_but_weights_is_read_before_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels ahead write is NaN when a program begins, and there once it has waited; every program waits."""
    from triton.runtime import interpreter

    s, h, x = random(1, D), random(1, 2 * D), random(1, D)
    w, b = random(D, D, scale=D**-0.5), random(D)
    plain, written = layer.tail(s, h, w, b, x), {t: t.clone() for t in (s, h, x)}
    waited, pinned, seat = list[int](), layer.pinned, interpreter.interpreter_builder.set_grid_idx

    def begins(*at: int) -> None:
        seat(*at)
        waited.append(0)
        for t in written:
            t.fill_(torch.nan)

    def waits() -> None:
        waited[-1] += 1
        for t, value in written.items():
            t.copy_(value)

    monkeypatch.setattr(layer, "pinned", lambda names, *rest: {name: {**o, "PDL": 1} for name, o in pinned(names, *rest).items()})
    monkeypatch.setattr(device, "gdc_wait", waits)
    monkeypatch.setattr(device, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begins)
    assert torch.equal(layer.tail(s, h, w, b, x), plain) and waited and all(waited)

