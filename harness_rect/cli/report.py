"""``harness-rect report``: one page from a folder of results."""

from __future__ import annotations

import argparse
import logging
import sys

from harness_rect.cli import path_argument
from harness_rect.experiments.report.reference import FILES
from harness_rect.experiments.report.writing import write_report

log = logging.getLogger("harness_rect.report")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", metavar="DIR", type=path_argument, help="a folder with lm-eval's results files"
    )
    parser.add_argument(
        "-o", "--output", type=path_argument, required=True, help="the page to write, e.g. report.html"
    )
    parser.add_argument(
        "--reference", metavar="NAME", help=f"published numbers to set ours beside: {', '.join(FILES)}"
    )
    parser.add_argument(
        "--figures", metavar="DIR", type=path_argument, help="also write each figure as SVG and PNG"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and the figures where asked for."""
    study, files = write_report(
        arguments.results, arguments.output, arguments.reference, arguments.figures, sys.stderr.isatty()
    )
    for note in study.notes:
        log.warning("%s", note)
    print(f"{arguments.output}: {len(study.runs)} evaluations")
    if arguments.figures is not None:
        print(f"{arguments.figures}: {files} files")
