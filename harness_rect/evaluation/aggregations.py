"""How the values of a task's documents become one metric: each aggregation once, as a function of sums.

lm-eval aggregates with the functions at the end of this file (``aggregation: !function`` in a task's YAML).
``harness-rect compare`` resamples documents and so needs the same metric for many sums at once; it uses the
:class:`Aggregation`. Needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import e
from typing import Any


@dataclass(frozen=True)
class Aggregation:
    """A metric of n documents that is a function of sums over them.

    Attributes:
        function: what the YAML names as the metric's ``aggregation``.
        columns: the n values -> n rows of k numbers.
        finish: the k column sums -> the metric. Each sum is a number, or an array with one element for each
            resample.
    """

    function: str
    columns: Callable[[Sequence[Any]], Sequence[Sequence[float]]]
    finish: Callable[[Sequence[Any]], Any]

    def __call__(self, values: Iterable[Any]) -> float:
        rows = self.columns(list(values))
        return float(self.finish([sum(column) for column in zip(*rows, strict=True)]))


def _share(part: Any, whole: Any) -> Any:
    """part / whole, and 0 of nothing: a resample may lack the documents that have a class or a metric."""
    return part / (whole + (whole == 0))


def _mean(sums: Sequence[Any]) -> Any:
    return _share(*sums)


def _micro_f1(sums: Sequence[Any]) -> Any:
    matched, predicted, gold = sums
    return _share(2 * matched, predicted + gold)


def _found_and_gold(values: Sequence[tuple[str, int, int]]) -> list[list[float]]:
    """(type, found, gold) of each document -> found for each type, then gold for each type."""
    types = list(dict.fromkeys(kind for kind, _, _ in values))
    return [[n * (kind == t) for n in (found, gold) for t in types] for kind, found, gold in values]


def _macro_recall(sums: Sequence[Any]) -> Any:
    half = len(sums) // 2
    found, gold = sums[:half], sums[half:]
    types = sum(g > 0 for g in gold)
    return _share(sum(_share(f, g) for f, g in zip(found, gold, strict=True)), types)


def _gold_and_predicted(values: Sequence[tuple[int, int]]) -> list[list[int]]:
    """(gold, predicted) of each document -> for each gold class its hits, then predictions, then rows."""
    classes = list(dict.fromkeys(gold for gold, _ in values))
    return [
        [*(g == p == c for c in classes), *(p == c for c in classes), *(g == c for c in classes)]
        for g, p in values
    ]


def _weighted_f1(sums: Sequence[Any]) -> Any:
    size = len(sums) // 3
    hits, predicted, gold = sums[:size], sums[size : 2 * size], sums[2 * size :]
    f1 = [_share(2 * h, p + g) for h, p, g in zip(hits, predicted, gold, strict=True)]
    return _share(sum(g * f for g, f in zip(gold, f1, strict=True)), sum(gold))


def _harmonic_mean(sums: Sequence[Any]) -> Any:
    *totals, count = sums
    means = [_share(total, count) for total in totals]
    zeros = sum(mean == 0 for mean in means)
    return (zeros == 0) * len(means) / sum(1 / (mean + (mean == 0)) for mean in means)


def _mean_of_means(sums: Sequence[Any]) -> Any:
    half = len(sums) // 2
    means = map(_share, sums[:half], sums[half:])
    return _share(sum(means), sum(count > 0 for count in sums[half:]))


def _exp_of_mean(sums: Sequence[Any]) -> Any:
    """exp(total / count); beyond the range of floats the largest power there is."""
    power = _mean(sums)
    return e ** (power * (power < _LARGEST) + _LARGEST * (power >= _LARGEST))


_LARGEST = 709  # exp(710) is too large for a float
_HERE = "!function harness_rect.evaluation.aggregations"

MEAN = Aggregation("mean", lambda values: [(v, 1) for v in values], _mean)
ENTITY_F1 = Aggregation(f"{_HERE}.entity_f1", list, _micro_f1)
MACRO_RECALL = Aggregation(f"{_HERE}.macro_recall", _found_and_gold, _macro_recall)
WEIGHTED_F1 = Aggregation(f"{_HERE}.weighted_f1", _gold_and_predicted, _weighted_f1)
EDIT_SCORE = Aggregation(
    f"{_HERE}.edit_score", lambda values: [(*value, 1) for value in values], _harmonic_mean
)
MEAN_OF_CRITERIA = Aggregation(
    f"{_HERE}.mean_of_criteria",
    lambda values: [[*(v or 0 for v in of), *(v is not None for v in of)] for of in values],
    _mean_of_means,
)
#: Values are (sum over the tokens of a document, number of tokens).
MEAN_OF_TOKENS = Aggregation(f"{_HERE}.mean_of_tokens", list, _mean)
PERPLEXITY = Aggregation(f"{_HERE}.perplexity", list, _exp_of_mean)


def entity_f1(counts: Iterable[tuple[int, int, int]]) -> float:
    """Micro F1 over the ``(matched, predicted, gold)`` of all documents; 0 without any entity."""
    return ENTITY_F1(counts)


def macro_recall(counts: Iterable[tuple[str, int, int]]) -> float:
    """The mean over entity types of found / gold, from the ``(type, found, gold)`` of all documents.

    This is what the paper's script computes. Types without a gold entity are left out; without any it is 0.
    """
    return MACRO_RECALL(counts)


def weighted_f1(classes: Iterable[tuple[int, int]]) -> float:
    """The mean over gold classes of their F1, weighted by rows, from all documents' ``(gold, predicted)``.

    scikit-learn's ``f1_score(average="weighted")``. A prediction outside the gold classes (-1: could not be
    read) is wrong and counts against no other class.
    """
    return WEIGHTED_F1(classes)


def edit_score(values: Iterable[tuple[float, float, float]]) -> float:
    """S (Meng et al. 2022): the harmonic mean of the means of es, ps and ns over all edits; 0 if one is 0."""
    return EDIT_SCORE(values)


def mean_of_criteria(values: Iterable[Sequence[float | None]]) -> float:
    """The mean over criteria of each criterion's mean over the edits that have it (RippleEdits)."""
    return MEAN_OF_CRITERIA(values)


def mean_of_tokens(values: Iterable[tuple[float, int]]) -> float:
    """The mean over the tokens of all documents, from (sum, number of tokens) of each."""
    return MEAN_OF_TOKENS(values)


def perplexity(values: Iterable[tuple[float, int]]) -> float:
    """exp of the mean NLL of a token, from (NLL in nats, number of tokens) of each document."""
    return PERPLEXITY(values)
