"""The layouts in which people have checkpoints: what is taken, in which order, and what is refused in which words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nobody import as_nobody
from safetensors.torch import save_file
from test_checkpoint import CONFIG, model_of, refused, same

from sessa_deploy.checkpoint import load_checkpoint, save_checkpoint
from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def state_of(seed: int = 0, prefix: str = "") -> dict[str, Any]:
    return {prefix + k: v.detach().clone().contiguous() for k, v in model_of(seed=seed).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    path = tmp_path / "ckpt"
    path.mkdir()
    CONFIG.save(path)
    return path


def linked(source: Path, root: Path, revision: str = "abc123") -> Path:
    """A repository in a hub's cache: every file of `source` a link into blobs/."""
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, root / "blobs" / f"{revision}{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{revision}{i}")
    return snapshot


def pickled_shards(folder: Path) -> None:
    state = state_of()
    halves = {"pytorch_model-00001-of-00002.bin": list(state)[::2], "pytorch_model-00002-of-00002.bin": list(state)[1::2]}
    for file, names in halves.items():
        torch.save({n: state[n] for n in names}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, names in halves.items() for n in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shard", [10**9, 4000], ids=["single", "sharded"])
def test_a_hub_s_cache_of_links(tmp_path: Path, shard: int) -> None:
    snapshot = linked(save_checkpoint(model_of(), tmp_path / "c", max_shard_bytes=shard), tmp_path / "models--me--it")
    same(load_checkpoint(snapshot), model_of())
    notes: list[str] = []
    same(load_checkpoint(tmp_path / "models--me--it", note=notes.append), model_of())  # its only snapshot
    assert len(notes) == 1 and "abc123" in notes[0]
    linked(save_checkpoint(model_of(seed=1), tmp_path / "d"), tmp_path / "models--me--it", "def456")
    refused(tmp_path / "models--me--it", "several snapshots", "abc123", "def456")
    (tmp_path / "models--me--it" / "refs").mkdir()
    (tmp_path / "models--me--it" / "refs" / "main").write_text("def456\n")
    same(load_checkpoint(tmp_path / "models--me--it"), model_of(seed=1))
    os.unlink(os.path.realpath(next(snapshot.glob("*.safetensors"))))
    refused(snapshot, "a link to nothing", "download")


def test_a_trainer_s_folder(folder: Path) -> None:
    torch.save(state_of(), folder / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"):
        torch.save({"lr": 1e-3}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    same(load_checkpoint(folder), model_of())
    (folder / "pytorch_model.bin").rename(folder / "weights.pt")
    same(load_checkpoint(folder), model_of())
    torch.save(state_of(seed=1), folder / "best.pt")
    refused(folder, "several files of weights", "best.pt, weights.pt", "name one of them")
    for name in ("best.pt", "weights.pt"):
        (folder / name).unlink()
    refused(folder, "holds no weights")
    pickled_shards(folder)
    same(load_checkpoint(folder), model_of())
    same(load_checkpoint(folder / "pytorch_model.bin.index.json"), model_of())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    refused(folder, "lacks shards", "pytorch_model-00002-of-00002.bin")


def test_safetensors_win_over_pickles(folder: Path) -> None:
    torch.save(state_of(seed=1), folder / "pytorch_model.bin")
    save_file(state_of(), folder / "model.safetensors")
    same(load_checkpoint(folder), model_of())
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    same(load_checkpoint(folder), model_of())


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.", "module.", "model._orig_mod.", "module.model.", "net.module._orig_mod."])
def test_lightning_and_what_wraps_a_model(folder: Path, prefix: str) -> None:
    torch.save({"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5.0", "state_dict": state_of(prefix=prefix), "loops": {}, "callbacks": {},
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}], "lr_schedulers": [], "hyper_parameters": {"lr": 1.0}}, folder / "last.ckpt")
    same(load_checkpoint(folder), model_of())
    same(load_checkpoint(folder / "last.ckpt"), model_of())


def test_shards_without_an_index(tmp_path: Path) -> None:
    path = save_checkpoint(model_of(), tmp_path / "c", max_shard_bytes=4000)
    (path / "model.safetensors.index.json").unlink()
    refused(path, "shards without an index", "model.safetensors.index.json", "model-00001-of-")
    for file in sorted(path.glob("model-*"))[1:]:
        file.unlink()
    refused(path, "shards without an index")
    save_file(state_of(), path / "model-00001-of-00001.safetensors")
    (next(path.glob("model-00001-of-0000[2-9]*"), None) or next(path.glob("model-00001-of-000[1-9]*"))).unlink()
    same(load_checkpoint(path), model_of())  # one of one is whole


def test_an_index_under_another_name(tmp_path: Path) -> None:
    path = save_checkpoint(model_of(), tmp_path / "c", max_shard_bytes=4000)
    (path / "model.safetensors.index.json").rename(path / "model.fp32.safetensors.index.json")
    same(load_checkpoint(path), model_of())


def test_a_run_folder(tmp_path: Path) -> None:
    save_checkpoint(model_of(), tmp_path / "run" / "checkpoint")
    torch.save({"step": 1}, tmp_path / "run" / "resume.pt")
    (tmp_path / "run" / "log.csv").write_text("step\n")
    notes: list[str] = []
    same(load_checkpoint(tmp_path / "run", note=notes.append), model_of())
    assert notes == [f"{tmp_path / 'run'}: taking {tmp_path / 'run' / 'checkpoint'}, the checkpoint of a training run"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    save_file(state_of(), folder / "model.safetensors")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    refused(folder, name, "Git LFS pointer", "git lfs pull")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


ODD: dict[str, Callable[[Path], Any]] = {
    "a pipe": fifo, "a folder": lambda p: p.mkdir(), "a device": lambda p: p.symlink_to("/dev/zero"), "symbolic links": loop,
    "link to nothing": lambda p: p.symlink_to("absent"), "": lambda p: p.write_bytes(b""),
}


@pytest.mark.timeout(100)
@pytest.mark.parametrize("words", ODD)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt", "model.safetensors.index.json", "config.json",
                                  "generation_config.json"])
