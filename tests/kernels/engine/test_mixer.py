"""The mixer's decode step, both attentions at a time, against plain torch in float64: on a GPU, or through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from sessa_deploy.cuda_arch import ARCHS  # noqa: E402
from sessa_deploy.kernels.engine import mixer  # noqa: E402
from sessa_deploy.kernels.engine.spec import WIDE_ROW, ahead_variant, mixer_variant, step_variants  # noqa: E402
from sessa_deploy.kernels.launch import table  # noqa: E402
from sessa_deploy.kernels.launch.jit import Workspace, interpreted  # noqa: E402
from sessa_deploy.kernels.launch.limits import MIXER_MOST_B, MIXER_UNIT_B, MIXER_UNIT_F  # noqa: E402
from sessa_deploy.kernels.launch.splits import least_rows, shares, step_splits  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or TRITON_INTERPRET=1")


def case(heads: int, kv_heads: int, d: int, capacity: int, lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Arguments of `mixer.step`; rows beyond each length are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator)).half()

    batch, width = len(lengths), heads * d
    made = {"q": random(batch, heads, d), "k": random(batch, kv_heads, d), "v": random(batch, kv_heads, d), "past_k": random(batch, capacity, kv_heads, d),
            "past_v": random(batch, capacity, kv_heads, d), "weight": random(width, width, scale=width**-0.5), "bias": random(width),
            "q_b": random(batch, width), "gamma": 2 * torch.rand(batch, generator=generator) - 1, "past_kb": random(batch, capacity, width),
            "past_s": random(batch, capacity, width), "past_length": torch.tensor(lengths, dtype=torch.int32)}  # fmt: skip
    for name in ("past_k", "past_v", "past_kb", "past_s"):
        for b, n in enumerate(lengths):
            made[name][b, n:] = torch.nan
    return {name: x.to(DEVICE) for name, x in made.items()}


def truth(a: dict[str, Any]) -> torch.Tensor:
    """s (B,D) in float64, f rounded as the kernels round it."""
    rows = []
    for b, n in enumerate(a["past_length"].tolist()):
        q, k, v = (a[x][b].double() for x in ("q", "k", "v"))
        keys, values = torch.cat([a["past_k"][b, :n].double(), k[None]]), torch.cat([a["past_v"][b, :n].double(), v[None]])
        group = q.shape[0] // k.shape[0]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        weight = (torch.einsum("hd,jhd->hj", q, keys) * q.shape[1] ** -0.5).softmax(-1)
        o = torch.einsum("hj,jhd->hd", weight, values).half().double().reshape(-1)
        s = (a["weight"].double() @ o + a["bias"].double()).half().double()
        if n:
            alpha = (a["past_kb"][b, :n].double() @ a["q_b"][b].double() * len(s) ** -0.5).softmax(-1)
            s = s + a["gamma"][b].double() * (alpha @ a["past_s"][b, :n].double())
        rows.append(s)
    return torch.stack(rows)


SHAPES = [
    (4, 4, 64, 40, [40, 0, 7]),  # a full, an empty and a short sequence
    (8, 2, 64, 70, [70, 13]),  # four query heads a key
    (2, 1, 128, 20, [20, *[3] * 32]),  # more sequences than are looked at together, two query heads a key
    (3, 3, 24, 33, [33, 1]),  # narrower than any tile
    (9, 9, 128, 40, [40, 3]),  # wide rows in a short cache: more rows a split
    (9, 3, 128, 40, [33]),  # and of one sequence, which has tiles of its own
    (4, 4, 64, 700, [700, 400]),  # many splits and not so many: two ways to add them
    (1, 1, 16, 2100, [2100]),  # longer than all splits together have at least: each takes more
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step(shape: tuple[Any, ...]) -> None:
    a = case(*shape)
    s, wanted = mixer.step(**a), truth(a)
    assert torch.isfinite(s).all() and float((s.double() - wanted).abs().max()) <= 4e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("held", [1, 5, 20])
def test_programs_that_share_out_the_splits_change_no_bit(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = case(4, 4, 64, 90, [90, 0, 17, 5])
    every, take = mixer.step(**a), Workspace.take

    def poisoned(self: Workspace, device: torch.device) -> Any:  # a split that nobody computes must not find what it held before
        at, memory = take(self, device)
        memory.fill_(255)
        return at, memory

    monkeypatch.setattr(Workspace, "take", poisoned)
    monkeypatch.setattr(mixer, "shares", lambda *sizes: shares(*sizes[:-1], held))
    assert torch.equal(mixer.step(**a), every)


def starts_early(kernel: str, begins: Callable[[], None], waits: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kernel` start early in the interpreter: begins is called as each program of any kernel begins, waits in the place of a wait."""
    from triton.runtime import interpreter

    from sessa_deploy.kernels import device

    pinned, seat = mixer.pinned, interpreter.interpreter_builder.set_grid_idx

    def early(names: tuple[str, ...], *rest: Any) -> dict[str, Any]:
        return {name: {**o, "PDL": True} if name == kernel else o for name, o in pinned(names, *rest).items()}

    def seated(*at: int) -> None:
        seat(*at)
        begins()

    monkeypatch.setattr(mixer, "pinned", early)
    monkeypatch.setattr(device, "gdc_wait", waits)
    monkeypatch.setattr(device, "gdc_launch_dependents", lambda: None)
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", seated)


