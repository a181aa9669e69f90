"""Finished and interrupted edit runs on disk.

A finished run is a folder of five files:

    run.json              version of this format, key, base model, hashes of the edited weights, the steps
    report.json           the edit report
    edits.json            the edits
    updates.safetensors   what each step proposed (:mod:`harness_rect.session.history`); where that is more
                          than a gigabyte, the edited weights in float32 instead
    SHA256SUMS            the checksums of the other four

It is written under a temporary name, flushed to the disk and renamed, so a folder that is there is whole. An
interrupted run is one safetensors file with :meth:`~harness_rect.session.step.Editing.saved` and a checksum.
What is damaged is said in one line and set aside, and the run is computed again.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness_rect.edits import Edit
from harness_rect.errors import Failed, UserError, on_the_way
from harness_rect.io.cache import ROOT, cache_folder, human, size_limit
from harness_rect.io.checksums import ASIDE, SUMS, Damaged, check_sums, set_aside, write_sums
from harness_rect.io.files import acquired, check_folder, expanded, folder_written_whole
from harness_rect.io.resume import State, failing, load_state, save_state
from harness_rect.session.base_model import BaseArguments
from harness_rect.session.history import History, matrix_of
from harness_rect.session.report import EditReport
from harness_rect.validation import validated

log = logging.getLogger(__name__)

OFF = "off"
#: Kinds of :class:`Entry` that nobody can use.
USELESS = ("damaged", "leftover")
#: What to do where a cache cannot be written, for messages.
INSTEAD = f"give another folder, with edit_cache or {ROOT}, or edit_cache=off"
#: Version of the folder's format.
FORMAT = 1
RUN, REPORT, EDITS, UPDATES = "run.json", "report.json", "edits.json", "updates.safetensors"
#: More threads than a run has been made with.
MOST_THREADS = 4096
#: Hexadecimal digits of a key that name its files.
NAME = 32


class _Base(BaseModel):
    model: str
    dtype: str
    arguments: BaseArguments | None = None


class _Step(BaseModel):
    edits: int = Field(ge=0)
    updates: dict[str, Literal["same", "low_rank", "again"]]


class _Edit(BaseModel):
    prompt: str
    subject: str
    target_new: str


class _Run(BaseModel):
    """``run.json``, with the ``edits.json`` beside it."""

    key: str
    base: _Base
    weights: dict[str, str]
    steps: list[_Step] | None
    edits: list[_Edit]


@dataclass(frozen=True)
class KeptRun:
    """A finished run.

    key: digest of everything that determines it. base: ``model``, its name or folder as it was loaded,
    ``dtype``, and, where lm-eval's class loaded it, ``arguments``, those of
    :class:`~harness_rect.session.base_model.BaseArguments`. edits: as JSON. hashes: weight -> sha256 of the
    edited weight, in the model's dtype. history: the updates. masters: the float32 edited weights, where the
    history does not have all steps.
    """

    key: str
    base: Mapping[str, Any]
    report: EditReport
    edits: Sequence[Mapping[str, Any]]
    hashes: Mapping[str, str]
    history: History
    masters: Mapping[str, Tensor]

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        steps = self.history.described()
        run = {"format": FORMAT, "key": self.key, "base": self.base, "weights": self.hashes, "steps": steps}
        for name, content in ((RUN, run), (REPORT, self.report.to_dict()), (EDITS, self.edits)):
            text = json.dumps(content, indent=1) + "\n"
            (folder / name).write_text(text, encoding="ascii")
        tensors = self.masters if steps is None else self.history.tensors()
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / UPDATES)
        write_sums(folder)

    @classmethod
    def read(cls, folder: Path) -> KeptRun:
        """Read a folder.

        Raises:
            Damaged: a file is missing, not as it was written, or of another version.
        """
        try:
            check_sums(folder, (RUN, REPORT, EDITS, UPDATES))
            run, report, edits = (
                json.loads((folder / name).read_text("utf-8")) for name in (RUN, REPORT, EDITS)
            )
            if run["format"] != FORMAT:
                raise Damaged(f"of format {run['format']}; this harness-rect reads {FORMAT}")
            base = validated(_Run, run | {"edits": edits}, "").base.model_dump(exclude_none=True)
            names, steps, report = run["weights"], run["steps"], EditReport.read(report)
            if not 1 <= int((report.computed_on or {}).get("threads", 1)) <= MOST_THREADS:
                raise Damaged(f"{REPORT}: computed_on: no such number of threads")
            tensors = load_file(folder / UPDATES)
            history = History.restored(steps, tensors)
            if unknown := {name for step in steps or () for name in step["updates"]} - names.keys():
                raise Damaged(f"{min(unknown)} is updated and not among the edited weights")
            masters = {} if steps is not None else {name: matrix_of(tensors, name) for name in names}
            return cls(run["key"], base, report, edits, names, history, masters)
        except OSError as error:
            raise Damaged(f"{error.strerror or error}") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
            raise Damaged(f"not as harness-rect writes it ({type(error).__name__}: {error})") from None


class EditCache:
    """A folder of runs, named by the digest of everything that determines them.

    Args:
        limit: bytes that the folder may take; where a run that is kept makes them more, those not used for
            longest are removed.
    """

    keeps = True

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit

    @classmethod
    def from_spec(cls, spec: str | None) -> EditCache | None:
        """``off``: none; a folder; or None for the user's cache. The user's limit holds for all.

        Raises:
            UserError: ``~name`` of a user that there is not, or the limit is no size.
        """
        if spec == OFF:
            return None
        return cls(Path(expanded(spec)) if spec else cache_folder("edits"), size_limit())

    @classmethod
    def to_write(cls, spec: str | None) -> EditCache | None:
        """The same, for runs that are to be kept.

        Raises:
            UserError: the folder cannot be written, too.
        """
        if (cache := cls.from_spec(spec)) is not None:
            try:
                check_folder(cache.folder)
            except UserError as error:
                raise UserError(f"edit_cache={error}; {INSTEAD}") from None
        return cache

    def path(self, key: str, partial: bool = False) -> Path:
        return self.folder / (f"{key[:NAME]}.partial.safetensors" if partial else key[:NAME])

    def lock_file(self, key: str) -> Path:
        return self.folder / f"{key[:NAME]}.lock"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held while a run is computed, so that two processes do it once.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            lock = acquired(self.lock_file(key))
            if self.folder.is_dir() and not os.access(self.folder, os.W_OK):  # the lock was there already
                lock.release()
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder))
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise (Failed if on_the_way(error) else UserError)(
                f"edit_cache={self.folder}: cannot be written ({reason}); {INSTEAD}"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def load(self, key: str) -> KeptRun | None:
        """A finished run; None if there is none, or a damaged one, which is set aside."""
        folder = self.path(key)
        if not folder.exists():
            return None
        try:
            run = KeptRun.read(folder)
            if run.key != key:
                raise Damaged("another run's")
        except Damaged as problem:
            if folder.exists():  # it may have been removed meanwhile
                set_aside(folder, "the kept edit run", problem)
            return None
        touch(folder)
        return run

    def load_partial(self, key: str) -> State | None:
        """The state of an interrupted run."""
        return load_state(self.path(key, partial=True), key)

    def save(self, run: KeptRun) -> None:
        """Keep a finished run; where that fails, a warning says so and the run goes on."""
        with self._trying():
            folder = self.path(run.key)
            if not folder.exists():
                with folder_written_whole(folder) as temporary:
                    run.write(temporary)
            self.path(run.key, partial=True).unlink(missing_ok=True)
        try:
            gone = [] if self.limit is None else self.prune(self.limit)
        except OSError as error:
            log.warning("edit_cache=%s: cannot be made smaller (%s)", self.folder, error.strerror or error)
            return
        if gone:
            freed = human(sum(entry.bytes for entry in gone))
            log.info("edit_cache=%s: removed %d unused entries, %s", self.folder, len(gone), freed)

    def save_partial(self, key: str, state: State) -> None:
        """Keep the state of a run that is not finished; likewise."""
        with self._trying():
            save_state(self.path(key, partial=True), key, *state)

    def _trying(self) -> AbstractContextManager[None]:
        return failing(False, f"edit_cache={self.folder}: the run")

    def remove(self, key: str) -> None:
        """Remove a finished run, if it is there."""
        remove(self.path(key))

    # -- what is in the folder --------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All that the folder holds of ours, the least recently used first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if (match := _OURS.fullmatch(path.name)) and not path.name.endswith(".lock"):
                try:  # a link counts as itself
                    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
                    of_files = [s for s in (p.lstat() for p in inside) if not stat.S_ISDIR(s.st_mode)]
                    size, used = sum(s.st_size for s in of_files), path.lstat().st_mtime
                    found.append(Entry(path, _kind(path), match["key"], size, used))
                except FileNotFoundError:
                    pass  # removed meanwhile
        return sorted(found, key=lambda entry: entry.used)

    def find(self, prefix: str) -> Path:
        """The folder of the finished run whose key begins so.

        Raises:
            UserError: there is none, or there are several.
        """
        kept = [entry.path for entry in self.entries() if entry.kind == "run"]
        found = [path for path in kept if path.name.startswith(prefix)]
        if len(found) != 1:
            few = ", ".join(path.name[:12] for path in found[:5]) or "`harness-rect cache list` shows all"
            problem = f"{len(found)} kept runs begin so" if found else "no such folder and no kept run"
            raise UserError(f"{prefix}: {problem} in {self.folder}: {few}")
        return found[0]

    def clear(self, chosen: Callable[[Entry], bool] = lambda entry: True) -> list[Entry]:
        """Remove entries; those of runs that are being made are left alone."""
        return [
            entry for entry in self.entries() if chosen(entry) and _unlocked(self.lock_file(entry.key), entry)
        ]

    def prune(self, limit: int) -> list[Entry]:
        """Make the folder no larger than ``limit`` bytes; runs that a process works on are left alone.

        What is damaged or left over goes first, then what was not used for longest.
        """
        entries = self.entries()
        size, gone = sum(entry.bytes for entry in entries), list[Entry]()
        for entry in sorted(entries, key=lambda entry: entry.kind not in USELESS):
            if size <= limit:
                break
            if _unlocked(self.lock_file(entry.key), entry):
                gone.append(entry)
                size -= entry.bytes
        return gone

    def remove_locks(self) -> None:
        """Remove the locks that nobody holds. A process that starts in this moment may make a run twice."""
        for path in self.folder.glob("*.lock"):
            if _OURS.fullmatch(path.name):
                _unlocked(path)


@dataclass(frozen=True)
class Entry:
    """Something in the folder of a cache.

    kind: run, unfinished, damaged (set aside) or leftover (of a process that was killed while it wrote).
    key: the first 32 digits. bytes: on the disk. used: when it was last read or written, as a timestamp.
    """

    path: Path
    kind: str
    key: str
    bytes: int
    used: float


_OURS = re.compile(
    rf"\.?(?P<key>[0-9a-f]{{{NAME}}})(\.partial)?(\.safetensors)?(\.lock|{re.escape(ASIDE)}(-\d+)?)?(\..*\.tmp)?"
)


def _kind(path: Path) -> str:
    if path.name.endswith(".tmp"):
        return "leftover"
    if ASIDE in path.name:
        return "damaged"
    return "run" if (path / SUMS).exists() else "unfinished" if ".partial" in path.name else "damaged"


def touch(folder: Path) -> None:
    """Note that a run is used now; in a cache that cannot be written this does nothing."""
    with suppress(OSError):
        os.utime(folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, which disappears at once; does nothing if it is gone already."""
    aside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.tmp")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


def _unlocked(path: Path, entry: Entry | None = None) -> bool:
    """Remove an entry, or the lock itself, under a lock; False if another process holds that."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (TimeoutError, IsADirectoryError):  # the second: not a lock of ours
        return False
    try:
        if entry is None:
            path.unlink()
        else:
            remove(entry.path)
    finally:
        lock.release()
    return True


class _NothingKept(EditCache):
    """A cache that never holds anything."""

    keeps = False

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        yield

    def load(self, key: str) -> None:
        return None

    def load_partial(self, key: str) -> None:
        return None

    def save(self, run: KeptRun) -> None:
        pass

    def save_partial(self, key: str, state: State) -> None:
        pass


NOTHING_KEPT = _NothingKept(Path())


def edits_as_json(edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """The edits as plain JSON types."""
    return json.loads(json.dumps([dataclasses.asdict(edit) for edit in edits]))
