"""Reading a folder of lm-eval results files into a :class:`~harness_rect.experiments.report.study.Study`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from harness_rect.errors import UserError
from harness_rect.evaluation.catalogue import GENERAL, GROUPS, TASKS, headline, is_ability
from harness_rect.experiments import results
from harness_rect.experiments.compare.differences import SEEDS, find_differences
from harness_rect.experiments.compare.pairing import Unpairable, pair
from harness_rect.experiments.report.repetitions import ByTask, by_task, differences, without_repetitions
from harness_rect.experiments.report.series import Regularization, Series, Setting
from harness_rect.experiments.report.study import TIMES, Example, Flips, Measure, Run, Study
from harness_rect.experiments.results import Key, Results, Score
from harness_rect.session.report import UNEDITED, EditReport, When

#: Examples shown of each task and run: answers that became wrong, and that became right.
_EXAMPLES = {"lost": 2, "gained": 1}


def read_study(folder: Path | str, on_file: Callable[[int, int], None] | None = None) -> Study:
    """Read all results files below ``folder``.

    Args:
        on_file: called with (files done, number of files); each file is read twice, then with its samples.

    Raises:
        UserError: there are none that can be read. One of several is named in the notes.
    """
    folder = Path(folder)
    paths = results.find(folder)
    reports = iter(range(1, 2 * len(paths) + 1))

    def step() -> None:
        if on_file is not None:
            on_file(next(reports), 2 * len(paths))

    runs, unread, failed = [], [], []
    for path in paths:
        try:
            one = results.load(path)
            runs.append(_run(one, folder))
            failed += [f"{runs[-1].file}: {line}: do not trust its scores." for line in one.failed_checks]
        except UserError as error:
            unread.append(str(error))
        step()
    if not runs:
        raise UserError(f"{folder}: no results file can be read: {unread[0]}")
    runs, notes = without_repetitions(_separated(_of_one_model(runs)))
    notes = [*failed, *(f"This file cannot be read and is left out: {line}" for line in unread), *notes]
    runs.sort(key=lambda run: run.order)
    tasks = _tasks(runs)
    complete = [group.name for group in GROUPS.values() if group.mean and set(group.members) <= set(tasks)]
    mean_of = list(GROUPS[complete[0]].members) if complete else _alike(runs, tasks)
    study = Study(folder, runs, tasks, mean_of, _measures(runs), notes=notes)
    _read_samples(study, step)
    study.runs = [replace(run, mean=_mean(run, mean_of)) for run in study.runs]
    for group in complete[1:]:
        _add_mean(study, group)
    return study


def _alike(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    """Where no group with a mean is complete: the tasks that all edited runs have and that have a mean.

    These are shares or unknown, better when higher, and of one group; those of others go with the general
    ones.
    """
    edited = [run for run in runs if run.series] or runs
    found: dict[str, list[str]] = {GENERAL.name: []}
    for task in tasks:
        known = headline(task)
        up = all(run.higher_is_better.get(task, True) for run in runs)
        if up and (known is None or known.share) and all(task in run.scores for run in edited):
            found.setdefault(TASKS[task].group if task in TASKS else GENERAL.name, []).append(task)
    return next((of for of in found.values() if of), [])


def _add_mean(study: Study, group: str) -> None:
    """The mean of a group as one more score, shown before those of its members."""
    members = GROUPS[group].members
    for place, run in enumerate(study.runs):
        if (mean := _mean(run, members)) is not None:
            study.runs[place] = replace(run, scores={**run.scores, group: mean})
    study.tasks.insert(study.tasks.index(members[0]), group)


def _run(one: Results, folder: Path) -> Run:
    edit = one.edit or UNEDITED
    headlines = {task: one.headline(task) for task in one.tasks if is_ability(task)}
    others = [(task, key) for task in one.tasks if not is_ability(task) for key in one.metrics(task)]
    root = folder if folder.is_dir() else folder.parent
    setting = Setting(one.full_name, edit.method, edit.edit_batch_size)
    series = Series(setting, Regularization.of(edit.regularizer, edit.settings))
    means = [group for group in one.groups if group in GROUPS and GROUPS[group].mean]
    return Run(
        file=one.path.relative_to(root).as_posix(),
        paths=(one.path,),
        model=one.full_name,
        series=series if edit.n_edits else None,
        edit=edit.model_copy(update={"edits": [], "steps": []}),
        date=_number(one.file.date),
        scores={task: one.scores(task)[key] for task, key in headlines.items()},
        measures={(task, key.metric): one.scores(task)[key] for task, key in others},
        higher_is_better={task: one.higher_is_better(task, key.metric) for task, key in headlines.items()},
        reported_means={group: one.scores(group)[one.headline(group)] for group in means},
        editing={when: _editing(edit, when) for when in TIMES},
        provenance=_provenance(one),
        limit=_number(one.file.config.get("limit") or math.inf),
        loaded=one.loaded,
        weights=one.fingerprint,
    )


def _of_one_model(runs: Sequence[Run]) -> list[Run]:
    """Runs whose model's name says which weights it had, where these are not the same in all runs."""
    known: dict[str, set[str | None]] = {}
    for run in runs:
        known.setdefault(run.model, set()).add(run.weights)
    several = {model for model, weights in known.items() if len(weights - {None}) > 1}
    return [
        run.of_model(f"{run.model} (weights {(run.weights or 'unknown')[:8]})")
        if run.model in several
        else run
        for run in runs
    ]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _editing(edit: EditReport, when: When) -> dict[str, Score]:
    """Means over edits as the report has them, with standard errors from the single edits."""
    found = {}
    for metric, value in edit.averages(when).items():
        single = [record.metrics(when).get(metric) for record in edit.edits]
        values = [v for v in single if v is not None]
        stderr = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        if value is not None:
            found[metric] = Score(value, stderr)
    return found


