"""The layer's fused regions against its plain modules in float64 under the error rule: through the interpreter, and on a GPU with the compiled kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from feedback_cases import DEVICE
from rule import STORAGE, UNFIT, check

from sessa_deploy import SessaLayer, SessaMixer, fused_layer
from sessa_deploy.kernels import ops
from sessa_deploy.kernels.causal.rows import clean_rows, poison_rows
from sessa_deploy.kernels.training import regions
from sessa_deploy.kernels.training.rows import append_rows
from sessa_deploy.rope import rope_tables, tables_at, tables_from_zero

# batch, tokens, width, heads, key/value heads, rotary positions: one row, a chunk of partial sums and one more, grouped heads, one wide head
SHAPES = [(1, 1, 32, 2, 2, True), (2, 33, 48, 3, 1, True), (3, 21, 32, 4, 2, False), (1, 40, 80, 1, 1, True)]


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A switch: True takes the fused road wherever the tensors are (the interpreter on a CPU), False the plain one."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(fused_layer, "applies", lambda layer, x: fused_layer.parameters(layer) if on else None)

    return switch


def make(width: int, heads: int, kv_heads: int, rope: bool, dtype: torch.dtype) -> SessaLayer:
    torch.manual_seed(0)
    layer = SessaLayer(width, heads, kv_heads, use_forward_rope=rope)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.1 * min(1.0, 48 / width) ** 0.5 * torch.randn_like(p)  # as wide layers are initialised, or their gradients leave float16
    gain = copy.deepcopy(layer.mixer.gamma_bias.data), copy.deepcopy(layer.mixer.gamma_ctx.weight.data)
    layer = layer.to(DEVICE, dtype)
    if dtype != torch.float64:
        layer.mixer.gamma_bias.data, layer.mixer.gamma_ctx.weight.data = (x.to(DEVICE) for x in gain)
    return layer


def run(layer: SessaLayer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y and the gradients of x and of every parameter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}}


def compare(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert got.keys() == plain.keys() == exact.keys()
    largest = max(float(g.abs().max()) for name, g in exact.items() if name not in ("y", "x"))
    for name in got:
        assert got[name].dtype == plain[name].dtype and got[name].shape == plain[name].shape, name
        # a gradient that is zero but for rounding is judged against the largest one
        scale = max(float(exact[name].abs().max()), 0.0 if name in ("y", "x") else 1e-2 * largest)
        # gamma's bias has one number for a gradient, a sum that cancels: the textbook's own may be far off in 16 bits
        check(got[name], exact[name], plain[name], dtype, name, scale, unfit=UNFIT if exact[name].numel() > 1 else 1e9)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_and_every_gradient(shape: tuple[Any, ...], dtype: str, through: Any) -> None:
    batch, tokens, width, heads, kv_heads, rope = shape
    storage = STORAGE[dtype]
    layer, oracle = make(width, heads, kv_heads, rope, storage), make(width, heads, kv_heads, rope, torch.float64)
    with torch.no_grad():
        for p, q in zip(oracle.parameters(), layer.parameters(), strict=True):
            p.copy_(q)
    x, dy = (torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(i)).to(DEVICE, storage) for i in (1, 2))
    through(False)
    plain, exact = run(layer, x, dy), run(oracle, x.double(), dy.double())
    through(True)
    got = run(layer, x, dy)
    compare(got, plain, exact, storage)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), got["y"], rtol=2e-2, atol=2e-2)  # the forward attention's kernel differs without gradients
    with pytest.MonkeyPatch.context() as patch:  # the gradient of q by cuDNN's attention, and by flash's, is not the same bits in every call
        patch.setattr(ops, "_TRAINING_BACKENDS", [SDPBackend.MATH])
        patch.setattr(ops, "_wants_other_backend", lambda *_: True)
        first, again = run(layer, x, dy), run(layer, x, dy)
    for name in first:
        assert torch.equal(again[name], first[name]), f"{name} differs between two runs"


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_autocast_takes_float32_parameters(shape: tuple[Any, ...], through: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, tokens, width, heads, kv_heads, rope = shape
    layer, oracle = make(width, heads, kv_heads, rope, torch.float32), make(width, heads, kv_heads, rope, torch.float64)
    x, dy = (torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (1, 2))
    exact = run(oracle, x.double(), dy.double())
    through(False)
    with torch.autocast(DEVICE, torch.bfloat16):
        plain = run(layer, x, dy)
    through(True)
    monkeypatch.setattr(regions, "storage_type", lambda x: torch.bfloat16)  # on a CPU it would look at the GPU's autocast
    with torch.autocast(DEVICE, torch.bfloat16):
        got = run(layer, x, dy)
    assert got["y"].dtype == torch.float32
    compare(got, plain, exact, torch.bfloat16)


def test_golden_numbers(golden: tuple[dict[str, Any], dict[str, Tensor]], through: Any) -> None:
    """The official layer's float64 numbers, in float32."""
    config, tensors = golden
    layer = SessaLayer(config["D"], config["n_heads"], config["n_kv_heads"], config["gamma_max"], config["use_forward_rope"], config["ln_eps"])
    names = {name for name, _ in layer.named_parameters()}
    layer.load_state_dict({name[6:]: x for name, x in tensors.items() if name.startswith("param.") and name[6:] in names}, strict=True)
    through(True)
    got = run(layer.to(DEVICE), tensors["x"].float().to(DEVICE), torch.linspace(-1, 1, config["D"]).expand(tensors["x"].shape).to(DEVICE))
    want = {"y": tensors["y"], "x": tensors["grad.x"], **{name: tensors[f"grad.{name}"] for name in names}}
    largest = max(float(want[name].abs().max()) for name in names)
    for name, w in want.items():
        error = float((got[name].double().cpu() - w).abs().max()) / max(float(w.abs().max()), 0.0 if name in ("y", "x") else 0.01 * largest)
        assert error < 1e-5, f"{name}: {error}"


