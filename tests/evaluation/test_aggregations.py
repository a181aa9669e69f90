"""Metrics of a whole task that are not means of its documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from harness_rect.evaluation.aggregations import (
    EDIT_SCORE,
    ENTITY_F1,
    MACRO_RECALL,
    MEAN,
    WEIGHTED_F1,
    edit_score,
    entity_f1,
    macro_recall,
    weighted_f1,
)


def test_entity_f1_is_micro() -> None:
    # 3 matched of 4 predicted and 6 gold in all; the mean of the single F1 values would be another number
    assert entity_f1([(2, 2, 2), (1, 2, 4)]) == pytest.approx(2 * 3 / (4 + 6))
    assert entity_f1([(0, 0, 0)]) == 0.0


def test_macro_recall_is_the_mean_over_types_with_gold_entities() -> None:
    founds = [("Person", 1, 2), ("Person", 1, 1), ("Location", 0, 1), ("Organization", 0, 0)]
    assert macro_recall(founds) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_recall([("Person", 0, 0)]) == 0.0


def test_the_edit_score_is_the_harmonic_mean_of_the_means() -> None:
    assert edit_score([(1.0, 0.5, 1.0), (0.0, 0.5, 1.0)]) == pytest.approx(3 / (1 / 0.5 + 1 / 0.5 + 1))
    assert edit_score([(1.0, 0.0, 1.0)]) == 0
    assert edit_score([(1.0, 1.0, 1.0)]) == 1


def test_unread_answers_are_wrong_and_count_against_no_class() -> None:
    # class 1: 1 hit, 2 predictions, 3 rows: F1 2/5; class 0: 0 hits
    assert weighted_f1([(1, 1), (1, -1), (1, -1), (0, 1)]) == pytest.approx(3 / 4 * 2 / 5)


CLASSES = st.tuples(st.integers(0, 3), st.integers(-1, 3))


@given(st.lists(CLASSES, min_size=1, max_size=30), st.data())
def test_weighted_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    gold, predicted = zip(*pairs, strict=True)
    expected = f1_score(gold, predicted, average="weighted", zero_division=0)
    assert weighted_f1(pairs) == pytest.approx(expected)
    # and for any resample of the documents, which may lack a class
    columns = np.array(WEIGHTED_F1.columns(pairs), dtype=float)
    picks = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=30))
    drawn = [pairs[i] for i in picks]
    expected = f1_score(*zip(*drawn, strict=True), average="weighted", zero_division=0)
    assert WEIGHTED_F1.finish(list(columns[picks].sum(0))) == pytest.approx(expected)


COUNT = st.integers(0, 3)
SHARE = st.floats(0, 1).filter(lambda value: value == 0 or value > 1e-6)


@pytest.mark.parametrize(
    ("aggregation", "value"),
    [
        (MEAN, SHARE),
        (ENTITY_F1, st.tuples(COUNT, COUNT, COUNT)),
        (MACRO_RECALL, st.tuples(st.sampled_from("PLO"), COUNT, COUNT)),
        (WEIGHTED_F1, CLASSES),
        (EDIT_SCORE, st.tuples(SHARE, SHARE, SHARE)),
    ],
)
@given(data=st.data())
def test_many_sums_at_once_give_what_each_gives_alone(aggregation, value, data) -> None:
    values = data.draw(st.lists(value, min_size=1, max_size=8))
    columns = np.array(aggregation.columns(values), dtype=float)
    picks = np.array([range(len(values)), [0] * len(values)])  # all documents, and the first one repeatedly
    sums = columns[picks].sum(1)
    found = aggregation.finish(list(sums.T))
    assert found.tolist() == pytest.approx([float(aggregation.finish(row)) for row in sums.tolist()])
    assert found[0] == pytest.approx(aggregation(values))