def test_what_is_no_file_is_refused_and_nothing_waits(folder: Path, name: str, words: str) -> None:
    if "config" in name:
        save_file(state_of(), folder / "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    ODD[words](folder / name)
    refused(folder, words)
    if "config" not in name and words != "a folder":
        refused(folder / name, words)


def test_files_that_may_not_be_read(public: Path) -> None:
    folder = save_checkpoint(model_of(), public / "ckpt")
    for locked in (folder / "model.safetensors", folder / "config.json", folder):
        before = locked.stat().st_mode
        locked.chmod(0)
        try:
            text = as_nobody(lambda: refused(folder))
        finally:
            locked.chmod(before)
        assert "Permission denied" in text and str(locked) in text


def test_a_bundle_is_no_checkpoint(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    (folder / "model.onnx").write_text("")
    refused(folder, "is a bundle, not a checkpoint")


# Configurations --------------------------------------------------------------------------------------------------------------------


def with_keys(folder: Path, **keys: Any) -> Path:
    save_file(state_of(), folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **keys}))
    return folder


def test_the_keys_of_a_hub_are_passed_over_in_one_line(folder: Path) -> None:
    notes: list[str] = []
    with_keys(folder, _name_or_path="x", use_cache=True, initializer_range=0.02, transformers_version="5.24", architectures=["SessaLM"], id2label={},
              hidden_size=16, num_attention_heads=4)
    same(load_checkpoint(folder, note=notes.append), model_of())
    assert len(notes) == 1 and "ignored _name_or_path, hidden_size, id2label, initializer_range" in notes[0] and "architectures" not in notes[0]


@pytest.mark.parametrize("keys", [{"quantization_config": {}}, {"rope_scaling": 2}, {"hidden_size": 32}, {"n_laters": 2}, {"sliding_window": 8}])
def test_keys_that_would_change_the_arithmetic_are_not(folder: Path, keys: dict[str, Any]) -> None:
    refused(with_keys(folder, **keys), "unknown keys", next(iter(keys)))


def test_several_ends_of_a_text(folder: Path, tmp_path: Path) -> None:
    model = load_checkpoint(with_keys(folder, eos_token_id=[20, 3, 20]))
    assert model.config.eos_token_id == (20, 3) == model.config.eos_token_ids
    again = save_checkpoint(model, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == [20, 3] and load_checkpoint(again).config == model.config
    assert SessaConfig.from_dict({**CONFIG.to_dict(), "eos_token_id": []}).eos_token_ids == () == CONFIG.eos_token_ids
    for bad in ([21], [True], ["a"], [[1]], [1.0], {"a": 1}, [-1], "x"):
        refused(with_keys(folder, eos_token_id=bad), "eos_token_id is out of range")


def test_the_ends_of_a_generation_config_count(folder: Path) -> None:
    notes: list[str] = []
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 20], "temperature": 0.6}')
    assert load_checkpoint(with_keys(folder, eos_token_id=20), note=notes.append).config.eos_token_ids == (20, 7)
    assert len(notes) == 1 and "7 ends a text too" in notes[0]
    (folder / "generation_config.json").write_text('{"eos_token_id": 99}')
    refused(folder, "generation_config.json", "eos_token_id is out of range", "got 99")


def test_a_fix_fits_where_the_value_came_from(folder: Path) -> None:
    assert f"fix: correct {folder / 'config.json'}" in refused(with_keys(folder, n_heads=3))
    with pytest.raises(UserError) as caught:
        SessaConfig(d_model=16, n_layers=1, n_heads=3, vocab_size=9)
    assert "config.json" not in str(caught.value)
