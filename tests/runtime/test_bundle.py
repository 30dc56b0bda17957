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
from nobody import as_nobody

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


def test_missing_and_resized_files_are_refused(made):
    (made / "model.onnx").write_bytes(b"short")
    refused(made, "model.onnx", "size")
    (made / "model.onnx").unlink()
    refused(made, "model.onnx", "missing")


def litter(made: Path) -> dict[str, bytes]:
    """Put beside a bundle what people keep there; name -> content."""
    mine = {"README.md": b"card", ".gitattributes": b"*.onnx filter=lfs", ".git/HEAD": b"ref", ".git/objects/aa/b": b"o", ".cache/x": b"", "engines/mine": b"m",
            "engines/other/model.plan": b"foreign code"}
    for name, content in mine.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    (made / "dangling").symlink_to("nowhere")
    return mine


def untouched(made: Path, mine: dict[str, bytes]) -> bool:
    return all((made / name).read_bytes() == content for name, content in mine.items()) and (made / "dangling").is_symlink()


def test_files_that_are_not_the_bundle_s_are_left_alone_and_never_loaded(made):
    mine = litter(made)
    bundle = Bundle.open(made)
    assert bundle.names() == ["model.onnx", "tokenizer.json"] and "engines/other/model.plan" not in bundle
    with pytest.raises(UserError, match="has no engines/other"):
        bundle.file("engines/other/model.plan")
    with BundleWriter(made) as writer:
        (writer.folder / "model.onnx").write_bytes(b"model two")
        writer.commit(CONFIG, "fp32", VERSIONS)
    assert writer.kept == [".cache/", ".git/", ".gitattributes", "README.md", "dangling", "engines/"]
    assert Bundle.open(made).names() == ["model.onnx"] and not (made / "tokenizer.json").exists() and untouched(made, mine)
    add_files(made, {"parity.json": b"{}", "engines/sm90/model.plan": b"plan"})
    assert "parity.json" in Bundle.open(made) and untouched(made, mine)
    add_files(made, {"parity.json": b"[]"}, remove=["engines/sm90/model.plan"])
    assert Bundle.open(made).read("parity.json") == b"[]" and untouched(made, mine) and not (made / "engines/sm90").exists()
    assert [p.name for p in made.parent.iterdir()] == ["b"] and not [p for p in made.iterdir() if publish.is_staging(p)]


def test_a_file_that_has_the_name_of_a_new_one_is_not_struck(made, tmp_path):
    for name in ("parity.json", "engines"):
        (made / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=name):
            add_files(made, {name if "." in name else f"{name}/x/model.plan": b"{}"})
        assert (made / name).read_bytes() == b"mine" and len(Bundle.open(made).names()) == 2
        (made / name).unlink()
    (tmp_path / "elsewhere").mkdir()
    (made / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="engines"):
        add_files(made, {"engines/x/model.plan": b"{}"})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_data_that_an_engine_library_would_find_by_itself_is_not_foreign(made):
    (made / "model.onnx.data").write_bytes(b"weights")
    refused(made, "model.onnx.data")


def linked(made: Path, root: Path) -> Path:
    """The bundle as a hub's cache holds it: every file a link into blobs/."""
    snapshot = root / "snapshots" / "abc"
    for i, file in enumerate(sorted(p for p in made.rglob("*") if p.is_file())):
        blob, link = root / "blobs" / f"blob{i}", snapshot / file.relative_to(made)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_links_are_followed_and_every_byte_is_checked(tmp_path):
    made = write(tmp_path / "b", **{"engines/one/model.plan": b"plan"}).path
    snapshot = linked(made, tmp_path / "models--me--it")
    (snapshot / "README.md").symlink_to("../../blobs/blob0")
    assert Bundle.open(snapshot).read("engines/one/model.plan") == b"plan"
    shutil.move(made / "engines", tmp_path / "aside")
    (made / "engines").symlink_to(tmp_path / "aside")
    assert Bundle.open(made).read("engines/one/model.plan") == b"plan"
    for path, target in ((snapshot, os.path.realpath(snapshot / "model.onnx")), (made, tmp_path / "aside/one/model.plan")):
        raw = bytearray(Path(target).read_bytes())
        raw[0] ^= 1
        Path(target).write_bytes(raw)
        with pytest.raises(UserError, match="does not match its checksum"):
            Bundle.open(path)
        os.unlink(target)
        with pytest.raises(UserError, match=r"link to nothing|is missing"):
            Bundle.open(path)


def test_a_download_cache_is_not_written_to_nor_advised_to_be(tmp_path, made):
    snapshot = linked(made, tmp_path / "models--me--it")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for work in (lambda: write(snapshot), lambda: write(snapshot / "deeper"), lambda: add_files(snapshot, {"parity.json": b"{}"})):
        with pytest.raises(UserError, match="download cache") as caught:
            work()
        assert str(snapshot) not in str(caught.value.fix).replace(f"cp -rL {snapshot}", "")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert str(snapshot) not in Bundle.open(snapshot).export_hint(" --opset 17") and str(made) in Bundle.open(made).export_hint()
    Path(os.path.realpath(snapshot / "model.onnx")).write_bytes(b"x")
    text = refused(snapshot, "another place", "--out BUNDLE")
    assert f"--out {snapshot}" not in text


def test_a_bundle_of_links_of_one_s_own_keeps_them(made, tmp_path):
    shutil.move(made / "model.onnx", tmp_path / "large")
    (made / "model.onnx").symlink_to("../large")
    add_files(made, {"parity.json": b"{}"})
    assert os.readlink(made / "model.onnx") == "../large" and Bundle.open(made).names() == ["model.onnx", "parity.json", "tokenizer.json"]
    write(made, b"model two")
    assert not (made / "model.onnx").is_symlink() and (tmp_path / "large").read_bytes() == b"model one" * 50


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
@pytest.mark.parametrize(("make", "words"), [
    (os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (lambda p: os.symlink("/dev/zero", p), "a device"),
    (lambda p: os.symlink(Path(p).name, p), "symbolic links"),
    (lambda p: os.symlink("absent", p), "link to nothing"), (lambda p: open(p, "wb").close(), "manifest.json|size"),
    (lambda p: Path(p).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 450\n"), "Git LFS pointer.*git lfs pull"),
])
def test_what_is_no_plain_file_is_refused_and_nothing_waits(made, name, make, words):
    (made / name).unlink()
    make(made / name)
    with pytest.raises(UserError, match=words) as caught:
        Bundle.open(made)
    assert name in str(caught.value) or "manifest.json" in str(caught.value)


def test_what_was_checked_is_what_is_loaded(made):
    bundle = Bundle.open(made)
    bundle.require_unchanged()
    os.utime(made / "model.onnx")  # other times, the same bytes
    bundle.require_unchanged()
    (made / "model.onnx").write_bytes(b"model six" * 50)
    with pytest.raises(UserError, match=r"model\.onnx does not match"):
        bundle.require_unchanged()
    (made / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(UserError, match=r"tokenizer\.json does not match"):
        bundle.read("tokenizer.json")


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