#: Columns of the provenance table that are fields of the edit report, as they are and shortened.
_FIELDS = ("hparams_origin", "edits_spec", "edit_batch_size", "edit_seed")
_HASHES = ("edits_sha256", "model_fingerprint", "run")


def _provenance(one: Results) -> dict[str, str]:
    edit, config = one.edit or UNEDITED, one.file.config
    versions = dict(edit.versions)
    if one.file.lm_eval_version:
        versions["lm_eval"] = one.file.lm_eval_version
    seeds = [config.get(name) for name in SEEDS]
    found = {
        "model class": one.model_class,
        **{name.replace("_", " "): getattr(edit, name) for name in _FIELDS if name in edit.model_fields_set},
        "second moments": edit.second_moments_origin,
        "limit": config.get("limit"),
        "lm-eval seeds": None if all(seed is None for seed in seeds) else " ".join(map(str, seeds)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **{name.replace("_", " "): (getattr(edit, name) or "")[:12] for name in _HASHES},
    }
    return {name: _text(value) for name, value in found.items() if value not in (None, "")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------------- which runs are a series


def _separated(runs: Sequence[Run]) -> list[Run]:
    """Runs with the parts of their series that depend on the other runs.

    All edits in one batch are another setting than a stream of batches. Series that differ in their
    hyper-parameters alone are named by the file these came from, or by a digest where that is not unique.
    """
    streams = {
        (run.series, _digest(run))
        for run in runs
        if run.series and run.n_edits > (run.series.setting.batch or 0)
    }
    separated = []
    origins: dict[Series, dict[str, str]] = {}  # digest -> file name, of all hyper-parameters in a series
    for run in runs:
        if (series := run.series) is not None:
            if series.setting.batch != 1 and (series, _digest(run)) not in streams:
                series = replace(series, setting=replace(series.setting, batch=None))
            origin = Path(run.edit.hparams_origin or "").name
            origins.setdefault(series, {}).setdefault(_digest(run), origin)
        separated.append(replace(run, series=series))
    for place, run in enumerate(separated):
        if run.series and len(names := origins[run.series]) > 1:
            unique = all(names.values()) and len(set(names.values())) == len(names)
            hparams = names[_digest(run)] if unique else _digest(run)
            separated[place] = replace(run, series=replace(run.series, hparams=hparams))
    return separated


def _digest(run: Run) -> str:
    """Of the hyper-parameters; sampled context templates belong to a stream's seed."""
    fixed = {name: value for name, value in run.hparams.items() if name != "context_templates"}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:6]


# ---------------------------------------------------------------------------------------- means and samples


def _tasks(runs: Iterable[Run]) -> list[str]:
    """The tasks of this package first, in the catalogue's order, then all others as they come."""
    found = list(dict.fromkeys(task for run in runs for task in run.scores))
    return [*(task for task in TASKS if task in found), *(task for task in found if task not in TASKS)]


def _measures(runs: Iterable[Run]) -> list[Measure]:
    """In the catalogue's order, as far as it goes."""
    found = list(dict.fromkeys(measure for run in runs for measure in run.measures))
    known = [(name, metric.name) for name, task in TASKS.items() for metric in task.metrics]
    return [*(m for m in known if m in found), *(m for m in found if m not in known)]


def _mean(run: Run, tasks: Sequence[str]) -> Score | None:
    """The mean of the tasks, None without all of them; its standard error, where each has one."""
    scores = [run.scores[task] for task in tasks if task in run.scores]
    if not tasks or len(scores) < len(tasks):
        return None
    stderrs = [score.stderr for score in scores if score.stderr is not None]
    stderr = math.hypot(*stderrs) / len(scores) if len(stderrs) == len(scores) else None
    for group, reported in run.reported_means.items():
        if list(tasks) == list(GROUPS[group].members):
            return Score(reported.value, stderr)
    return Score(float(np.mean([score.value for score in scores])), stderr)


def _read_samples(study: Study, step: Callable[[], None]) -> None:
    """Standard errors that are missing, differences between runs, and changed answers, from the samples.

    Only one run and the unedited run of its model, which comes before it, are in memory at a time.
    """
    shown = {
        study.at(series, number)[0].file
        for setting in study.settings
        for series, number in study.last(setting).items()
    }
    base_run, base = None, None
    for place, run in enumerate(study.runs):
        of = by_task(run.paths)
        study.runs[place] = run = _with_stderrs(run, of)
        if run.series is None:
            base_run, base = run, of
        elif base is not None and base_run is not None and base_run.model == run.model:
            study.notes += [
                f"{run.file} and {base_run.file} differ, so their scores should not be compared: {line}"
                for line in differences(base, of)
            ]
            study.runs[place] = run = replace(run, as_unedited=_measured_alike(base, of, run))
            if run.file in shown and (flips := _flips(base, of, run)) is not None:
                study.flips.append(flips)
        step()


def _with_stderrs(run: Run, of: ByTask) -> Run:
    """The run with standard errors that lm-eval does not give (F1 and other ratios), by jackknife."""
    scores, measures = dict(run.scores), dict(run.measures)
    for task, one in of.items():
        if task not in run.tasks or one.samples(task) is None:
            continue
        if task in scores:
            scores[task] = _with_stderr(scores[task], one, task, one.headline(task))
            continue
        for key in one.metrics(task):
            measures[task, key.metric] = _with_stderr(measures[task, key.metric], one, task, key)
    return replace(run, scores=scores, measures=measures)


def _with_stderr(score: Score, one: Results, task: str, key: Key) -> Score:
    if score.stderr is not None:
        return score
    try:
        stratum = pair(one, one, task, key).stratum
    except Unpairable:
        return score
    units = len(stratum.base)
    if units < 2:
        return score
    left_out = stratum.score(stratum.base.sum(0) - stratum.base)
    spread = math.sqrt((units - 1) / units * float(((left_out - left_out.mean()) ** 2).sum()))
    return Score(score.value, spread)


def _measured_alike(base: ByTask, of: ByTask, run: Run) -> frozenset[str]:
    """Of the tasks that are not about abilities, those with the same edits and version on both sides."""
    both = {task for task, _ in run.measures} & of.keys() & base.keys()
    return frozenset(
        task for task in both if not find_differences(base[task], of[task], [task], expected=("edit_seed",))
    )


def _flips(bases: ByTask, of: ByTask, run: Run) -> Flips | None:
    """None where no right/wrong metric has samples on both sides."""
    counts: dict[str, tuple[int, int, int]] = {}
    examples: list[Example] = []
    for task in _tasks([run]):
        if task not in bases or task not in of:
            continue
        base, one = bases[task], of[task]
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
                texts = (first.prompt, first.target, first.answer, second.answer)
                examples.append(Example(task, first.doc_id, kind, *(_shortened(text) for text in texts)))
    return Flips(run, counts, examples) if counts else None


def _shortened(text: str | None, most: int = 700) -> str:
    """The end of a long text, where the question is."""
    if text is None:
        return "(not in the samples)"
    return text if len(text) <= most else f"… {text[-most:]}"
