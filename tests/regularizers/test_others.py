"""PCA, PRUNE and SPHERE against independent dense computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.regularizers import settings_of, trimming

from harness_rect.config import make_regularizer
from harness_rect.regularizers import (
    REGULARIZERS,
    WeightState,
    largest_singular_value,
    pca,
    prune,
    prune_factors,
    sphere,
    sphere_factors,
)
from harness_rect.updates import Dense, LowRank

shapes = st.tuples(st.integers(2, 9), st.integers(2, 9))


def matrix(shape: tuple[int, int], seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- PCA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_pca_writes_scores_into_the_first_columns_of_zeros(keep):
    update = matrix((10, 30), 0)
    result = pca(update, keep=keep)
    n = int(keep * 10)
    assert not result[n:].any()
    centred = update.T - update.T.mean(0)
    u, s, _ = np.linalg.svd(centred.numpy(), full_matrices=False)
    scores = (u * s)[:, :n]
    np.testing.assert_allclose(np.abs(result[:n].T.numpy()), np.abs(scores), atol=1e-9)


# -- PRUNE ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]), rank=st.integers(1, 9))
def test_prune_restrains_the_accumulated_singular_values(shape, seed, scale, rank):
    original = matrix(shape, seed)
    rank = min(rank, *shape)
    before = original + 0.3 * scale * matrix((shape[0], rank), seed + 1) @ matrix((rank, shape[1]), seed + 2)
    update = scale * matrix(shape, seed + 3)
    result = before + prune(update, before, original) - original
    u, s, vt = np.linalg.svd((before + update - original).numpy(), full_matrices=False)
    limit = np.linalg.svd(original.numpy(), compute_uv=False)[0]
    restrained = [math.log(x, 1.2) - math.log(limit, 1.2) + limit if x >= limit else x for x in s]
    np.testing.assert_allclose(result.numpy(), (u * restrained) @ vt, atol=1e-8 * max(1, s[0]))


ranks = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 30.0]), rank=ranks)
def test_prune_in_factors_equals_the_dense_one(shape, seed, scale, rank):
    original = matrix(shape, seed)
    left, right = scale * matrix((shape[0], rank), seed + 1), matrix((shape[1], rank), seed + 2)
    dense = prune(left @ right.T, original, original)
    a, b = prune_factors(left, right, largest_singular_value(original))
    torch.testing.assert_close(a @ b.T, dense, rtol=1e-7, atol=1e-8 * max(1.0, float(dense.abs().max())))
    assert a.shape[1] == b.shape[1] <= rank


def test_prune_leaves_updates_of_a_zero_weight_alone():
    update, zero = matrix((4, 3), 0), torch.zeros(4, 3, dtype=torch.float64)
    assert torch.equal(prune(update, zero, zero), update)
    left, right = matrix((4, 2), 1), matrix((3, 2), 2)
    for found, given_ in zip(prune_factors(left, right, 0.0), (left, right), strict=True):
        assert torch.equal(found, given_)


def test_prune_leaves_small_updates_alone():
    original = matrix((6, 8), 0)
    update = matrix((6, 8), 1, 1e-3)
    assert torch.equal(prune(update, original, original), update)


# -- SPHERE ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 99),
    alpha=st.sampled_from([0.5, 1.0]),
    beta=st.sampled_from([0.3, 0.5, 0.9]),
)
def test_sphere_projects_out_the_top_directions_of_the_rows(shape, seed, alpha, beta):
    weight, update = matrix(shape, seed), matrix(shape, seed + 1)
    unit = weight / weight.norm(dim=1, keepdim=True)
    values, vectors = np.linalg.eigh((unit.T @ unit).numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    count = next(i for i in range(1, len(values) + 1) if values[:i].sum() >= beta * values.sum() - 1e-12)
    u = torch.from_numpy(vectors[:, :count].copy())
    wanted = update @ (torch.eye(shape[1], dtype=torch.float64) - alpha * u @ u.T)
    torch.testing.assert_close(sphere(update, weight, alpha=alpha, beta=beta), wanted, rtol=1e-7, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), rank=ranks, transposed=st.booleans())
def test_sphere_in_factors_equals_the_dense_one(shape, seed, rank, transposed):
    weight = matrix(shape, seed)
    left, right = matrix((shape[0], rank), seed + 1), matrix((shape[1], rank), seed + 2)
    dense = trimming("sphere", transposed=transposed)(left @ right.T, weight, weight)
    a, b = sphere_factors(left, right, weight, transposed=transposed)
    assert (a.shape, b.shape) == (left.shape, right.shape)
    torch.testing.assert_close(a @ b.T, dense, rtol=1e-9, atol=1e-9)


# -- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pca", "sphere", "prune"])
def test_a_transposed_weight_is_treated_as_its_transpose(name):
    update, weight, original = matrix((6, 9), 0, 30), matrix((6, 9), 1), matrix((6, 9), 2)
    plain = trimming(name, **settings_of(name))
    turned = trimming(name, transposed=True, **settings_of(name))
    result = plain(update, weight, original)
    assert not torch.equal(result, update)
    torch.testing.assert_close(turned(update.T, weight.T, original.T).T, result, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name != "none"])
def test_inputs_stay_as_they_are_and_dtypes_are_kept(name):
    update, weight, original = (matrix((6, 9), seed, 30).float() for seed in range(3))
    copies = [t.clone() for t in (update, weight, original)]
    regularize = trimming(name, torch.Generator().manual_seed(0), **settings_of(name, 0.5))
    assert regularize(update, weight, original).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((update, weight, original), copies, strict=True))


def test_prune_stays_dense_after_a_dense_update():
    generator = torch.Generator().manual_seed(5)
    original = torch.randn(12, 20, generator=generator)
    first, left, right = (
        torch.randn(*shape, generator=generator) * 4 for shape in ((12, 20), (12, 1), (20, 1))
    )
    regularizer, state = make_regularizer("prune", {}), WeightState({}, generator)
    weight = original + regularizer.trim(Dense(first), original, original, state).dense()
    second = regularizer.trim(LowRank(left, right), weight, original, state).dense()
    assert torch.allclose(second, prune(left @ right.T, weight, original), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("function", "given"), [(prune, {"base": 3.0}), (sphere, {"alpha": 0.7, "beta": 0.6})]
)
def test_settings_reach_updates_of_both_kinds(function, given, transposed):
    weight, left, right = matrix((12, 20), 0), matrix((12, 2), 1, 9), matrix((20, 2), 2)
    update = left @ right.T
    if function is prune:
        wanted = prune(update, weight, weight, **given)
    else:
        wanted = sphere(update.T, weight.T, **given).T if transposed else sphere(update, weight, **given)
    for proposed in (Dense(update), LowRank(left, right)):
        state = WeightState({}, torch.Generator(), transposed)
        found = make_regularizer(function.__name__, given).trim(proposed, weight, weight, state).dense()
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-6)
