"""The training loop: it learns, it resumes bit for bit, and what it leaves behind is whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sessa_deploy.checkpoint import load_checkpoint
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLM
from sessa_deploy.train import Run, TrainOptions, held_out_bits, learning_rate, parameter_groups, resume, start, train
from sessa_deploy.train_log import read_log
from sessa_deploy.train_sample import held_out_sample

SHAPE: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"f{i}.txt").write_text("".join(f"the {w} is {w * 2} and not {w + i}\n" for w in range(40)))
    return folder


def options(text: Path, out: Path, **changes: Any) -> TrainOptions:
    base: dict[str, Any] = {"steps": 12, "batch_size": 4, "context": 24, "eval_every": 5, "save_every": 100, "lr": 5e-3, "device": "cpu", "held_out": 0.2}
    return TrainOptions(data=str(text), out=str(out), **(base | changes))


def curve(out: Path) -> list[tuple[Any, ...]]:
    return [dataclasses.astuple(row)[:-1] for row in read_log(out)]  # all but the seconds


def run_to_end(text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return train(start(options(text, out, **changes), **SHAPE))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_and_resumed_half_equal_the_whole_bit_for_bit(text: Path, tmp_path: Path, accumulate: int) -> None:
    whole = run_to_end(text, tmp_path / "a", accumulate=accumulate)
    train(start(options(text, tmp_path / "b", accumulate=accumulate), **SHAPE), stop_at=7)
    assert len(curve(tmp_path / "b")) == 7
    halves = train(resume(tmp_path / "b"))
    assert curve(tmp_path / "a") == curve(tmp_path / "b") and len(curve(tmp_path / "a")) == 12
    ours, theirs = load_checkpoint(tmp_path / "a" / "checkpoint").state_dict(), load_checkpoint(tmp_path / "b" / "checkpoint").state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert whole["held_out_bits_per_byte"] == halves["held_out_bits_per_byte"]


def test_a_seed_is_a_run_and_another_seed_another(text: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run_to_end(text, tmp_path / "a", steps=3)
    assert torch.equal(before, torch.get_rng_state())  # the caller's generator is left alone
    torch.rand(3)
    run_to_end(text, tmp_path / "b", steps=3)
    run_to_end(text, tmp_path / "c", steps=3, seed=1)
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")


def test_it_learns_and_reports(text: Path, tmp_path: Path) -> None:
    report = run_to_end(text, tmp_path / "a", steps=60, batch_size=8, context=32, lr=1e-2)
    out = tmp_path / "a"
    assert sorted(x.name for x in out.iterdir()) == ["checkpoint", "checkpoint-best", "log.csv", "loss.png", "report.json", "resume.pt"]
    assert sorted(x.name for x in (out / "checkpoint").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((out / "report.json").read_text())["held_out_bits_per_byte"] == report["held_out_bits_per_byte"] < 4.0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and report["tokens"] == 60 * 8 * 32
    rows = read_log(out)
    assert rows[-1].loss < 0.6 * rows[0].loss and [r.step for r in rows if r.held_out is not None] == list(range(5, 61, 5))
    assert rows[0].lr == pytest.approx(1e-2) and rows[-1].lr < 1e-4


def test_stored_in_sixteen_bits(text: Path, tmp_path: Path) -> None:
    report = run_to_end(text, tmp_path / "a", steps=2, store="fp16")
    assert math.isfinite(report["held_out_bits_per_byte"])
    from sessa_deploy.checkpoint import read_state

    assert read_state(tmp_path / "a" / "checkpoint")[1]["lm_head.weight"].dtype == torch.float16


def test_held_out_bits_count_every_token_once(text: Path, tmp_path: Path) -> None:
    model: SessaLM = start(options(text, tmp_path / "a"), **SHAPE).model.eval()
    tokens = torch.randint(0, 257, (101,), dtype=torch.int32)
    with torch.no_grad():
        whole = F.cross_entropy(model(tokens[None, :-1].long())[0], tokens[1:].long(), reduction="sum").item() / math.log(2) / 77
    assert held_out_bits(model, tokens, 77, context=100, batch_size=3) == pytest.approx(whole, rel=1e-5)
    assert held_out_bits(model, tokens, 77, context=500, batch_size=3) == pytest.approx(whole, rel=1e-5)
    # Every token once whatever the windows: for a model that ignores its context the windows do not matter.
    model.embedding.weight.data.zero_()
    for context, stride in ((10, 10), (10, 3), (17, 8), (100, 1), (7, 1)):
        flat = held_out_bits(model, tokens, 77, context=context, batch_size=4, stride=stride)
        assert flat == pytest.approx(held_out_bits(model, tokens, 77, context=100, batch_size=1), rel=1e-5), (context, stride)


def test_weight_decay_on_matrices_only(text: Path, tmp_path: Path) -> None:
    model = start(options(text, tmp_path / "a"), **SHAPE).model
    decayed, plain = parameter_groups(model, 0.1)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(p.dim() == 2 and min(p.shape) > 1 for p in decayed["params"]) and plain["weight_decay"] == 0
    assert any(p is model.layers[0].mixer.gamma_ctx.weight for p in plain["params"])


def test_schedule(text: Path) -> None:
    opts = options(text, Path("x"), steps=100, warmup=10, lr=1.0)
    lrs = [learning_rate(opts, i, i / 100) for i in range(101)]
    assert lrs[0] == pytest.approx(0.1) and max(lrs) == pytest.approx(lrs[9], abs=0.01) and lrs[100] == 0
    assert lrs[9:] == sorted(lrs[9:], reverse=True)


def test_the_clock_can_end_the_schedule(text: Path, tmp_path: Path) -> None:
    report = run_to_end(text, tmp_path / "a", steps=10**6, max_seconds=1.0)
    assert 0 < report["steps"] < 10**5 and read_log(tmp_path / "a")[-1].lr < 1e-3


def test_ctrl_c_saves_and_resumes(text: Path, tmp_path: Path) -> None:
    run = start(options(text, tmp_path / "b", steps=30), **SHAPE)
    with pytest.raises(KeyboardInterrupt):
        train(run, on_row=lambda row, _: os.kill(os.getpid(), signal.SIGINT) if row.step == 10 else None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(curve(tmp_path / "b")) == 10
    train(resume(tmp_path / "b"))
    run_to_end(text, tmp_path / "a", steps=30)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_log_that_ran_ahead_of_the_save_is_cut(text: Path, tmp_path: Path) -> None:
    train(start(options(text, tmp_path / "b"), **SHAPE), stop_at=7)
    log = (tmp_path / "b" / "log.csv").read_text()
    (tmp_path / "b" / "log.csv").write_text(log + "8,9.0,0.1,1.0,5,,1.0\n")
    train(resume(tmp_path / "b"))
    run_to_end(text, tmp_path / "a")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_refusals(text: Path, tmp_path: Path) -> None:
    run_to_end(text, tmp_path / "a", steps=2)
    with pytest.raises(UserError, match="already holds a run"):
        start(options(text, tmp_path / "a"), **SHAPE)
    with pytest.raises(UserError, match="no run to resume"):
        resume(tmp_path / "nowhere")
    (text / "f0.txt").write_text("changed")
    with pytest.raises(UserError, match="not the one this run began with"):
        resume(tmp_path / "a")
    (tmp_path / "a" / "resume.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        resume(tmp_path / "a")
    for changes in ({"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"precision": "int8"}, {"seed": -1}, {"max_seconds": -1.0}):
        with pytest.raises(UserError, match=next(iter(changes))):
            options(text, tmp_path / "c", **changes)
    with pytest.raises(UserError, match="too little training text"):
        start(options(text, tmp_path / "c", context=100_000), **SHAPE)
    with pytest.raises(UserError, match="no such device"):
        start(options(text, tmp_path / "c", device="toaster"), **SHAPE)
    with pytest.raises(UserError, match="not divisible"):
        start(options(text, tmp_path / "c"), d_model=16, n_layers=1, n_heads=3)
    assert not (tmp_path / "c").exists()


def test_divergence_is_said_and_the_last_save_stays(text: Path, tmp_path: Path) -> None:
    run: Run = start(options(text, tmp_path / "a", save_every=1), **SHAPE)
    train(run, stop_at=3)
    run.model.embedding.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="diverged"):
        train(run)
    assert resume(tmp_path / "a").step == 3


def test_a_sample_of_the_held_out_text_stays_with_the_checkpoint(text: Path, tmp_path: Path) -> None:
    run = start(options(text, tmp_path / "run", keep_sample=True, data_licence="CC0-1.0", steps=2), **SHAPE)
    train(run)
    folder = tmp_path / "run" / "checkpoint"
    held = "".join((text / name).read_text() for name in run.corpus.held_out_files)
    assert held and (folder / "held_out.txt").read_text() == held
    card = (folder / "MODEL_CARD.md").read_text()
    assert "CC0-1.0" in card and run.corpus.held_out_files[0] in card and "`text`" in card
    run_to_end(text, tmp_path / "without", steps=2)
    assert not (tmp_path / "without" / "checkpoint" / "held_out.txt").exists()
    with pytest.raises(UserError, match="--keep-sample"):
        options(text, tmp_path / "x", data_licence="CC0-1.0")


def test_a_sample_is_cut_at_a_whole_character(text: Path, tmp_path: Path) -> None:
    run = start(options(text, tmp_path / "run"), **SHAPE)
    long = np.frombuffer(("\u20ac" * 40_000).encode(), np.uint8).astype(np.int32)  # a byte's token is its value
    corpus = dataclasses.replace(run.corpus, held_out=np.concatenate([[run.corpus.separator], long]))
    found = held_out_sample(corpus, run.tokenizer)
    assert found == "\u20ac" * (65_536 // 3) and len(found.encode()) <= 65_536
    documents = np.concatenate([np.append(np.full(3000, 97 + i % 26, np.int32), corpus.separator) for i in range(40)])
    found = held_out_sample(dataclasses.replace(corpus, held_out=documents), run.tokenizer)
    assert found == "".join(chr(97 + i % 26) * 3000 for i in range(40))[:65_536], "many documents, one behind the other, fill it"
