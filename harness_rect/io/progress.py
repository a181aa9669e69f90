"""Progress bars, or lines where there is no terminal, and loggers that are muted for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

#: Seconds between two lines where there is no terminal.
EVERY = 30.0


def console(**settings: Any) -> Console:
    """A console on which texts stand as they are: a path or a name may hold what rich takes for markup."""
    return Console(markup=False, **settings)


def progress_bar(shown: bool = True) -> Progress:
    """A progress bar with the count and the time left, on stderr; a line now and then without a terminal."""
    return _Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=not shown,
    )


class _Bar(Progress):
    """A bar that cannot be drawn prints how far it is, at most every :data:`EVERY` seconds."""

    def update(self, task_id: TaskID, **given: Any) -> None:
        super().update(task_id, **given)
        task, now = self.tasks[task_id], time.monotonic()
        if self.disable or self.console.is_terminal or task.finished or not task.total:
            return
        if now - task.fields.setdefault("said", now) >= EVERY:
            task.fields["said"] = now
            left = task.time_remaining
            text = "" if left is None else f", about {timedelta(seconds=round(left))} left"
            self.console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}{text}")


@contextmanager
def logging_only(level: int, *names: str) -> Iterator[None]:
    """Mute messages of the named loggers below ``level`` within the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
