"""Running mean and deviation, against all rows at once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness_rect.moments.running import Running


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_batches_give_the_mean_and_deviation_of_all_rows(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = 3 * torch.randn(sum(sizes), 5, dtype=torch.float64, generator=generator) + 100
    running = Running.empty(5)
    for batch in rows.split(sizes):
        running = running.updated(batch)
    assert float(running.count) == len(rows)
    torch.testing.assert_close(running.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    if len(rows) > 1:
        torch.testing.assert_close(running.deviation, rows.std(0), rtol=1e-9, atol=1e-12)
    else:
        assert torch.equal(running.deviation, torch.zeros(5, dtype=torch.float64))
