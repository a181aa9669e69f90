"""``harness-rect compare BASE OTHER...``"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from harness_rect.errors import UserError
from harness_rect.experiments import results
from harness_rect.experiments.compare.comparison import ComparisonTable, Gate, compare
from harness_rect.experiments.compare.rendering import print_tables, render, short
from harness_rect.io.files import written_whole
from harness_rect.io.progress import progress_bar

log = logging.getLogger("harness_rect.compare")
_BY_SUFFIX = {".json": "json", ".csv": "csv", ".md": "markdown"}


def run(arguments: argparse.Namespace) -> int:
    """Print or write the comparison; 1 if a row fell short of its gate, else 0."""
    gates = [Gate.parse(text) for text in arguments.min_retention]
    output: Path | None = arguments.output
    if output is not None and output.is_dir():
        raise UserError(f"--output {output}: is a folder; expected a file")
    files = [_load(argument) for argument in (arguments.base, *arguments.others)]
    with progress_bar() as progress:
        progress.disable = not progress.console.is_terminal  # not in a log file
        bar = progress.add_task("comparing")
        table = compare(
            files[0],
            files[1:],
            tasks=[name.strip() for name in (arguments.tasks or "").split(",") if name.strip()] or None,
            all_metrics=arguments.all_metrics,
            gates=gates,
            allow_differences=arguments.allow_differences,
            on_row=lambda done, of: progress.update(bar, completed=done, total=of),
        )
    for line in table.differences:
        log.warning("differs: %s", line)
    for line in table.left_out:
        log.warning("left out: %s", line)
    form = arguments.format or (_BY_SUFFIX.get(output.suffix, "table") if output else "table")
    if output is not None:
        try:
            with written_whole(output) as temporary:
                temporary.write_text(render(table, form), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    elif form == "table" and sys.stdout.isatty():
        print_tables(table, Console())
    else:
        sys.stdout.write(render(table, form))
    if table.failed:
        print(f"{len(table.failed)} of {_gated(table)} rows fell short:", file=sys.stderr)
        for row in table.failed:
            print(f"  {short(row)}", file=sys.stderr)
        return 1
    return 0


def _gated(table: ComparisonTable) -> int:
    return sum(row.passed is not None for row in table.rows)


def _load(argument: str) -> results.Results:
    path, choices = results.newest(argument)
    if Path(argument) != path:
        of = f", the newest of {choices}" if choices > 1 else ""
        log.info("%s: taking %s%s", argument, path, of)
    return results.load(path)
