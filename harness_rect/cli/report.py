"""``harness-rect report``: one page from a folder of results."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", metavar="DIR", type=Path, help="a folder with lm-eval's results files")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="the page to write, e.g. report.html"
    )
    parser.add_argument("--figures", metavar="DIR", type=Path, help="also write each figure as SVG and PNG")


def run(arguments: argparse.Namespace) -> None:
    from harness_rect.experiments.report import command

    command.run(arguments)
