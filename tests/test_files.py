"""Files that appear whole or not at all, and targets that are refused before the work."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessa_deploy import files
from sessa_deploy.contract import MANIFEST_FILE, MODEL_FILE
from sessa_deploy.errors import UserError
from sessa_deploy.files import check_folder, check_target, refuse_inside_bundle, whole, write_whole

NOBODY = 65534


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


def bundle(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in (MANIFEST_FILE, MODEL_FILE):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """A folder of a user who is not root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


@pytest.fixture
def umask() -> Iterator[int]:
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def test_a_new_file_has_the_bits_of_open_and_an_older_one_keeps_its_own(tmp_path: Path, umask: int) -> None:
    write_whole(tmp_path / "new", "größe")
    assert (tmp_path / "new").read_bytes() == "größe".encode() and stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_whole(tmp_path / "new", b"other")
    assert (tmp_path / "new").read_bytes() == b"other" and stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("mine"), OSError("of another file"), MemoryError()])
def test_whatever_stops_the_block_leaves_the_older_file_and_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "f").write_text("older")
    with pytest.raises(type(error)) as caught, whole(tmp_path / "f") as stream:
        stream.write(b"half")
        assert len(names(tmp_path)) == 2
        raise error
    assert caught.value is error and (tmp_path / "f").read_text() == "older" and names(tmp_path) == ["f"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files._Raw.write

    def full(self: files._Raw, data: bytes) -> int:
        monkeypatch.setattr(files._Raw, "write", real)
        with open("/dev/full", "wb", buffering=0) as device:
            try:
                return device.write(data)
            except OSError as error:
                self.failed = error
                raise RuntimeError("a library's own words") from None

    monkeypatch.setattr(files._Raw, "write", full)
    with pytest.raises(UserError, match=r"the log cannot be written: got .*No space left on device\); fix: free space there, or choose another --log"):
        write_whole(tmp_path / "f", "text", "--log", "the log")
    assert names(tmp_path) == []


def test_what_cannot_be_made_durable_or_renamed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(UserError, match="Input/output error"):
                write_whole(tmp_path / "f", "text")
        assert names(tmp_path) == []


def test_dev_full_and_a_fifo_and_dev_null_are_written_directly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"):
        write_whole("/dev/full", "text", "--json")
    write_whole("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "fifo")
    check_target(tmp_path / "fifo")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
    reader.start()
    write_whole(tmp_path / "fifo", "through")
    reader.join()
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and names(tmp_path) == ["fifo"]


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_is_continued_not_replaced(tmp_path: Path, name: str, to: str) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = ("import sys; from sessa_deploy.files import check_target, write_whole\n"
            f"print('before'); check_target({name!r}); write_whole({name!r}, 'json\\n'); print('after')")
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE if to == "pipe" else out, text=True, check=True)
    assert (done.stdout if to == "pipe" else (tmp_path / "out").read_text()) == "before\njson\nafter\n"


def test_a_reader_that_has_gone_is_a_broken_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        write_whole(f"/dev/fd/{write}", "text")
    os.close(write)


def test_links_stay_and_what_they_lead_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/real").write_text("older")
    (tmp_path / "link").symlink_to("data/real")
    (tmp_path / "dangling").symlink_to("data/new")
    write_whole(tmp_path / "link", "newer")
    write_whole(tmp_path / "dangling", "made")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "data/real").read_text() == "newer" and (tmp_path / "data/new").read_text() == "made"
    assert names(tmp_path) == ["dangling", "data", "link"] and names(tmp_path / "data") == ["new", "real"]
    (tmp_path / "loop").symlink_to("loop")
    for call in (lambda: write_whole(tmp_path / "loop", "x"), lambda: check_target(tmp_path / "loop")):
        with pytest.raises(UserError, match="symbolic links"):
            call()


def test_a_mount_point_is_filled_where_it_cannot_be_renamed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("older and longer")
    inode = (tmp_path / "f").stat().st_ino

    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    write_whole(tmp_path / "f", "newer")
    assert (tmp_path / "f").read_text() == "newer" and (tmp_path / "f").stat().st_ino == inode and names(tmp_path) == ["f"]
    with pytest.raises(UserError, match="busy"):
        write_whole(tmp_path / "g", "newer")
    assert names(tmp_path) == ["f"]


