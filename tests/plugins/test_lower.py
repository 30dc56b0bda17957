"""Lowering: every variant of every kernel compiles without a GPU, types and architectures by turns; its metadata is whole, and bad binaries are refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sessa_deploy.cuda_arch import ARCHS
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import FLOAT8_ARCH, SHARED_LIMIT, SHARED_SHARE, WIDE_SHARE
from sessa_deploy.kernels.launch.spec import DTYPES, OPENS, QUANTISED, WAITS
from sessa_deploy.plugins import lower

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(900)  # the first that asks for `lowered` waits for some 160 binaries, a second each on a quiet core


def plain(archs: Sequence[int]) -> list[lower.Unit]:
    """The units of these architectures but those that read weights of another type than they compute with."""
    return [u for u in lower.units(archs) if "." not in u.dtype]


def sample() -> list[lower.Unit]:
    """Every kernel in every type, and every variant of it in one at least; each for one architecture, every second for sm_90 and the rest for the others in
    turn; every kernel for two at least.

    Those that read weights of 8 bits are left to a test below.
    A second a binary: all of them are the work of `python -m sessa_deploy.plugins.lower`, which a release runs.
    """
    forms: dict[tuple[str, str, str], list[int]] = {}
    for arch in (90, *(a for a in ARCHS if a != 90)):
        for unit in plain([arch]):
            forms.setdefault((unit.kernel, unit.dtype, unit.variant), []).append(arch)
    variants: dict[str, dict[str, list[str]]] = {}
    for kernel, dtype, variant in sorted(forms):
        variants.setdefault(kernel, {}).setdefault(variant, []).append(dtype)
    for kernel, its in variants.items():
        for i, (variant, dtypes) in enumerate(its.items()):
            for dtype in dtypes if i else ():
                if dtype != dtypes[i % len(dtypes)]:
                    del forms[kernel, dtype, variant]
    chosen, turn, seen = [], 0, 0
    for (kernel, dtype, variant), archs in sorted(forms.items()):
        others = [a for a in archs if a != 90]
        alone = sum(name == kernel and set(its) > {90} for (name, _, _), its in forms.items()) == 1
        if others and (seen % 2 or alone):
            chosen.append(lower.Unit(kernel, others[turn % len(others)], dtype, variant))
            turn += 1
        if 90 in archs and (not seen % 2 or alone or not others):
            chosen.append(lower.Unit(kernel, 90, dtype, variant))
        seen += bool(others)
    return chosen


def test_the_sample_leaves_no_variant_no_kernel_and_no_architecture_out() -> None:
    chosen, every = sample(), [u for arch in ARCHS for u in plain([arch])]
    assert {(u.kernel, u.variant) for u in chosen} == {(u.kernel, u.variant) for u in every}
    assert {(u.kernel, u.dtype) for u in chosen} == {(u.kernel, u.dtype) for u in every}
    assert len(chosen) <= len({(u.kernel, u.dtype, u.variant) for u in every})
    assert {u.arch for u in chosen} == set(ARCHS)
    for kernel in {u.kernel for u in chosen}:
        archs = {u.arch for arch in ARCHS for u in plain([arch]) if u.kernel == kernel}
        assert archs == {90} or {u.arch for u in chosen if u.kernel == kernel} > {90}, kernel


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """(folder, cubins.json, standard output) of one run that makes the sample; an interpreter asked for by other tests must not matter."""
    out, said, chosen = tmp_path_factory.mktemp("cubins"), io.StringIO(), sample()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(lower, "units", lambda *_, **__: chosen)
        code = lower.main(["--out", str(out)])
    assert code == 0, said.getvalue()
    return out, json.loads((out / lower.MANIFEST).read_text()), said.getvalue()


@pytest.mark.slow
def test_every_unit_is_made_and_described(lowered: tuple[Path, dict[str, Any], str]) -> None:
    out, manifest, stdout = lowered
    cubins = manifest["cubins"]
    assert manifest["schema"] == lower.SCHEMA
    assert {(c["kernel"], c["arch"], c["dtype"], c["variant"]) for c in cubins} == {(u.kernel, u.arch, u.dtype, u.variant) for u in sample()}
    assert {p.name for p in out.glob("*.cubin")} == {c["file"] for c in cubins}
    for c in cubins:
        described = table.kernel(c["kernel"])
        assert [p["name"] for p in c["params"]] == [p.name for p in described.params] + ["global_scratch", "profile_scratch"]
        assert c["shared"] <= SHARED_LIMIT[c["arch"]] and c["problems"] == [] and c["registers"] > 0
        binary = (out / c["file"]).read_bytes()
        assert binary[:4] == b"\x7fELF" and len(binary) == c["size"]
        assert str(Path(table.__file__).parents[1]).encode() not in binary  # no path of this machine
    assert sum(c["size"] for c in cubins) * len(plain(ARCHS)) / len(cubins) < 40 * 2**20
    assert (out / lower.TABLE).read_text().count("SESSA_CUBIN(") == len(cubins)
    assert "sm_86" in stdout and "untuned" in stdout


@pytest.mark.slow
def test_lowering_again_gives_the_same_bytes(lowered: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    """By the command, for one kernel."""
    before = {c["file"]: c["sha256"] for c in lowered[1]["cubins"] if c["kernel"] == "feedback_step_combine" and c["arch"] == 90}
    (tmp_path / "stale.cubin").write_bytes(b"old")
    command = [sys.executable, "-m", "sessa_deploy.plugins.lower", "--arch", "90", "--out", str(tmp_path), "--kernel", "feedback_step_combine"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / lower.MANIFEST).read_text())["cubins"]
    assert {(c["kernel"], c["arch"], c["dtype"], c["variant"]) for c in again} == {
        (u.kernel, u.arch, u.dtype, u.variant) for u in lower.units([90], ["feedback_step_combine"])}
    assert before and before.items() <= {c["file"]: c["sha256"] for c in again}.items()
    assert not (tmp_path / "stale.cubin").exists()


def test_weights_of_8_bits_double_no_librarys_size() -> None:
    """Products of few rows and what widens them alone read them; E4M3 from sm_89 on. Which there are follows from the tables of each architecture."""
    storage, int8, fp8 = (lower.units(ARCHS, weights=[kind]) for kind in lower.KINDS)
    assert sorted([*storage, *int8, *fp8]) == sorted(lower.units(ARCHS)) and len(int8) + len(fp8) < len(storage) / 2
    readers = {k.name for k in table.kernels().values() if "*weight" in {p.type for p in k.params}}
    for units, kind in ((int8, ".i8"), (fp8, ".f8")):
        assert {u.kernel for u in units} == readers and {u.dtype for u in units} == {"fp16" + kind, "bf16" + kind}
        assert not {u.variant for u in units} & {"16"} and {u.kernel for u in units if u.variant == "any"} == {"layer_widen", "mixer_rows_out"}
    assert {lower.served_by(lower.Unit("layer_out", a, "fp16.i8", "1"), ARCHS) or a for a in ARCHS} == {80, 87, 90, 100, 120}
    assert {u.arch for u in fp8} == {a for a in ARCHS if a >= FLOAT8_ARCH}
    assert not lower.units([80, 86, 87], weights=["fp8"])


@pytest.mark.slow
def test_kernels_that_read_8_bits_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample: each kind of tile and weight; all of them are the work of `python -m sessa_deploy.plugins.lower`."""
    chosen = [lower.Unit("layer_norm_enter", 80, "fp16.i8", "1024"), lower.Unit("layer_tail", 89, "bf16.f8", "64"),
              lower.Unit("layer_out", 90, "bf16.i8", "64"), lower.Unit("layer_logits", 90, "fp16.f8", "1"),
              lower.Unit("layer_widen", 90, "bf16.f8", "any")]  # fmt: skip
    assert set(chosen) <= set(lower.units(ARCHS))
    monkeypatch.setattr(lower, "units", lambda *_: chosen)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for made, unit in zip(lower.lower(ARCHS, tmp_path), chosen, strict=True):
        assert (made.problems, made.dtype) == ([], unit.dtype)
        types = {p["name"]: p["type"] for p in made.params}
        assert types["weight"] == {".i8": "*i8", ".f8": "*fp8e4nv"}[unit.dtype[4:]] and types.get("scale", "*fp32") == "*fp32"


