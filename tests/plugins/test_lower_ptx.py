"""What the interpreter, one program and thread after another, cannot show of kernels: the order of their PTX, of waits, fences and loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sessa_deploy.kernels.launch import table

pytest.importorskip("triton")


PRINT = """
import triton
from triton.backends.compiler import GPUTarget
from sessa_deploy.plugins import lower
source, options = lower.source(lower.Unit{unit})
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


def ptx_of(kernel: str, dtype: str, variant: str, cache: Path) -> str:
    """The PTX of a binary for sm_90, compiled in a process of its own: the interpreter may be on in this one."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    program = PRINT.format(unit=(kernel, 90, dtype, variant))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("variant", ["fwd", "few", "wide"])
def test_a_solve_waits_between_what_it_far_reads_and_near_tiles(variant: str, tmp_path: Path) -> None:
    """Which the kernel ahead of it makes, and with which it may begin: every block but the first, which has none."""
    far, wait, near = ptx_of("feedback_solve_halves", "bf16", variant, tmp_path).partition("griddepcontrol.wait")
    assert wait and "griddepcontrol" not in far + near and "wgmma.mma_async" in far and "wgmma.mma_async" in near
    test = [line.split() for line in far.splitlines() if line.strip().startswith("setp.")][-1]
    assert (test[0].split(".")[1], test[-1].rstrip(";")) in (("gt", "0"), ("lt", "1"), ("le", "0"), ("eq", "0"), ("ne", "0"))


@pytest.mark.parametrize("kernel", ["feedback_near", "feedback_scores"])
def test_they_let_the_next_in_before_they_do_anything(kernel: str, tmp_path: Path) -> None:
    before, opens, after = ptx_of(kernel, "bf16", "fwd", tmp_path).partition("griddepcontrol.launch_dependents")
    assert opens and "griddepcontrol" not in before + after and "ld.global" not in before and "cp.async" not in before and "wgmma.mma_async" in after


@pytest.mark.parametrize(("variant", "ahead"), [("64", False), ("1.1024", True)])
def test_no_two_warps_widen_the_same_weights(variant: str, ahead: bool, tmp_path: Path) -> None:
    """Of 17 to 64 rows, whose products would else take as long to widen int8 as to read it, and of one by matrix instructions: a tile's words of four, each
    in one thread; that of one row before the wait, when the next kernel has been let in."""
    options, word = table.options("layer_out", 90, "fp16.i8", variant), "prmt.b32 a, u, 0x64646464"
    ptx = ptx_of("layer_out", "fp16.i8", variant, tmp_path)
    words, before = ptx.count(word), ptx.split("griddepcontrol.wait")[0].count(word)
    opened = ptx.split(word)[0].count("griddepcontrol.launch_dependents")
    assert words == options["BN"] * options["BK"] // 4 // (32 * options["num_warps"])
    assert (before, opened) == ((words, 1) if ahead else (0, opened))


def test_who_ends_a_step_last_sees_what_all_did(tmp_path: Path) -> None:
    """What the interpreter, one program and thread after another, cannot show: all threads are done before their program counts itself, the count publishes
    what they wrote, and the last one reads past its own cache."""
    before, count, after = ptx_of("decode_end", "fp32", "any", tmp_path).partition("atom.global.gpu.acq_rel.add")
    assert count and "atom." not in before + after
    between = before.rsplit("bar.sync", 1)[1]
    assert "ld.global" not in between and "st.global" not in between
    assert after.count("ld.global.cg") == 2 and "bar.sync" in after.split("ld.global")[0]


def test_threads_that_wait_for_themselves_wait_for_the_tile(tmp_path: Path) -> None:
    """What the interpreter, one program after another, cannot show: each looks again while the counter is below, by a load that nothing behind it passes."""
    _, *waits = ptx_of("feedback_solve_halves", "bf16", "few", tmp_path).split("again:\n")
    assert waits
    for wait in waits:
        load, test, jump, *_ = wait.split("\n")
        assert load.startswith("ld.global.gpu.acquire.b32") and test.startswith("setp.lt.s32") and jump == "@p bra again;"
        word, read = load.split()[1].rstrip(","), wait.split("ld.global.cg")[0]
        assert test.split()[2].rstrip(",") == word and "mma" not in read, "what the neighbour wrote is read behind it"


def test_a_thread_that_waits_for_all_waits_for_the_tile(tmp_path: Path) -> None:
    """Likewise: the first thread looks, the others wait for it at a barrier, and nobody reads before."""
    _, *waits = ptx_of("feedback_solve_halves", "bf16", "fwd", tmp_path).split("again:\n")
    assert waits
    for wait in waits:
        load, test, jump, over, *_ = wait.split("\n")
        assert load.startswith("ld.global.gpu.acquire.b32") and test.startswith("setp.lt.s32") and (jump, over) == ("@p bra again;", "over:")
        word, (between, reached, _) = load.split()[1].rstrip(","), wait.split("over:")[1].partition("bar.sync")
        assert test.split()[2].rstrip(",") == word and reached and "ld." not in between.replace(".loc", "") and "bra" not in between


def test_threads_of_a_draft_wait_for_one_another(tmp_path: Path) -> None:
    """Before they read the text that all have written, and before the new length lets others read the rest."""
    kinds = re.findall(r"bar\.sync|st\.global|ld\.global|atom\.", ptx_of("decode_draft", "fp32", "any", tmp_path))
    first = kinds.index("st.global")
    assert kinds[first : first + 3] == ["st.global", "bar.sync", "ld.global"] and kinds[-3:] == ["st.global", "bar.sync", "atom."]
