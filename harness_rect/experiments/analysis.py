"""Finished evaluations as rows, for notebooks: ``pandas.DataFrame(analysis.scores("results/"))``.

Every function takes a results file or a folder of them and returns a list of flat dicts. Each row begins with
the run's provenance (see :func:`runs`), so rows can be filtered and grouped without a join.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness_rect.evaluation.catalogue import protocol
from harness_rect.experiments import results
from harness_rect.experiments.compare import compare
from harness_rect.experiments.results import Results
from harness_rect.io.files import shown
from harness_rect.session.report import EditReport, When

Row = dict[str, Any]
Source = Path | str

#: When edits are measured -> its name in the rows' column ``moment``.
TIMES: dict[When, str] = {
    "before": "before each edit",
    "after": "right after each edit",
    "end": "at the end",
}
_EDITING = (
    "regularizer",
    "keep",
    "rect_convention",
    "edit_batch_size",
    "edit_seed",
    "edits_spec",
    "edits_sha256",
    "run",
    "seconds_per_edit",
)


def runs(source: Source) -> list[Row]:
    """One row for each evaluation.

    Columns: file, date (seconds since 1970), model, model_class (lm-eval's ``--model``), method ("none" for
    an unedited model; None without an edit report, as with ``--model hf``), n_edits, the settings of the
    editing run, its digest ``run``, seconds_per_edit, limit, lm_eval_version.
    """
    return [_run(one) for one in _load(source)]


def scores(source: Source) -> list[Row]:
    """One row for each evaluation, task or group, and metric.

    Columns beside the provenance: task, is_group, metric, filter, protocol (None where the task is not ours),
    score, stderr (None where lm-eval gives none), n (documents), headline, higher_is_better. Repetitions of
    the headline (``score``) are left out.
    """
    return [
        _run(one)
        | {
            "task": task,
            "is_group": task in one.groups,
            "metric": key.metric,
            "filter": key.filter,
            "protocol": protocol(task, key.metric),
            "score": one.scores(task)[key].value,
            "stderr": one.scores(task)[key].stderr,
            "n": one.effective_rows(task),
            "headline": key == one.headline(task),
            "higher_is_better": one.higher_is_better(task, key.metric),
        }
        for one in _load(source)
        for task in [*one.tasks, *one.groups]
        for key in one.metrics(task)
    ]


def edit_metrics(source: Source) -> list[Row]:
    """One row for each editing metric and time of measurement: means over the edits of a run.

    Columns beside the provenance: moment ("before each edit", "right after each edit" or "at the end"),
    metric, value.
    """
    return [
        _run(one) | {"moment": moment, "metric": metric, "value": value}
        for one, edit in _edited(source)
        for when, moment in TIMES.items()
        for metric, value in edit.averages(when).items()
    ]


def edits(source: Source) -> list[Row]:
    """One row for each edit and metric, before it, right after it and at the end of the stream.

    Columns beside the provenance: edit (its id), position (1 is the first), subject, target, flags (joined by
    commas), metric, before, after, end. A metric that an edit lacks prompts for is absent.
    """
    return [
        _run(one)
        | {
            "edit": edit.id,
            "position": position,
            "subject": edit.subject,
            "target": edit.target,
            "flags": ",".join(edit.flags),
            "metric": metric,
            "before": edit.before.get(metric),
            "after": value,
            "end": edit.end.get(metric),
        }
        for one, report in _edited(source)
        for position, edit in enumerate(report.edits, 1)
        for metric, value in edit.after.items()
    ]


def update_statistics(source: Source) -> list[Row]:
    """One row for each step of a run and weight it updated.

    Columns beside the provenance: step (1 is the first), edits (so far, this step's included), weight,
    applied, and what the report has of the update: update_norm and applied_norm (Frobenius, before and after
    the regularizer), weight_norm, kept (share of non-zero elements), changed (share of stored elements),
    finite.
    """
    rows = []
    for one, report in _edited(source):
        edits_so_far = 0
        for number, step in enumerate(report.steps, 1):
            edits_so_far += len(step.edits)
            for weight, statistics in step.weights.items():
                place = {"step": number, "edits": edits_so_far, "weight": weight, "applied": step.applied}
                rows.append(_run(one) | place | statistics.model_dump())
    return rows


def weight_distances(source: Source) -> list[Row]:
    """One row for each evaluation and edited weight: how far it is from the unedited one.

    Columns beside the provenance: weight, manhattan_distance, frobenius_distance, changed (share of
    elements), dtype.
    """
    columns = {"manhattan_distance", "frobenius_distance", "changed", "dtype"}
    return [
        _run(one) | {"weight": weight} | totals.model_dump(include=columns)
        for one, report in _edited(source)
        for weight, totals in report.weights.items()
    ]


def comparisons(base: Source, others: Sequence[Source], **options: Any) -> list[Row]:
    """The rows of ``harness-rect compare``; options as in :func:`harness_rect.experiments.compare.compare`.

    A folder stands for the newest results file in it, as on the command line.

    Raises:
        UserError: under the same conditions as the command.
    """
    files = [results.load(results.newest(path)[0]) for path in (base, *others)]
    return [dict(vars(row)) for row in compare(files[0], files[1:], **options).rows]


def _load(source: Source) -> list[Results]:
    return [results.load(path) for path in results.find(source)]


def _edited(source: Source) -> list[tuple[Results, EditReport]]:
    return [(one, one.edit) for one in _load(source) if one.edit is not None]


def _run(one: Results) -> Row:
    edit = one.edit
    return {
        "file": shown(one.path),
        "date": one.file.date,
        "model": one.model_name,
        "model_class": one.model_class,
        "method": edit and edit.method,
        "n_edits": edit.n_edits if edit else 0,
        **{name: getattr(edit, name, None) for name in _EDITING},
        "limit": one.file.config.get("limit"),
        "lm_eval_version": one.file.lm_eval_version,
    }