def cubin(**change: Any) -> lower.Cubin:
    good: dict[str, Any] = {
        "kernel": "feedback_step_partial", "arch": 86, "dtype": "bf16", "variant": "1024", "file": "x.cubin", "sha256": "", "size": 1, "entry": "e",
        "params": [{}] * 15, "tiles": {}, "num_warps": 4, "num_stages": 1, "shared": 1000, "registers": 100, "spill_bytes": 0, "global_scratch": 0,
        "vector_loads": 9, "scalar_loads": 1, "tuned": True,
    }  # fmt: skip
    return lower.Cubin(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [({"shared": 101377}, "shared memory"), ({"spill_bytes": 8}, "spills 8 bytes"), ({"scalar_loads": 3}, "narrower than 16 bytes"),
     ({"vector_loads": 0}, "no 16-byte load"), ({"params": [{}] * 14}, "declares 15 parameters"), ({"global_scratch": 64}, "global scratch")],
)  # fmt: skip
def test_problems_are_named(change: dict[str, Any], says: str) -> None:
    kernel = replace(table.kernel("feedback_step_partial"), scalar_loads=2)
    assert lower.problems(cubin(), 15, 0, kernel) == []
    found = lower.problems(cubin(**change), 15, 0, kernel)
    assert len(found) == 1 and says in found[0]


