"""Finished and interrupted edit runs on disk, one safetensors file each.

A file holds the float32 edited weights under their names and the report as JSON in its metadata; that of an
interrupted run also what its method remembers between steps. It is written under a temporary name and
renamed, so a file that is there is whole.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from harness_rect.errors import UserError
from harness_rect.io.cache import cache_folder
from harness_rect.io.resume import load_state, save_state

OFF = "off"

Saved = tuple[dict[str, Tensor], dict[str, Any]]
#: Before the names of tensors that are a method's memory and no weights.
MEMORY = "memory:"


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

    def path(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.safetensors"

    def _partial(self, key: str) -> Path:
        return self.folder / f"{key[:32]}.partial.safetensors"

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

    def load(self, key: str, names: list[str]) -> Saved | None:
        """(weights, report) of a finished run."""
        return _of(names, load_state(self.path(key), key))

    def save(self, key: str, weights: dict[str, Tensor], report: dict[str, Any]) -> None:
        save_state(self.path(key), key, weights, report)
        self._partial(key).unlink(missing_ok=True)

    def load_partial(
        self, key: str, names: list[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
        """(weights so far, the method's memory, what was recorded so far) of an interrupted run."""
        found = _of(names, load_state(self._partial(key), key))
        if found is None:
            return None
        tensors, state = found
        memory = {name.removeprefix(MEMORY): t for name, t in tensors.items() if name.startswith(MEMORY)}
        return {name: tensors[name] for name in names}, memory, state

    def save_partial(
        self, key: str, weights: dict[str, Tensor], memory: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        save_state(self._partial(key), key, weights | {MEMORY + n: t for n, t in memory.items()}, state)


class _NothingKept(EditCache):
    """A cache that never holds anything."""

    def lock(self, key: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def load(self, *arguments: Any) -> None:
        return None

    def load_partial(self, *arguments: Any) -> None:
        return None

    def save(self, *arguments: Any) -> None:
        pass

    def save_partial(self, *arguments: Any) -> None:
        pass


NOTHING_KEPT = _NothingKept(Path())


def _of(names: list[str], saved: Saved | None) -> Saved | None:
    """``saved`` if its weights are those of ``names``."""
    if saved is None or {n for n in saved[0] if not n.startswith(MEMORY)} != set(names):
        return None
    return saved
