"""The evaluations that a page shows, and the numbers that are drawn from them.

Runs of one *setting* (model, method, arrangement of the edits) share a figure. In it a *series* is one
regularizer with one set of hyper-parameters, over numbers of edits. Runs of a series with the same number of
edits but other facts, another order or another seed are its *streams*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from harness_rect.evaluation.catalogue import EDITING_METRICS, GENERAL, TASKS
from harness_rect.evaluation.catalogue import title as task_title
from harness_rect.experiments.compare.comparison import retention
from harness_rect.experiments.compare.significance import CONFIDENCE
from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.results import Score
from harness_rect.session.report import WeightTotals, When

#: When edits are measured -> the words for it.
TIMES: dict[When, str] = {"after": "right after each edit", "end": "at the end"}


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    low, high: None where they cannot be computed.
    spread: what they are: "streams" (95% t-interval over three or more streams), "range" (of two streams),
        "documents" or "edits" (95% interval from a standard error over those), "none".
    n: streams.
    """

    value: float
    low: float | None
    high: float | None
    spread: str
    n: int


def estimate(scores: Sequence[Score], of: str = "documents", bounded: bool = False) -> Estimate | None:
    """The mean over streams; None without any.

    For one stream the interval comes from its standard error, over ``of``. A standard error of 0 (all right,
    or all wrong) does not measure the uncertainty and gives no interval.

    Args:
        bounded: whether the score lies in [0, 1], so that the interval is cut there.
    """
    found = _estimate(scores, of)
    if found is None or found.low is None or found.high is None or not bounded:
        return found
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def _estimate(scores: Sequence[Score], of: str) -> Estimate | None:
    values = [score.value for score in scores if math.isfinite(score.value)]
    if not values:
        return None
    mean, n = float(np.mean(values)), len(values)
    if n >= 3:
        spread = (
            float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
        )
        return Estimate(mean, mean - spread, mean + spread, "streams", n)
    if n == 2:
        return Estimate(mean, min(values), max(values), "range", n)
    stderr = next(score.stderr for score in scores if math.isfinite(score.value))
    if not stderr:
        return Estimate(mean, None, None, "none", 1)
    spread = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * stderr
    return Estimate(mean, mean - spread, mean + spread, of, 1)


@dataclass(frozen=True)
class Run:
    """One evaluation.

    file: its path below the folder. series: None for a model that was not edited by edited_hf.
    stream: digest of the edits and their seed. scores: task -> headline score.
    reported_mean: the group's score in the file. mean: over :attr:`Study.mean_of`.
    editing: time of measurement -> metric -> score over the edits. weights: name -> change of the weight.
    limit: of documents for each task.
    """

    file: str
    path: Path
    model: str
    series: Series | None
    n_edits: int
    stream: tuple[str, int]
    date: float
    scores: Mapping[str, Score]
    higher_is_better: Mapping[str, bool]
    reported_mean: Score | None
    editing: Mapping[When, Mapping[str, Score]]
    weights: Mapping[str, WeightTotals]
    provenance: Mapping[str, str]
    hparams: Mapping[str, Any]
    limit: float
    mean: Score | None = None


@dataclass(frozen=True)
class Example:
    """An answer that changed. kind: lost (right before, wrong after) or gained."""

    task: str
    doc_id: int
    kind: str
    prompt: str
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    """Answers of an edited model against those of the unedited one, for right/wrong metrics.

    counts: task -> (documents, lost, gained).
    """

    run: Run
    counts: Mapping[str, tuple[int, int, int]]
    examples: Sequence[Example]


@dataclass
class Study:
    """Everything that a page shows.

    tasks: general tasks in the order of the figures. mean_of: those whose mean is shown.
    notes: what was left out or differs between runs, one line each.
    """

    folder: Path
    runs: list[Run]
    tasks: list[str]
    mean_of: list[str]
    flips: list[Flips] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(run.series.setting for run in self.runs if run.series))

    def series(self, setting: Setting) -> list[Series]:
        return list(dict.fromkeys(r.series for r in self.runs if r.series and r.series.setting == setting))

    def base(self, model: str) -> Run | None:
        """The unedited evaluation of a model."""
        return next((run for run in self.runs if run.series is None and run.model == model), None)

    def at(self, series: Series, n_edits: int) -> list[Run]:
        """The streams of a series at a number of edits."""
        return [run for run in self.runs if run.series == series and run.n_edits == n_edits]

    def numbers(self, series: Series) -> list[int]:
        return sorted({run.n_edits for run in self.runs if run.series == series})

    def last(self, setting: Setting) -> dict[Series, int]:
        """The number of edits at which the series of a setting are compared.

        The largest that all of them have; without one, each series' own largest.
        """
        numbers = {series: set(self.numbers(series)) for series in self.series(setting)}
        common = set.intersection(*numbers.values()) if numbers else set()
        return {series: max(common or own) for series, own in numbers.items()}

    def curve(self, series: Series, task: str | None) -> list[tuple[int, Estimate]]:
        """(number of edits, score) of a task, or of the mean (None), from the unedited model on."""
        points = []
        if (base := self.base(series.setting.model)) and (score := _score(base, task)):
            points.append((0, estimate([score], bounded=self._bounded(task))))
        for number in self.numbers(series):
            found = [score for run in self.at(series, number) if (score := _score(run, task))]
            points.append((number, estimate(found, bounded=self._bounded(task))))
        return [(number, point) for number, point in points if point is not None]

    def editing(self, series: Series, n_edits: int, when: When, metric: str) -> Estimate | None:
        runs = self.at(series, n_edits)
        found = [score for run in runs if (score := run.editing.get(when, {}).get(metric))]
        return estimate(found, "edits", bounded=metric in EDITING_METRICS)

    def _bounded(self, task: str | None) -> bool:
        if task is None:
            return self.mean_of == list(GENERAL.members)
        return task in TASKS and TASKS[task].headline.share

    def ability(self, series: Series, n_edits: int) -> Estimate | None:
        means = [run.mean for run in self.at(series, n_edits) if run.mean]
        return estimate(means, bounded=self._bounded(None))

    def retained(self, series: Series, n_edits: int) -> float | None:
        """The share of the unedited model's mean that is retained."""
        base, mean = self.base(series.setting.model), self.ability(series, n_edits)
        return retention(base.mean.value, mean.value) if base and base.mean and mean else None

    def title(self, task: str | None) -> str:
        """Of a task, or of the mean (None)."""
        return self.mean_label if task is None else task_title(task)

    @property
    def mean_label(self) -> str:
        if self.mean_of == list(GENERAL.members):
            return GENERAL.mean_title
        return f"Mean of {len(self.mean_of)} task{'s' if len(self.mean_of) > 1 else ''}"


def _score(run: Run, task: str | None) -> Score | None:
    return run.mean if task is None else run.scores.get(task)
