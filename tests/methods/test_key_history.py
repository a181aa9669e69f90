"""The system of MEMIT and AlphaEdit with earlier keys, against direct dense solves in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness_rect.methods.key_history import remember_keys, solve_with_history
from harness_rect.moments import SecondMoment

WIDTH = 12
#: Now and then more keys at once than dimensions.
batches = st.lists(st.sampled_from([1, 2, 3, 4, WIDTH + 3]), min_size=1, max_size=5)


def random(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, dtype=torch.float64, generator=generator)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Up to rounding, relative to the largest element: the systems are of condition 1e5 and more."""
    return bool((found - wanted).abs().max() <= 1e-7 * wanted.abs().max())


def moment(seed: int) -> SecondMoment:
    factor = random(WIDTH, WIDTH, seed)
    return SecondMoment(factor @ factor.T / WIDTH + 0.05 * torch.eye(WIDTH, dtype=torch.float64), 1, "test")


@settings(max_examples=40, deadline=None)
@given(
    sizes=batches,
    seed=st.integers(0, 99),
    weight=st.sampled_from([1e-2, 1.0, 2e4]),
    ridge=st.sampled_from([0.0, 3.0]),
)
def test_memit_with_history_equals_the_direct_solve(sizes, seed, weight, ridge):
    """From one batch without history to more old keys than dimensions."""
    c = moment(seed)
    state: dict[str, torch.Tensor] = {}
    products = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)

    def prior(keys):
        return c.solve_columns(keys, ridge / weight) / weight

    for index, size in enumerate(sizes):
        keys = random(WIDTH, size, 1000 * seed + index)
        dense = weight * c.mean + ridge * torch.eye(WIDTH, dtype=torch.float64) + products + keys @ keys.T
        direct = torch.linalg.solve(dense, keys)
        solved = solve_with_history(prior, keys, state, "layer")
        assert close(solved, direct)
        remember_keys(prior, keys, state, "layer")
        products += keys @ keys.T


@settings(max_examples=40, deadline=None)
@given(
    sizes=batches,
    seed=st.integers(0, 99),
    threshold=st.sampled_from([0.1, 0.5, 2.0]),
    l2=st.sampled_from([0.1, 10.0]),
)
def test_alphaedit_equals_the_direct_solve(sizes, seed, threshold, l2):
    c = moment(seed)
    values, vectors = torch.linalg.eigh(c.mean)
    kept = vectors[:, values < threshold]
    projector = kept @ kept.T
    state: dict[str, torch.Tensor] = {}
    products = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for index, size in enumerate(sizes):
        keys = random(WIDTH, size, 1000 * seed + index)
        dense = projector @ (products + keys @ keys.T) + l2 * torch.eye(WIDTH, dtype=torch.float64)
        direct = torch.linalg.solve(dense, projector @ keys)

        def prior(columns):
            return c.project_to_null_space(columns, threshold) / l2

        assert close(solve_with_history(prior, keys, state, "1"), direct)
        remember_keys(prior, keys, state, "1")
        products += keys @ keys.T


def test_layers_do_not_share_their_keys():
    state: dict[str, torch.Tensor] = {}
    c = moment(0)
    remember_keys(c.solve_columns, random(WIDTH, 2, 1), state, "1")
    keys = random(WIDTH, 2, 2)
    fresh = solve_with_history(c.solve_columns, keys, {}, "2")
    assert torch.equal(solve_with_history(c.solve_columns, keys, state, "2"), fresh)
    assert not torch.allclose(solve_with_history(c.solve_columns, keys, state, "1"), fresh)


def test_keys_that_come_again_are_protected_as_often():
    state: dict[str, torch.Tensor] = {}
    c, keys = moment(0), random(WIDTH, 3, 1)
    for _ in range(3):
        remember_keys(c.solve_columns, keys, state, "1")
    wanted = torch.linalg.solve(c.mean + 4 * keys @ keys.T, keys)
    assert "1.factor" in state
    assert all(part.is_contiguous() for part in state.values())  # as it comes back from a file
    assert close(solve_with_history(c.solve_columns, keys, state, "1"), wanted)


def test_the_full_system_takes_over_where_rounding_leaves_no_factor():
    state: dict[str, torch.Tensor] = {}
    c, keys = moment(0), 1e8 * random(WIDTH, 3, 1)
    for _ in range(3):
        remember_keys(c.solve_columns, keys, state, "1")
    assert list(state) == ["1.folded"] and state["1.folded"].is_contiguous()
    others = random(WIDTH, 2, 2)
    assert solve_with_history(c.solve_columns, others, state, "1").isfinite().all()
