"""Finished and interrupted edit runs on disk, one safetensors file each.

A file holds the float32 edited weights under their names and the report as JSON in its metadata; that of an
interrupted run holds :meth:`~harness_rect.session.step.Editing.saved`. It is written under a temporary name
and renamed, so a file that is there is whole.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder
from harness_rect.io.resume import State, load_state, save_state

OFF = "off"


class EditCache:
    """A folder of runs, named by the digest of everything that determines them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def from_spec(cls, spec: str | None) -> EditCache | None:
        """``off``: none; a folder; or None for the user's cache."""
        if spec == OFF:
            return None
        return cls(Path(spec) if spec else cache_folder("edits"))

    def path(self, key: str, partial: bool = False) -> Path:
        return self.folder / f"{key[:32]}{'.partial' if partial else ''}.safetensors"

    def lock(self, key: str) -> AbstractContextManager[Any]:
        """Held while a run is computed, so that two processes do it once.

        Raises:
            UserError: if the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(
                f"edit_cache={self.folder}: cannot be written ({error.strerror}); give another folder, or off"
            ) from None
        return FileLock(self.folder / f"{key[:32]}.lock")

    def load(self, key: str, partial: bool = False) -> State | None:
        """(weights, report) of a finished run, or the state of an interrupted one."""
        return load_state(self.path(key, partial), key)

    def save(self, key: str, state: State, partial: bool = False) -> None:
        """Keep a finished run, or the state of one that is not."""
        save_state(self.path(key, partial), key, *state)
        if not partial:
            self.path(key, partial=True).unlink(missing_ok=True)


class _NothingKept(EditCache):
    """A cache that never holds anything."""

    def lock(self, key: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def load(self, key: str, partial: bool = False) -> None:
        return None

    def save(self, key: str, state: State, partial: bool = False) -> None:
        pass


NOTHING_KEPT = _NothingKept(Path())
