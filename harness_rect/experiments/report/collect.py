"""What a report shows, read from a folder of lm-eval results files into plain objects.

Runs of one *setting* (model, method, how the edits arrive) belong into one picture; within it a *series* is
one regularizer with one set of hyper-parameters, over numbers of edits. Runs of a series with the same number
of edits but other facts, another order or another seed are its *streams*.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from harness_rect import embedded
from harness_rect.evaluation.catalogue import GENERAL, TASKS, is_editing
from harness_rect.experiments import results
from harness_rect.experiments.compare.comparison import find_differences, retention
from harness_rect.experiments.compare.pairing import Unpairable, pair
from harness_rect.experiments.compare.significance import CONFIDENCE
from harness_rect.experiments.results import Results, Score

#: Editing metrics that are drawn, and the two moments at which a stream is scored.
EDITING_METRICS = ("reliability", "generalization", "locality")
MOMENTS = {"right_after_each_edit": "right after each edit", "at_the_end": "at the end"}
_IN_EDITS = {"right_after_each_edit": "after", "at_the_end": "end"}
NO_REGULARIZER = "no regularizer"
_METHODS = {
    "rome": "ROME",
    "r_rome": "r-ROME",
    "memit": "MEMIT",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "kn": "KN",
    "mend": "MEND",
    "ft": "FT",
    "ft_l": "FT-L",
    "locft_bf": "LocFT-BF",
    "ultraedit": "UltraEdit",
}
_REGULARIZERS = {"rect": "RECT", "random": "Random", "pca": "PCA", "prune": "PRUNE", "sphere": "SPHERE"}
#: Examples a task gives for each run: answers that became wrong, and that became right.
_EXAMPLES = {"lost": 2, "gained": 1}


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    low, high: None where there is nothing to compute them from.
    spread: what they span: "streams" (95% t-interval over three streams or more), "range" (the two streams
        there are), "documents" or "edits" (95% from a standard error over those), "none".
    n: streams.
    """

    value: float
    low: float | None
    high: float | None
    spread: str
    n: int


def estimate(scores: Sequence[Score], of: str = "documents", bounded: bool = False) -> Estimate | None:
    """The mean over streams; None without any.

    Of one stream the interval is that of its own standard error, over ``of``. A standard error of 0 (all
    right, or all wrong) says nothing of how far chance reaches, and gives none.

    Args:
        bounded: the score cannot leave [0, 1], and neither does the interval.
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
class Setting:
    """What shares a figure: one model, one method, one way for the edits to arrive."""

    model: str
    method: str

    @property
    def label(self) -> str:
        return f"{self.model}: {self.method}"


@dataclass(frozen=True)
class Series:
    """A line of a figure."""

    setting: Setting
    regularizer: str


@dataclass(frozen=True)
class Weight:
    """What a run did to one weight; see :func:`harness_rect.weight_change.weight_change`."""

    name: str
    manhattan: float | None
    share_over: Mapping[str, float]
    histogram: Sequence[int]
    changed: float
    heat_map: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Run:
    """One evaluation.

    file: its path below the folder. series: None for an unedited model (or one edited elsewhere).
    batch: facts an edit.
    stream: tells streams of one series and number of edits apart. scores: task -> headline score.
    mean: over :attr:`Study.mean_of`. editing: moment -> metric -> score over the edits.
    """

    file: str
    path: Path
    model: str
    series: Series | None
    n_edits: int
    batch: int
    stream: tuple[str, int]
    date: float
    scores: Mapping[str, Score]
    metrics: Mapping[str, str]
    higher_is_better: Mapping[str, bool]
    reported_mean: Score | None
    editing: Mapping[str, Mapping[str, Score]]
    weights: Sequence[Weight]
    provenance: Mapping[str, str]
    hparams: Mapping[str, Any]
    limit: float
    mean: Score | None = None


@dataclass(frozen=True)
class Example:
    """An answer that flipped. kind: lost (right before, wrong after) or gained."""

    task: str
    doc_id: int
    kind: str
    prompt: str
    target: str
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    """Answers of an edited model against the unedited one's, for right/wrong metrics.

    counts: task -> (documents, lost, gained).
    """

    run: Run
    counts: Mapping[str, tuple[int, int, int]]
    examples: Sequence[Example]


@dataclass
class Study:
    """Everything a report shows.

    tasks: general tasks in the order of the figures. mean_of: those whose mean is "the ability".
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
        """The number of edits at which the series of a setting are set side by side.

        The largest that all have; without one, each series' own largest.
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

    def editing(self, series: Series, n_edits: int, moment: str, metric: str) -> Estimate | None:
        runs = self.at(series, n_edits)
        found = [score for run in runs if (score := run.editing.get(moment, {}).get(metric))]
        return estimate(found, "edits", bounded=metric in EDITING_METRICS)

    def _bounded(self, task: str | None) -> bool:
        if task is None:
            return self.mean_of == list(GENERAL.members)
        return task in TASKS and TASKS[task].headline.share

    def ability(self, series: Series, n_edits: int) -> Estimate | None:
        means = [run.mean for run in self.at(series, n_edits) if run.mean]
        return estimate(means, bounded=self._bounded(None))

    def retained(self, series: Series, n_edits: int) -> float | None:
        """The share of the unedited model's mean that is left."""
        base, mean = self.base(series.setting.model), self.ability(series, n_edits)
        return retention(base.mean.value, mean.value) if base and base.mean and mean else None

    @property
    def mean_label(self) -> str:
        if self.mean_of == list(GENERAL.members):
            return GENERAL.mean_title
        return f"Mean of {len(self.mean_of)} task{'s' if len(self.mean_of) > 1 else ''}"


