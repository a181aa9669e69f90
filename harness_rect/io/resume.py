"""The state of long work, kept in one safetensors file so that it can resume after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from harness_rect.io.checksums import Damaged, set_aside
from harness_rect.io.files import written_whole

log = logging.getLogger(__name__)

#: An unfinished state is saved when this many seconds have passed since the last save.
SAVE_SECONDS = 30.0

State = tuple[dict[str, Tensor], Any]


def save_state(path: Path, key: str, tensors: Mapping[str, Tensor], state: Any) -> None:
    """Write tensors, and ``state`` as JSON, with a key that identifies the work and a checksum of it all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": key, "state": json.dumps(state)}
    metadata["sha256"] = _digest(plain, key, metadata["state"])
    with written_whole(path) as temporary:
        save_file(plain, temporary, metadata=metadata)


def verify_state(path: Path) -> None:
    """Check a file that :func:`save_state` wrote.

    Raises:
        Damaged: it is not what was written.
    """
    try:
        _read_state(path)
    except _UNREADABLE as error:
        raise Damaged(error) from None


#: What a damaged state raises.
_UNREADABLE = (SafetensorError, OSError, KeyError, ValueError, RecursionError, Damaged)


def _read_state(path: Path) -> tuple[dict[str, Tensor], str, Any]:
    """Tensors, key and state."""
    if not path.is_file():
        raise Damaged("no file")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != _digest(tensors, metadata["key"], metadata["state"]):
        raise Damaged("not what was written, by its checksum")
    return tensors, metadata["key"], json.loads(metadata["state"])


def load_state(path: Path, key: str) -> State | None:
    """What :func:`save_state` wrote; None if the file is missing, damaged or has another key.

    A damaged file is set aside with a warning.
    """
    if not path.exists():
        return None
    try:
        tensors, found, state = _read_state(path)
        return (tensors, state) if found == key else None
    except FileNotFoundError:
        return None  # removed meanwhile
    except _UNREADABLE as error:
        set_aside(path, "the saved state", error)
        return None


def _digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """sha256 (hex) of names, shapes, dtypes and elements."""
    total = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def failing(must: bool, what: str) -> Iterator[None]:
    """Let an error in writing through, or say in one line that ``what`` cannot be kept and go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if must:
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        log.warning("%s cannot be kept (%s); the work goes on without", what, reason)


class Resumable:
    """The state of one piece of unfinished work.

    Args:
        path: the file that holds it.
        key: identifies everything that determines the work; a state with another key is not continued.
        must: an error in saving is raised; else a warning says so, and the work goes on.
    """

    def __init__(self, path: Path, key: str, must: bool = True) -> None:
        self.path, self.key, self.must = path, key, must
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """(tensors, state) to continue from, None to start over."""
        return load_state(self.path, self.key)

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, tensors: Mapping[str, Tensor], state: Any) -> None:
        with failing(self.must, f"{self.path}: the unfinished state"):
            save_state(self.path, self.key, tensors, state)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Remove the file: the work is done."""
        self.path.unlink(missing_ok=True)
