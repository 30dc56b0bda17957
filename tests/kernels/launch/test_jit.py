"""Triton 3.6 and 3.7 are supported, each with its own launch; any other is refused in one line before something of it is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sessa_deploy import cuda
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import jit
from sessa_deploy.plugins import lower

triton = pytest.importorskip("triton")
FIX = "pip install 'triton>=3.6,<3.8'"


@pytest.fixture(autouse=True)
def asked_again() -> Iterator[None]:
    jit.triton_version.cache_clear()
    yield
    jit.triton_version.cache_clear()


@pytest.mark.parametrize(("version", "found"), [("3.6.0", (3, 6)), ("3.7.1", (3, 7)), ("3.7.0+git4bf8d2ae", (3, 7))])
def test_supported_versions(version: str, found: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    assert jit.triton_version() == found


@pytest.mark.parametrize("version", ["2.3.1", "3.5.1", "3.8.0", "3.60.0", "4.6.0", "unknown"])
def test_another_version_is_refused_in_one_line(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(UserError) as error:
        jit.triton_version()
    assert f"got {version}; allowed: 3.6 and 3.7; fix: {FIX}" in str(error.value) and "\n" not in str(error.value)
    assert lower.main(["--arch", "90", "--out", str(tmp_path / "cubins")]) == 2
    assert capsys.readouterr().err == f"error: {error.value}\n" and not list(tmp_path.iterdir())


def test_no_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="got none installed"):
        jit.triton_version()


def test_no_kernel_is_reached_with_another_version() -> None:
    """Neither by importing what attentions and layers share, nor by calling one whose module is there already."""
    code = """
import torch, triton
triton.__version__ = "3.8.0"
from sessa_deploy import cuda
from sessa_deploy.errors import UserError
from sessa_deploy.kernels.launch import jit
def refused(call):
    try:
        call()
    except UserError as error:
        print(error)
