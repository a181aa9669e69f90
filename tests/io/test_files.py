"""Files and folders appear complete or not at all, and refuse what they would overwrite."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder
from harness_rect.io.files import (
    acquired,
    check_output,
    check_parent,
    folder_written_whole,
    temporary_folder,
    written_whole,
)


@pytest.fixture(autouse=True)
def _umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_appears_complete_with_the_permissions_of_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_whole(path) as temporary:
        temporary.write_text("content")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "content" and mode(path) == 0o640
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_complete_with_the_permissions_of_new_files(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)  # an empty one is replaced
    with folder_written_whole(folder) as temporary:
        (temporary / "file").write_text("content")
        (temporary / "file").chmod(0o600)
        assert not list(folder.iterdir())
    assert (folder / "file").read_text() == "content"
    assert (mode(folder), mode(folder / "file")) == (0o750, 0o640)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("written", [written_whole, folder_written_whole])
def test_a_failure_leaves_what_was_there(tmp_path: Path, written) -> None:
    path = tmp_path / "there"
    if written is written_whole:
        path.write_text("before")
    with pytest.raises(KeyboardInterrupt), written(path) as temporary:
        (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
        raise KeyboardInterrupt
    assert not path.exists() if written is folder_written_whole else path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path] * path.exists()


def test_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((tmp_path / "file").exists()))
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("content")
    assert synced == [False, True], "its content before it is renamed, its name afterwards"


def test_output_must_be_new_or_empty_and_can_be_created(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".unfinished").write_text("")
    check_output(tmp_path / "state", resumable=True)
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "state", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            check_output(taken)
    with pytest.raises(UserError, match=r"cannot be created: .*file is not a folder"):
        check_parent(tmp_path / "file" / "x")


def test_the_cache_may_lie_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HARNESS_RECT_CACHE", "~/kept")
    assert cache_folder("edits") == tmp_path / "kept" / "edits"


def test_ctrl_c_while_a_temporary_folder_is_made_or_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, remove = Path.mkdir, shutil.rmtree
    interrupted: list[Path] = []

    def made(folder: Path, *args, **given) -> None:
        make(folder, *args, **given)
        raise KeyboardInterrupt

    def removed(folder: Path, **given) -> None:
        if not interrupted:
            interrupted.append(folder)
            raise KeyboardInterrupt
        remove(folder, **given)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", made)
        with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path, "x"):
            pass
    monkeypatch.setattr(shutil, "rmtree", removed)
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path, "x"):
        pass
    assert interrupted and list(tmp_path.iterdir()) == []


def test_a_lock_is_had_where_its_folder_is_removed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir
    removed: list[Path] = []

    def make_and_lose(folder: Path, *args, **given) -> None:
        if not removed:  # its parent is gone
            removed.append(folder)
            raise FileNotFoundError(folder)
        make(folder, *args, **given)
        if len(removed) == 1:
            removed.append(folder)
            folder.rmdir()

    monkeypatch.setattr(Path, "mkdir", make_and_lose)
    monkeypatch.setattr("filelock._util.os.makedirs", lambda *args, **given: None, raising=False)
    lock = acquired(tmp_path / "cache" / "a.lock")
    assert len(removed) == 2 and lock.is_locked
    lock.release()
