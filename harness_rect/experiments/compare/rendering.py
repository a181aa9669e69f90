"""A comparison as text: a table for the terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness_rect.experiments.compare.comparison import Comparison, ComparisonTable
from harness_rect.experiments.compare.significance import CONFIDENCE

FORMATS = ("table", "markdown", "csv", "json")
_HEADINGS = (
    "task",
    "metric",
    "protocol",
    "base",
    "other",
    "change",
    "retention",
    "95% interval",
    "p",
    "p (Holm)",
    "test",
)
#: Those of a terminal's tables: the title says the protocol, and "test" is a number.
_SHORT = tuple(heading for heading in _HEADINGS if heading != "protocol")
_TEXT = ("task", "metric", "protocol", "test")
#: Width in characters where the output is not a terminal: wide enough for rows on one line.
_WIDTH = 120
#: Which way a metric improves, as in lm-eval's tables.
_BETTER = {True: "↑", False: "↓"}


def render(table: ComparisonTable, form: str) -> str:
    """The comparison in one of :data:`FORMATS`, ending in a line break."""
    return {"table": _plain, "markdown": _markdown, "csv": _csv, "json": _json}[form](table)


def print_tables(table: ComparisonTable, console: Console) -> None:
    """One table for each model compared with the base and protocol, then what its numbers of tests mean."""
    tests = {name: f"[{i}]" for i, name in enumerate(dict.fromkeys(row.method for row in table.rows), 1)}
    for title, rows in _parts(table):
        drawn = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in _SHORT:
            drawn.add_column(heading, justify="left" if heading in _TEXT else "right", overflow="fold")
        for row in rows:
            style = "red" if row.passed is False else None
            cells = dict(zip(_HEADINGS, _cells(row), strict=True)) | {"test": tests[row.method]}
            drawn.add_row(*(escape(cells[heading]) for heading in _SHORT), style=style)
        console.print(drawn)
    for note in [*(f"{number} {name}" for name, number in tests.items()), *_notes(table)]:
        console.print(note, markup=False, highlight=False)


def short(row: Comparison) -> str:
    """A row that has a gate, in one line."""
    left = (
        "retention undefined, and the score got worse"
        if row.retention is None
        else f"retention {row.retention:.1%}"
    )
    if not math.isfinite(row.change):
        left = "a score is not finite"
    what = f"{row.other}: {row.task} {row.metric} {row.score_base:.4g} -> {row.score_other:.4g}"
    return f"{what}, {left}, at least {row.min_retention:.1%} asked"


def _plain(table: ComparisonTable) -> str:
    text = io.StringIO()
    print_tables(table, Console(file=text, width=_WIDTH))
    return text.getvalue()


def _parts(table: ComparisonTable) -> list[tuple[str, list[Comparison]]]:
    """(title, rows) of each table: scores of different protocols do not stand in one column."""
    found: dict[tuple[str, str | None], list[Comparison]] = {}
    for row in table.rows:
        found.setdefault((row.other_file, row.protocol), []).append(row)
    return [
        (f"base: {rows[0].base}; other: {rows[0].other}" + (f"; {protocol}" if protocol else ""), rows)
        for (_, protocol), rows in found.items()
    ]


def _cells(row: Comparison) -> list[str]:
    name = row.metric if row.filter == "none" else f"{row.metric},{row.filter}"
    return [
        row.task,
        f"{name} {_BETTER[row.higher_is_better]}",
        row.protocol or "-",
        _score(row.score_base),
        _score(row.score_other),
        _signed(row.change),
        "-" if row.retention is None else f"{row.retention:.1%}",
        "-" if row.low is None or row.high is None else f"{_signed(row.low)} to {_signed(row.high)}",
        _p(row.p),
        _p(row.p_holm),
        row.method,
    ]


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.6g}"


def _signed(value: float) -> str:
    return "0.0000" if value == 0 else f"{value:+.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _notes(table: ComparisonTable) -> list[str]:
    tested = sum(row.p is not None for row in table.rows)
    notes = [
        f"{CONFIDENCE:.0%} intervals are of the change; p (Holm) is corrected for {tested} comparisons."
        " ↑ is better when higher, ↓ when lower. Retention is other / base (↓: base / other) where it has a"
        " meaning."
    ]
    notes += [f"Differs: {line}" for line in table.differences]
    return notes + [f"Left out: {line}" for line in table.left_out]


def _markdown(table: ComparisonTable) -> str:
    parts = []
    for title, rows in _parts(table):
        aligned = (":--" if heading in _TEXT else "--:" for heading in _HEADINGS)
        lines = [_line(_HEADINGS), _line(list(aligned)), *(_line(_cells(row)) for row in rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, *_notes(table)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(table: ComparisonTable) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Comparison)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in table.rows)
    return text.getvalue()


def _json(table: ComparisonTable) -> str:
    content = {
        "confidence": CONFIDENCE,
        "correction": "holm",
        "corrected_for": sum(row.p is not None for row in table.rows),
        "passed": not table.failed,
        "differences": table.differences,
        "left_out": table.left_out,
        "rows": [{name: _finite(value) for name, value in vars(row).items()} for row in table.rows],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
