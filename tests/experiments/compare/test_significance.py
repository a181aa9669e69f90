"""p-values and intervals against computations that share no code with ours, and under no change."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness_rect.evaluation.aggregations import ENTITY_F1, MEAN
from harness_rect.experiments.compare.significance import Stratum, holm, mcnemar, paired_bootstrap, unpaired

TRIALS = 200
#: 99.9% of the counts of p < 0.05 in 200 trials at a level of exactly 5%
LEAST, MOST = (int(stats.binom.ppf(q, TRIALS, 0.05)) for q in (0.0005, 0.9995))


def stratum(base, other, weight: float = 1.0) -> Stratum:
    """A mean over documents."""
    ones = np.ones(len(base))
    return Stratum(np.column_stack([base, ones]), np.column_stack([other, ones]), MEAN.finish, weight)


# -------------------------------------------------------------------------------------------- McNemar


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_sum_of_the_binomial_terms_no_likelier_than_what_was_seen(gained, lost) -> None:
    changed = gained + lost
    terms = [comb(changed, k) / 2**changed for k in range(changed + 1)]
    expected = sum(term for term in terms if term <= terms[gained] * (1 + 1e-9))
    assert mcnemar(gained, lost, 100).p == pytest.approx(expected)


def test_the_interval_of_right_and_wrong_answers_covers_the_change_as_often_as_it_says() -> None:
    # Over every possible outcome of 40 documents, weighted by its probability: no simulation.
    n, up, down = 40, 0.15, 0.05
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            found = mcnemar(gained, lost, n)
            if found.low <= up - down <= found.high:
                ways = comb(n, gained) * comb(n - gained, lost)
                covered += ways * up**gained * down**lost * (1 - up - down) ** (n - gained - lost)
    assert 0.94 < covered < 0.98


def test_the_interval_of_right_and_wrong_answers_is_walds_where_there_are_many() -> None:
    n, gained, lost = 100_000, 9_000, 12_000
    change = (gained - lost) / n
    spread = NormalDist().inv_cdf(0.975) * sqrt(((gained + lost) / n - change**2) / n)
    found = mcnemar(gained, lost, n)
    assert (found.low, found.high) == pytest.approx((change - spread, change + spread), abs=5e-5)


def test_no_changed_answer_is_no_evidence_but_leaves_room_in_few_documents() -> None:
    few, many = mcnemar(0, 0, 10), mcnemar(0, 0, 10_000)
    assert few.p == many.p == 1
    assert few.low == pytest.approx(-few.high) and few.high > 0.2 and many.high < 0.001


# --------------------------------------------------------------------------------- permutation p-values


def brute_force_p(units: int, change) -> float:
    """Two-sided p over all 2**units swaps: twice the smaller tail, as far out as what was seen or further."""
    everything = [change(swaps) for swaps in product((False, True), repeat=units)]
    seen = everything[0]
    above = sum(value >= seen - 1e-12 for value in everything) / len(everything)
    below = sum(value <= seen + 1e-12 for value in everything) / len(everything)
    return min(1.0, 2 * min(above, below))


def test_the_p_value_of_a_mean_is_that_of_all_swaps() -> None:
    rng = np.random.default_rng(0)
    base, other = rng.random(9), rng.random(9) + 0.2

    def change(swaps):
        return sum((a - b) if swap else (b - a) for a, b, swap in zip(base, other, swaps, strict=True))

    assert paired_bootstrap([stratum(base, other)]).p == pytest.approx(brute_force_p(9, change))


def f1(rows) -> float:
    matched, predicted, gold = (sum(column) for column in zip(*rows, strict=True))
    return 2 * matched / (predicted + gold) if predicted + gold else 0.0


def test_micro_f1_is_recomputed_for_all_swaps_of_the_units_that_differ() -> None:
    rng = np.random.default_rng(2)
    agreed = np.array([(2, 3, 3)] * 50, float)  # change no p-value, but still count in the score
    base = np.array([(1, 2, 3), (0, 1, 2), (2, 2, 2), (1, 1, 3), (2, 3, 4)], float)
    other = np.array([(0, 2, 3), (1, 3, 2), (0, 1, 2), (0, 4, 3), (1, 1, 4)], float)
    order = rng.permutation(55)
    first, second = (np.concatenate([agreed, side])[order] for side in (base, other))
    found = paired_bootstrap([Stratum(first, second, ENTITY_F1.finish)])

    def change(swaps):
        first = np.where(np.array(swaps)[:, None], other, base)
        second = np.where(np.array(swaps)[:, None], base, other)
        return f1([*agreed, *second]) - f1([*agreed, *first])

    assert found.p == pytest.approx(brute_force_p(5, change))


def test_the_p_value_of_a_mean_of_tasks_swaps_within_every_task() -> None:
    rng = np.random.default_rng(3)
    first = rng.random(4), rng.random(4)
    second = rng.integers(0, 2, 6).astype(float), rng.integers(0, 2, 6).astype(float)
    strata = [stratum(*first, weight=0.5), stratum(*second, weight=0.5)]

    def change(swaps):
        total = 0.0
        for (base, other), part in ((first, swaps[:4]), (second, swaps[4:])):
            signs = np.where(part, -1, 1)
            total += 0.5 * float(np.mean(signs * (other - base)))
        return total

    assert paired_bootstrap(strata).p == pytest.approx(brute_force_p(10, change))


# ------------------------------------------------------------------------------------ bootstrap intervals


def bca(draw, jackknife, seen: float) -> tuple[float, float]:
    """Efron's BCa interval from its formulas, given bootstrap values and leave-one-out values."""
    normal = NormalDist()
    ordered = np.sort(draw)
    z0 = normal.inv_cdf(((ordered < seen).mean() + (ordered <= seen).mean()) / 2)
    away = jackknife.mean() - jackknife
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    limits = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        share = normal.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))
        limits.append(float(np.quantile(ordered, share)))
    return limits[0], limits[1]


