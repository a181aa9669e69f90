"""Published numbers beside ours: which of them are of the same setting, and by how much we differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel, ConfigDict

from harness_rect.errors import UserError, did_you_mean
from harness_rect.evaluation.catalogue import EDITING_METRICS, EDITING_PROTOCOL, TASKS, Protocol, protocol
from harness_rect.evaluation.catalogue import title as task_title
from harness_rect.experiments import results
from harness_rect.experiments.report.drawing import FigureSpec, Look, Panel
from harness_rect.experiments.report.figures import axis_label, count, interval, looks, number
from harness_rect.experiments.report.series import Regularization, Series
from harness_rect.experiments.report.study import Estimate, Run, Study, estimate
from harness_rect.experiments.results import Score

#: Name for ``--reference`` -> its numbers.
FILES = {"paper": Path(__file__).with_name("paper.yaml")}
MANHATTAN = "manhattan_distance"


class Published(BaseModel):
    """Numbers of one published setting.

    figure: where they stand. error: how far off a number can be from reading it; 0 where it is printed.
    scores: task -> metric -> value. editing: metric -> value right after each edit. weights: the Manhattan
    distance, and shares of elements by the threshold of their relative change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    figure: str
    model: str
    method: str = "none"
    regularizer: str = "none"
    settings: dict[str, Any] = {}
    edits: int
    dataset: str | None = None
    error: float
    scores: dict[str, dict[str, float]] = {}
    editing: dict[str, float] = {}
    weights: dict[str, float] = {}


class Reference(BaseModel):
    """All numbers of a publication. models: its name of a model -> names it goes by. differences: what is
    known to differ from runs of this package -> how.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    models: dict[str, list[str]]
    values: list[Published]
    differences: dict[str, str]

    def model(self, name: str) -> str | None:
        """The publication's name of a model that is given as a hub name, a path, or its last part."""
        last = re.split(r"[/\\]", name.partition(" (")[0].rstrip("/\\"))[-1].lower()
        return next((model for model, known in self.models.items() if last in known), None)


