"""Training that begins with a checkpoint: every form of it, what is kept, what is refused, and what the run says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.cli import main
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.model import SessaLM
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer
from sessa_deploy.train import TrainOptions, resume, start, train

# A vocabulary larger than the tokenizer's, as models pad it, and special tokens that no tokenizer tells.
CONFIG = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, gamma_max=0.9, max_context=48, bos_token_id=256, eos_token_id=10,
                     pad_token_id=299)
SMALL: dict[str, Any] = {"steps": 2, "batch_size": 2, "context": 16, "device": "cpu", "held_out": 0.3}


@pytest.fixture(scope="module")
def model() -> SessaLM:
    torch.manual_seed(7)
    return SessaLM(CONFIG).eval()


def given(form: str, model: SessaLM, folder: Path) -> dict[str, str]:
    """A checkpoint written in one of the forms that `export` takes, and the options that name it."""
    folder.mkdir()
    save_checkpoint(model, folder / "c", tokenizer=byte_level_tokenizer(), max_shard_bytes=4000 if form == "sharded" else 10**9)
    if form in ("folder", "sharded"):
        assert (folder / "c" / "model.safetensors").exists() is (form == "folder")
        return {"init_from": str(folder / "c")}
    if form == "run":  # what train leaves behind
        (folder / "c").rename(folder / "checkpoint")
        (folder / "resume.pt").write_bytes(b"")
        (folder / "report.json").write_text("{}")
        return {"init_from": str(folder)}
    if form == "safetensors":
        return {"init_from": str(folder / "c" / "model.safetensors")}
    (folder / "c" / "model.safetensors").unlink()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "c" / "weights.pt")
    if form == "pt":
        return {"init_from": str(folder / "c" / "weights.pt")}
    (folder / "c" / "config.json").rename(folder / "elsewhere.json")
    return {"init_from": str(folder / "c" / "weights.pt"), "init_config": str(folder / "elsewhere.json")}


@pytest.mark.parametrize("form", ["folder", "sharded", "safetensors", "pt", "pt with config", "run"])
def test_a_run_begins_with_the_checkpoint_whatever_its_form(text: Path, tmp_path: Path, model: SessaLM, form: str) -> None:
    named = given(form, model, tmp_path / "from")
    run = start(TrainOptions(data=str(text), out=str(tmp_path / "run"), **SMALL, **named))
    assert run.config == CONFIG and run.tokenizer.to_json().strip() == byte_level_tokenizer() and run.corpus.separator == 10
    assert all(torch.equal(x, run.model.state_dict()[name]) for name, x in model.state_dict().items())
    assert not run.optimizer.state and run.step == 0 and run.model.training
    report = train(run)
    assert report["init_from"]["checkpoint"] == named["init_from"] and len(report["init_from"]["weights_sha256"]) == 64
    assert json.loads((tmp_path / "run" / "report.json").read_text())["init_from"] == report["init_from"]
    trained = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert trained.config == CONFIG and not torch.equal(trained.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    card = (tmp_path / "run" / "checkpoint" / "MODEL_CARD.md").read_text()
    assert named["init_from"] in card and report["init_from"]["weights_sha256"] in card and "2 steps" in card


def test_tied_weights_stay_tied_and_the_context_may_grow(text: Path, tmp_path: Path) -> None:
    save_checkpoint(SessaLM(SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, tie_word_embeddings=True, max_context=8)), tmp_path / "c")
    run = start(TrainOptions(data=str(text), out=str(tmp_path / "run"), init_from=str(tmp_path / "c"), **SMALL))
    assert run.model.lm_head.weight is run.model.embedding.weight
    assert run.config.max_context == 16 and run.config.eos_token_id is None and run.corpus.separator == 256  # the model knows none, the tokenizer does
    assert load_checkpoint(tmp_path / "c").config.max_context == 8


def test_several_ends_of_a_text_are_kept_and_the_first_parts_documents(text: Path, tmp_path: Path) -> None:
    save_checkpoint(SessaLM(SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, eos_token_id=(10, 256))), tmp_path / "c")
    train(start(TrainOptions(data=str(text), out=str(tmp_path / "run"), init_from=str(tmp_path / "c"), **SMALL)), stop_at=1)
    run = resume(tmp_path / "run")
    assert run.config.eos_token_ids == (10, 256) and run.corpus.separator == 10
    assert load_checkpoint(tmp_path / "run" / "checkpoint").config == run.config


def test_it_learns_on_from_where_the_checkpoint_was_and_resumes_without_it(text: Path, tmp_path: Path) -> None:
    base = start(TrainOptions(data=str(text), out=str(tmp_path / "a"), **(SMALL | {"steps": 60, "lr": 1e-2})), d_model=16, n_layers=1, n_heads=2)
    before = train(base)["held_out_bits_per_byte"]
    options = TrainOptions(data=str(text), out=str(tmp_path / "b"), init_from=str(tmp_path / "a" / "checkpoint"), **(SMALL | {"steps": 8, "lr": 1e-3}))
    first = train(start(options), stop_at=4)
    assert first["held_out_bits_per_byte"] < before + 0.5 < 7.0  # random weights are at 8 bits
    (tmp_path / "a").rename(tmp_path / "gone")
    report = train(resume(tmp_path / "b"))
    assert report["steps"] == 8 and report["init_from"] == first["init_from"]
    assert "8 steps" in (tmp_path / "b" / "checkpoint" / "MODEL_CARD.md").read_text()


def words(folder: Path, *tokens: str) -> str:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({token: i for i, token in enumerate(("[UNK]", "</s>", *tokens))}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(folder))
    return str(folder)


def test_refusals(text: Path, tmp_path: Path, model: SessaLM, capsys: pytest.CaptureFixture[str]) -> None:
    named = given("folder", model, tmp_path / "from")
    save_checkpoint(model, tmp_path / "bare")
    other, many = words(tmp_path / "other.json", "one", "two"), words(tmp_path / "many.json", *map(str, range(400)))
    (tmp_path / "same.json").write_text(byte_level_tokenizer())
    known, bare, both = ["--init-from", named["init_from"]], ["--init-from", str(tmp_path / "bare")], f"--d-model 32, and 16 in {named['init_from']}"
    for args, wanted in (
        ([*known, "--d-model", "32"], (both, "leave --d-model out")), ([*known, "--n-layers", "1"], ("--n-layers 1, and 2",)),
        ([*known, "--n-heads", "2"], ("--n-heads 2, and 4",)), ([*known, "--n-kv-heads", "4"], ("--n-kv-heads 4, and 2",)),
        ([*known, "--gamma-max", "0.999"], ("--gamma-max 0.999, and 0.9",)), ([*known, "--tie-word-embeddings"], ("--tie-word-embeddings", "and False")),
        ([*known, "--tokenizer", other], ("--tokenizer", "other.json", "same vocabulary")),
        (bare, ("has no tokenizer", "vocabulary of 300", "--tokenizer FILE")),
        ([*bare, "--tokenizer", many], ("more tokens", "402", "300")), (["--init-from", str(tmp_path / "none")], ("none",)),
        (["--config", str(tmp_path / "from" / "c" / "config.json")], ("--init-from",)), ([*known, "--config", str(tmp_path / "none.json")], ("none.json",)),
        (["--resume", *known], ("--init-from", "keeps its settings")),
    ):
        with pytest.raises(SystemExit) as done:
            main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--context", "16", "--device", "cpu", *args])
        error = capsys.readouterr().err
        assert done.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), (args, error)
        assert all(word in error for word in wanted) and not (tmp_path / "run").exists(), (args, error)
    # The same values and the same vocabulary are no contradiction.
    options = TrainOptions(data=str(text), out=str(tmp_path / "run"), tokenizer=str(tmp_path / "same.json"), **SMALL, **named)
    assert start(options, d_model=16, n_layers=2, n_kv_heads=2, gamma_max=0.9, tie_word_embeddings=False).config == CONFIG
    with_own = start(TrainOptions(data=str(text), out=str(tmp_path / "run2"), init_from=str(tmp_path / "bare"), tokenizer=str(tmp_path / "same.json"), **SMALL))
    assert with_own.tokenizer.vocab_size == Tokenizer(tmp_path / "same.json").vocab_size == 257
    with pytest.raises(UserError, match="d_model is not that of the checkpoint"):
        start(options, d_model=8)
