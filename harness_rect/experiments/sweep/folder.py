"""The output folder of a sweep, in which several processes may work: locks, index, and what is left over.

A whole sweep holds ``.lock`` as long as it runs. A shard holds a lock of its own, and ``.lock`` for the
moment in which it starts, ends or writes the index.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness_rect.edits import fingerprint
from harness_rect.errors import UserError
from harness_rect.experiments.sweep.checked import coordinates
from harness_rect.experiments.sweep.clock import Timing, read_timing
from harness_rect.experiments.sweep.plan import Plan, Shard
from harness_rect.io.files import written_whole

#: In the output folder: unfinished trajectories, the lock, and the index.
STATES, LOCK, INDEX = ".states", ".lock", "sweep.json"
#: How the names begin under which a sweep writes files, but for those of its states.
TEMPORARY = (".results.", ".samples_", ".SHA256SUMS.", f".{INDEX}.", ".order")
#: A shard waits so many seconds for other shards to write the index.
PATIENCE = 120


class Folder:
    """The output folder of a plan.

    Args:
        plan: the whole one. shard: the part that this process runs; None for all of it.
    """

    def __init__(self, plan: Plan, shard: Shard | None = None) -> None:
        self.plan, self.path, self.states = plan, plan.output, plan.output / STATES
        self._shard = shard
        self._lock = FileLock(self.path / LOCK)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work in the folder; before and after, if no other process works in it, remove what is left over.

        Raises:
            UserError: another process runs the same part, the whole, or a shard of another number.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._shard is None:
            with self._alone(patience=0):
                self._refuse_others()
                self._remove_temporary()
                yield
                self._finish()
            return
        mine = FileLock(self.path / f".shard-{self._shard.index}-of-{self._shard.number}.lock")
        with self._alone(PATIENCE):
            self._refuse_others()
            try:
                mine.acquire(timeout=0)
            except Timeout:
                raise UserError(f"{self.path}: shard {self._shard} is running in this folder") from None
            if not self._others():
                self._remove_temporary()
        try:
            yield
            with self._alone(PATIENCE):
                if not self._others():
                    self._finish()
        finally:
            mine.release()

    @property
    def done(self) -> int:
        """How many evaluations of the whole sweep are done."""
        return sum(evaluation.file.is_file() for evaluation in self.plan.evaluations)

    def write_index(self, timing: Timing) -> None:
        """Write what is done, and the times of some rows beside those that are there."""
        with self._alone(PATIENCE):
            self._write_index(timing)

    def _write_index(self, timing: Timing) -> None:
        index = {
            "config": self.plan.config.model_dump(mode="json"),
            "edits_sha256": fingerprint(self.plan.stream.edits),
            "evaluations": [
                coordinates(evaluation)
                | {
                    "results": str(evaluation.file.relative_to(self.path)),
                    "done": evaluation.file.is_file(),
                }
                for evaluation in self.plan.evaluations
            ],
            "timing": read_timing(self.path / INDEX) | timing,
        }
        with written_whole(self.path / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @contextmanager
    def _alone(self, patience: float) -> Iterator[None]:
        """Hold ``.lock``, which a whole sweep holds anyway.

        Raises:
            UserError: another process keeps it longer than ``patience`` seconds.
        """
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            problem = "another sweep is running in this folder; wait for it, or stop it"
            raise UserError(f"{self.path}: {problem}") from None
        try:
            yield
        finally:
            self._lock.release()

    def _others(self) -> list[Shard]:
        """The other shards that are running; ``.lock`` must be held."""
        found = []
        for path, shard in self._locks():
            lock = FileLock(path)
            if shard == self._shard:
                continue
            try:
                lock.acquire(timeout=0)
                lock.release()
            except Timeout:
                found.append(shard)
        return found

    def _locks(self) -> Iterator[tuple[Path, Shard]]:
        """The locks of shards, held or not."""
        for path in self.path.glob(".shard-*.lock"):
            if match := re.fullmatch(r"\.shard-(\d{1,9})-of-(\d{1,9})\.lock", path.name):
                yield path, Shard(int(match[1]), int(match[2]))

    def _refuse_others(self) -> None:
        for other in self._others():
            if self._shard is None or other.number != self._shard.number:
                what = "the whole" if self._shard is None else f"shard {self._shard}"
                raise UserError(
                    f"{self.path}: shard {other} is running in this folder; wait for it before you run {what}"
                )

    def _remove_temporary(self) -> None:
        """Remove what killed processes were writing or removing; no other process may be at work."""
        folders = {self.path, self.states, self.path / "edits"}
        for folder in folders | {evaluation.folder for evaluation in self.plan.evaluations}:
            for path in folder.glob(".*.tmp"):
                if folder != self.states and not path.name.startswith(TEMPORARY):
                    continue  # not ours
                if path.is_file():
                    path.unlink()
                else:
                    shutil.rmtree(path)

    def _finish(self) -> None:
        """Remove temporary files and, if everything is done, unfinished trajectories and locks of shards; no
        other process may be at work."""
        self._remove_temporary()
        if self.done == len(self.plan.evaluations):
            shutil.rmtree(self.states, ignore_errors=True)
            for path, _ in list(self._locks()):
                path.unlink()
        self._write_index({})