def _score(run: Run, task: str | None) -> Score | None:
    return run.mean if task is None else run.scores.get(task)


# --------------------------------------------------------------------------------------------- collecting


def collect(folder: Path | str, on_file: Callable[[int, int], None] | None = None) -> Study:
    """Read all results files below ``folder``.

    Args:
        on_file: told (files done, files in all); every file is read twice, the second time with its samples.

    Raises:
        UserError: if there are none, or one cannot be read; the message names it.
    """
    folder = Path(folder)
    paths = results.find(folder)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if on_file is not None:
            on_file(done, 2 * len(paths))

    runs = []
    for path in paths:
        runs.append(_run(results.load(path), folder))
        step()
    runs, notes = _without_repetitions(_named(runs))
    runs.sort(key=lambda run: (run.model, run.series is not None, _order(run)))
    tasks = _tasks(runs)
    edited = [run for run in runs if run.series] or runs
    everywhere = [task for task in tasks if all(task in run.scores for run in edited)]
    mean_of = (
        list(GENERAL.members)
        if set(GENERAL.members) <= set(tasks)
        else [t for t in everywhere if _goes_up(runs, t)]
    )
    study = Study(folder, runs, tasks, mean_of, notes=notes)
    _read_samples(study, step)
    study.runs = [replace(run, mean=_mean(run, mean_of)) for run in study.runs]
    return study


def _run(one: Results, folder: Path) -> Run:
    edit = one.edit
    tasks = [task for task in one.tasks if not is_editing(task)]
    headlines = {task: one.headline(task) for task in tasks}
    group = one.groups.get(GENERAL.name)
    n_edits = int(edit.get("n_edits") or 0)
    root = folder if folder.is_dir() else folder.parent
    model = _model(one)
    method = str(edit.get("method"))
    setting = Setting(model, _METHODS.get(method, method))
    return Run(
        file=one.path.relative_to(root).as_posix(),
        path=one.path,
        model=model,
        series=Series(setting, _regularizer(edit)) if n_edits else None,
        n_edits=n_edits,
        batch=int(edit.get("edit_batch_size") or 1),
        stream=(str(edit.get("edits_sha256")), int(edit.get("edit_seed") or 0)),
        date=_number(one.file.date),
        scores={task: one.scores(task)[key] for task, key in headlines.items()},
        metrics={task: key.metric for task, key in headlines.items()},
        higher_is_better={task: one.higher_is_better(task, key.metric) for task, key in headlines.items()},
        reported_mean=one.scores(GENERAL.name)[one.headline(GENERAL.name)] if group else None,
        editing=_editing(edit),
        weights=_weights(edit),
        provenance=_provenance(one),
        hparams=(edit.get("hparams") or {}) | {"second moments": edit.get("second_moments")},
        limit=_number(one.file.config.get("limit") or math.inf),
    )


