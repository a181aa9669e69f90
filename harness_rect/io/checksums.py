"""SHA-256 checksums of kept files, and what is done with a damaged one: it is named, and set aside."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from harness_rect.errors import UserError

log = logging.getLogger(__name__)

#: The checksums of the other files of a folder, as ``sha256sum -c`` reads them.
SUMS = "SHA256SUMS"
#: No such file is larger, in bytes.
LARGEST = 2**20
#: How the comment of a zip file begins that holds its checksum.
ZIP_COMMENT = b"sha256:"
#: What the name of something set aside ends in, before a number.
ASIDE = ".damaged"


class Damaged(Exception):
    """A kept file is not as it was written; ``str(error)`` says in what, in one line."""


def file_sha256(path: Path, until: int | None = None) -> str:
    """sha256 (hex) of a file's content, or of its first ``until`` bytes.

    Raises:
        Damaged: there is no such file, or it is something else, such as a pipe.
    """
    if not path.is_file():
        raise Damaged(f"{path.name} is {'no file' if path.exists() else 'missing'}")
    digest = hashlib.sha256()
    left = path.stat().st_size if until is None else until
    with path.open("rb") as file:
        while block := file.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def write_zip_sum(path: Path) -> None:
    """End a zip file with a comment that holds the checksum of everything before its hexadecimal digits."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = ZIP_COMMENT + b"0" * 64
    end = path.stat().st_size - 64
    digits = file_sha256(path, end).encode("ascii")
    with path.open("r+b") as file:
        file.seek(end)
        file.write(digits)


def check_zip_sum(path: Path) -> None:
    """Check a zip file by the checksum in its comment; one without a comment is somebody else's, and passes.

    Raises:
        Damaged: the comment is another.
        BadZipFile, OSError: it is no zip file, or cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    if comment and comment != ZIP_COMMENT + file_sha256(path, path.stat().st_size - 64).encode("ascii"):
        raise Damaged("it is not the file that was written, by the checksum at its end")


def write_sums(folder: Path) -> None:
    """Write the checksums of all files that lie directly in a folder."""
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != SUMS]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, names: Sequence[str]) -> None:
    """Check the files of these names in a folder; others are left alone.

    Raises:
        Damaged: one is missing, has another checksum or none.
    """
    file_sha256(folder / SUMS)  # that it can be read at all
    sums = listed(folder)
    for name in names:
        if sums.get(name) != file_sha256(folder / name):
            raise Damaged(f"{name} is not the file that was written (by its checksum in {SUMS})")


def listed(folder: Path) -> dict[str, str]:
    """File name -> sha256 (hex), as the checksums of a folder have it; empty where there are none."""
    path = folder / SUMS
    if not path.is_file() or path.stat().st_size > LARGEST:
        return {}
    pairs = [line.split("  ", 1) for line in path.read_text("utf-8", "replace").splitlines()]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def check_if_listed(path: Path) -> None:
    """Check a file for which the folder may have a checksum.

    Raises:
        UserError: it has another one.
    """
    try:
        found = listed(path.parent).get(path.name)
        whole = found is None or found == file_sha256(path)
    except (OSError, Damaged) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not whole:
        raise UserError(f"{path}: is not the file that was written, by its checksum in {SUMS} beside it")


def set_aside(path: Path, what: str, problem: object) -> None:
    """Rename a damaged file or folder, so that it is not used, and say so in one line.

    Args:
        what: it is, for the message.
    """
    aside = path.with_name(path.name + ASIDE)
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}{ASIDE}-{number}")
    reason = " ".join(str(problem).split())
    try:
        path.rename(aside)
        log.warning("%s %s is damaged: %s; set aside as %s", what, path, reason, aside.name)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        log.warning("%s %s is damaged: %s; not used (%s)", what, path, reason, error.strerror)