def test_rows_alone_are_differentiated(through: Any) -> None:
    """Gradients of a layer's rows, with and without its y: what the gate's backward hands over must not be taken for what autograd asks for."""
    layer, x = make(48, 3, 1, True, torch.float32), torch.randn(2, 33, 48, device=DEVICE)
    oracle = make(48, 3, 1, True, torch.float64)
    with torch.no_grad():
        for p, q in zip(oracle.parameters(), layer.parameters(), strict=True):
            p.copy_(q)

    def gradients(of: SessaLayer, x: Tensor, whole: bool) -> dict[str, Tensor]:
        of.zero_grad()
        y, rows = of.step(x, None, None, of.mixer.rope(x, None))
        loss = (rows.s * torch.linspace(-1, 1, 48, device=DEVICE)).sum() + rows.k_f.square().sum() + (y.sum() if whole else 0.0)
        loss.backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None and bool(p.grad.any())}

    for whole in (False, True):
        through(False)
        plain, exact = gradients(layer, x, whole), gradients(oracle, x.double(), whole)
        through(True)
        compare(gradients(layer, x, whole), plain, exact, torch.float32)


def test_gradients_behind_a_past_or_through_another_out_proj_are_the_plain_ones(through: Any) -> None:
    layer = make(32, 2, 1, True, torch.float32)
    x, old = torch.randn(2, 5, 32, device=DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    length = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)

    def behind() -> list[Tensor]:
        layer.zero_grad()
        cached = layer.step(old, None, None, layer.mixer.rope(old, None))[1]
        layer.step(x, length, cached, layer.mixer.rope(x, length, cached))[0].square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    for change in (lambda: None, lambda: setattr(layer.mixer, "out_proj", torch.nn.Sequential(layer.mixer.out_proj))):
        change()
        found = []
        for fused in (True, False):
            through(fused)
            found.append([*behind(), *run(layer, x, torch.ones_like(x)).values()])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, through: Any) -> None:
    through(True)
    layer, x = make(32, 2, 1, True, torch.float32), torch.randn(2, 9, 32, device=DEVICE)
    want = run(layer, x, torch.ones_like(x))
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpoint(layer, leaf, use_reentrant=reentrant).backward(torch.ones_like(x))
    assert torch.equal(leaf.grad, want["x"])
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, want[name]), name


