"""Significance tests and confidence intervals for the change between two evaluations.

Paired, where both answered the same documents:

* right/wrong metrics: the exact McNemar test, and the adjusted Wald interval of Bonett and Price (2012,
  *J. Educ. Behav. Stat.* 37: 479-488), which keeps its coverage where few or no answers differ.
* all others: the documents are resampled together with both their scores. The interval is the BCa
  bootstrap's (Efron 1987); the p-value comes from swapping the two models' results document by document (a
  permutation test, exact where few documents differ), which holds its level in small samples where a
  bootstrap's does not.

Both work on any statistic that is a function of column sums, so corpus-level metrics (micro F1, harmonic
means) are recomputed for every resample. Documents that belong together are one unit, and the mean over tasks
is resampled within each task. Unpaired: the normal approximation from two standard errors.

Randomness is seeded: the same files give the same numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
_Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
#: Elements a batch of resamples may hold; bounds memory, not results.
_BATCH_ELEMENTS = 4_000_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Inference:
    """test: mcnemar, paired_bootstrap, unpaired or none; None where a number cannot be had."""

    test: str
    p: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Stratum:
    """One task's documents under two models.

    base, other: (units, columns) float64, what each unit adds to the sums.
    finish: the column sums -> the task's score, as an ``Aggregation`` has it.
    weight: the share of this task in the statistic.
    """

    base: Array
    other: Array
    finish: Callable[[Sequence[Any]], Any]
    weight: float = 1.0

    def score(self, sums: Array) -> Array:
        """(..., columns) sums -> (...) scores."""
        return np.asarray(self.finish(list(np.moveaxis(sums, -1, 0))))

    def change(self, base_sums: Array, other_sums: Array) -> Array:
        return self.weight * (self.score(other_sums) - self.score(base_sums))


def mcnemar(gained: int, lost: int, n: int) -> Inference:
    """Right/wrong answers to the same ``n`` documents: ``gained`` became right, ``lost`` became wrong.

    p: two-sided binomial test of ``gained`` among the answers that changed. The interval is that of the
    change of the share of right answers: a Wald interval with one added to both counts and two to ``n``.
    """
    changed = gained + lost
    p = float(stats.binomtest(gained, changed, 0.5).pvalue) if changed else 1.0
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    spread = _Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Inference("mcnemar", p, max(-1.0, up - down - spread), min(1.0, up - down + spread))


def paired_bootstrap(strata: Sequence[Stratum], resamples: int = RESAMPLES, seed: int = 0) -> Inference:
    """The change of ``sum of weight * finish(sums)`` from base to other, for units seen by both.

    The interval is absent where a stratum has fewer than two units. Models that agree on every unit get
    p = 1 and an interval of no width.
    """
    p = _swapping_p(strata, resamples, seed)
    if all(np.array_equal(s.base, s.other) for s in strata):
        return Inference("paired_bootstrap", 1.0, 0.0, 0.0)
    if min(len(s.base) for s in strata) < 2:
        return Inference("paired_bootstrap", p)

    def change(*indices: NDArray[np.intp], axis: int = -1) -> Array:
        parts = []
        for stratum, index in zip(strata, indices, strict=True):
            parts.append(stratum.change(_sums(stratum.base, index), _sums(stratum.other, index)))
        return np.asarray(sum(parts))

    def interval(method: str) -> tuple[float, float]:
        with np.errstate(invalid="ignore", divide="ignore"):
            found = stats.bootstrap(
                tuple(np.arange(len(s.base)) for s in strata),
                change,
                n_resamples=resamples,
                batch=_batch(strata),
                vectorized=True,
                confidence_level=CONFIDENCE,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        return float(found.low), float(found.high)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        low, high = interval("BCa")
    if not (math.isfinite(low) and math.isfinite(high)):  # BCa's corrections are undefined: 0/0
        low, high = interval("percentile")
    return Inference("paired_bootstrap", p, low, high)


def _swapping_p(strata: Sequence[Stratum], resamples: int, seed: int) -> float:
    """Two-sided p of the change under swaps of the two models' results for each unit.

    Units on which the models agree are the same either way, so only the others are swapped.
    """
    differing = [(s.base != s.other).any(axis=1) for s in strata]
    counts = [int(mask.sum()) for mask in differing]
    if sum(counts) < 2:
        return 1.0  # one unit, swapped or not, is as far from zero either way
    ends = np.cumsum(counts)
    stacks = [np.concatenate([s.base[d], s.other[d]]) for s, d in zip(strata, differing, strict=True)]
    unchanged = [s.base[~d].sum(0) for s, d in zip(strata, differing, strict=True)]

    def change(first: NDArray[np.intp], second: NDArray[np.intp], axis: int = -1) -> Array:
        parts = []
        for stratum, stack, rest, end, count in zip(strata, stacks, unchanged, ends, counts, strict=True):
            place = slice(end - count, end)
            a, b = _sums(stack, first[..., place]), _sums(stack, second[..., place])
            parts.append(stratum.change(rest + a, rest + b))
        return np.asarray(sum(parts))

    found = stats.permutation_test(
        (
            np.concatenate([np.arange(count) for count in counts]),
            np.concatenate([np.arange(count, 2 * count) for count in counts]),
        ),
        change,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=_batch(strata),
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def _sums(columns: Array, index: NDArray[np.intp]) -> Array:
    """(..., columns): sums of the rows that the last axis of ``index`` picks. Column by column is fastest."""
    index = np.asarray(index).astype(np.intp, copy=False)
    return np.stack([np.take(column, index).sum(-1) for column in np.ascontiguousarray(columns.T)], axis=-1)


def _batch(strata: Sequence[Stratum]) -> int:
    return max(1, _BATCH_ELEMENTS // sum(s.base.size for s in strata))


def unpaired(change: float, base_stderr: float | None, other_stderr: float | None) -> Inference:
    """A change between independent means, from their standard errors; no inference without both.

    A standard error of 0 (all right, or all wrong) says nothing of how far chance reaches: then there is no
    interval, and a p-value only for no change at all.
    """
    if base_stderr is None or other_stderr is None:
        return Inference("none")
    if min(base_stderr, other_stderr) == 0:
        return Inference("unpaired", 1.0 if change == 0 else None)
    stderr = math.hypot(base_stderr, other_stderr)
    p = float(2 * stats.norm.sf(abs(change) / stderr))
    return Inference("unpaired", p, change - _Z * stderr, change + _Z * stderr)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) over the p-values that are there; None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected
