"""The bundle: what is refused, and that it is whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime import bundle as bundle_module
from sessa_deploy.runtime import publish
from sessa_deploy.runtime.bundle import Bundle, BundleWriter, add_files, write_bundle

CONFIG = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257)
VERSIONS = {"sessa_deploy": "0", "torch": "0", "onnx": "0"}


def write(out: Path, model: bytes = b"model one" * 50, **more: bytes) -> Bundle:
    return write_bundle(out, {"model.onnx": model, "tokenizer.json": b"{}", **more}, CONFIG, "fp32", VERSIONS)


@pytest.fixture
def made(tmp_path) -> Path:
    return write(tmp_path / "b").path


def change_manifest(path: Path, edit) -> None:
    data = json.loads((path / "manifest.json").read_text())
    edit(data)
    (path / "manifest.json").write_text(json.dumps(data))


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        Bundle.open(path)
    text = str(caught.value)
    assert "\n" not in text and "sessa-deploy export" in text, text
    for word in words:
        assert word in text, text
    return text


def test_a_bundle_is_read_back(made):
    bundle = Bundle.open(made)
    assert (bundle.config, bundle.precision, bundle.opset, bundle.versions) == (CONFIG, "fp32", 17, VERSIONS)
    assert bundle.names() == ["model.onnx", "tokenizer.json"] and "model.onnx" in bundle
    assert bundle.model.read_bytes() == b"model one" * 50
    data = json.loads((made / "manifest.json").read_text())
    assert data["files"]["model.onnx"] == {"sha256": hashlib.sha256(b"model one" * 50).hexdigest(), "size": 450}
    assert [p.name for p in made.parent.iterdir()] == ["b"]
    with pytest.raises(UserError, match=r"parity\.json"):
        bundle.file("parity.json")


def test_same_input_same_bytes(tmp_path):
    first, second = write(tmp_path / "a").path, write(tmp_path / "x" / "c").path
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in ("manifest.json", "model.onnx"))


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_one_flipped_bit_is_refused(made, name):
    raw = bytearray((made / name).read_bytes())
    raw[-1] ^= 1
    (made / name).write_bytes(raw)
    refused(made, name, "checksum")
    assert Bundle.open(made, verify=False).precision == "fp32"


def test_missing_extra_and_resized_files_are_refused(made):
    (made / "engines").mkdir()
    Bundle.open(made)
    (made / "engines" / "model.plan").write_bytes(b"code")
    refused(made, "engines/model.plan")
    shutil.rmtree(made / "engines")
    (made / "model.onnx").write_bytes(b"short")
    refused(made, "model.onnx", "size")
    (made / "model.onnx").unlink()
    refused(made, "model.onnx", "missing")


def test_links_and_special_files_are_refused(made, tmp_path):
    shutil.copy(made / "model.onnx", tmp_path / "outside")
    (made / "model.onnx").unlink()
    (made / "model.onnx").symlink_to(tmp_path / "outside")
    refused(made, "model.onnx", "link")
    (made / "model.onnx").unlink()
    os.mkfifo(made / "model.onnx")
    refused(made, "model.onnx", "plain file")
    (made / "model.onnx").unlink()
    shutil.copy(tmp_path / "outside", made / "model.onnx")
    (made / "more").symlink_to(tmp_path)
    refused(made, "more")


def test_a_folder_link_inside_a_listed_name_is_refused(tmp_path):
    made = write(tmp_path / "b", **{"engines/one/model.plan": b"plan"}).path
    shutil.move(made / "engines", tmp_path / "aside")
    (made / "engines").symlink_to(tmp_path / "aside")
    refused(made, "engines/one/model.plan", "link")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "", "C:x", "manifest.json", "a\nb"])
def test_names_that_leave_the_folder_are_refused(made, name):
    def edit(data):
        data["files"][name] = data["files"]["model.onnx"]
    change_manifest(made, edit)
    refused(made)
    with pytest.raises(UserError):
        add_files(made, {name: b"x"})
    assert sorted(p.name for p in made.parent.iterdir()) == ["b"]


@pytest.mark.parametrize("edit", [
    lambda d: d.update(schema_version=2), lambda d: d.update(schema_version=True), lambda d: d.pop("config"), lambda d: d["config"].update(d_model=7),
    lambda d: d["config"].update(unknown=1), lambda d: d.update(precision="int8"), lambda d: d.update(opset="17"), lambda d: d.update(files=[]),
    lambda d: d["files"].pop("model.onnx"), lambda d: d["files"].update({"model.onnx": {}}), lambda d: d.update(versions={"torch": 2}),
    lambda d: d["files"]["model.onnx"].update(sha256=d["files"]["model.onnx"]["sha256"].upper()), lambda d: d["files"]["model.onnx"].update(size=True),
    lambda d: d["files"]["model.onnx"].update(size=-1), lambda d: d["files"].update({"tokenizer.json": None}),
])
def test_a_bad_manifest_is_refused_in_one_line(made, edit):
    change_manifest(made, edit)
    refused(made, "manifest.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 100000, b"3"])
def test_a_manifest_that_is_no_object_is_refused(made, raw):
    (made / "manifest.json").write_bytes(raw)
    refused(made, "manifest.json")


def test_no_bundle_there(tmp_path, made):
    refused(tmp_path / "absent", "absent")
    refused(made / "model.onnx")
    (made / "manifest.json").unlink()
    refused(made, "manifest.json")
    leftover = tmp_path / ".b.sessa-tmp-0123"
    write(tmp_path / "c").path.rename(leftover)
    refused(leftover, "killed export")


def test_a_bundle_is_replaced_and_other_folders_are_not(tmp_path, made):
    write(made, b"model two")
    assert Bundle.open(made).model.read_bytes() == b"model two"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "another kind of manifest"}')
    for out in (mine, made / "model.onnx"):
        with pytest.raises(UserError, match="no bundle"):
            write(out)
    (made / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write(made)
    assert (made / "notes.txt").exists() and (mine / "manifest.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "empty", "mine"]


def test_a_damaged_bundle_can_be_exported_again(made):
    (made / "model.onnx").write_bytes(b"x")
    (made / "tokenizer.json").unlink()
    write(made, b"model two")
    Bundle.open(made)


def test_writer_discards_on_error_and_refuses_early(tmp_path):
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "b") as writer:
        (writer.folder / "model.onnx").write_bytes(b"half")
        assert not (tmp_path / "b").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="absent"):
        write_bundle(tmp_path / "b", {"model.onnx": tmp_path / "absent"}, CONFIG, "fp32", VERSIONS)
    with pytest.raises(UserError, match=r"model\.onnx"):
        write_bundle(tmp_path / "b", {"tokenizer.json": b""}, CONFIG, "fp32", VERSIONS)
    with pytest.raises(UserError, match="precision"):
        write_bundle(tmp_path / "b", {"model.onnx": b""}, CONFIG, "fp64", VERSIONS)
    assert list(tmp_path.iterdir()) == []


def test_sources_are_copied_or_moved(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"graph")
    made = write_bundle(tmp_path / "b", {"model.onnx": source}, CONFIG, "fp32", VERSIONS)
    source.write_bytes(b"later")
    Bundle.open(made.path)
    write_bundle(tmp_path / "b", {"model.onnx": source}, CONFIG, "fp32", VERSIONS, move=True)
    assert not source.exists() and Bundle.open(made.path).model.read_bytes() == b"later"


def test_files_are_added_later(made):
    bundle = Bundle.open(made)
    inode = (made / "model.onnx").stat().st_ino
    bundle = add_files(bundle, {"parity.json": b"{}", "engines/sm90-8.6.0-fp16/model.plan": b"plan"})
    assert "parity.json" in bundle and Bundle.open(made).manifest == bundle.manifest
    assert (made / "model.onnx").stat().st_ino == inode, "an unchanged file is not copied"
    bundle = add_files(made, {"parity.json": b"[1]"}, remove=["engines/sm90-8.6.0-fp16/model.plan"])
    assert Bundle.open(made).names() == ["model.onnx", "parity.json", "tokenizer.json"] == bundle.names()
    assert bundle.file("parity.json").read_bytes() == b"[1]" and [p.name for p in made.parent.iterdir()] == ["b"]
    with pytest.raises(UserError, match=r"model\.onnx"):
        add_files(bundle, {"model.onnx": b"other"})
    with pytest.raises(UserError):
        add_files(made.parent / "absent", {"parity.json": b""})


def test_a_link_to_a_bundle_works(made, tmp_path):
    (tmp_path / "link").symlink_to(made)
    add_files(Bundle.open(tmp_path / "link"), {"parity.json": b""})
    write(tmp_path / "link", b"model two")
    assert (tmp_path / "link").is_symlink() and Bundle.open(made).model.read_bytes() == b"model two"


def test_a_full_disk_is_one_line_and_leaves_nothing(made, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.os, "fsync", full)
    for work in (lambda: write(made, b"model two"), lambda: write(made.parent / "new"), lambda: add_files(made, {"parity.json": b"{}"})):
        with pytest.raises(UserError, match="No space left"):
            work()
    assert [p.name for p in made.parent.iterdir()] == ["b"] and Bundle.open(made).model.read_bytes() == b"model one" * 50
    monkeypatch.setattr(bundle_module, "hash_file", full)
    with pytest.raises(UserError, match=r"model\.onnx cannot be read"):
        Bundle.open(made)


def killed_at(line: int, work) -> bool:
    """Fork, run `work`, and SIGKILL the child as it reaches its `line`-th line of bundle.py or publish.py; whether it was killed."""
    files = {bundle_module.__file__, publish.__file__}
    child = os.fork()
    if child == 0:
        left = [line]

        def trace(frame, event, argument):
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        code = 1
        try:
            sys.settrace(trace)
            work()
            code = 0
        finally:
            sys.settrace(None)
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(("kind", "swap"), [("new", True), ("replace", True), ("replace", False), ("add", True), ("add", False)])
def test_kill_at_many_lines(tmp_path, monkeypatch, kind, swap):
    """swap: the file system can exchange two folders in one step; else two renames do it."""
    monkeypatch.setattr(publish.os, "fsync", lambda handle: None)  # a killed process loses nothing that it wrote
    if not swap:
        monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    out = tmp_path / "b"
    work = {"new": lambda: write(out), "replace": lambda: write(out, b"two"), "add": lambda: add_files(out, {"parity.json": b"{}"})}[kind]
    line, kills, states, moments = 0, 0, set(), 0
    while True:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        if kind != "new":
            write(out)
        line += 1 if line < 12 else 4
        killed = killed_at(line, work)
        kills += killed
        if out.exists():
            bundle = Bundle.open(out)
            states.add((bundle.model.read_bytes(), "parity.json" in bundle))
        else:
            states.add(None)
            if kind != "new":
                moments += 1
                with pytest.raises(UserError, match="mv "):
                    Bundle.open(out)
        for path in tmp_path.iterdir():
            assert path == out or publish.is_staging(path)
        if killed:
            (add_files(out, {"parity.json": b"{}"}) if kind == "add" else work())
            assert [p.name for p in tmp_path.iterdir()] == ["b"], "the next writer cleans up"
            Bundle.open(out)
        else:
            break
    assert kills > 30
    assert states - {None} == {"new": {(b"model one" * 50, False)}, "replace": {(b"model one" * 50, False), (b"two", False)},
                               "add": {(b"model one" * 50, False), (b"model one" * 50, True)}}[kind]
    assert moments == 0 or not swap


def test_a_living_writer_is_left_alone(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        (writer.folder / "model.onnx").write_bytes(b"slow")
        write(tmp_path / "b")
        assert writer.folder.exists()
        writer.commit(CONFIG, "fp32", VERSIONS)
    assert Bundle.open(tmp_path / "b").model.read_bytes() == b"slow"
