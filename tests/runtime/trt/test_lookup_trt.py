"""Prompt lookup on the TensorRT backend, over fakes of tensorrt and the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drafting import PROMPTS, close_to_plain
from test_trt import build  # noqa: F401 - a fixture

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.trt import api as trt_api


@pytest.mark.parametrize("build", ["8.6.0", "10.9.0"], indirect=True)
@pytest.mark.parametrize("shared", [True, False])
def test_texts_are_those_of_plain_decoding(build: Callable[..., Any], tiny_bundle: Bundle, eager: None, shared: bool,  # noqa: F811
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few rows are CUDA graphs, each of a context of its own, where TensorRT lets contexts share a profile."""
    backend, cuda, bundle = build(all_logits=True, batch=1)
    if not shared:

        def refuse(*given: Any) -> None:
            raise SessaError("TensorRT refused optimisation profile 0")

        monkeypatch.setattr(trt_api, "context", refuse)
    drafting, plain = Session(bundle, backend, lookup=5), Session(tiny_bundle, OrtBackend(tiny_bundle, threads=1))
    assert close_to_plain(drafting, plain, PROMPTS[:5], 28) == 0
    assert drafting.drafts.drafted > 0
    recorded = {step.tokens for step, *_ in backend._graphs}
    if backend._trt.__version__ == "8.6.0":
        assert backend._few_rows == {} and recorded == {1}, "it gives a profile to one context alone, and must not be asked for another"
    else:
        assert (len(backend._few_rows) > 1 and recorded > {1}) if shared else recorded == {1}
    read = cuda.read_back
    backend.step_row_picks(0, np.array([1, 2, 3]))
    assert cuda.read_back == read
    backend.close()
    assert cuda.closed and cuda.graphs == {}


@pytest.mark.parametrize("build", ["10.9.0"], indirect=True)
def test_an_engine_without_all_logits_is_refused(build: Callable[..., Any]) -> None:  # noqa: F811
    backend, _, bundle = build(batch=1)
    with pytest.raises(UserError, match=r"--all-logits.*build its engine again"):
        Session(bundle, backend, lookup=4)
