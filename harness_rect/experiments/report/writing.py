"""The report of a folder of results as files: the page, and its figures where asked for."""

from __future__ import annotations

from pathlib import Path

from harness_rect.errors import UserError
from harness_rect.experiments.report.drawing import write
from harness_rect.experiments.report.page import render, sections
from harness_rect.experiments.report.reading import read_study
from harness_rect.experiments.report.reference import read_reference
from harness_rect.experiments.report.study import Study
from harness_rect.io.files import check_file, check_folder, written_whole
from harness_rect.io.progress import progress_bar


def write_report(
    results: Path,
    output: Path,
    reference: str | None = None,
    figures: Path | None = None,
    progress_shown: bool = False,
) -> tuple[Study, int]:
    """Write the page.

    Args:
        results: the folder of results files. output: the page.
        reference: published numbers to set ours beside, by their name.
        figures: a folder for each figure as SVG and PNG.

    Returns:
        what was read, and the number of files written into ``figures``.

    Raises:
        UserError: there are no results, the reference is unknown, or a path cannot be written to.
    """
    check_file(output, "--output")
    if figures is not None:
        if figures.exists() and not figures.is_dir():
            raise UserError(f"--figures {figures}: is a file; expected a folder")
        check_folder(figures)
    published = None if reference is None else read_reference(reference)
    with progress_bar(progress_shown) as progress:
        reading = progress.add_task("reading")
        study = read_study(results, lambda done, of: progress.update(reading, completed=done, total=of))
        found = sections(study, published)
        specs = [spec for section in found for spec in section.figures]
        drawing = progress.add_task("drawing", total=sum(len(spec.panels) for spec in specs))
        page = render(study, found, lambda: progress.advance(drawing))
        with written_whole(output) as temporary:
            # A file's name need not be text, nor what a results file says.
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        if figures is not None:
            for spec in progress.track(specs, description="figures"):
                write(spec, figures)
    return study, 0 if figures is None else 2 * len(specs)
