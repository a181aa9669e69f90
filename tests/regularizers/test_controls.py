"""The controls of RECT: plain shrinkage, shrinkage to RECT's norm, and the largest elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.regularizers import trimming

from harness_rect.config import make_regularizer
from harness_rect.regularizers import WeightState, magnitude, rect, rect_alphaedit
from harness_rect.updates import Dense, LowRank

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds, shares = st.integers(0, 999), st.one_of(st.sampled_from([0.0, 0.2, 0.4, 1.0]), st.floats(0, 1))
conventions = st.sampled_from(["paper", "alphaedit"])


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trim(name: str, update: Dense | LowRank, weight: torch.Tensor, **given_) -> Dense | LowRank:
    return make_regularizer(name, given_).trim(update, weight, weight, WeightState({}, torch.Generator()))


# -- scale ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, keep=shares)
def test_scale_multiplies_updates_of_both_kinds(shape, seed, keep):
    left, right = matrix((shape[0], 2), seed), matrix((shape[1], 2), seed + 1)
    factors = trim("scale", LowRank(left, right), matrix(shape, 0), keep=keep)
    assert isinstance(factors, LowRank) and factors.left.shape == left.shape
    dense = trim("scale", Dense(left @ right.T), matrix(shape, 0), keep=keep)
    wanted = keep * (left @ right.T)
    assert torch.equal(dense.dense(), wanted)
    torch.testing.assert_close(factors.dense(), wanted)


# -- norm-matched -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=seeds, keep=shares, convention=conventions)
def test_norm_matched_has_the_norm_of_rects_update_and_the_direction_of_its_own(
    shape, seed, keep, convention
):
    left, right, weight = (
        matrix((shape[0], 2), seed),
        matrix((shape[1], 2), seed + 1),
        matrix(shape, seed + 2),
    )
    update = left @ right.T
    kept = (rect if convention == "paper" else rect_alphaedit)(update, weight, keep=keep)
    for proposed in (LowRank(left, right), Dense(update)):
        found = trim("norm_matched", proposed, weight, keep=keep, rect_convention=convention)
        assert type(found) is type(proposed)
        assert float(found.dense().norm()) == pytest.approx(float(kept.norm()), rel=1e-12)
        # c dW, with c |dW| that norm.
        torch.testing.assert_close(found.dense() * update.norm(), update * kept.norm(), rtol=1e-9, atol=1e-12)


def test_norm_matched_leaves_an_update_of_nothing_alone():
    for nothing in (Dense(torch.zeros(3, 4)), LowRank(torch.zeros(3, 1), torch.ones(4, 1))):
        assert not trim("norm_matched", nothing, torch.ones(3, 4), keep=0.4).dense().any()


# -- magnitude --------------------------------------------------------------------------------------------

#: Few values, so that zeros and ties are common; and any float.
numbers = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0]), st.floats(-1e3, 1e3, width=32))
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=numbers)


@settings(deadline=None)
@given(array=arrays, keep=shares)
def test_magnitude_keeps_the_first_of_a_stable_sort_by_size(array, keep):
    kept = magnitude(torch.from_numpy(array.copy()), keep=keep).numpy()
    order = np.argsort(-np.abs(array.ravel()), kind="stable")
    mask = np.zeros(array.size, bool)
    mask[order[: array.size - int(array.size * (1 - keep))]] = True
    np.testing.assert_array_equal(kept, np.where(mask.reshape(array.shape), array, np.float32(0)))


@settings(deadline=None)
@given(shape=shapes, seed=seeds, keep=shares)
def test_magnitude_keeps_an_exact_number_whatever_the_weight_is(shape, seed, keep):
    update = matrix(shape, seed)
    kept = trimming("magnitude", keep=keep)(update, torch.zeros(shape, dtype=torch.float64), update)
    assert int(torch.count_nonzero(kept)) == update.numel() - int(update.numel() * (1 - keep))


def test_magnitude_of_a_large_weight_is_that_of_a_sort():
    update = torch.randn(700, 900, generator=torch.Generator().manual_seed(0))
    update[::3] = update[0]  # ties
    sizes = update.abs().flatten()
    wanted = torch.zeros_like(sizes)
    best = sizes.argsort(descending=True, stable=True)[: sizes.numel() - int(sizes.numel() * (1 - 0.4))]
    wanted[best] = update.flatten()[best]
    assert torch.equal(magnitude(update, keep=0.4), wanted.view_as(update))


# -- all of it --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, name=st.sampled_from(["scale", "norm_matched", "magnitude"]))
def test_a_share_of_one_is_the_update_itself(shape, seed, name):
    left, right, weight = (
        matrix((shape[0], 2), seed),
        matrix((shape[1], 2), seed + 1),
        matrix(shape, seed + 2),
    )
    for proposed in (LowRank(left, right), Dense(left @ right.T)):
        assert torch.equal(trim(name, proposed, weight, keep=1.0).dense(), left @ right.T)