def test_frozen_parameters_get_no_gradient(through: Any) -> None:
    through(True)
    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(1, 5, 32, device=DEVICE)
    want = run(layer, x, torch.ones_like(x))
    layer.requires_grad_(False)
    layer.mixer.gamma_ctx.weight.requires_grad_()
    got = run(layer, x, torch.ones_like(x))
    assert got.keys() == {"y", "x", "mixer.gamma_ctx.weight"}
    for name, g in got.items():
        assert torch.equal(g, want[name]), name
    layer.requires_grad_()
    layer.zero_grad()
    layer(x).backward(torch.ones_like(x))  # and the other way round: the input needs none
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, want[name]), name


def test_a_bad_row_stays_where_it_is(through: Any) -> None:
    through(True)
    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(2, 12, 32, device=DEVICE)
    with torch.no_grad():
        clean = layer(x)
        x[0, 7, 3] = torch.nan
        got = layer(x)
    assert torch.equal(got[0, :7], clean[0, :7]) and torch.equal(got[1], clean[1])
    assert torch.isnan(got[0, 7]).all()


@pytest.mark.parametrize("dtype", STORAGE)
def test_clean_and_poison_rows(dtype: str) -> None:
    wide = torch.randn(3, 11, 5 * 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, STORAGE[dtype])
    k, v = wide[..., :32].unflatten(-1, (2, 16)), wide[..., 32:64].unflatten(-1, (2, 16))
    k[1, 4, 1, 3], v[1, 9, 0, 0], v[2, 0, 1, 15] = torch.inf, torch.nan, -torch.inf
    before = wide.clone()
    k_clean, v_clean, first = clean_rows(k, v)
    assert first.tolist() == [11, 4, 0]
    bad = torch.zeros(3, 11, dtype=torch.bool, device=DEVICE)
    bad[1, 4] = bad[1, 9] = bad[2, 0] = True
    for got, x in ((k_clean, k), (v_clean, v)):
        assert got.is_contiguous() and torch.equal(got, torch.where(bad[..., None, None], 0.0, x))
    assert torch.equal(wide.nan_to_num(), before.nan_to_num())
    o = torch.randn(3, 11, 2, 16, device=DEVICE).to(STORAGE[dtype])
    got = poison_rows(o.clone(), first)
    assert torch.equal(got[0], o[0]) and torch.equal(got[1, :4], o[1, :4]) and torch.isnan(got[1, 4:]).all() and torch.isnan(got[2]).all()


@pytest.mark.parametrize("counts", [None, (3, 0, 2, 3)])
def test_append_writes_the_counted_rows_and_nothing_else(counts: tuple[int, ...] | None) -> None:
    capacity, before = 6, (0, 2, 6, 3)
    wide = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    rows = (wide[..., :16].unflatten(-1, (2, 8)), wide[..., 16:32].unflatten(-1, (2, 8)), wide[..., 32:].contiguous(), wide[..., 16:32])
    stores = [torch.full((4, capacity, *x.shape[2:]), torch.nan, dtype=torch.float16, device=DEVICE) for x in rows]
    want = [x.clone() for x in stores]
    for b, start in enumerate(before):
        n = min(3 if counts is None else counts[b], capacity - start)
        for store, x in zip(want, rows, strict=True):
            store[b, start : start + n] = x[b, :n]
    length, new = (None if c is None else torch.tensor(c, dtype=torch.int32, device=DEVICE) for c in (before, counts))
    assert length is not None
    append_rows(rows, stores, length, new)
    for got, x in zip(stores, want, strict=True):
        torch.testing.assert_close(got, x, rtol=0, atol=0, equal_nan=True)


def test_tables_from_zero_are_the_tables() -> None:
    for tokens in (5, 300, 7):
        cos, sin = tables_from_zero(tokens, 16, torch.device(DEVICE))
        want = rope_tables(torch.arange(tokens, device=DEVICE)[None], 16, torch.float32)
        assert torch.equal(cos, want[0]) and torch.equal(sin, want[1])
    at = torch.tensor([[3, 4, 5], [900, 901, 902]], device=DEVICE)
    for got, table in zip(tables_at(at, 903, 16), rope_tables(at, 16, torch.float32), strict=True):
        assert torch.equal(got, table)


