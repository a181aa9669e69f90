"""Documents that two evaluations share, as the columns whose sums make a metric.

The samples must give the value that the results file reports; otherwise the metric is not paired.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness_rect.evaluation.aggregations import MEAN
from harness_rect.evaluation.catalogue import TASKS, aggregation
from harness_rect.experiments.compare.significance import Array, Stratum
from harness_rect.experiments.results import Key, Results, Sample


@dataclass(frozen=True)
class Paired:
    """A metric on the same documents under two models.

    outcomes: (lost, gained) answers of a right/wrong metric, else None.
    unit: what is resampled: documents, or sentences of several documents.
    one_sided: documents with this metric under one of the models only; they add nothing to the other's sums.
    """

    stratum: Stratum
    documents: int
    unit: str = "documents"
    outcomes: tuple[int, int] | None = None
    one_sided: int = 0


class Unpairable(Exception):
    """Why samples cannot be used; the message completes a row's ``method``."""


def document_difference(base: Results, other: Results, task: str) -> tuple[str, str] | None:
    """How the documents of two evaluations differ, by doc_id and hashes.

    Returns:
        None where they are the same or one side has no samples, else (what differs, in words).
        "prompts" means that only the prompts differ.
    """
    first, second = base.samples(task), other.samples(task)
    if first is None or second is None:
        return None
    a, b = _identities(first), _identities(second)
    if a.keys() != b.keys():
        only_a, only_b = len(a.keys() - b.keys()), len(b.keys() - a.keys())
        return (
            "documents",
            f"{only_a} only in the first, {only_b} only in the second, {len(a & b.keys())} shared",
        )
    for what, place in (("documents", 0), ("prompts", 1)):
        different = [i for i in a if None not in (a[i][place], b[i][place]) and a[i][place] != b[i][place]]
        if different:
            return what, f"{len(different)} of {len(a)} are not the same, the first is doc_id {different[0]}"
    return None


def _identities(samples: dict[str, list[Sample]]) -> dict[int, tuple[str | None, str | None]]:
    return {s.doc_id: (s.doc_hash, s.prompt_hash) for group in samples.values() for s in group}


def pair(base: Results, other: Results, task: str, key: Key) -> Paired:
    """The documents of one metric under both models.

    Raises:
        Unpairable: if the samples are missing, differ, or do not give the reported scores.
        UserError: if a samples file cannot be read.
    """
    sides: list[dict[int, Sample]] = []
    for results in (base, other):
        samples = results.samples(task)
        if samples is None:
            raise Unpairable(f"no samples beside {results.path.name}")
        have = [s for s in samples.get(key.filter, []) if s.values.get(key.metric) is not None]
        if not have:
            raise Unpairable("the samples lack this metric")
        sides.append({s.doc_id: s for s in have})
    difference = document_difference(base, other, task)
    if difference is not None and difference[0] != "prompts":
        raise Unpairable("the documents differ")
    combined = aggregation(task, key.metric)
    try:
        # All at once: what a column stands for may depend on the values.
        rows = np.array(combined.columns([s.values[key.metric] for of in sides for s in of.values()]), float)
        if rows.ndim != 2:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise Unpairable("its samples are no numbers that are averaged") from None
    documents = sorted(sides[0].keys() | sides[1].keys())
    place = {doc_id: index for index, doc_id in enumerate(documents)}
    columns = np.zeros((2, len(documents), rows.shape[1]))
    columns[0, [place[i] for i in sides[0]]] = rows[: len(sides[0])]
    columns[1, [place[i] for i in sides[1]]] = rows[len(sides[0]) :]
    for results, side in zip((base, other), columns, strict=True):
        value, reported = combined.finish(list(side.sum(0))), results.scores(task)[key].value
        if not math.isclose(value, reported, rel_tol=1e-6, abs_tol=1e-9):
            raise Unpairable("its samples do not average to the reported score")
    first, second = columns
    one_sided = len(sides[0].keys() ^ sides[1].keys())
    outcomes = None
    if combined is MEAN and not one_sided and np.isin(columns, (0, 1)).all():
        change = second[:, 0] - first[:, 0]
        outcomes = int((change < 0).sum()), int((change > 0).sum())
    unit = TASKS[task].unit if task in TASKS else "documents"
    if unit != "documents":
        texts = [sides[0].get(i, sides[1].get(i)) for i in documents]
        clusters = [s.doc_id if s.text is None else s.text for s in texts if s is not None]
        first, second = _summed(first, clusters), _summed(second, clusters)
    return Paired(Stratum(first, second, combined.finish), len(documents), unit, outcomes, one_sided)


def _summed(columns: Array, clusters: Sequence[Hashable]) -> Array:
    """Sums of the rows of each cluster, in the order the clusters first appear."""
    place = {cluster: index for index, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(place), columns.shape[1]))
    np.add.at(sums, [place[cluster] for cluster in clusters], columns)
    return sums


def pair_group(base: Results, other: Results, group: str, key: Key) -> list[Paired]:
    """The tasks of a group score, weighted as they are in it: all alike, or by their size.

    Returns:
        One for each task, whose strata carry the weights.

    Raises:
        Unpairable: if a task cannot be paired, or neither weighting gives the reported scores.
    """
    tasks = [task for task in base.leaves(group) if key in base.tasks.get(task, {})]
    if not tasks or set(other.leaves(group)) != set(base.leaves(group)):
        raise Unpairable("the group's tasks differ")
    parts = [pair(base, other, task, key) for task in tasks]
    sizes = np.array([part.documents for part in parts], dtype=float)
    for weights in (np.full(len(parts), 1 / len(parts)), sizes / sizes.sum()):
        means = [
            sum(w * r.tasks[task][key].value for w, task in zip(weights, tasks, strict=True))
            for r in (base, other)
        ]
        reported = [r.groups[group][key].value for r in (base, other)]
        if np.allclose(means, reported, rtol=1e-6, atol=1e-9):
            strata = [replace(part.stratum, weight=float(w)) for part, w in zip(parts, weights, strict=True)]
            return [replace(part, stratum=stratum) for part, stratum in zip(parts, strata, strict=True)]
    raise Unpairable("the group's score is no mean of its tasks' scores")
