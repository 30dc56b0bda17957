"""Scores against the numpy oracle: windows, strides, chunks, first tokens, graphs with and without all logits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from numpy_model import NumpyBackend

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.scoring import score
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

TEXT = "def f(x):\n    return 2 * x  # größe\n"


def log_probabilities(tiny, ids) -> np.ndarray:
    """log p (T-1,) of ids[1:] under the oracle."""
    logits = tiny.logits(ids[:-1])
    logits -= logits.max(-1, keepdims=True)
    return logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))


@pytest.fixture(params=["last logits", "all logits"])
def bundle(request, tiny_bundle, all_logits_bundle):
    return all_logits_bundle if request.param == "all logits" else tiny_bundle


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_text_of_one_window(bundle, tiny, chunk):
    ids = list(TEXT.encode())
    with Session(bundle, "ort", max_batch=2, chunk=chunk, threads=1) as session:
        session.prefill([None, [5, 6]])
        heard = []
        found = score(session, TEXT, progress=lambda done, of: heard.append((done, of)))
        assert score(session, ids) == found == score(session, np.array(ids))
        assert session.tokens(0) == [] and session.tokens(1) == [5, 6], "sequence 0 alone is used"
    assert found.log_likelihood == pytest.approx(log_probabilities(tiny, ids).sum(), rel=1e-5)
    assert (found.tokens, found.bytes, found.first_scored, found.windows) == (len(ids) - 1, len(ids) - 1, False, 1)
    assert found.perplexity == pytest.approx(math.exp(-found.log_likelihood / found.tokens))
    assert found.bits_per_byte == pytest.approx(-found.log_likelihood / math.log(2) / found.bytes)
    assert heard[-1] == (len(ids) - 1,) * 2 and heard == sorted(heard)


@pytest.mark.parametrize(("capacity", "stride"), [(16, None), (16, 16), (34, 1), (16, 5), (1, None), (37, 3), (38, None)])
def test_windows_score_each_token_once(bundle, tiny, capacity, stride):
    ids = list(TEXT.encode())
    with Session(bundle, "ort", capacity=capacity, chunk=5, threads=1) as session:
        found = score(session, TEXT, stride)
    step, expected, at, last = stride or max(1, capacity // 2), 0.0, 0, 0
    windows = 0
    while last < len(ids) - 1:
        seen = ids[at : at + capacity + 1]
        rows = log_probabilities(tiny, seen)
        expected += rows[last - at :].sum()
        last, at, windows = at + len(seen) - 1, at + step, windows + 1
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.windows, found.window, found.stride) == (len(ids) - 1, windows, capacity, step)


def test_behind_a_first_token_every_token_counts(tmp_path, tiny):
    config = dataclasses.replace(tiny.config, bos_token_id=256)
    made = write_bundle(tmp_path / "b", {"model.onnx": b"", "tokenizer.json": byte_level_tokenizer().encode()}, config, "fp32", {})
    found = score(Session(made, NumpyBackend(tiny), chunk=4), "hi")
    assert found.log_likelihood == pytest.approx(log_probabilities(tiny, [256, *b"hi"]).sum())
    assert (found.tokens, found.bytes, found.first_scored) == (2, 2, True)
    assert score(Session(made, NumpyBackend(tiny)), "h").tokens == 1


def test_ids_without_a_tokenizer_and_what_is_refused(tmp_path, tiny, monkeypatch):
    made = write_bundle(tmp_path / "b", {"model.onnx": b""}, tiny.config, "fp32", {})
    session = Session(made, NumpyBackend(tiny))
    found = score(session, [1, 2, 3])
    assert found.bytes is None and found.bits_per_byte is None and found.to_dict()["bits_per_byte"] is None and found.tokens == 2
    for bad in ([], [1], [1, 257], [1, -1], [1, True], "text"):
        with pytest.raises(UserError) as caught:
            score(session, bad)
        assert "\n" not in str(caught.value)
    for stride in (0, 65, 1.5, True):
        with pytest.raises(UserError, match="stride"):
            score(session, [1, 2, 3], stride)
    monkeypatch.setattr(tiny, "w", {**tiny.w, "norm.weight": np.full(16, np.nan)})
    with pytest.raises(SessaError, match="finite"):
        score(session, [1, 2, 3])