def combines_early(name: str, late: Sequence[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `name`, which adds splits, start early, the workspace 255 and `late` NaN in each of its programs until it has waited. How often each waits."""
    take, launch, out_add = Workspace.take, mixer.launcher, mixer.out_add
    memory, splits, waited, was = list[torch.Tensor](), list[torch.Tensor](), list[int](), [x.clone() for x in late]

    def taken(self: Workspace, device: torch.device) -> Any:
        at, its = take(self, device)
        its.fill_(255)  # so that splits which nobody computes stay 255
        memory.append(its)
        return at, its

    def begin() -> None:
        if combining:
            waited.append(0)
            memory[0].fill_(255)
            for x in late:
                x.fill_(torch.nan)

    def wait() -> None:
        waited[-1] += 1
        memory[0].copy_(splits[0])
        for x, value in zip(late, was, strict=True):
            x.copy_(value)

    combining = False

    def launcher(kernel: Any, *rest: Any) -> Any:
        nonlocal combining
        combining = kernel is getattr(mixer, name)
        splits[:] = [memory[0].clone()] if combining else []
        return launch(kernel, *rest)

    def projected(*operands: Any) -> torch.Tensor:
        nonlocal combining
        combining = False
        return out_add(*operands)

    starts_early(name, begin, wait, monkeypatch)
    monkeypatch.setattr(Workspace, "take", taken)
    monkeypatch.setattr(mixer, "launcher", launcher)
    monkeypatch.setattr(mixer, "out_add", projected)
    return waited


@pytest.mark.skipif(not interpreted(), reason="the interpreter alone shows who reads what before the wait")
@pytest.mark.parametrize("shape", [(2, 2, 16, 40, [40, 0, 7]), (4, 1, 16, 20, [20])], ids=str)
def test_a_step_that_starts_early_reads_only_its_pasts_before_it_waits(shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the projections write is NaN whenever a program begins, and there once it has waited; every program waits; the bits are those of a plain start."""
    a = case(*shape)
    plain, written = mixer.step(**a), {name: a[name].clone() for name in ("q", "k", "v", "q_b")}
    waited, programs = list[int](), list[int]()

    def begins() -> None:
        waited.append(0)
        for name in written:
            a[name].fill_(torch.nan)

    def waits() -> None:
        waited[-1] += 1
        for name, x in written.items():
            a[name].copy_(x)

    def shared(*sizes: int) -> tuple[int, int]:
        programs[:] = shares(*sizes[:-1], 20)
        return programs[0], programs[1]

    starts_early("mixer_step_partial", begins, waits, monkeypatch)
    monkeypatch.setattr(mixer, "shares", shared)
    assert torch.equal(mixer.step(**a), plain)
    assert 0 < sum(programs) < len(waited) and all(waited[: sum(programs)])


@pytest.mark.skipif(not interpreted(), reason="the interpreter alone shows who reads what before the wait")
def test_programs_that_share_tasks_and_start_early_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The combination of a batch: each of few programs takes tasks of long and of short sequences; before it waits there are lengths and gamma, no splits.
    Gamma, which every layer writes anew, comes past the first cache."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder

    from sessa_deploy.kernels.engine import mixer_batch

    load, caches = InterpreterBuilder.create_masked_load, list[Any]()

    def read(self: Any, at: Any, mask: Any, other: Any, cache: Any, *rest: Any) -> Any:
        if at.data.flat[0] - a["gamma"].data_ptr() in (0, 4, 8):
            caches.append(cache)
        return load(self, at, mask, other, cache, *rest)

    a = case(2, 2, 16, 270, [3, 0, 270])
    plain, tiles = mixer.step(**a), mixer.pinned(("mixer_batch_combine",), a["q"].device, torch.float16, "64")["mixer_batch_combine"]
    assert mixer_batch.tasks(2, 16, 32, tiles) > 1, "several turns"
    waited = combines_early("mixer_batch_combine", (), monkeypatch)
    monkeypatch.setattr(mixer, "tasks", lambda *_: 1)  # a program for each sequence
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", read)
    assert torch.equal(mixer.step(**a), plain)
    assert len(waited) == 3 and all(waited) and set(caches) == {ir.CACHE_MODIFIER.CG}


@pytest.mark.skipif(not interpreted(), reason="the interpreter alone shows who reads what before the wait")
@pytest.mark.parametrize("length", [270, 20, 0])
def test_one_sequences_combination_reads_its_length_alone_before_it_waits(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits, their statistics and gamma are NaN whenever a program begins; splits that nobody computed stay so. The bits are those of a plain start."""
    a = case(2, 2, 16, 270, [length])
    plain, tiles = mixer.step(**a), mixer.pinned(("mixer_step_combine",), a["q"].device, torch.float16, "1")["mixer_step_combine"]
    waited = combines_early("mixer_step_combine", (a["gamma"],), monkeypatch)
    assert torch.equal(mixer.step(**a), plain)
    assert len(waited) == 2 * -(-16 // tiles["BLOCK_D"]) + -(-32 // tiles["BLOCK_D"]) and set(waited) == {1}


def test_an_infinity_in_the_last_row_stays_one() -> None:
    a = case(2, 2, 16, 270, [20])
    a["past_s"][0, 19, 3], a["gamma"][0] = torch.inf, 0.5
    s = mixer.step(**a)
    assert s[0, 3] == torch.inf and torch.isfinite(torch.cat([s[0, :3], s[0, 4:]])).all()


@pytest.mark.skipif(not interpreted(), reason="the interpreter alone shows a workspace as tensors")
@pytest.mark.parametrize("held", [1000, 7])
def test_splits_of_a_long_past_are_whole_tiles(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 12 splits of each attention: those of 200 rows take 18, not 17, and 20, those of 140 take 16, which is the least, and 12. Fewer are written."""
    a, buffers, take = case(1, 1, 16, 208, [200, 140]), dict[str, Any](), Workspace.take

    def taken(self: Workspace, device: torch.device) -> Any:
        at, memory = take(self, device)
        memory.fill_(255)
        buffers.update(at)
        return at, memory

    monkeypatch.setattr(Workspace, "take", taken)
    monkeypatch.setattr(mixer, "step_splits", lambda capacity, rows, most: step_splits(capacity, rows, 12))
    monkeypatch.setattr(mixer, "shares", lambda *sizes: shares(*sizes[:-1], held))
    s, wanted = mixer.step(**a), truth(a)
    assert float((s.double() - wanted).abs().max()) <= 4e-3 * float(wanted.abs().max())
    written = {name: (buffers[f"stat_{name}"].view(2, 12, 2).view(torch.int32)[..., 0] != -1).sum(1).tolist() for name in "fb"}
    assert written == {"f": [12, 9], "b": [10, 12]}


def test_splits_are_whole_tiles_where_that_was_measured() -> None:
    for variant in ("1024.64", "1024.64.1"):
        tiles = table.tiles("mixer_step_partial", 90, "fp16", variant)
        assert MIXER_UNIT_F % tiles["ROWS_F"] == MIXER_UNIT_B % tiles["ROWS_B"] == 0
    for arch in ARCHS:
        for variant in table.kernel("mixer_step_partial").variants:
            if variant not in table.kernel("mixer_step_partial").optional or table.has("mixer_step_partial", arch, "fp16", variant):
                tiles = table.tiles("mixer_step_partial", arch, "fp16", variant)
                assert tiles["ROWS_F"] * tiles["TILES_F"] % MIXER_UNIT_F == tiles["ROWS_B"] * tiles["TILES_B"] % MIXER_UNIT_B == 0, "the least is whole"


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    a = case(4, 4, 64, 90, [90, 3, 17])
    both, alone = mixer.step(**a), mixer.step(**{n: x if n in ("weight", "bias") else x[1:] for n, x in a.items()})
    assert torch.equal(both[1:], alone)


def test_an_empty_past_adds_nothing() -> None:
    a = case(2, 2, 32, 8, [0, 0])
    before = mixer.step(**a)
    a["gamma"] = torch.full_like(a["gamma"], torch.nan)
    assert torch.equal(mixer.step(**a), before)


def test_splits_with_a_program_each_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 splits of one attention and 32 of the other, which are spread over programs: none is left out, and the bits are those of few programs that take them
    in turn."""
    a = case(1, 1, 16, 256, [253])
    every, wanted = mixer.step(**a), truth(a)
    assert float((every.double() - wanted).abs().max()) <= 4e-3 * float(wanted.abs().max())
    monkeypatch.setattr(mixer, "shares", lambda *sizes: shares(*sizes[:-1], 7))
    assert torch.equal(mixer.step(**a), every)


def test_shares_use_the_device_and_serve_every_split() -> None:
    assert shares(256, 2, 256, 1024, 1024, 792) == (512, 256)  # all fit
    assert shares(4096, 2, 8192, 1024, 1024, 792) == (396, 396)
    assert shares(512, 4, 256, 1024, 4096, 528) == (272, 256)  # what feedback attention leaves over
    for pieces_f, blocks, pieces_b, width_f, width_b, held in ((8192, 2, 8192, 256, 1024, 792), (5, 16, 9000, 64, 4096, 3), (9000, 1, 7, 1024, 16, 100)):
        f, b = shares(pieces_f, blocks, pieces_b, width_f, width_b, held)
        assert f % blocks == 0 and blocks <= f <= pieces_f * blocks and 1 <= b <= pieces_b
        assert f + b <= max(held, blocks + 1)


def test_wide_rows_in_a_short_cache_have_fewer_splits() -> None:
    assert least_rows(16, 8, 1024, 1024) == least_rows(16, 8, 32768, 2048) == (16, 8)
    assert least_rows(16, 8, 1024, 1040) == (64, 16)


def test_one_sequence_has_a_binary_of_its_own_where_one_was_measured() -> None:
    assert step_variants(1, 1024, 64, 1) == step_variants(1, 768, 64, 1) == ("1024.64.1", "1024.64")
    assert step_variants(1, 2048, 128, 1) == ("2048.128.1", "2048.128")
    assert step_variants(2, 1024, 64, 1) == ("1024.64",) and step_variants(1, 2048, 64, 1) == ("2048.64",)


def test_one_wide_row_has_variants_of_its_own_and_the_splits_of_a_batch() -> None:
    assert [ahead_variant(k, "1", w, n) for k, w, n in (("layer_out", "", 1040), ("layer_tail", ".i8", 2064), ("layer_logits", ".f8", 4096))] == [WIDE_ROW] * 3
    assert [ahead_variant("layer_out", "1", ".i8", n) for n in (16, 1024, 1040, 2048)] == ["1.1024", "1.1024", "1.2048", "1.2048"]
    assert ahead_variant("layer_linear", "1", "", 2048) == ahead_variant("layer_linear", "1", ".f8", 64) == ahead_variant("layer_out", "64", "", 2048) == ""
    assert ahead_variant("layer_project_gain", "64", ".i8", 64) == ahead_variant("mixer_rows_out", "any", ".f8", 64) == ""
    one, many = (table.tiles("mixer_step_combine", 90, "fp16", v) for v in (WIDE_ROW, "wide"))
    assert one["BLOCK_F"] == many["BLOCK_F"] and min(one["BLOCK_B"], many["BLOCK_B"]) >= MIXER_MOST_B
    for variant in ("1024.64", "2048.128"):
        alone, batch = (table.tiles("mixer_step_partial", 90, "fp16", v) for v in (f"{variant}.1", variant))
        for rows, tiles in (("ROWS_F", "TILES_F"), ("ROWS_B", "TILES_B")):
            assert alone[rows] * alone[tiles] == batch[rows] * batch[tiles]


def test_widths_without_a_kernel_are_named() -> None:
    assert mixer_variant(768, 64, 1) == "1024.64" and mixer_variant(2048, 96, 2) == "2048.128x4"
    for width, head in ((8192, 64), (1024, 256)):
        with pytest.raises(ValueError, match="the largest are 4096 and 128"):
            mixer_variant(width, head, 1)
