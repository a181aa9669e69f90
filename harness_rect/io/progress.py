"""Progress bars, and loggers that are muted for a while."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console(**settings: Any) -> Console:
    """A console on which texts stand as they are: a path or a name may hold what rich takes for markup."""
    return Console(markup=False, **settings)


def progress_bar(shown: bool = True) -> Progress:
    """A progress bar with the count and the time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=not shown,
    )


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
