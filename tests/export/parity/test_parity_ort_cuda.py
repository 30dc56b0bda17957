"""The rung of ONNX Runtime on a GPU, on fakes of its CUDA provider and the driver: with our kernels, captured and not, and with the plain graph."""

from __future__ import annotations

from pathlib import Path

import fake_onnxruntime
import pytest
from fake_cuda import HostCuda
from parity_fixtures import judge

from sessa_deploy.export.parity import engines
from sessa_deploy.export.parity.drive import Engine
from sessa_deploy.export.parity.rungs import RungJob
from sessa_deploy.plugins import library
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort import engine, session


def test_our_kernels_are_judged_captured_and_not_and_the_report_says_whose_ran(
    material: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle, cudas = Bundle.open(material[0]), list[HostCuda]()

    def cuda() -> HostCuda:
        made = HostCuda()
        cudas.append(made)
        fake.cuda = made
        return made

    fake_onnxruntime.install(monkeypatch, tmp_path, cuda)
    fake = fake_onnxruntime.make(HostCuda(), bundle.model)
    monkeypatch.setattr(engine, "load", lambda: fake)
    plain = session.open_session
    monkeypatch.setattr(session, "open_session", lambda bundle, provider, threads: plain(bundle, "cpu", 1))

    def opened(job: RungJob) -> Engine:
        return engines.open_ort_cuda(Bundle.open(job.bundle), 1)

    report = judge(*material, opened)
    assert report.passed, report.line()
    judged = {(c.mode, c.case) for c in report.comparisons if c.rung == "ort"}
    assert {mode for mode, _ in judged} == {"graph", "session", "greedy", "eager"} and {"ragged", "chunked"} <= {case for _, case in judged}
    assert any(report.cases[case]["poison"] for _, case in judged)
    assert report.rungs["ort"]["versions"][engines.KERNELS].startswith("libsessa_ort.so (sha256 ") and sum(c.replays for c in cudas) > 0
    captured = {s.cuda_options["enable_cuda_graph"] for s in fake.sessions}
    assert captured == {"0", "1"}

    monkeypatch.setattr(library, "find", lambda **_: (_ for _ in ()).throw(library.UserError("no library", fix="sessa-deploy plugin build --for ort")))
    found = opened(RungJob("ort-cuda", tmp_path, material[0]))
    assert found.eager is None and found.versions[engines.KERNELS].startswith("ONNX Runtime's own (") and "plugin build --for ort" in found.versions["kernels"]
