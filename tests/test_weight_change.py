"""The overfitting measures against direct counts."""

from __future__ import annotations

import math

import numpy as np
import torch

from harness_rect.weight_change import LOG10_EDGES, weight_change


def test_measures_equal_direct_counts():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(40, 70, generator=generator)
    change = torch.randn(40, 70, generator=generator) * 0.1
    change[:, ::3] = 0
    found = weight_change(original + change, original)
    moved = (original + change - original).double().numpy()
    delta = np.abs(moved / original.double().numpy())
    assert math.isclose(found["manhattan_distance"], np.abs(moved).sum(), rel_tol=1e-6)
    assert found["changed"] == np.count_nonzero(moved) / moved.size
    for limit in (0.077, 0.171):
        assert math.isclose(found["share_over"][str(limit)], (delta > limit).mean(), abs_tol=1e-3)
    logs = np.log10(delta[delta > 0])
    inner, _ = np.histogram(logs, bins=LOG10_EDGES)
    counts = found["delta_histogram"]
    assert sum(counts) == np.count_nonzero(delta)
    assert np.abs(np.array(counts[1:-1]) - inner).max() <= 2  # rounding at the edges
    assert np.shape(found["heat_map"]) == (16, 32)
    assert math.isclose(np.mean(found["heat_map"]), np.abs(moved).mean(), rel_tol=0.05)


def test_nothing_changed_is_nothing_counted():
    found = weight_change(torch.ones(3, 5), torch.ones(3, 5))
    assert found["changed"] == 0 and sum(found["delta_histogram"]) == 0
    assert found["share_over"] == {"0.077": 0.0, "0.171": 0.0}


def test_a_zero_weight_that_moves_counts_as_infinitely_far():
    found = weight_change(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]))
    assert found["delta_histogram"][-1] == 1 and found["share_over"]["0.171"] == 0.5