def test_only_plain_modules_on_a_gpu_take_the_road(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(1, 5, 32, device=DEVICE)
    assert (fused_layer.applies(layer, x) is not None) == (DEVICE == "cuda")
    if DEVICE == "cpu":
        return
    assert fused_layer.applies(layer, x.double()) is None and fused_layer.applies(layer, x.half()) is None
    handle = layer.mixer.k_proj.register_forward_hook(lambda *_: None)
    assert fused_layer.applies(layer, x) is None
    handle.remove()
    assert fused_layer.applies(layer, x) is not None
    monkeypatch.setenv("SESSA_TRITON", "0")
    assert fused_layer.applies(layer, x) is None


def wraps(layer: SessaLayer, name: str, of: str = "forward") -> None:
    module = layer.get_submodule(name)
    plain = getattr(module, of)
    setattr(module, of, lambda *given: 2.0 * plain(*given))


CHANGES: dict[str, Callable[[SessaLayer], Any]] = {
    "a hook": lambda layer: layer.W_in.register_forward_pre_hook(lambda module, given: (2.0 * given[0],)),
    "a forward of its own": lambda layer: wraps(layer, "mixer.k_proj"),
    "the norm's": lambda layer: wraps(layer, "ln"),
    "a map's": lambda layer: wraps(layer, "mixer.out_proj"),
    "a gain of its own": lambda layer: wraps(layer, "mixer", "gain"),
    "a hook for all": lambda layer: register_module_forward_hook(lambda module, given, y: 2.0 * y if isinstance(module, torch.nn.Linear) else None),
    "a bias behind the map": lambda layer: setattr(layer.mixer, "out_proj", torch.nn.Linear(32, 32).to(DEVICE)),
    "a parameter elsewhere": lambda layer: setattr(layer.mixer.v_proj, "weight", torch.nn.Parameter(torch.zeros(32, 32, device="meta"))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_changed_in_a_layer_counts(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and without gradients: as the plain modules have it."""
    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(1, 5, 32, device=DEVICE)
    monkeypatch.setattr(fused_layer, "applies", fused_layer._of_plain_modules)
    assert fused_layer.applies(layer, x) is not None
    handle = CHANGES[change](layer)
    try:
        if change.endswith("elsewhere"):
            assert fused_layer.applies(layer, x) is None  # a kernel would read an address of another device
            return
        got = run(layer, x, torch.ones_like(x))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), got["y"], rtol=1e-3, atol=1e-4)
        monkeypatch.setattr(fused_layer, "applies", lambda layer, x: None)
        for name, value in run(layer, x, torch.ones_like(x)).items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)
    finally:
        if handle is not None:
            handle.remove()


def replica(module: Any) -> Any:
    """As nn.DataParallel makes them: no parameters, but their copies as attributes."""
    made = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(made, name, replica(child))
    for name, parameter in module._parameters.items():
        setattr(made, name, None if parameter is None else parameter.clone())
    return made


def test_replicas_of_data_parallel_take_the_plain_road() -> None:
    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(2, 5, 32, device=DEVICE)
    head, out = fused_layer.parameters(replica(layer))
    assert [*head, out] == [None] * 16
    torch.testing.assert_close(replica(layer)(x), layer(x))


def test_a_mixer_of_the_caller_s_own_keeps_its_equations(through: Any) -> None:
    class Half(SessaMixer):
        def gain(self, a: Tensor) -> Tensor:
            return super().gain(a) / 2

    layer, x = make(32, 2, 2, True, torch.float32), torch.randn(2, 5, 32, device=DEVICE)
    through(False)
    plain, layer.mixer.__class__ = layer(x), Half
    want = layer(x)
    through(True)
    assert torch.equal(layer(x), want) and not torch.allclose(plain, want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("width", [768, 4096])
def test_full_widths(width: int, dtype: str, through: Any) -> None:
    test_layer_and_every_gradient((2, 700, width, width // 64, width // 128, True), dtype, through)