@cache
def read_reference(name: str) -> Reference:
    """The numbers that ``--reference`` names.

    Raises:
        UserError: there are none of that name.
    """
    if name not in FILES:
        raise UserError(f"--reference {name}: no such numbers: {did_you_mean(name, FILES)}")
    return Reference(**yaml.safe_load(FILES[name].read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Row:
    """One published number, and ours of the same setting.

    series: None for the unedited model. task: of a score, else empty. differs: what else than the known
    differences tells our runs from the setting.
    """

    published: Published
    model: str
    series: Series | None
    task: str
    metric: str
    ours: Estimate
    theirs: float
    facts: int
    differs: str

    @property
    def protocol(self) -> Protocol | None:
        """How the metric gets at the model's answer; None of the weights."""
        if self.task:
            return protocol(self.task, self.metric)
        return EDITING_PROTOCOL if self.metric in EDITING_METRICS else None

    @property
    def cells(self) -> list[str]:
        """Setting, edits, figure, what is measured, ours, theirs, difference, reading error, what differs."""
        setting = f"{self.model}: unedited"
        if self.series:
            setting = f"{self.series.setting.label}, {self.series.label}"
        if self.metric == MANHATTAN:
            measured = "Manhattan distance"
        elif self.metric in self.published.weights:
            measured = f"delta > {self.metric}"
        elif self.task:
            measured = f"{task_title(self.task)}, {self.metric}"
        else:
            measured = f"{self.metric} of {count(self.facts, 'fact')}"
        difference = self.ours.value - self.theirs
        return [
            setting,
            str(self.published.edits),
            self.published.figure,
            measured,
            interval(self.ours),
            number(self.theirs),
            f"{difference:+.3f}" if abs(difference) < 1000 else f"{difference:+,.0f}",
            f"{self.published.error:g}" if self.published.error else "printed",
            self.differs or "-",
        ]


HEADER = (
    *("setting", "edits", "figure", "measured", "ours", "theirs", "difference", "reading error"),
    "beside the known differences",
)


def compared(study: Study, reference: Reference) -> list[Row]:
    """Every published number of a setting that the study has."""
    rows = []
    every = [series for setting in study.settings for series in study.series(setting)]
    for published in reference.values:
        if published.edits == 0:
            bases = [run for run in study.runs if run.series is None]
            for run in bases:
                if reference.model(run.model) == published.model:
                    rows += _rows(study, published, None, [run], ())
            continue
        wanted = Regularization.of(published.regularizer, published.settings)
        for series in every:
            of = series.setting
            if (reference.model(of.model), of.method, of.batch) != (published.model, published.method, 1):
                continue
            if series.regularizer == wanted and (runs := study.at(series, published.edits)):
                rows += _rows(study, published, series, runs, reference.models[published.model])
    return rows


def _rows(
    study: Study, published: Published, series: Series | None, runs: Sequence[Run], presets: Collection[str]
) -> list[Row]:
    ours: dict[tuple[str, str], tuple[Estimate | None, float]] = {}
    for task, metrics in published.scores.items():
        for metric, value in metrics.items():
            found = [score for run in runs if (score := _score(run, task, metric)) is not None]
            ours[task, metric] = estimate(found, bounded=True), value
    for metric, value in published.editing.items():
        point = study.editing(series, published.edits, "after", metric) if series else None
        ours["", metric] = point, value
    for metric, value in published.weights.items():
        changes = [change for run in runs if (change := _change(run, metric)) is not None]
        ours["", metric] = estimate([Score(change, None) for change in changes]), value
    differs = _differs(published, runs, presets)
    facts = published.edits * len(runs)
    return [
        Row(published, runs[0].model, series, task, metric, point, value, facts, differs)
        for (task, metric), (point, value) in ours.items()
        if point is not None
    ]


def _score(run: Run, task: str, metric: str) -> Score | None:
    if task in run.scores and task in TASKS and metric == TASKS[task].headline.name:
        return run.scores[task]
    files = (results.load(path) for path in reversed(run.paths))
    scores = next((one.scores(task) for one in files if task in one.tasks), {})
    return next((score for key, score in scores.items() if key.metric == metric), None)


def _change(run: Run, metric: str) -> float | None:
    """The Manhattan distance over all edited weights, or the mean share of their elements."""
    weights = run.edit.weights.values()
    if metric == MANHATTAN:
        moved = [weight.manhattan_distance for weight in weights if weight.manhattan_distance is not None]
        return sum(moved) if moved else None
    shares = [weight.share_over[metric] for weight in weights if metric in weight.share_over]
    return sum(shares) / len(shares) if shares else None


def _differs(published: Published, runs: Sequence[Run], presets: Collection[str]) -> str:
    """presets: those of the publication's model."""
    found = []
    facts = {str(run.edit.edits_spec).partition("[")[0] for run in runs if run.series}
    if published.dataset and (other := facts - {published.dataset}):
        found.append(f"facts of {', '.join(sorted(other))}")
    if limits := {run.limit for run in runs if run.limit != float("inf")}:
        found.append(f"limit {', '.join(f'{limit:g}' for limit in sorted(limits))}")
    origins = {str(run.edit.hparams_origin) for run in runs if run.series}
    if others := origins - {f"preset {name}" for name in presets}:
        found.append(f"hyper-parameters of {', '.join(sorted(others))}")
    return "; ".join(found)


def specs(study: Study, rows: Sequence[Row]) -> list[FigureSpec]:
    """For each model and method our curves with the published points, of the headlines of tasks."""
    drawn = [r for r in rows if r.task and r.metric == TASKS[r.task].headline.name]
    styles, found = looks(study), []
    for i, setting in enumerate(study.settings):
        here = [r for r in drawn if r.series and r.series.setting == setting]
        panels = []
        for task in dict.fromkeys(r.task for r in here):
            theirs: dict[Series, list[Row]] = {}
            for row in here:
                if row.series and row.task == task:
                    theirs.setdefault(row.series, []).append(row)
            base = [r for r in drawn if r.series is None and r.model == setting.model and r.task == task]
            curves = {series: study.curve(series, task) for series in theirs}
            texts = (
                f"{series.label}, {r.published.edits} edits: ours {number(r.ours.value)}, theirs"
                f" {number(r.theirs)}"
                for series, of in theirs.items()
                for r in of
            )
            draw = partial(_curves, curves, theirs, base, styles, axis_label(TASKS[task].headline))
            panels.append(Panel(task_title(task), f"Curves and points. {'; '.join(texts)}.", draw))
        if panels:
            legend = [(s.label, styles[s]) for s in dict.fromkeys(r.series for r in here if r.series)]
            found.append(
                FigureSpec(
                    f"reference-{i}",
                    setting.label,
                    "Lines are ours; open circles with the reading error are the published numbers.",
                    panels,
                    legend,
                )
            )
    return found


def _curves(
    curves: Mapping[Series, Sequence[tuple[int, Estimate]]],
    theirs: Mapping[Series, Sequence[Row]],
    base: Sequence[Row],
    styles: Mapping[Any, Look],
    label: str,
    axes: Axes,
) -> None:
    point: Callable[..., Any] = partial(axes.errorbar, marker="o", ms=9, mfc="none", capsize=3, ls="")
    for series, curve in curves.items():
        look = styles[series]
        axes.plot([n for n, _ in curve], [e.value for _, e in curve], color=look.color, ls=look.line)
        for row in theirs[series]:
            point([row.published.edits], [row.theirs], yerr=row.published.error, color=look.color)
    for row in base:
        point([0], [row.theirs], yerr=row.published.error, color=styles[next(iter(curves))].color)
    axes.set(xlabel="number of edits", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