def test_the_interval_is_bca_and_resamples_documents_with_both_models_answers() -> None:
    rng = np.random.default_rng(5)
    gold = rng.integers(1, 4, 50)
    right, left = (np.column_stack([rng.binomial(gold, p), gold, gold]).astype(float) for p in (0.8, 0.6))
    values = rng.random(60)
    fewer = values - rng.exponential(0.1, 60)  # skewed, so that BCa and percentile differ
    mean = stratum(values, fewer)
    for found, score in (
        (mean, lambda rows: rows[:, 0].mean()),
        (Stratum(right, left, ENTITY_F1.finish), f1),
    ):
        n = len(found.base)

        def change(index, found=found, score=score) -> float:
            return float(score(found.other[index]) - score(found.base[index]))

        draws = np.array([change(rng.integers(0, n, n)) for _ in range(4000)])
        jackknife = np.array([change(np.delete(np.arange(n), i)) for i in range(n)])
        interval = paired_bootstrap([found])
        assert (interval.low, interval.high) == pytest.approx(
            bca(draws, jackknife, change(range(n))), abs=0.01 if score is f1 else 0.003
        )


def test_the_interval_of_a_mean_of_tasks_has_the_spread_of_its_parts() -> None:
    rng = np.random.default_rng(6)
    parts = [(rng.random(200), rng.random(200)), (rng.random(50), rng.random(50))]
    found = paired_bootstrap([stratum(a, b, weight=0.5) for a, b in parts])
    differences = [b - a for a, b in parts]
    centre = sum(0.5 * d.mean() for d in differences)
    spread = 1.96 * sqrt(sum(0.25 * d.var() / len(d) for d in differences))
    assert (found.low, found.high) == pytest.approx((centre - spread, centre + spread), abs=0.01)


def test_equal_changes_everywhere_have_an_interval_of_no_width() -> None:
    found = paired_bootstrap([stratum(np.zeros(12), np.full(12, 0.25))])
    assert (found.low, found.high) == (0.25, 0.25)
    assert found.p == pytest.approx(2 / 2**12, rel=0.2)


def test_a_model_against_itself_is_no_change() -> None:
    values = np.random.default_rng(7).random(30)
    found = paired_bootstrap([stratum(values, values)])
    assert (found.p, found.low, found.high) == (1.0, 0.0, 0.0)


def test_one_document_gives_no_interval_and_no_evidence() -> None:
    found = paired_bootstrap([stratum(np.array([0.1]), np.array([0.9]))])
    assert (found.p, found.low, found.high) == (1.0, None, None)


def test_the_same_input_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(8)
    given_strata = [stratum(rng.random(40), rng.random(40))]
    assert paired_bootstrap(given_strata) == paired_bootstrap(given_strata)


# ------------------------------------------------------------------------------------------- unpaired, Holm


def test_unpaired_is_the_normal_test_of_two_standard_errors() -> None:
    found = unpaired(-0.05, 0.02, 0.015)
    stderr = sqrt(0.02**2 + 0.015**2)
    assert found.p == pytest.approx(2 * NormalDist().cdf(-0.05 / stderr))
    assert (found.low, found.high) == pytest.approx((-0.05 - 1.959964 * stderr, -0.05 + 1.959964 * stderr))


def test_without_standard_errors_nothing_is_claimed() -> None:
    assert unpaired(-0.5, None, 0.1).test == unpaired(-0.5, 0.1, None).test == "none"
    assert unpaired(-1.0, 0.0, 0.0).p is None
    assert unpaired(0.0, 0.0, 0.0).p == unpaired(0.0, 0.0, 0.09).p == 1
    assert unpaired(0.2, 0.0, 0.09).p is None


def test_holm_on_an_example_worked_by_hand() -> None:
    # sorted .005, .01, .03, .04 times 4, 3, 2, 1: .02, .03, .06, .04, and never below the one before
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values) -> None:
    rejected = set()
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


# ----------------------------------------------------------------------------------------- null experiments


def test_mcnemar_without_a_difference_rejects_five_in_a_hundred() -> None:
    rng = np.random.default_rng(9)
    p_values = []
    for _ in range(TRIALS):
        difficulty = rng.random(1000)
        first, second = rng.random((2, 1000)) < difficulty
        p_values.append(mcnemar(int((second & ~first).sum()), int((first & ~second).sum()), 1000).p)
    assert LEAST <= sum(p < 0.05 for p in p_values) <= MOST


def test_the_paired_bootstrap_without_a_difference_rejects_five_in_a_hundred() -> None:
    rng = np.random.default_rng(10)
    found = []
    for trial in range(TRIALS):
        difficulty = rng.random(40)
        first, second = np.clip(difficulty + rng.normal(0, 0.2, (2, 40)), 0, 1)
        found.append(paired_bootstrap([stratum(first, second)], resamples=999, seed=trial))
    assert LEAST <= sum(one.p < 0.05 for one in found) <= MOST
    # BCa intervals of 40 documents cover a little less than they say.
    assert sum(one.low <= 0 <= one.high for one in found) >= 0.9 * TRIALS
