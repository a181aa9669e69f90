"""REVIVE against an independent computation by numpy's singular value decomposition."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness_rect.config import make_regularizer
from harness_rect.regularizers import Revive, WeightState, dominant_directions
from harness_rect.updates import Dense, LowRank

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds, shares = st.integers(0, 999), st.one_of(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.floats(0, 1))
spectra = st.sampled_from(["values", "squares"])


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state() -> WeightState:
    return WeightState({}, torch.Generator())


def least_rank(values: np.ndarray, tau: float) -> int:
    held = np.cumsum(values) / values.sum()
    return 0 if tau == 0 else next(r for r, share in enumerate(held, 1) if share >= tau * (1 - 1e-9))


@settings(max_examples=80, deadline=None)
@given(shape=shapes, seed=seeds, tau=shares, spectrum=spectra)
def test_the_update_lies_outside_the_dominant_directions_on_both_sides(shape, seed, tau, spectrum):
    original, left, right = (
        matrix(shape, seed),
        matrix((shape[0], 3), seed + 1),
        matrix((shape[1], 3), seed + 2),
    )
    update = left @ right.T
    lefts, s, rights = np.linalg.svd(original.numpy(), full_matrices=False)
    r = least_rank(s if spectrum == "values" else s**2, tau)
    u, v = torch.from_numpy(lefts[:, :r].copy()), torch.from_numpy(rights[:r].T.copy())
    wanted = (torch.eye(shape[0]) - u @ u.T) @ update @ (torch.eye(shape[1]) - v @ v.T)
    regularizer = Revive(keep=tau, revive_spectrum=spectrum)
    for proposed in (LowRank(left, right), Dense(update)):
        found = regularizer.trim(proposed, original, original, state())
        assert isinstance(found, type(proposed))
        torch.testing.assert_close(found.dense(), wanted, rtol=1e-8, atol=1e-9)
        assert (u.T @ found.dense()).norm() < 1e-9 and (found.dense() @ v).norm() < 1e-9


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds)
def test_a_share_of_nothing_is_the_update_itself(shape, seed):
    left, right = matrix((shape[0], 2), seed), matrix((shape[1], 2), seed + 1)
    for proposed in (LowRank(left, right), Dense(left @ right.T)):
        assert Revive(keep=0).trim(proposed, matrix(shape, 1), matrix(shape, 1), state()) is proposed


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, tau=shares, spectrum=spectra)
def test_a_transposed_weight_is_treated_as_its_transpose(shape, seed, tau, spectrum):
    original, update = matrix(shape, seed), matrix(shape, seed + 1)
    regularizer = Revive(keep=tau, revive_spectrum=spectrum)
    plain = regularizer.trim(Dense(update), original, original, state()).dense()
    turned = regularizer.trim(Dense(update.T), original.T, original.T, state()).dense().T
    torch.testing.assert_close(turned, plain, rtol=1e-8, atol=1e-9)


def test_only_the_directions_that_exist_are_dominant():
    original = matrix((8, 3), 0) @ matrix((3, 6), 1)  # of rank 3
    for u, v in (dominant_directions(original, 1.0), dominant_directions(original, 1.0, "squares")):
        assert (u.shape, v.shape) == ((8, 3), (6, 3))
    assert dominant_directions(torch.zeros(8, 6), 0.5)[0].shape == (8, 0)


def test_the_least_rank_holds_the_share_exactly():
    original = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    for tau, values, squares in ((0.4, 1, 1), (0.41, 2, 1), (0.7, 2, 2), (0.71, 3, 2), (1, 4, 4)):
        assert dominant_directions(original, tau, "values")[0].shape[1] == values
        assert dominant_directions(original, tau, "squares")[0].shape[1] == squares


def test_the_original_weight_is_decomposed_once(monkeypatch):
    module = sys.modules[Revive.__module__]
    calls = []
    decompose = module.dominant_directions
    monkeypatch.setattr(module, "dominant_directions", lambda *args: calls.append(args) or decompose(*args))
    original, kept = matrix((12, 20), 0), state()
    regularizer = make_regularizer("revive", {})
    results = []
    for step in range(3):
        weight = original + step
        results.append(regularizer.trim(Dense(matrix((12, 20), 9)), weight, original, kept).dense())
    assert len(calls) == 1 and calls[0][0] is original
    assert all(torch.equal(results[0], result) for result in results)
    assert all(part.device.type == "cpu" and part.is_contiguous() for part in kept.memory.values())


@pytest.mark.parametrize("kind", ["low-rank", "dense"])
def test_inputs_stay_as_they_are_and_a_dense_dtype_is_kept(kind):
    original, left, right = (matrix(shape, 1).float() for shape in ((6, 9), (6, 2), (9, 2)))
    copies = [t.clone() for t in (original, left, right)]
    proposed = LowRank(left, right) if kind == "low-rank" else Dense(left @ right.T)
    found = Revive(keep=0.5).trim(proposed, original, original, state())
    assert all(torch.equal(a, b) for a, b in zip((original, left, right), copies, strict=True))
    assert not torch.equal(found.dense().float(), left @ right.T)
    assert kind == "low-rank" or found.dense().dtype == torch.float32
