"""Files and folders that are written atomically, and checks that they can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness_rect.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; renamed to ``path`` at the end, removed on failure.

    Missing folders are created. The content is flushed to the disk before the file is renamed, and the file
    has the permissions of any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _finish(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write to; renamed at the end, removed on failure.

    ``folder`` must not exist, or must be empty (see :func:`check_output`).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, folder.name) as temporary:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _finish(path)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``parent``, removed at the end."""
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".tmp"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(path: Path) -> None:
    """Give a file or folder the permissions of a new one, and flush a file's content to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    if path.is_dir():
        path.chmod(0o777 & ~umask)
        return
    path.chmod(0o666 & ~umask)  # files of tempfile and safetensors are readable by their owner only
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def check_output(folder: Path, resumable: bool = False) -> None:
    """Check, before long work starts, that ``folder`` is new or empty and can be written.

    Args:
        resumable: hidden files, which hold the state of unfinished work, are allowed.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: exists already and is a file; give a folder")
    if folder.is_dir() and any(not (resumable and path.name.startswith(".")) for path in folder.iterdir()):
        raise UserError(f"{folder}: exists already; give another folder or remove it")
    check_parent(folder / "file")


def check_parent(path: Path) -> None:
    """Check that ``path`` and missing folders above it can be created.

    Raises:
        UserError: they cannot.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be created: {parent} is not a folder that can be written to")
