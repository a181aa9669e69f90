"""What a sweep prints: a live table, or log lines without a terminal, and a table of times at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

log = logging.getLogger("harness_rect.sweep")

EDITING, EVALUATING = "editing", "evaluating"


@dataclass
class Row:
    """One trajectory, or one unedited model (``edits_total`` 0)."""

    name: str
    method: str
    edits_total: int
    evaluations_total: int
    edits: int = 0
    evaluations: int = 0
    # In this process:
    seconds: dict[str, float] = field(default_factory=lambda: {EDITING: 0.0, EVALUATING: 0.0})
    edits_made: int = 0
    evaluations_made: int = 0
    doing: str = ""

    @property
    def done(self) -> bool:
        return self.evaluations == self.evaluations_total


def seconds_left(rows: Sequence[Row]) -> float | None:
    """An estimate from the mean times so far; None before an evaluation was timed.

    The rows at work, of which there can be several, are taken to share what is left.
    A method that was not timed yet is assumed to take the mean time of all methods for an edit, and edits no
    time before any was timed.
    """
    evaluation = _mean(rows, EVALUATING)
    if evaluation is None:
        return None
    left = evaluation * sum(row.evaluations_total - row.evaluations for row in rows)
    for row in rows:
        if not row.done and row.edits < row.edits_total:
            each = _mean([other for other in rows if other.method == row.method], EDITING)
            left += (each or _mean(rows, EDITING) or 0.0) * (row.edits_total - row.edits)
    return left / max(1, sum(bool(row.doing) for row in rows))


def _mean(rows: Sequence[Row], kind: str) -> float | None:
    """Mean seconds of an edit or an evaluation; None if none was timed."""
    made = sum(row.edits_made if kind == EDITING else row.evaluations_made for row in rows)
    seconds = sum(row.seconds[kind] for row in rows)
    return seconds / made if made else None


class Display:
    """Shows the rows of a sweep while they change: a live table in a terminal, else lines of the log."""

    def __init__(self, rows: Sequence[Row], console: Console) -> None:
        self.rows, self.console = rows, console

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the live table on the screen."""
        if not self.console.is_terminal:
            yield
            return
        root = logging.getLogger()
        handlers = list(root.handlers)
        # Lines that other handlers print would break up the live table.
        root.handlers[:] = [RichHandler(console=self.console, show_path=False, markup=False)]
        try:
            with Live(console=self.console, get_renderable=self._render, refresh_per_second=2):
                yield
        finally:
            root.handlers[:] = handlers

    def log(self, line: str) -> None:
        """Log a line, followed by the state of the sweep."""
        log.info("%s; %s", line, self._state())

    def _state(self) -> str:
        done, total = (
            sum(getattr(row, n) for row in self.rows) for n in ("evaluations", "evaluations_total")
        )
        left = seconds_left(self.rows)
        how = "about" if done == total or _mean(self.rows, EDITING) is not None else "at least"
        text = "time left not known yet" if left is None else f"{how} {duration(left)} left"
        return f"{done} of {total} evaluations done, {text}"

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for heading in ("", "edits", "evaluations", "editing", "evaluating", ""):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        room = max(self.console.height - 4, 5)
        rows = self.rows
        first = next((i for i, row in enumerate(rows) if not row.done), len(rows))
        start = max(0, min(first - room // 3, len(rows) - room))
        for row in rows[start : start + room]:
            table.add_row(
                row.name,
                f"{row.edits}/{row.edits_total}" if row.edits_total else "-",
                f"{row.evaluations}/{row.evaluations_total}",
                *(duration(s) if s else "-" for s in (row.seconds[EDITING], row.seconds[EVALUATING])),
                row.doing,
                style="dim" if row.done else "bold" if row.doing else None,
            )
        return Group(table, self._state())


def timing_table(rows: Sequence[Row], overhead: Mapping[str, float]) -> Group:
    """Seconds of this process for editing, evaluating and everything else.

    Args:
        overhead: seconds of each kind of work that is neither editing nor evaluating.
    """
    table = Table(title="seconds of this run")
    for heading in ("", "edits", "editing", "evaluations", "evaluating"):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    totals: list[float] = [0, 0, 0, 0]
    for row in rows:
        if row.edits_made or row.evaluations_made:
            cells = [row.edits_made, row.seconds[EDITING], row.evaluations_made, row.seconds[EVALUATING]]
            table.add_row(row.name, *_cells(cells))
            totals = [a + b for a, b in zip(totals, cells, strict=True)]
    table.add_section()
    table.add_row("total", *_cells(totals))
    work = totals[1] + totals[3]
    beside = sum(overhead.values())
    share = f" ({100 * beside / work:.1f}% of them)" if work > beside else ""
    parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in overhead.items() if seconds >= 0.05)
    rest = f"besides editing and evaluating: {beside:.1f}{share}" + (f": {parts}" if parts else "")
    return Group(table, Text(rest))


def _cells(numbers: Sequence[float]) -> list[str]:
    """Counts and seconds in turn."""
    return [f"{number:.{i % 2}f}" for i, number in enumerate(numbers)]


def duration(seconds: float) -> str:
    """``9 s``, ``12:34`` or ``1:02:03``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:")
