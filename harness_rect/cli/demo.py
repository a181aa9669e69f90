"""``harness-rect demo``: what editing costs the embedded model, and what RECT and two other ways save."""

from __future__ import annotations

import argparse
import os
import sys
import time
import webbrowser
from pathlib import Path

from harness_rect.cli import path_argument
from harness_rect.experiments.results import find, load
from harness_rect.experiments.score_table import general_tasks, name_of, score_table
from harness_rect.io.progress import console
from harness_rect.session.report import EditReport

#: What is run: a sweep of this package.
SWEEP = Path(__file__).parent.parent / "sweeps" / "demo.yaml"
DEFAULT_OUTPUT = Path("harness-rect-demo")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=path_argument,
        default=DEFAULT_OUTPUT,
        metavar="DIR",
        help=f"folder of the results and report.html (default {DEFAULT_OUTPUT}); resumes what is there",
    )


def run(arguments: argparse.Namespace) -> None:
    """Edit and evaluate, print a table, write the report and open it where there is a screen."""
    started = time.perf_counter()
    from harness_rect.experiments.report.writing import write_report
    from harness_rect.experiments.sweep.runner import run_sweep

    folder: Path = arguments.output
    print("rect-tiny, a model of this package, gets 20 edits in four ways: two minutes")
    run_sweep(SWEEP, started=started, output=str(folder), times=False)
    found = sorted(map(load, find(folder)), key=lambda one: float(one.file.date or 0))
    columns = {_heading(one.edit): one for one in found}
    count = max(one.edit.n_edits for one in found if one.edit is not None)
    title = f"rect-tiny after {count} edit{'s' * (count != 1)} by ROME"
    console().print(score_table(title, columns, general_tasks(found[0])))
    page = folder / "report.html"
    write_report(folder, page, progress_shown=sys.stderr.isatty())
    print(f"the report: {page.resolve()}")
    if _has_screen():
        webbrowser.open(page.resolve().as_uri())


def _heading(edit: EditReport | None) -> str:
    """``unedited``, ``ROME`` or, in two lines, what is added to it."""
    if edit is None or edit.regularizer == "none":
        return name_of(edit)
    return f"+ {edit.regularizer}\n{edit.keep:g}"


def _has_screen() -> bool:
    """Whether a person is there to look at a page."""
    displays = sys.platform in ("win32", "darwin") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    return sys.stdout.isatty() and bool(displays)
