"""A bundle that is written: it is whole or not there, whoever dies when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from nobody import as_nobody
from small_bundle import CONFIG, VERSIONS, litter, untouched, write

from sessa_deploy.errors import UserError
from sessa_deploy.runtime import bundle as bundle_module
from sessa_deploy.runtime import publish
from sessa_deploy.runtime.bundle import Bundle, BundleWriter, add_files, write_bundle


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
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"not empty.*thesis\.txt"):
        write(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.txt").exists() and (mine / "manifest.json").exists()
    shutil.rmtree(tmp_path / "home")
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


def test_kill_amid_many_renames(tmp_path, monkeypatch):
    """A bundle among somebody's own files is replaced file by file: killed anywhere, it is the old one, the new one or none, and the files stay."""
    monkeypatch.setattr(publish.os, "fsync", lambda handle: None)
    out, line, states = tmp_path / "b", 0, []
    while True:
        shutil.rmtree(out, ignore_errors=True)
        write(out)
        mine = litter(out)
        line += 12
        killed = killed_at(line, lambda: write(out, b"two", **{"engines/new/model.plan": b"p"}))
        try:
            states.append(Bundle.open(out).model.read_bytes())
        except UserError as error:
            assert "manifest.json" in str(error)
            states.append(None)
        assert untouched(out, mine)
        if not killed:
            break
        write(out, b"three")
        assert Bundle.open(out).model.read_bytes() == b"three" and untouched(out, mine) and Bundle.open(out).names() == ["model.onnx", "tokenizer.json"]
        assert [p.name for p in tmp_path.iterdir()] == ["b"] and not [p for p in out.iterdir() if publish.is_staging(p)]
    assert set(states) == {b"model one" * 50, None, b"two"} and states == sorted(states, key=[b"model one" * 50, None, b"two"].index)


def test_a_hostile_journal_reaches_nothing_outside(made, tmp_path):
    (tmp_path / "precious").write_text("x")
    for stale in (["../precious"], [str(tmp_path / "precious")]):
        left = made / ".b.sessa-tmp-0123"
        left.mkdir()
        (left / ".sessa-journal.json").write_text(json.dumps({"marker": "manifest.json", "stale": stale}))
        shutil.copy(made / "manifest.json", left / "manifest.json")
        write(made, b"model two")
        assert (tmp_path / "precious").exists() and not left.exists()


@pytest.mark.parametrize("older", ["none", "empty", "bundle"])
def test_a_mount_point_is_filled_from_the_inside(tmp_path, monkeypatch, older):
    out = tmp_path / "b"
    if older != "none":
        out.mkdir()
    if older == "bundle":
        write(out, more=b"1")
    real = os.rename

    def busy(source, target):
        if Path(source) == out or Path(target) == out:
            raise OSError(16, "Device or resource busy")
        real(source, target)

    def exchange(a, b):
        raise OSError(16, "Device or resource busy")

    out.mkdir(exist_ok=True)
    inode = out.stat().st_ino
    monkeypatch.setattr(publish.os, "rename", busy)
    monkeypatch.setattr(publish, "_exchange", exchange)
    for known in (False, True):  # found out by the failure, or known from the list of mounts
        if known:
            monkeypatch.setattr(publish, "_mounts", lambda: {str(out)})
        write(out, b"model two")
        add_files(out, {"parity.json": b"{}"})
        assert Bundle.open(out).names() == ["model.onnx", "parity.json", "tokenizer.json"] and out.stat().st_ino == inode
        assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "model.onnx", "parity.json", "tokenizer.json"]
    with pytest.raises(RuntimeError), BundleWriter(out) as writer:
        assert writer.folder.parent == out
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["b"] and not [p for p in out.iterdir() if publish.is_staging(p)]


def test_a_folder_whose_parent_may_not_be_written(public):
    (public / "out").mkdir()
    (public / "out").chmod(0o777)
    public.chmod(0o555)
    def work() -> str:
        write(public / "out")
        add_files(public / "out", {"parity.json": b"{}"})
        write(public / "out", b"model two")
        with pytest.raises(UserError, match="Permission denied"):
            write(public / "new" / "deeper")
        return ",".join(Bundle.open(public / "out").names())
    try:
        assert as_nobody(work) == "model.onnx,tokenizer.json"
        assert [p.name for p in public.iterdir()] == ["out"]
    finally:
        public.chmod(0o755)


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("."))
    write(Path("."), b"model two")
    assert Bundle.open(".").model.read_bytes() == b"model two" and sorted(os.listdir(".")) == ["manifest.json", "model.onnx", "tokenizer.json"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "full")
    with pytest.raises(UserError, match=r"a\.txt"):
        write(Path("."))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="no such place"):
        write(Path("."))


def test_folders_made_on_the_way_go_with_a_failure(tmp_path):
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


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
