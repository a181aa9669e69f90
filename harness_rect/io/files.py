"""Files and folders that are written atomically, and checks that they can be written."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from harness_rect.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to; renamed to ``path`` at the end, removed on failure.

    Missing folders are created. The content is flushed to the disk before the file is renamed, its new name
    after that, and the file has the permissions of any new file.
    """
    temporary = _temporary(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        yield temporary
        _finish(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if (named := _named(error, path)) is not None:
            raise named from error
        raise


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` to write to; renamed at the end, removed on failure.

    ``folder`` must not exist, or must be empty (see :func:`check_output`).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder.parent, folder.name) as temporary:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _finish(path)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
            flush(folder.parent)
    except BaseException as error:
        if (named := _named(error, folder)) is not None:
            raise named from error
        raise


def _named(error: BaseException, path: Path) -> OSError | None:
    """An error of the system in writing ``path``, with that name in place of a temporary one or none.

    safetensors has an error of its own, with the system's number in its text; so does tokenizers.
    """
    if type(error) in (SafetensorError, Exception) and (found := re.search(r"os error (\d+)", str(error))):
        return OSError(int(found[1]), os.strerror(int(found[1])), str(path))
    if not isinstance(error, OSError) or error.errno is None:
        return None
    name = error.filename
    ours = name is None or (isinstance(name, str | Path) and Path(name).name.endswith(".tmp"))
    return OSError(error.errno, error.strerror, str(path)) if ours else None


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder in ``parent``, removed at the end."""
    temporary = _temporary(parent, name)
    try:
        temporary.mkdir(mode=0o700)
        yield temporary
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        except KeyboardInterrupt:  # while it is removed
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary(parent: Path, name: str) -> Path:
    """A name that is not there. It is chosen before anything is made, so that Ctrl-C then leaves nothing."""
    return parent / f".{name[:100]}.{secrets.token_hex(8)}.tmp"


def _finish(path: Path) -> None:
    """Give a file or folder the permissions of a new one, and flush its content to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    # Files of tempfile and safetensors are readable by their owner only.
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    flush(path)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def acquired(path: Path) -> FileLock:
    """The lock of a file, held. Its folder is made, and made again where a process removes it meanwhile."""
    for _ in range(5):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            (lock := FileLock(path)).acquire()
            return lock
    raise FileNotFoundError(errno.ENOENT, "its folder is removed again and again", str(path))


def expanded(path: str) -> str:
    """A path with ``~`` and ``~user`` replaced.

    Raises:
        UserError: the path is empty, or there is no such user.
    """
    if not path.strip():
        raise UserError("a path is empty; leave the argument out, or give one")
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found):
        raise UserError(f"{path}: there is no user {found.split('/')[0][1:]!r} whose folder ~ could mean")
    return found


def shown(path: Path) -> str:
    """The path as text that can be written; bytes of a name that are not UTF-8 become ``\\udcff``."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def check_output(folder: Path, resumable: bool = False, besides: Collection[str] = ()) -> None:
    """Check, before long work starts, that ``folder`` is new or empty and can be written.

    Args:
        resumable: hidden files, which hold the state of unfinished work, are allowed.
        besides: names of other files that are allowed.

    Raises:
        UserError: it is not.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: exists already and is a file; give a folder")
    names = {path.name for path in folder.iterdir()} - set(besides) if folder.is_dir() else set()
    if any(not (resumable and name.startswith(".")) for name in names):
        raise UserError(f"{folder}: exists already; give another folder or remove it")
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """Check that files can be created in a folder, which need not exist.

    Raises:
        UserError: they cannot.
    """
    check_parent(folder / "file", folder)


def check_parent(path: Path, named: Path | None = None) -> None:
    """Check that ``path`` and missing folders above it can be created.

    Args:
        named: is what the message names instead.

    Raises:
        UserError: they cannot.
    """
    path = path.absolute()
    named = named or path
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise UserError(f"{named}: {link} is a link to what does not exist; remove the link")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{named}: cannot be created: {parent} is not a folder that can be written to")


def check_file(path: Path, option: str) -> None:
    """Check, before long work starts, that the file ``path`` can be written or replaced.

    Args:
        option: the argument that gives it, for messages: ``--output``.

    Raises:
        UserError: it cannot.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; expected a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {path}: is a device or a pipe; expected a file")
    check_parent(path)