def test_what_killed_writers_left_is_swept_but_not_what_a_writer_holds(tmp_path: Path) -> None:
    for name, age in ((".f.01234567.part", 100), (".f.89abcdef.part", 0), (".f.part", 100), (".g.01234567.part", 100)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, times=(1e9, 1e9) if age else None)
    with whole(tmp_path / "f") as first:
        held = next(x for x in tmp_path.iterdir() if x.name.startswith(".f.") and x.stat().st_mtime > 1e9 and x.name != ".f.89abcdef.part")
        os.utime(held, times=(1e9, 1e9))
        write_whole(tmp_path / "f", "second")
        first.write(b"first")
    assert names(tmp_path) == [".f.89abcdef.part", ".f.part", ".g.01234567.part", "f"] and (tmp_path / "f").read_text() == "first"


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * 255), "text")
    write_whole(tmp_path / ("ß" * 127), "text")
    for call in (lambda: write_whole(tmp_path / ("x" * 256), "text"), lambda: check_target(tmp_path / ("x" * 256))):
        with pytest.raises(UserError, match="name too long"):
            call()
    assert len(names(tmp_path)) == 2


def test_an_archive_can_be_written_through_it(tmp_path: Path) -> None:
    with whole(tmp_path / "a.zip") as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("member", "text")
    assert zipfile.ZipFile(tmp_path / "a.zip").read("member") == b"text"


def test_targets_that_cannot_be_written_are_found_before_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, word in ((tmp_path / "missing/x", "there is no folder"), (tmp_path / "file/x", "Not a directory"), (tmp_path / "folder", "it is a folder"),
                       ("/proc/x", "cannot be written"), ("/dev/fd/987", "Bad file descriptor"), ("", "it is a folder")):
        with pytest.raises(UserError, match=word) as caught:
            check_target(path, "--json")
        assert "--json" in str(caught.value)
        with pytest.raises(UserError):
            write_whole(path, "text", "--json")
    for path in (tmp_path / "new", tmp_path / "file", "/dev/null", "/dev/full", "/dev/stdout", tmp_path / "folder/../new"):
        check_target(path, "--json")
    for path in (tmp_path / "file", tmp_path / "file/x", "/proc/x/y"):
        with pytest.raises(UserError):
            check_folder(path, "--dump")
    for path in (tmp_path, tmp_path / "folder", tmp_path / "a/b/c"):
        check_folder(path, "--dump")
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == []


def test_permissions_are_respected(own_folder: Path) -> None:
    (own_folder / "own").write_text("older")
    (own_folder / "locked").write_text("older")
    (own_folder / "locked").chmod(0o444)
    with pytest.raises(UserError, match="Permission denied"):
        check_target(own_folder / "locked")
    with pytest.raises(UserError, match="Permission denied"):
        write_whole(own_folder / "locked", "x")
    own_folder.chmod(0o555)
    try:
        for call in (lambda: check_target(own_folder / "new"), lambda: check_folder(own_folder / "a"), lambda: write_whole(own_folder / "new", "x")):
            with pytest.raises(UserError, match="Permission denied"):
                call()
        check_target(own_folder / "own")
        write_whole(own_folder / "own", "newer")  # the file is ours, its folder is not
        assert (own_folder / "own").read_text() == "newer"
    finally:
        own_folder.chmod(0o755)


def test_no_output_lands_inside_a_bundle_by_any_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = bundle(tmp_path / "b")
    (inner / "engines/sm90").mkdir(parents=True)
    (tmp_path / "link").symlink_to(inner)
    (tmp_path / "deep").symlink_to(inner / "engines/sm90")
    (tmp_path / "to-model").symlink_to(inner / MODEL_FILE)
    (tmp_path / "blob").write_text("")
    (inner / "into-cache").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(inner / "engines")
    roads = [inner / "r.html", "r.html", "../r.html", "./sm90/../r.html", tmp_path / "link/r.html", tmp_path / "deep/r.html", tmp_path / "deep/../r.html",
             tmp_path / "to-model", inner / "into-cache", inner / "new/deep/r.html", inner]
    for path in roads:
        for check in (check_target, check_folder, refuse_inside_bundle):
            with pytest.raises(UserError, match="inside a bundle"):
                check(path, "--report")
    for path in (tmp_path / "r.html", "../../r.html", tmp_path / "link/../r.html", tmp_path / "bb"):
        refuse_inside_bundle(path)
        check_target(path)
    refuse_inside_bundle(inner, itself=False)
    with pytest.raises(UserError, match="inside a bundle"):
        refuse_inside_bundle(inner / "other", itself=False)
    check_folder(inner / "engines/new", inside=True)
