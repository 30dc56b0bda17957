"""The launch tables: families found by their folders, tiles pinned in the family's own file, spills by version, early starts as an option of a call."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.engine.spec import product_variant
from sessa_deploy.kernels.launch import jit, table
from sessa_deploy.kernels.launch.limits import SHARED_SHARE
from sessa_deploy.kernels.launch.spec import QUANTISED


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The house with a copy of every family's tiles, which may be written."""
    for family in table.families():
        (tmp_path / family).mkdir()
        shutil.copy(table._tiles_file(family), tmp_path / family)
    monkeypatch.setattr(table, "_HOUSE", tmp_path)
    yield tmp_path
    table._entries.cache_clear()


def test_families_are_found_and_their_kernels_live_in_them() -> None:
    assert set(table.families()) == {"causal", "engine", "feedback"}
    for family, kernels in table.families().items():
        assert all(k.module.startswith(f"sessa_deploy.kernels.{family}.") and k.name == name for name, k in kernels.items())
    assert len(table.kernels()) == sum(map(len, table.families().values())), "no two families share a kernel's name"
    with pytest.raises(KeyError, match="no kernel 'feedback_stop'; known: "):
        table.kernel("feedback_stop")


@pytest.mark.parametrize(("name", "family", "variant"), [("causal_prefill", "causal", "64"), ("mixer_step_combine", "engine", "any"),
                                                         ("feedback_step_partial", "feedback", "1024")])  # fmt: skip
def test_pinning_rewrites_one_entry_of_the_familys_own_file(name: str, family: str, variant: str, elsewhere: Path) -> None:
    before = {f: (elsewhere / f / "tiles.json").read_text() for f in table.families()}
    old = {(a, d): table.options(name, a, d, variant) for a in ARCHS for d in ("fp16", "bf16")}
    entry = {k: v for k, v in table.pinned(name, 90, "bf16", variant).items() if k not in ("arch", "dtype", "variant", "tuned")}
    table.pin(name, 90, ["bf16"], variant, {**entry, "num_warps": 16})
    assert {f for f in before if (elsewhere / f / "tiles.json").read_text() != before[f]} == {family}
    for (arch, dtype), options in old.items():
        assert table.options(name, arch, dtype, variant) == ({**options, "num_warps": 16} if (arch, dtype) == (90, "bf16") else options)
    assert table.tuned(name, 90, "bf16", variant)


def test_every_file_is_an_entry_a_line_as_pinning_writes_it(elsewhere: Path) -> None:
    for family in table.families():
        file = elsewhere / family / "tiles.json"
        before = file.read_text()
        table._write(file, json.loads(before))
        assert file.read_text() == before


def test_spills_may_differ_between_versions_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for stated, allowed in ((16, (16, 16)), ({"3.7": 20}, (0, 20)), ({"3.6": 4, "3.7": 0}, (4, 0)), (None, (0, 0))):
        entry: dict[str, Any] = {} if stated is None else {"spills": stated}
        monkeypatch.setattr(table, "pinned", lambda *key, entry=entry: entry)
        assert tuple(table.spills("causal_prefill", 90, "fp16", "64", version) for version in jit.TRITON_VERSIONS) == allowed
    monkeypatch.undo()
    names = {f"{major}.{minor}" for major, minor in jit.TRITON_VERSIONS}
    for key, row in table._entries().items():
        assert not isinstance(row.get("spills"), dict) or set(row["spills"]) <= names, key


def test_an_early_start_belongs_to_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels start early where the caller says how many rows there are and the plugin would let them; no call changes another's options."""
    pytest.importorskip("triton")
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    monkeypatch.setattr(jit, "arch_of", lambda index: 90)
    device = torch.device("cuda", 0)
    jit.pinned.cache_clear()
    try:
        def starts(name: str, variant: str, early: int, weights: str = "") -> bool:
            return bool(jit.pinned((name,), device, torch.float16, variant, early, weights)[name].get("launch_pdl"))

        assert [starts("layer_norm", "1024", rows) for rows in (0, 1, 64, 65)] == [False, True, True, False]
        assert [starts("layer_out", "1", rows) for rows in (0, 1, 2)] == [False, True, False]
        assert [starts("mixer_step_partial", "1024.64", rows) for rows in (0, 1, 64, 65)] == [False, True, True, False]
        assert [starts("layer_tail", "64", rows) for rows in (16, 17)] == [True, False]
        for kind in QUANTISED:  # with weights of 8 bits a tail of more rows starts early, and an output projection of half as many
            assert [starts("layer_tail", "64", rows, kind) for rows in (0, 17, 64, 65)] == [False, True, True, False]
            assert [starts("layer_out", "64", rows, kind) for rows in (0, 17, 32, 33)] == [False, True, True, False]
        assert "launch_pdl" not in jit.pinned(("layer_norm",), device, torch.float16, "1024")["layer_norm"]
        shares = [jit.pinned((name,), device, torch.float16, variant)[name].get(jit.SHARE) for name, variant in (("layer_out", "1"), ("layer_out", "any"))]
        assert shares == [SHARED_SHARE, None]  # whoever asks: a share is the binary's
    finally:
        jit.pinned.cache_clear()


def test_rows_that_start_early_have_binaries_that_can() -> None:
    """A product's tiles follow from its rows: each that the plugin may start early waits for its predecessor; and nothing starts early that does not wait."""
    for kernel in (k for k in table.kernels().values() if k.lowered):
        for variant in (v for v in kernel.variants if v != "bwd"):
            dtype = next(d for d in kernel.dtypes if variant not in kernel.optional or table.has(kernel.name, 90, d, variant))  # some have 8-bit weights alone
            waits = bool(kernel.early) and table.tiles(kernel.name, 90, dtype, variant)["PDL"]
            assert waits or table.early(kernel.name, 90, dtype, variant) == 0
        if kernel.early and {"16", "64", "any"} <= set(kernel.variants):
            for weights, most in (("", kernel.early_rows), (".i8", kernel.early_rows_8 or kernel.early_rows)):
                found = {product_variant(rows, weights) for rows in range(1, most + 1)}
                assert found & set(kernel.variants) <= set(kernel.early), kernel.name
