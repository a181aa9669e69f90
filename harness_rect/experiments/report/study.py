"""The evaluations that a page shows, and the numbers computed from them.

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

from harness_rect.evaluation import catalogue
from harness_rect.evaluation.catalogue import EDITING_MEASURES, GROUPS, Metric, Protocol
from harness_rect.experiments.compare.comparison import retention
from harness_rect.experiments.compare.significance import CONFIDENCE
from harness_rect.experiments.report.series import Series, Setting
from harness_rect.experiments.results import Score
from harness_rect.session.report import EditReport, When

#: Times of measurement, and their names.
TIMES: dict[When, str] = {"after": "right after each edit", "end": "at the end"}


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    low, high: None where they cannot be computed.
    spread: how they were computed: "streams" (95% t-interval over three or more streams), "range" (of two
        streams), "documents" or "edits" (95% interval from a standard error over those), "none".
    n: streams.
    """

    value: float
    low: float | None
    high: float | None
    spread: str
    n: int

    @property
    def ends(self) -> list[float]:
        """``[low, high]``, or nothing without them."""
        return [] if self.low is None or self.high is None else [self.low, self.high]


def estimate(scores: Sequence[Score], of: str = "documents", bounded: bool = False) -> Estimate | None:
    """The mean over streams; None without any.

    For one stream the interval comes from its standard error, over ``of``. A standard error of 0 (all right,
    or all wrong) does not measure the uncertainty and gives no interval.

    Args:
        bounded: whether the score lies in [0, 1], so that the interval is cut there.
    """
    known = [score for score in scores if math.isfinite(score.value)]
    if not known:
        return None
    values = [score.value for score in known]
    mean, n = float(np.mean(values)), len(values)
    quantile = (1 + CONFIDENCE) / 2
    if n == 2:
        return Estimate(mean, min(values), max(values), "range", n)
    if n > 2:
        of, spread = (
            "streams",
            float(stats.t.ppf(quantile, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n),
        )
    elif known[0].stderr:
        spread = float(stats.norm.ppf(quantile)) * known[0].stderr
    else:
        return Estimate(mean, None, None, "none", n)
    low, high = mean - spread, mean + spread
    return (
        Estimate(mean, max(0.0, low), min(1.0, high), of, n) if bounded else Estimate(mean, low, high, of, n)
    )


#: A task and one of its metrics.
Measure = tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One evaluation.

    file: its path below the folder. paths: of all files that it was read from; what several have is of the
    last. series: None for a model that was not edited by edited_hf. weights: fingerprint of the model before
    edits, if known. edit: the edit report, without the single edits and steps. scores: task about an ability
    -> headline score, and group -> mean. measures: (task, metric) -> score, of all other tasks.
    reported_means: group -> its mean in the file. mean: over :attr:`Study.mean_of`.
    editing: time of measurement -> metric -> score over the edits. limit: of documents for each task.
    loaded: the edits that the model had when it was loaded.
    as_unedited: tasks for which the unedited model was measured on the same documents.
    """

    file: str
    paths: tuple[Path, ...]
    model: str
    series: Series | None
    edit: EditReport
    date: float
    scores: Mapping[str, Score]
    measures: Mapping[Measure, Score]
    higher_is_better: Mapping[str, bool]
    reported_means: Mapping[str, Score]
    editing: Mapping[When, Mapping[str, Score]]
    provenance: Mapping[str, str]
    limit: float
    loaded: str | None = None
    weights: str | None = None
    mean: Score | None = None
    as_unedited: frozenset[str] = frozenset()

    def of_model(self, name: str) -> Run:
        """The same under another name of the model."""
        series = self.series and replace(self.series, setting=replace(self.series.setting, model=name))
        return replace(self, model=name, series=series)

    @property
    def n_edits(self) -> int:
        return self.edit.n_edits

    @property
    def stream(self) -> tuple[str, int]:
        """What distinguishes the streams of a series: the edits and their seed."""
        return str(self.edit.edits_sha256), self.edit.edit_seed or 0

    @property
    def order(self) -> tuple[Any, ...]:
        """By model, the unedited one first, then by method, regularizer, number of edits and stream."""
        if self.series is None:
            return self.model, False
        return self.model, True, self.series.setting.order, self.series.order, self.n_edits, self.stream

    @property
    def tasks(self) -> set[str]:
        """All that was evaluated."""
        return {*self.scores, *(task for task, _ in self.measures)}

    @property
    def hparams(self) -> dict[str, Any]:
        return self.edit.hparams | {"second moments": self.edit.second_moments}

    def score(self, task: str | None) -> Score | None:
        """The headline of a task, or the mean (None)."""
        return self.mean if task is None else self.scores.get(task)


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

    tasks: tasks about abilities in the order of the figures, each group with a mean of its own before its
    members. mean_of: those whose mean stands for all abilities. measures: metrics of all other tasks.
    notes: what was left out or differs between runs, one line each.
    """

    folder: Path
    runs: list[Run]
    tasks: list[str]
    mean_of: list[str]
    measures: list[Measure] = field(default_factory=list)
    flips: list[Flips] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(run.series.setting for run in self.runs if run.series))

    @property
    def shown(self) -> list[str | None]:
        """What is drawn: the mean (None), if there is one, and the tasks."""
        return [None, *self.tasks] if self.mean_of else [*self.tasks]

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
        base = self.base(series.setting.model)
        runs = {0: [base] if base else []} | {n: self.at(series, n) for n in self.numbers(series)}
        points = {n: self._estimate(of, task) for n, of in runs.items()}
        return [(n, point) for n, point in points.items() if point is not None]

    def _estimate(self, runs: Sequence[Run], task: str | None) -> Estimate | None:
        known = self.metric(task)
        found = [score for run in runs if (score := run.score(task))]
        return estimate(found, bounded=known is not None and known.share)

    def measure(self, series: Series, n_edits: int, measure: Measure) -> Estimate | None:
        """A metric of a task that is not about an ability."""
        known = catalogue.entry(*measure)
        found = [score for run in self.at(series, n_edits) if (score := run.measures.get(measure))]
        return estimate(found, bounded=known is not None and known.share)

    def unedited(self, last: Mapping[Series, int], measure: Measure) -> float | None:
        """The same of the unedited model, where all these series were measured on its documents."""
        runs = [run for series, n in last.items() for run in self.at(series, n) if measure in run.measures]
        base = self.base(runs[0].model) if runs else None
        score = base.measures.get(measure) if base else None
        return score.value if score and all(measure[0] in run.as_unedited for run in runs) else None

    def protocols(self) -> list[Protocol | None]:
        """Those of the measures, in the order of their tasks."""
        return list(dict.fromkeys(catalogue.protocol(*measure) for measure in self.measures))

    def editing(self, series: Series, n_edits: int, when: When, metric: str) -> Estimate | None:
        runs = self.at(series, n_edits)
        found = [score for run in runs if (score := run.editing.get(when, {}).get(metric))]
        return estimate(found, "edits", bounded=any(metric in of for of in EDITING_MEASURES.values()))

    def ability(self, series: Series, n_edits: int) -> Estimate | None:
        return self._estimate(self.at(series, n_edits), None)

    def retained(self, series: Series, n_edits: int) -> float | None:
        """The share of the unedited model's mean that is retained."""
        base, mean = self.base(series.setting.model), self.ability(series, n_edits)
        return retention(base.mean.value, mean.value) if base and base.mean and mean else None

    def metric(self, task: str | None) -> Metric | None:
        """The headline of a task, or the mean (None), where the catalogue has it."""
        return catalogue.headline(self._mean_group if task is None else task)

    def title(self, task: str | None) -> str:
        """Of a task, or of the mean (None)."""
        return self.mean_label if task is None else catalogue.title(task)

    def improves_upwards(self, task: str | None) -> bool:
        return task is None or all(run.higher_is_better.get(task, True) for run in self.runs)

    @property
    def mean_label(self) -> str:
        if self._mean_group:
            return catalogue.title(self._mean_group)
        return f"Mean of {len(self.mean_of)} task{'s' if len(self.mean_of) > 1 else ''}"

    @property
    def _mean_group(self) -> str:
        """The group of which the mean is; empty where it is of other tasks."""
        return next((n for n, g in GROUPS.items() if g.mean and list(g.members) == self.mean_of), "")