def test_ptx_is_read_right() -> None:
    ptx = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_first.v2.b64 { %rd2, %rd3 }, [ %rd1 + 0 ];
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
    cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, %r6;
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.volatile.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.shared.b32 %r7, [%r8];
    ld.param.b64 %rd1, [kernel_param_0];
    """
    assert lower.count_loads(ptx) == (4, 2)
    log = "ptxas info : 0 bytes stack frame, 16 bytes spill stores, 16 bytes spill loads\nptxas info : Used 117 registers, used 1 barriers"
    assert lower.ptxas_report(log) == (117, 16)
    with pytest.raises(ValueError, match="register count"):
        lower.ptxas_report("")


def test_bad_arch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lower.main(["--arch", "75", "--out", str(tmp_path)]) == 2
    assert "got 75; allowed: some of 80," in capsys.readouterr().err


def test_later_minors_are_served_where_they_are_pinned_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def served(tiles: dict[int, int], arch: int, archs: tuple[int, ...]) -> int | None:
        with monkeypatch.context() as patch:
            patch.setattr(table, "options", lambda name, a, dtype, variant: {"BM": tiles[a]})
            return lower.served_by(lower.Unit("causal_prefill", arch, "fp16", "64"), archs)

    alike, every = dict.fromkeys(ARCHS, 64), ARCHS
    assert {a: found for a in every if (found := served(alike, a, every)) is not None} == {86: 80, 89: 80}  # 87 is Tegra
    assert served(alike, 89, (86, 89)) == 86 and served(alike, 89, (87, 89)) is None and served(alike, 89, (89, 90)) is None
    # The library takes the nearest one at or below the device: where that is pinned otherwise, an earlier one does not help.
    assert served({**alike, 86: 32}, 86, every) is None and served({**alike, 86: 32}, 89, every) is None
    assert served({**alike, 80: 128}, 89, every) == 86 and served({**alike, 80: 128}, 86, every) is None
    made = set(lower.units(every))
    for arch in every:
        for unit in lower.units([arch]):
            assert lower.Unit(unit.kernel, lower.served_by(unit, every) or arch, unit.dtype, unit.variant) in made
    assert lower.shared_limit(lower.Unit("causal_step_partial", 80, "fp16", "64")) == SHARED_LIMIT[86]
    assert lower.shared_limit(lower.Unit("causal_prefill", 90, "fp16", "64")) == SHARED_LIMIT[90]


def test_early_starts_are_for_gpus_that_know_them() -> None:
    """A GPU before sm_90 has no griddepcontrol; where there is one, a decode step's kernels ask for it, but no product of more than 64 rows."""
    early = [k for k in table.kernels().values() if k.early]
    opening = [k for k in table.kernels().values() if k.opens and not k.early]  # which only let another in, in PyTorch alone
    assert {k.name for k in early + opening} == {k.name for k in table.kernels().values() if "PDL" in k.constexprs}
    assert {k.name: k.opens for k in opening} == {"feedback_scores": ("fwd",), "feedback_near": ("fwd",)}
    for k in opening:
        assert not any(table.early(k.name, arch, "bf16", v) for arch in (80, 90, 120) for v in k.variants if v not in k.optional or arch == 90)
        assert [table.tiles(k.name, 90, "bf16", v)["PDL"] for v in k.variants] == [OPENS if v == "fwd" else 0 for v in k.variants]
    assert table.tiles("feedback_scores", 80, "bf16", "fwd")["PDL"] == 0
    steps = {n for n in table.kernels() if n.startswith(("feedback_step", "causal_step", "mixer_", "layer_", "decode_")) or "_rows_" in n}
    torch_alone = {"feedback_solve_halves"}  # which PyTorch launches early, the plugin never
    assert {k.name for k in early} == {n for n in steps - {"layer_widen", "layer_gate", "decode_draft"} if not n.endswith("_many")} | torch_alone
    assert all((k.early_rows == k.early_rows_8 == 0) == (k.name in torch_alone) for k in early)
    for k in early:
        for variant in k.variants:
            may = variant in k.early
            assert may or variant == "any"
            dtype = next(d for d in k.dtypes if variant not in k.optional or table.has(k.name, 90, d, variant))  # some are of 8-bit weights alone
            held = [arch for arch in ARCHS if variant not in k.optional or table.has(k.name, arch, dtype, variant)]
            rows = k.rows_of(variant) if dtype in DTYPES else k.early_rows_8 or k.rows_of(variant)
            assert 90 in held and {arch: table.early(k.name, arch, dtype, variant) for arch in held} == {
                arch: rows if may and arch >= 90 else 0 for arch in held}
            how = OPENS if variant in k.opens else WAITS
            assert [table.tiles(k.name, arch, dtype, variant)["PDL"] for arch in held] == [how if may and arch >= 90 else 0 for arch in held]
    # who lets the next kernel in at once: of a single row, or behind the last layer; and ahead of none that reads what a kernel of a layer has written before
    # its own wait
    ones = ("1.wide", "1.1024", "1.2048")
    assert {k.name: k.opens for k in early if k.opens} == {
        "layer_out": ("1", *ones), "layer_tail": ("1", *ones), "layer_norm_enter": ("1024", "2048", "4096"), "mixer_step_combine": ("1", "1.wide"),
        "layer_norm_last": ("1024", "2048", "4096"), "layer_project_gain": ("1.1024",)}
    # the kernels of one row's layer have one share of shared memory, and no kernel another, as those around the attentions of a few wide rows; those of a wide
    # row all of it
    held = [(k, v) for k in early for v in k.variants if table.has(k.name, 90, k.dtypes[0], v)]
    shares = {(k.name, v): table.shared_share(k.name, 90, k.dtypes[0], v) for k, v in held}
    small = {"layer_norm_enter", "layer_project_gain", "mixer_step_combine", "layer_out", "layer_tail", "layer_logits"}
    assert {one for one, share in shares.items() if share == SHARED_SHARE} == {
        ("mixer_step_partial", "1024.64.1"), ("layer_project_gain", "1.1024"), ("layer_norm", "2048"), ("layer_norm_last", "2048"),
        ("mixer_rows_combine", "wide"),
        *((name, "8.wide") for name in ("layer_enter", "layer_project_gain", "mixer_rows_out", "layer_tail")),
        *((name, "1024" if name == "layer_norm_enter" else "1") for name in small)}
    wide = {one for one, share in shares.items() if share == WIDE_SHARE}
    assert {name for name, v in wide if v == "1.wide"} == small - {"layer_norm_enter"} and {n for n, v in wide} >= {"layer_norm_enter", "mixer_step_partial"}
    assert all(share in (0, SHARED_SHARE, WIDE_SHARE) for share in shares.values()) and not [v for _, v in wide if v.startswith(("1024", "any"))]
    assert {table.shared_share("layer_norm_enter", arch, "fp16", "2048") for arch in (80, 100)} == {0, SHARED_SHARE}
    for name in small - {"layer_norm_enter", "mixer_step_combine"}:  # with 8-bit weights too
        held = [(v, "fp16" + kind) for v in ("1.1024", "1.2048", "1.wide") for kind in QUANTISED if table.has(name, 90, "fp16" + kind, v)]
        assert len(held) >= 4 and all(table.shared_share(name, 90, dtype, v) == (SHARED_SHARE if v == "1.1024" else WIDE_SHARE) for v, dtype in held)


