"""``harness-rect compare``: evaluations side by side."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="a results file of lm-eval, or a folder with one")
    parser.add_argument("others", metavar="OTHER", nargs="+", help="results to compare with it, likewise")
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
    parser.add_argument("--output", type=Path, help="write to this file instead of printing")


def run(arguments: argparse.Namespace) -> int:
    from harness_rect.experiments.compare import command

    return command.run(arguments)
