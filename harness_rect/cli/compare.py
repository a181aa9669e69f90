"""``harness-rect compare``: evaluations side by side, or the frontiers of a sweep."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from harness_rect.cli import path_argument
from harness_rect.errors import UserError, one_line
from harness_rect.experiments import results
from harness_rect.experiments.compare import Gate, compare
from harness_rect.experiments.compare.rendering import print_tables, render, short
from harness_rect.io.files import check_file, expanded, written_whole
from harness_rect.io.progress import progress_bar

log = logging.getLogger("harness_rect.compare")
FORMATS = {".json": "json", ".csv": "csv", ".md": "markdown"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a results file of lm-eval, or a folder with one")
    parser.add_argument(
        "others",
        metavar="OTHER",
        nargs="*",
        help="results to compare with it, likewise; without any, BASE is the folder of a sweep, and its"
        " regularizers are compared at equal reliability, in one line for each model and method",
    )
    parser.add_argument("--tasks", help="only these tasks and groups, comma-separated (default: all)")
    parser.add_argument(
        "--all-metrics", action="store_true", help="every metric, not only the headline of each task"
    )
    parser.add_argument(
        "--min-retention",
        action="append",
        default=[],
        metavar="[TASK[/METRIC]=]SHARE",
        help="exit with 1 if less is left: 0.94 of each headline, rect_nli=0.9 of one; may be repeated",
    )
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare in spite of differences in version, data, seeds, ...",
    )
    parser.add_argument(
        "--format",
        choices=("table", "markdown", "csv", "json"),
        help="default: by --output's name, else table",
    )
    parser.add_argument("--output", type=path_argument, help="write to this file instead of printing")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the comparison; 1 if a row fell short of its gate, else 0."""
    if not arguments.others:
        return _frontiers(arguments)
    gates = [Gate.parse(text) for text in arguments.min_retention]
    output: Path | None = arguments.output
    if output is not None:
        check_file(output, "--output")
    base, *others = (_load(argument) for argument in (arguments.base, *arguments.others))
    for one in (base, *others):
        for line in one.failed_checks:
            log.warning("%s: %s", one.path, one_line(line))
    with progress_bar(sys.stderr.isatty()) as progress:
        bar = progress.add_task("comparing")
        table = compare(
            base,
            others,
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
    form = arguments.format or (FORMATS.get(output.suffix, "table") if output else "table")
    if output is not None:
        with written_whole(output) as temporary:
            # Any text of a results file may hold what UTF-8 cannot.
            temporary.write_text(render(table, form), encoding="utf-8", errors="backslashreplace")
    elif form == "table" and sys.stdout.isatty():
        print_tables(table, Console())
    else:
        sys.stdout.write(render(table, form))
    if table.failed:
        gated = sum(row.passed is not None for row in table.rows)
        print(f"{len(table.failed)} of {gated} rows fell short:", file=sys.stderr)
        for row in table.failed:
            print(f"  {short(row)}", file=sys.stderr)
    return 1 if table.failed else 0


def _frontiers(arguments: argparse.Namespace) -> int:
    """Print a line for each model and method of a folder of results."""
    for name in ("tasks", "all_metrics", "min_retention", "allow_differences", "format", "output"):
        if getattr(arguments, name):
            option = name.replace("_", "-")
            raise UserError(f"--{option}: needs results to compare with {arguments.base}; name them after it")
    from harness_rect.experiments.report import frontiers  # imports matplotlib
    from harness_rect.experiments.report.reading import read_study

    study = read_study(arguments.base)
    for note in study.notes:
        log.warning("%s", note)
    lines = [line for setting in study.settings if (line := frontiers.line(study, setting))]
    if not lines:
        raise UserError(
            f"{arguments.base}: nothing to compare; name other results after it, or give the folder of a"
            " sweep with a regularizer at two strengths (keep) or more, and with none, along the same edits"
        )
    print("\n".join(lines))
    return 0


def _load(argument: str) -> results.Results:
    path, choices = results.newest(argument)
    if Path(expanded(argument)) != path:
        of = f", the newest of {choices}" if choices > 1 else ""
        log.info("%s: taking %s%s", argument, path, of)
    return results.load(path)