def test_the_table_pins_every_unit() -> None:
    for unit in lower.units(ARCHS):
        tiles = table.tiles(unit.kernel, unit.arch, unit.dtype, unit.variant)
        assert tuple(tiles) == table.kernel(unit.kernel).constexprs
    assert table.options("feedback_step_partial", 121, "bf16", "1024") == table.options("feedback_step_partial", 120, "bf16", "1024")
    with pytest.raises(KeyError, match="pin no tiles"):
        table.options("feedback_step_partial", 75, "bf16", "1024")


PRINT = """
for module in modules:
    for name, function in vars(module).items():
        if hasattr(function, "device_caches") and name in {names}:
            for kernel in function.device_caches[0][0].values():
                print(name, hashlib.sha256(kernel.asm["cubin"]).hexdigest())
"""
JIT = {
    "feedback_": """
import hashlib, torch
from sessa_deploy.kernels import route
from sessa_deploy.kernels.feedback import forward, step, step_rows, tiles
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for tokens, width in ((1, 768), (1, 4096), (5, 768), (16, 2048), (130, 256), (257, 1024)):
        q, k, f = torch.randn(3, 2, tokens, width, device="cuda").to(dtype)
        past = torch.randn(2, 2, 300, width, device="cuda").to(dtype)
        lengths = torch.tensor([300, 7], device="cuda", dtype=torch.int32)
        route.feedback_forward(q, k, torch.rand(2, tokens, device="cuda"), f, past[0], past[1], lengths, need_lse=False)
modules = (step, step_rows, tiles, forward)
""",
    "causal_": """
import hashlib, torch
from sessa_deploy.kernels import route
from sessa_deploy.kernels.causal import prefill, step, step_rows
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    few = ((2, 2, 64), (9, 4, 48), (16, 8, 128), (5, 2, 100))
    for tokens, heads, width in (*few, (1, 4, 64), (1, 2, 40), (1, 8, 128), (1, 2, 256), (130, 2, 64), (33, 4, 128), (40, 2, 200)):
        q = torch.randn(2, tokens, heads, width, device="cuda").to(dtype)
        k, v = torch.randn(2, 2, tokens, 2, width, device="cuda").to(dtype)
        past = torch.randn(2, 2, 300, 2, width, device="cuda").to(dtype)
        route.causal_kernels(q, k, v, past[0], past[1], torch.tensor([300, 7], device="cuda", dtype=torch.int32))
modules = (step, step_rows, prefill)
""",
}


@pytest.mark.gpu
@pytest.mark.parametrize("family", JIT)
def test_what_the_jit_launches_is_the_lowered_cubin(family: str, tmp_path: Path) -> None:
    """Byte for byte, both without line information (which holds the source's path). SESSA_CUBIN_DIR: what was lowered elsewhere, in place of lowering now."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    kernels = [name for name, k in table.kernels().items() if k.lowered and name.startswith(family)]
    if "SESSA_CUBIN_DIR" in os.environ:
        listed = json.loads((Path(os.environ["SESSA_CUBIN_DIR"]) / lower.MANIFEST).read_text())["cubins"]
        cubins = {(c["kernel"], c["sha256"]) for c in listed if c["arch"] == major * 10 + minor}
    else:
        cubins = {(c.kernel, c.sha256) for c in lower.lower([major * 10 + minor], tmp_path, kernels)}
    env = {**os.environ, "TRITON_DISABLE_LINE_INFO": "1", "TRITON_CACHE_DIR": str(tmp_path / "jit")}
    script = JIT[family] + PRINT.replace("{names}", repr(kernels))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    launched = {(line.split()[0], line.split()[1]) for line in done.stdout.splitlines()}
    assert {name for name, _ in launched} == set(kernels) and launched <= cubins
