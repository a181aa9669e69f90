"""Evaluations side by side in the terminal: the general tasks in rows, one evaluation a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from harness_rect.evaluation import catalogue
from harness_rect.evaluation.catalogue import EDITING_PROTOCOL
from harness_rect.experiments.results import Results
from harness_rect.methods import METHODS
from harness_rect.session.report import EditReport


def general_tasks(one: Results) -> list[str]:
    """The general tasks that were evaluated, in the catalogue's order."""
    return [name for name in catalogue.GENERAL.members if name in one.tasks]


def score_table(
    title: str,
    columns: Mapping[str, Results],
    tasks: Sequence[str],
    left: tuple[Results, Results] | None = None,
    saved: tuple[Results, Results] | None = None,
) -> Table:
    """Headline scores, their mean where all general tasks are there, and how the edits did.

    Args:
        columns: heading -> evaluation, which has all ``tasks``.
        left: (before, after): a column with the share of the first that the second has.
        saved: (without, with): a column with the second minus the first.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score")
    for heading in [*columns, *["left"] * (left is not None), *["saved"] * (saved is not None)]:
        table.add_column(heading, justify="right")
    rows = {catalogue.title(task): [task] for task in tasks}
    if len(tasks) == len(catalogue.GENERAL.members):
        rows[catalogue.title(catalogue.GENERAL.name)] = list(tasks)
    for name, of in rows.items():
        cells = [f"{mean_score(one, of):.3f}" for one in columns.values()]
        if left is not None:
            before, after = (mean_score(one, of) for one in left)
            cells.append(f"{after / before:.0%}" if before > 0 else "-")
        if saved is not None:
            without, with_it = (mean_score(one, of) for one in saved)
            cells.append(f"{with_it - without:+.3f}")
        if len(of) > 1:
            table.add_section()
        table.add_row(name, *cells)
    if any(reliability(one) is not None for one in columns.values()):
        table.add_section()
        found = map(reliability, columns.values())
        table.add_row("Reliability of the edits*", *("-" if one is None else f"{one:.3f}" for one in found))
        table.caption = f"* right after each edit, {EDITING_PROTOCOL}"
        table.caption_justify = "left"
    return table


def reliability(one: Results) -> float | None:
    """The share of target tokens that the model predicts right after each edit; None without edits."""
    return None if one.edit is None else one.edit.right_after_each_edit.get("reliability")


def mean_score(one: Results, tasks: Sequence[str]) -> float:
    """The mean of the tasks' headline scores."""
    return sum(one.scores(task)[one.headline(task)].value for task in tasks) / len(tasks)


def name_of(edit: EditReport | None) -> str:
    """``unedited``, ``ROME`` or ``ROME + rect 0.4``."""
    if edit is None or edit.method == "none":
        return "unedited"
    title = METHODS[edit.method].title
    if edit.regularizer == "none":
        return title
    return f"{title} + {edit.regularizer}" + (f" {edit.keep:g}" if edit.keep is not None else "")
