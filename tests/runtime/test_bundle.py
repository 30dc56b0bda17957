"""A bundle that is read: what is refused, and that what was checked is what is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from small_bundle import CONFIG, VERSIONS, change_manifest, litter, refused, untouched, write

from sessa_deploy.errors import UserError
from sessa_deploy.runtime import publish
from sessa_deploy.runtime.bundle import Bundle, BundleWriter, add_files


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


@pytest.mark.timeout(100)
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
    refused(tmp_path / "absent", "--out", "absent")
    refused(made / "model.onnx", "--out BUNDLE")  # export would not put one in a file's place
    (made / "manifest.json").unlink()
    refused(made, "manifest.json")
    leftover = tmp_path / ".b.sessa-tmp-0123"
    write(tmp_path / "c").path.rename(leftover)
    refused(leftover, "killed export")
