"""The recall checkpoint: small, carded, and it answers in the words of its tokenizer, from PyTorch and from `run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "paper"))

import deploy
import mqar

from sessa_deploy.checkpoint import load_checkpoint, read_state
from sessa_deploy.cli import main
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import Tokenizer

RECALL = Path(__file__).resolve().parents[1] / "checkpoints" / "recall"
FACTS = json.loads((RECALL / deploy.FACTS).read_text(encoding="utf-8"))
SPEC = mqar.Spec(key=FACTS["key"])


def test_it_is_small_and_carded() -> None:
    assert sum(x.stat().st_size for x in RECALL.iterdir()) <= deploy.LARGEST
    config, state = read_state(RECALL)
    assert {x.dtype for x in state.values()} == {torch.float32} and config.bos_token_id == mqar.BOS
    assert Tokenizer(RECALL).vocab_size <= config.vocab_size and config.max_context >= max(map(SPEC.tokens, SPEC.test_gaps))
    card = (RECALL / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("Apache-2.0", "arXiv 2604.18580", "H200", "best partial rule", "run.py --tasks mqar"))
    assert all(f"{100 * y:.2f}%" in card for scores in FACTS["accuracy"].values() for y in scores.values())


def test_engines_answer_as_pytorch_does() -> None:
    """Of the road that made it, on the same questions: fp32 to the last answer but one in a thousand, fp16 but for what its rounding decides."""
    exact, engines = FACTS["accuracy"][deploy.EXACT], {name: scores for name, scores in FACTS["accuracy"].items() if name != deploy.EXACT}
    assert exact.keys() == {f"G {gap}" for gap in SPEC.test_gaps} and {"ort, fp32", "ort, fp16"} <= engines.keys() == FACTS["changed"].keys()
    for name, scores in engines.items():
        allowed = deploy.ALLOWED if name.endswith("fp32") else 0.005
        assert all(abs(scores[point] - exact[point]) <= allowed + 1e-9 and FACTS["changed"][name][point] <= 10 * allowed for point in exact), name


def test_it_recalls_what_it_was_told() -> None:
    """Questions in words, through its tokenizer, answered in words."""
    tokenizer, batch = Tokenizer(RECALL), mqar.test_batch(SPEC, SPEC.gaps[0], 20, split=5)
    rows = [tokenizer.encode_first(deploy.words_of(SPEC, row[1:]), mqar.BOS) for row in batch.tokens]
    assert rows == batch.tokens.tolist()
    answers = deploy.torch_answers(load_checkpoint(RECALL), batch)
    assert tokenizer.decode(answers[0].tolist()) == deploy.words_of(SPEC, answers[0])
    assert (answers == batch.labels).mean() > 0.75  # the best partial rule has 0.5


@pytest.mark.study
def test_an_engine_and_run_answer_likewise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle made now, in ONNX Runtime; `run` says in a word what PyTorch chooses."""
    model, batch = load_checkpoint(RECALL), mqar.test_batch(SPEC, SPEC.gaps[0], 20, split=5)
    main(["export", str(RECALL), "--out", str(tmp_path / "bundle"), "--precision", "fp32"])
    exact = deploy.torch_answers(model, batch)
    with Session(tmp_path / "bundle", "ort", max_batch=deploy.ROWS) as session:
        assert (deploy.engine_answers(session, batch) == exact).all()
    capsys.readouterr()
    main(["run", str(tmp_path / "bundle"), "--max-new-tokens", "1", "--prompt", deploy.words_of(SPEC, batch.tokens[0, 1 : batch.at[0, 0] + 1])])
    assert capsys.readouterr().out.split() == [deploy.words_of(SPEC, exact[0, :1])]