def _model(one: Results) -> str:
    """The model's name, with what else makes it another; edited_hf without one took the embedded model."""
    name = one.model_name
    if one.model_class == "edited_hf" and not one.model_args.get("pretrained"):
        name = str(one.edit.get("model") or embedded.NAME)
    said = [str(one.model_args[key]) for key in ("dtype", "revision", "peft") if one.model_args.get(key)]
    return f"{name} ({', '.join(said)})" if said else name


def _regularizer(edit: Mapping[str, Any]) -> str:
    """RECT 40%, Random 40%, PRUNE, ..."""
    name, keep = str(edit.get("regularizer") or "none"), edit.get("keep")
    if name == "none":
        return NO_REGULARIZER
    share = f" {100 * keep:g}%" if isinstance(keep, int | float) else ""
    convention = edit.get("rect_convention")
    return (
        _REGULARIZERS.get(name, name)
        + share
        + (f" ({convention})" if convention not in (None, "paper") else "")
    )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _editing(edit: Mapping[str, Any]) -> dict[str, dict[str, Score]]:
    """Means over edits as the report has them, with standard errors from the single edits."""
    found: dict[str, dict[str, Score]] = {}
    for moment, name in _IN_EDITS.items():
        for metric, value in (edit.get(moment) or {}).items():
            if not isinstance(value, int | float):
                continue
            single = [(one.get(name) or {}).get(metric) for one in edit.get("edits") or ()]
            values = [float(v) for v in single if isinstance(v, int | float)]
            stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
            found.setdefault(moment, {})[metric] = Score(float(value), stderr)
    return found


def _weights(edit: Mapping[str, Any]) -> list[Weight]:
    return [
        Weight(
            name,
            totals.get("manhattan_distance"),
            totals.get("share_over") or {},
            totals.get("delta_histogram") or (),
            float(totals.get("changed") or 0),
            totals.get("heat_map") or (),
        )
        for name, totals in (edit.get("weights") or {}).items()
    ]


#: Columns of the provenance table that stand in the edit report under the same name.
_IN_REPORT = ("hparams_origin", "edits_spec", "edit_batch_size", "edit_seed")
_HASHES = ("edits_sha256", "model_fingerprint", "run")


