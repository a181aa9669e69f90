"""Which sequences have to be run, and what is read from each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness_rect.compat.shared_passes import grouped_by_prefix, score

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=12)


@given(sequences)
def test_every_sequence_is_carried_once_by_one_it_begins(asked: list[tuple[int, ...]]) -> None:
    found = grouped_by_prefix(asked)
    assert sorted(i for indices in found.values() for i in indices) == list(range(len(asked)))
    for carrier, indices in found.items():
        assert asked[indices[0]] == carrier
        assert all(carrier[: len(asked[i])] == asked[i] for i in indices)


@given(sequences)
def test_no_carrier_begins_another_and_the_longest_come_first(asked: list[tuple[int, ...]]) -> None:
    found = list(grouped_by_prefix(asked))
    assert not any(a != b and b[: len(a)] == a for a in found for b in found)
    assert [len(ids) for ids in found] == sorted(map(len, found), reverse=True)


def test_a_score_is_the_targets_own_log_probability() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    log_probs, best = logits.log_softmax(-1), logits.argmax(-1).tolist()
    # tokens 2..4 as one target, each alone, and one that is no argmax; the padding at 5 is never read
    wrong = (best[4] + 1) % 9
    ends = [5, 3, 4, 5, 5]
    targets = [best[2:5], best[2:3], best[3:4], best[4:5], [wrong]]
    found = score(logits, ends, targets)
    singles = [float(log_probs[i, best[i]]) for i in (2, 3, 4)]
    expected = [sum(singles), *singles, float(log_probs[4, wrong])]
    assert [total for total, _ in found] == pytest.approx(expected, abs=1e-6)
    assert [greedy for _, greedy in found] == [True] * 4 + [False]


def test_scores_are_computed_in_the_dtype_asked_for() -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    ((low, _),) = score(logits, [2], [[7]])
    ((high, _),) = score(logits, [2], [[7]], torch.float32)
    assert high == pytest.approx(float(logits[1].double().log_softmax(-1)[7]), abs=1e-5)
    assert low != high
