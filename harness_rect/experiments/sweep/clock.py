"""The time that a sweep spends on each kind of work."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Row of the sweep's table -> its mean times: ``seconds_per_edit`` and ``seconds_per_evaluation``, if known.
Timing = dict[str, dict[str, float]]

#: Seconds: no edit takes longer.
LONGEST = 1e7


def read_timing(index: Path) -> Timing:
    """The times of earlier runs from ``sweep.json``; empty if it cannot be read."""
    try:
        timing = json.loads(index.read_text(encoding="utf-8"))["timing"]
        read = {row: {kind: float(kept[kind]) for kind in kept} for row, kept in timing.items()}
        return {row: {kind: s for kind, s in kept.items() if 0 <= s < LONGEST} for row, kept in read.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
        return {}  # times are used for estimates only


class Clock:
    """Seconds spent in named kinds of work. Work inside other work counts once, for the inner kind.

    Args:
        started: ``time.perf_counter()`` when the program started; the time until now counts as ``starting``.
            From now on, time outside :meth:`running` counts as ``other``.
    """

    def __init__(self, started: float | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = ["other"]
        self._since = time.perf_counter()
        if started is not None:
            self.seconds["starting"] = self._since - started

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """Count the time within the block as ``kind``."""
        self._switch()
        self._running.append(kind)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def read(self, kind: str) -> float:
        """Seconds of ``kind`` up to now."""
        self._switch()
        return self.seconds[kind]

    @property
    def total(self) -> float:
        """Seconds of all kinds up to now."""
        self._switch()
        return sum(self.seconds.values())

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now