def _provenance(one: Results) -> dict[str, str]:
    edit, config = one.edit, one.file.config
    versions = edit.get("versions") or {}
    if one.file.lm_eval_version:
        versions = versions | {"lm_eval": one.file.lm_eval_version}
    seeds = [config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")]
    found = {
        "model class": one.model_class,
        **{name.replace("_", " "): edit.get(name) for name in _IN_REPORT},
        "second moments": edit.get("second_moments_origin"),
        "limit": config.get("limit"),
        "lm-eval seeds": None if set(seeds) == {None} else " ".join(map(str, seeds)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **{name.replace("_", " "): str(edit[name])[:12] for name in _HASHES if edit.get(name)},
    }
    return {name: _text(value) for name, value in found.items() if value not in (None, "")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------------------- naming the series


def _named(runs: Sequence[Run]) -> list[Run]:
    """Give settings and series the labels that depend on what else there is.

    Facts in batches: one batch of all of them is another experiment than a stream of batches. Series that
    differ in their hyper-parameters alone are told apart by the origin of those, else by their digest.
    """
    streams = {(run.series, run.batch, _digest(run)) for run in runs if run.n_edits > run.batch}
    named = []
    for run in runs:
        if run.series is not None and run.batch > 1:
            several = (run.series, run.batch, _digest(run)) in streams
            arrival = f"batches of {run.batch}" if several else "one batch"
            setting = replace(run.series.setting, method=f"{run.series.setting.method}, {arrival}")
            run = replace(run, series=replace(run.series, setting=setting))
        named.append(run)
    variants: dict[Series, dict[str, str]] = {}
    for run in named:
        if run.series is not None:
            origin = run.provenance.get("hparams origin", "")
            variants.setdefault(run.series, {}).setdefault(_digest(run), origin)
    return [_told_apart(run, variants) for run in named]


def _told_apart(run: Run, variants: Mapping[Series, Mapping[str, str]]) -> Run:
    if run.series is None or len(origins := variants[run.series]) == 1:
        return run
    digest = _digest(run)
    names = {of: Path(origin).name for of, origin in origins.items()}
    unique = all(names.values()) and len(set(names.values())) == len(names)
    label = f"{run.series.regularizer} [{names[digest] if unique else digest}]"
    return replace(run, series=replace(run.series, regularizer=label))


def _digest(run: Run) -> str:
    """Of the hyper-parameters; sampled context templates belong to a stream's seed."""
    said = {name: value for name, value in run.hparams.items() if name != "context_templates"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:6]


def _order(run: Run) -> tuple[Any, ...]:
    if run.series is None:
        return ()
    method = run.series.setting.method
    known = [i for i, label in enumerate(_METHODS.values()) if method.split(",")[0] == label]
    return (
        *(known or [len(_METHODS)]),
        method,
        regularizer_order(run.series.regularizer),
        run.n_edits,
        run.stream,
    )


def regularizer_order(label: str) -> tuple[int, float, str]:
    """None first, then RECT, Random, PCA, ..., those that keep most first."""
    if label.startswith(NO_REGULARIZER):
        return (-1, 0.0, label)
    name, _, share = label.partition(" ")
    known = list(_REGULARIZERS.values())
    place = known.index(name) if name in known else len(known)
    return (place, -_number(share.split("%")[0]), label)


def _without_repetitions(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Of evaluations of the same thing that on most documents, then the newest; a line for each left out."""
    newest: dict[tuple[Any, ...], Run] = {}
    notes = []
    for run in sorted(runs, key=lambda run: (run.limit, run.date, run.file)):
        key = (run.model, run.series, run.n_edits, run.stream if run.series else None)
        if (older := newest.get(key)) is not None:
            if set(older.scores) <= set(run.scores):
                more = "has more documents of" if run.limit > older.limit else "is newer and evaluates"
                notes.append(f"{older.file} is left out: {run.file} {more} the same.")
            else:  # other tasks of the same model: one run with all of them
                notes.append(f"{older.file} and {run.file} evaluate the same model and are taken together.")
                run = _merged(older, run)
        newest[key] = run
    return list(newest.values()), notes


def _merged(older: Run, newer: Run) -> Run:
    """The newer run, with the scores that only the older one has."""
    return replace(
        newer,
        scores={**older.scores, **newer.scores},
        metrics={**older.metrics, **newer.metrics},
        higher_is_better={**older.higher_is_better, **newer.higher_is_better},
        reported_mean=newer.reported_mean or older.reported_mean,
    )


# --------------------------------------------------------------------------------------- means and samples


def _tasks(runs: Iterable[Run]) -> list[str]:
    """The tasks of this package first, in the catalogue's order, then all others as they come."""
    found = list(dict.fromkeys(task for run in runs for task in run.scores))
    return [*(task for task in TASKS if task in found), *(task for task in found if task not in TASKS)]


def _goes_up(runs: Iterable[Run], task: str) -> bool:
    return all(run.higher_is_better.get(task, True) for run in runs)


def _mean(run: Run, tasks: Sequence[str]) -> Score | None:
    """The mean of the tasks, None without all of them; its standard error, where each has one."""
    scores = [run.scores[task] for task in tasks if task in run.scores]
    if not tasks or len(scores) < len(tasks):
        return None
    stderrs = [score.stderr for score in scores]
    stderr = None
    if None not in stderrs:
        stderr = math.hypot(*(s for s in stderrs if s is not None)) / len(scores)
    if run.reported_mean is not None and tasks == list(GENERAL.members):
        return Score(run.reported_mean.value, stderr)
    return Score(float(np.mean([score.value for score in scores])), stderr)


def _read_samples(study: Study, step: Callable[[], None]) -> None:
    """What needs the samples: missing standard errors, differences between runs, flipped answers.

    One run is held in memory beside its base at a time.
    """
    shown = {
        study.at(series, number)[0].file
        for setting in study.settings
        for series, number in study.last(setting).items()
    }
    bases = {run.model: run for run in study.runs if run.series is None}
    completed = {}
    for model in dict.fromkeys(run.model for run in study.runs):
        base = results.load(bases[model].path) if model in bases else None
        for run in (run for run in study.runs if run.model == model):
            one = base if base is not None and run.path == base.path else results.load(run.path)
            completed[run.file] = _with_stderrs(run, one)
            if base is not None and one is not base:
                study.notes += _differences(base, one, run, bases[model])
                if run.file in shown and (flips := _flips(base, one, run)) is not None:
                    study.flips.append(flips)
            step()
    study.runs = [completed[run.file] for run in study.runs]
    order = {run.file: place for place, run in enumerate(study.runs)}
    study.flips.sort(key=lambda flips: order[flips.run.file])


def _with_stderrs(run: Run, one: Results) -> Run:
    """Standard errors that lm-eval does not give (F1 and other ratios), from the samples by jackknife."""
    found = {}
    for task in run.scores.keys() & one.tasks.keys():
        if run.scores[task].stderr is not None or one.samples(task) is None:
            continue
        key = one.headline(task)
        try:
            stratum = pair(one, one, task, key).stratum
        except Unpairable:
            continue
        units = len(stratum.base)
        if units > 1:
            left_out = stratum.score(stratum.base.sum(0) - stratum.base)
            spread = math.sqrt((units - 1) / units * float(((left_out - left_out.mean()) ** 2).sum()))
            found[task] = Score(run.scores[task].value, spread)
    return replace(run, scores={**run.scores, **found})


def _differences(base: Results, one: Results, run: Run, base_run: Run) -> list[str]:
    shared = [task for task in one.tasks if task in base.tasks and not is_editing(task)]
    found = find_differences(base, one, shared, expected=("edit_seed",))
    return [
        f"{run.file} and {base_run.file} differ, so their scores should not be compared: {line}"
        for line in found
    ]


def _flips(base: Results, one: Results, run: Run) -> Flips | None:
    """None where no right/wrong metric has samples on both sides."""
    counts: dict[str, tuple[int, int, int]] = {}
    examples: list[Example] = []
    for task in _tasks([run]):
        if task not in base.tasks or task not in one.tasks:
            continue
        key = base.headline(task)
        try:
            paired = pair(base, one, task, key)
        except (Unpairable, KeyError):
            continue
        if paired.outcomes is None:
            continue
        counts[task] = (paired.documents, *paired.outcomes)
        before, after = ((side.samples(task) or {})[key.filter] for side in (base, one))
        left = dict(_EXAMPLES)
        for first, second in zip(before, after, strict=True):
            right = [sample.values.get(key.metric) for sample in (first, second)]
            kind = "lost" if right[0] and not right[1] else "gained" if right[1] and not right[0] else ""
            if left.get(kind):
                left[kind] -= 1
                said = (first.prompt, first.target, first.answer, second.answer)
                examples.append(Example(task, first.doc_id, kind, *(_shortened(text) for text in said)))
    return Flips(run, counts, examples) if counts else None


def _shortened(text: str | None, most: int = 700) -> str:
    """Long prompts keep their end, where the question is."""
    if text is None:
        return "(not in the samples)"
    return text if len(text) <= most else f"… {text[-most:]}"
