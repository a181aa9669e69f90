"""``harness-rect report``: one page from a folder of results."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from harness_rect.cli import path_argument
from harness_rect.errors import UserError
from harness_rect.experiments.report.drawing import write
from harness_rect.experiments.report.page import render, sections
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.reference import FILES, read_reference
from harness_rect.io.files import check_file, check_parent, written_whole
from harness_rect.io.progress import progress_bar

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
    output: Path = arguments.output
    folder: Path | None = arguments.figures
    check_file(output, "--output")
    if folder is not None:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--figures {folder}: is a file; expected a folder")
        check_parent(folder / "file")
    reference = None if arguments.reference is None else read_reference(arguments.reference)
    with progress_bar(sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading")
        study = read_study(arguments.results, lambda done, of: progress.update(bar, completed=done, total=of))
        for note in study.notes:
            log.warning("%s", note)
        found = sections(study, reference)
        page = render(study, found)
        specs = [spec for section in found for spec in section.figures]
        with written_whole(output) as temporary:
            temporary.write_text(page, encoding="utf-8")
        if folder is not None:
            for spec in progress.track(specs, description="figures"):
                write(spec, folder)
    print(f"{output}: {len(study.runs)} evaluations")
    if folder is not None:
        print(f"{folder}: {2 * len(specs)} files")