refused(lambda: __import__("sessa_deploy.kernels.device"))
refused(lambda: __import__("sessa_deploy.kernels.feedback.forward"))
x = torch.zeros(1, 1, 16)
from sessa_deploy.kernels.causal import rows
refused(lambda: rows.poison_rows(x[None], torch.zeros(1, dtype=torch.int32)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert done.stdout.splitlines() == [f"the kernels cannot use this Triton: got 3.8.0; allowed: 3.6 and 3.7; fix: {FIX}"] * 3, done.stderr


def test_a_launch_passes_what_tritons_own_launcher_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bind` calls the private function below Triton's launcher: argument by argument what that one gives it, for the installed version."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime import _allocation

    calls: list[tuple[Any, ...]] = []
    run = SimpleNamespace(
        launch=lambda *args: calls.append(args), launch_cooperative_grid=False, launch_pdl=True, arg_annotations=["annotations"], kernel_signature=b"signature",
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1, num_ctas=1,
    )  # fmt: skip
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
    binary = SimpleNamespace(run=run, function=77, metadata=metadata, packed_metadata=(4, 1, 1024))
    jit._bind(SimpleNamespace(__name__="kernel"), binary, [128, True], True)(9, 3, 2, 1, None, 4096, 8192, 0.5)
    CudaLauncher.__call__(run, 3, 2, 1, 9, 77, binary.packed_metadata, None, None, None, 4096, 8192, 0.5, 128, True)
    run.global_scratch_size, run.launch_pdl = 64, False  # memory for tensor descriptors
    jit._bind(SimpleNamespace(__name__="kernel"), binary, [128, True], False)(9, 3, 2, 1, 1 << 20, 4096, 8192, 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(_allocation, "_allocator", SimpleNamespace(get=lambda: lambda size, align, stream: (1 << 20, size, stream)[size != 384]))
        CudaLauncher.__call__(run, 3, 2, 1, 9, 77, binary.packed_metadata, None, None, None, 4096, 8192, 0.5, 128, True)
    assert len(calls) == 4 and calls[0] == calls[1] and calls[2] == calls[3] and calls[2].count(1 << 20) == 1
    metadata.profile_scratch_size = 64
    with pytest.raises(ValueError, match="scratch"):
        jit._bind(SimpleNamespace(__name__="kernel"), binary, [], False)


def test_the_driver_is_told_of_shared_memory_and_triton_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a kernel is loaded, which it is where its `run` is asked for; a driver that refuses, or knows no such attribute, fails nothing. Nor is Triton told
    of an early start, which would compile the same binary once more."""
    early, told, answers = list[bool](), list[tuple[int, int, int]](), iter((0, 801, 0))

    class Binary:
        function, metadata = None, SimpleNamespace(global_scratch_size=0)

        @property
        def run(self) -> None:
            self.function = 77  # type: ignore[assignment]

    def bind(kernel: Any, binary: Any, constants: list[Any], ahead: bool) -> None:
        early.append(ahead)
        assert binary.run is None

    def attribute(function: Any, what: int, percent: int) -> int:
        told.append((function.value, what, percent))
        return next(answers)

    def warmup(*types: Any, **options: Any) -> Binary:
        told.append(tuple(options.items()))  # type: ignore[arg-type]
        return Binary()

    kernel = SimpleNamespace(arg_names=["x", "BD"], warmup=warmup)
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    monkeypatch.setattr(jit, "_bind", bind)
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.setattr(torch._C, name, None, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for driver in (SimpleNamespace(cuFuncSetAttribute=attribute), SimpleNamespace(cuFuncSetAttribute=attribute), SimpleNamespace(), None):
        monkeypatch.setattr(cuda, "open_driver", lambda driver=driver: driver)
        jit.Launcher(kernel, torch.device("cuda", 0), [torch.float16], {"BD": 4, jit.SHARE: 30, jit.EARLY: True})
    monkeypatch.setattr(cuda, "open_driver", lambda: SimpleNamespace(cuFuncSetAttribute=attribute))
    jit.Launcher(kernel, torch.device("cuda", 0), [torch.float16], {"BD": 4})
    compiled = (("grid", (1,)), ("BD", 4))
    assert told == [compiled, (77, 9, 30), compiled, (77, 9, 30), compiled, compiled, compiled] and early == [True] * 4 + [False]


@pytest.mark.parametrize("played", [True, False], ids=["interpreted", "compiled"])
def test_a_place_further_in_a_buffer_counts_elements(played: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "interpreted", lambda: played)
    work = jit.Workspace({"a": (3, torch.float32), "b": (300, torch.float16)})
    at, memory = work.take(torch.device("cpu"))
    found = work.beyond(at, "b", 7)
    assert (found.data_ptr() if played else found) == memory[work.offsets["b"] :].view(torch.float16)[7:].data_ptr()


def test_how_many_programs_a_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's answer times the multiprocessors; 0 where it has none."""
    asked = []

    def occupancy(each: Any, function: Any, threads: int, shared: Any) -> int:
        asked.append((function.value, threads, shared.value))
        each._obj.value = 6
        return 0

    binary = SimpleNamespace(function=77, metadata=SimpleNamespace(num_warps=2, shared=32800))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(cuda, "open_driver", lambda: SimpleNamespace(cuOccupancyMaxActiveBlocksPerMultiprocessor=occupancy))
    assert jit._resident(binary, torch.device("cuda", 0)) == 792 and asked == [(77, 64, 32800)]
    monkeypatch.setattr(cuda, "open_driver", lambda: SimpleNamespace())
    assert jit._resident(binary, torch.device("cuda", 0)) == 0


def test_options_with_changes_are_one_object_for_each_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher is found by the identity of its options."""
    monkeypatch.setattr(jit, "interpreted", lambda: False)
    one, like = {"BN": 64, "PAST": True}, {"BN": 64, "PAST": True}
    changed = jit.varied(one, PAST=False, **{jit.EARLY: True})
    assert changed == {"BN": 64, "PAST": False, jit.EARLY: True} and one == like
    assert jit.varied(one, **{jit.EARLY: True, "PAST": False}) is changed and jit.varied(like, PAST=False, **{jit.EARLY: True}) is not changed
    assert jit.varied(one, PAST=True) is one and jit.varied(one, PAST=False) is not changed
    monkeypatch.setattr(jit, "interpreted", lambda: True)
    assert jit.varied(one, **{jit.EARLY: True, jit.SHARE: 30}) is one  # which knows neither
